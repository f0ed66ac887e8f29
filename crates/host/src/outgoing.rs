//! Moves VMs away: the agent's `Migrator` with the engine.

use crate::{
    arrivals::Arrivals,
    hypervisor::{QemuHost, handle_of, kept, open, read_directly},
    incoming::Incoming,
    janitor::Janitor,
    record::{HostRecord, named},
    watchdog::{Watchdog, Watched, WatchedTracker},
};
use agent::{
    Context,
    config::{Address, Config, Tracker as Kind},
    migrate::{Events, MigrateRequest, Migrator, Wishes},
    peers::Pass,
    store::{Arrival, ArrivalRecord, DepartureRecord, Store, VmRecord},
};
use engine::{
    Acceptor, Beside, Dial, Options, Reading, RemoteRecord, Road, SourceDriver, SourceParts, TcpDial,
    ports::{
        Claim, Claimed, DeviceState, GuestMemory, HasEnded, Machine, MachineError, Ownership, Request,
        RunState, SourceJournal, TargetJournal, Tracker, Waiting,
    },
    report::{Compression, Event, Failure, Forecast, Mode, Outcome, Past, Phase, Promise, Report},
    shared::{SharedRecord, not_behind},
};
use pki::Security;
use qemu::{
    Accel, Begun, SpareCores, Vm,
    attach::{self, RamBlock},
    frozen,
    sharing::Shown,
};
use std::{
    io,
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    ops::RangeInclusive,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};
use sys::pulse::Pulse;
use units::{Epoch, MigrationId};

/// How many data connections a migration begins with: with one, its two threads are the limit before a fast link is
/// (`./dev bench --streams`). More are used where that moves more.
const STREAMS: u32 = 2;

/// The most unless the user says otherwise; each takes a thread and a few MiB on both sides. Eight fill 100 Gbit/s (Cloud
/// Hypervisor, pull request 7669).
const MOST_STREAMS: u32 = 8;

/// What a switchover costs besides moving dirty memory: stop, device state, claim, start. Under emulation `./dev bench --only
/// steady` shows 14 ms; with KVM the guest's stop and QEMU's own threads wait for nobody, which is worth about 6. Too low, and the
/// pause is longer than promised; too high, and rounds go on for nothing. Replaced by what was seen on the way to each host.
const SWITCHOVER: Duration = Duration::from_millis(8);
const EMULATED_SWITCHOVER: Duration = Duration::from_millis(14);

/// How long incoming migrations have to end when the agent does.
const GIVE_UP: Duration = Duration::from_secs(3);

/// How long the QEMU of a guest that has left may take to stand still.
const FREEZE: Duration = Duration::from_secs(10);

/// How long to wait before a QEMU is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// A reading that took longer than this is not done once more: its QEMU hangs.
const LONG_READING: Duration = Duration::from_secs(2);

/// A VM as it was read when its migration began.
struct Read {
    open: Vm,
    notes: Vec<String>,
    took: Duration,
    shown: Option<Shown>,
}

/// Moves this host's VMs, and takes others' in.
pub struct Mover {
    config: Arc<Config>,
    store: Store,
    shared: Option<Arc<dyn SharedRecord>>,
    acceptor: Acceptor,
    security: Security,
    janitor: Janitor,
}

impl Mover {
    /// For the host of this context, whose connections are protected so.
    pub fn new(context: &Context, qemu: QemuHost, security: Security) -> Self {
        let store = context.registry.store().clone();
        let shared = context.registry.record().cloned();
        let config = context.config.clone();
        let arrivals = Arrivals::default();
        let incoming = Incoming { qemu, store: store.clone(), config, shared: shared.clone(), arrivals };
        let acceptor = Acceptor::new(Arc::new(incoming), security.clone());
        let janitor = Janitor::start(&context.config, &store);
        Self { config: context.config.clone(), store, shared, acceptor, security, janitor }
    }

    /// Takes the watch for missing pages up again, where an agent before us had to leave it.
    fn serve_missing(&self, vm: &VmRecord, arrival: Arrival, record: &ArrivalRecord) -> Result<(), String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let handle = handle_of(vm)?;
        let waits = kept(vm)?.waits.ok_or("it lacks memory, but nothing is recorded of how to serve it")?;
        let owed = self.store.owed(&vm.name).map_err(|e| text(&e))?;
        let owed = owed.ok_or("it lacks memory, but not which is recorded")?;
        let spool = self.store.spool(&vm.name).map_err(|e| text(&e))?;
        let target = attach::Target::reopen(handle.pid, &waits.blocks).map_err(|e| text(&e))?;
        if !target.is_watched(waits.fd).map_err(|e| text(&e))? {
            // The agent before us had ended the watch, which is done once everything is there, and not lived to record that.
            run(vm, record)?;
            return { arrival }.settled().map_err(|e| text(&e));
        }
        let missing = target.retake(waits.fd).map_err(|e| text(&e))?;
        let blocks = target.memory().blocks().to_vec();
        let waiting = Waiting {
            memory: target.memory(),
            missing: Some(Arc::new(missing)),
            machine: Box::new(Later { vm: vm.clone(), left: false }),
            journal: Box::new(arrival),
        };
        let request = Request {
            migration: record.migration,
            vm: vm.name.clone(),
            from: record.from.clone(),
            epoch: Epoch(0),
            recipe: vec![],
            private: vec![],
            blocks,
            post_copy: true,
            record: String::new(),
            history: vec![],
        };
        thread::scope(|scope| {
            // Killed between the claim and `cont`, it does not run yet. Asked beside the faults, which it may be waiting for.
            scope.spawn(|| {
                while let Err(why) = run(vm, record) {
                    tracing::warn!(vm = vm.name, why, "it belongs here and does not run yet");
                    if !vm.process.is_some_and(|process| process.is_alive()) {
                        return;
                    }
                    thread::sleep(AGAIN);
                }
            });
            self.acceptor.go_on(request, waiting, owed, spool).map_err(|e| text(&e))
        })
    }

    /// What a migration as it is wished for would be.
    fn options(request: &MigrateRequest, history: &[Past]) -> Options {
        // What the last one found out about streams need not be found out again.
        let before = history.last().map_or(0, |past| past.streams);
        let usual = || streams().start().max(&before.min(*streams().end())).to_owned()..=*streams().end();
        Options {
            mode: request.mode,
            allow_post_copy: request.allow_post_copy,
            max_downtime: request.max_downtime,
            max_time: request.max_time,
            max_stall: request.max_stall,
            keep: request.keep,
            bandwidth: request.bandwidth,
            streams: request.streams.map_or_else(usual, |n| u32::from(n)..=u32::from(n)),
            verify: request.verify,
            compress: request.compress,
            spool: request.spool.clone(),
            give_up: request.give_up,
        }
    }

    /// What is known of the way to a host, for a VM that is executed like this one.
    fn road(&self, to: &str, accel: Accel) -> Road {
        let known = self.store.road(to);
        let usual = if accel == Accel::Kvm { SWITCHOVER } else { EMULATED_SWITCHOVER };
        // A quick one may have been luck; one that was disturbed must not lengthen those that follow, nor make them impossible.
        let switchover = known.switchover().map_or(usual, |seen| seen.clamp(usual / 2, usual));
        Road { link: known.link(), switchover }
    }

    /// The VM as it is now, and its files, which are shown to the target if it is `for_real`; or why it cannot be moved.
    fn read(&self, request: &MigrateRequest, for_real: bool) -> Result<Read, Vec<String>> {
        let one = |error: &dyn std::fmt::Display| vec![error.to_string()];
        let mut open = open(&request.vm).map_err(|e| one(&e))?;
        if for_real {
            self.buffer(&request.vm, &mut open).map_err(|why| vec![why])?;
        }
        let Begun { reasons, notes, took } = open.begin().map_err(|e| one(&e))?;
        if !reasons.is_empty() {
            return Err(reasons);
        }
        let shown = if for_real {
            Some(open.show_files(self.store.host(), &request.id.to_string())?)
        } else {
            open.check_files()?;
            None
        };
        Ok(Read { open, notes, took, shown })
    }

    /// All that a migration consists of; if it is `for_real`, with its watchdog, and its files shown to the target for as long as
    /// what comes with it lives.
    fn parts(
        &self,
        request: &MigrateRequest,
        for_real: bool,
        pulse: &Pulse,
    ) -> Result<(SourceParts, Option<Shown>), Vec<String>> {
        let one = |error: &dyn std::fmt::Display| vec![error.to_string()];
        let vm = &request.vm;
        // What was read while somebody changed the VM does not fit together.
        let began = Instant::now();
        let Read { mut open, notes, took, shown } = self.read(request, for_real).or_else(|reasons| {
            if began.elapsed() > LONG_READING {
                return Err(reasons);
            }
            tracing::info!(vm = vm.name, ?reasons, "refused; reading it once more");
            self.read(request, for_real)
        })?;
        tracing::debug!(vm = vm.name, ?took, "read again");
        let cores = cores(request.cores, SpareCores::beside(open.process()));
        let road = self.road(&request.to, open.recipe().accel);
        let recipe = shown.as_ref().map_or(open.recipe(), |shown| &shown.recipe);
        let recipe = qemu::Recipe { nets: open.networks()?, ..recipe.clone() };
        let recipe = serde_json::to_vec(&recipe).map_err(|e| one(&e))?;
        let private = open.copy_ahead().map_err(|e| one(&e))?;
        let mut left_behind = notes;
        left_behind.extend(open.warnings().map_err(|e| one(&e))?);
        let reading = Reading { left_behind, took };
        let source = attach::Source::open(open.process().pid(), open.ram_blocks()).map_err(|e| one(&e))?;
        let source = source.with_pulse(pulse.clone());
        let writers = open.recipe().vcpus();
        let how = attach::Tracking {
            writers,
            max_stall: request.max_stall,
            synchronous: self.config.tracker == Kind::Synchronous,
            group: self.config.group.0,
        };
        // First of all: from here on the guest may have to wait for us.
        let watchdog =
            Watchdog::start(vm, pulse).map_err(|e| vec![format!("cannot start a watchdog: {e}")])?;
        let watchdog = Arc::new(watchdog);
        let tracker = source.switching(how).map_err(|e| one(&e))?;
        let tracker: Box<dyn Tracker> = Box::new(WatchedTracker::new(Box::new(tracker), watchdog.clone()));
        let vcpus = open.vcpu_threads().map_err(|e| one(&e))?;
        let stuns = source.stuns(vcpus, request.max_stall).map_err(|e| one(&e))?;
        let address = request.address.to_string();
        let dial = self.dial(&request.to, &address, request.id).map_err(|e| one(&e))?;
        let (epoch, identity) = self.owned(&vm.name).map_err(|e| one(&e))?;
        let record: Arc<dyn Ownership> = match &self.shared {
            Some(shared) => shared.clone(),
            None => Arc::new(RemoteRecord(dial.clone())),
        };
        let journal = self.store.departure(&vm.name, request.id, &request.to, &address).decided_by(&identity);
        let journal = journal.with_memory(serde_json::to_value(open.ram_blocks()).map_err(|e| one(&e))?);
        let journal: Box<dyn SourceJournal> = Box::new(Watched::new(journal, watchdog));
        let parts = SourceParts {
            vm: vm.name.clone(),
            from: self.store.host().to_owned(),
            to: request.to.clone(),
            migration: request.id,
            epoch,
            recipe,
            private,
            reading,
            memory: source.memory(),
            tracker: Some(tracker),
            stuns: Some(Box::new(stuns)),
            machine: Beside::new(Box::new(open)),
            journal,
            cores,
            history: self.store.history(&vm.name),
            road,
            writers,
            record,
            dial,
        };
        Ok((parts, shown))
    }

    /// Has a VM's disks go through the page cache, and notes that down before: whatever ends us, it is set back.
    fn buffer(&self, vm: &VmRecord, open: &mut Vm) -> Result<(), String> {
        let mut buffered = open.reads_directly()?;
        let before = kept(vm)?.buffered;
        buffered.extend(before.into_iter().filter(|node| !buffered.contains(node)).collect::<Vec<_>>());
        if buffered.is_empty() {
            return Ok(());
        }
        let note = |vm: &mut VmRecord| {
            if let Some(kept) = vm.belongings.as_object_mut() {
                kept.insert("buffered".to_owned(), buffered.clone().into());
            }
        };
        self.store.update_vm(&vm.name, note).map_err(|error| error.to_string())?;
        open.buffer(&buffered)
    }

    /// A migration is over. If the VM is still here, it reads its disks as before.
    fn is_over(&self, vm: &str) {
        // One whose end is in doubt is set back when that is known.
        let stays = || -> Result<bool, String> {
            let doubt = self.store.departure_of(vm).map_err(|error| error.to_string())?.is_some();
            let Some(record) = self.store.vm(vm).map_err(|error| error.to_string())?.filter(|_| !doubt)
            else {
                return Ok(false);
            };
            read_directly(&record).map(|()| !kept(&record).is_ok_and(|kept| kept.buffered.is_empty()))
        };
        let forget = |vm: &mut VmRecord| {
            vm.belongings.as_object_mut().map(|kept| kept.remove("buffered"));
        };
        let done = stays().and_then(|was| match was {
            true => self.store.update_vm(vm, forget).map(drop).map_err(|error| error.to_string()),
            false => Ok(()),
        });
        if let Err(why) = done {
            tracing::warn!(vm, why, "its disks still go through the page cache");
        }
    }

    fn move_away(&self, request: &MigrateRequest, events: Events, wishes: &Wishes) -> Report {
        let pulse = Pulse::default();
        // This thread may take its time, but must not be stopped while the guest is.
        let part = pulse.part();
        part.rest();
        let (parts, shown) = match self.parts(request, true, &pulse) {
            Ok(parts) => parts,
            Err(reasons) => {
                let here = self.store.host();
                let mut report = request.blank_report(here, Outcome::Failed);
                report.error = Some(Failure {
                    what: "preflight".to_owned(),
                    place: format!("{here}, in preflight"),
                    why: reasons.join("\n"),
                    vm_runs_on: Some(here.to_owned()),
                });
                return report;
            }
        };
        let options = Self::options(request, &parts.history);
        let _at_work = options.spool.as_ref().map(|spool| self.janitor.at_work(request.id, &spool.directory));
        let (driver, handle) = SourceDriver::new(parts, options, until_asked(shown, events));
        let (canceller, resolver) = (handle.clone(), handle);
        wishes.cancel.then(move || canceller.cancel());
        wishes.resolve_here.then(move || resolver.resolve_here());
        driver.run()
    }

    /// The epoch at which this host owns the VM, and which record says so. A shared one is asked now: if it cannot be, or says
    /// otherwise, nothing is begun.
    fn owned(&self, vm: &str) -> io::Result<(Epoch, String)> {
        let Some(shared) = &self.shared else {
            let owner = self.store.owner(vm)?;
            return Ok((owner.map_or(Epoch(0), |owner| owner.epoch), String::new()));
        };
        let identity = shared.identity()?;
        let found = shared.look(vm)?;
        not_behind(&shared.words(), vm, found.as_ref(), self.store.seen_shared(&identity, vm)?)?;
        match found {
            Some(record) if record.owner == self.store.host() => {
                self.store.note_shared(&identity, vm, &record)?;
                Ok((record.epoch, identity))
            }
            Some(record) => {
                let why = format!(
                    "by {}, it belongs to {:?} at epoch {}",
                    shared.words(),
                    record.owner,
                    record.epoch
                );
                Err(io::Error::other(why))
            }
            None => {
                let why = format!(
                    "{} has never heard of it yet; it is told soon after the agent's start",
                    shared.words()
                );
                Err(io::Error::other(why))
            }
        }
    }

    /// How the host that the user called `to` is reached.
    fn dial(&self, to: &str, address: &str, migration: MigrationId) -> io::Result<Arc<dyn Dial>> {
        let address: Address = address.parse().map_err(io::Error::other)?;
        let look_up = |one: &str| one.to_socket_addrs().map(Iterator::collect);
        Ok(Arc::new(TcpDial::at(places(to, &address, look_up)?, migration, self.security.clone())))
    }
}

/// Where a host is called, and what its certificate must be for there: what the user called it, or, where that was an address, that
/// address.
fn places(
    to: &str,
    address: &Address,
    look_up: impl Fn(&str) -> io::Result<Vec<SocketAddr>>,
) -> io::Result<Vec<(SocketAddr, String)>> {
    let (mut places, mut unknown) = (Vec::new(), None);
    for (one, host) in address.each() {
        let called = if to == address.as_str() { host } else { to };
        match look_up(one) {
            Ok(found) => places.extend(found.into_iter().map(|found| (found, called.to_owned()))),
            Err(e) => unknown = Some(io::Error::new(e.kind(), format!("cannot look up {one}: {e}"))),
        }
    }
    // One of several that is not known for the moment is no reason not to use the others.
    match unknown.filter(|_| places.is_empty()) {
        Some(error) => Err(error),
        None => Ok(places),
    }
}

/// Shows files until the target has looked: it has when the phase begins in which pages are sent. In the end it is over in any case.
fn until_asked(shown: Option<Shown>, events: Events) -> Events {
    let shown = Mutex::new(shown);
    Arc::new(move |event| {
        if matches!(event, Event::Phase { phase, .. } if phase != Phase::Preflight) {
            drop(shown.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
        events(event);
    })
}

/// As many data connections as it pays to use, but no more than there are cores: further ones move more only by what they
/// take from the guest (`./dev bench --only steady`: with four on two cores the pause was 20 ms instead of 13, and all took
/// a quarter longer).
fn streams() -> RangeInclusive<u32> {
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
    STREAMS..=cores.clamp(STREAMS, MOST_STREAMS)
}

/// How many cores may compress: as many as the user said, or those that the guest leaves.
fn cores(wanted: Option<u32>, mut spare: SpareCores) -> Box<dyn FnMut() -> u32 + Send> {
    match wanted {
        Some(cores) => Box::new(move || cores),
        None => Box::new(move || spare.now()),
    }
}

/// Lets the guest of a claimed VM go on as it was on its source, if it did not yet. Later it is its users' to
/// stop and to let run.
fn run(vm: &VmRecord, arrival: &ArrivalRecord) -> Result<(), String> {
    if arrival.went_on {
        return Ok(());
    }
    let mut open = open(vm).map_err(|e| e.to_string())?;
    open.restore(arrival.goes_on).map(drop).map_err(|e| e.to_string())
}

/// Where the memory lies of a VM that has left. Its QEMU is asked only where that was not recorded yet.
fn memory_of(vm: &VmRecord, departure: &DepartureRecord) -> Result<Vec<RamBlock>, String> {
    if !departure.memory.is_null() {
        return serde_json::from_value(departure.memory.clone())
            .map_err(|e| format!("what is recorded of its memory cannot be read: {e}"));
    }
    Ok(open(vm).map_err(|e| e.to_string())?.ram_blocks().to_vec())
}

/// Nothing is owed to this guest: it waits at no hole of its memory any more.
fn end_watch(vm: &VmRecord) -> Result<(), String> {
    let Some(waits) = kept(vm)?.waits else { return Ok(()) };
    let target = attach::Target::reopen(handle_of(vm)?.pid, &waits.blocks).map_err(|e| e.to_string())?;
    target.end_watch(waits.fd).map_err(|e| e.to_string())
}

/// A QEMU that is not asked before it has to be: it may be waiting for a page that we serve.
struct Later {
    vm: VmRecord,
    /// The guest runs elsewhere, and this process is frozen.
    left: bool,
}

impl Later {
    fn open(&self) -> Result<Vm, MachineError> {
        open(&self.vm).map_err(|why| self.error("reach", &why))
    }

    fn error(&self, what: &str, why: &dyn std::fmt::Display) -> MachineError {
        MachineError { what: format!("{what} {}", self.vm.name), why: why.to_string() }
    }
}

impl Machine for Later {
    fn has_ended(&self) -> HasEnded {
        let process = self.vm.process;
        Box::new(move || !process.is_some_and(|process| process.is_alive()))
    }

    fn run_state(&mut self) -> Result<RunState, MachineError> {
        self.open()?.run_state()
    }

    fn stop(&mut self) -> Result<RunState, MachineError> {
        self.open()?.stop()
    }

    fn restore(&mut self, before: RunState) -> Result<Duration, MachineError> {
        self.open()?.restore(before)
    }

    fn freeze(&mut self) -> Result<(), MachineError> {
        self.open()?.freeze()
    }

    fn resume(&mut self) -> Result<Duration, MachineError> {
        self.open()?.resume()
    }

    fn save(&mut self) -> Result<DeviceState, MachineError> {
        self.open()?.save()
    }

    fn load(&mut self, state: &DeviceState) -> Result<(), MachineError> {
        self.open()?.load(state)
    }

    fn announce(&mut self) -> Result<(), MachineError> {
        self.open()?.announce()
    }

    fn destroy(&mut self) -> Result<(), MachineError> {
        if self.left {
            let handle = handle_of(&self.vm).map_err(|why| self.error("end", &why))?;
            return frozen::end(&handle).map_err(|why| self.error("end", &why));
        }
        self.open()?.destroy()
    }
}

impl Migrator for Mover {
    fn migrate(&self, request: &MigrateRequest, events: Events, wishes: &Wishes) -> Report {
        let report = self.move_away(request, events, wishes);
        self.is_over(&request.vm.name);
        report
    }

    fn plan(&self, request: &MigrateRequest) -> Result<Forecast, String> {
        let (parts, _) =
            self.parts(request, false, &Pulse::default()).map_err(|reasons| reasons.join("\n"))?;
        let options = Self::options(request, &parts.history);
        engine::plan(parts, &options)
    }

    fn serve(&self, connection: TcpStream, from: SocketAddr, pass: Pass) {
        if let Err(error) = self.acceptor.serve_greeted(connection, |member| pass.greeted(member)) {
            tracing::warn!(%from, %error, "a connection was turned away");
        }
    }

    fn ask(&self, departure: &DepartureRecord, claim: &Claim) -> io::Result<Claimed> {
        let DepartureRecord { to, address, record, .. } = departure;
        if record.is_empty() {
            return RemoteRecord(self.dial(to, address, claim.migration)?).claim(claim);
        }
        named(self.shared.as_ref(), record)?.claim(claim)
    }

    fn ask_here(&self, claim: &Claim) -> io::Result<Claimed> {
        HostRecord { store: self.store.clone(), shared: self.shared.clone() }.claim(claim)
    }

    fn serve_gone(&self, vm: &VmRecord, departure: &DepartureRecord) {
        let served = (|| -> Result<Report, String> {
            let handle = handle_of(vm)?;
            // Its monitor answers nobody: the agent before us has frozen it, so that nobody has its guest run
            // on here.
            let source =
                attach::Source::open(handle.pid, &memory_of(vm, departure)?).map_err(|e| e.to_string())?;
            source.process().freeze(FREEZE).map_err(|e| format!("its QEMU does not stand still: {e}"))?;
            let cores = cores(None, SpareCores::beside(source.process()));
            let road = self.road(&departure.to, handle.recipe.accel);
            let dial = self
                .dial(&departure.to, &departure.address, departure.migration)
                .map_err(|e| e.to_string())?;
            let parts = SourceParts {
                vm: vm.name.clone(),
                from: self.store.host().to_owned(),
                to: departure.to.clone(),
                migration: departure.migration,
                epoch: Epoch(0),
                recipe: vec![],
                private: vec![],
                reading: Default::default(),
                memory: source.memory(),
                tracker: None,
                stuns: None,
                machine: Beside::new(Box::new(Later { vm: vm.clone(), left: true })),
                journal: {
                    let DepartureRecord { migration, to, address, record, .. } = departure;
                    let journal = self.store.departure(&vm.name, *migration, to, address);
                    Box::new(journal.decided_by(record))
                },
                cores,
                history: vec![],
                road,
                writers: 0,
                record: Arc::new(RemoteRecord(dial.clone())),
                dial,
            };
            let options = Options {
                mode: Mode::PostCopy,
                allow_post_copy: true,
                max_downtime: Duration::ZERO,
                max_time: None,
                max_stall: Duration::ZERO,
                keep: Promise::USUAL,
                bandwidth: None,
                streams: streams(),
                verify: false,
                compress: Compression::Auto,
                spool: None,
                give_up: Duration::ZERO,
            };
            let (driver, _handle) = SourceDriver::new(parts, options, Arc::new(|_| {}));
            Ok(driver.run_after_commit())
        })();
        match served {
            Ok(_) => tracing::info!(
                vm = vm.name,
                to = departure.to,
                "the target has everything; the copy here is gone"
            ),
            Err(why) => tracing::error!(
                vm = vm.name,
                to = departure.to,
                why,
                "cannot serve the memory that is kept here"
            ),
        }
    }

    fn go_on(&self, vm: &VmRecord, arrival: Arrival, record: &ArrivalRecord) {
        let gone_on = if record.owing {
            self.serve_missing(vm, arrival, record)
        } else {
            // It was ready for a post-copy that did not come to it: what was never sent must not be waited for.
            end_watch(vm)
                .and_then(|()| run(vm, record))
                .and_then(|()| { arrival }.settled().map_err(|e| e.to_string()))
        };
        match gone_on {
            Ok(()) => {
                tracing::info!(vm = vm.name, from = record.from, "it belongs here, runs, and has its memory")
            }
            Err(why) => tracing::error!(vm = vm.name, why, "it belongs here and cannot be run"),
        }
    }

    fn shut_down(&self) {
        self.acceptor.give_up(GIVE_UP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_is_asked_for_its_own_certificate() {
        let look_up = |one: &str| match one.rsplit_once(':').unwrap() {
            ("b.example", _) => Ok(vec!["10.0.0.9:1".parse().unwrap(), "[fd00::9]:1".parse().unwrap()]),
            ("unknown", _) => Err(io::Error::other("no such name")),
            _ => Ok(vec![one.parse().unwrap()]),
        };
        let table: &[(&str, &str, &[&str])] = &[
            ("hostb", "10.0.0.2:7471,10.1.0.2:7471", &["10.0.0.2:7471 hostb", "10.1.0.2:7471 hostb"]),
            ("", "10.0.0.2:7471,10.1.0.2:7472", &["10.0.0.2:7471 10.0.0.2", "10.1.0.2:7472 10.1.0.2"]),
            ("", "[fd00::2]:7471,10.1.0.2:7471", &["[fd00::2]:7471 fd00::2", "10.1.0.2:7471 10.1.0.2"]),
            (
                "",
                "b.example:1,10.1.0.2:1",
                &["10.0.0.9:1 b.example", "[fd00::9]:1 b.example", "10.1.0.2:1 10.1.0.2"],
            ),
            ("", "unknown:1,10.1.0.2:1", &["10.1.0.2:1 10.1.0.2"]),
        ];
        for (to, address, wanted) in table {
            let to = if to.is_empty() { address } else { to };
            let found = places(to, &address.parse().unwrap(), look_up).unwrap();
            let found: Vec<_> = found.iter().map(|(at, host)| format!("{at} {host}")).collect();
            assert_eq!(found, *wanted);
        }
        let nowhere = places("unknown:1", &"unknown:1".parse().unwrap(), look_up).unwrap_err();
        assert!(nowhere.to_string().starts_with("cannot look up unknown:1"), "{nowhere}");
    }
}
