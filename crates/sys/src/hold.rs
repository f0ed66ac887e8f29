//! A frozen process that no `SIGCONT` lets go, for as long as we live.
//!
//! A thread of ours traces its first thread, which without us never goes on; and whenever a `SIGCONT` has
//! come for all the others, it sends another `SIGSTOP`. So if we end, it stands still as if nobody had held
//! it.

use crate::{
    proc::Stat,
    process::PidFd,
    stun::{self, Stun},
};
use std::{
    io,
    sync::{
        Arc,
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread::{self, JoinHandle, sleep},
    time::{Duration, Instant},
};

/// How often it is looked whether somebody has sent a `SIGCONT`. What matters stands still all the same.
const LOOK: Duration = Duration::from_millis(50);

/// How long to wait before the first thread is looked at again: it stops as soon as it has had a processor
/// once.
const STOPS: Duration = Duration::from_micros(50);

/// A process whose first thread stands still until this is dropped.
#[derive(Debug)]
pub struct Hold {
    end: Option<Sender<()>>,
    keeper: Option<JoinHandle<()>>,
    keeper_tid: i32,
}

impl Hold {
    /// Of a process that is frozen. Returns once its first thread is held, which takes so long at most. Fails
    /// where somebody else traces it.
    pub fn begin(process: &PidFd, within: Duration) -> io::Result<Self> {
        let (process, (end, ended), (tell, told)) = (process.try_clone()?, channel::<()>(), channel());
        let keep = move || {
            let held = hold(&process, within);
            let holds = held.is_ok();
            let _ = tell.send((rustix::thread::gettid().as_raw_nonzero().get(), held));
            while holds && ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                // One that cannot be looked at has ended.
                if !process.is_frozen().unwrap_or(true) {
                    let _ = process.stop();
                }
            }
            // Whoever has sent a `SIGCONT` since: it stands still once our end has let it go.
            if holds {
                let _ = process.stop();
            }
        };
        let keeper = thread::Builder::new().name("hold".to_owned()).spawn(keep)?;
        let (keeper_tid, held) = told.recv().map_err(io::Error::other)?;
        let hold = Self { end: Some(end), keeper: Some(keeper), keeper_tid };
        held.map(|()| hold)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.end = None;
        if let Some(keeper) = self.keeper.take() {
            stun::until_gone(keeper, self.keeper_tid);
        }
    }
}

/// Whether a process can still do anything: not once it has ended, nor once it was killed, although it may
/// take long until it is gone. Its first thread stops for that, for a moment; a killed one never does. Fails
/// where somebody else traces it, or where neither shows within this time.
pub fn can_run(process: &Arc<PidFd>, within: Duration) -> io::Result<bool> {
    let stun = Stun::begin(process, &[process.pid()], within)?;
    if stun.stunned() == 0 && process.is_alive()? {
        let why = "somebody else traces it: whether it can still run does not show";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    stands_still(process, within)
}

fn hold(process: &PidFd, within: Duration) -> io::Result<()> {
    stun::interrupt(process, process.pid())?;
    if stands_still(process, within)? { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
}

/// Waits until the first thread of a process stands where its tracer has stopped it: then it is true; or
/// until the process has ended.
fn stands_still(process: &PidFd, within: Duration) -> io::Result<bool> {
    let (end, first) = (Instant::now() + within, process.pid());
    loop {
        let stat = process.thread_file(first, "stat")?;
        if stat.and_then(|stat| Stat::parse(&stat).ok()).is_some_and(|stat| stat.state == 't') {
            return Ok(true);
        }
        if !process.is_alive()? {
            return Ok(false);
        }
        if Instant::now() >= end {
            let why = format!("its first thread did not stand still within {within:?}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        sleep(STOPS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    /// A child that does nothing but run.
    fn busy() -> Child {
        Command::new("sh").args(["-c", "while :; do :; done"]).stdin(Stdio::null()).spawn().unwrap()
    }

    #[test]
    fn only_who_lives_and_was_not_killed_can_run() {
        let within = Duration::from_secs(10);
        let mut child = busy();
        let process = Arc::new(PidFd::open(child.id().cast_signed()).unwrap());
        assert!(can_run(&process, within).unwrap());
        let used = process.cpu_time().unwrap();
        while process.cpu_time().unwrap() == used {
            sleep(Duration::from_millis(1));
        }
        process.freeze(within).unwrap();
        assert!(can_run(&process, within).unwrap());
        while !process.is_frozen().unwrap() {
            sleep(Duration::from_millis(1));
        }
        // Somebody else traces it.
        let hold = Hold::begin(&process, within).unwrap();
        assert_eq!(can_run(&process, within).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        // Killed, and not gone before it is let go.
        process.kill().unwrap();
        drop(hold);
        assert!(!can_run(&process, within).unwrap());
        // Gone, and nobody has waited for it yet.
        assert!(process.wait(within).unwrap());
        assert!(!can_run(&process, within).unwrap());
        child.wait().unwrap();
        assert!(!can_run(&process, within).unwrap());
    }

    #[test]
    fn who_is_held_does_not_go_on_whatever_signals_come() {
        let mut child = busy();
        let process = PidFd::open(child.id().cast_signed()).unwrap();
        let within = Duration::from_secs(10);
        process.freeze(within).unwrap();
        let hold = Hold::begin(&process, within).unwrap();
        assert!(Hold::begin(&process, within).is_err(), "it is held already");
        let used = process.cpu_time().unwrap();
        for _ in 0..5 {
            process.thaw().unwrap();
            sleep(Duration::from_millis(20));
            assert!(process.is_frozen().unwrap());
        }
        assert_eq!(process.cpu_time().unwrap(), used);
        process.thaw().unwrap();
        drop(hold);
        // By itself again, as soon as its first thread has had a processor.
        while !process.is_frozen().unwrap() {
            sleep(Duration::from_millis(1));
        }
        let used = process.cpu_time().unwrap();
        process.thaw().unwrap();
        while process.cpu_time().unwrap() == used {
            sleep(Duration::from_millis(1));
        }

        // What is held can be killed.
        process.freeze(within).unwrap();
        let hold = Hold::begin(&process, within).unwrap();
        process.kill().unwrap();
        drop(hold);
        assert!(process.wait(within).unwrap());
        child.wait().unwrap();
    }
}
