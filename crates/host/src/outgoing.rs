//! Moves VMs away: the agent's `Migrator` with the engine.

use crate::{
    arrivals::Arrivals,
    hypervisor::{QemuHost, handle_of, kept, open, read_directly},
    incoming::Incoming,
    janitor::Janitor,
    record::{HostRecord, named},
    second::{Door, Second},
    unasked::{Later, Left},
};
use agent::{
    Context,
    config::Config,
    migrate::{Events, MigrateRequest, Migrator, Wishes},
    peers::Pass,
    store::{Arrival, ArrivalRecord, DepartureRecord, SELF, Store, VmRecord},
};
use api::{Failure, Fate, Forecast, MigrateOptions, Mode, Outcome, Report};
use attach::RamBlock;
use engine::{Acceptor, Offered, RemoteRecord, SharedPort, SourceDriver, SourceParts};
use pki::Security;
use ports::shared::SharedRecord;
use ports::{Claim, Claimed, GuestMemory, Machine, Ownership, Request, TargetJournal, Waiting};
use qemu::{SpareCores, Vm, frozen};
use std::{
    io,
    net::{SocketAddr, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};
use sys::pulse::Pulse;
use units::Epoch;

mod parts; // what a migration consists of
use parts::{cores, streams, until_asked};

/// How long incoming migrations have to end when the agent does.
const GIVE_UP: Duration = Duration::from_secs(3);

/// How long to wait before a QEMU is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// Moves this host's VMs, and takes others' in.
pub struct Mover {
    qemu: QemuHost,
    config: Arc<Config>,
    store: Store,
    shared: Option<Arc<dyn SharedRecord>>,
    acceptor: Acceptor,
    arrivals: Arrivals,
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
        let incoming = Incoming {
            qemu: qemu.clone(),
            store: store.clone(),
            config,
            shared: shared.clone(),
            arrivals: arrivals.clone(),
        };
        let acceptor = Acceptor::new(Arc::new(incoming), security.clone());
        let janitor = Janitor::start(&context.config, &store);
        let config = context.config.clone();
        Self { qemu, config, store, shared, acceptor, arrivals, security, janitor }
    }

    /// Takes the watch for missing pages up again, where an agent before us had to leave it.
    fn serve_missing(&self, vm: &VmRecord, arrival: Arrival, record: &ArrivalRecord) -> Result<(), String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let handle = handle_of(vm)?;
        let waits = kept(vm)?.waits.ok_or("it lacks memory, but nothing is recorded of how to serve it")?;
        let missing_pages = self.store.missing(&vm.name).map_err(|e| text(&e))?;
        let missing_pages = missing_pages.ok_or("it lacks memory, but not which is recorded")?;
        let spool = self.store.spool(&vm.name).map_err(|e| text(&e))?;
        let target = waits.reopen(handle.pid)?;
        if !target.is_watched(waits.fd).map_err(|e| text(&e))? {
            // The agent before us had ended the watch, which is done once everything is there, and not lived
            // to record that.
            run(vm, record)?;
            return { arrival }.settled().map_err(|e| text(&e));
        }
        let missing = target.retake(waits.fd).map_err(|e| text(&e))?;
        let blocks = target.memory().blocks().to_vec();
        let waiting = Waiting {
            memory: target.memory(),
            reached: vec![],
            kept: None,
            missing: Some(Arc::new(missing)),
            machine: Box::new(Later(vm.clone())),
            journal: Box::new(arrival),
        };
        let request = Request {
            migration: record.migration,
            vm: vm.name.clone(),
            from: record.from.clone(),
            epoch: Epoch(0),
            recipe: vec![],
            handovers: vec![],
            private: vec![],
            came_by: None,
            blocks,
            post_copy: true,
            record: String::new(),
            history: vec![],
        };
        thread::scope(|scope| {
            // Killed between the claim and `cont`, it does not run yet. Asked beside the faults, which it may
            // be waiting for.
            scope.spawn(|| {
                while let Err(why) = run(vm, record) {
                    tracing::warn!(vm = vm.name, why, "it belongs here and does not run yet");
                    if !vm.process.is_some_and(|process| process.is_alive()) {
                        return;
                    }
                    thread::sleep(AGAIN);
                }
            });
            self.acceptor.go_on(request, waiting, missing_pages, spool).map_err(|e| text(&e))
        })
    }

    /// Has a VM's disks go through the page cache, and notes that down before: whatever ends us, it is set
    /// back.
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
            read_directly(&record)
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
        let within = self.within(request);
        let parts = within
            .as_ref()
            .map_err(|why| vec![why.clone()])
            .and_then(|within| self.parts(request, true, &pulse, within.as_ref()));
        let (parts, shown, leaves) = match parts {
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
        let options = request.options.clone();
        let _at_work = options.spool.as_ref().map(|spool| self.janitor.at_work(request.id, spool));
        let (driver, handle) = SourceDriver::new(parts, options, until_asked(shown, events));
        let (canceller, resolver) = (handle.clone(), handle);
        wishes.cancel.then(move || canceller.cancel());
        wishes.resolve_here.then(move || resolver.resolve_here());
        let mut report = driver.run();
        if report.outcome == Outcome::Completed && request.options.to != SELF {
            self.qemu.copies.keep(&request.vm.name, &request.options.to, request.id, leaves);
        }
        if let Some(Fate::On { host, .. } | Fate::Stuck { host } | Fate::Ended { host }) = &mut report.fate
            && host.as_str() == SELF
        {
            self.store.host().clone_into(host);
        }
        report
    }

    /// Of a migration that stays on this host: the second QEMU's side, and the way there.
    fn within(&self, request: &MigrateRequest) -> Result<Option<Within>, String> {
        if request.options.to != SELF {
            return Ok(None);
        }
        let mut host = self.qemu.host();
        host.qemu = request.options.qemu.clone().or(host.qemu);
        let of = (request.id, request.vm.name.as_str());
        let second = Second::new(&self.store, &self.arrivals, of, host, request.options.allow_older_qemu);
        let door = Door::open(&second, &self.security);
        let door = door.map_err(|e| format!("this host cannot call itself: {e}"))?;
        Ok(Some(Within { second, door }))
    }
}

/// A migration to another QEMU of this host.
struct Within {
    second: Arc<Second>,
    door: Door,
}

impl Drop for Within {
    fn drop(&mut self) {
        self.second.take_back();
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

/// This guest misses nothing: it waits at no hole of its memory any more.
fn end_watch(vm: &VmRecord) -> Result<(), String> {
    let Some(waits) = kept(vm)?.waits else { return Ok(()) };
    let target = waits.reopen(handle_of(vm)?.pid)?;
    target.end_watch(waits.fd).map_err(|e| e.to_string())
}

impl Migrator for Mover {
    fn migrate(&self, request: &MigrateRequest, events: Events, wishes: &Wishes) -> Report {
        let report = self.move_away(request, events, wishes);
        self.is_over(&request.vm.name);
        report
    }

    fn plan(&self, request: &MigrateRequest) -> Result<Forecast, String> {
        let within = self.within(request)?;
        let parts = self.parts(request, false, &Pulse::default(), within.as_ref());
        let (parts, ..) = parts.map_err(|reasons| reasons.join("\n"))?;
        let options = request.options.clone();
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

    fn hold(&self, vm: &VmRecord) -> Option<Box<dyn Send>> {
        let handle = handle_of(vm).ok()?;
        match frozen::hold_if_frozen(&handle) {
            Ok(hold) => hold.map(|hold| Box::new(hold) as Box<dyn Send>),
            Err(error) => {
                tracing::warn!(vm = vm.name, %error, "a signal (SIGCONT) can let its QEMU go on");
                None
            }
        }
    }

    fn serve_gone(&self, vm: &VmRecord, departure: &DepartureRecord) {
        let served = (|| -> Result<Report, String> {
            let handle = handle_of(vm)?;
            // Its monitor answers nobody: the agent before us has frozen it, so that nobody has its guest run
            // on here.
            let source =
                attach::Source::open(handle.pid, &memory_of(vm, departure)?).map_err(|e| e.to_string())?;
            let hold =
                frozen::hold(source.process()).map_err(|e| format!("its QEMU does not stand still: {e}"))?;
            let cores = cores(None, SpareCores::beside(source.process()));
            let link_history = self.link_history(&departure.to, handle.recipe.accel);
            let dial = self
                .dial(&departure.to, &departure.address, departure.migration)
                .map_err(|e| e.to_string())?;
            let parts = SourceParts {
                vm: vm.name.clone(),
                from: self.store.host().to_owned(),
                to: departure.to.clone(),
                migration: departure.migration,
                epoch: Epoch(0),
                came_by: None,
                recipe: vec![],
                private: vec![],
                reading: Default::default(),
                memory: source.memory(),
                offered: Offered::default(),
                tracker: None,
                stuns: None,
                machine: SharedPort::new(Box::new(Left { vm: vm.clone(), hold: Some(hold) })),
                journal: {
                    let DepartureRecord { migration, to, address, record, .. } = departure;
                    let journal = self.store.departure(&vm.name, *migration, to, address);
                    Box::new(journal.decided_by(record))
                },
                cores,
                history: vec![],
                link_history,
                streams: streams(),
                writers: 0,
                record: Arc::new(RemoteRecord(dial.clone())),
                dial,
            };
            let options = MigrateOptions {
                mode: Mode::PostCopy,
                allow_post_copy: true,
                give_up: Duration::ZERO,
                ..MigrateOptions::to(&departure.to)
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
        let gone_on = if record.incomplete {
            self.serve_missing(vm, arrival, record)
        } else {
            // It was ready for a post-copy that did not come to it: what was never sent must not be waited
            // for.
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
