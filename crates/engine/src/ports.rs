//! The ports: all that a migration asks of the world.
//!
//! `qemu` keeps these with a real QEMU process, the agent keeps the records, and tests keep them with a model. Every
//! method may be called from any thread that owns the port; none may block on another VM.

pub use crate::{run_state::RunState, unspool::SpoolRecord};
use std::{io, path::PathBuf, sync::Arc, time::Duration};
use units::{BlockId, Epoch, MemorySet, MigrationId, PageIndex, PageRange, PageSet};

/// One RAM block as both sides name it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Block {
    /// QEMU's name for the memory backend, the same on both sides.
    pub name: String,
    /// Its size, in pages.
    pub pages: u64,
}

/// The guest's RAM, reached from outside the QEMU process.
///
/// Ranges lie within their block (`PageRange::fits`): whoever takes one from a peer has checked it.
pub trait GuestMemory: Send + Sync {
    /// The RAM blocks; `BlockId(n)` is the n-th.
    fn blocks(&self) -> &[Block];

    /// The pages that were ever written: all others are holes and read as zeros. Allocates nothing.
    fn present(&self, block: BlockId) -> io::Result<PageSet>;

    /// Copies `range` out; `into` is exactly as long as the range. The guest may write meanwhile: then the copy may be
    /// torn, and the tracker has the page again.
    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()>;

    /// Overwrites `range`; `from` is exactly as long as the range. Only for a guest that has not started.
    fn write(&self, block: BlockId, range: PageRange, from: &[u8]) -> io::Result<()>;

    /// Makes holes of `range` and verifies that they are holes.
    fn discard(&self, block: BlockId, range: PageRange) -> io::Result<()>;
}

/// Tells which pages the guest wrote. Dropping it takes every protection back: the guest runs on at full speed.
pub trait Tracker: Send {
    /// Protects all RAM. Writes from now on are seen.
    fn begin(&mut self) -> io::Result<()>;

    /// Adds to `dirty` what was written since `begin` or the last `collect`, and protects these pages again in the
    /// same instant. Whoever clears a dirty bit here owes the page (I2).
    fn collect(&mut self, dirty: &mut MemorySet) -> io::Result<()>;

    /// Whether `govern` can come to anything.
    fn can_govern(&self) -> bool {
        true
    }

    /// From now on the guest may begin to write to pages only at a share of this pace, in pages a second, at which pages are
    /// sent; so that each round leaves less than the one before (`policy::Governor`). Said again whenever the pace changes.
    fn govern(&mut self, sent_per_s: f64) -> io::Result<()> {
        let _ = sent_per_s;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Which share that is, and how long one writer may be made to wait, where it is not as usual. Said before `govern`.
    fn agree(&mut self, share: f64, max_stall: Duration) {
        let _ = (share, max_stall);
    }

    /// The guest is about to be stopped: whoever is made to wait is let go at once, and nobody is made to from now on.
    fn hurry(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// It was stopped in vain and runs on: its writers are made to wait again as they were before `hurry`.
    fn take_time(&mut self) {}

    /// A round has been sent, and these pages of it were the same as when they were sent before: they need not have been in it.
    fn learn(&mut self, unchanged: &MemorySet) {
        let _ = unchanged;
    }

    /// How long the guest's writers waited because of that, so far.
    fn stalls(&self) -> Stalls {
        Stalls::default()
    }

    /// Whether a writer may have to wait for us now: then whoever freezes us freezes the guest.
    fn may_make_wait(&self) -> bool {
        false
    }

    /// The threads that opened pages for writing since this was asked last, with how many; nothing where that is not known.
    fn writers(&mut self) -> Vec<(i32, u64)> {
        vec![]
    }
}

/// Has the guest's vCPUs stand still for moments, where it does not suffice that their writes wait. Only the vCPUs: QEMU itself goes
/// on; and only for moments: a vCPU may hold a lock that QEMU needs. Whatever ends us ends that too. Dropping it does.
pub trait Stuns: Send {
    /// How many vCPUs there are.
    fn vcpus(&self) -> u32;

    /// From now on those of these threads that are vCPUs stand still for this share of the time, in moments of a few milliseconds;
    /// if none are given, those that seem to write. Said again whenever something changes.
    fn stun(&mut self, duty: f64, writers: &[i32]) -> io::Result<()>;

    /// All run when this returns, and go on running.
    fn calm(&mut self);

    /// How long they stood still because of that, so far.
    fn stalls(&self) -> Stalls;
}

/// What it cost a guest's writers to be governed.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stalls {
    /// How often one waited.
    pub count: u64,
    /// How long all of them waited.
    pub total: Duration,
    /// The longest time that one waited.
    pub longest: Duration,
}

impl Stalls {
    /// One or several more, all of this length.
    pub fn add(&mut self, count: u64, each: Duration) {
        if count > 0 {
            self.count += count;
            self.total += each * count as u32;
            self.longest = self.longest.max(each);
        }
    }

    /// These and those.
    pub fn and(self, others: Self) -> Self {
        Self {
            count: self.count + others.count,
            total: self.total + others.total,
            longest: self.longest.max(others.longest),
        }
    }
}

/// A page that the guest waits for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Fault {
    /// Its block.
    pub block: BlockId,
    /// Its place in the block.
    pub page: PageIndex,
}

/// What became of a page that was put into a running guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placed {
    /// It is there now, and whoever waited for it goes on.
    Now,
    /// It was there before and was left as it is (I5).
    Already,
}

/// Missing pages of a guest that runs before all its memory is there.
pub trait MissingPages: Send + Sync {
    /// The next page that somebody waits for; `None` when nobody asked within `wait`.
    fn next(&self, wait: Duration) -> io::Result<Option<Fault>>;

    /// Puts pages where holes are. Pages that are there already stay as they are. Says how many were new.
    fn place(&self, block: BlockId, range: PageRange, from: &[u8]) -> io::Result<u64>;

    /// Puts one zero page where a hole is.
    fn place_zero(&self, fault: Fault) -> io::Result<Placed>;

    /// Ends it once nothing is missing any more: holes are zeros again.
    fn finish(&self) -> io::Result<()>;
}

/// A VM's device state: everything but the shared RAM blocks.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DeviceState {
    /// QEMU's own stream.
    pub stream: Vec<u8>,
    /// RAM blocks that QEMU keeps private (video memory, ROMs), by QEMU's name for them: what changed since the request, or all of one
    /// that did not come with it.
    pub private: Vec<(String, Vec<u8>)>,
}

/// A device state that was saved, and how that went.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Saved {
    /// The state.
    pub state: DeviceState,
    /// How long it was looked whether the VM is what it was.
    pub looked: Duration,
    /// How long it took QEMU to stand still as a whole, after it had answered.
    pub frozen_in: Duration,
}

/// What was seen of a VM that is being moved.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// How it differs from what it was when its migration began, each difference in words: devices, disks,
    /// media, jobs, exports, memory, vCPUs, QEMU's own migration.
    pub changes: Vec<String>,
    /// What it does; none where that was not asked.
    pub state: Option<RunState>,
}

/// What went wrong at the machine, in words that name what was asked of it.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct MachineError {
    /// What was asked of it, such as `stop the guest`.
    pub what: String,
    /// What it answered.
    pub why: String,
}

impl MachineError {
    /// The VM is not what it was when its migration began: each difference in words.
    pub fn changed(differences: &[String]) -> Self {
        Self { what: "the VM was changed while it was moved".into(), why: differences.join("\n") }
    }
}

/// Says whether a process has ended, without waiting and without asking the process.
pub type HasEnded = Box<dyn Fn() -> bool + Send + Sync>;

/// Ends a process at once, without asking it or waiting for it.
pub type Ender = Box<dyn Fn() + Send + Sync>;

/// Says why the network would not hear the guest yet, in words; `None`: it would.
pub type Unheard = Box<dyn Fn() -> Option<String> + Send>;

/// The QEMU process: vCPUs and device state.
pub trait Machine: Send {
    /// By which to see whether it has ended, also while somebody uses this port.
    fn has_ended(&self) -> HasEnded {
        Box::new(|| false)
    }

    /// By which to end it at once while somebody uses this port; `destroy` is still needed then.
    fn ender(&self) -> Ender {
        Box::new(|| {})
    }

    /// By which to see whether the network would hear the guest, also while somebody uses this port.
    fn unheard(&self) -> Unheard {
        Box::new(|| None)
    }

    /// Does ahead of `stop`, while the guest still runs, whatever would otherwise take time while it does
    /// not; and says what the VM does. Changes nothing that the guest could notice.
    fn prepare_stop(&mut self) -> Result<RunState, MachineError> {
        self.run_state()
    }

    /// The same ahead of `load`. May be left out.
    fn prepare_load(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    /// How the VM differs from what it was when its migration began, and what it does. Asked several times a
    /// second while the guest runs; asks QEMU only when something may have happened, or a second after it was
    /// asked last.
    fn watch(&mut self) -> Result<Seen, MachineError> {
        Ok(Seen::default())
    }

    /// What the VM does now.
    fn run_state(&mut self) -> Result<RunState, MachineError>;

    /// Stops the guest. Returns once its disks are drained, with the state in which it was before: somebody
    /// else may have stopped it a moment ago, or it may have stopped by itself. A guest that did not run is
    /// left as it is.
    fn stop(&mut self) -> Result<RunState, MachineError>;

    /// The device state of the stopped guest, whose disks are inactive from then on. So its QEMU stands still
    /// as a whole at once: nobody can have the guest run, nor do anything else to it, but by `restore`,
    /// whoever ends, ourselves included. Fails if something was done to it since `stop`, or if the VM is not what
    /// it was when its migration began ([`MachineError::changed`]), and says what. That is looked for before its
    /// disks are taken from whoever uses them, of which QEMU may die (I3). 3 ms of it at most are looking.
    fn save(&mut self) -> Result<Saved, MachineError>;

    /// From now on no signal lets it go either, for as long as we live. Fails if one has done so since
    /// `save`.
    fn hold(&mut self) -> Result<(), MachineError>;

    /// Gives the VM the state that it had before `stop`, here or where it was loaded: `Running` lets it run,
    /// and returns once QEMU says that it does, with how long ago that was; any other leaves its vCPUs as
    /// they are. Its disks are its own again either way. What somebody else has done to it since `stop` is
    /// not undone. Asking again is harmless.
    fn restore(&mut self, before: RunState) -> Result<Duration, MachineError>;

    /// Loads a device state into a QEMU that waits for one. Reads guest RAM.
    fn load(&mut self, state: &DeviceState) -> Result<(), MachineError>;

    /// Tells the network where the guest is now.
    fn announce(&mut self) -> Result<(), MachineError>;

    /// Ends the QEMU process and reaps what belongs to it. Harmless when it is gone already.
    fn destroy(&mut self) -> Result<(), MachineError>;
}

/// Who owns a VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OwnershipRecord {
    /// The owning host.
    pub owner: String,
    /// Grows by one with every change of hands.
    pub epoch: Epoch,
    /// The migration that brought it to this owner; `None` for a VM that was started or adopted here.
    pub migration: Option<MigrationId>,
}

/// The compare-and-swap by which a VM changes hands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Claim {
    /// The VM.
    pub vm: String,
    /// On behalf of which migration: makes the claim idempotent.
    pub migration: MigrationId,
    /// The epoch that the claimer believes to be current.
    pub expected: Epoch,
    /// Who wants to own it.
    pub claimer: String,
}

/// What a claim came to. Asking again with the same claim gives the same answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Claimed {
    /// The claimer owns the VM, at this epoch.
    Yours(Epoch),
    /// It belongs to somebody else now.
    Lost(OwnershipRecord),
}

/// The source's word, without which nobody can claim: this migration may bring the VM from one host to another.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// The VM.
    pub vm: String,
    /// In which migration.
    pub migration: MigrationId,
    /// The epoch at which the source owns it.
    pub expected: Epoch,
    /// The source, which may claim it back.
    pub from: String,
    /// The target, which may claim it.
    pub to: String,
}

/// The ownership record of one VM, wherever it is held. An error means: not known, ask again (I1). No answer is ever guessed
/// from how long one has waited.
pub trait Ownership: Send + Sync {
    /// What tells this record from all others: two hosts that say the same ask the same record. Empty: it is the target's.
    fn identity(&self) -> io::Result<String> {
        Ok(String::new())
    }

    /// Durable when it returns, and only then the source may promise and permit. Said again before each further pause of the same
    /// migration, which changes nothing. Where the target keeps the record, it has written that down when it prepared.
    fn offer(&self, offer: &Offer) -> io::Result<()> {
        let _ = offer;
        Ok(())
    }

    /// Claims the VM; durable when it returns.
    fn claim(&self, claim: &Claim) -> io::Result<Claimed>;
}

/// What the source promises, each durable before the method returns.
pub trait SourceJournal: Send {
    /// The coming pause is ours: a restarted agent may give the guest the state back that it has now. Said
    /// again if it turns out to have had another one.
    fn pausing(&mut self, before: RunState) -> io::Result<()>;

    /// From now on this guest runs here again only if the ownership record says so.
    fn promise(&mut self, expected: Epoch) -> io::Result<()>;

    /// The pause is over and the guest runs here, as if nothing had happened (I3).
    fn back(&mut self) -> io::Result<()>;

    /// The target owns the VM (I4). What it is still owed is kept and served.
    fn gone(&mut self, epoch: Epoch) -> io::Result<()>;

    /// The target has everything: nothing here is needed any more.
    fn settled(&mut self) -> io::Result<()>;
}

/// What the target records, each durable before the method returns.
pub trait TargetJournal: Send {
    /// These pages are still on their way when the guest starts. Before the claim, in a post-copy. None: what was recorded before, of
    /// pages and of a file, was taken back.
    fn owed(&mut self, pages: &MemorySet) -> io::Result<()>;

    /// In which state the guest will go on here. Before the claim; not said of one that runs.
    fn goes_on(&mut self, state: RunState) -> io::Result<()>;

    /// It went on: what it does from now on is its own affair, and that of its users.
    fn went_on(&mut self) -> io::Result<()>;

    /// A file has what is owed, or will have. Before the claim.
    fn spool(&mut self, record: &SpoolRecord) -> io::Result<()> {
        let _ = record;
        Ok(())
    }

    /// Nothing is owed any more.
    fn settled(&mut self) -> io::Result<()>;

    /// This side gives up and has destroyed its QEMU. `source_may_ask`: the source may have promised, so the record stays
    /// for it; otherwise no trace does.
    fn abandoned(&mut self, source_may_ask: bool) -> io::Result<()>;
}

/// What a source asks a host to take in. Comes from a peer: whoever acts on it checks it first.
#[derive(Clone, Debug)]
pub struct Request {
    /// This attempt.
    pub migration: MigrationId,
    /// The VM's name.
    pub vm: String,
    /// The source host, by its own word.
    pub from: String,
    /// The ownership that the source holds.
    pub epoch: Epoch,
    /// How to start a QEMU for it, as JSON.
    pub recipe: Vec<u8>,
    /// Its RAM blocks.
    pub blocks: Vec<Block>,
    /// RAM blocks that its QEMU keeps private, by QEMU's name for them, as they were while the guest ran: the waiting QEMU is given
    /// them at once.
    pub private: Vec<(String, Vec<u8>)>,
    /// Whether the guest may start before all its memory is there.
    pub post_copy: bool,
    /// Which ownership record decides, by its identity; empty: this host's own.
    pub record: String,
    /// How the VM's migrations went so far, by the source's word; comes with the device state.
    pub history: Vec<u8>,
}

/// A QEMU on the target that waits for a VM, with all that belongs to it.
pub struct Waiting {
    /// The guest's RAM: all holes.
    pub memory: Arc<dyn GuestMemory>,
    /// Missing pages, when the request allows post-copy.
    pub missing: Option<Arc<dyn MissingPages>>,
    /// The QEMU process.
    pub machine: Box<dyn Machine>,
    /// What this side records.
    pub journal: Box<dyn TargetJournal>,
}

/// A host that can take VMs in.
pub trait Host: Send + Sync {
    /// Its name.
    fn name(&self) -> String;

    /// Looks whether a VM can be taken in, and starts a QEMU that waits for it; or all reasons why not, and no trace.
    fn prepare(&self, request: &Request) -> Result<Waiting, Vec<String>>;

    /// Where a directory is that the source wants to share pages by, if this host may use it; or why not. May take as long as a datastore
    /// does.
    fn spool_directory(&self, asked: &str) -> Result<PathBuf, String> {
        Err(format!("this host does not use {asked}"))
    }

    /// The ownership records that this host holds.
    fn record(&self) -> Arc<dyn Ownership>;

    /// Whether a migration that no longer runs has brought its VM here, all of it.
    fn settled(&self, migration: MigrationId) -> bool;

    /// A migration is over; `arrived`: the VM runs here now.
    fn ended(&self, request: &Request, arrived: bool);
}
