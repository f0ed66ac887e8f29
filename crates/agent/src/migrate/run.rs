//! Starting migrations, each on a thread of its own.

use super::{Events, MigrateRequest, MigrationHandle, Migrator};
use crate::{
    api::MigrationBrief,
    config::{Address, Config},
    name,
    recovery::Recovery,
    refusal::{Refusal, RefusalKind},
    registry::{Lease, Registry},
    store::{SELF, Standing, VmRecord},
};
use api::{Event, Failure, Forecast, LONGEST_STALL, MigrateOptions, Mode, Outcome, Phase, Report};
use std::{
    collections::HashMap,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};
use tracing::{error, info};
use units::{Locked, MigrationId, Rate};

/// Longer and nobody remembers.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 3600);

/// Stands for the address of this host itself, which nobody calls by it.
const HERE: &str = "127.0.0.1:1";

/// The migrations from this host: those that run, and each VM's last one.
pub struct Migrations {
    config: Arc<Config>,
    registry: Arc<Registry>,
    migrator: Arc<dyn Migrator>,
    recovery: Arc<Recovery>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    by_vm: HashMap<String, Arc<MigrationHandle>>,
    /// Set when the agent is about to end.
    closed: bool,
}

impl Migrations {
    /// Migrations of the registry's VMs, carried out by `migrator`.
    pub fn new(
        config: Arc<Config>,
        registry: Arc<Registry>,
        migrator: Arc<dyn Migrator>,
        recovery: Arc<Recovery>,
    ) -> Self {
        Self { config, registry, migrator, recovery, known: Mutex::default() }
    }

    /// Starts a migration.
    pub fn start(&self, vm: &str, options: &MigrateOptions) -> Result<Arc<MigrationHandle>, Refusal> {
        let record = self.registry.find(vm)?;
        let (lease, request) = self.prepare(record, options)?;
        let handle = MigrationHandle::new(request);
        {
            let mut known = self.known.locked();
            if known.closed {
                return Err(self.refuse(RefusalKind::Conflict, vm, "this agent is about to end"));
            }
            known.by_vm.insert(vm.to_owned(), handle.clone());
        }
        let job = Job {
            handle: handle.clone(),
            lease,
            migrator: self.migrator.clone(),
            registry: self.registry.clone(),
            recovery: self.recovery.clone(),
        };
        let started = thread::Builder::new().name(format!("migrate {vm}")).spawn(move || job.run());
        if let Err(error) = started {
            self.known.locked().by_vm.remove(vm);
            return Err(self.refuse(RefusalKind::Failed, vm, &format!("no thread for it: {error}")));
        }
        Ok(handle)
    }

    /// What a migration would take.
    pub fn plan(&self, vm: &str, options: &MigrateOptions) -> Result<Forecast, Refusal> {
        let record = self.registry.find(vm)?;
        // Nobody else may track its writes meanwhile.
        let (_lease, request) = self.prepare(record, options)?;
        let refused = |why: &str| {
            Refusal::new(
                RefusalKind::Failed,
                format!("cannot plan a migration of {vm}"),
                self.registry.host(),
                why,
            )
            .vm_runs_on(self.registry.host())
        };
        let planned = catch_unwind(AssertUnwindSafe(|| self.migrator.plan(&request)));
        let forecast = planned
            .unwrap_or_else(|_| Err("an error of Whimbrel itself; the agent's log has the details".into()));
        let forecast = forecast.map_err(|why| refused(&why))?;
        if options.bandwidth.is_none() && options.to != SELF {
            let kept = self.registry.store().keep_link(&request.options.to, Rate(forecast.link));
            kept.map_err(|error| Refusal::store(error, self.registry.host()))?;
        }
        Ok(forecast)
    }

    /// The VM's running migration, or its last one since the agent was started.
    pub fn of(&self, vm: &str) -> Option<Arc<MigrationHandle>> {
        self.known.locked().by_vm.get(vm).cloned()
    }

    /// A person has fenced the target of a migration that is in doubt. Says whether one runs that can be
    /// told.
    pub fn resolve_here(&self, vm: &str, fenced: &str) -> bool {
        // Between two QEMUs of its own a host decides by itself.
        let running = self.of(vm).filter(|_| fenced != SELF);
        let running = running.filter(|m| m.report().is_none() && m.request.options.to == fenced);
        let doubtful = running.filter(|m| m.phase() == Some(Phase::Switchover));
        doubtful.inspect(|migration| migration.wishes.resolve_here.express()).is_some()
    }

    /// The VM's running migration in short.
    pub fn brief(&self, vm: &str) -> Option<MigrationBrief> {
        let handle = self.of(vm).filter(|handle| handle.report().is_none())?;
        Some(MigrationBrief {
            id: handle.request.id.to_string(),
            to: handle.request.options.to.clone(),
            phase: handle.phase(),
        })
    }

    /// No migration is started any more. Those that can be cancelled are; returns all that ran.
    pub fn close(&self) -> Vec<Arc<MigrationHandle>> {
        let mut known = self.known.locked();
        known.closed = true;
        let running: Vec<_> = known.by_vm.values().filter(|m| m.report().is_none()).cloned().collect();
        for migration in running.iter().filter(|migration| migration.can_be_cancelled()) {
            info!(vm = migration.request.vm.name, "cancelling its migration: the agent ends");
            migration.wishes.cancel.express();
        }
        running
    }

    fn prepare(&self, vm: VmRecord, options: &MigrateOptions) -> Result<(Lease, MigrateRequest), Refusal> {
        let here = self.registry.host();
        let conflict = |why: &str| self.refuse(RefusalKind::Conflict, &vm.name, why).vm_runs_on(here);
        let bad = |why: &str| self.refuse(RefusalKind::Bad, &vm.name, why).vm_runs_on(here);
        let within = options.to == SELF;
        let address = if within { HERE.parse() } else { self.address(&options.to) };
        let address = address.map_err(|why| bad(&why))?;
        if options.to == here {
            return Err(bad(
                "it runs on that host already; --to self lets another QEMU of it take the VM over",
            ));
        }
        if let Some(why) = hindrance_within(options, within) {
            return Err(bad(why));
        }
        if options.streams.is_some_and(|n| n == 0 || n > MigrateOptions::MOST_STREAMS) {
            return Err(bad(&format!("a migration has 1 to {} streams", MigrateOptions::MOST_STREAMS)));
        }
        if options.cpu == Some(0) {
            return Err(bad("compression takes at least 1 core; to do without it, compress with none"));
        }
        if options.bandwidth == Some(Rate(0)) {
            return Err(bad("nothing moves with a bandwidth of 0"));
        }
        if options.max_downtime.is_zero() {
            return Err(bad("the acceptable downtime must be more than nothing"));
        }
        if options.max_time.is_some_and(|time| time.is_zero()) {
            return Err(bad("a migration takes more than no time"));
        }
        if options.max_stall.is_zero() || options.max_stall > LONGEST_STALL {
            return Err(bad("writers may be made to wait for more than nothing and at most 1 s at a time"));
        }
        if options.give_up > LONGEST_WAIT {
            return Err(bad("a lost link is waited for at most a day"));
        }
        let spool = options.spool.as_ref().or(self.config.spool.as_ref()).filter(|_| !within);
        if spool.is_some_and(|directory| !directory.is_absolute()) {
            return Err(bad("a spool's directory is an absolute path: both hosts must mean the same one"));
        }
        if options.robust.is_some() && spool.is_none() {
            return Err(bad("how robust it is to be is a matter of its spool; name one with --spool"));
        }
        let robust = options.robust.or(Some(self.config.robust));
        let mode = if within { Mode::PreCopy } else { options.mode };
        let options = MigrateOptions { mode, spool: spool.cloned(), robust, ..options.clone() };
        let Some(lease) = self.registry.lease(&vm.name) else {
            return Err(conflict("it is being migrated, started or stopped already"));
        };
        // Read again now that nobody else can change it.
        let vm = self.registry.find(&vm.name)?;
        if let Standing::Arriving { from, .. } = &vm.standing {
            return Err(self
                .refuse(RefusalKind::Conflict, &vm.name, "it is still on its way here")
                .vm_runs_on(from));
        }
        let store = self.registry.store();
        let failed = |e| Refusal::store(e, self.registry.host());
        if let Some(entry) = store.departure_of(&vm.name).map_err(failed)? {
            let why = format!("its migration to {} is not over; see `whimbrel show {}`", entry.to, vm.name);
            return Err(self.refuse(RefusalKind::Conflict, &vm.name, &why));
        }
        if store.arrival(&vm.name).map_err(failed)?.is_some_and(|(_, entry)| entry.incomplete) {
            return Err(self
                .refuse(RefusalKind::Conflict, &vm.name, "not all its memory has arrived here yet")
                .vm_runs_on(here));
        }
        if !vm.process.is_some_and(|process| process.is_alive()) {
            return Err(self.refuse(RefusalKind::Conflict, &vm.name, "its QEMU is gone"));
        }
        if let Some(Err(why)) = vm.process.map(|process| self.registry.charge(process)) {
            return Err(self.refuse(RefusalKind::Conflict, &vm.name, &why));
        }
        let id = random_id().map_err(|e| {
            self.refuse(RefusalKind::Failed, &vm.name, &format!("no random numbers: {e}")).vm_runs_on(here)
        })?;
        let request = MigrateRequest { id, vm, address, options };
        Ok((lease, request))
    }

    /// A peer's name, or an address as it is.
    fn address(&self, to: &str) -> Result<Address, String> {
        if let Some(address) = self.config.peers.get(to) {
            return Ok(address.clone());
        }
        if to.contains(':') {
            return to.parse();
        }
        let known: Vec<&str> = self.config.peers.keys().map(String::as_str).collect();
        let hint = match (name::similar(to, known.iter().copied()).as_slice(), known.as_slice()) {
            (_, []) => "this agent knows no hosts: name them under [peers] in its configuration".to_owned(),
            ([], known) => format!("this agent knows {}", known.join(", ")),
            (near, _) => format!("did you mean {}?", near.join(" or ")),
        };
        Err(format!("host {to} is not known, and is no address like 10.0.0.2:7471; {hint}"))
    }

    fn refuse(&self, kind: RefusalKind, vm: &str, why: &str) -> Refusal {
        Refusal::new(kind, format!("cannot migrate {vm}"), self.registry.host(), why)
    }
}

/// Why a migration cannot be as it is asked for, because it stays on this host, or because it does not.
fn hindrance_within(options: &MigrateOptions, within: bool) -> Option<&'static str> {
    let MigrateOptions { qemu, mode, allow_post_copy, spool, .. } = options;
    match within {
        false => qemu.is_some().then_some("--qemu goes with --to self: another host has a QEMU of its own"),
        true if qemu.as_ref().is_some_and(|qemu| !qemu.is_absolute()) => Some("--qemu is an absolute path"),
        true if spool.is_some() => Some("nothing of it needs a datastore: it stays on this host"),
        true if *allow_post_copy || !matches!(mode, Mode::Auto | Mode::PreCopy) => {
            Some("another QEMU of this host takes it over with all its memory: leave the mode out")
        }
        true => None,
    }
}

/// One migration on its thread.
struct Job {
    handle: Arc<MigrationHandle>,
    lease: Lease,
    migrator: Arc<dyn Migrator>,
    registry: Arc<Registry>,
    recovery: Arc<Recovery>,
}

impl Job {
    fn run(self) {
        let request = &self.handle.request;
        let (vm, to) = (&request.vm.name, &request.options.to);
        info!(vm, to, migration = %request.id, "migration begins");
        let began = Instant::now();
        // What is to be said if this agent dies before the switchover; replaced by whatever happens.
        self.keep(&self.lost(Duration::ZERO, "the agent of the source ended in the middle of it"));
        let told = self.handle.clone();
        let events: Events = Arc::new(move |event| match event {
            // The report comes once, from here.
            Event::Done(_) => {}
            event => told.tell(event),
        });
        let work = AssertUnwindSafe(|| self.migrator.migrate(request, events, &self.handle.wishes));
        let report = catch_unwind(work).unwrap_or_else(|_| {
            error!(vm, "the migration ended in a panic");
            self.lost(began.elapsed(), "an error of Whimbrel itself; the agent's log has the details")
        });
        self.keep(&report);
        if let Err(error) = self.registry.store().learn(&report, request.options.bandwidth.is_some()) {
            error!(vm, %error, "the next migration will not know how this one went");
        }
        let why = report.error.as_ref().map(|failure| failure.why.as_str());
        info!(vm, to, outcome = ?report.outcome, downtime_ms = report.downtime_ms, why, "migration over");
        // Nobody begins another with it meanwhile.
        self.recovery.end_second(vm, request.id);
        drop(self.lease);
        // Whatever the journal still says is settled as after a restart.
        self.recovery.take_up(vm);
        self.handle.tell(Event::Done(Box::new(report)));
        sys::heap::give_back();
    }

    fn keep(&self, report: &Report) {
        if let Err(error) = self.registry.store().keep_report(report) {
            error!(vm = report.vm, %error, "its report is lost at the next start of the agent");
        }
    }

    /// A migration of which nobody can tell more than what the journal says.
    fn lost(&self, after: Duration, why: &str) -> Report {
        let here = self.registry.host();
        let mut report = self.handle.request.blank_report(here, Outcome::Failed);
        report.total_ms = after.as_secs_f64() * 1e3;
        let entry = self.registry.store().departure_of(&report.vm).ok().flatten();
        let doubt = entry.is_some_and(|entry| entry.state != crate::store::DepartureState::Pausing);
        if doubt {
            report.outcome = Outcome::InDoubt;
        }
        report.error = Some(Failure {
            what: format!("the migration of {} to {} failed", report.vm, report.to),
            place: format!("agent of {here}"),
            why: why.to_owned(),
            vm_runs_on: (!doubt).then(|| here.to_owned()),
        });
        report
    }
}

/// Not to be guessed: whoever knows the id may join the migration's connections.
fn random_id() -> io::Result<MigrationId> {
    let mut bytes = [0; 16];
    getrandom::getrandom(&mut bytes)?;
    Ok(MigrationId(u128::from_ne_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_with_another_qemu_of_this_host_is_told() {
        let to = MigrateOptions::to;
        let qemu = |path: &str| Some(path.into());
        let table: Vec<(MigrateOptions, Option<&str>)> = vec![
            (to(SELF), None),
            (MigrateOptions { qemu: qemu("/opt/qemu"), ..to(SELF) }, None),
            (MigrateOptions { mode: Mode::PreCopy, ..to(SELF) }, None),
            (MigrateOptions { qemu: qemu("qemu"), ..to(SELF) }, Some("absolute")),
            (MigrateOptions { mode: Mode::PostCopy, ..to(SELF) }, Some("leave the mode out")),
            (MigrateOptions { mode: Mode::Hybrid, ..to(SELF) }, Some("leave the mode out")),
            (MigrateOptions { allow_post_copy: true, ..to(SELF) }, Some("leave the mode out")),
            (MigrateOptions { spool: Some("/s".into()), ..to(SELF) }, Some("datastore")),
            (to("b"), None),
            (MigrateOptions { mode: Mode::PostCopy, spool: Some("/s".into()), ..to("b") }, None),
            (MigrateOptions { qemu: qemu("/opt/qemu"), ..to("b") }, Some("--to self")),
        ];
        for (options, wanted) in table {
            match (hindrance_within(&options, options.to == SELF), wanted) {
                (None, None) => {}
                (Some(why), Some(wanted)) => assert!(why.contains(wanted), "{why}"),
                (found, wanted) => panic!("{options:?}: {found:?} instead of {wanted:?}"),
            }
        }
    }
}
