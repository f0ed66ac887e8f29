//! A child process that does not outlive its owner.

use crate::{Doing, Error, Result};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, ExitStatus},
    time::{Duration, Instant},
};

/// A child process in a group of its own, killed when dropped. (Where this whole process is killed, the
/// laboratory's reaper does it.)
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    pub(crate) fn spawn(name: &str, command: &mut Command, log: PathBuf) -> Result<Self> {
        let child = command.process_group(0).spawn().doing(format!("start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).doing("name a process")?;
        kill_process(pid, signal).doing(format!("signal {}", self.name))
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().doing(format!("wait for {}", self.name))
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        wait_for(&what, within, || self.child.try_wait().doing("wait for a child"))
    }

    /// Kills it, as a crash would.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().doing(format!("kill {}", self.name))?;
        self.child.wait().doing(format!("wait for {}", self.name)).map(drop)
    }

    /// All that it has written so far.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// An error if it has ended, with its last words.
    pub fn must_live(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => {
                let said = self.said();
                let words: Vec<_> = said.lines().rev().take(8).collect();
                let words: Vec<_> = words.into_iter().rev().collect();
                Err(Error::new(format!("{} ended with {status}", self.name), words.join("\n")))
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Asks `look` every few milliseconds until it finds something. For what has no event to wait for: the state
/// of a process that is not ours to instrument.
pub fn wait_for<T>(what: &str, within: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    const PAUSE: Duration = Duration::from_millis(5);
    let end = Instant::now() + within;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > end {
            return Err(Error::new(format!("waited for {what}"), format!("in vain, for {within:?}")));
        }
        std::thread::sleep(PAUSE);
    }
}
