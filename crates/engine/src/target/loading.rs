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

impl TargetDriver {
    /// Begins to load it.
    pub(super) fn load(&mut self, state: DeviceState) -> Result<(), Broken> {
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
        if self.goes_on != RunState::Running {
            let goes_on = self.goes_on;
            let noted = self.taken()?.journal.lock().goes_on(goes_on);
            noted.map_err(why("record that the guest stays as it was"))?;
        }
        let taken = self.taken()?;
        taken.missing_is_recorded().map_err(why("record the missing pages"))?;
        taken.spool_is_recorded().map_err(why("record where the spool is"))?;
        self.alive()
    }
}
