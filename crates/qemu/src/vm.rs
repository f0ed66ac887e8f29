//! One QEMU process as the engine's `Machine`: stop, save, load, resume, announce, destroy.

use crate::{
    adopt::{self, cmdline, nets},
    attach::RamBlock,
    cpu,
    find::{self, FindError},
    flush, halt,
    host::Host,
    known::Known,
    launch::{self, Belongings, LaunchError, Started},
    made_up, private,
    qmp::{Qmp, QmpError, Version},
    ram::{self, Layout, RamError},
    recipe::{Net, Recipe, Setting},
    snapshot::own,
    state::{self, StateError},
    tap,
};
use engine::ports::{DeviceState, Ender, HasEnded, Machine, MachineError, RunState, Unheard};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{
    collections::BTreeMap,
    fmt::Display,
    fs::{self, File},
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};
use sys::process::PidFd;

mod files; // what its QEMU has open

/// How long `stop` may take: it drains the disks, and the guest stands still meanwhile. Where storage hangs, QEMU itself does, and
/// the guest goes on when that is over; a migration is no reason to wait for it for longer.
const STOP: Duration = Duration::from_secs(10);

/// How long the guest may take to run after `cont`.
const RESUME: Duration = Duration::from_secs(10);

/// How long a QEMU that did not load a state may take to end with its last words; the guest stands still at the source.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How long QEMU may take to stand still as a whole: 0.3 ms where each of its threads is given a processor at
/// once. The guest stands still meanwhile; beyond, it goes on at the source.
const FREEZE: Duration = Duration::from_millis(500);

/// How long to wait before QEMU is asked again whether its own migration has ended.
const AGAIN: Duration = Duration::from_millis(2);

/// How long QEMU may take to end by itself before it is killed.
const QUIT: Duration = Duration::from_secs(3);

/// A VM: its QEMU process, held, with its monitor.
#[derive(Debug)]
pub struct Vm {
    pub(crate) qmp: Qmp,
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
    /// Disks that QEMU does not flush itself, because it was told so (`cache.no-flush`), or that have much to flush: we do.
    unflushed: Vec<File>,
    /// Whether disks go through the page cache that usually do not.
    pub(crate) buffered: bool,
    /// Whether its network was seen not to hear it yet.
    slow_network: Arc<AtomicBool>,
    /// What it was when its migration began.
    known: Option<Known>,
    /// Whether the guest stands still because of us: stopped, or loaded and not yet started.
    stands_still: bool,
    /// Whether its QEMU stands still as a whole.
    frozen: bool,
    /// The number of the first event since it was stopped by us.
    still_since: Option<u64>,
    /// Whether that is because we loaded it.
    loaded: bool,
    /// Whether its device state was saved since it was stopped.
    saved: bool,
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
    /// Starts a VM; it runs when this returns.
    pub fn run(recipe: &Recipe, host: &Host) -> Result<Self, LaunchError> {
        Self::start(recipe, host, false)
    }

    /// Starts a QEMU that waits for this VM's memory and device state, and runs nothing.
    pub fn incoming(recipe: &Recipe, host: &Host) -> Result<Self, LaunchError> {
        let mut vm = Self::start(recipe, host, true)?;
        let opened = vm
            .set(&recipe.settings)
            .and_then(|()| state::open_door(&mut vm.qmp).map_err(|error| error.to_string()));
        match opened {
            Ok(door) => {
                vm.door = Some(door);
                Ok(vm)
            }
            Err(error) => {
                launch::kill(&vm.process);
                vm.belongings.remove();
                Err(LaunchError::Unusable { vm: recipe.name.clone(), reasons: vec![error] })
            }
        }
    }

    /// Sets what monitors had set where it comes from.
    fn set(&mut self, settings: &[Setting]) -> Result<(), String> {
        for setting in settings {
            let (command, arguments) = setting.command();
            self.qmp.execute(command, arguments).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn start(recipe: &Recipe, host: &Host, incoming: bool) -> Result<Self, LaunchError> {
        let Started { mut qmp, process, belongings } = launch::start(recipe, host, incoming)?;
        let ready = prepare(&mut qmp, incoming)
            .and_then(|()| Ok((cpu::pinned_machine(&mut qmp)?, cpu::features(&mut qmp)?)));
        let opened = ready.map_err(OpenError::Qmp).and_then(|ready| Ok((ready, ram::layout(&mut qmp)?)));
        match opened {
            Ok(((machine, features), layout)) => {
                let mut recipe = recipe.clone();
                // An incoming VM keeps what its source recorded: the guest saw that.
                if !incoming {
                    recipe.machine = cpu::with_machine(&recipe.machine, &machine);
                    recipe.cpu_features = features;
                    if let Err(error) = made_up::carry(&mut qmp, &mut recipe) {
                        tracing::warn!(vm = recipe.name, %error, "what QEMU made up is not known");
                    }
                }
                recipe.qemu = qmp.version();
                Ok(Self::new(qmp, process, recipe, belongings, layout))
            }
            Err(error) => {
                launch::kill(&process);
                let words =
                    belongings.last_words().map_or(String::new(), |words| format!(" (QEMU said: {words})"));
                belongings.remove();
                let reasons = vec![format!("{error}{words}")];
                Err(LaunchError::Unusable { vm: recipe.name.clone(), reasons })
            }
        }
    }

    pub(crate) fn new(
        qmp: Qmp,
        process: PidFd,
        recipe: Recipe,
        belongings: Belongings,
        layout: Layout,
    ) -> Self {
        let private = private::Places::new(&layout);
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
            known: None,
            stands_still: false,
            frozen: false,
            still_since: None,
            loaded: false,
            saved: false,
            stopped_at: None,
            resumed_at: None,
        }
    }

    /// Finds a VM again whose QEMU outlived us.
    pub fn reopen(handle: &Handle) -> Result<Self, OpenError> {
        let gone = || OpenError::Gone { vm: handle.recipe.name.clone(), pid: handle.pid };
        let unseen = |cause| FindError::System {
            socket: handle.belongings.qmp.display().to_string(),
            what: format!("process {}", handle.pid),
            cause,
        };
        if !lives(handle).map_err(unseen)? {
            return Err(gone());
        }
        let mut qmp = Qmp::connect(&handle.belongings.qmp)?;
        let process = find::process_of(&mut qmp)?;
        if process.pid() != handle.pid {
            return Err(gone());
        }
        let layout = ram::layout(&mut qmp)?;
        Ok(Self::new(qmp, process, handle.recipe.clone(), handle.belongings.clone(), layout))
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

    /// A migration begins: reads all of the VM again, because others use its QEMU too. From now on [`Machine::watch`] and
    /// [`Machine::changes`] tell what differs from what is read here.
    pub fn begin(&mut self) -> Result<Begun, QmpError> {
        let begin = Instant::now();
        let known = Known::begin(&mut self.qmp)?;
        let mut reasons = known.hindrances();
        let started_by_us = self.belongings.log.is_some();
        let (mut recipe, found, notes) =
            adopt::again(&mut self.qmp, &self.process, &self.recipe, started_by_us)?;
        if !started_by_us {
            made_up::carry(&mut self.qmp, &mut recipe)?;
        }
        for reason in found {
            if !reasons.contains(&reason) {
                reasons.push(reason);
            }
        }
        self.recipe = recipe;
        self.known = Some(known);
        Ok(Begun { reasons, notes, took: begin.elapsed() })
    }

    /// Its network cards as they are plugged in now, which others can have changed; else everything about them that cannot go with it.
    pub fn networks(&self) -> Result<Vec<Net>, Vec<String>> {
        let nets = &self.recipe.nets;
        let ours = nets.iter().zip(&self.belongings.taps).map(|(net, tap)| nets::tap_of(net, tap));
        let mut taps: BTreeMap<_, _> = ours.collect();
        if taps.is_empty() && !nets.is_empty() {
            let argv = find::command_line(&self.process);
            taps =
                cmdline::taps(&argv.map_err(|error| vec![format!("cannot read its command line: {error}")])?);
        }
        let known = nets.iter().filter_map(|net| Some((net.id.clone(), taps.remove(&net.id)?)));
        nets::plugged(&self.process, known)
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

    /// Copies the RAM blocks that QEMU keeps private, while the guest runs. [`Machine::save`] tells only what changed in
    /// them since: the target must have been given these first.
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
        let why = "its firmware is zeros, since an older Whimbrel moved it here: the guest runs, but cannot reboot; power it \
                   off and start it anew";
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

    /// QEMU did not take what it was given: it says why as it ends, and nowhere else.
    fn not_loaded(&self, what: &str, error: &StateError) -> MachineError {
        if matches!(error, StateError::Qmp(_) | StateError::Failed(_)) {
            let _ = self.process.wait(LAST_WORDS);
        }
        let mut failed = self.error(what, error);
        if let Some(kept) = self.belongings.keep_log(self.name()) {
            failed.why.push_str(&format!("; all that it said is kept in {}", kept.display()));
        }
        failed
    }

    /// Lets its QEMU go on, if it stands still as a whole.
    fn thaw(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.frozen) { self.process.thaw() } else { Ok(()) }
    }

    /// QEMU needs the place for its device state no more.
    fn give_back_exit(&mut self) {
        if let Some(exit) = self.exit.take()
            && let Err(error) = state::close_exit(&mut self.qmp, exit)
        {
            tracing::debug!(vm = self.name(), %error, "a descriptor stays in QEMU");
        }
    }

    /// Finds out while the guest runs what would otherwise cost time while it does not. What is not to be found now
    /// is asked again when it is needed.
    fn look_ahead(&mut self) {
        if let Err(error) = self.private.locate(&mut self.qmp, &self.process) {
            tracing::debug!(vm = self.name(), %error, "not yet known");
        }
    }

    /// What it does, in our words for QEMU's.
    fn state(&mut self) -> Result<RunState, QmpError> {
        self.status().map(|word| RunState::from_name(&word))
    }

    /// What has happened to it since `stop`, by all that its monitor has said so far.
    fn changed(&self) -> Option<&'static str> {
        self.still_since.and_then(|number| halt::changed(self.qmp.events_since(number)))
    }

    /// Its state, which QEMU's own migration does not change any more: that may take the guest elsewhere at any moment, and then it must
    /// not run here (I1). One that began just when we stopped the guest is cancelled: it would find the guest standing still, and end
    /// between a look at it and `cont`.
    fn status_for_good(&mut self) -> Result<String, String> {
        let text = |error: QmpError| error.to_string();
        let begin = Instant::now();
        loop {
            let status = self.status().map_err(text)?;
            // One that waits for its state has no migration of its own but ours.
            if status == "inmigrate" {
                return Ok(status);
            }
            let answer = self.qmp.execute("query-migrate", json!({})).map_err(text)?;
            let own = answer["status"].as_str().unwrap_or("none");
            if status == "running" || (own::is_over(own) && status != "finish-migrate") {
                // Asked before: what ended since has changed it.
                let status = self.status().map_err(text)?;
                return own::elsewhere(&status, own).map_or(Ok(status), |why| Err(why.to_owned()));
            }
            if begin.elapsed() > RESUME || own.starts_with("postcopy") {
                let why = own::elsewhere(&status, own).unwrap_or("QEMU's own migration does not end");
                return Err(why.to_owned());
            }
            self.qmp.execute("migrate_cancel", json!({})).map_err(text)?;
            std::thread::sleep(AGAIN);
        }
    }

    /// Whether the guest runs.
    fn runs(&mut self) -> Result<bool, QmpError> {
        Ok(self.state()? == RunState::Running)
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

    fn get_ready(&mut self) -> Result<(), MachineError> {
        if self.door.is_some() {
            return state::widen_heap(&mut self.qmp).map_err(|error| self.error("get ready to load", error));
        }
        let what = "get ready to stop";
        let state = self.state().map_err(|error| self.error(what, error))?;
        if let Some(why) = state.hindrance() {
            return Err(self.error(what, why));
        }
        self.look_ahead();
        // Most of what there is to write, while the guest runs.
        if let Err(error) = flush::all(&self.unflushed) {
            tracing::warn!(vm = self.name(), %error, "its disks cannot be flushed yet");
        }
        if self.exit.is_none() {
            self.exit = Some(state::open_exit(&mut self.qmp).map_err(|error| self.error(what, error))?);
        }
        Ok(())
    }

    fn watch(&mut self) -> Result<Vec<String>, MachineError> {
        let Some(known) = &mut self.known else { return Ok(vec![]) };
        known.watch(&mut self.qmp).map_err(|error| self.error("look again at", error))
    }

    fn changes(&mut self) -> Result<Vec<String>, MachineError> {
        let Some(known) = &self.known else { return Ok(vec![]) };
        known.changes(&mut self.qmp, self.saved).map_err(|error| self.error("look again at", error))
    }

    fn run_state(&mut self) -> Result<RunState, MachineError> {
        self.state().map_err(|error| self.error("ask what it does:", error))
    }

    fn stop(&mut self) -> Result<RunState, MachineError> {
        let what = "stop";
        if self.exit.is_none() {
            self.get_ready()?;
        }
        (self.stopped_at, self.saved) = (None, false);
        let before = self.state().map_err(|error| self.error(what, error))?;
        let heard = self.qmp.heard();
        self.qmp.execute_within("stop", json!({}), STOP).map_err(|error| self.error(what, error))?;
        let answered = self.qmp.heard();
        // QEMU's `stop` succeeds from every state, and does nothing to a guest that does not run.
        let after = self.state().map_err(|error| self.error(what, error))?;
        let around = self.qmp.events_since(heard).filter(|event| event.number < answered);
        let found = halt::found(before, around, after);
        self.stopped_at = found.stopped_at;
        self.stands_still = after == RunState::Paused;
        self.still_since = Some(answered);
        match self.changed() {
            Some(changed) => Err(self.error(what, changed)),
            None if after == RunState::Running => Err(self.error(what, "it runs on")),
            None => Ok(found.state),
        }
    }

    fn freeze(&mut self) -> Result<(), MachineError> {
        let what = "freeze";
        self.process.freeze(FREEZE).map_err(|error| self.error(what, error))?;
        self.frozen = true;
        // QEMU says RESUME before a vCPU runs, and into the socket itself: what is not in there by now has
        // not happened, and never will.
        self.qmp.hear().map_err(|error| self.error(what, error))?;
        match self.changed() {
            Some(changed) => Err(self.error(what, changed)),
            None => Ok(()),
        }
    }

    fn restore(&mut self, before: RunState) -> Result<Duration, MachineError> {
        let what = "restore";
        self.thaw().map_err(|error| self.error(what, error))?;
        self.qmp.hear().map_err(|error| self.error(what, error))?;
        let since = self.still_since.map(|number| self.qmp.events_since(number));
        let taken_over = since.is_some_and(halt::taken_over);
        if before == RunState::Running && !taken_over {
            let ago = self.resume()?;
            self.still_since = None;
            return Ok(ago);
        }
        if before == RunState::Suspended
            && self.state().map_err(|error| self.error(what, error))? == RunState::Paused
        {
            // Since QEMU 9 `stop` also stops a guest that sleeps, and `cont` lets it sleep on.
            self.qmp.execute("cont", json!({})).map_err(|error| self.error(what, error))?;
        }
        // Disks that QEMU's own migration has taken elsewhere are not this QEMU's (I1, I6).
        if !self.loaded {
            self.status_for_good().map_err(|why| self.error(what, why))?;
        }
        // What was stopped already when we came, or by somebody else since, stays so.
        (self.stands_still, self.still_since) = (false, None);
        state::activate_disks(&mut self.qmp).map_err(|error| self.error(what, error))?;
        self.give_back_exit();
        Ok(Duration::ZERO)
    }

    fn resume(&mut self) -> Result<Duration, MachineError> {
        let what = "resume";
        // What we loaded ourselves need not be asked.
        let loaded = std::mem::take(&mut self.loaded);
        let status = if std::mem::take(&mut self.stands_still) && loaded {
            "paused".to_owned()
        } else {
            self.status_for_good().map_err(|why| self.error(what, why))?
        };
        match status.as_str() {
            "running" => return Ok(Duration::ZERO),
            // `cont` would be remembered and would start the guest whenever its state has been loaded.
            "inmigrate" => return Err(self.error(what, "its device state has not been loaded")),
            "shutdown" | "internal-error" | "guest-panicked" => {
                return Err(
                    self.error(what, format!("it is in state {status}, from which only a reset leads back"))
                );
            }
            _ => {}
        }
        self.qmp.forget_events("RESUME");
        let asked = Instant::now();
        self.qmp.execute("cont", json!({})).map_err(|error| self.error(what, error))?;
        let event = self.qmp.wait_event(RESUME, |event| event.name == "RESUME");
        let event = event.map_err(|error| self.error(what, error))?;
        if event.is_none() && !self.runs().map_err(|error| self.error(what, error))? {
            return Err(self.error(what, format!("QEMU said yes, but does not run it after {RESUME:?}")));
        }
        // QEMU's own stamp: by the time that its word gets here, the guest's vCPUs compete for the processors again. Never
        // longer ago than it was asked for, whatever the host's clock does.
        let at = event.map_or_else(SystemTime::now, |event| event.at);
        let ago = at.elapsed().unwrap_or_default().min(asked.elapsed());
        self.resumed_at = Some(at);
        self.give_back_exit();
        Ok(ago)
    }

    fn save(&mut self) -> Result<DeviceState, MachineError> {
        let what = "save the device state of";
        let Some(mut exit) = self.exit.take().filter(|_| self.stands_still) else {
            return Err(self.error(what, "the guest runs; stop it first"));
        };
        let saved = state::save(&mut self.qmp, &mut exit);
        self.exit = Some(exit);
        let stream = saved.map_err(|error| self.error(what, error))?;
        // Its disks are inactive now: nothing follows. Before anybody else may open them for good.
        flush::all(&self.unflushed).map_err(|error| self.error("flush the disks of", error))?;
        let private =
            self.private.save(&mut self.qmp, &self.process).map_err(|error| self.error(what, error))?;
        self.saved = true;
        Ok(DeviceState { stream, private })
    }

    fn load(&mut self, state: &DeviceState) -> Result<(), MachineError> {
        let what = "load the device state of";
        let Some(door) = self.door.take() else {
            return Err(self.error(what, "its QEMU does not wait for one"));
        };
        // QEMU may open an image by its name once more, for writing, when it is activated.
        self.check_names().map_err(|why| self.error(what, why))?;
        let section = self.given.section(&self.private.blocks(), &state.private);
        let section = section.map_err(|error| self.error(what, error))?;
        let loaded = state::load(&mut self.qmp, door, &section, &state.stream);
        loaded.map_err(|error| self.not_loaded(what, &error))?;
        (self.stands_still, self.loaded) = (true, true);
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
        let quits = !self.frozen && self.qmp.execute_within("quit", json!({}), QUIT).is_ok();
        let ended = |vm: &Self, time| vm.process.wait(time).map_err(|error| vm.error("end", error));
        if !ended(self, if quits { QUIT } else { Duration::ZERO })? {
            if !self.frozen {
                tracing::warn!(vm = self.name(), "QEMU does not end by itself and is killed");
            }
            launch::kill(&self.process);
            if !ended(self, QUIT)? {
                return Err(
                    self.error("end", "it does not end even when it is killed: it waits in the kernel")
                );
            }
        }
        self.belongings.remove();
        Ok(())
    }
}

/// What must be set before a migration touches it.
fn prepare(qmp: &mut Qmp, incoming: bool) -> Result<(), QmpError> {
    let on = |name: &str| json!({ "capability": name, "state": true });
    let mut capabilities = vec![on("events")];
    if incoming {
        // Disks stay the source's until `cont`.
        capabilities.push(on("late-block-activate"));
    }
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities })).map(drop)
}

/// Whether its process is there. One that cannot be looked at is not gone: what it uses is not to be taken away.
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
    // The name in parentheses may hold anything; the 22nd field is the 20th after it.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace());
    Ok(fields.and_then(|mut fields| fields.nth(19)).and_then(|field| field.parse().ok()).unwrap_or(0))
}
