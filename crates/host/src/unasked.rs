//! VMs whose QEMU is not asked: because it may wait for us, or because its guest has left it.

use crate::hypervisor::{handle_of, open};
use agent::store::VmRecord;
use ports::{
    DeviceState, Ender, HasEnded, Machine, MachineError, RunState, Saved, Stopped, Unheard, VmCheck,
};
use qemu::{Vm, frozen};
use std::time::Duration;
use sys::hold::Hold;

/// A QEMU that is not asked before it has to be: it may be waiting for a page that we serve.
pub(crate) struct Later(pub(crate) VmRecord);

/// A QEMU whose guest runs elsewhere. It is frozen, and no signal lets it go.
pub(crate) struct Left {
    pub(crate) vm: VmRecord,
    pub(crate) hold: Option<Hold>,
}

fn error(vm: &VmRecord, what: &str, why: &dyn std::fmt::Display) -> MachineError {
    MachineError { what: format!("{what} {}", vm.name), why: why.to_string() }
}

fn has_ended(vm: &VmRecord) -> HasEnded {
    let process = vm.process;
    Box::new(move || !process.is_some_and(|process| process.is_alive()))
}

impl Later {
    fn open(&self) -> Result<Vm, MachineError> {
        open(&self.0).map_err(|why| error(&self.0, "reach", &why))
    }
}

impl Machine for Later {
    fn has_ended(&self) -> HasEnded {
        has_ended(&self.0)
    }

    fn ender(&self) -> Ender {
        // Its guest has been claimed for this host: nobody ends it in a hurry.
        Box::new(|| {})
    }

    fn unheard(&self) -> Unheard {
        // Nobody waits for the network: the guest runs already.
        Box::new(|| None)
    }

    fn prepare_stop(&mut self) -> Result<RunState, MachineError> {
        self.open()?.prepare_stop()
    }

    fn prepare_load(&mut self) -> Result<(), MachineError> {
        self.open()?.prepare_load()
    }

    fn watch(&mut self) -> Result<VmCheck, MachineError> {
        self.open()?.watch()
    }

    fn run_state(&mut self) -> Result<RunState, MachineError> {
        self.open()?.run_state()
    }

    fn disks(&mut self) -> Result<Vec<units::Disk>, MachineError> {
        self.open()?.disks()
    }

    fn stop(&mut self) -> Result<Stopped, MachineError> {
        self.open()?.stop()
    }

    fn save(&mut self) -> Result<Saved, MachineError> {
        self.open()?.save()
    }

    fn hold(&mut self) -> Result<(), MachineError> {
        self.open()?.hold()
    }

    fn restore(&mut self, before: RunState) -> Result<Duration, MachineError> {
        self.open()?.restore(before)
    }

    fn load(&mut self, state: &DeviceState) -> Result<(), MachineError> {
        self.open()?.load(state)
    }

    fn announce(&mut self) -> Result<(), MachineError> {
        self.open()?.announce()
    }

    fn destroy(&mut self) -> Result<(), MachineError> {
        self.open()?.destroy()
    }
}

impl Left {
    fn elsewhere<T>(&self, what: &str) -> Result<T, MachineError> {
        Err(error(&self.vm, what, &"its guest runs elsewhere"))
    }
}

impl Machine for Left {
    fn has_ended(&self) -> HasEnded {
        has_ended(&self.vm)
    }

    fn ender(&self) -> Ender {
        // `destroy` ends it, which has the hold.
        Box::new(|| {})
    }

    fn unheard(&self) -> Unheard {
        Box::new(|| None)
    }

    fn prepare_stop(&mut self) -> Result<RunState, MachineError> {
        self.elsewhere("prepare to stop")
    }

    fn prepare_load(&mut self) -> Result<(), MachineError> {
        self.elsewhere("prepare to load")
    }

    fn watch(&mut self) -> Result<VmCheck, MachineError> {
        self.elsewhere("watch")
    }

    fn run_state(&mut self) -> Result<RunState, MachineError> {
        self.elsewhere("ask what it does:")
    }

    fn disks(&mut self) -> Result<Vec<units::Disk>, MachineError> {
        self.elsewhere("ask for the disks of")
    }

    fn stop(&mut self) -> Result<Stopped, MachineError> {
        self.elsewhere("stop")
    }

    fn save(&mut self) -> Result<Saved, MachineError> {
        self.elsewhere("save the device state of")
    }

    fn hold(&mut self) -> Result<(), MachineError> {
        self.elsewhere("keep still")
    }

    fn restore(&mut self, _: RunState) -> Result<Duration, MachineError> {
        self.elsewhere("restore")
    }

    fn load(&mut self, _: &DeviceState) -> Result<(), MachineError> {
        self.elsewhere("load the device state of")
    }

    fn announce(&mut self) -> Result<(), MachineError> {
        self.elsewhere("announce")
    }

    fn destroy(&mut self) -> Result<(), MachineError> {
        let ended = handle_of(&self.vm).and_then(|handle| {
            // Killed while it is held: it does nothing any more on its way out.
            let hold = self.hold.take();
            frozen::end(&handle, hold).map_err(|why| why.to_string())
        });
        ended.map_err(|why| error(&self.vm, "end", &why))
    }
}
