//! Loading a device state. It reads guest memory: where a page is missing, QEMU waits for it, and answers nobody. A source that has
//! taken its guest back sends no page any more, so it is heard here, too; otherwise the half-made VM would be in the way of the next
//! try for as long as a load may take.

use super::{Signal, TargetDriver};
use crate::{
    Broken,
    ports::{DeviceState, MachineError},
};
use proto::{TargetEvent, control};
use std::{
    sync::mpsc::{RecvTimeoutError, channel},
    time::Duration,
};

/// How often it is looked what was said. A load that succeeds ends the wait at once.
const LOOK: Duration = Duration::from_millis(20);

/// What became of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Load {
    Done,
    /// Nobody wants it any more: QEMU was ended, and what says why is heard next.
    CalledOff,
}

impl TargetDriver {
    /// Loads it beside us.
    pub(super) fn load(&mut self, state: DeviceState) -> Result<Load, Broken> {
        let taken = self.taken()?;
        let (tell, told) = channel();
        let load = taken.machine.spawn("load", move |machine| drop(tell.send(machine.load(&state))));
        load.map_err(crate::why("load the device state"))?;
        let mut called_off = false;
        let loaded = loop {
            match told.recv_timeout(LOOK) {
                Ok(loaded) => break loaded,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let (what, why) = ("load the device state".to_owned(), "its thread ended".to_owned());
                    break Err(MachineError { what, why });
                }
            }
            while let Ok(signal) = self.signals.try_recv() {
                self.permitted |= matches!(signal, Signal::Said(_, control::Kind::Permit(_)));
                // With the permit the record decides, not the source.
                if !called_off && !self.permitted && self.calls_off(&signal) {
                    called_off = true;
                    tracing::info!("the source takes its guest back while its state is loaded");
                    (self.taken()?.ender)();
                }
                self.meanwhile.push_back(signal);
            }
        };
        if called_off {
            return Ok(Load::CalledOff);
        }
        loaded.map(|()| Load::Done).map_err(Broken::from)
    }

    /// Whether nothing can come of this migration after that.
    fn calls_off(&self, signal: &Signal) -> bool {
        match signal {
            Signal::Said(_, control::Kind::Failed(_)) | Signal::Event(TargetEvent::GiveUp(_)) => true,
            Signal::Lost(generation, _) => *generation == self.generation,
            _ => false,
        }
    }
}
