//! What the agent asks of the program that runs the VMs. Kept by QEMU; tests keep it with a model.

use crate::store::VmRecord;
use ports::RunState;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A VM that could be started.
#[derive(Clone, PartialEq, Debug)]
pub struct StartPlan {
    /// Its name.
    pub name: String,
    /// All that is needed to start it, here or on a target.
    pub recipe: Value,
}

/// A VM that runs.
#[derive(Clone, PartialEq, Debug)]
pub struct Found {
    /// The process that runs it.
    pub pid: u32,
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// All that a target needs to start the same VM.
    pub recipe: Value,
    /// What exists on this host only for this process, and goes with it.
    pub belongings: Value,
}

/// What is known by looking of a VM that something else started; `POST /v1/check` answers with it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Examined {
    /// Its process.
    pub pid: u32,
    /// What goes with it to another host, in words.
    pub carried: Vec<String>,
    /// What will be different there.
    pub different: Vec<String>,
    /// What hinders it from being moved, each with what mends it. Empty: it can be adopted.
    pub hindrances: Vec<String>,
}

/// What a VM is doing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Condition {
    /// Its guest runs.
    Running,
    /// Its guest does not run; with the hypervisor's own word for why.
    Paused(String),
    /// There is no process any more; why that is known.
    Gone(String),
    /// It does not answer; why.
    Unknown(String),
}

/// Why something cannot be done: every reason there is, not only the first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reasons(pub Vec<String>);

impl<T: Into<String>> From<T> for Reasons {
    fn from(reason: T) -> Self {
        Self(vec![reason.into()])
    }
}

/// Starts, finds and ends VMs. Every method may block for as long as the process takes to answer.
pub trait Hypervisor: Send + Sync {
    /// Understands a VM file that was read from `path`. Relative paths in it are relative to its directory.
    fn plan(&self, text: &str, path: &Path) -> Result<StartPlan, Reasons>;

    /// Starts a VM; its guest runs when this returns. Leaves nothing behind when it fails.
    fn start(&self, plan: &StartPlan) -> Result<Found, Reasons>;

    /// Learns what a VM that something else started is made of, and what will be different on another host.
    /// Changes nothing about it.
    fn inspect(&self, name: &str, qmp: &Path) -> Result<(Found, Vec<String>), Reasons>;

    /// The same by looking alone: attaches to nothing, takes charge of nothing.
    fn examine(&self, qmp: &Path) -> Result<Examined, Reasons>;

    /// What the VM is doing now.
    fn condition(&self, vm: &VmRecord) -> Condition;

    /// Takes away what an interrupted start or arrival of a VM of this name may have left: nobody was ever
    /// told that it runs.
    fn sweep(&self, name: &str);

    /// Takes away what earlier agents of this host were making when they were killed, and had not recorded
    /// yet: all that they started but these. Called once, before anything is started.
    fn sweep_others(&self, known: &[VmRecord]);

    /// Finds out ahead of time what the next VM would have to wait for. Called once, beside all else: the
    /// guests that are here have been seen to by then.
    fn learn(&self);

    /// Gives its guest the state back that it had before a migration stopped it; harmless if it has it.
    fn restore(&self, vm: &VmRecord, before: RunState) -> Result<(), Reasons>;

    /// Whether its process can still do anything: not once it has ended, or was killed and is only not gone
    /// yet.
    fn can_run(&self, vm: &VmRecord) -> Result<bool, Reasons>;

    /// Kills its process, and waits a little for its end. One that stands still does nothing more once this
    /// returns, gone or not.
    fn kill(&self, vm: &VmRecord) -> Result<(), Reasons>;

    /// Ends its process and removes what belonged to it; harmless if it has ended.
    fn stop(&self, vm: &VmRecord) -> Result<(), Reasons>;

    /// The same for one that waited for a guest and will have none: whatever it says or does not say.
    fn discard(&self, vm: &VmRecord) -> Result<(), Reasons>;
}
