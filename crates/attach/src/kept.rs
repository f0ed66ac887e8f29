//! A VM's memory that stays behind when its process has ended.

use crate::{
    Memory,
    region::{Ram, Region},
};
use ports::{Block, KeptCopy};
use std::{
    io,
    sync::{PoisonError, RwLock, RwLockReadGuard},
};
use sys::{ram::RamFile, users};
use units::{BlockId, PageIndex, PageRange};

/// The memory of a process that has ended, as far as nobody else has it. Dropping it gives it back.
#[derive(Debug)]
pub struct Kept {
    blocks: Vec<Block>,
    /// None: the block is not kept, or not any more.
    files: RwLock<Vec<Option<RamFile>>>,
}

impl Kept {
    /// What can be kept of it, for which the process must have ended; none if that is nothing. A file that
    /// has a name is its owner's, and one that another process has may change.
    pub fn of(memory: &Memory) -> io::Result<Option<Self>> {
        let files = memory.regions().iter().map(candidate).collect::<io::Result<Vec<_>>>()?;
        let blocks = memory.regions().iter().map(|region| region.block.clone()).collect();
        Self::new(blocks, files)
    }

    /// What of these files, one a block, no other process has; none if that is nothing.
    pub fn new(blocks: Vec<Block>, files: Vec<Option<RamFile>>) -> io::Result<Option<Self>> {
        let others = users::have_others(&files.iter().flatten().map(RamFile::file).collect::<Vec<_>>())?;
        let mut others = others.into_iter();
        let own = |file: Option<RamFile>| file.filter(|_| others.next() == Some(false));
        let files: Vec<_> = files.into_iter().map(own).collect();
        Ok(files.iter().any(Option::is_some).then_some(Self { blocks, files: RwLock::new(files) }))
    }

    /// The RAM blocks of the VM, also those that are not kept.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// How many bytes of memory it takes.
    pub fn allocated(&self) -> u64 {
        self.files().iter().flatten().map(RamFile::allocated).fold(0, u64::saturating_add)
    }

    /// Gives all of it back at once, whoever uses it: from now on nothing of it can be read.
    pub fn abandon(&self) {
        let files = std::mem::take(&mut *self.files.write().unwrap_or_else(PoisonError::into_inner));
        // Gigabytes take a while to be freed. Nobody waits for that.
        drop(files);
    }

    fn files(&self) -> RwLockReadGuard<'_, Vec<Option<RamFile>>> {
        self.files.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The file of a region, if it is one that can be kept where nobody else has it.
fn candidate(region: &Region) -> io::Result<Option<RamFile>> {
    let Ram::Shared(ram) = &region.ram else { return Ok(None) };
    let of_kind = region.huge.is_none() && !region.is_handed_over();
    if !of_kind || !ram.is_nameless()? || !ram.is_shmem()? || !ram.is_whole()? {
        return Ok(None);
    }
    RamFile::new(ram.file().try_clone()?, 0, ram.bytes()).map(Some)
}

fn file(files: &[Option<RamFile>], block: BlockId) -> io::Result<&RamFile> {
    let file = files.get(usize::from(block.0)).and_then(Option::as_ref);
    file.ok_or_else(|| io::ErrorKind::NotFound.into())
}

impl KeptCopy for Kept {
    fn first_present(&self, block: BlockId, from: PageIndex) -> io::Result<Option<PageIndex>> {
        match self.files().get(usize::from(block.0)) {
            Some(file) => file.as_ref().map_or(Ok(None), |file| file.first_present(from)),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        file(&self.files(), block)?.read(range, into)
    }

    fn release(&self, block: BlockId, range: PageRange) {
        // What stays takes memory until all of it is dropped.
        if let Ok(file) = file(&self.files(), block)
            && let Err(error) = file.punch(range)
        {
            tracing::debug!(%error, "memory that is kept is not given back yet");
        }
    }
}
