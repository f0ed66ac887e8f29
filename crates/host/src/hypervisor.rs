//! Starts, finds and ends VMs: the agent's `Hypervisor` with QEMU.

use crate::copies::Copies;
use agent::{
    config::Config,
    hypervisor::{Condition, Examined, Found, Hypervisor, Reasons, StartPlan},
    store::VmRecord,
};
use attach::RamBlock;
use ports::{Machine, RunState};
use qemu::{
    Handle, Host, Kvm, Limits, OpenError, Recipe, Vm, VmFile, frozen,
    launch::{self, Belongings},
    preflight, sharing,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fmt::Display,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};
use units::{BlockId, Locked};

/// This host's QEMU.
#[derive(Clone, Debug)]
pub struct QemuHost {
    /// All but what KVM does.
    host: Host,
    kvm: Arc<Tried>,
    /// What is kept of VMs that have left: it makes room for those that come.
    pub(crate) copies: Copies,
}

/// How guests are run by the CPU here. Where they are not, to find that out takes half a second, for which
/// nobody waits who does not need to know.
#[derive(Debug)]
struct Tried {
    find_out: fn() -> Result<Option<Kvm>, String>,
    found: Mutex<Option<Option<Kvm>>>,
}

impl Tried {
    /// Whoever asks while it is being found out waits. What cannot be tried now, without a descriptor left
    /// for example, is tried again for the next one.
    fn kvm(&self) -> Option<Kvm> {
        let mut found = self.found.locked();
        if found.is_none() {
            match (self.find_out)() {
                Ok(kvm) => *found = Some(kvm),
                Err(why) => tracing::info!(why, "KVM cannot be tried now, and counts as absent"),
            }
        }
        found.flatten()
    }
}

impl QemuHost {
    /// As the agent's configuration says. `kvm` finds out, by running one, how guests are run by the CPU
    /// here; or says why that could not be tried.
    pub fn new(config: &Config, kvm: fn() -> Result<Option<Kvm>, String>) -> Self {
        let mut host = Host::new(&config.runtime_dir);
        host.owner = config.state_dir.clone();
        let agent::config::Allow { disks, boot, bridges, servers, options, devices, spool: _ } =
            config.allow.clone();
        host.limits = Limits { disks, boot, bridges, servers, options, devices };
        host.overcommit = config.overcommit.0;
        host.user = config.qemu_user.clone();
        // A bare name is looked for in PATH, which is also what happens without one.
        host.qemu = Some(config.qemu.clone()).filter(|path| path.components().count() > 1);
        let kvm = Arc::new(Tried { find_out: kvm, found: Mutex::default() });
        Self { host, kvm, copies: Copies::new(config.keep) }
    }

    /// With all that is to be known of it, which the first to ask may have to wait for.
    pub(crate) fn host(&self) -> Host {
        Host { kvm: self.kvm.kvm(), ..self.host.clone() }
    }
}

/// What to do about a process that nobody of ours has stopped.
const STOPPED: &str = "`kill -CONT` lets it go on";

/// What a VM file comes to.
#[derive(Serialize, Deserialize)]
struct Planned {
    recipe: Recipe,
    /// The QEMU program that the file names.
    qemu: Option<PathBuf>,
}

/// Among a VM's belongings: [`Kept::came_by`].
pub(crate) const CAME_BY: &str = "came_by";

/// What is recorded as a VM's belongings.
#[derive(Serialize, Deserialize)]
pub(crate) struct Kept {
    #[serde(flatten)]
    belongings: Belongings,
    /// How to serve its missing pages again after a restart of the agent. Its QEMU cannot be asked then: it
    /// may itself be waiting for one of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) waits: Option<Waits>,
    /// The block nodes that read their files directly, but not while it is moved away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) buffered: Vec<String>,
    /// By which migration it came to this host: its source may keep its memory from then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) came_by: Option<String>,
}

/// A QEMU whose guest waits for missing pages.
#[derive(Serialize, Deserialize)]
pub(crate) struct Waits {
    /// The number of the userfaultfd in QEMU.
    pub(crate) fd: i32,
    /// Its RAM blocks.
    pub(crate) blocks: Vec<RamBlock>,
    /// Those of them, by their numbers, that were handed over: none of their pages is missing, and nobody
    /// writes them but the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) handed_over: Vec<u16>,
}

impl Waits {
    /// Finds its memory again.
    pub(crate) fn reopen(&self, pid: i32) -> Result<attach::Target, String> {
        let handed_over = self.handed_over.iter().copied().map(BlockId).collect();
        attach::Target::reopen(pid, &self.blocks, &handed_over).map_err(|e| e.to_string())
    }
}

pub(crate) fn kept(vm: &VmRecord) -> Result<Kept, String> {
    serde_json::from_value(vm.belongings.clone())
        .map_err(|e| format!("what is recorded of {} cannot be read: {e}", vm.name))
}

/// What QEMU needs to know of a recorded VM to find it again.
pub(crate) fn handle_of(vm: &VmRecord) -> Result<Handle, String> {
    let process = vm.process.ok_or_else(|| format!("{} has no QEMU", vm.name))?;
    Ok(Handle {
        pid: process.pid.cast_signed(),
        started: process.start_time,
        recipe: serde_json::from_value(vm.recipe.clone())
            .map_err(|e| format!("what is recorded of {} cannot be read: {e}", vm.name))?,
        belongings: kept(vm)?.belongings,
    })
}

/// What is to be remembered of a VM.
pub(crate) fn found(vm: &Vm, waits: Option<Waits>) -> Result<Found, String> {
    let handle = vm.handle();
    let value = |json: Result<serde_json::Value, serde_json::Error>| json.map_err(|e| e.to_string());
    Ok(Found {
        pid: handle.pid.cast_unsigned(),
        qmp: handle.belongings.qmp.clone(),
        recipe: value(serde_json::to_value(&handle.recipe))?,
        belongings: value(serde_json::to_value(Kept {
            belongings: handle.belongings,
            waits,
            buffered: vec![],
            came_by: None,
        }))?,
    })
}

/// The VM of a record, with its monitor.
pub(crate) fn open(vm: &VmRecord) -> Result<Vm, OpenOr> {
    let handle = handle_of(vm).map_err(OpenOr::Unreadable)?;
    Vm::reopen(&handle).map_err(OpenOr::Open)
}

/// Has a VM that is not moved any more read its disks directly again, if it did; says whether it did. Those
/// that read them already are left alone.
pub(crate) fn read_directly(vm: &VmRecord) -> Result<bool, String> {
    let buffered = kept(vm)?.buffered;
    if buffered.is_empty() {
        return Ok(false);
    }
    open(vm).map_err(|error| error.to_string())?.read_directly(&buffered).map(|()| true)
}

/// The same for the VMs of an agent that was killed, unless it has left more than that behind.
fn all_read_directly(known: &[VmRecord]) {
    for vm in known.iter().filter(|vm| kept(vm).is_ok_and(|kept| !kept.buffered.is_empty())) {
        let frozen = handle_of(vm).is_ok_and(|handle| frozen::is_frozen(&handle).unwrap_or(true));
        if !frozen && let Err(why) = read_directly(vm) {
            tracing::warn!(vm = vm.name, why, "its disks still go through the page cache");
        }
    }
}

/// Why a recorded VM cannot be opened.
#[derive(Debug)]
pub(crate) enum OpenOr {
    Unreadable(String),
    Open(OpenError),
}

impl Display for OpenOr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreadable(why) => why.fmt(f),
            Self::Open(error) => error.fmt(f),
        }
    }
}

/// Ends a pause that whoever began it did not live to end: its QEMU may stand still as a whole.
pub(crate) fn give_back(vm: &VmRecord, before: RunState) -> Result<Vm, String> {
    frozen::thaw(&handle_of(vm)?).map_err(|e| e.to_string())?;
    let mut open = open(vm).map_err(|e| e.to_string())?;
    open.restore(before).map_err(|e| e.to_string())?;
    if before == RunState::Running
        // Switches may have learned another way to it meanwhile; a network that knows where it is is not
        // harmed.
        && let Err(error) = open.announce()
    {
        tracing::warn!(vm = vm.name, %error, "it runs, but could not be announced to the network");
    }
    Ok(open)
}

/// Takes away what migrations have left beside the disks that did not end by themselves. Nobody waits for it:
/// a datastore may hang.
fn sweep_tokens(known: &[VmRecord]) {
    let recipes: Vec<_> = known.iter().filter_map(|vm| Some(handle_of(vm).ok()?.recipe)).collect();
    let files = recipes.iter().flat_map(|recipe| &recipe.files);
    let folders: BTreeSet<_> = files.filter_map(|file| Some(file.path.parent()?.to_owned())).collect();
    let sweep = move || folders.iter().for_each(|folder| sharing::sweep(folder));
    if let Err(error) = thread::Builder::new().name("sweep".into()).spawn(sweep) {
        tracing::debug!(%error, "nobody looks for tokens");
    }
}

fn reasons(error: impl Display) -> Reasons {
    error.to_string().into()
}

fn refused(error: OpenError) -> Reasons {
    match error {
        OpenError::Refused { reasons, .. } => Reasons(reasons),
        error => reasons(error),
    }
}

/// How long a guest waits, at most, for the end of a second QEMU that was killed, before it goes on in the
/// first: nothing of a killed one runs once it is gone, and one that is not gone by then waits in the kernel.
pub(crate) const KILL: Duration = Duration::from_secs(1);

/// A VM that is only looked at, and has no name yet.
const UNNAMED: &str = "vm";

impl Hypervisor for QemuHost {
    fn plan(&self, text: &str, path: &Path) -> Result<StartPlan, Reasons> {
        let file = VmFile::parse(text, path).map_err(reasons)?;
        let recipe = file.recipe(&self.host()).map_err(Reasons)?;
        let name = recipe.name.clone();
        let planned = Planned { recipe, qemu: file.qemu };
        Ok(StartPlan { name, recipe: serde_json::to_value(planned).map_err(reasons)? })
    }

    fn start(&self, plan: &StartPlan) -> Result<Found, Reasons> {
        let planned: Planned = serde_json::from_value(plan.recipe.clone()).map_err(reasons)?;
        let mut host = self.host();
        host.qemu = planned.qemu.or(host.qemu);
        let name = &planned.recipe.name;
        self.copies.make_room(name, |more| preflight::has_room(&planned.recipe, &host, 0, more));
        let vm = Vm::run(&planned.recipe, &host).map_err(reasons)?;
        found(&vm, None).map_err(reasons)
    }

    fn inspect(&self, name: &str, qmp: &Path) -> Result<(Found, Vec<String>), Reasons> {
        let adopted = Vm::adopt(name, qmp).map_err(refused)?;
        for note in &adopted.notes {
            tracing::warn!(vm = name, "{note}");
        }
        Ok((found(&adopted.vm, None).map_err(reasons)?, adopted.notes))
    }

    fn examine(&self, qmp: &Path) -> Result<Examined, Reasons> {
        let qemu::Examined { pid, carried, different, hindrances } =
            Vm::examine(UNNAMED, qmp).map_err(refused)?;
        Ok(Examined { pid: pid.cast_unsigned(), carried, different, hindrances })
    }

    fn condition(&self, vm: &VmRecord) -> Condition {
        if handle_of(vm).is_ok_and(|handle| frozen::is_frozen(&handle).unwrap_or(false)) {
            return Condition::Unknown(format!("its QEMU process is stopped; {STOPPED}"));
        }
        match open(vm) {
            Ok(mut open) => match open.status() {
                Ok(status) if status == "running" => Condition::Running,
                Ok(status) => Condition::Paused(status),
                Err(error) => Condition::Unknown(error.to_string()),
            },
            Err(OpenOr::Open(error @ OpenError::Gone { .. })) => Condition::Gone(error.to_string()),
            Err(error) => Condition::Unknown(error.to_string()),
        }
    }

    fn sweep(&self, name: &str) {
        let swept = launch::sweep(name, &self.host);
        if swept > 0 {
            tracing::warn!(vm = name, swept, "ended a QEMU that an interrupted start had left");
        }
    }

    fn sweep_others(&self, known: &[VmRecord]) {
        sweep_tokens(known);
        all_read_directly(known);
        let known: Vec<&Path> = known.iter().map(|vm| vm.qmp.as_path()).collect();
        let swept = launch::sweep_others(&known, &self.host);
        if swept > 0 {
            tracing::warn!(
                swept,
                "took away what an agent had left that was killed before it could record it"
            );
        }
    }

    /// Whether KVM is usable, and what QEMU is; if that cannot be asked now, the first VM to come is told
    /// why.
    fn learn(&self) {
        if let Ok(program) = self.host().program() {
            preflight::learn(&program);
        }
    }

    fn restore(&self, vm: &VmRecord, before: RunState) -> Result<(), Reasons> {
        let mut open = give_back(vm, before)?;
        // They may lead to another QEMU of this host still.
        handle_of(vm)?.belongings.take_names();
        if let Err(why) = kept(vm).and_then(|kept| open.read_directly(&kept.buffered)) {
            tracing::warn!(vm = vm.name, why, "its disks still go through the page cache");
        }
        Ok(())
    }

    fn can_run(&self, vm: &VmRecord) -> Result<bool, Reasons> {
        frozen::can_run(&handle_of(vm)?).map_err(reasons)
    }

    fn kill(&self, vm: &VmRecord) -> Result<(), Reasons> {
        frozen::kill(&handle_of(vm)?, KILL).map_err(reasons)
    }

    fn stop(&self, vm: &VmRecord) -> Result<(), Reasons> {
        match open(vm) {
            Ok(mut open) => open.destroy().map_err(reasons),
            Err(OpenOr::Open(OpenError::Gone { .. })) => {
                handle_of(vm).map(|handle| handle.belongings.remove_ended(&vm.name)).map_err(reasons)
            }
            Err(error) => Err(reasons(error)),
        }
    }

    fn discard(&self, vm: &VmRecord) -> Result<(), Reasons> {
        let handle = handle_of(vm)?;
        // It may be one that somebody else had started, without our mark.
        frozen::end(&handle, None).map_err(reasons)?;
        launch::discard(&handle.belongings).map_err(reasons)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    #[test]
    fn kvm_is_tried_until_that_could_be_done_and_then_never_again() {
        const KVM: Kvm = Kvm { speed: 1, usable: false };
        static TRIES: AtomicU32 = AtomicU32::new(0);
        let find_out = || match TRIES.fetch_add(1, Relaxed) {
            0 => Err("too many open files".to_owned()),
            _ => Ok(Some(KVM)),
        };
        let tried = Tried { find_out, found: Mutex::default() };
        assert_eq!([tried.kvm(), tried.kvm(), tried.kvm()], [None, Some(KVM), Some(KVM)]);
        assert_eq!(TRIES.load(Relaxed), 2);
    }
}
