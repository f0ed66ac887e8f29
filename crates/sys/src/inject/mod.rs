//! System calls in the place of another process, by borrowing one of its threads for a moment.
//!
//! A thread is stopped with ptrace, preferably inside a system call that the kernel restarts by itself. Its
//! registers are pointed at a `syscall` instruction of its own C library and, when all is done, put back.
//!
//! Whatever happens to **us** in between leaves the thread whole. The borrowed registers are set together
//! with a signal frame below the thread's stack that holds its own ones: if we die, the thread makes the
//! call, returns into the C library's signal trampoline, and goes on where it was found (an interrupted call
//! returns `EINTR` then, as after any signal). For the same reason the call is awaited with `PTRACE_SYSCALL`,
//! never by single-stepping: a step that outlives its tracer kills the process with `SIGTRAP`. And nothing of
//! a tracer is inherited: `PTRACE_O_EXITKILL` is not used.
//!
//! ptrace belongs to one thread, so each borrowed thread gets a thread of ours. A thread that does not stop
//! in time (it may wait in the kernel for a page that only we can bring) is left to it: whenever it stops, it
//! is let go at once.

mod filter;
mod frame;
mod gadget;
mod thread;

use crate::{ioctl, proc, process::PidFd};
use gadget::Gadgets;
use nix::libc;
use std::{
    fs, io,
    io::IoSlice,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, RawFd},
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};
use thread::Traced;

/// How long a thread may take to stop before another is taken. One that can stop does so within a scheduler's
/// slice, a few milliseconds on a busy host; longer waits only delay a migration whose thread sits in the
/// kernel.
const STOPS_WITHIN: Duration = Duration::from_millis(100);

/// How long an injected call may take. All of ours are instant; `madvise` of a terabyte is not.
const RETURNS_WITHIN: Duration = Duration::from_secs(10);

/// A process that lends us one of its threads. The thread goes on when this is dropped.
#[derive(Debug)]
pub struct Borrowed {
    calls: Option<Sender<Call>>,
    results: Receiver<io::Result<u64>>,
    lender: Option<JoinHandle<()>>,
    process: Arc<PidFd>,
    tid: i32,
}

/// A system call's number and arguments.
type Call = (i64, [u64; 6]);

impl Borrowed {
    /// Borrows a thread of `process`. Tries one after the other until one stops.
    pub fn seize(process: &Arc<PidFd>) -> io::Result<Self> {
        let gadgets = gadget::find(process)?;
        let mut last = None;
        for tid in by_suitability(process)? {
            match Self::lend(process, tid, gadgets) {
                Ok(borrowed) if process.is_alive()? => return Ok(borrowed),
                Ok(_) => break,
                // One that did not stop in time is held by its lender until it does.
                Err(_) if is_lent_to_us(process, tid) => {
                    let text = format!("thread {tid} of process {} is still being let go", process.pid());
                    last = Some(io::Error::new(io::ErrorKind::TimedOut, text));
                }
                // A lack of rights is the same for all threads.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied && last.is_none() => {
                    return Err(named(process, tid, error));
                }
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| io::Error::from_raw_os_error(libc::ESRCH)))
    }

    /// Borrows this very thread of `process`, if it stops soon.
    pub fn seize_thread(process: &Arc<PidFd>, tid: i32) -> io::Result<Self> {
        Self::lend(process, tid, gadget::find(process)?)
    }

    fn lend(process: &Arc<PidFd>, tid: i32, gadgets: Gadgets) -> io::Result<Self> {
        let (calls, to_make) = channel::<Call>();
        let (answer, results) = channel();
        let of = Arc::clone(process);
        let lend = move || {
            let mut traced = match Traced::stop(of, tid, gadgets) {
                Ok(traced) => traced,
                Err(error) => return drop(answer.send(Err(error))),
            };
            if answer.send(Ok(0)).is_err() {
                return;
            }
            while let Ok((number, arguments)) = to_make.recv() {
                if answer.send(traced.syscall(number, arguments)).is_err() {
                    return;
                }
            }
        };
        let lender = std::thread::Builder::new().name(format!("borrow-{tid}")).spawn(lend)?;
        let borrowed =
            Self { calls: Some(calls), results, lender: Some(lender), process: Arc::clone(process), tid };
        borrowed.wait(STOPS_WITHIN)?;
        Ok(borrowed)
    }

    fn wait(&self, timeout: Duration) -> io::Result<u64> {
        match self.results.recv_timeout(timeout) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => {
                let text = format!("thread {} of process {} does not stop", self.tid, self.process.pid());
                Err(io::Error::new(io::ErrorKind::TimedOut, text))
            }
            Err(RecvTimeoutError::Disconnected) => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    }

    /// The thread that was borrowed.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Makes system call `number` in the process. The call must not block, nor take pointers that are not the
    /// process' own.
    pub fn syscall(&self, number: i64, arguments: [u64; 6]) -> io::Result<u64> {
        let calls = self.calls.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        calls.send((number, arguments)).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
        self.wait(RETURNS_WITHIN)
    }

    /// Closes descriptor `n` of the process.
    pub fn close(&self, n: RawFd) -> io::Result<()> {
        self.syscall(libc::SYS_close, [n as u64, 0, 0, 0, 0, 0]).map(drop)
    }

    /// `madvise` in the process.
    pub fn madvise(&self, address: u64, bytes: u64, advice: i32) -> io::Result<()> {
        self.syscall(libc::SYS_madvise, [address, bytes, advice as u64, 0, 0, 0]).map(drop)
    }

    /// Makes a userfaultfd (`O_CLOEXEC`, `O_NONBLOCK`, kernel faults too) in the process and returns its
    /// number there.
    ///
    /// Where the process has no right to do that, or must not try, it is lent `/dev/userfaultfd`, opened by
    /// us.
    pub fn userfaultfd(&self) -> io::Result<RawFd> {
        // Never UFFD_USER_MODE_ONLY: a system call of QEMU or KVM itself may be the first to touch a page.
        let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
        match self.syscall(libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0]) {
            // A filter may say that there is no such call, or anything else.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::ENOSYS))
                    || filter::is_forbidden(&error) => {}
            made => return made.map(|n| n as RawFd),
        }
        let device = fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd").map_err(|error| {
            let pid = self.process.pid();
            let text = format!(
                "process {pid} cannot make a userfaultfd (sysctl vm.unprivileged_userfaultfd is 0, or its \
                 seccomp filter is against it), and /dev/userfaultfd cannot be opened for it: {error}; run \
                 the agent as root on Linux 6.1 or newer"
            );
            io::Error::new(io::ErrorKind::PermissionDenied, text)
        })?;
        let lent = self.give(device.as_fd())?;
        let made =
            self.syscall(libc::SYS_ioctl, [lent as u64, ioctl::USERFAULTFD_IOC_NEW.into(), flags, 0, 0, 0]);
        let closed = self.close(lent);
        let made = made? as RawFd;
        closed.map(|()| made)
    }

    /// Gives the process a duplicate of `fd` and returns its number there.
    ///
    /// The kernel has no `pidfd_getfd` in this direction, and a process of another user may not take from us.
    /// So it makes a pair of sockets, we take one end, send `fd` through it, and the process receives it at
    /// the other. This needs nobody's cooperation; QMP `add-fd` would need QEMU's main loop, which may wait
    /// for a page of ours.
    pub fn give(&self, fd: BorrowedFd<'_>) -> io::Result<RawFd> {
        let room = units::PAGE_SIZE as u64;
        let rights = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let kind = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let scratch = self.syscall(libc::SYS_mmap, [0, room, rights, kind, u64::MAX, 0])?;
        let given = self.give_through(scratch, fd);
        let unmapped = self.syscall(libc::SYS_munmap, [scratch, room, 0, 0, 0, 0]);
        let given = given?;
        unmapped.map(|_| given)
    }

    fn give_through(&self, scratch: u64, fd: BorrowedFd<'_>) -> io::Result<RawFd> {
        let kind = (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC) as u64;
        self.syscall(libc::SYS_socketpair, [libc::AF_UNIX as u64, kind, 0, scratch, 0, 0])?;
        let mut pair = [0_u8; 8];
        self.process.read_memory(scratch, &mut pair)?;
        let [ours, theirs] = [int(&pair[..4]), int(&pair[4..])];
        let given = self.send(ours, fd).and_then(|()| self.receive(theirs, scratch));
        let closed = self.close(ours).and(self.close(theirs));
        let given = given?;
        closed.map(|()| given)
    }

    fn send(&self, end: RawFd, fd: BorrowedFd<'_>) -> io::Result<()> {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let socket = self.process.take_fd(end)?;
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut message = SendAncillaryBuffer::new(&mut space);
        message.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(socket, &[IoSlice::new(&[0])], &mut message, SendFlags::empty())?;
        Ok(())
    }

    /// Receives one descriptor from socket `end` of the process, with a `msghdr` laid out at `scratch` there:
    /// the header (56 bytes), then one `iovec` (16), one byte of data, and the control message (16 + 8).
    fn receive(&self, end: RawFd, scratch: u64) -> io::Result<RawFd> {
        const IOVEC: u64 = 64;
        const DATA: u64 = 80;
        const CONTROL: u64 = 96;
        const CONTROL_BYTES: u64 = 24;
        let words = [0, 0, scratch + IOVEC, 1, scratch + CONTROL, CONTROL_BYTES, 0, 0, scratch + DATA, 1];
        let bytes: Vec<u8> = words.iter().flat_map(|word: &u64| word.to_ne_bytes()).collect();
        self.process.write_memory(scratch, &bytes)?;
        let flags = (libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) as u64;
        self.syscall(libc::SYS_recvmsg, [end as u64, scratch, flags, 0, 0, 0])?;
        let mut control = [0_u8; CONTROL_BYTES as usize];
        self.process.read_memory(scratch + CONTROL, &mut control)?;
        let (level, kind) = (int(&control[8..12]), int(&control[12..16]));
        if (level, kind) != (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            return Err(io::Error::other(format!("process {} received no descriptor", self.process.pid())));
        }
        Ok(int(&control[16..20]))
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.calls = None;
        // A lender that still waits for its thread to stop goes when it does; everything else ends at once,
        // and is awaited so that the thread runs again when we return.
        if let Some(lender) = self.lender.take()
            && !matches!(self.results.recv_timeout(STOPS_WITHIN), Err(RecvTimeoutError::Timeout))
        {
            drop(lender.join());
        }
    }
}

/// The thread that traces this one; `0` if none does.
fn tracer(process: &PidFd, tid: i32) -> String {
    let status = fs::read_to_string(process.proc_path(format!("task/{tid}/status"))).unwrap_or_default();
    proc::value(&status, "TracerPid").unwrap_or("0").to_owned()
}

fn is_lent_to_us(process: &PidFd, tid: i32) -> bool {
    let tracer = tracer(process, tid);
    tracer != "0" && Path::new("/proc/self/task").join(tracer).exists()
}

/// Why a thread cannot be borrowed: the kernel says no more than that it is not permitted.
fn named(process: &PidFd, tid: i32, error: io::Error) -> io::Error {
    let tracer = tracer(process, tid);
    let pid = process.pid();
    let text = if tracer == "0" {
        format!(
            "the kernel does not let us trace process {pid} ({error}): run the agent as root, with \
             CAP_SYS_PTRACE, and without a filter of its own"
        )
    } else {
        let name = fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
        format!("process {pid} is traced by process {tracer} ({}): detach that debugger", name.trim())
    };
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

fn int(bytes: &[u8]) -> i32 {
    bytes.try_into().map_or(-1, i32::from_ne_bytes)
}

/// Whether a thread is one of the kernel's that works in this process' memory (io_uring, and vhost from Linux
/// 6.4 on). It never returns to user code, where a call could be made.
fn is_of_the_kernel(process: &PidFd, tid: i32) -> bool {
    let stat = fs::read_to_string(process.proc_path(format!("task/{tid}/stat"))).unwrap_or_default();
    let flags = proc::Stat::parse(&stat).and_then(|stat| stat.number(proc::FLAGS));
    flags.is_ok_and(|flags| flags & KERNELS != 0)
}

/// `PF_IO_WORKER` and `PF_USER_WORKER` of `<linux/sched.h>`.
const KERNELS: u64 = 0x10 | 0x4000;

/// The threads of `process`, the best ones first: in a call that the kernel restarts, in any other call,
/// running, and last in an `ioctl`, which is where vCPUs live: their `KVM_RUN` returns to QEMU when it is
/// interrupted.
fn by_suitability(process: &PidFd) -> io::Result<Vec<i32>> {
    let mut threads = process.threads()?;
    threads.retain(|tid| !is_of_the_kernel(process, *tid));
    threads.sort_by_cached_key(|tid| {
        let text = fs::read_to_string(process.proc_path(format!("task/{tid}/syscall"))).unwrap_or_default();
        let number = text.split_whitespace().next().and_then(|word| word.parse::<i64>().ok());
        match number {
            Some(
                libc::SYS_futex
                | libc::SYS_poll
                | libc::SYS_ppoll
                | libc::SYS_nanosleep
                | libc::SYS_clock_nanosleep
                | libc::SYS_restart_syscall
                | libc::SYS_read,
            ) => 0,
            Some(libc::SYS_ioctl) => 3,
            Some(0..) => 1,
            _ => 2,
        }
    });
    Ok(threads)
}
