//! Missing pages of a guest that runs before all its memory is there.

use crate::{
    Ability, Error, Memory,
    region::{self, Region},
};
use ports::{Fault, MissingPages, Placed};
use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};
use sys::{
    inject::Borrowed,
    process::PidFd,
    uffd::{Copied, Features, Uffd, Watch},
};
use units::{BlockId, Locked, PAGE_SIZE, PageIndex, PageRange};

/// `MADV_HUGEPAGE` of Linux.
const HUGE_PAGES: i32 = 14;

/// The holes of a target's RAM. Dropped without [`MissingPages::finish`], the guest still waits at every
/// hole: only a successor that retakes it can let it go on.
#[derive(Debug)]
pub struct Missing {
    uffd: Uffd,
    // The process holds the descriptor too, under this number: whatever ends us, its guest never reads zeros
    // for what is missing.
    fd_number: i32,
    process: Arc<PidFd>,
    memory: Arc<Memory>,
    huge: Vec<bool>,
    finished: Mutex<bool>,
}

impl Missing {
    pub(crate) fn begin(process: &Arc<PidFd>, memory: &Arc<Memory>, huge: &[bool]) -> Result<Self, Error> {
        let step = || Error::step("get a userfaultfd", process.pid());
        let borrowed = Borrowed::seize(process).map_err(step())?;
        let fd_number = borrowed.userfaultfd().map_err(step())?;
        let begun = Self::watch(process, memory, huge, fd_number);
        if begun.is_err() {
            // Nothing is registered then, or the registration ends with the descriptor.
            drop(borrowed.close(fd_number));
        }
        begun
    }

    fn watch(
        process: &Arc<PidFd>,
        memory: &Arc<Memory>,
        huge: &[bool],
        fd_number: i32,
    ) -> Result<Self, Error> {
        let missing = Self::retake(process, memory, huge, fd_number)?;
        missing
            .uffd
            .enable(Features::MISSING_SHMEM)
            .map_err(|cause| Error::Kernel { ability: Ability::Missing, cause })?;
        // What was handed over lacks nothing.
        for region in memory.regions().iter().filter(|region| !region.is_handed_over()) {
            let name = &region.block.name;
            let step = Error::step(format!("watch RAM block {name}"), process.pid());
            missing.uffd.register(region.addresses.clone(), Watch::Missing).map_err(step)?;
        }
        Ok(missing)
    }

    pub(crate) fn retake(
        process: &Arc<PidFd>,
        memory: &Arc<Memory>,
        huge: &[bool],
        fd_number: i32,
    ) -> Result<Self, Error> {
        let step = Error::step(format!("take userfaultfd {fd_number}"), process.pid());
        Ok(Self {
            uffd: Uffd::take(process, fd_number).map_err(step)?,
            fd_number,
            process: Arc::clone(process),
            memory: Arc::clone(memory),
            huge: huge.to_vec(),
            finished: Mutex::new(false),
        })
    }

    /// The descriptor's number in the process: what a restarted agent needs to
    /// [`retake`](super::Target::retake) it.
    pub fn fd_number(&self) -> i32 {
        self.fd_number
    }

    pub(crate) fn wake_all(&self) -> io::Result<()> {
        self.memory.regions().iter().try_for_each(|region| self.uffd.wake(region.addresses.clone()))
    }

    fn region(&self, block: BlockId, range: PageRange) -> io::Result<&Region> {
        let region = region::get(self.memory.regions(), block)?;
        if region.is_handed_over() {
            let text =
                format!("RAM block {} was handed over: none of its pages is missing", region.block.name);
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        if range.fits(region.block.pages) {
            return Ok(region);
        }
        let text =
            format!("{range} of RAM block {}, which has {} pages", region.block.name, region.block.pages);
        Err(io::Error::new(io::ErrorKind::InvalidInput, text))
    }

    fn wake(&self, region: &Region, range: PageRange) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.uffd.wake(region.addresses_of(range))
    }
}

impl MissingPages for Missing {
    fn next(&self, wait: Duration) -> io::Result<Option<Fault>> {
        let Some(fault) = self.uffd.next(wait)? else {
            return Ok(None);
        };
        for (id, region) in self.memory.regions().iter().enumerate() {
            if region.addresses.contains(&fault.address) {
                let page = PageIndex::at_offset(fault.address - region.addresses.start);
                return Ok(Some(Fault { block: BlockId(id as u16), page }));
            }
        }
        let text = format!("a fault at {:#x}, which is in no RAM block", fault.address);
        Err(io::Error::new(io::ErrorKind::InvalidData, text))
    }

    fn place(&self, block: BlockId, range: PageRange, from: &[u8]) -> io::Result<u64> {
        let region = self.region(block, range)?;
        if range.bytes().0 != from.len() as u64 {
            let text = format!("{} bytes for {range} of RAM block {}", from.len(), region.block.name);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let mut new = 0;
        let mut at = range.start;
        // Pages that are there may have come by another way than ours, which wakes nobody: their waiters are
        // woken here, run by run. One call a page finds the end of such a run; SEEK_HOLE would look far
        // beyond this range.
        let mut present = PageRange::new(at, 0);
        while at < range.end() {
            let rest = PageRange::new(at, range.end().0 - at.0);
            let from = &from[(at.0 - range.start.0) as usize * PAGE_SIZE..];
            let placed = match self.uffd.copy(region.addresses_of(rest).start, from)? {
                Copied::All => rest.count,
                Copied::UpTo(bytes) => bytes / PAGE_SIZE as u64,
            };
            new += placed;
            if placed > 0 {
                self.wake(region, present)?;
                present = PageRange::new(PageIndex(at.0 + placed), 0);
            }
            if placed < rest.count {
                present.count += 1;
            }
            at = present.end();
        }
        self.wake(region, present)?;
        Ok(new)
    }

    fn place_zero(&self, fault: Fault) -> io::Result<Placed> {
        let range = PageRange::new(fault.page, 1);
        let region = self.region(fault.block, range)?;
        match self.uffd.zero(region.addresses_of(range))? {
            Copied::All => Ok(Placed::Now),
            Copied::UpTo(_) => {
                self.wake(region, range)?;
                Ok(Placed::Already)
            }
        }
    }

    fn finish(&self) -> io::Result<()> {
        let mut finished = self.finished.locked();
        if *finished {
            return Ok(());
        }
        // In this order a crash in between leaves a descriptor in the process, and nothing that anybody waits
        // for.
        for region in self.memory.regions().iter().filter(|region| !region.is_handed_over()) {
            self.uffd.unregister(region.addresses.clone())?;
        }
        let borrowed = Borrowed::seize(&self.process)?;
        for (region, _) in self.memory.regions().iter().zip(&self.huge).filter(|(_, huge)| **huge) {
            let bytes = region.addresses.end - region.addresses.start;
            match borrowed.madvise(region.addresses.start, bytes, HUGE_PAGES) {
                // A kernel without transparent huge pages does not know the advice.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                done => done?,
            }
        }
        borrowed.close(self.fd_number)?;
        *finished = true;
        Ok(())
    }
}
