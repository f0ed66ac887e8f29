//! What the journals say must still be done: after a restart of the agent, and after a migration that ended
//! before it was settled who owns the VM.

mod second;

use crate::{
    hypervisor::Reasons,
    migrate::{Migrator, Wish},
    refusal::{Refusal, RefusalKind},
    registry::Registry,
    store::{Arrival, ArrivalRecord, DepartureRecord, DepartureState, SELF, Side, StoreError, VmRecord},
};
use api::{Failure, Fate, Mode, Outcome, Report};
use ports::{Claim, Claimed, SourceJournal};
use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};
use tracing::{error, info, warn};
use units::{Epoch, Locked, MigrationId};

/// When to ask again: at first soon, then less and less often. It decides nothing but that (I1).
const ASK_AGAIN: [Duration; 5] = [
    Duration::from_millis(200),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(10),
    Duration::from_secs(30),
];

/// Settles what the journals have open.
pub struct Recovery {
    registry: Arc<Registry>,
    migrator: Arc<dyn Migrator>,
    /// VMs that a thread is busy with.
    busy: Mutex<HashSet<String>>,
    /// Held while a fence is settled: by an answer of the record, or by a person.
    settling: Mutex<()>,
    /// QEMUs that no signal lets go as long as it is in doubt who runs their guests.
    held: Mutex<HashMap<String, Box<dyn Send>>>,
    /// Migrations to another QEMU of this host that an earlier agent had decided for the second.
    decided_before: Mutex<HashSet<MigrationId>>,
    stop: Wish,
}

impl Recovery {
    /// For the registry's VMs.
    pub fn new(registry: Arc<Registry>, migrator: Arc<dyn Migrator>) -> Self {
        let (busy, settling, held) = (Mutex::default(), Mutex::default(), Mutex::default());
        let decided_before = Mutex::default();
        Self { registry, migrator, busy, settling, held, decided_before, stop: Wish::default() }
    }

    /// Once, before the agent answers anybody: settles what can be settled at once, and begins to ask for the
    /// rest.
    pub fn begin(self: &Arc<Self>) -> Result<(), StoreError> {
        let store = self.registry.store();
        for (name, entry) in store.arrivals()? {
            let Some((arrival, _)) = store.arrival(&name)? else { continue };
            match store.vm(&name)? {
                Some(vm) if entry.claimed => self.go_on(vm, arrival, entry),
                Some(vm) if entry.claiming && alive(&vm) => self.ask_here(vm, arrival, entry),
                vm if entry.claiming => {
                    // Whoever the record names, it cannot run here any more. It is not claimed now: the
                    // source may still have it.
                    store.lose_claim(&name, entry.migration)?;
                    self.give_up(vm, &arrival, &entry)?;
                }
                vm => self.give_up(vm, &arrival, &entry)?,
            }
        }
        let seconds = store.seconds()?;
        let decided = seconds.iter().filter(|(_, second)| second.decided == Some(Side::Second));
        self.decided_before.locked().extend(decided.map(|(_, second)| second.migration));
        for (name, _) in store.departures()? {
            self.take_up(&name);
        }
        for (name, second) in seconds {
            self.end_second(&name, second.migration);
        }
        Ok(())
    }

    /// Looks at the source's journal of this VM, and settles what it says on a thread of its own. A pause of
    /// ours is ended before this returns.
    pub fn take_up(self: &Arc<Self>, name: &str) {
        let store = self.registry.store();
        let found = store.departure_of(name).and_then(|entry| Ok(entry.zip(store.vm(name)?)));
        let (entry, vm) = match found {
            Ok(Some(found)) => found,
            Ok(None) => return,
            Err(error) => return error!(vm = name, %error, "its journal cannot be read"),
        };
        if entry.state == DepartureState::Pausing && self.unpause(&vm, &entry) {
            return self.end_second(name, entry.migration);
        }
        if !self.busy.locked().insert(name.to_owned()) {
            return;
        }
        let this = self.clone();
        let work = move || {
            let migration = entry.migration;
            this.settle(&vm, entry);
            this.let_go(&vm.name);
            this.end_second(&vm.name, migration);
            this.busy.locked().remove(&vm.name);
        };
        if let Err(error) = thread::Builder::new().name(format!("recover {name}")).spawn(work) {
            error!(vm = name, %error, "no thread to settle its journal");
        }
    }

    /// Ends the asking; journals stay as they are.
    pub fn stop(&self) {
        self.stop.express();
    }

    /// A person says that the target of the open migration is fenced: it can never run the VM. The guest is
    /// resumed.
    pub fn resolve_here(&self, name: &str, fenced: &str) -> Result<(), Refusal> {
        let vm = self.registry.find(name)?;
        let host = self.registry.host();
        let refuse = |kind, why: String| Refusal::new(kind, format!("cannot resolve {name}"), host, why);
        let _settling = self.settling.locked();
        let entry = self.registry.store().departure_of(name).map_err(|e| Refusal::store(e, host))?;
        match entry {
            Some(entry) if entry.to == SELF => Err(refuse(
                RefusalKind::Conflict,
                "between two QEMUs of its own this host decides by itself".to_owned(),
            )
            .vm_runs_on(host)),
            Some(entry) if matches!(entry.state, DepartureState::Fenced { .. }) => {
                if entry.to != fenced {
                    let why = format!("the host in question is {}, not {fenced}", entry.to);
                    return Err(refuse(RefusalKind::Bad, why));
                }
                warn!(vm = name, fenced, "resolved by a person: the VM runs here");
                self.come_back(&vm, &entry, &format!("it was resolved by hand: {fenced} is fenced"))
                    .map_err(|why| refuse(RefusalKind::Failed, why.0.join("\n")))
            }
            Some(entry) if matches!(entry.state, DepartureState::Gone { .. }) => {
                let why = format!("{} is known to own it", entry.to);
                Err(refuse(RefusalKind::Conflict, why).vm_runs_on(entry.to))
            }
            _ => Err(refuse(RefusalKind::Conflict, "nobody doubts that it belongs here".to_owned())
                .vm_runs_on(host)),
        }
    }

    /// A shared record that could not be asked is told, when it can be, what a person has decided meanwhile.
    pub fn tell_of_fencing(self: &Arc<Self>, name: &str, fenced: &str) {
        if self.registry.record().is_none() {
            return;
        }
        let (this, vm, fenced) = (self.clone(), name.to_owned(), fenced.to_owned());
        let work = move || {
            let mut tries = 0;
            while let Err(why) = this.registry.retake(&vm, &fenced) {
                if tries == 0 {
                    warn!(vm, why, "the shared record does not know yet that it is here");
                }
                if this.stop.wait(ASK_AGAIN[tries.min(ASK_AGAIN.len() - 1)]) {
                    return;
                }
                tries += 1;
            }
        };
        if let Err(error) = thread::Builder::new().name("tell the record".into()).spawn(work) {
            error!(vm = name, %error, "no thread to tell the shared record that it is here");
        }
    }

    fn settle(&self, vm: &VmRecord, mut entry: DepartureRecord) {
        let mut tries = 0;
        self.keep_unsettled(vm, &entry);
        loop {
            match entry.state {
                DepartureState::Pausing => {
                    if self.unpause(vm, &entry) {
                        return;
                    }
                }
                DepartureState::Fenced { expected } => {
                    self.hold(vm, &entry);
                    match self.ask(vm, &entry, expected) {
                        Ok(true) => return,
                        Ok(false) => {}
                        Err(error) if tries == 0 => {
                            warn!(vm = vm.name, to = entry.to, %error, "in doubt: asking until there is an \
                                                                        answer");
                        }
                        Err(_) => {}
                    }
                }
                DepartureState::Gone { .. } => {
                    // It holds it itself.
                    self.let_go(&vm.name);
                    if entry.to == SELF {
                        return self.go_on_in_second(&vm.name, &entry);
                    }
                    return self.migrator.serve_gone(vm, &entry);
                }
            }
            match self.registry.store().departure_of(&vm.name) {
                Ok(Some(now)) if now.migration == entry.migration => {
                    if now.state != entry.state {
                        entry = now;
                        continue;
                    }
                }
                Ok(_) => return,
                Err(error) => error!(vm = vm.name, %error, "its journal cannot be read"),
            }
            if self.stop.wait(ASK_AGAIN[tries.min(ASK_AGAIN.len() - 1)]) {
                return;
            }
            tries += 1;
        }
    }

    /// As long as it is in doubt who runs its guest, its QEMU stands still whatever signals come.
    fn hold(&self, vm: &VmRecord, entry: &DepartureRecord) {
        let _settling = self.settling.locked();
        let mut held = self.held.locked();
        let in_doubt =
            self.registry.store().departure_of(&vm.name).is_ok_and(|now| now.as_ref() == Some(entry));
        if in_doubt && !held.contains_key(&vm.name) {
            held.extend(self.migrator.hold(vm).map(|hold| (vm.name.clone(), hold)));
        }
    }

    fn let_go(&self, name: &str) {
        drop(self.held.locked().remove(name));
    }

    /// Before the fence: the guest goes on here, whatever else happened (I3). Says whether that is settled.
    fn unpause(&self, vm: &VmRecord, entry: &DepartureRecord) -> bool {
        match self.come_back(vm, entry, "the agent of the source ended in the middle of it") {
            Ok(()) => true,
            Err(why) => {
                error!(vm = vm.name, why = why.0.join("; "), "cannot let it run again yet");
                false
            }
        }
    }

    /// After the fence: only the record says who runs it. `Ok(true)` when all is settled.
    fn ask(&self, vm: &VmRecord, entry: &DepartureRecord, expected: Epoch) -> io::Result<bool> {
        let claim = Claim {
            vm: vm.name.clone(),
            migration: entry.migration,
            expected,
            claimer: self.registry.host().to_owned(),
        };
        let claimed = match entry.to == SELF {
            true => self.claim_for_first(&claim)?,
            false => self.migrator.ask(entry, &claim)?,
        };
        let _settling = self.settling.locked();
        let now = self.registry.store().departure_of(&vm.name)?;
        if now.as_ref() != Some(entry) {
            // A person was faster.
            return Ok(now.is_none());
        }
        match claimed {
            Claimed::Yours(_) => {
                // Between two QEMUs of this host its record may have named the other one until now.
                let vm = self.registry.store().vm(&vm.name)?.unwrap_or_else(|| vm.clone());
                self.come_back(&vm, entry, "the source lost the target before the switchover")
                    .map_err(|why| io::Error::other(why.0.join("; ")))?;
                Ok(true)
            }
            Claimed::Lost(record) => {
                info!(vm = vm.name, owner = record.owner, epoch = %record.epoch, "the target owns it");
                self.journal(vm, entry).gone(record.epoch)?;
                self.keep(&blank(vm, self.registry.host(), entry, Outcome::Completed));
                Ok(false)
            }
        }
    }

    /// What is to be said of a migration until it is settled, unless its own report says so already.
    fn keep_unsettled(&self, vm: &VmRecord, entry: &DepartureRecord) {
        let host = self.registry.host();
        let outcome = match entry.state {
            DepartureState::Pausing => return,
            DepartureState::Fenced { .. } => Outcome::InDoubt,
            DepartureState::Gone { .. } => Outcome::Completed,
        };
        if self
            .registry
            .store()
            .last_report(&vm.name)
            .ok()
            .flatten()
            .is_some_and(|known| known.outcome == outcome)
        {
            return;
        }
        let mut report = blank(vm, host, entry, outcome);
        report.error = (outcome == Outcome::InDoubt).then(|| Failure {
            what: format!("the migration of {} to {} is not settled", vm.name, entry.to),
            place: format!("agent of {host}"),
            why: match entry.record.as_str() {
                "" => format!("{} has not said yet whether it owns the VM", entry.to),
                shared => format!("the ownership record ({shared}) has not said yet who owns the VM"),
            },
            vm_runs_on: None,
        });
        self.keep(&report);
    }

    /// The guest runs here again, and its migration has failed.
    fn come_back(&self, vm: &VmRecord, entry: &DepartureRecord, why: &str) -> Result<(), Reasons> {
        let host = self.registry.host();
        let alive = alive(vm);
        self.let_go(&vm.name);
        if alive {
            self.registry.hypervisor().restore(vm, entry.before)?;
        }
        self.journal(vm, entry).back().map_err(|e| e.to_string())?;
        info!(vm = vm.name, to = entry.to, alive, "a migration failed; the VM is here");
        let mut report = blank(vm, host, entry, Outcome::Failed);
        report.error = Some(Failure {
            what: format!("the migration of {} to {} failed", vm.name, entry.to),
            place: format!("agent of {host}"),
            why: if alive { why.to_owned() } else { format!("{why}, and its QEMU has ended") },
            vm_runs_on: alive.then(|| host.to_owned()),
        });
        let host = host.to_owned();
        report.fate = Some(match alive {
            true => Fate::On { host, state: entry.before },
            false => Fate::Ended { host },
        });
        self.keep(&report);
        Ok(())
    }

    fn go_on(&self, vm: VmRecord, arrival: Arrival, entry: ArrivalRecord) {
        let migrator = self.migrator.clone();
        let name = vm.name.clone();
        let work = move || migrator.go_on(&vm, arrival, &entry);
        if let Err(error) = thread::Builder::new().name(format!("arrive {name}")).spawn(work) {
            error!(vm = name, %error, "no thread to go on with its arrival");
        }
    }

    /// An arrival that was authorized: a shared record knows whether it was claimed, and is asked until it
    /// says so. The guest does not run meanwhile.
    fn ask_here(self: &Arc<Self>, vm: VmRecord, arrival: Arrival, entry: ArrivalRecord) {
        let (this, name) = (self.clone(), vm.name.clone());
        let work = move || {
            let mut tries = 0;
            loop {
                match this.try_here(&vm, &entry) {
                    Ok(Claimed::Yours(epoch)) => {
                        info!(vm = vm.name, %epoch, "it belongs here");
                        return this.go_on(
                            vm,
                            arrival,
                            ArrivalRecord { claimed: true, claiming: false, ..entry },
                        );
                    }
                    Ok(Claimed::Lost(record)) => {
                        info!(vm = vm.name, owner = record.owner, epoch = %record.epoch, "it does not belong \
                                                                                          here");
                        let store = this.registry.store();
                        let given_up = store
                            .lose_claim(&name, entry.migration)
                            .and_then(|()| this.give_up(Some(vm), &arrival, &entry));
                        if let Err(error) = given_up {
                            error!(vm = name, %error, "its arrival cannot be given up");
                        }
                        return;
                    }
                    Err(error) if tries == 0 => {
                        warn!(vm = vm.name, from = entry.from, %error, "in doubt: asking until there is an \
                                                                        answer");
                    }
                    Err(_) => {}
                }
                if this.stop.wait(ASK_AGAIN[tries.min(ASK_AGAIN.len() - 1)]) {
                    return;
                }
                tries += 1;
            }
        };
        if let Err(error) = thread::Builder::new().name("ask for arrival".into()).spawn(work) {
            error!(%error, "no thread to ask who owns an arrival");
        }
    }

    fn try_here(&self, vm: &VmRecord, entry: &ArrivalRecord) -> io::Result<Claimed> {
        let claim = self.registry.store().own_claim(entry.migration)?;
        let claim = claim
            .ok_or_else(|| io::Error::other(format!("nothing is recorded of the offer of {}", vm.name)))?;
        self.migrator.ask_here(&claim)
    }

    /// An arrival that was not claimed leaves no trace. First nobody can claim it, then its QEMU ends.
    fn give_up(
        &self,
        vm: Option<VmRecord>,
        arrival: &Arrival,
        entry: &ArrivalRecord,
    ) -> Result<(), StoreError> {
        if !arrival.abandon()? {
            return Ok(());
        }
        let Some(vm) = vm else { return Ok(()) };
        info!(vm = vm.name, from = entry.from, "its arrival was interrupted; it stays where it was");
        if vm.process.is_none() {
            self.registry.hypervisor().sweep(&vm.name);
        } else if let Err(why) = self.registry.hypervisor().discard(&vm) {
            warn!(vm = vm.name, why = why.0.join("; "), "the QEMU that waited for it cannot be ended");
        }
        Ok(())
    }

    fn journal(&self, vm: &VmRecord, entry: &DepartureRecord) -> crate::store::Departure {
        let journal = self.registry.store().departure(&vm.name, entry.migration, &entry.to, &entry.address);
        journal.decided_by(&entry.record)
    }

    fn keep(&self, report: &Report) {
        if let Err(error) = self.registry.store().keep_report(report) {
            error!(vm = report.vm, %error, "the report on its migration is lost");
        }
    }
}

fn alive(vm: &VmRecord) -> bool {
    vm.process.is_some_and(|process| process.is_alive())
}

/// What can be said of a migration whose figures were lost.
fn blank(vm: &VmRecord, host: &str, entry: &DepartureRecord, outcome: Outcome) -> Report {
    Report::blank(&vm.name, host, &entry.to, Mode::Auto, outcome)
}
