//! Tells which pages the guest wrote, with the kernel resolving the writes by itself.
//!
//! `UFFD_FEATURE_WP_ASYNC` lets the first write to a protected page through and remembers it in the page
//! tables; one `PAGEMAP_SCAN` reads that and protects again, atomically. Writes of vCPUs, of any other thread
//! and of system calls (`read(2)` into guest RAM) are all seen, for they go through the process' page tables.
//! What does not: direct I/O whose pages were pinned before, which the VMM keeps from taking place while a VM
//! is moved, and other processes, which are refused elsewhere.

use crate::{
    Ability, Error, Memory,
    discards::Discards,
    region::{Ram, Region},
};
use ports::{GuestMemory, Stalls, Tracker};
use std::{fs, io, ops::Range, sync::Arc, time::Duration};
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

/// The asynchronous tracker (Linux 6.7).
#[derive(Debug)]
pub struct AsyncTracker {
    /// What the process throws away, if it does: ended before the descriptor is closed.
    discards: Option<Discards>,
    // We alone hold it: whatever ends us lifts every protection, and the guest runs on.
    uffd: Arc<Uffd>,
    pagemap: Pagemap,
    process: Arc<PidFd>,
    memory: Arc<Memory>,
    watching: bool,
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
        let discards = discards.filter(|_| memory.regions().iter().any(shared));
        let (more, ability) = match discards {
            None => (Features::NONE, Ability::TrackShared),
            Some(_) => (Features::DISCARDS, Ability::Discards),
        };
        uffd.enable(features | more).map_err(|cause| Error::Kernel { ability, cause })?;
        let uffd = Arc::new(uffd);
        let discards = discards.map(|pulse| Discards::hear(&uffd, pulse)).transpose();
        let discards = discards.map_err(Error::step("start a thread for what is thrown away", pid))?;
        let pagemap = Pagemap::open(process).map_err(Error::step("open the page tables", pid))?;
        Ok(Self {
            discards,
            uffd,
            pagemap,
            process: Arc::clone(process),
            memory: Arc::clone(memory),
            watching: false,
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

    /// Adds the pages that were thrown away since it was looked last, where nobody tells: such a page is
    /// zeros, its protection outlives it, and no scan for written pages shows it.
    fn find_vanished(&mut self, mut dirty: Option<&mut MemorySet>) -> io::Result<()> {
        let mut now = Vec::new();
        for (id, (region, silent)) in self.memory.regions().iter().zip(&self.silent).enumerate() {
            now.push(match &region.huge {
                _ if !silent => None,
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
            for region in self.memory.regions() {
                self.uffd.register(region.watched(), Watch::Writes)?;
            }
            self.watching = true;
        }
        slices(self.memory.regions()).try_for_each(|slice| self.uffd.protect(slice))?;
        self.find_vanished(None)
    }

    fn collect(&mut self, dirty: &mut MemorySet) -> io::Result<()> {
        for (id, region) in self.memory.regions().iter().enumerate() {
            let set = dirty.block_mut(BlockId(id as u16));
            self.pagemap.take_written(region.watched(), |run| set.insert_range(region.pages_at(&run)))?;
        }
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
            drop(slices(self.memory.regions()).try_for_each(|slice| self.uffd.unprotect(slice)));
        }
    }
}

pub(crate) fn slices(regions: &[Region]) -> impl Iterator<Item = Range<u64>> {
    regions.iter().flat_map(|region| {
        let Range { start, end } = region.watched();
        // No huge page can be protected in pieces.
        let slice = SLICE.max(region.page_bytes());
        (start..end).step_by(slice as usize).map(move |at| at..end.min(at + slice))
    })
}
