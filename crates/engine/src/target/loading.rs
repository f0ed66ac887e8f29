//! Loading a device state. It reads guest memory: where a page is missing, QEMU waits for it, and answers
//! nobody. So it is loaded beside the driver: a source that takes its guest back meanwhile is heard, and
//! sends no page any more.

use super::{Signal, TargetDriver};
use crate::{
    Broken,
    ports::{DeviceState, MachineError, RunState},
    why,
};
use proto::{TargetEvent, control::step::Part};
use std::{
    sync::mpsc::{self, TryRecvError},
    time::Duration,
};

const NOTE: &str = "write the state of this host";

/// The guest stands still until it is recorded what it will do here. The source gives its own state directory
/// as long.
const NOTED: Duration = Duration::from_secs(2);

impl TargetDriver {
    /// Whether this host can write its state still: after each round, so that it is known before the source
    /// fences itself. A host whose disk is full could neither claim the VM nor say that it has not. One try
    /// at a time: nobody waits for the one before.
    pub(super) fn try_journal(&mut self) -> Result<(), Broken> {
        let tries = self.noted.as_ref().is_some_and(|noted| noted.try_recv() == Err(TryRecvError::Empty));
        if tries { Ok(()) } else { self.note() }
    }

    /// Begins to record what the guest will do here.
    fn note(&mut self) -> Result<(), Broken> {
        let (tell, goes_on, (say, noted)) = (self.tell.clone(), self.goes_on, mpsc::channel());
        let Some(taken) = &self.taken else { return Ok(()) };
        let written = taken.journal.spawn("note", move |journal| {
            let written = journal.goes_on(goes_on).map_err(|e| e.to_string());
            if let Err(e) = &written {
                let broken = Broken::new(NOTE, e.clone());
                let _ = tell.send(Signal::Event(TargetEvent::from(broken)));
            }
            let _ = say.send(written);
        });
        written.map_err(why(NOTE))?;
        self.noted = Some(noted);
        Ok(())
    }

    /// Begins to load it. Whatever the guest will do here is on the way to the disk by then; only one that
    /// will not run is waited for, because the last try says that it will.
    pub(super) fn load(&mut self, state: DeviceState) -> Result<(), Broken> {
        if self.noted.is_none() || self.goes_on != RunState::Running {
            self.note()?;
        }
        let tell = self.tell.clone();
        let taken = self.taken()?;
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
            let late = |_| Err(format!("it does not answer within {NOTED:?}"));
            noted.recv_timeout(NOTED).unwrap_or_else(late).map_err(|e| Broken::new(NOTE, e))?;
        }
        let taken = self.taken()?;
        taken.missing_is_recorded().map_err(why("record the missing pages"))?;
        taken.spool_is_recorded().map_err(why("record where the spool is"))?;
        self.alive()
    }
}
