//! Takes VMs in: the engine's `Host` with QEMU and the agent's store.

use crate::{
    arrivals::{Arrivals, Place},
    hypervisor::{CAME_BY, QemuHost, Waits, found},
    record::{HostRecord, differ},
};
use agent::{
    config::Config,
    name,
    store::{Arrival, Origin, Process, Standing, Store, VmRecord},
};
use ports::shared::SharedRecord;
use ports::{
    Block, GuestMemory, Host, KeptCopy, Machine, MissingPages, Ownership, OwnershipRecord, Request, Waiting,
};
use qemu::{MemoryError, Recipe, Vm, preflight, recipe::files::Opened};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use units::{Bytes, MigrationId, PAGE_SIZE};

/// A recipe's length, at most: a hundred times what a large VM's has.
const MAX_RECIPE: usize = 4 << 20;

/// This host as the target of migrations.
pub(crate) struct Incoming {
    pub(crate) qemu: QemuHost,
    pub(crate) store: Store,
    pub(crate) config: Arc<Config>,
    pub(crate) shared: Option<Arc<dyn SharedRecord>>,
    pub(crate) arrivals: Arrivals,
}

impl Incoming {
    /// Looks whether a VM can be taken in, before anything is started for it: opens its files, and keeps its
    /// memory free.
    fn look(&self, request: &Request) -> Result<(Recipe, Vec<Opened>, Place), Vec<String>> {
        name::check(&request.vm).map_err(|why| vec![why])?;
        self.arrivals.wait_for_earlier(&request.vm);
        // It is recorded, and shown.
        name::check_host(&request.from).map_err(|why| vec![format!("the source calls itself {why}")])?;
        if request.recipe.len() > MAX_RECIPE {
            return Err(vec![format!("its description is longer than {MAX_RECIPE} bytes")]);
        }
        let mut recipe: Recipe = serde_json::from_slice(&request.recipe).map_err(|e| {
            vec![format!("its description cannot be read: {e}; are both hosts' versions the same?")]
        })?;
        let host = self.qemu.host();
        let mut reasons = vec![];
        if recipe.name != request.vm {
            reasons.push(format!("the request is for {}, its description for {}", request.vm, recipe.name));
        }
        reasons.extend(differ(self.shared.as_ref(), &request.record, &request.from));
        match self.store.vm(&request.vm) {
            Ok(None) => {}
            Ok(Some(_)) => reasons.push(format!(
                "{host} has a VM named {vm} already; see what it is (whimbrel show {vm}, there)",
                host = self.name(),
                vm = request.vm
            )),
            Err(error) => reasons.push(error.to_string()),
        }
        // What is refused anyway must not cost what is kept.
        let is_wanted = reasons.is_empty();
        let has_room = |more| preflight::has_room(&recipe, &host, self.arrivals.outstanding(), more);
        let make_room = || {
            if is_wanted {
                self.qemu.copies.make_room(&request.vm, has_room);
            }
        };
        let migration = request.migration.to_string();
        let (mut opened, more) = match preflight::check(&recipe, &host, &request.from, &migration, make_room)
        {
            Ok(opened) => (opened, vec![]),
            Err(reasons) => (vec![], reasons),
        };
        reasons.extend(more);
        if !reasons.is_empty() {
            return Err(reasons);
        }
        match self.arrivals.reserve(&request.vm, preflight::needs(&recipe, &host), host.overcommit) {
            Ok(place) => {
                preflight::make_stores(&mut recipe, &mut opened, &host).map_err(|why| vec![why])?;
                Ok((preflight::settle(recipe, &opened), opened, place))
            }
            Err(why) => Err(vec![why]),
        }
    }

    /// All that is needed around a QEMU that waits; the caller ends it if this fails.
    fn take(&self, request: &Request, vm: &mut Vm) -> Result<Taken, Vec<String>> {
        misfits(request, vm)?;
        let one = |error: &dyn std::fmt::Display| vec![error.to_string()];
        if request.private.is_empty() {
            let why = "its Whimbrel is an older one, which would lose the guest's firmware: update it first";
            return Err(vec![format!("{}: {why}", request.from)]);
        }
        vm.take_ahead(&request.private).map_err(|e| one(&e))?;
        let target = attach::Target::open(vm.process().pid(), vm.ram_blocks());
        let target = target.map_err(|e| one(&MemoryError(e)))?;
        let missing = request.post_copy.then(|| target.missing()).transpose();
        let missing = missing.map_err(|e| one(&MemoryError(e)))?;
        let waits = missing.as_ref().map(|m| Waits {
            fd: m.fd_number(),
            blocks: vm.ram_blocks().to_vec(),
            handed_over: vec![],
        });
        let mut found = found(vm, waits).map_err(|e| one(&e))?;
        if let Some(belongings) = found.belongings.as_object_mut() {
            belongings.insert(CAME_BY.to_owned(), request.migration.to_string().into());
        }
        let process = Process::of(found.pid).map_err(|e| one(&format!("its QEMU ended at once: {e}")))?;
        let record = VmRecord {
            name: request.vm.clone(),
            recipe: found.recipe,
            process: Some(process),
            qmp: found.qmp,
            belongings: found.belongings,
            origin: Origin::Migrated,
            standing: Standing::Arriving { migration: request.migration, from: request.from.clone() },
        };
        let of_source =
            OwnershipRecord { owner: request.from.clone(), epoch: request.epoch, migration: None };
        let arrival = self.store.accept_decided_by(&record, &of_source, &request.record);
        let arrival = arrival.map_err(|e| one(&e))?;
        Ok(Taken {
            memory: target.memory(),
            missing: missing.map(|missing| Arc::new(missing) as Arc<dyn MissingPages>),
            arrival,
        })
    }
}

/// Why the guest would not find in a QEMU that waits what it had: every reason.
pub(crate) fn misfits(request: &Request, vm: &mut Vm) -> Result<(), Vec<String>> {
    let outdated = vm.missing_features().map_err(|e| vec![e.to_string()])?;
    let mut reasons = Vec::new();
    if !outdated.is_empty() {
        let all = outdated.join(", ");
        reasons.push(format!(
            "the guest was shown CPU features that it would not find here: {all}; move it to a host whose \
             processor has them, or start it with a CPU model that both have"
        ));
    }
    let outdated = vm.missing_of_virtio().map_err(|e| vec![e.to_string()])?;
    if !outdated.is_empty() {
        let all = outdated.join(", ");
        reasons.push(format!(
            "the guest uses what its virtio devices would not offer here, where kernel or QEMU differ: \
             {all}; have the same of both on either host, or start the VM without"
        ));
    }
    let here: Vec<Block> = vm
        .ram_blocks()
        .iter()
        .map(|b| Block { name: b.name.clone(), pages: b.bytes / PAGE_SIZE as u64 })
        .collect();
    if here != request.blocks {
        let told = |blocks: &[Block]| {
            let one =
                |b: &Block| format!("{} ({})", b.name.escape_debug(), Bytes(b.pages * PAGE_SIZE as u64));
            blocks.iter().map(one).collect::<Vec<_>>().join(", ")
        };
        reasons.push(format!(
            "its memory is {} there and {} here: some was plugged in or unplugged just now; migrate again",
            told(&request.blocks),
            told(&here)
        ));
    }
    if reasons.is_empty() { Ok(()) } else { Err(reasons) }
}

struct Taken {
    memory: Arc<attach::Memory>,
    missing: Option<Arc<dyn MissingPages>>,
    arrival: Arrival,
}

impl Host for Incoming {
    fn name(&self) -> String {
        self.store.host().to_owned()
    }

    fn prepare(&self, request: &Request) -> Result<Waiting, Vec<String>> {
        let (recipe, opened, place) = self.look(request)?;
        let mut vm =
            Vm::incoming_with(&recipe, &self.qemu.host(), &opened).map_err(|e| vec![e.to_string()])?;
        let taken = vm.uses(&opened).and_then(|()| self.take(request, &mut vm));
        match taken {
            Ok(Taken { memory, missing, arrival }) => {
                place.lands_in(&memory);
                // No agent reaches another's memory yet: whatever is offered travels.
                let (machine, journal) = (Box::new(vm), Box::new(arrival));
                let kept =
                    self.qemu.copies.take(&request.vm, &request.from, request.came_by, memory.blocks());
                let kept = kept.map(|kept| kept as Arc<dyn KeptCopy>);
                Ok(Waiting { memory, reached: vec![], kept, missing, machine, journal })
            }
            Err(mut reasons) => {
                if let Err(error) = vm.destroy() {
                    reasons.push(format!("and the QEMU that was started for it would not end: {error}"));
                }
                Err(reasons)
            }
        }
    }

    fn spool_directory(&self, asked: &str) -> Result<PathBuf, String> {
        let wanted = Path::new(asked);
        if !wanted.is_absolute() {
            return Err(format!("{asked} is no absolute path"));
        }
        // By where paths lead: a link must not grant what nobody granted. Whether something exists that is
        // not granted is not told.
        let granted = self.config.allow.spool.iter().chain(&self.config.spool);
        let found = wanted.canonicalize().ok().filter(|directory| {
            granted.clone().filter_map(|dir| dir.canonicalize().ok()).any(|dir| directory.starts_with(dir))
        });
        found.ok_or_else(|| format!("{asked} is not there, or not one of [allow] spool on {}", self.name()))
    }

    fn record(&self) -> Arc<dyn Ownership> {
        Arc::new(HostRecord { store: self.store.clone(), shared: self.shared.clone() })
    }

    fn settled(&self, migration: MigrationId) -> bool {
        self.store.has_arrived(migration).unwrap_or_else(|error| {
            tracing::error!(%error, "cannot look up a migration");
            false
        })
    }

    fn ended(&self, request: &Request, arrived: bool) {
        let kept = if arrived { self.store.keep_history(&request.vm, &request.history) } else { Ok(()) };
        if let Err(error) = kept {
            tracing::error!(vm = request.vm, %error, "its next migration will not know how this one went");
        }
        tracing::info!(vm = request.vm, from = request.from, arrived, "an incoming migration is over");
    }
}
