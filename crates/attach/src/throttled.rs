//! Tells which pages the guest wrote, and when it may go on writing.
//!
//! Here the kernel does not resolve writes by itself: a thread of ours hears of the first write to a
//! protected page and opens a group of pages around it. So the writer can be made to wait, which is the only
//! way to slow exactly those who outrun the link; and it works from Linux 5.19 on. It costs 17 to 42 µs a
//! group where the asynchronous tracker costs 1 to 2 µs a page.

use crate::{
    Ability, Error, Memory, Tracking,
    region::{self, Ram, Region},
    tracker::{SLICE, slices, take_userfaultfd},
};
use policy::{Grant, Groups, Throttle, Writer};
use ports::{Stalls, Tracker};
use std::{
    collections::HashSet,
    io,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use sys::{
    pagemap::Pagemap,
    process::PidFd,
    pulse::{Part, Pulse},
    uffd::{Features, PageFault, Uffd, Watch},
};
use units::{BlockId, Locked, MemorySet, PAGE_SIZE, PageIndex, PageRange, PageSet};

/// How long the thread waits for a fault before it looks whether it is still wanted.
const GLANCE: Duration = Duration::from_millis(50);

/// The synchronous tracker (Linux 5.19), whose writers can be throttled.
#[derive(Debug)]
pub struct ThrottlingTracker {
    shared: Arc<ThrottleState>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct ThrottleState {
    // We alone hold it: whatever ends us lifts every protection and wakes who waits.
    uffd: Uffd,
    process: Arc<PidFd>,
    memory: Arc<Memory>,
    /// Pages that may be written. A page leaves it only in the moment in which it is protected again, and is
    /// missing from then on.
    open: Mutex<MemorySet>,
    /// Where pages can lose their protection without a word: what is private, once it is thrown away.
    pagemap: Option<Mutex<Pagemap>>,
    groups: Mutex<Groups>,
    throttle: Mutex<Throttle>,
    start: Instant,
    /// What is opened after a while.
    later: Mutex<Vec<Later>>,
    stalls: Mutex<Stalls>,
    /// Threads that wrote, as their own namespace numbers them, since they were asked for.
    writers: Mutex<HashSet<u32>>,
    heard: AtomicU64,
    over: AtomicBool,
    /// Why writes are no longer seen.
    failed: Mutex<Option<io::Error>>,
}

/// Pages that are opened later.
#[derive(Debug)]
struct Later {
    due: Duration,
    block: BlockId,
    pages: PageRange,
    /// Since when somebody waits for them, for each who does.
    since: Vec<Duration>,
}

impl ThrottlingTracker {
    pub(crate) fn attach(
        process: &Arc<PidFd>,
        memory: &Arc<Memory>,
        how: &Tracking,
        pulse: &Pulse,
    ) -> Result<Self, Error> {
        let pid = process.pid();
        let uffd = take_userfaultfd(process).map_err(Error::step("get a userfaultfd", pid))?;
        let private = memory.private().is_some();
        let (more, ability) = match private {
            false => (Features::NONE, Ability::FollowShared),
            // With it came the scan that tells which pages have lost their protection.
            true => (Features::WP_UNPOPULATED, Ability::Private),
        };
        uffd.enable(Features::WP | Features::WP_SHMEM | Features::THREAD_ID | more)
            .map_err(|cause| Error::Kernel { ability, cause })?;
        let pagemap = || Pagemap::open(process).map(Mutex::new);
        let pagemap = private.then(pagemap).transpose();
        let pagemap = pagemap.map_err(Error::step("open the page tables", pid))?;
        let blocks = || memory.regions().iter().map(|region| region.block.pages);
        let shared = Arc::new(ThrottleState {
            uffd,
            process: Arc::clone(process),
            memory: Arc::clone(memory),
            open: Mutex::new(MemorySet::empty(blocks())),
            pagemap,
            groups: Mutex::new(Groups::new(blocks(), how.group)),
            throttle: Mutex::new(Throttle::new(how.max_stall, how.writers)),
            start: Instant::now(),
            later: Mutex::default(),
            stalls: Mutex::default(),
            writers: Mutex::default(),
            heard: AtomicU64::new(0),
            over: AtomicBool::new(false),
            failed: Mutex::default(),
        });
        let (serving, pulse) = (Arc::clone(&shared), pulse.clone());
        // One is enough: it never waits for anything but faults and the time.
        let thread =
            thread::Builder::new().name("throttle".into()).spawn(move || serving.serve(&pulse.part()));
        let thread = thread.map_err(Error::step("start a thread for the writes", pid))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Takes a slice of addresses over from whoever watched it before: from when this returns all writes
    /// there are seen. What was written before, nobody may know any more: all of it counts as written.
    pub(crate) fn take_over(&self, slice: Range<u64>) -> io::Result<()> {
        let Some((block, region)) = self.shared.find(slice.start) else {
            let text = format!("no guest memory is at {:#x}", slice.start);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        };
        // Nobody may open a page meanwhile: it would be taken for open, and protected behind that, and its
        // writer never go on.
        let mut open = self.shared.open.locked();
        self.shared.uffd.register(slice.clone(), Watch::Writes)?;
        open.block_mut(block).remove_range(region.pages_at(&slice));
        self.shared.uffd.protect(slice)
    }

    /// How many writes were heard of so far.
    pub fn heard(&self) -> u64 {
        self.shared.heard.load(Relaxed)
    }
}

impl Tracker for ThrottlingTracker {
    fn begin(&mut self) -> io::Result<()> {
        slices(self.shared.memory.regions()).try_for_each(|slice| self.take_over(slice))
    }

    fn collect(&mut self, dirty: &mut MemorySet) -> io::Result<()> {
        self.shared.collect(dirty)
    }

    fn leave_out(&mut self, blocks: &[BlockId]) -> io::Result<()> {
        blocks.iter().try_for_each(|id| self.shared.leave_out(*id))
    }

    fn can_throttle(&self) -> bool {
        true
    }

    fn throttle(&mut self, sent_per_s: f64) -> io::Result<()> {
        // First the groups, as everywhere.
        let mut groups = self.shared.groups.locked();
        groups.throttle(self.shared.throttle.locked().follow(sent_per_s));
        Ok(())
    }

    fn agree(&mut self, share: f64, max_stall: Duration) {
        self.shared.throttle.locked().agree(share, max_stall);
    }

    fn suspend_throttling(&mut self) -> io::Result<()> {
        // In this order: whoever is not in the list yet is not made to wait any more.
        self.shared.throttle.locked().suspend();
        self.shared.open_due(Duration::MAX)
    }

    fn resume_throttling(&mut self) {
        self.shared.throttle.locked().resume();
    }

    fn learn(&mut self, unchanged: &MemorySet) {
        self.shared.groups.locked().learn(self.shared.now(), unchanged);
    }

    fn stalls(&self) -> Stalls {
        *self.shared.stalls.locked()
    }

    fn may_make_wait(&self) -> bool {
        true
    }

    fn writers(&mut self) -> Option<Vec<i32>> {
        let inner = std::mem::take(&mut *self.shared.writers.locked());
        // One that has ended since writes no more. Threads that cannot be looked at are not known.
        let threads = self.shared.process.threads_by_inner_number().ok()?;
        Some(inner.iter().filter_map(|thread| threads.get(thread).copied()).collect())
    }
}

impl ThrottleState {
    /// Since it was attached.
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Answers writers until it is over.
    fn serve(&self, part: &Part) {
        let _lets_go = LetsGo(self);
        sys::urgent::become_urgent();
        while !self.over.load(SeqCst) {
            part.turn();
            if let Err(error) = self.serve_next() {
                // Nobody may be left waiting for an answer that does not come.
                tracing::error!(%error, "writes of the guest cannot be followed any more; it runs on, the \
                                         migration will not");
                self.failed.locked().get_or_insert(error);
                self.release();
                return;
            }
        }
    }

    fn serve_next(&self) -> io::Result<()> {
        let now = self.now();
        self.open_due(now)?;
        let next = self.later.locked().iter().map(|group| group.due.saturating_sub(now)).min();
        match self.uffd.next(next.map_or(GLANCE, |next| next.min(GLANCE)))? {
            Some(fault) => self.answer(&fault),
            None => Ok(()),
        }
    }

    /// Opens what is to be opened until then.
    fn open_due(&self, until: Duration) -> io::Result<()> {
        let due: Vec<Later> = self.later.locked().extract_if(.., |group| group.due <= until).collect();
        due.iter().try_for_each(|group| self.open_at_last(group))
    }

    /// Somebody wants to write there.
    fn answer(&self, fault: &PageFault) -> io::Result<()> {
        self.heard.fetch_add(1, Relaxed);
        let Some((block, region)) = self.find(fault.address) else {
            let text = format!("a write to {:#x}, where no guest memory is", fault.address);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        };
        self.writers.locked().insert(fault.thread);
        let page = PageIndex::at_offset(fault.address - region.addresses.start);
        if self.is_open(block, region, page)? {
            return Ok(());
        }
        let (now, writer) = (self.now(), Writer(fault.thread));
        let holds = |group: &&mut Later| {
            group.block == block && group.pages.start <= page && page < group.pages.end()
        };
        let mut later = self.later.locked();
        if let Some(group) = later.iter_mut().find(holds) {
            // Somebody else has paid for it, and may have to wait for longer.
            group.due = group.due.min(now + self.throttle.locked().join(now, writer));
            group.since.push(now);
            return Ok(());
        }
        let mut groups = self.groups.locked();
        let wish = groups.wish(block, page);
        let Grant { pages, wait } = self.throttle.locked().ask(now, writer, wish);
        let pages = groups.open(block, page, pages);
        drop(groups);
        if wait.is_zero() {
            drop(later);
            return self.open(block, pages);
        }
        later.push(Later { due: now + wait, block, pages, since: vec![now] });
        Ok(())
    }

    /// The block at an address.
    fn find(&self, address: u64) -> Option<(BlockId, &Region)> {
        let mut regions = (0..).map(BlockId).zip(self.memory.regions());
        regions.find(|(_, region)| region.addresses.contains(&address))
    }

    /// Whether somebody else opened it meanwhile; then nobody need pay for it again.
    fn is_open(&self, block: BlockId, region: &Region, page: PageIndex) -> io::Result<bool> {
        let open = self.open.locked();
        let is_open = open.block(block).contains(page);
        if is_open {
            // Under the lock: it cannot be protected again before whoever waits has been woken.
            self.uffd.wake(region.addresses_of(PageRange::new(page, 1)))?;
        }
        Ok(is_open)
    }

    fn open(&self, block: BlockId, pages: PageRange) -> io::Result<()> {
        let mut open = self.open.locked();
        let region = &self.memory.regions()[usize::from(block.0)];
        if region.is_handed_over() {
            // Whoever waited there was woken when it was left out.
            return Ok(());
        }
        // In this order: a page that can be written must be known as one (I2).
        open.block_mut(block).insert_range(pages);
        self.uffd.unprotect(region.addresses_of(pages))
    }

    /// Watches a block no more: the kernel takes its protections back, and wakes whoever waits there.
    fn leave_out(&self, id: BlockId) -> io::Result<()> {
        let region = region::get(self.memory.regions(), id)?;
        let slices: Vec<_> = slices(std::slice::from_ref(region)).collect();
        {
            // Nobody opens a page of it from here on.
            let mut open = self.open.locked();
            region.hand_over();
            *open.block_mut(id) = PageSet::empty(region.block.pages);
        }
        // What was not watched yet is let go of in vain.
        slices.into_iter().try_for_each(|slice| self.uffd.unregister(slice))
    }

    /// Opens what somebody has waited for.
    fn open_at_last(&self, group: &Later) -> io::Result<()> {
        self.open(group.block, group.pages)?;
        let now = self.now();
        let mut stalls = self.stalls.locked();
        for waited in group.since.iter().map(|since| now - *since) {
            stalls.count += 1;
            stalls.total += waited;
            stalls.longest = stalls.longest.max(waited);
        }
        Ok(())
    }

    fn collect(&self, dirty: &mut MemorySet) -> io::Result<()> {
        if let Some(error) = self.failed.locked().as_ref() {
            return Err(io::Error::new(error.kind(), error.to_string()));
        }
        let blocks = (0..).map(BlockId).zip(self.memory.regions());
        for (id, region) in blocks.filter(|(_, region)| !region.is_handed_over()) {
            // Slice by slice, because nobody may open a page meanwhile.
            for slice in PageRange::new(PageIndex(0), region.block.pages).pieces(SLICE / PAGE_SIZE as u64) {
                let mut open = self.open.locked();
                self.find_unprotected(region, slice, open.block_mut(id))?;
                let runs: Vec<PageRange> = open.block(id).runs_within(slice).collect();
                for run in runs {
                    // Unacknowledged before it is protected: should that fail, it may have been written.
                    dirty.block_mut(id).insert_range(run);
                    self.uffd.protect(region.addresses_of(run))?;
                    open.block_mut(id).remove_range(run);
                }
            }
        }
        if self.process.is_alive()? {
            return Ok(());
        }
        let text = format!("process {} has ended", self.process.pid());
        Err(io::Error::new(io::ErrorKind::NotConnected, text))
    }

    /// Adds the pages that have lost their protection and were written without a word since. One that loses
    /// it only now is found the next time: nobody has opened it, so it stays in nobody's list.
    fn find_unprotected(&self, region: &Region, slice: PageRange, open: &mut PageSet) -> io::Result<()> {
        let (Some(pagemap), Ram::Private(_)) = (&self.pagemap, &region.ram) else { return Ok(()) };
        let found = |run: Range<u64>| open.insert_range(region.pages_at(&run));
        pagemap.locked().unprotected(region.addresses_of(slice), found)
    }

    /// Takes every protection back.
    fn release(&self) {
        // What is not registered (any more) has none.
        slices(self.memory.regions()).for_each(|slice| drop(self.uffd.unprotect(slice)));
    }
}

/// Nobody waits for a thread that ended in a panic.
struct LetsGo<'a>(&'a ThrottleState);

impl Drop for LetsGo<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let why = || io::Error::other("the thread that answers the guest's writers has failed");
            self.0.failed.locked().get_or_insert_with(why);
            self.0.release();
        }
    }
}

impl Drop for ThrottlingTracker {
    fn drop(&mut self) {
        self.shared.over.store(true, SeqCst);
        self.shared.release();
        if let Some(thread) = self.thread.take() {
            // Only its panic could be told here, and that was printed.
            let _ = thread.join();
        }
        // Whoever came between the two is woken by the descriptor's end.
    }
}
