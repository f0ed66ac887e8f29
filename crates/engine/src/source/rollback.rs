//! The guest runs on here: because the migration is over, or because its link is lost and is waited for.

use super::{SourceDriver, now_ns};
use crate::{
    Broken,
    ports::{MachineError, RunState},
};
use proto::SourceEvent;
use std::time::Duration;

impl SourceDriver {
    /// The guest runs here again (I3). There is no other place left for it, so this is tried until it works
    /// or QEMU is gone.
    pub(super) fn bring_back(&mut self) {
        self.calm();
        if !self.stopped {
            return;
        }
        match self.resume_guest() {
            Ok(_) => {
                self.given_back = true;
                // Not before: taking the protections back takes 60 ms a GiB.
                self.parts.tracker = None;
                self.tell_of_resumption();
            }
            Err(e) => self.reporter.not_back(&e),
        }
    }

    /// The link was lost in a pause. The guest does not stand still for it: it runs on here at once, and its
    /// writes are followed as before (I2), so that the migration goes on from where it was once the link is
    /// back. It has not fenced itself.
    pub(super) fn run_on(&mut self) -> Result<SourceEvent, Broken> {
        self.calm();
        // The target forgets what it was told that it would lack: it is to be sent as any other page (I2).
        let missing = self.nothing();
        self.dirty.union(&std::mem::replace(&mut self.missing, missing));
        if !self.stopped {
            return Ok(SourceEvent::RanOn(false));
        }
        let stood = self.resume_guest()?;
        self.reporter.ran_on(stood);
        // A device state of this pause is none of the next one.
        self.state = None;
        self.aborted_pauses += 1;
        if let Some(tracker) = &mut self.parts.tracker {
            tracker.resume_throttling();
        }
        self.tell_of_resumption();
        Ok(SourceEvent::RanOn(true))
    }

    /// What others did in the pause just before its device state was saved may be why the target, or QEMU
    /// itself, could do nothing with that.
    pub(super) fn add_changes(&mut self, why: &mut String) {
        let check = self.parts.machine.lock().watch();
        let changes = check.map(|check| check.changes).unwrap_or_default();
        let new: Vec<_> = changes.into_iter().filter(|change| !why.contains(change.as_str())).collect();
        if !new.is_empty() {
            *why += &format!("; the VM was changed meanwhile: {}", new.join("; "));
        }
    }

    /// How long it stood still.
    fn resume_guest(&mut self) -> Result<Duration, MachineError> {
        // While it is being saved, this waits for that.
        let mut machine = self.parts.machine.lock();
        machine.restore(self.before)?;
        // Somebody may have let it run on, or it may have powered off meanwhile.
        self.before = machine.run_state().unwrap_or(self.before);
        drop(machine);
        self.stopped = false;
        Ok(self.reporter.runs_again(now_ns()))
    }

    /// The journal, and the pause's watchdog with it; and the network.
    fn tell_of_resumption(&mut self) {
        self.insist("journal that the guest is back", |d| d.parts.journal.back());
        if self.before != RunState::Running {
            return;
        }
        let announced = self.parts.machine.lock().announce();
        if let Err(e) = announced {
            self.reporter.note(format!("the guest is back, but could not be announced to the network: {e}"));
        }
    }
}
