//! Tells which pages the guest wrote, and when it may go on writing.
//!
//! Here the kernel does not resolve writes by itself: a thread of ours hears of the first write to a protected page and opens a
//! group of pages around it. So the writer can be made to wait, which is the only way to slow exactly those who outrun the link;
//! and it works from Linux 5.19 on. It costs 17 to 42 µs a group where the asynchronous tracker costs 1 to 2 µs a page.

use super::{
    Error, Memory,
    region::Region,
    tracker::{SLICE, slices, take_userfaultfd},
};
use engine::ports::{Stalls, Tracker};
use policy::{Governor, Grant};
use std::{
    collections::VecDeque,
    io,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use sys::{
    process::PidFd,
    uffd::{Features, Uffd, Watch},
};
use units::{BlockId, MemorySet, PAGE_SIZE, PageIndex, PageRange};

/// Pages that are opened at once, at least, while nobody is to be slowed. A native-speed writer over 512 MiB is back at full speed
/// 0.25 s after everything was protected with 64, 0.13 s with 512; larger groups have more pages looked at that did not change.
const GROUP: u64 = 64;

/// Pages that are opened at once, at most.
const LARGEST: u64 = 512;

/// So many groups are remembered, of several writers that go upwards at a time.
const GROUPS: usize = 64;

/// How long a thread waits for a fault before it looks whether it is still wanted.
const GLANCE: Duration = Duration::from_millis(50);

/// The synchronous tracker (Linux 5.19), whose writers can be governed.
#[derive(Debug)]
pub struct GovernedTracker {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    // We alone hold it: whatever ends us lifts every protection and wakes who waits.
    uffd: Uffd,
    process: Arc<PidFd>,
    memory: Arc<Memory>,
    /// Pages that may be written. A page leaves it only in the moment in which it is protected again, and is owed from then on.
    open: Mutex<MemorySet>,
    groups: Mutex<Groups>,
    governor: Mutex<Governor>,
    start: Instant,
    stalls: Mutex<Stalls>,
    over: AtomicBool,
    /// Why writes are no longer seen.
    failed: Mutex<Option<io::Error>>,
}

impl GovernedTracker {
    /// For a guest of which so many threads may write at a time; nobody is made to wait longer than `max_stall` at a time.
    pub(super) fn attach(
        process: &Arc<PidFd>,
        memory: &Arc<Memory>,
        writers: u32,
        max_stall: Duration,
    ) -> Result<Self, Error> {
        let pid = process.pid();
        let uffd = take_userfaultfd(process).map_err(Error::step("get a userfaultfd", pid))?;
        uffd.enable(Features::WP | Features::WP_SHMEM).map_err(|cause| Error::Kernel {
            what: "tell of writes",
            needs: "write protection of shared memory came with Linux 5.19",
            cause,
        })?;
        let blocks = memory.regions().iter().map(|region| region.block.pages);
        let shared = Arc::new(Shared {
            uffd,
            process: Arc::clone(process),
            memory: Arc::clone(memory),
            open: Mutex::new(MemorySet::empty(blocks)),
            groups: Mutex::default(),
            governor: Mutex::new(Governor::new(max_stall, writers)),
            start: Instant::now(),
            stalls: Mutex::default(),
            over: AtomicBool::new(false),
            failed: Mutex::default(),
        });
        let mut tracker = Self { shared, threads: Vec::new() };
        // One more than may write: QEMU's own threads write too.
        for n in 0..=writers {
            let shared = tracker.shared.clone();
            let thread = thread::Builder::new().name(format!("govern-{n}")).spawn(move || shared.serve());
            tracker.threads.push(thread.map_err(Error::step("start a thread for the writes", pid))?);
        }
        Ok(tracker)
    }

    /// Takes a slice of addresses over from whoever watched it before: from when this returns all writes there are seen. What
    /// was written before, nobody may know any more: all of it counts as written.
    pub(super) fn take_over(&self, slice: Range<u64>) -> io::Result<()> {
        self.shared.uffd.register(slice.clone(), Watch::Writes)?;
        self.shared.uffd.protect(slice)
    }
}

impl Tracker for GovernedTracker {
    fn begin(&mut self) -> io::Result<()> {
        slices(self.shared.memory.regions()).try_for_each(|slice| self.take_over(slice))
    }

    fn collect(&mut self, dirty: &mut MemorySet) -> io::Result<()> {
        self.shared.collect(dirty)
    }

    fn govern(&mut self, sent_per_s: f64) -> io::Result<()> {
        locked(&self.shared.governor).follow(sent_per_s);
        // What is opened is counted now: nothing beyond what somebody is sure to write.
        locked(&self.shared.groups).least = 1;
        Ok(())
    }

    fn stalls(&self) -> Stalls {
        *locked(&self.shared.stalls)
    }
}

impl Shared {
    /// Answers writers until it is over.
    fn serve(&self) {
        while !self.over.load(SeqCst) {
            let served = self.uffd.next(GLANCE).and_then(|fault| match fault {
                Some(fault) => self.answer(fault.address),
                None => Ok(()),
            });
            if let Err(error) = served {
                // Nobody may be left waiting for an answer that does not come.
                tracing::error!(%error, "writes of the guest cannot be followed any more; it runs on, the migration will not");
                locked(&self.failed).get_or_insert(error);
                self.release();
                return;
            }
        }
    }

    /// Somebody wants to write there.
    fn answer(&self, address: u64) -> io::Result<()> {
        let asked = Instant::now();
        let regions = self.memory.regions();
        let at = regions.iter().position(|region| region.addresses.contains(&address));
        let Some((id, region)) = at.map(|at| (BlockId(at as u16), &regions[at])) else {
            let text = format!("a write to {address:#x}, where no guest memory is");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        };
        let page = PageIndex::at_offset(address - region.addresses.start);
        if self.is_open(id, region, page)? {
            return Ok(());
        }
        let wish = locked(&self.groups).wish(id, page);
        let Grant { pages, wait } = locked(&self.governor).ask(self.start.elapsed(), wish);
        thread::sleep(wait);
        // No further than its slice: the next one may not have been taken over yet.
        let slice = SLICE / PAGE_SIZE as u64;
        let end = region.block.pages.min((page.0 / slice + 1) * slice);
        let group = PageRange::new(page, pages.min(end - page.0));
        locked(&self.groups).opened(id, group);
        self.open(id, region, group)?;
        if !wait.is_zero() {
            let waited = asked.elapsed();
            let mut stalls = locked(&self.stalls);
            stalls.count += 1;
            stalls.total += waited;
            stalls.longest = stalls.longest.max(waited);
        }
        Ok(())
    }

    /// Whether somebody else opened it meanwhile; then nobody need pay for it again.
    fn is_open(&self, id: BlockId, region: &Region, page: PageIndex) -> io::Result<bool> {
        let open = locked(&self.open);
        let is_open = open.block(id).contains(page);
        if is_open {
            // It may be protected all the same: where a slice is just taken over, that passes over pages that were opened ahead of
            // it. Under the lock: it cannot be protected again before whoever waits has been woken.
            self.uffd.unprotect(region.addresses_of(PageRange::new(page, 1)))?;
        }
        Ok(is_open)
    }

    fn open(&self, id: BlockId, region: &Region, group: PageRange) -> io::Result<()> {
        let mut open = locked(&self.open);
        // In this order: a page that can be written must be known as one (I2).
        open.block_mut(id).insert_range(group);
        self.uffd.unprotect(region.addresses_of(group))
    }

    fn collect(&self, dirty: &mut MemorySet) -> io::Result<()> {
        if let Some(error) = locked(&self.failed).as_ref() {
            return Err(io::Error::new(error.kind(), error.to_string()));
        }
        for (id, region) in self.memory.regions().iter().enumerate() {
            let id = BlockId(id as u16);
            // Slice by slice, because nobody may open a page meanwhile.
            for slice in PageRange::new(PageIndex(0), region.block.pages).pieces(SLICE / PAGE_SIZE as u64) {
                let mut open = locked(&self.open);
                let runs: Vec<PageRange> = open.block(id).runs_within(slice).collect();
                for run in runs {
                    // Owed before it is protected: should that fail, it may have been written.
                    dirty.block_mut(id).insert_range(run);
                    self.uffd.protect(region.addresses_of(run))?;
                    open.block_mut(id).remove_range(run);
                }
            }
        }
        if self.process.is_alive()? {
            return Ok(());
        }
        let text = format!("QEMU process {} has ended", self.process.pid());
        Err(io::Error::new(io::ErrorKind::NotConnected, text))
    }

    /// Takes every protection back.
    fn release(&self) {
        // What is not registered (any more) has none.
        slices(self.memory.regions()).for_each(|slice| drop(self.uffd.unprotect(slice)));
    }
}

impl Drop for GovernedTracker {
    fn drop(&mut self) {
        self.shared.over.store(true, SeqCst);
        self.shared.release();
        for thread in self.threads.drain(..) {
            // Only its panic could be told here, and that was printed.
            let _ = thread.join();
        }
        // Whoever came between the two is woken by the descriptor's end.
    }
}

/// How many pages are opened together: twice as many each time for a writer that goes upwards, which meets its next group at
/// the end of the last; few for one that writes here and there.
#[derive(Debug)]
struct Groups {
    least: u64,
    /// Where the last ones ended, and how long they were.
    ends: VecDeque<(BlockId, PageIndex, u64)>,
}

impl Default for Groups {
    fn default() -> Self {
        Self { least: GROUP, ends: VecDeque::new() }
    }
}

impl Groups {
    /// How many pages are best opened for a write to this one.
    fn wish(&mut self, block: BlockId, page: PageIndex) -> u64 {
        let before = self.ends.iter().position(|(b, end, _)| (*b, *end) == (block, page));
        let before = before.and_then(|at| self.ends.remove(at)).map_or(0, |(.., pages)| pages);
        (before * 2).clamp(self.least, LARGEST)
    }

    fn opened(&mut self, block: BlockId, group: PageRange) {
        if self.ends.len() == GROUPS {
            self.ends.pop_front();
        }
        self.ends.push_back((block, group.end(), group.count));
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_grow_for_who_goes_upwards_and_for_nobody_else() {
        let mut groups = Groups { least: 1, ..Groups::default() };
        let mut write = |block, page| {
            let pages = groups.wish(BlockId(block), PageIndex(page));
            groups.opened(BlockId(block), PageRange::new(PageIndex(page), pages));
            pages
        };
        let (mut up, mut grown) = (1000, vec![]);
        for n in 0..12 {
            let pages = write(0, up);
            grown.push(pages);
            up += pages;
            // Somebody else writes here and there, and in another block.
            assert_eq!(write(0, 100_000 + n * 7919), 1);
            assert_eq!(write(1, up), 1);
        }
        assert_eq!(grown, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 512, 512]);
    }

    #[test]
    fn where_nobody_is_slowed_groups_are_never_small() {
        let mut groups = Groups::default();
        assert_eq!(groups.wish(BlockId(0), PageIndex(7)), GROUP);
        (0..1000).for_each(|page| groups.opened(BlockId(0), PageRange::new(PageIndex(page), 1)));
        assert_eq!(groups.ends.len(), GROUPS, "it is bounded");
    }
}
