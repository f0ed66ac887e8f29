//! A process held so that its number cannot come to mean another one.

use crate::proc::{self, MINOR_FAULTS, Stat};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open, pidfd_send_signal};
use std::{
    collections::HashMap,
    fs, io,
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// A process, held by a pidfd.
#[derive(Debug)]
pub struct PidFd {
    pid: Pid,
    fd: OwnedFd,
}

impl PidFd {
    /// Holds process `pid`. Fails with `ESRCH` when there is none.
    pub fn open(pid: i32) -> io::Result<Self> {
        let pid = Pid::from_raw(pid).filter(|pid| pid.as_raw_nonzero().get() > 0);
        let pid = pid
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a process has a positive number"))?;
        Ok(Self { pid, fd: pidfd_open(pid, PidfdFlags::empty())? })
    }

    /// Its number.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Another hold on the same process.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { pid: self.pid, fd: self.fd.try_clone()? })
    }

    /// `/proc/PID/name`.
    pub fn proc_path(&self, name: impl AsRef<Path>) -> PathBuf {
        Path::new("/proc").join(self.pid().to_string()).join(name)
    }

    /// A duplicate of its descriptor `n`: the same open file. Needs the right to ptrace it.
    pub fn take_fd(&self, n: RawFd) -> io::Result<OwnedFd> {
        Ok(pidfd_getfd(&self.fd, n, PidfdGetfdFlags::empty())?)
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> io::Result<bool> {
        Ok(!self.wait(Duration::ZERO)?)
    }

    /// Waits until it has ended, at most `timeout`; says whether it has. It need not be a child.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        readable_within(self.fd.as_fd(), timeout)
    }

    /// Ends it at once, also where it is stopped.
    pub fn kill(&self) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.fd, Signal::KILL)?)
    }

    /// The processor time that all its threads have used so far.
    pub fn cpu_time(&self) -> io::Result<Duration> {
        let clock = nix::time::clock_getcpuclockid(nix::unistd::Pid::from_raw(self.pid()))?;
        Ok(nix::time::clock_gettime(clock)?.into())
    }

    /// The processor time that its first thread has used so far.
    pub fn main_thread_cpu_time(&self) -> io::Result<Duration> {
        let text = fs::read_to_string(self.proc_path("schedstat"))?;
        let used = text.split_whitespace().next().and_then(|word| word.parse().ok());
        let odd = || io::Error::new(io::ErrorKind::InvalidData, format!("odd content of schedstat: {text}"));
        used.map(Duration::from_nanos).ok_or_else(odd)
    }

    /// How many page faults this thread of it has had that needed no disk.
    pub fn thread_faults(&self, tid: i32) -> io::Result<u64> {
        let text = fs::read_to_string(self.proc_path(format!("task/{tid}/stat")))?;
        Stat::parse(&text)?.number(MINOR_FAULTS)
    }

    /// Copies from its memory. Fails unless all of `into` was filled.
    pub fn read_memory(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
        let remote = [nix::sys::uio::RemoteIoVec { base: address as usize, len: into.len() }];
        let wanted = into.len();
        let pid = nix::unistd::Pid::from_raw(self.pid());
        let got = nix::sys::uio::process_vm_readv(pid, &mut [IoSliceMut::new(into)], &remote)?;
        all(got, wanted, "read from")
    }

    /// Copies into its memory. Fails unless all of `from` was written; part of it may have been.
    pub fn write_memory(&self, address: u64, from: &[u8]) -> io::Result<()> {
        let remote = [nix::sys::uio::RemoteIoVec { base: address as usize, len: from.len() }];
        let pid = nix::unistd::Pid::from_raw(self.pid());
        let got = nix::sys::uio::process_vm_writev(pid, &[IoSlice::new(from)], &remote)?;
        all(got, from.len(), "written to")
    }

    /// Its threads by the numbers that they have in their own namespace, by which the kernel tells of their
    /// faults.
    pub fn threads_by_inner_number(&self) -> io::Result<HashMap<u32, i32>> {
        let mut threads = HashMap::new();
        for tid in self.threads()? {
            // One that has ended meanwhile has no number any more.
            let Ok(status) = fs::read_to_string(self.proc_path(format!("task/{tid}/status"))) else {
                continue;
            };
            threads.extend(innermost(&status).map(|inner| (inner, tid)));
        }
        Ok(threads)
    }

    /// The numbers of its threads.
    pub fn threads(&self) -> io::Result<Vec<i32>> {
        let mut threads = Vec::new();
        for entry in fs::read_dir(self.proc_path("task"))? {
            threads.extend(entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
        }
        Ok(threads)
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The last number of `NSpid`: first comes the one that `/proc` here knows, then one for each namespace
/// within.
fn innermost(status: &str) -> Option<u32> {
    proc::value(status, "NSpid")?.split_whitespace().next_back()?.parse().ok()
}

fn all(got: usize, wanted: usize, done: &str) -> io::Result<()> {
    if got == wanted {
        return Ok(());
    }
    let text = format!("only {got} of {wanted} bytes could be {done} the process");
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, text))
}

/// The process at the other end of a unix socket, by `SO_PEERCRED`: who connected, or who called `listen`.
pub fn peer_pid(socket: &UnixStream) -> io::Result<i32> {
    Ok(rustix::net::sockopt::socket_peercred(socket)?.pid.as_raw_nonzero().get())
}

/// Waits until `fd` is readable (or in error), at most `timeout`, whatever signals arrive meanwhile.
pub fn readable_within(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let end = Instant::now().checked_add(timeout);
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let left =
            left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], left.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::innermost;

    #[test]
    fn a_thread_has_the_number_of_its_innermost_namespace() {
        let rows = [
            ("Name:\tqemu\nNSpid:\t4711\nNSsid:\t1\n", Some(4711)),
            ("Name:\tNSpid: 9\nNSpid:\t4711\t83\t7\n", Some(7)),
            ("Name:\tqemu\n", None),
            ("NSpid:\n", None),
        ];
        for (status, expected) in rows {
            assert_eq!(innermost(status), expected, "{status}");
        }
    }
}
