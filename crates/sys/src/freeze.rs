//! A process that stands still as a whole (`SIGSTOP`), until it is let go or killed. That outlives whoever
//! did it.

use crate::process::PidFd;
use rustix::process::{Signal, pidfd_send_signal};
use std::{
    fs, io,
    thread::sleep,
    time::{Duration, Instant},
};

/// How long to wait before its threads are looked at again. They stop as soon as each has had a processor
/// once.
const LOOK: Duration = Duration::from_micros(50);

impl PidFd {
    /// Has all its threads stand still, and waits for that at most so long. If it takes longer, it is let go
    /// again.
    pub fn freeze(&self, within: Duration) -> io::Result<()> {
        let end = Instant::now() + within;
        pidfd_send_signal(self, Signal::STOP)?;
        loop {
            match self.is_frozen() {
                Ok(true) => return Ok(()),
                Ok(false) if Instant::now() < end => sleep(LOOK),
                Ok(false) => {
                    self.thaw()?;
                    let why = format!("not all its threads stood still within {within:?}");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
                Err(error) => {
                    self.thaw()?;
                    return Err(error);
                }
            }
        }
    }

    /// Lets it go. Harmless where it runs.
    pub fn thaw(&self) -> io::Result<()> {
        Ok(pidfd_send_signal(self, Signal::CONT)?)
    }

    /// Whether each of its threads stands still, by a signal's or a debugger's doing.
    pub fn is_frozen(&self) -> io::Result<bool> {
        for entry in fs::read_dir(self.proc_path("task"))? {
            let stat = match fs::read_to_string(entry?.path().join("stat")) {
                Ok(stat) => stat,
                // It has just ended.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {
                    continue;
                }
                Err(error) => return Err(error),
            };
            // The name in parentheses may hold anything; the state follows it.
            let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
            if !matches!(state, Some('T' | 't' | 'Z' | 'X')) {
                return Ok(false);
            }
        }
        Ok(true)
    }
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
        process.freeze(Duration::from_secs(10)).unwrap();
        let used = process.cpu_time().unwrap();
        sleep(Duration::from_millis(50));
        assert_eq!(process.cpu_time().unwrap(), used);
        process.freeze(Duration::ZERO).expect("it stands still already");
        process.thaw().unwrap();
        assert!(!process.is_frozen().unwrap());
        process.thaw().expect("it runs already");

        process.freeze(Duration::from_secs(10)).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process.freeze(Duration::ZERO).is_err(), "it is gone");
    }
}
