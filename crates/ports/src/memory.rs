//! A guest's memory: reading and filling it, tracking and throttling its writes, serving its missing pages.

use std::{io, time::Duration};
use units::{BlockId, MemorySet, PageIndex, PageRange, PageSet};

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

    /// Copies `range` out; `into` is exactly as long as the range. The guest may write meanwhile: then the
    /// copy may be torn, and the tracker has the page again.
    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()>;

    /// Overwrites `range`; `from` is exactly as long as the range. Only for a guest that has not started.
    fn write(&self, block: BlockId, range: PageRange, from: &[u8]) -> io::Result<()>;

    /// Makes holes of `range` and verifies that they are holes.
    fn discard(&self, block: BlockId, range: PageRange) -> io::Result<()>;
}

/// A VM's memory as it was when the VM left this host: content that may come back with it. Dropping the last
/// of it gives the memory back.
///
/// Nobody writes to it; whoever copies from it verifies all the same that it is what was meant (I7).
pub trait KeptCopy: Send + Sync {
    /// The first page at or after `from` that was ever written and is still there. Looks no further than
    /// that: whoever waits to be told of a large VM's pages must not wait until all of them were looked for.
    fn first_present(&self, block: BlockId, from: PageIndex) -> io::Result<Option<PageIndex>>;

    /// Copies `range` out; `into` is exactly as long as the range. What is not there reads as zeros. Fails
    /// for good once the memory was given back because the host lacks some.
    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()>;

    /// Nobody needs these pages any more: their memory is given back.
    fn release(&self, block: BlockId, range: PageRange);
}

/// Tells which pages the guest wrote. Dropping it takes every protection back: the guest runs on at full
/// speed.
pub trait Tracker: Send {
    /// Protects all RAM. Writes from now on are seen.
    fn begin(&mut self) -> io::Result<()>;

    /// Adds to `dirty` what was written since `begin` or the last `collect`, and protects these pages again
    /// in the same instant. Whoever clears a dirty bit here owes the page (I2).
    fn collect(&mut self, dirty: &mut MemorySet) -> io::Result<()>;

    /// These blocks are handed over: their writes need no longer be seen, and from now on `collect` adds none
    /// of their pages, nor does their guest ever wait there.
    fn leave_out(&mut self, blocks: &[BlockId]) -> io::Result<()>;

    /// Whether `throttle` can come to anything.
    fn can_throttle(&self) -> bool;

    /// From now on the guest may begin to write to pages only at a share of this pace, in pages a second, at
    /// which pages are sent; so that each round leaves less than the one before (`policy::Throttle`). Said
    /// again whenever the pace changes.
    fn throttle(&mut self, sent_per_s: f64) -> io::Result<()>;

    /// Which share that is, and how long one writer may be made to wait, where it is not as usual. Said
    /// before `throttle`.
    fn agree(&mut self, share: f64, max_stall: Duration);

    /// The guest is about to be stopped: whoever is made to wait is let go at once, and nobody is made to
    /// from now on.
    fn suspend_throttling(&mut self) -> io::Result<()>;

    /// It was stopped in vain and runs on: its writers are made to wait again as they were before
    /// `suspend_throttling`.
    fn resume_throttling(&mut self);

    /// A round has been sent, and these pages of it were the same as when they were sent before: they need
    /// not have been in it.
    fn learn(&mut self, unchanged: &MemorySet);

    /// How long the guest's writers waited because of that, so far.
    fn stalls(&self) -> Stalls;

    /// Whether a writer may have to wait for us now: then whoever freezes us freezes the guest.
    fn may_make_wait(&self) -> bool;

    /// The threads that opened pages for writing since this was asked last; `None` where that is not known.
    fn writers(&mut self) -> Option<Vec<i32>>;
}

/// Has the guest's vCPUs stand still for moments, where it does not suffice that their writes wait. Only the
/// vCPUs: QEMU itself goes on; and only for moments: a vCPU may hold a lock that QEMU needs. Whatever ends us
/// ends that too. Dropping it does.
pub trait Stuns: Send {
    /// How many vCPUs there are.
    fn vcpus(&self) -> u32;

    /// From now on those of the writers that are vCPUs stand still for this share of the time, in moments of
    /// a few milliseconds; where the writers are not known, the vCPUs that fault do. Said again whenever
    /// something changes.
    fn stun(&mut self, duty: f64, writers: Option<&[i32]>) -> io::Result<()>;

    /// All run when this returns, and go on running.
    fn calm(&mut self);

    /// How long they stood still because of that, so far.
    fn stalls(&self) -> Stalls;
}

/// What it cost a guest's writers to be throttled.
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
