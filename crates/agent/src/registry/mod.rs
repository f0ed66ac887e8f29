//! The VMs of this host.

mod charge;
mod lease;
mod shared;
mod view;

pub use lease::Lease;

use crate::{
    api::VmInfo,
    hypervisor::{Condition, Examined, Hypervisor, Reasons},
    name,
    refusal::{Refusal, RefusalKind},
    store::{DepartureState, Origin, Process, Standing, Store, StoreError, VmRecord},
};
use ports::shared::SharedRecord;
use serde_json::Value;
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};
use tracing::{info, warn};

/// The VMs of this host, and who is busy with which of them.
pub struct Registry {
    store: Store,
    hypervisor: Arc<dyn Hypervisor>,
    leases: Arc<lease::Leases>,
    shared: shared::SharedRecords,
    charges: charge::Charges,
}

impl Registry {
    /// The VMs that `store` knows, and the record that says which of them are this host's, where all hosts
    /// share one.
    pub fn new(store: Store, hypervisor: Arc<dyn Hypervisor>, record: Option<Arc<dyn SharedRecord>>) -> Self {
        let shared = shared::SharedRecords::new(record);
        let registry =
            Self { store, hypervisor, leases: Arc::default(), shared, charges: Default::default() };
        let known = registry.store.vms().unwrap_or_default();
        for (vm, process) in
            known.iter().filter_map(|vm| Some((vm, vm.process?))).filter(|(_, p)| p.is_alive())
        {
            if let Err(why) = registry.charge(process) {
                warn!(vm = vm.name, why, "it will not be moved from here");
            }
        }
        registry
    }

    /// This agent is in charge of the process; or why it cannot be.
    pub(crate) fn charge(&self, process: Process) -> Result<charge::Charge, String> {
        match self.charges.take(process) {
            Ok(charge::Charge::Others) => Err(format!(
                "another agent of this host is in charge of its QEMU (process {}); stop that agent, or use \
                 it",
                process.pid
            )),
            Ok(charge) => Ok(charge),
            Err(error) => Err(format!("cannot take charge of its QEMU (process {}): {error}", process.pid)),
        }
    }

    /// The store behind it.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What runs the VMs.
    pub fn hypervisor(&self) -> &Arc<dyn Hypervisor> {
        &self.hypervisor
    }

    /// This host's name.
    pub fn host(&self) -> &str {
        self.store.host()
    }

    /// Reserves the VM of this name for one task at a time; `None` while another task has it. QEMU talks to
    /// one QMP client at a time, so whoever talks to a VM holds its lease; who only looks at it is waited
    /// for.
    pub fn lease(&self, name: &str) -> Option<Lease> {
        self.leases.take(name)
    }

    /// Starts the VM that the VM file `text`, read from `path`, describes. `fenced`: a host from which it may
    /// be taken, because a person has seen to it that it cannot run it.
    pub fn run(&self, text: &str, path: &Path, fenced: Option<&str>) -> Result<VmInfo, Refusal> {
        let cannot =
            |kind, name: &str, reasons: Reasons| self.refuse(kind, format!("cannot start {name}"), reasons);
        let plan = self.hypervisor.plan(text, path).map_err(|why| cannot(RefusalKind::Bad, "the VM", why))?;
        name::check(&plan.name).map_err(|why| cannot(RefusalKind::Bad, "the VM", why.into()))?;
        let _lease = self.hold(&plan.name, "start")?;
        let record = VmRecord {
            name: plan.name.clone(),
            recipe: plan.recipe.clone(),
            process: None,
            qmp: PathBuf::new(),
            belongings: Value::Null,
            origin: Origin::Run,
            standing: Standing::Here,
        };
        // Recorded before it is started: if this agent dies in between, the next one knows what to look for.
        self.add(&record, "start")?;
        self.take(&plan.name, "start", fenced)?;
        let started = self.hypervisor.start(&plan).and_then(|found| {
            let process = Process::of(found.pid).map_err(|e| format!("QEMU ended at once: {e}"))?;
            Ok((found, process))
        });
        let (found, process) = match started {
            Ok(started) => started,
            Err(reasons) => {
                // If it cannot be told, it is still this host's, and can be started here.
                if let Err(error) = self.shared.end(&self.store, &plan.name) {
                    warn!(vm = plan.name, %error, "it did not start, and the ownership record cannot be \
                                                   told");
                }
                self.store.remove_vm(&plan.name).map_err(|e| self.store_failed(e))?;
                return Err(cannot(RefusalKind::Failed, &plan.name, reasons));
            }
        };
        let fill = |vm: &mut VmRecord| {
            vm.process = Some(process);
            vm.qmp = found.qmp;
            vm.recipe = found.recipe;
            vm.belongings = found.belongings;
        };
        self.store.update_vm(&plan.name, fill).map_err(|e| self.store_failed(e))?;
        // Nobody else knows of it yet.
        let _ = self.charge(process);
        info!(vm = plan.name, pid = process.pid, "started");
        self.show_leased(&plan.name)
    }

    /// Takes charge of a VM that something else started.
    pub fn adopt(&self, name: &str, qmp: &Path) -> Result<VmInfo, Refusal> {
        let cannot = |kind, reasons: Reasons| self.refuse(kind, format!("cannot adopt {name}"), reasons);
        name::check(name).map_err(|why| cannot(RefusalKind::Bad, why.into()))?;
        let _lease = self.hold(name, "adopt")?;
        let (found, different) =
            self.hypervisor.inspect(name, qmp).map_err(|why| cannot(RefusalKind::Conflict, why))?;
        let process = Process::of(found.pid)
            .map_err(|e| cannot(RefusalKind::Failed, format!("process {} is gone: {e}", found.pid).into()))?;
        let others = self.store.vms().map_err(|e| self.store_failed(e))?;
        if let Some(other) = others.iter().find(|vm| vm.process == Some(process) && vm.name != name) {
            return Err(cannot(
                RefusalKind::Conflict,
                format!("its QEMU is the VM {} already", other.name).into(),
            ));
        }
        match self.charge(process) {
            Ok(charge::Charge::Ours) => {
                let why = "this agent is in charge of its QEMU already, under another name";
                return Err(cannot(RefusalKind::Conflict, why.into()));
            }
            Ok(_) => {}
            Err(why) => return Err(cannot(RefusalKind::Conflict, why.into())),
        }
        let record = VmRecord {
            name: name.to_owned(),
            recipe: found.recipe,
            process: Some(process),
            qmp: found.qmp,
            belongings: found.belongings,
            origin: Origin::Adopted,
            standing: Standing::Here,
        };
        let added = self.add(&record, "adopt").and_then(|()| self.take(name, "adopt", None));
        added.inspect_err(|_| self.charges.release(process))?;
        info!(vm = name, pid = process.pid, "adopted");
        Ok(VmInfo { different, ..self.show_leased(name)? })
    }

    /// What would become of a VM that something else started; nothing is done with it.
    pub fn examine(&self, qmp: &Path) -> Result<Examined, Refusal> {
        self.hypervisor.examine(qmp).map_err(|why| {
            self.refuse(RefusalKind::Conflict, format!("cannot look at {}", qmp.display()), why)
        })
    }

    /// Ends a VM and forgets it. One whose QEMU has ended already is only forgotten.
    pub fn stop(&self, name: &str) -> Result<(), Refusal> {
        let vm = self.find(name)?;
        let _lease = self.hold(name, "stop")?;
        let conflict =
            |why: &str| Err(self.refuse(RefusalKind::Conflict, format!("cannot stop {name}"), why.into()));
        if let Standing::Arriving { from, .. } = &vm.standing {
            return conflict(&format!("it is on its way here, and {from} owns it still"));
        }
        if let Some(entry) = self.store.departure_of(name).map_err(|e| self.store_failed(e))? {
            let to = &entry.to;
            match entry.state {
                DepartureState::Pausing => return conflict("its last migration is still being rolled back"),
                DepartureState::Fenced { .. } => {
                    let why = format!(
                        "nobody can say yet whether it belongs to {to}: see `whimbrel resolve {name}`"
                    );
                    return conflict(&why);
                }
                DepartureState::Gone { .. } => {
                    let why =
                        format!("it belongs to {to}, which may still need memory that only this host has");
                    return conflict(&why);
                }
            }
        }
        let cannot = |why: Reasons| self.refuse(RefusalKind::Failed, format!("cannot stop {name}"), why);
        self.hypervisor.stop(&vm).map_err(cannot)?;
        // Not before: another host may start it from then on.
        self.shared.end(&self.store, name).map_err(|error| {
            let why = format!(
                "its QEMU has ended, but the ownership record cannot be told, so no other host may start it \
                 yet: {error}; try again"
            );
            cannot(why.into())
        })?;
        self.store.remove_vm(name).map_err(|e| self.store_failed(e))?;
        info!(vm = name, "stopped");
        Ok(())
    }

    /// The VM of this name, or an error that names similar ones or says where it went.
    pub fn find(&self, name: &str) -> Result<VmRecord, Refusal> {
        if let Some(vm) = self.store.vm(name).map_err(|e| self.store_failed(e))? {
            return Ok(vm);
        }
        let what = format!("there is no VM {name} on this host");
        if let Some(owner) = self.store.owner(name).map_err(|e| self.store_failed(e))?
            && owner.owner != self.host()
        {
            let why = format!("it was migrated to {}", owner.owner);
            return Err(Refusal::new(RefusalKind::Unknown, what, self.host(), why).vm_runs_on(owner.owner));
        }
        let all = self.store.vms().map_err(|e| self.store_failed(e))?;
        let near = name::similar(name, all.iter().map(|vm| vm.name.as_str()));
        let why = match (near.as_slice(), all.len()) {
            ([], 0) => "no VM runs here; `whimbrel run` starts one".to_owned(),
            ([], _) => "`whimbrel list` shows those that are here".to_owned(),
            (near, _) => format!("did you mean {}?", near.join(" or ")),
        };
        Err(Refusal::new(RefusalKind::Unknown, what, self.host(), why))
    }

    /// Forgets, after a start of the agent, the VMs whose start was interrupted.
    pub fn forget_interrupted(&self) -> Result<(), StoreError> {
        for vm in self.store.vms()? {
            if vm.process.is_none() && vm.standing == Standing::Here {
                warn!(vm = vm.name, "forgotten: its start was interrupted");
                self.hypervisor.sweep(&vm.name);
                self.store.remove_vm(&vm.name)?;
            }
        }
        Ok(())
    }

    /// Looks, after a start of the agent, which of the recorded VMs are still there, and says so in the log.
    /// Each QEMU is given its time to answer: those that are waited for are served before.
    pub fn look_again(&self) -> Result<(), StoreError> {
        for vm in self.store.vms()? {
            if self.store.arrival(&vm.name)?.is_some() {
                // Its QEMU may be waiting for a page that is yet to arrive: it is not asked.
                info!(vm = vm.name, "found again, arriving");
                continue;
            }
            if self.store.departure_of(&vm.name)?.is_some() {
                // Whoever settles its migration talks to its QEMU.
                info!(vm = vm.name, "found again, leaving");
                continue;
            }
            match self.condition(&vm) {
                Condition::Gone(why) => warn!(vm = vm.name, why, "its QEMU is gone"),
                Condition::Unknown(why) => warn!(vm = vm.name, why, "its QEMU does not answer"),
                Condition::Running => info!(vm = vm.name, "found again, running"),
                Condition::Paused(status) => info!(vm = vm.name, status, "found again, not running"),
            }
        }
        Ok(())
    }

    /// What a VM is doing, asked of its process first and of QEMU only if that lives.
    pub fn condition(&self, vm: &VmRecord) -> Condition {
        match vm.process {
            Some(process) if process.is_alive() => self.hypervisor.condition(vm),
            Some(process) => Condition::Gone(format!("process {} has ended", process.pid)),
            None => Condition::Unknown("it is being started".to_owned()),
        }
    }

    fn hold(&self, name: &str, what: &str) -> Result<Lease, Refusal> {
        self.lease(name).ok_or_else(|| {
            let why = "something else is being done with it: it is being started, stopped or migrated";
            self.refuse(RefusalKind::Conflict, format!("cannot {what} {name}"), why.into())
        })
    }

    fn add(&self, record: &VmRecord, what: &str) -> Result<(), Refusal> {
        if self.store.add_vm(record).map_err(|e| self.store_failed(e))? {
            return Ok(());
        }
        let why = format!("host {} has a VM named {} already", self.host(), record.name);
        Err(self.refuse(RefusalKind::Conflict, format!("cannot {what} {}", record.name), why.into()))
    }

    /// The VM, which has just been recorded here, becomes this host's also by the shared record; or it is not
    /// recorded here.
    fn take(&self, name: &str, what: &str, fenced: Option<&str>) -> Result<(), Refusal> {
        let Err((kind, why)) = self.shared.take(&self.store, name, fenced) else { return Ok(()) };
        self.store.remove_vm(name).map_err(|e| self.store_failed(e))?;
        Err(self.refuse(kind, format!("cannot {what} {name}"), why.into()))
    }

    /// A VM that is here, and that a person has taken from a host that is `fenced`, also by the shared
    /// record.
    pub(crate) fn retake(&self, name: &str, fenced: &str) -> Result<(), String> {
        let departure = self.store.departure_of(name).map_err(|e| e.to_string())?;
        match departure.map(|entry| entry.state) {
            // It did not come back: the record had spoken before the person.
            Some(DepartureState::Gone { .. }) => return Ok(()),
            Some(_) => return Err("its migration is not settled yet".to_owned()),
            None => {}
        }
        match self.store.vm(name).map_err(|e| e.to_string())? {
            Some(vm) if vm.standing == Standing::Here => {
                self.shared.take(&self.store, name, Some(fenced)).map_err(|(_, why)| why)
            }
            _ => Ok(()),
        }
    }

    /// The record that all hosts share, if they do.
    pub fn record(&self) -> Option<&Arc<dyn SharedRecord>> {
        self.shared.record()
    }

    /// Looks whether the shared record knows that a VM that is here belongs here, and tells it if it has
    /// never heard of it. An error: not known, try again.
    pub(crate) fn publish(&self, name: &str) -> io::Result<()> {
        let store = &self.store;
        let here = || -> io::Result<bool> {
            let moving = store.departure_of(name)?.is_some() || store.arrival(name)?.is_some();
            Ok(!moving && store.vm(name)?.is_some_and(|vm| vm.standing == Standing::Here))
        };
        if !here()? {
            return Ok(());
        }
        let said = self.shared.look(store, name)?;
        // It may have left, or ended, while that was asked.
        if !here()? || self.shared.believe(store, name, said)? {
            return Ok(());
        }
        // Nobody may end it while the record is told that it is here.
        let Some(_lease) = self.lease(name) else { return Err(io::ErrorKind::ResourceBusy.into()) };
        if !here()? {
            return Ok(());
        }
        self.shared.take(store, name, None).map_err(|(kind, why)| match kind {
            // Another host has just been faster: so it says the next time.
            RefusalKind::Conflict => io::ErrorKind::ResourceBusy.into(),
            _ => io::Error::other(why),
        })
    }

    fn refuse(&self, kind: RefusalKind, what: String, reasons: Reasons) -> Refusal {
        Refusal::new(kind, what, self.host(), reasons.0.join("\n"))
    }

    fn store_failed(&self, error: StoreError) -> Refusal {
        Refusal::store(error, self.host())
    }
}
