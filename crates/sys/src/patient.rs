//! A process to try things on: what a migration does to QEMU is done to it, in the same way.
//!
//! It is `cat`, waiting for an end of input that never comes. Its standard error is a memfd, mapped by an
//! injected call as QEMU maps its RAM. It meets no errors, so it writes nothing there.

use crate::{
    inject::Borrowed,
    process::PidFd,
    ram::RamFile,
    uffd::{Features, Uffd},
};
use linux_raw_sys::general as raw;
use rustix::fs::MemfdFlags;
use std::{
    fs::File,
    io::{self, Read, Write},
    ops::Range,
    os::fd::{AsFd, AsRawFd, RawFd},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use units::{Bytes, PageIndex, PageRange};

/// The size of its RAM: two huge pages, so that these show when they are in use.
const RAM: Bytes = Bytes(4 << 20);
/// How long its thread may take to stop. It waits for input: where nothing else runs that is microseconds.
const BUSY: Duration = Duration::from_secs(10);
/// How many pages its RAM has.
pub const PAGES: u64 = RAM.0 / units::PAGE_SIZE as u64;

/// The process. It ends with this.
#[derive(Debug)]
pub struct Patient {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    process: Arc<PidFd>,
    ram: RamFile,
}

impl Patient {
    /// Starts it.
    pub fn start() -> io::Result<Self> {
        let file = File::from(rustix::fs::memfd_create("whimbrel-doctor", MemfdFlags::CLOEXEC)?);
        file.set_len(RAM.0)?;
        let mut child = Command::new("/bin/cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(file.try_clone()?)
            .spawn()
            .map_err(|e| io::Error::new(e.kind(), format!("/bin/cat, to try things on: {e}")))?;
        let no_pipe = || io::Error::other("a process without the pipes that it was given");
        let stdin = child.stdin.take().ok_or_else(no_pipe)?;
        let stdout = child.stdout.take().ok_or_else(no_pipe)?;
        let process = Arc::new(PidFd::open(child.id() as i32)?);
        let mut patient = Self { child, stdin, stdout, process, ram: RamFile::new(file, 0, RAM.0)? };
        patient.await_echo()?;
        Ok(patient)
    }

    /// Returns when it repeats what it is told: its libraries are loaded then, and it waits for more.
    fn await_echo(&mut self) -> io::Result<()> {
        self.stdin.write_all(b"?")?;
        let heard = self.stdout.read_exact(&mut [0]);
        heard.map_err(|e| io::Error::new(e.kind(), format!("/bin/cat, to try things on, ends at once: {e}")))
    }

    /// It, held by a pidfd.
    pub fn process(&self) -> &PidFd {
        &self.process
    }

    /// Its RAM as a file.
    pub fn ram(&self) -> &RamFile {
        &self.ram
    }

    /// What its standard input is, descriptor 0 there, in the kernel's words.
    pub fn stdin_name(&self) -> io::Result<PathBuf> {
        name_of(self.stdin.as_raw_fd())
    }

    /// Lets it ask its own number.
    pub fn getpid(&self) -> io::Result<u64> {
        self.borrow()?.syscall(i64::from(raw::__NR_getpid), [0; 6])
    }

    /// Lets it map its RAM; says where.
    pub fn map_ram(&self) -> io::Result<Range<u64>> {
        let rights = u64::from(raw::PROT_READ | raw::PROT_WRITE);
        let kind = u64::from(raw::MAP_SHARED);
        let stderr = 2;
        let start = self.borrow()?.syscall(i64::from(raw::__NR_mmap), [0, RAM.0, rights, kind, stderr, 0])?;
        Ok(start..start + RAM.0)
    }

    /// Lets it map as much memory that only it can reach; says where.
    pub fn map_private(&self) -> io::Result<Range<u64>> {
        let rights = u64::from(raw::PROT_READ | raw::PROT_WRITE);
        let kind = u64::from(raw::MAP_PRIVATE | raw::MAP_ANONYMOUS);
        let start =
            self.borrow()?.syscall(i64::from(raw::__NR_mmap), [0, RAM.0, rights, kind, u64::MAX, 0])?;
        Ok(start..start + RAM.0)
    }

    /// Has the kernel give it no huge pages there: what is taken away of one may stay.
    pub(crate) fn keep_plain(&self, addresses: &Range<u64>) -> io::Result<()> {
        let bytes = addresses.end - addresses.start;
        self.borrow()?.madvise(addresses.start, bytes, nix::libc::MADV_NOHUGEPAGE)
    }

    /// Gives it a duplicate of `fd`; says which number that has there.
    pub fn give(&self, fd: impl AsFd) -> io::Result<RawFd> {
        self.borrow()?.give(fd.as_fd())
    }

    /// Lets it make a request of a driver.
    pub(crate) fn request(&self, fd: RawFd, request: u32, argument: u64) -> io::Result<u64> {
        let call = i64::from(raw::__NR_ioctl);
        self.borrow()?.syscall(call, [fd as u64, request.into(), argument, 0, 0, 0])
    }

    /// A userfaultfd of its address space with `features`, held by us alone.
    pub fn uffd(&self, features: Features) -> io::Result<Uffd> {
        let thread = self.borrow()?;
        let n = thread.userfaultfd()?;
        let uffd = Uffd::take(&self.process, n);
        thread.close(n)?;
        let uffd = uffd?;
        uffd.enable(features)?;
        Ok(uffd)
    }

    /// On a busy machine its only thread may not get to where it stops: tried again for a while.
    fn borrow(&self) -> io::Result<Borrowed> {
        let end = Instant::now() + BUSY;
        loop {
            match Borrowed::seize(&self.process) {
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    if Instant::now() > end {
                        let text = format!(
                            "{error} within {BUSY:?}: this machine is too busy to tell; try again later"
                        );
                        return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                    }
                }
                other => return other,
            }
        }
    }
}

impl Drop for Patient {
    fn drop(&mut self) {
        // Killed: it has nothing to lose. An error means that it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a descriptor of ours is, in the kernel's words.
pub fn name_of(fd: RawFd) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{fd}"))
}

/// One page.
pub fn page(n: u64) -> PageRange {
    PageRange::new(PageIndex(n), 1)
}
