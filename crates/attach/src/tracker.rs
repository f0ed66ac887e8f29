//! Tells which pages the guest wrote, with the kernel resolving the writes by itself.
//!
//! `UFFD_FEATURE_WP_ASYNC` lets the first write to a protected page through and remembers it in the page
//! tables; one `PAGEMAP_SCAN` reads that and protects again, atomically. Writes of vCPUs, of any other thread
//! and of system calls (`read(2)` into guest RAM) are all seen, for they go through the process' page tables.
//! What does not: direct I/O whose pages were pinned before, which the VMM keeps from taking place while a VM
//! is moved, and other processes, which are refused elsewhere.

use crate::{
    Ability, Error, Memory, content,
    discards::Discards,
    populated::{Piece, Populated, divide},
    region::{self, Ram, Region},
};
use ports::{GuestMemory, Stalls, Tracker};
use std::{
    fs, io,
    ops::Range,
    sync::Arc,
    thread::{self, available_parallelism},
    time::Duration,
};
use sys::{
    inject::Borrowed,
    maps,
    pagemap::Pagemap,
    proc,
    process::PidFd,
    pulse::Pulse,
    uffd::{Features, Uffd, Watch},
};
use units::{BlockId, MemorySet, PageSet};

/// How much is protected at once. The guest's page faults wait for one slice at most: 64 MiB take about a
/// millisecond.
pub(crate) const SLICE: u64 = 64 << 20;

/// Threads that scan, at most: beyond, they wait for each other in the kernel.
const MOST_SCANS: usize = 8;

/// What one thread scans at least: 2.4 ms. Less is done before another thread has begun.
const WORTH: u64 = 2 << 30;

/// The asynchronous tracker (Linux 6.7).
#[derive(Debug)]
pub struct AsyncTracker {
    /// What the process throws away, if it does: ended before the descriptor is closed.
    discards: Option<Discards>,
    // We alone hold it: whatever ends us lifts every protection, and the guest runs on.
    uffd: Arc<Uffd>,
    /// One for each thread that scans; the first one is always there.
    pagemaps: Vec<Pagemap>,
    process: Arc<PidFd>,
    memory: Arc<Memory>,
    watching: bool,
    /// What of each block is protected and scanned.
    populated: Vec<Populated>,
    /// Whether what is private may be thrown away.
    discards_private: bool,
    /// Which blocks may lose pages without a word to us, and what was there when it was looked last.
    silent: Vec<bool>,
    there: Vec<Option<PageSet>>,
}

impl AsyncTracker {
    /// `discards`: the process may throw memory away meanwhile, and then waits for a thread that shows there
    /// that it gets on.
    pub(crate) fn attach(
        process: &Arc<PidFd>,
        memory: &Arc<Memory>,
        discards: Option<&Pulse>,
    ) -> Result<Self, Error> {
        let pid = process.pid();
        let uffd = take_userfaultfd(process).map_err(Error::step("get a userfaultfd", pid))?;
        let features = Features::WP | Features::WP_SHMEM | Features::WP_UNPOPULATED | Features::WP_ASYNC;
        // What is private shows in a scan whatever becomes of it.
        let shared = |region: &Region| matches!(region.ram, Ram::Shared(_)) && region.huge.is_none();
        let silent = silent(process, memory, discards.is_some());
        let silent = silent.map_err(Error::step("look at the memory", pid))?;
        let discards_private = discards.is_some();
        let discards = discards.filter(|_| memory.regions().iter().any(shared));
        let (more, ability) = match discards {
            None => (Features::NONE, Ability::TrackShared),
            Some(_) => (Features::DISCARDS, Ability::Discards),
        };
        uffd.enable(features | more).map_err(|cause| Error::Kernel { ability, cause })?;
        let uffd = Arc::new(uffd);
        let discards = discards.map(|pulse| Discards::hear(&uffd, pulse)).transpose();
        let discards = discards.map_err(Error::step("start a thread for what is thrown away", pid))?;
        let populated = memory.regions().iter().map(content::unknown).collect::<io::Result<_>>();
        let populated = populated.map_err(Error::step("look at the memory", pid))?;
        let threads = available_parallelism().map_or(1, usize::from).min(MOST_SCANS);
        let pagemaps = (0..threads).map(|_| Pagemap::open(process)).collect::<io::Result<_>>();
        let pagemaps = pagemaps.map_err(Error::step("open the page tables", pid))?;
        Ok(Self {
            discards,
            uffd,
            pagemaps,
            process: Arc::clone(process),
            memory: Arc::clone(memory),
            watching: false,
            populated,
            discards_private,
            silent,
            there: Vec::new(),
        })
    }
}

impl AsyncTracker {
    /// Watches a slice no more; what was written there and not collected is forgotten. All slices are to
    /// follow.
    pub(crate) fn let_go(&mut self, slice: Range<u64>) -> io::Result<()> {
        // The kernel would lift a protection for whoever asks, be it another's by then.
        self.watching = false;
        self.uffd.unregister(slice)
    }

    /// What is populated, in pieces.
    fn protected(&self) -> impl Iterator<Item = Range<u64>> {
        let blocks = self.memory.regions().iter().zip(&self.populated);
        blocks.flat_map(|(region, populated)| {
            populated.runs().iter().flat_map(move |run| slices_of(run, region))
        })
    }

    /// Protects what holds something by now and did not before. All of it counts as written, where somebody
    /// asks. Protected first: what is written after that is in the next scan, what was before is content.
    fn find_new(&mut self, mut dirty: Option<&mut MemorySet>) -> io::Result<()> {
        let Self { uffd, pagemaps, memory, populated, .. } = self;
        for (id, (region, populated)) in memory.regions().iter().zip(populated).enumerate() {
            if region.is_handed_over() {
                continue;
            }
            let mut new = Populated::none(region.watched(), populated.part());
            for gap in populated.gaps() {
                content::find(region, &mut pagemaps[0], &gap, &mut new)?;
            }
            for run in new.runs() {
                slices_of(run, region).try_for_each(|slice| uffd.protect(slice))?;
                if let Some(dirty) = &mut dirty {
                    let set = dirty.block_mut(BlockId(id as u16));
                    content::pages(region, &mut pagemaps[0], run, |pages| set.insert_range(pages))?;
                }
                populated.add(run);
            }
        }
        Ok(())
    }

    /// Scans what is populated, on several threads where that pays, and protects it again. What was found
    /// before something failed is in the set all the same: nobody else knows of it any more (I2).
    fn take_written(&mut self, dirty: &mut MemorySet) -> io::Result<()> {
        let bytes: u64 = self.populated.iter().map(Populated::bytes).sum();
        let workers = (bytes / WORTH).clamp(1, self.pagemaps.len() as u64);
        let regions = self.memory.regions();
        let mut insert = |block: usize, run: &Range<u64>| {
            dirty.block_mut(BlockId(block as u16)).insert_range(regions[block].pages_at(run));
        };
        let shares = divide(&self.populated, workers);
        if let [all] = &shares[..] {
            return scan(&mut self.pagemaps[0], all, insert);
        }
        let mut outcome = Ok(());
        thread::scope(|scope| {
            let scans = self.pagemaps.iter_mut().zip(&shares).map(|(pagemap, share)| {
                let thread = thread::Builder::new().name("scan".into());
                thread.spawn_scoped(scope, move || collect_runs(pagemap, share))
            });
            // All of them at once.
            let scans: Vec<_> = scans.collect();
            for scan in scans {
                let panicked = |_| (vec![], Err(io::Error::other("a scan has panicked")));
                let (found, done) = match scan {
                    Ok(scan) => scan.join().unwrap_or_else(panicked),
                    Err(no_thread) => (vec![], Err(no_thread)),
                };
                found.iter().for_each(|(block, run)| insert(*block, run));
                if done.is_err() {
                    outcome = done;
                }
            }
        });
        outcome
    }

    /// Adds private memory that was thrown away with its page table. An entry that is none counts as written
    /// in a scan; without a table there is no entry, and the scan skips it (kernels until the middle of
    /// 2026): a transparent huge page that is given up as a whole, or a table that the kernel frees once
    /// nothing is left in it (`CONFIG_PT_RECLAIM`).
    fn find_dropped(&mut self, dirty: &mut MemorySet) -> io::Result<()> {
        let Self { pagemaps, memory, populated, discards_private, .. } = self;
        for (id, (region, populated)) in memory.regions().iter().zip(populated).enumerate() {
            if !*discards_private || !content::is_private(region) {
                continue;
            }
            let mut there = Populated::none(region.watched(), populated.part());
            for run in populated.runs() {
                // Whatever was protected has an entry, a marker at least.
                pagemaps[0].maybe_mapped(run.clone(), |run| there.add(&run))?;
            }
            for dropped in populated.without(&there) {
                dirty.block_mut(BlockId(id as u16)).insert_range(region.pages_at(&dropped));
            }
            // What is written there from now on is found as new.
            *populated = there;
        }
        Ok(())
    }

    /// Adds the pages that were thrown away since it was looked last, where nobody tells: such a page is
    /// zeros, its protection outlives it, and no scan for written pages shows it.
    fn find_vanished(&mut self, mut dirty: Option<&mut MemorySet>) -> io::Result<()> {
        let mut now = Vec::new();
        for (id, (region, silent)) in self.memory.regions().iter().zip(&self.silent).enumerate() {
            now.push(match &region.huge {
                _ if !silent || region.is_handed_over() => None,
                // Those that are mapped will do: one that is being moved, and taken for gone, is sent once
                // more.
                Some(huge) => {
                    let mut set = PageSet::empty(region.block.pages);
                    huge.mapped()?.iter().for_each(|run| set.insert_range(region.pages_at(run)));
                    Some(set)
                }
                None => Some(self.memory.present(BlockId(id as u16))?),
            });
        }
        for (id, (before, now)) in self.there.iter().zip(&now).enumerate() {
            if let (Some(before), Some(now), Some(dirty)) = (before, now, &mut dirty) {
                let mut vanished = before.clone();
                vanished.subtract(now);
                dirty.block_mut(BlockId(id as u16)).union(&vanished);
            }
        }
        self.there = now;
        Ok(())
    }
}

/// Which blocks the process may throw pages of away without a word to whoever watches them. Of huge pages it
/// only punches holes into the file, and where memory is locked (`mlockall`) the kernel does the same and
/// refuses the rest, which would be told.
fn silent(process: &PidFd, memory: &Memory, discards: bool) -> io::Result<Vec<bool>> {
    // To ask of each mapping takes the kernel a walk through all of its page tables; of the process, nothing.
    let discards = discards && has_locked(process)?;
    let is_silent = |region: &Region| match (&region.ram, &region.huge) {
        (_, Some(_)) => Ok(true),
        (Ram::Shared(_), None) if discards => {
            Ok(maps::flags_at(process, region.addresses.start)?.iter().any(|flag| flag == "lo"))
        }
        _ => Ok(false),
    };
    memory.regions().iter().map(is_silent).collect()
}

/// Whether any of its memory is locked.
fn has_locked(process: &PidFd) -> io::Result<bool> {
    let status = fs::read_to_string(process.proc_path("status"))?;
    Ok(proc::value(&status, "VmLck").is_some_and(|locked| locked != "0 kB"))
}

/// Makes a userfaultfd in the process, takes it, and closes it there before anything can be registered with
/// it.
pub(crate) fn take_userfaultfd(process: &Arc<PidFd>) -> io::Result<Uffd> {
    let borrowed = Borrowed::seize(process)?;
    let n = borrowed.userfaultfd()?;
    let taken = Uffd::take(process, n);
    borrowed.close(n)?;
    taken
}

impl Tracker for AsyncTracker {
    fn begin(&mut self) -> io::Result<()> {
        if !self.watching {
            for region in self.memory.regions().iter().filter(|region| !region.is_handed_over()) {
                self.uffd.register(region.watched(), Watch::Writes)?;
            }
            self.watching = true;
        }
        self.protected().try_for_each(|slice| self.uffd.protect(slice))?;
        self.find_new(None)?;
        self.find_vanished(None)
    }

    fn collect(&mut self, dirty: &mut MemorySet) -> io::Result<()> {
        self.take_written(dirty)?;
        self.find_dropped(dirty)?;
        self.find_new(Some(dirty))?;
        self.find_vanished(Some(dirty))?;
        // After the scan: what is thrown away behind it is written, or told of the next time.
        if let Some(discards) = &self.discards {
            discards.collect(self.memory.regions(), dirty)?;
        }
        // The page tables of a process that ended are empty, which must not pass for a guest that writes
        // nothing.
        if self.process.is_alive()? {
            return Ok(());
        }
        let text = format!("process {} has ended", self.process.pid());
        Err(io::Error::new(io::ErrorKind::NotConnected, text))
    }

    fn leave_out(&mut self, blocks: &[BlockId]) -> io::Result<()> {
        for id in blocks {
            let region = region::get(self.memory.regions(), *id)?;
            // Before it counts as handed over: then it has no slices any more.
            let watched = slices(std::slice::from_ref(region)).filter(|_| self.watching);
            watched.collect::<Vec<_>>().into_iter().try_for_each(|slice| self.uffd.unregister(slice))?;
            region.hand_over();
            // Nothing of it is scanned nor protected from here on: somebody else may watch it by then.
            let populated = &mut self.populated[usize::from(id.0)];
            *populated = Populated::none(region.watched(), populated.part());
        }
        Ok(())
    }

    fn can_throttle(&self) -> bool {
        false
    }

    fn throttle(&mut self, _: f64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn agree(&mut self, _: f64, _: Duration) {}

    fn suspend_throttling(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn resume_throttling(&mut self) {}

    fn learn(&mut self, _: &MemorySet) {}

    fn stalls(&self) -> Stalls {
        Stalls::default()
    }

    fn may_make_wait(&self) -> bool {
        self.discards.is_some()
    }

    fn writers(&mut self) -> Option<Vec<i32>> {
        // The kernel lets them write and tells nobody who they are.
        None
    }
}

impl Drop for AsyncTracker {
    fn drop(&mut self) {
        self.discards = None;
        // Closing the descriptor would do, but in one go, with the guest's page faults waiting for all of it.
        if self.watching {
            // As far as it goes.
            self.protected().for_each(|slice| drop(self.uffd.unprotect(slice)));
        }
    }
}

/// What was written of these pieces, by block; and whether that is all.
fn collect_runs(pagemap: &mut Pagemap, pieces: &[Piece]) -> (Vec<(usize, Range<u64>)>, io::Result<()>) {
    let mut found = Vec::new();
    let done = scan(pagemap, pieces, |block, run| found.push((block, run.clone())));
    (found, done)
}

/// Takes what was written of these pieces.
fn scan(
    pagemap: &mut Pagemap,
    pieces: &[Piece],
    mut found: impl FnMut(usize, &Range<u64>),
) -> io::Result<()> {
    pieces.iter().try_for_each(|Piece { block, addresses }| {
        pagemap.take_written(addresses.clone(), |run| found(*block, &run))
    })
}

/// What is tracked, in pieces.
pub(crate) fn slices(regions: &[Region]) -> impl Iterator<Item = Range<u64>> {
    let tracked = regions.iter().filter(|region| !region.is_handed_over());
    tracked.flat_map(|region| slices_of(&region.watched(), region))
}

/// The slices of `run`, which is some of a block.
fn slices_of(run: &Range<u64>, region: &Region) -> impl Iterator<Item = Range<u64>> + use<> {
    let Range { start, end } = *run;
    // No huge page can be protected in pieces.
    let slice = SLICE.max(region.page_bytes());
    (start..end).step_by(slice as usize).map(move |at| at..end.min(at + slice))
}
