//! A process that stands still as a whole (`SIGSTOP`), until it is let go or killed. That outlives whoever
//! did it; but any `SIGCONT` undoes it, whoever sends it. So it can be seen afterwards whether it stood still
//! all the time.
//!
//! A process can also be made to stand still with the very call by which it writes to us: a socket that has
//! something to read sends a signal to its owner (`man 2 fcntl`, F_SETSIG), from within the call that wrote,
//! and a thread on its way out of a call takes its signals before it does anything else.

use crate::{proc::Stat, process::PidFd};
use linux_raw_sys::general::F_SETSIG;
use nix::libc;
use rustix::process::{Signal, pidfd_send_signal};
use std::{
    fs, io,
    os::{fd::AsRawFd, unix::net::UnixStream},
    thread::sleep,
    time::{Duration, Instant},
};

/// How long to wait before its threads are looked at again. They stop as soon as each has had a processor
/// once.
const LOOK: Duration = Duration::from_micros(50);

/// How often each thread of a process had been given a processor when that was looked at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Turns(Vec<(i32, u64)>);

/// A connection whose data makes the process stand still that writes it, for as long as this lives.
#[derive(Debug)]
pub struct StopAtData<'s> {
    socket: &'s UnixStream,
    flags: libc::c_int,
}

impl<'s> StopAtData<'s> {
    /// From now on, whatever the process writes to the other end of this socket is the last that it does
    /// until it is let go ([`PidFd::thaw`]). Each of its calls that write is one more reason to stand still.
    /// Where its first thread is not the one that writes, that one may get further.
    ///
    /// It needs the right to send the process signals; a host that forbids it in another way does so without
    /// a word, so look whether it stands still ([`PidFd::freeze`]).
    pub fn begin(socket: &'s UnixStream, process: &PidFd) -> io::Result<Self> {
        let flags = control(socket, libc::F_GETFL, 0)?;
        let this = Self { socket, flags };
        control(socket, F_SETSIG as libc::c_int, libc::SIGSTOP)?;
        control(socket, libc::F_SETOWN, process.pid())?;
        // The kernel has found it by its number, and from now on holds the process itself.
        if !process.is_alive()? {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        control(socket, libc::F_SETFL, flags | libc::O_ASYNC)?;
        Ok(this)
    }
}

impl Drop for StopAtData<'_> {
    fn drop(&mut self) {
        // None of these can fail on a socket that is open.
        let _ = control(self.socket, libc::F_SETFL, self.flags);
        let _ = control(self.socket, libc::F_SETOWN, 0);
        let _ = control(self.socket, F_SETSIG as libc::c_int, 0);
    }
}

fn control(socket: &UnixStream, command: libc::c_int, value: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: these commands take and return an `int`, and touch no memory of ours.
    let result = unsafe { libc::fcntl(socket.as_raw_fd(), command, value) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl PidFd {
    /// Has all its threads stand still, and waits for that at most so long. If it takes longer, it is let go
    /// again. What it says tells later whether it has stood still since ([`Self::stood_still_since`]).
    pub fn freeze(&self, within: Duration) -> io::Result<Turns> {
        let end = Instant::now() + within;
        pidfd_send_signal(self, Signal::STOP)?;
        loop {
            match self.is_frozen().and_then(|frozen| frozen.then(|| self.turns()).transpose()) {
                Ok(Some(turns)) => return Ok(turns),
                Ok(None) if Instant::now() < end => sleep(LOOK),
                Ok(None) => {
                    let busy = self.moving().unwrap_or_default().join(", ");
                    self.thaw()?;
                    let why = format!("not all its threads stood still within {within:?} ({busy})");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
                Err(error) => {
                    self.thaw()?;
                    return Err(error);
                }
            }
        }
    }

    /// Asks it to stand still, and does not wait for that.
    pub fn stop(&self) -> io::Result<()> {
        Ok(pidfd_send_signal(self, Signal::STOP)?)
    }

    /// Lets it go. Harmless where it runs.
    pub fn thaw(&self) -> io::Result<()> {
        Ok(pidfd_send_signal(self, Signal::CONT)?)
    }

    /// Whether each of its threads stands still, by a signal's or a debugger's doing.
    pub fn is_frozen(&self) -> io::Result<bool> {
        for tid in self.threads()? {
            let Some(stat) = self.thread_file(tid, "stat")? else { continue };
            if !stands_still(&stat) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The threads that do not stand still, by name and state, for a person to read.
    fn moving(&self) -> io::Result<Vec<String>> {
        let mut moving = Vec::new();
        for tid in self.threads()? {
            let Some(stat) = self.thread_file(tid, "stat")? else { continue };
            if !stands_still(&stat) {
                let name = self.thread_file(tid, "comm")?.unwrap_or_default();
                let state = Stat::parse(&stat).map_or('?', |stat| stat.state);
                moving.push(format!("{} in state {state}", name.trim_end()));
            }
        }
        Ok(moving)
    }

    /// Whether it has stood still since it was frozen. A `SIGCONT` wakes each of its threads, and each has to
    /// be given a processor before it stands still again; so one that was given none since proves that there
    /// was none. (Not all need prove it: a thread may have been taken off its processor on the way to its
    /// stop, and a debugger moves those that it seizes.)
    pub fn stood_still_since(&self, frozen: &Turns) -> io::Result<bool> {
        let now = self.turns()?;
        Ok(self.is_frozen()? && frozen.0.iter().any(|thread| now.0.contains(thread)))
    }

    /// How often each of its threads has been given a processor.
    fn turns(&self) -> io::Result<Turns> {
        let mut turns = Vec::new();
        for tid in self.threads()? {
            let Some(text) = self.thread_file(tid, "schedstat")? else { continue };
            let count = text.split_whitespace().nth(2).and_then(|word| word.parse().ok());
            let odd =
                || io::Error::new(io::ErrorKind::InvalidData, format!("odd content of schedstat: {text}"));
            turns.push((tid, count.ok_or_else(odd)?));
        }
        Ok(Turns(turns))
    }

    /// What `/proc` says of one thread; nothing if it has ended.
    pub(crate) fn thread_file(&self, tid: i32, name: &str) -> io::Result<Option<String>> {
        match fs::read_to_string(self.proc_path(format!("task/{tid}/{name}"))) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn stands_still(stat: &str) -> bool {
    Stat::parse(stat).is_ok_and(|stat| stat.is_stopped() || stat.has_ended())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_frozen_process_stands_still_until_it_is_let_go_or_killed() {
        let mut child =
            Command::new("sh").args(["-c", "while :; do :; done"]).stdin(Stdio::null()).spawn().unwrap();
        let process = PidFd::open(child.id().cast_signed()).unwrap();
        assert!(!process.is_frozen().unwrap());
        let frozen = process.freeze(Duration::from_secs(10)).unwrap();
        let used = process.cpu_time().unwrap();
        sleep(Duration::from_millis(50));
        assert_eq!(process.cpu_time().unwrap(), used);
        assert!(process.stood_still_since(&frozen).unwrap());
        process.freeze(Duration::ZERO).expect("it stands still already");
        assert!(process.stood_still_since(&frozen).unwrap());
        process.thaw().unwrap();
        assert!(!process.is_frozen().unwrap());
        assert!(!process.stood_still_since(&frozen).unwrap());
        process.thaw().expect("it runs already");

        // Somebody lets it go, and freezes it again: it looks the same.
        process.freeze(Duration::from_secs(10)).unwrap();
        assert!(!process.stood_still_since(&frozen).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process.freeze(Duration::ZERO).is_err(), "it is gone");
    }
}
