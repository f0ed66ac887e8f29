//! The engine's machine port.

use super::{
    Vm,
    phase::{Phase, Transition},
};
use crate::{
    disks::Queues,
    launch,
    qmp::QmpError,
    state::{self, StateError},
    tap, vhost,
};
use ports::{
    DeviceState, Ender, HasEnded, Machine, MachineError, RunState, Saved, Stopped, Unheard, VmCheck,
};
use serde_json::json;
use std::{sync::atomic::Ordering::Relaxed, time::Duration};

/// How long a QEMU that did not load a state may take to end with its last words; the guest stands still at
/// the source.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How long QEMU may take to end by itself before it is killed.
const QUIT: Duration = Duration::from_secs(3);

impl Vm {
    /// QEMU did not take what it was given: it says why as it ends, and nowhere else.
    pub(super) fn not_loaded(&self, what: &str, error: &StateError) -> MachineError {
        if matches!(error, StateError::Qmp(_) | StateError::Failed(_)) {
            let _ = self.process.wait(LAST_WORDS);
        }
        let mut failed = self.error(what, error);
        if let Some(kept) = self.belongings.keep_log(self.name()) {
            failed.why.push_str(&format!("; all that it said is kept in {}", kept.display()));
        }
        failed
    }
}

impl Machine for Vm {
    fn has_ended(&self) -> HasEnded {
        match self.process.try_clone() {
            // Who cannot be looked at is taken for alive: whatever is asked of it will tell.
            Ok(process) => Box::new(move || !process.is_alive().unwrap_or(true)),
            Err(_) => Box::new(|| false),
        }
    }

    fn ender(&self) -> Ender {
        match self.process.try_clone() {
            Ok(process) => Box::new(move || {
                if let Err(error) = process.kill() {
                    tracing::info!(%error, "could not end a QEMU at once");
                }
            }),
            Err(_) => Box::new(|| {}),
        }
    }

    fn unheard(&self) -> Unheard {
        let (taps, slow) = (self.belongings.taps.clone(), self.slow_network.clone());
        Box::new(move || {
            let silent = tap::silent(&taps);
            slow.fetch_or(silent.is_some(), Relaxed);
            silent
        })
    }

    fn differences(&self) -> Vec<String> {
        vhost::left_out(&self.recipe.nets, &self.process).into_iter().collect()
    }

    fn prepare_stop(&mut self) -> Result<RunState, MachineError> {
        self.get_ready_to_stop()
    }

    fn prepare_load(&mut self) -> Result<(), MachineError> {
        state::widen_heap(&mut self.qmp).map_err(|error| self.error("get ready to load", error))
    }

    fn watch(&mut self) -> Result<VmCheck, MachineError> {
        let Some(known) = &mut self.known else { return Ok(VmCheck::default()) };
        known.watch(&mut self.qmp).map_err(|error| self.error("look again at", error))
    }

    fn run_state(&mut self) -> Result<RunState, MachineError> {
        self.state().map_err(|error| self.error("ask what it does:", error))
    }

    fn disks(&mut self) -> Result<Vec<units::Disk>, MachineError> {
        let mut look = || {
            let queues = match self.queues.take() {
                Some(queues) => queues,
                None => Queues::find(&mut self.qmp)?,
            };
            let disks = queues.look(&mut self.qmp);
            self.queues = Some(queues);
            disks
        };
        look().map_err(|error: QmpError| self.error("ask for the disks of", error))
    }

    fn stop(&mut self) -> Result<Stopped, MachineError> {
        self.halt()
    }

    fn save(&mut self) -> Result<Saved, MachineError> {
        self.save_and_freeze()
    }

    fn hold(&mut self) -> Result<(), MachineError> {
        self.hold_still()
    }

    fn restore(&mut self, before: RunState) -> Result<Duration, MachineError> {
        self.give_back(before)
    }

    fn load(&mut self, state: &DeviceState) -> Result<(), MachineError> {
        let what = "load the device state of";
        self.phase.allows(Transition::Load).map_err(|why| self.error(what, why))?;
        let Some(door) = self.door.take() else {
            return Err(self.error(what, "its QEMU does not wait for one"));
        };
        // QEMU may open an image by its name once more, for writing, when it is activated.
        self.check_names().map_err(|why| self.error(what, why))?;
        let section = self.given.section(&self.private.blocks(), &state.private);
        let section = section.map_err(|error| self.error(what, error))?;
        let loaded = state::load(&mut self.qmp, door, &section, &state.stream);
        loaded.map_err(|error| self.not_loaded(what, &error))?;
        // Before anything is promised: nothing of it has run yet.
        self.opens_no_more().map_err(|reasons| self.error(what, reasons.join("; ")))?;
        self.phase = Phase::Loaded;
        Ok(())
    }

    fn announce(&mut self) -> Result<(), MachineError> {
        let times = if self.slow_network.load(Relaxed) {
            // For a minute: a port of a spanning tree may still be about to forward.
            json!({ "initial": 50, "max": 2000, "rounds": 40, "step": 100 })
        } else {
            json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 })
        };
        self.qmp.execute("announce-self", times).map(drop).map_err(|error| self.error("announce", error))
    }

    fn destroy(&mut self) -> Result<(), MachineError> {
        // One that stands still is not let go for that: what others asked of it meanwhile would be done
        // first.
        let frozen = self.phase.is_frozen();
        // It has left, or has never come.
        let elsewhere = frozen || self.door.is_some() || matches!(self.phase, Phase::Loaded);
        let quits = !frozen && self.qmp.execute_within("quit", json!({}), QUIT).is_ok();
        let ended = |vm: &Self, time| vm.process.wait(time).map_err(|error| vm.error("end", error));
        if !ended(self, if quits { QUIT } else { Duration::ZERO })? {
            if !frozen {
                tracing::warn!(vm = self.name(), "QEMU does not end by itself and is killed");
            }
            launch::kill(&self.process);
            // Whoever is held is a zombie until it is let go.
            self.phase = Phase::Free;
            if !ended(self, QUIT)? {
                return Err(
                    self.error("end", "it does not end even when it is killed: it waits in the kernel")
                );
            }
        }
        match elsewhere {
            true => self.belongings.remove_all(),
            false => self.belongings.remove_ended(&self.recipe.name),
        }
        Ok(())
    }
}
