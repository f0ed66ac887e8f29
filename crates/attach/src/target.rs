//! The process that a VM comes to.

use crate::{
    Error, Memory, Missing, RamBlock, handover,
    region::{self, Region},
};
use ports::{GuestMemory, MissingPages, Reached};
use std::{collections::BTreeSet, io, sync::Arc};
use sys::{inject::Borrowed, maps, process::PidFd};
use units::{BlockId, PAGE_SIZE, PageIndex, PageRange};

/// `MADV_NOHUGEPAGE` of Linux.
const NO_HUGE_PAGES: i32 = 15;

/// The largest transparent huge page of x86-64 that shared memory uses.
const HUGE: u64 = 2 << 20;

/// A process that waits for a VM, with RAM to be filled.
#[derive(Debug)]
pub struct Target {
    process: Arc<PidFd>,
    memory: Arc<Memory>,
    /// Whether the VMM wanted huge pages, block by block.
    huge: Vec<bool>,
}

impl Target {
    /// Finds the RAM `blocks` of process `pid` and empties them: all of it is holes then, and stays free of
    /// huge pages. The guest must not have started.
    pub fn open(pid: i32, blocks: &[RamBlock]) -> Result<Self, Error> {
        Self::open_reaching(pid, blocks, &BTreeSet::new()).map(|(target, _)| target)
    }

    /// The same where `reached` of the blocks, which the process maps, are a source's own memory: they are
    /// left as they are, and never written. Says what nonces were found through the process' mappings; fails
    /// if one has none.
    pub fn open_reaching(
        pid: i32,
        blocks: &[RamBlock],
        reached: &BTreeSet<BlockId>,
    ) -> Result<(Self, Vec<Reached>), Error> {
        let mut target = Self::find(pid, blocks)?;
        // First of all: whatever follows must not empty the RAM of a guest that runs.
        let found = handover::reach(&target.memory, reached)?;
        target.huge =
            target.keep_huge_pages_off().map_err(Error::step("keep huge pages off the RAM", pid))?;
        for id in (0..target.memory.blocks().len()).map(|n| BlockId(n as u16)) {
            if !reached.contains(&id) {
                target.empty(id)?;
            }
        }
        Ok((target, found))
    }

    /// Finds the RAM `blocks` of a process that an agent before us had opened, with those that it had
    /// `reached`. What is there stays.
    pub fn reopen(pid: i32, blocks: &[RamBlock], reached: &BTreeSet<BlockId>) -> Result<Self, Error> {
        let target = Self::find(pid, blocks)?;
        for id in reached {
            let region = region::get(target.memory.regions(), *id);
            region.map_err(Error::step("find RAM that was handed over", pid))?.hand_over();
        }
        Ok(target)
    }

    fn find(pid: i32, blocks: &[RamBlock]) -> Result<Self, Error> {
        let process = Arc::new(PidFd::open(pid).map_err(Error::step("get hold", pid))?);
        let memory = Arc::new(Memory::new(region::find(&process, blocks)?, true));
        if let Some(block) = memory.private() {
            return Err(Error::NotShared { block: block.to_owned() });
        }
        if let Some((block, _)) = memory.huge() {
            return Err(Error::HugeTarget { block: block.to_owned() });
        }
        // VMMs ask for huge pages for all RAM by default.
        let huge = vec![true; memory.blocks().len()];
        Ok(Self { process, memory, huge })
    }

    fn keep_huge_pages_off(&self) -> io::Result<Vec<bool>> {
        let wanted = |region: &Region| -> io::Result<bool> {
            let flags = maps::flags_at(&self.process, region.addresses.start)?;
            Ok(!region.is_handed_over() && flags.iter().any(|flag| flag == "hg"))
        };
        let regions = self.memory.regions();
        let huge = regions.iter().map(wanted).collect::<io::Result<_>>()?;
        let borrowed = Borrowed::seize(&self.process)?;
        for region in regions.iter().filter(|region| !region.is_handed_over()) {
            let bytes = region.addresses.end - region.addresses.start;
            match borrowed.madvise(region.addresses.start, bytes, NO_HUGE_PAGES) {
                // A kernel without transparent huge pages does not know the advice.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                done => done?,
            }
        }
        Ok(huge)
    }

    /// Makes one hole of a block, and makes sure that one page written makes one page present.
    fn empty(&self, id: BlockId) -> Result<(), Error> {
        let block = &self.memory.blocks()[usize::from(id.0)];
        let all = PageRange::new(PageIndex(0), block.pages);
        let emptied = || -> io::Result<bool> {
            self.memory.discard(id, all)?;
            let huge_page = (HUGE / PAGE_SIZE as u64).min(block.pages);
            self.memory.write(id, PageRange::new(PageIndex(0), 1), &[0; PAGE_SIZE])?;
            let present = self.memory.present(id)?.runs().next().map_or(0, |run| run.count);
            self.memory.discard(id, PageRange::new(PageIndex(0), huge_page))?;
            Ok(present == 1)
        };
        match emptied() {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::EagerHugePages { block: block.name.clone() }),
            Err(cause) => {
                Err(Error::step(format!("empty RAM block {}", block.name), self.process.pid())(cause))
            }
        }
    }

    /// Its RAM.
    pub fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    /// The process.
    pub fn process(&self) -> &Arc<PidFd> {
        &self.process
    }

    /// From now on whoever touches a hole of the RAM waits until a page is placed there, even if we die.
    /// Whatever is missing must be a hole (`discard`).
    pub fn missing(&self) -> Result<Missing, Error> {
        Missing::begin(&self.process, &self.memory, &self.huge)
    }

    /// Goes on where an agent before us had to leave: `fd_number` is what [`Missing::fd_number`] told it.
    pub fn retake(&self, fd_number: i32) -> Result<Missing, Error> {
        let missing = Missing::retake(&self.process, &self.memory, &self.huge, fd_number)?;
        // Faults that the agent before us had read and not answered are told nobody again: whoever waits
        // touches the page once more, and that is told.
        missing
            .wake_all()
            .map_err(Error::step("wake whoever waits for missing pages", self.process.pid()))?;
        Ok(missing)
    }

    /// Whether the process still has the userfaultfd that an agent before us had it open. That is closed once
    /// nobody waits any more.
    pub fn is_watched(&self, fd_number: i32) -> Result<bool, Error> {
        let pid = self.process.pid();
        match std::fs::read_link(format!("/proc/{pid}/fd/{fd_number}")) {
            // Its number may be another file's by now.
            Ok(file) => Ok(file.as_os_str() == "anon_inode:[userfaultfd]"),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(Error::step(format!("look at descriptor {fd_number}"), pid)(e)),
        }
    }

    /// Ends the watch for missing pages that an agent before us has left, if it has: whoever waits goes on,
    /// and finds zeros. Only for a guest that misses nothing.
    pub fn end_watch(&self, fd_number: i32) -> Result<(), Error> {
        if !self.is_watched(fd_number)? {
            return Ok(());
        }
        self.retake(fd_number)?
            .finish()
            .map_err(Error::step("end the watch for missing pages", self.process.pid()))
    }
}
