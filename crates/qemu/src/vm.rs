//! One QEMU process with the VM that it runs; and as the engine's `Machine`.

use crate::{
    adopt::{self, Again, cmdline, nets},
    cpu,
    disks::Queues,
    find::{self, FindError},
    granted::Grants,
    known::{Known, Look},
    launch::{self, Belongings},
    private,
    qmp::{Qmp, QmpError, Version},
    ram::{self, Layout, RamError},
    recipe::{Net, Recipe},
    state,
    virtio::{self, Which},
};
use attach::RamBlock;
use ports::{MachineError, RunState};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{
    collections::BTreeMap,
    fmt::Display,
    fs::{self, File},
    io,
    path::Path,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant, SystemTime},
};
use sys::{
    proc::{START_TIME, Stat},
    process::PidFd,
};

mod direct; // its disks, read directly or through the page cache
mod files; // what its QEMU has open
mod machine; // the engine's port
mod pause; // stopped, saved, frozen, held, given back
mod phase; // where it is on that way
mod start; // started, or found again
use phase::Phase;

/// A VM: its QEMU process, held, with its monitor.
#[derive(Debug)]
pub struct Vm {
    qmp: Qmp,
    process: PidFd,
    recipe: Recipe,
    belongings: Belongings,
    layout: Layout,
    private: private::Places,
    /// What a QEMU that waits has been given of its private blocks.
    given: private::Given,
    /// Where a QEMU that waits for its device state reads it from.
    door: Option<state::Door>,
    /// Where this QEMU writes its device state to.
    exit: Option<state::Exit>,
    /// Disks that QEMU does not flush itself, because it was told so (`cache.no-flush`), or that have much to
    /// flush: we do.
    unflushed: Vec<File>,
    /// Whether disks go through the page cache that usually do not.
    buffered: bool,
    /// Whether its network was seen not to hear it yet.
    slow_network: Arc<AtomicBool>,
    /// Whether its QEMU is older than the one that its recipe comes from.
    is_older: bool,
    /// What a QEMU that waits for a VM may have open.
    grants: Option<Grants>,
    /// What it was when its migration began.
    known: Option<Known>,
    /// What was asked of it as it was stopped.
    look: Option<Look>,
    /// Its TAPs then, by the ids of its networks.
    taps: Option<BTreeMap<String, adopt::netdevs::Tap>>,
    /// By which its disks are asked for what they have to do, once that was looked up.
    queues: Option<Queues>,
    /// Where it is on its way through a pause.
    phase: Phase,
    stopped_at: Option<SystemTime>,
    resumed_at: Option<SystemTime>,
}

/// What to remember of a VM in order to find it again after a restart.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Handle {
    /// The process's number.
    pub pid: i32,
    /// When the process started, in the kernel's ticks: tells it from a later one of the same number.
    pub started: u64,
    /// What the VM consists of.
    pub recipe: Recipe,
    /// What goes with it.
    pub belongings: Belongings,
}

/// What is found when a migration of a VM begins.
#[derive(Debug)]
pub struct Begun {
    /// Why it cannot be migrated, and what to do about it; nothing: it can.
    pub reasons: Vec<String>,
    /// What will be different on the target.
    pub notes: Vec<String>,
    /// How long the guest's QEMU was asked.
    pub took: Duration,
}

/// Why a QEMU process cannot be taken charge of.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It does not answer.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// It is not found.
    #[error(transparent)]
    Find(#[from] FindError),
    /// Its memory is not usable.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Another process answers now.
    #[error("the QEMU process {pid} of {vm} is gone")]
    Gone {
        /// The VM.
        vm: String,
        /// The process it was.
        pid: i32,
    },
    /// It is a QEMU, but one that cannot be migrated; every reason.
    #[error("{vm} cannot be adopted: {}", reasons.join("; "))]
    Refused {
        /// The VM.
        vm: String,
        /// Why, and what would mend it.
        reasons: Vec<String>,
    },
}

impl Vm {
    pub(crate) fn new(
        qmp: Qmp,
        process: PidFd,
        recipe: Recipe,
        belongings: Belongings,
        layout: Layout,
    ) -> Self {
        let private = private::Places::new(&layout);
        let mut recipe = recipe;
        // QEMU has them. Whatever is kept of a VM says nothing of what they are.
        recipe.secrets.iter_mut().for_each(|secret| secret.content = None);
        Self {
            qmp,
            process,
            recipe,
            belongings,
            layout,
            private,
            given: private::Given::default(),
            door: None,
            exit: None,
            unflushed: Vec::new(),
            buffered: false,
            slow_network: Arc::default(),
            is_older: false,
            grants: None,
            known: None,
            look: None,
            taps: None,
            queues: None,
            phase: Phase::Free,
            stopped_at: None,
            resumed_at: None,
        }
    }

    /// What to remember of it.
    pub fn handle(&self) -> Handle {
        Handle {
            pid: self.process.pid(),
            started: started(&self.process).unwrap_or(0),
            recipe: self.recipe.clone(),
            belongings: self.belongings.clone(),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.recipe.name
    }

    /// What another host needs to start it.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// Its process.
    pub fn process(&self) -> &PidFd {
        &self.process
    }

    /// Its QEMU's version.
    pub fn version(&self) -> Version {
        self.qmp.version()
    }

    /// Its shared RAM blocks in the order in which both sides number them, for `attach`.
    pub fn ram_blocks(&self) -> &[RamBlock] {
        &self.layout.main
    }

    /// Where the guest's console is written, if we started it with one.
    pub fn console(&self) -> Option<&Path> {
        self.belongings.console.as_deref()
    }

    /// What exists on this host only for it.
    pub fn belongings(&self) -> &Belongings {
        &self.belongings
    }

    /// Its monitor, for what this type does not offer.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// QEMU's word for what it does now, such as `running`, `paused`, `inmigrate`.
    pub fn status(&mut self) -> Result<String, QmpError> {
        let answer = self.qmp.execute("query-status", json!({}))?;
        answer["status"].as_str().map(str::to_owned).ok_or_else(|| self.qmp.strange("query-status", &answer))
    }

    /// A migration begins: reads all of the VM again, because others use its QEMU too. From now on
    /// [`Machine::watch`](ports::Machine::watch) and [`Machine::save`](ports::Machine::save) tell what
    /// differs from what is read here.
    pub fn begin(&mut self) -> Result<Begun, QmpError> {
        let begin = Instant::now();
        let known = Known::begin(&mut self.qmp)?;
        let mut reasons = known.hindrances();
        let started_by_us = self.belongings.log.is_some();
        let again = adopt::again(&mut self.qmp, &self.process, &self.recipe, started_by_us)?;
        let Again { recipe, reasons: found, notes, taps } = again;
        let lost = self.look_at_memory()?;
        for reason in found.into_iter().chain(lost) {
            if !reasons.contains(&reason) {
                reasons.push(reason);
            }
        }
        self.recipe = recipe;
        self.taps = Some(taps);
        self.known = Some(known);
        Ok(Begun { reasons, notes, took: begin.elapsed() })
    }

    /// Learns where its memory is now: others can plug in more, and unplug it. `Some`: that cannot be told,
    /// and why.
    fn look_at_memory(&mut self) -> Result<Option<String>, QmpError> {
        let layout = match ram::layout(&mut self.qmp) {
            Ok(layout) => layout,
            Err(RamError::Qmp(error)) => return Err(error),
            Err(error) => return Ok(Some(error.to_string())),
        };
        // How much of a table is in use changes by itself.
        let names = |layout: &Layout| -> Vec<_> {
            layout.private.iter().map(|block| (block.name.clone(), block.hva, block.total)).collect()
        };
        if layout.main != self.layout.main || names(&layout) != names(&self.layout) {
            self.private = private::Places::new(&layout);
            self.layout = layout;
        }
        Ok(None)
    }

    /// Its network cards as they are plugged in now, which others can have changed; else everything about
    /// them that cannot go with it.
    pub fn networks(&self) -> Result<Vec<Net>, Vec<String>> {
        let nets = &self.recipe.nets;
        let mut taps = match &self.taps {
            Some(taps) => taps.clone(),
            None => nets.iter().zip(&self.belongings.taps).map(|(net, tap)| nets::tap_of(net, tap)).collect(),
        };
        if taps.is_empty() && !nets.is_empty() {
            let argv = find::command_line(&self.process);
            taps =
                cmdline::taps(&argv.map_err(|error| vec![format!("cannot read its command line: {error}")])?);
        }
        let known: Vec<_> =
            nets.iter().filter_map(|net| Some((net.id.clone(), taps.remove(&net.id)?))).collect();
        let lost = nets.iter().filter(|net| !known.iter().any(|(id, _)| *id == net.id));
        let lost: Vec<_> = lost.map(|net| format!("network {}: its TAP is not known", net.id)).collect();
        if lost.is_empty() { nets::plugged(&self.process, known) } else { Err(lost) }
    }

    /// The threads that run its vCPUs.
    pub fn vcpu_threads(&mut self) -> Result<Vec<i32>, QmpError> {
        find::vcpu_threads(&mut self.qmp)
    }

    /// When the last `stop` took effect, by QEMU's clock.
    pub fn stopped_at(&self) -> Option<SystemTime> {
        self.stopped_at
    }

    /// When the guest last began to run again, by QEMU's clock.
    pub fn resumed_at(&self) -> Option<SystemTime> {
        self.resumed_at
    }

    /// The CPU features that the recipe's guest was shown and this QEMU does not show.
    pub fn missing_features(&mut self) -> Result<Vec<String>, QmpError> {
        let here = cpu::features(&mut self.qmp)?;
        Ok(cpu::missing(&self.recipe.cpu_features, &here))
    }

    /// What its guest has accepted of its virtio devices.
    pub fn accepted_of_virtio(&mut self) -> Result<Vec<virtio::Features>, QmpError> {
        virtio::features(&mut self.qmp, Which::Accepted).map(|(features, _)| features)
    }

    /// What the recipe's guest has accepted of them, and this QEMU does not offer.
    pub fn missing_of_virtio(&mut self) -> Result<Vec<String>, QmpError> {
        let (mut offered, nameless) = virtio::features(&mut self.qmp, Which::Offered)?;
        // A newer QEMU has names for what this one may offer without one.
        offered.retain(|one| !self.is_older || !nameless.contains(&one.device));
        Ok(virtio::missing(&self.recipe.virtio, &offered))
    }

    /// Copies the RAM blocks that QEMU keeps private, while the guest runs.
    /// [`Machine::save`](ports::Machine::save) tells only what changed in them since: the target must have
    /// been given these first.
    pub fn copy_ahead(&mut self) -> Result<Vec<(String, Vec<u8>)>, MachineError> {
        let copied = self.private.copy_ahead(&mut self.qmp, &self.process);
        copied.map_err(|error| self.error("copy the firmware and video memory of", error))
    }

    /// Gives a QEMU that waits for its device state what [`Self::copy_ahead`] copied at the source.
    pub fn take_ahead(&mut self, private: &[(String, Vec<u8>)]) -> Result<(), MachineError> {
        let what = "load the firmware and video memory of";
        let section = self.given.section(&self.private.blocks(), private);
        let section = section.map_err(|error| self.error(what, error))?;
        let Some(door) = &mut self.door else {
            return Err(self.error(what, "its QEMU does not wait for a state"));
        };
        state::feed_ahead(&mut self.qmp, door, &section).map_err(|error| self.not_loaded(what, &error))
    }

    /// What the user must know before the VM is moved.
    pub fn warnings(&mut self) -> Result<Vec<String>, MachineError> {
        let lost = self.private.lost_firmware(&mut self.qmp, &self.process);
        let lost = lost.map_err(|error| self.error("look at the firmware of", error))?;
        let why = "its firmware is zeros, since an older Whimbrel moved it here: the guest runs, but cannot \
                   reboot; power it off and start it anew";
        Ok(if lost { vec![why.to_owned()] } else { vec![] })
    }

    fn error(&self, what: &str, why: impl Display) -> MachineError {
        let mut why = why.to_string();
        if !self.process.is_alive().unwrap_or(false) {
            why.push_str("; the QEMU process has ended");
            if let Some(words) = self.belongings.last_words() {
                why.push_str(&format!(", its last words: {words}"));
            }
        }
        MachineError { what: format!("{what} {}", self.recipe.name), why }
    }

    /// What it does, in our words for QEMU's.
    fn state(&mut self) -> Result<RunState, QmpError> {
        self.status().map(|word| RunState::from_name(&word))
    }
}

/// Whether its process is there. One that cannot be looked at is not gone: what it uses is not to be taken
/// away.
pub(crate) fn lives(handle: &Handle) -> io::Result<bool> {
    let Some(process) = launch::while_it_is_there(PidFd::open(handle.pid))? else { return Ok(false) };
    let Some(began) = launch::while_it_is_there(started(&process))? else { return Ok(false) };
    // Where that was not known when it was recorded, its monitor tells them apart.
    let same = handle.started == 0 || began == handle.started;
    Ok(same && process.is_alive()?)
}

/// When a process started, in ticks since the host did; 0 if that is not understood.
fn started(process: &PidFd) -> io::Result<u64> {
    let stat = fs::read_to_string(process.proc_path("stat"))?;
    Ok(Stat::parse(&stat).and_then(|stat| stat.number(START_TIME)).unwrap_or(0))
}
