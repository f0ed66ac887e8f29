//! Who is in charge of a QEMU: one agent of a host at most, and under one name.
//!
//! Two agents that both move it would both run it somewhere (I1). So each locks the process' directory in
//! `/proc` (`flock(2)`), which all that see the process have in common, whatever their network or mount
//! namespaces; an agent in a container with a `/proc` of its own is not seen. The kernel takes the lock back
//! when the agent ends, however it ends.

use crate::store::Process;
use std::{
    fs::{File, TryLockError},
    io,
    sync::Mutex,
};
use units::Locked;

/// The QEMUs that this agent is in charge of.
#[derive(Debug, Default)]
pub(super) struct Charges(Mutex<Vec<(Process, File)>>);

/// Whether this agent is in charge now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Charge {
    /// It is, from now on.
    Taken,
    /// It was already.
    Ours,
    /// Somebody else is.
    Others,
}

impl Charges {
    /// Takes charge of a process, unless somebody has.
    pub(super) fn take(&self, process: Process) -> io::Result<Charge> {
        let mut held = self.0.locked();
        // What has ended is nobody's any more.
        held.retain(|(process, _)| process.is_alive());
        if held.iter().any(|(ours, _)| *ours == process) {
            return Ok(Charge::Ours);
        }
        let directory = File::open(format!("/proc/{}", process.pid))?;
        // Opened first, looked at afterwards: it is that of the process that is meant.
        if !process.is_alive() {
            return Err(io::ErrorKind::NotFound.into());
        }
        match directory.try_lock() {
            Ok(()) => {
                held.push((process, directory));
                Ok(Charge::Taken)
            }
            Err(TryLockError::WouldBlock) => Ok(Charge::Others),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Gives it back.
    pub(super) fn release(&self, process: Process) {
        self.0.locked().retain(|(ours, _)| *ours != process);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn i1_a_process_has_one_agent_in_charge_of_it() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        let (one, other) = (Charges::default(), Charges::default());
        assert_eq!(one.take(process).unwrap(), Charge::Taken);
        assert_eq!(one.take(process).unwrap(), Charge::Ours);
        assert_eq!(other.take(process).unwrap(), Charge::Others);
        one.release(process);
        assert_eq!(other.take(process).unwrap(), Charge::Taken);
        assert_eq!(one.take(process).unwrap(), Charge::Others);
        // As with an agent that ends.
        drop(other);
        assert_eq!(one.take(process).unwrap(), Charge::Taken);
        let later = Process { start_time: process.start_time + 1, ..process };
        assert!(one.take(later).is_err(), "another process of the same number");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(Charges::default().take(process).is_err());
    }
}
