//! A second QEMU of this host for a VM that runs here: the engine's `Host` for `migrate --to self`.
//!
//! RAM that is shared is handed over by its descriptor; what is private to the first QEMU travels over a
//! connection of this host to itself. Which of the two runs the guest is decided by this host's own store
//! (`agent::store`, seconds): the ownership record says before and after that the VM is this host's.

use crate::{
    arrivals::{Arrivals, Place},
    hypervisor::{CAME_BY, KILL, found, handle_of},
    incoming::misfits,
};
use agent::{
    hypervisor::Found,
    store::{Place as Kept, Process, Side, Store},
};
use attach::{Lent, Source, Target};
use engine::{Acceptor, Dial, Offered, TcpDial};
use pki::Security;
use ports::{
    Claim, Claimed, Handover, Host, Machine, Nonce, Offer, Ownership, OwnershipRecord, Reach, Request,
    RunState, SpoolRecord, TargetJournal, Waiting,
};
use qemu::{Account, MemoryError, Recipe, Vm, preflight};
use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};
use units::{BlockId, Locked, MemorySet, MigrationId};

/// The side at which the second QEMU waits, for one migration.
pub(crate) struct Second {
    store: Store,
    arrivals: Arrivals,
    migration: MigrationId,
    vm: String,
    /// With the program that was asked for.
    host: qemu::Host,
    allow_older: bool,
    /// What the second QEMU may map, by where the offer says that it is.
    lent: Mutex<HashMap<Vec<u8>, Lent>>,
}

/// Which of the two runs the guest, as one of them asks.
pub(crate) struct Decision {
    pub(crate) store: Store,
    pub(crate) side: Side,
}

impl Ownership for Decision {
    fn identity(&self) -> io::Result<String> {
        Ok(String::new())
    }

    fn offer(&self, _: &Offer) -> io::Result<()> {
        // It was written down when the second QEMU was.
        Ok(())
    }

    fn claim(&self, claim: &Claim) -> io::Result<Claimed> {
        let epoch = claim.expected.next();
        let winner = match self.store.decide_second(&claim.vm, claim.migration, self.side) {
            // It is over and forgotten, and this side had not won by then: it would have settled it first.
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.side == Side::Second => Side::First,
            winner => winner?,
        };
        Ok(if winner == self.side {
            self.kill_other(&claim.vm)?;
            Claimed::Yours(epoch)
        } else {
            let owner = self.store.host().to_owned();
            Claimed::Lost(OwnershipRecord { owner, epoch, migration: Some(claim.migration) })
        })
    }
}

impl Decision {
    /// Before the winner is told: both map the same memory, and whatever anybody asks of the other QEMU from
    /// now on, it writes no more of it (I1). If it cannot be killed the winner is not told yet, and asks
    /// again.
    fn kill_other(&self, vm: &str) -> io::Result<()> {
        let (Some(second), Some(vm)) = (self.store.second(vm)?, self.store.vm(vm)?) else { return Ok(()) };
        let other = handle_of(&second.other_of(&vm)).map_err(io::Error::other)?;
        let wait = match self.side {
            Side::First => KILL,
            // Frozen, and held until the first side hears that it has lost.
            Side::Second => Duration::ZERO,
        };
        qemu::frozen::kill(&other, wait)
    }
}

impl Second {
    /// For a VM of this host, in a QEMU of `host`.
    pub(crate) fn new(
        store: &Store,
        arrivals: &Arrivals,
        (migration, vm): (MigrationId, &str),
        host: qemu::Host,
        allow_older: bool,
    ) -> Arc<Self> {
        Arc::new(Self {
            store: store.clone(),
            arrivals: arrivals.clone(),
            migration,
            vm: vm.to_owned(),
            host,
            allow_older,
            lent: Mutex::default(),
        })
    }

    /// Lends all RAM that another process can map, and says what is to be offered of it. Memory that the
    /// second QEMU may not open, or would throw away as it starts, travels.
    pub(crate) fn lend(&self, source: &Source, vm: &Vm) -> Result<Offered, String> {
        let mut offered = Offered::default();
        let account = Account::choose(self.host.user.as_deref())?;
        let mut all = self.lent.locked();
        let blocks = (0..).map(BlockId).zip(vm.ram_blocks());
        for (block, _) in blocks.filter(|(_, block)| !vm.recipe().is_of_virtio_mem(&block.name)) {
            // The id was drawn at random, and is this migration's alone.
            let random = (self.migration.0 >> 64) as u64 ^ self.migration.0 as u64;
            let nonce = Nonce::new(random.wrapping_add(u64::from(block.0)));
            let Some(lent) = source.lend(block, nonce).map_err(|e| MemoryError(e).to_string())? else {
                continue;
            };
            let metadata = lent.file().metadata();
            if !account.may_write(&metadata.map_err(|e| format!("cannot look at its memory: {e}"))?) {
                continue;
            }
            let place = [&self.migration.0.to_le_bytes()[..], &block.0.to_le_bytes()].concat();
            all.insert(place.clone(), lent);
            offered.blocks.push((Handover { block, reach: Reach::Host, place }, nonce));
        }
        Ok(offered)
    }

    /// Nothing is lent any more: its marks must not be taken for those of the next migration. A QEMU that
    /// maps it keeps that.
    pub(crate) fn take_back(&self) {
        self.lent.locked().clear();
    }

    /// Starts the second QEMU, which maps what it was lent.
    fn start(&self, request: &Request) -> Result<(Vm, BTreeSet<BlockId>, Place), Vec<String>> {
        let one = |why: &dyn std::fmt::Display| vec![why.to_string()];
        let recipe: Recipe = serde_json::from_slice(&request.recipe).map_err(|e| one(&e))?;
        let lent = self.lent.locked();
        let (mut host, mut reached) = (qemu::Host { second: true, ..self.host.clone() }, BTreeSet::new());
        for Handover { block, place, .. } in &request.handovers {
            let name = request.blocks.get(usize::from(block.0)).map(|block| block.name.clone());
            if let (Some(lent), Some(name)) = (lent.get(place), name) {
                let path = format!("/proc/self/fd/{}", lent.file().as_raw_fd());
                host.shared_memory.insert(name, path.into());
                reached.insert(*block);
            }
        }
        let program = host.program().map_err(|why| one(&why))?;
        let (there, here) = (recipe.qemu, preflight::version(&program).map_err(|why| one(&why))?);
        if (here.major, here.minor) < (there.major, there.minor) && !self.allow_older {
            return Err(vec![format!(
                "{} is QEMU {here}, older than the {there} that runs the VM; name a later one with --qemu, \
                 or allow an older one (--allow-older-qemu)",
                program.display()
            )]);
        }
        self.arrivals.wait_for_earlier(&recipe.name);
        let place = self.arrivals.reserve(&recipe.name, preflight::needs(&recipe, &host), host.overcommit);
        let place = place.map_err(|why| one(&why))?;
        // Its files are those of the first, by the same names. Whether they still are is looked at again
        // before the device state is loaded.
        let opened = Vm::open_files(&recipe)?;
        let mut vm = Vm::incoming_with(&recipe, &host, &opened).map_err(|e| one(&e))?;
        match vm.uses(&opened) {
            Ok(()) => Ok((vm, reached, place)),
            Err(reasons) => {
                drop(vm.destroy());
                Err(reasons)
            }
        }
    }

    fn take(&self, request: &Request, vm: &mut Vm, wanted: &BTreeSet<BlockId>) -> Result<Taken, Vec<String>> {
        let one = |why: &dyn std::fmt::Display| vec![why.to_string()];
        misfits(request, vm)?;
        vm.take_ahead(&request.private).map_err(|e| one(&e))?;
        let opened = Target::open_reaching(vm.process().pid(), vm.ram_blocks(), wanted);
        let (target, reached) = opened.map_err(|e| one(&MemoryError(e)))?;
        let mut found = found(vm, None).map_err(|e| one(&e))?;
        inherit(&self.store, &self.vm, &mut found).map_err(|e| one(&e))?;
        let process = Process::of(found.pid).map_err(|e| one(&format!("its QEMU ended at once: {e}")))?;
        let waits = Kept {
            recipe: found.recipe,
            process: Some(process),
            qmp: found.qmp,
            belongings: found.belongings,
        };
        let begun = self.store.begin_second(&self.vm, self.migration, waits).map_err(|e| one(&e))?;
        begun.map_err(|why| one(&why))?;
        Ok(Taken { target, reached })
    }
}

/// It is the same VM still: what another host keeps of it is found by the way on which it came here.
fn inherit(store: &Store, vm: &str, found: &mut Found) -> io::Result<()> {
    let before = store.vm(vm)?.and_then(|vm| vm.belongings.get(CAME_BY).cloned());
    if let (Some(came_by), Some(belongings)) = (before, found.belongings.as_object_mut()) {
        belongings.insert(CAME_BY.to_owned(), came_by);
    }
    Ok(())
}

struct Taken {
    target: Target,
    reached: Vec<ports::Reached>,
}

impl Host for Second {
    fn name(&self) -> String {
        self.store.host().to_owned()
    }

    fn prepare(&self, request: &Request) -> Result<Waiting, Vec<String>> {
        if request.migration != self.migration || request.vm != self.vm || request.post_copy {
            return Err(vec!["this is not the migration that it waits for".to_owned()]);
        }
        let (mut vm, wanted, place) = self.start(request)?;
        match self.take(request, &mut vm, &wanted) {
            Ok(Taken { target, reached }) => {
                let memory = target.memory();
                place.lands_in(&memory);
                let journal = SecondJournal {
                    store: self.store.clone(),
                    vm: self.vm.clone(),
                    migration: self.migration,
                };
                let (machine, journal) = (Box::new(vm), Box::new(journal));
                Ok(Waiting { memory, reached, kept: None, missing: None, machine, journal })
            }
            Err(mut reasons) => {
                if let Err(error) = vm.destroy() {
                    reasons.push(format!("and the QEMU that was started for it would not end: {error}"));
                }
                Err(reasons)
            }
        }
    }

    fn spool_directory(&self, _: &str) -> Result<PathBuf, String> {
        Err("nothing of it needs a datastore: it stays on this host".to_owned())
    }

    fn record(&self) -> Arc<dyn Ownership> {
        Arc::new(Decision { store: self.store.clone(), side: Side::Second })
    }

    fn settled(&self, _: MigrationId) -> bool {
        false
    }

    fn ended(&self, request: &Request, arrived: bool) {
        let kept = if arrived { self.store.keep_history(&request.vm, &request.history) } else { Ok(()) };
        if let Err(error) = kept {
            tracing::error!(vm = request.vm, %error, "its next migration will not know how this one went");
        }
        tracing::info!(vm = request.vm, arrived, "a move to another QEMU of this host is over");
    }
}

/// What the second side writes down. It lacks no memory once it is decided.
struct SecondJournal {
    store: Store,
    vm: String,
    migration: MigrationId,
}

impl TargetJournal for SecondJournal {
    fn missing(&mut self, pages: &MemorySet) -> io::Result<()> {
        match pages.is_empty() {
            true => Ok(()),
            false => Err(io::Error::other("a second QEMU of one host starts with all its memory")),
        }
    }

    fn goes_on(&mut self, state: RunState) -> io::Result<()> {
        self.store.second_goes_on(&self.vm, self.migration, state)
    }

    fn went_on(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn spool(&mut self, _: &SpoolRecord) -> io::Result<()> {
        Err(io::Error::other("a second QEMU of one host has no spool"))
    }

    fn settled(&mut self) -> io::Result<()> {
        if let Some(vm) = self.store.vm(&self.vm)? {
            handle_of(&vm).map_err(io::Error::other)?.belongings.take_names();
        }
        Ok(())
    }

    fn abandoned(&mut self, source_may_ask: bool) -> io::Result<()> {
        // Whoever ends the first side ends this record, too, unless it has done so before that was written.
        if source_may_ask || self.store.departure_of(&self.vm)?.is_some() {
            return Ok(());
        }
        match self.store.decide_second(&self.vm, self.migration, Side::First) {
            Ok(Side::First) => self.store.end_second(&self.vm, self.migration),
            Ok(Side::Second) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Where this host calls itself, as long as it lives.
pub(crate) struct Door {
    address: SocketAddr,
    closed: Arc<AtomicBool>,
}

impl Door {
    /// Lets in whoever can show this host's own certificate, where it has one; and takes in one migration.
    pub(crate) fn open(second: &Arc<Second>, security: &Security) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let (address, closed) = (listener.local_addr()?, Arc::new(AtomicBool::new(false)));
        let acceptor = Acceptor::new(second.clone(), security.clone());
        let over = closed.clone();
        thread::Builder::new().name("second".into()).spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if over.load(SeqCst) {
                    return;
                }
                let acceptor = acceptor.clone();
                let serve = move || {
                    if let Err(error) = acceptor.serve(stream) {
                        tracing::debug!(%error, "a connection of this host to itself was turned away");
                    }
                };
                if let Err(error) = thread::Builder::new().name("second".into()).spawn(serve) {
                    tracing::warn!(%error, "no thread for a connection of this host to itself");
                }
            }
        })?;
        Ok(Self { address, closed })
    }

    /// By which the first side reaches the second.
    pub(crate) fn dial(&self, host: &str, migration: MigrationId, security: &Security) -> Arc<dyn Dial> {
        Arc::new(TcpDial::new(vec![self.address], host, migration, security.clone()))
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.closed.store(true, SeqCst);
        // Whoever waits for a connection looks up.
        drop(TcpStream::connect(self.address));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent::store::{Origin, Standing, VmRecord};
    use ports::SourceJournal;
    use std::{
        path::Path,
        process::{Child, Command},
        time::Instant,
    };
    use sys::{hold::Hold, process::PidFd};
    use units::Epoch;

    const MIGRATION: MigrationId = MigrationId(7);

    /// A process in the place of a QEMU.
    fn qemu(folder: &Path) -> (Child, Kept) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let text = "name = \"web\"\nmemory = \"64MiB\"\n";
        let file = qemu::VmFile::parse(text, Path::new("web.toml")).unwrap();
        let recipe = file.recipe(&qemu::Host::new(folder)).unwrap();
        let place = Kept {
            recipe: serde_json::to_value(recipe).unwrap(),
            process: Some(Process::of(child.id()).unwrap()),
            qmp: folder.join("qmp"),
            belongings: serde_json::to_value(qemu::launch::Belongings::default()).unwrap(),
        };
        (child, place)
    }

    /// A store in `folder` with a VM, and its two QEMUs: the first runs it, the second waits for it.
    fn two_qemus(folder: &Path) -> (Store, [Child; 2]) {
        let store = Store::open(folder, "here").unwrap();
        let ((first, place), (second, waits)) = (qemu(folder), qemu(folder));
        let Kept { recipe, process, qmp, belongings } = place;
        let (name, origin, standing) = ("web".to_owned(), Origin::Run, Standing::Here);
        store.add_vm(&VmRecord { name, recipe, process, qmp, belongings, origin, standing }).unwrap();
        store.begin_second("web", MIGRATION, waits).unwrap().unwrap();
        (store, [first, second])
    }

    #[test]
    fn a_second_qemu_knows_by_which_migration_its_vm_came() {
        let dir = tempfile::tempdir().unwrap();
        let (store, mut children) = two_qemus(dir.path());
        for came_by in [None, Some("0123")] {
            let note = |vm: &mut VmRecord| {
                let belongings = vm.belongings.as_object_mut().unwrap();
                belongings.extend(came_by.map(|id| (CAME_BY.to_owned(), id.into())));
            };
            store.update_vm("web", note).unwrap();
            let Kept { recipe, qmp, belongings, .. } = store.second("web").unwrap().unwrap().other;
            let mut second = Found { pid: 1, recipe, qmp, belongings };
            inherit(&store, "web", &mut second).unwrap();
            assert_eq!(second.belongings.get(CAME_BY).and_then(|id| id.as_str()), came_by);
        }
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    #[test]
    fn i1_the_qemu_that_loses_is_killed_before_the_winner_knows() {
        for side in [Side::First, Side::Second] {
            let dir = tempfile::tempdir().unwrap();
            let (store, [mut first, mut second]) = two_qemus(dir.path());
            let process = PidFd::open(first.id().cast_signed()).unwrap();
            process.freeze(KILL).unwrap();
            let hold = Hold::begin(&process, KILL).unwrap();
            let claim = |side| {
                let claimer = "here".to_owned();
                let claim = Claim { vm: "web".to_owned(), migration: MIGRATION, expected: Epoch(1), claimer };
                Decision { store: store.clone(), side }.claim(&claim).unwrap()
            };
            assert_eq!(claim(side), Claimed::Yours(Epoch(2)));
            let (winner, loser) = match side {
                Side::First => (&mut first, &mut second),
                Side::Second => (&mut second, &mut first),
            };
            // Also of one that is held: whatever signal it is sent, it is a zombie at once.
            drop(hold);
            let end = Instant::now() + KILL;
            while loser.try_wait().unwrap().is_none() {
                assert!(Instant::now() < end, "{side:?}: the loser lives");
                thread::sleep(Duration::from_millis(1));
            }
            assert!(winner.try_wait().unwrap().is_none(), "{side:?}");
            assert_eq!(claim(side), Claimed::Yours(Epoch(2)));
            let other = if side == Side::First { Side::Second } else { Side::First };
            assert!(matches!(claim(other), Claimed::Lost(_)), "{side:?}");
            assert!(winner.try_wait().unwrap().is_none(), "{side:?}");
            winner.kill().unwrap();
            winner.wait().unwrap();
        }
    }

    #[test]
    fn a_second_qemu_that_is_given_up_leaves_no_record() {
        // Whether the source has begun its pause, and whether it may ask who runs the guest.
        for (pausing, may_ask) in [(false, false), (false, true), (true, false)] {
            let dir = tempfile::tempdir().unwrap();
            let (store, [mut first, mut second]) = two_qemus(dir.path());
            let mut departure = store.departure("web", MIGRATION, "self", "127.0.0.1:1");
            if pausing {
                departure.pausing(RunState::Running).unwrap();
            }
            let mut journal =
                SecondJournal { store: store.clone(), vm: "web".to_owned(), migration: MIGRATION };
            journal.abandoned(may_ask).unwrap();
            assert_eq!(
                store.seconds().unwrap().len(),
                usize::from(pausing || may_ask),
                "{pausing} {may_ask}"
            );
            journal.abandoned(may_ask).unwrap();
            for child in [&mut first, &mut second] {
                child.kill().unwrap();
                child.wait().unwrap();
            }
        }
    }
}
