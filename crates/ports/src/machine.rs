//! A guest's vCPUs and device state.

use crate::RunState;
use std::time::{Duration, Instant};

/// A VM's device state: everything but the shared RAM blocks.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DeviceState {
    /// QEMU's own stream.
    pub stream: Vec<u8>,
    /// RAM blocks that QEMU keeps private (video memory, ROMs), by QEMU's name for them: what changed since
    /// the request, or all of one that did not come with it.
    pub private: Vec<(String, Vec<u8>)>,
}

/// A guest that was stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stopped {
    /// What it did before.
    pub before: RunState,
    /// How long it was stopped already while its disks were drained and flushed; nothing where that is not
    /// known.
    pub drained: Duration,
}

/// A device state that was saved, and how that went.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Saved {
    /// The state.
    pub state: DeviceState,
    /// What that took.
    pub steps: Vec<SaveStep>,
}

impl Saved {
    /// How long this step took.
    pub fn took(&self, kind: SaveStepKind) -> Duration {
        self.steps.iter().filter(|step| step.kind == kind).map(|step| step.took).sum()
    }
}

/// A step of saving a device state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SaveStep {
    /// Which.
    pub kind: SaveStepKind,
    /// When it began.
    pub began: Instant,
    /// How long it took.
    pub took: Duration,
}

/// What saving a device state consists of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SaveStepKind {
    /// Whether the VM is what it was when its migration began.
    Check,
    /// QEMU saves its device state.
    Save,
    /// QEMU as a whole stands still, after it had answered.
    Freeze,
    /// The disks that QEMU does not flush itself.
    Flush,
    /// What was saved, and what QEMU keeps private, is read.
    Read,
}

/// What was seen of a VM that is being moved.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VmCheck {
    /// How it differs from what it was when its migration began, each difference in words: devices, disks,
    /// media, jobs, exports, memory, vCPUs, QEMU's own migration.
    pub changes: Vec<String>,
    /// What it does; none where that was not asked.
    pub state: Option<RunState>,
}

/// What went wrong at the machine, in words that name what was asked of it.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct MachineError {
    /// What was asked of it, such as `stop the guest`.
    pub what: String,
    /// What it answered.
    pub why: String,
}

impl MachineError {
    /// The VM is not what it was when its migration began: each difference in words.
    pub fn changed(differences: &[String]) -> Self {
        Self { what: "the VM was changed while it was moved".into(), why: differences.join("\n") }
    }
}

/// Says whether a process has ended, without waiting and without asking the process.
pub type HasEnded = Box<dyn Fn() -> bool + Send + Sync>;

/// Ends a process at once, without asking it or waiting for it.
pub type Ender = Box<dyn Fn() + Send + Sync>;

/// Says why the network would not hear the guest yet, in words; `None`: it would.
pub type Unheard = Box<dyn Fn() -> Option<String> + Send>;

/// The QEMU process: vCPUs and device state.
pub trait Machine: Send {
    /// By which to see whether it has ended, also while somebody uses this port.
    fn has_ended(&self) -> HasEnded;

    /// By which to end it at once while somebody uses this port; `destroy` is still needed then.
    fn ender(&self) -> Ender;

    /// By which to see whether the network would hear the guest, also while somebody uses this port.
    fn unheard(&self) -> Unheard;

    /// What about a VM that has been made ready here is not as it was at its source, for the user to know.
    fn differences(&self) -> Vec<String> {
        vec![]
    }

    /// Does ahead of `stop`, while the guest still runs, whatever would otherwise take time while it does
    /// not; and says what the VM does. Changes nothing that the guest could notice.
    fn prepare_stop(&mut self) -> Result<RunState, MachineError>;

    /// The same ahead of `load`.
    fn prepare_load(&mut self) -> Result<(), MachineError>;

    /// How the VM differs from what it was when its migration began, and what it does. Asked several times a
    /// second while the guest runs; asks QEMU only when something may have happened, or a second after it was
    /// asked last.
    fn watch(&mut self) -> Result<VmCheck, MachineError>;

    /// What the VM does now.
    fn run_state(&mut self) -> Result<RunState, MachineError>;

    /// What its disks have done so far and do now. Asks QEMU, about a millisecond of its time; one that does
    /// not answer soon is not waited for.
    fn disks(&mut self) -> Result<Vec<units::Disk>, MachineError>;

    /// Stops the guest. Returns once its disks are drained, with the state in which it was before: somebody
    /// else may have stopped it a moment ago, or it may have stopped by itself. A guest that did not run is
    /// left as it is.
    fn stop(&mut self) -> Result<Stopped, MachineError>;

    /// The device state of the stopped guest, whose disks are inactive from then on. So its QEMU stands still
    /// as a whole at once: nobody can have the guest run, nor do anything else to it, but by `restore`,
    /// whoever ends, ourselves included. Fails if something was done to it since `stop`, or if the VM is not
    /// what it was when its migration began ([`MachineError::changed`]), and says what. That is looked for
    /// before its disks are taken from whoever uses them, of which QEMU may die (I3). 3 ms of it at most are
    /// looking.
    fn save(&mut self) -> Result<Saved, MachineError>;

    /// From now on no signal lets it go either, for as long as we live. Fails if one has done so since
    /// `save`.
    fn hold(&mut self) -> Result<(), MachineError>;

    /// Gives the VM the state that it had before `stop`, here or where it was loaded: `Running` lets it run,
    /// and returns once QEMU says that it does, with how long ago that was; any other leaves its vCPUs as
    /// they are. Its disks are its own again either way. What somebody else has done to it since `stop` is
    /// not undone. Asking again is harmless.
    fn restore(&mut self, before: RunState) -> Result<Duration, MachineError>;

    /// Loads a device state into a QEMU that waits for one. Reads guest RAM.
    fn load(&mut self, state: &DeviceState) -> Result<(), MachineError>;

    /// Tells the network where the guest is now.
    fn announce(&mut self) -> Result<(), MachineError>;

    /// Ends the QEMU process and reaps what belongs to it. Harmless when it is gone already.
    fn destroy(&mut self) -> Result<(), MachineError>;
}
