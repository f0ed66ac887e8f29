//! userfaultfd: write protection and missing pages of another process (`admin-guide/mm/userfaultfd.rst`).

use crate::{
    ioctl,
    process::{PidFd, readable_within},
};
use linux_raw_sys::{general as raw, ioctl as request};
use std::{
    fs, io,
    ops::{BitOr, Range},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

/// How long an operation is tried again while the kernel says that the mappings are changing (`EAGAIN`). They
/// change for microseconds; much longer means a fork or an unmapping that hangs.
const CHANGING: Duration = Duration::from_secs(5);

const MESSAGE: usize = size_of::<raw::uffd_msg>();
const WRITEPROTECT_MODE_WP: u64 = 1;

/// What a userfaultfd can do, as asked for with `UFFDIO_API`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features(pub u64);

impl Features {
    /// Nothing beyond the basics.
    pub const NONE: Self = Self(0);
    /// Missing pages of shared memory (Linux 4.11).
    pub const MISSING_SHMEM: Self = Self(raw::UFFD_FEATURE_MISSING_SHMEM as u64);
    /// Faults say which thread waits (Linux 4.14).
    pub const THREAD_ID: Self = Self(raw::UFFD_FEATURE_THREAD_ID as u64);
    /// Memory that is thrown away is told of, and whoever does it waits until that was read (Linux 4.11).
    pub const DISCARDS: Self = Self(raw::UFFD_FEATURE_EVENT_REMOVE as u64);
    /// Write protection (Linux 5.7).
    pub const WP: Self = Self(raw::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64);
    /// Write protection of shared memory (Linux 5.19).
    pub const WP_SHMEM: Self = Self(raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64);
    /// Write protection of pages that are not there yet (Linux 6.4).
    pub const WP_UNPOPULATED: Self = Self(raw::UFFD_FEATURE_WP_UNPOPULATED as u64);
    /// Write protection that the kernel lifts by itself (Linux 6.7).
    pub const WP_ASYNC: Self = Self(raw::UFFD_FEATURE_WP_ASYNC as u64);

    /// Whether all of `other` is here.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Features {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What a range of addresses is registered for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Watch {
    /// The first access to a page that is not there.
    Missing,
    /// Writes to protected pages.
    Writes,
}

/// Somebody waits for a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageFault {
    /// The address that was touched, rounded down to its page.
    pub address: u64,
    /// Whether it was a write.
    pub write: bool,
    /// Whether it was a write to a protected page, not an access to a missing one.
    pub protected: bool,
    /// The thread that waits, as its process' namespace numbers it; 0 unless `THREAD_ID` was asked for.
    pub thread: u32,
}

/// How far placing a run of pages came, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Copied {
    /// All of it was placed.
    All,
    /// This much was placed; the page after it was there already, and was left alone. Who waits for that page
    /// was not woken.
    UpTo(u64),
}

/// A userfaultfd that acts on **another** process' address space.
///
/// It cannot be made for our own: what it does there could not be safe.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Takes descriptor `n` of `process`, which must be a userfaultfd. It stays open there too.
    pub fn take(process: &PidFd, n: RawFd) -> io::Result<Self> {
        if process.pid() == std::process::id() as i32 {
            let text = "a userfaultfd of our own process is not supported";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let fd = process.take_fd(n)?;
        let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if link.as_os_str() != "anon_inode:[userfaultfd]" {
            let text = format!(
                "descriptor {n} of process {} is {}, not a userfaultfd",
                process.pid(),
                link.display()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Self { fd })
    }

    /// Opens its interface with `features`; once in its life, before anything else. `EINVAL` means that the
    /// kernel lacks one of them.
    pub fn enable(&self, features: Features) -> io::Result<()> {
        enable(&self.fd, features).map(drop)
    }

    /// Watches `addresses`: whole pages, all of them mapped.
    pub fn register(&self, addresses: Range<u64>, watch: Watch) -> io::Result<()> {
        let mode = match watch {
            Watch::Missing => raw::UFFDIO_REGISTER_MODE_MISSING,
            Watch::Writes => raw::UFFDIO_REGISTER_MODE_WP,
        };
        let mut argument = raw::uffdio_register { range: span(&addresses), mode: mode.into(), ioctls: 0 };
        self.run(request::UFFDIO_REGISTER, &mut argument)
    }

    /// Watches `addresses` no more: protections are lifted and whoever waits goes on.
    pub fn unregister(&self, addresses: Range<u64>) -> io::Result<()> {
        self.run(request::UFFDIO_UNREGISTER, &mut span(&addresses))
    }

    /// Protects `addresses` from writes, pages that are not there included.
    pub fn protect(&self, addresses: Range<u64>) -> io::Result<()> {
        self.set_protection(addresses, WRITEPROTECT_MODE_WP)
    }

    /// Lifts the protection of `addresses` and wakes who waits there.
    pub fn unprotect(&self, addresses: Range<u64>) -> io::Result<()> {
        self.set_protection(addresses, 0)
    }

    fn set_protection(&self, addresses: Range<u64>, mode: u64) -> io::Result<()> {
        let mut argument = raw::uffdio_writeprotect { range: span(&addresses), mode };
        let mut patience = Patience::default();
        loop {
            match self.run(request::UFFDIO_WRITEPROTECT, &mut argument) {
                Err(error) if again(&error) => patience.spend(error)?,
                done => return done,
            }
        }
    }

    /// Places `from` at `address`, where nothing must be yet, and wakes who waits for it; stops at the first
    /// page that is there already.
    pub fn copy(&self, address: u64, from: &[u8]) -> io::Result<Copied> {
        let mut done = 0_u64;
        let mut patience = Patience::default();
        while done < from.len() as u64 {
            let rest = &from[done as usize..];
            let mut argument = raw::uffdio_copy {
                dst: address + done,
                src: rest.as_ptr() as u64,
                len: rest.len() as u64,
                mode: 0,
                copy: 0,
            };
            // `copy` says how far it came, whatever the call itself says.
            match self.run(request::UFFDIO_COPY, &mut argument) {
                Ok(()) => return Ok(Copied::All),
                Err(_) if argument.copy > 0 => done += argument.copy as u64,
                Err(error) if error.raw_os_error() == Some(nix::libc::EEXIST) => {
                    return Ok(Copied::UpTo(done));
                }
                Err(error) if again(&error) => patience.spend(error)?,
                Err(error) => return Err(error),
            }
        }
        Ok(Copied::All)
    }

    /// Places zeros at `addresses`, where nothing must be yet, and wakes who waits for them; stops at the
    /// first page that is there already.
    pub fn zero(&self, addresses: Range<u64>) -> io::Result<Copied> {
        let mut done = 0_u64;
        let mut patience = Patience::default();
        while addresses.start + done < addresses.end {
            let range = span(&(addresses.start + done..addresses.end));
            let mut argument = raw::uffdio_zeropage { range, mode: 0, zeropage: 0 };
            match self.run(request::UFFDIO_ZEROPAGE, &mut argument) {
                Ok(()) => return Ok(Copied::All),
                Err(_) if argument.zeropage > 0 => done += argument.zeropage as u64,
                Err(error) if error.raw_os_error() == Some(nix::libc::EEXIST) => {
                    return Ok(Copied::UpTo(done));
                }
                Err(error) if again(&error) => patience.spend(error)?,
                Err(error) => return Err(error),
            }
        }
        Ok(Copied::All)
    }

    /// Lets whoever waits in `addresses` look again.
    pub fn wake(&self, addresses: Range<u64>) -> io::Result<()> {
        self.run(request::UFFDIO_WAKE, &mut span(&addresses))
    }

    /// The next fault; `None` if there is none within `timeout`. Several threads may wait, each gets its own.
    pub fn next(&self, timeout: Duration) -> io::Result<Option<PageFault>> {
        let end = Instant::now().checked_add(timeout);
        loop {
            // No other event was asked for.
            if let Some(fault) = self.next_of(fault)? {
                return Ok(Some(fault));
            }
            let left = end.map_or(timeout, |end| end.saturating_duration_since(Instant::now()));
            if !readable_within(self.fd.as_fd(), left)? {
                return Ok(None);
            }
        }
    }

    /// Whether there is a message to be read within `timeout`.
    pub fn waits(&self, timeout: Duration) -> io::Result<bool> {
        readable_within(self.fd.as_fd(), timeout)
    }

    /// Addresses that were thrown away, if a message of that waits; for a descriptor that was enabled with
    /// [`Features::DISCARDS`] and of which nothing else is awaited.
    pub fn next_discard(&self) -> io::Result<Option<Range<u64>>> {
        self.next_of(discard)
    }

    /// The next message that is read as `event` does; `None` once none waits.
    fn next_of<T>(&self, event: impl Fn(&[u8; MESSAGE]) -> Option<T>) -> io::Result<Option<T>> {
        let mut message = [0_u8; MESSAGE];
        loop {
            match rustix::io::read(&self.fd, &mut message) {
                Ok(MESSAGE) => match event(&message) {
                    Some(event) => return Ok(Some(event)),
                    None => continue,
                },
                Ok(short) => return Err(io::Error::other(format!("a userfaultfd message of {short} bytes"))),
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn run<T>(&self, request: u32, argument: &mut T) -> io::Result<()> {
        // SAFETY: the callers above pair each request with its argument's type (asserted in `ioctl`). The
        // only address of ours that any of them holds is that of a slice that `copy` borrows, and it is only
        // read; all others belong to the address space of another process, as `take` made sure.
        unsafe { ioctl::run(self.fd.as_raw_fd(), request, argument) }.map(drop)
    }
}

/// What this kernel's userfaultfd can do, found by asking it.
pub fn supported() -> io::Result<Features> {
    // SAFETY: makes a descriptor and touches no memory; nothing is ever registered with it.
    let n = unsafe {
        nix::libc::syscall(nix::libc::SYS_userfaultfd, nix::libc::O_CLOEXEC | nix::libc::O_NONBLOCK)
    };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    enable(&unsafe { OwnedFd::from_raw_fd(n as RawFd) }, Features::NONE)
}

fn enable(fd: &OwnedFd, features: Features) -> io::Result<Features> {
    let mut argument = raw::uffdio_api { api: raw::UFFD_API.into(), features: features.0, ioctls: 0 };
    // SAFETY: `UFFDIO_API` takes a `uffdio_api`, which holds no addresses.
    unsafe { ioctl::run(fd.as_raw_fd(), request::UFFDIO_API, &mut argument) }?;
    Ok(Features(argument.features))
}

fn span(addresses: &Range<u64>) -> raw::uffdio_range {
    raw::uffdio_range { start: addresses.start, len: addresses.end.saturating_sub(addresses.start) }
}

fn again(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::EAGAIN)
}

/// A word of a message.
fn word_of(message: &[u8; MESSAGE], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&message[at..at + 8]);
    u64::from_ne_bytes(word)
}

/// `struct uffd_msg`: the event's number, seven reserved bytes, the first address and the one behind the
/// last.
fn discard(message: &[u8; MESSAGE]) -> Option<Range<u64>> {
    let told = u32::from(message[0]) == raw::UFFD_EVENT_REMOVE;
    told.then(|| word_of(message, 8)..word_of(message, 16))
}

/// `struct uffd_msg`: the event's number, seven reserved bytes, flags, address, thread.
fn fault(message: &[u8; MESSAGE]) -> Option<PageFault> {
    let word = |at: usize| word_of(message, at);
    (u32::from(message[0]) == raw::UFFD_EVENT_PAGEFAULT).then(|| PageFault {
        address: word(16),
        write: word(8) & u64::from(raw::UFFD_PAGEFAULT_FLAG_WRITE) != 0,
        protected: word(8) & u64::from(raw::UFFD_PAGEFAULT_FLAG_WP) != 0,
        // The lower half of the last word: this runs on x86-64.
        thread: word(24) as u32,
    })
}

/// Tries again, but not for ever.
#[derive(Default)]
struct Patience {
    since: Option<Instant>,
}

impl Patience {
    fn spend(&mut self, error: io::Error) -> io::Result<()> {
        if self.since.get_or_insert_with(Instant::now).elapsed() > CHANGING {
            return Err(error);
        }
        std::thread::yield_now();
        Ok(())
    }
}
