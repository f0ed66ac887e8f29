//! Loading a device state. It reads guest memory: where a page is missing, QEMU waits for it, and answers
//! nobody. So it is loaded beside the driver: a source that takes its guest back meanwhile is heard, and
//! sends no page any more.

use super::{Signal, TargetDriver};
use crate::{
    Broken,
    ports::{DeviceState, MachineError},
    why,
};
use proto::{TargetEvent, control::step::Part};
use std::{io, sync::mpsc, time::Duration};

/// The guest stands still until it is recorded what it will do here. The source gives its own state directory
/// as long.
const NOTED: Duration = Duration::from_secs(2);

impl TargetDriver {
    /// Whether this host can write its state still: after each round, so that it is known before the source
    /// fences itself. A host whose disk is full could neither claim the VM nor say that it has not.
    pub(super) fn try_journal(&mut self) -> Result<(), Broken> {
        let (tell, goes_on) = (self.tell.clone(), self.goes_on);
        let Some(taken) = &self.taken else { return Ok(()) };
        let written = taken.journal.spawn("try", move |journal| {
            if let Err(e) = journal.goes_on(goes_on) {
                let broken = Broken::new("write the state of this host", e.to_string());
                let _ = tell.send(Signal::Event(TargetEvent::from(broken)));
            }
        });
        written.map_err(why("write the state of this host"))
    }

    /// Begins to load it. What the guest will do here is recorded meanwhile, whatever that is: a host that
    /// cannot write its state any more could not claim the VM, and once the source is fenced the guest would
    /// stand still until it can.
    pub(super) fn load(&mut self, state: DeviceState) -> Result<(), Broken> {
        let tell = self.tell.clone();
        let (goes_on, (say, noted)) = (self.goes_on, mpsc::channel());
        self.noted = Some(noted);
        let taken = self.taken()?;
        let note = taken.journal.spawn("note", move |journal| drop(say.send(journal.goes_on(goes_on))));
        note.map_err(why("record what the guest does here"))?;
        let load =
            taken.machine.spawn("load", move |machine| drop(tell.send(Signal::Loaded(machine.load(&state)))));
        load.map_err(why("load the device state"))?;
        taken.loading = true;
        Ok(())
    }

    /// It is loaded, or cannot be.
    pub(super) fn loaded(&mut self, loaded: Result<(), MachineError>) -> Option<TargetEvent> {
        // Without a machine nobody wants to know any more.
        self.taken.as_mut()?.loading = false;
        self.pause.end(Part::Load);
        self.pause.begin(Part::Record);
        let done = loaded.map_err(Broken::from).and_then(|()| self.make_durable());
        self.pause.end(Part::Record);
        Some(done.map_or_else(TargetEvent::from, |()| TargetEvent::Loaded))
    }

    /// Before anybody can claim, all that a restarted agent must know is on the disk. Where the authorization
    /// is here already, the claim follows at once: so QEMU is looked at before and after that.
    fn make_durable(&mut self) -> Result<(), Broken> {
        self.alive()?;
        if let Some(noted) = self.noted.take() {
            let late = |_| Err(io::Error::from(io::ErrorKind::TimedOut));
            noted.recv_timeout(NOTED).unwrap_or_else(late).map_err(why("record what the guest does here"))?;
        }
        let taken = self.taken()?;
        taken.missing_is_recorded().map_err(why("record the missing pages"))?;
        taken.spool_is_recorded().map_err(why("record where the spool is"))?;
        self.alive()
    }
}
