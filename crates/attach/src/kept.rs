//! A VM's memory that stays behind when its process has ended.

use crate::{Memory, region::Ram};
use ports::{Block, KeptCopy};
use std::io;
use sys::{ram::RamFile, users};
use units::{BlockId, PageRange, PageSet};

/// The memory of a process that has ended, as far as nobody else has it. Dropping it gives it back.
#[derive(Debug)]
pub struct Kept {
    blocks: Vec<Block>,
    /// None: the block is not kept.
    files: Vec<Option<RamFile>>,
}

impl Kept {
    /// What can be kept of it, for which the process must have ended; none if that is nothing. A file that
    /// has a name is its owner's, and one that another process has may change.
    pub fn of(memory: &Memory) -> io::Result<Option<Self>> {
        let files = memory.regions().iter().map(|region| match &region.ram {
            Ram::Shared(ram) if region.huge.is_none() && !region.is_handed_over() => keep(ram),
            _ => Ok(None),
        });
        let files = files.collect::<io::Result<Vec<_>>>()?;
        let blocks = memory.regions().iter().map(|region| region.block.clone()).collect();
        Ok(files.iter().any(Option::is_some).then_some(Self { blocks, files }))
    }

    /// The RAM blocks of the VM, also those that are not kept.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// How many bytes of memory it takes.
    pub fn allocated(&self) -> u64 {
        self.files.iter().flatten().map(RamFile::allocated).fold(0, u64::saturating_add)
    }

    fn file(&self, block: BlockId) -> Option<&RamFile> {
        self.files.get(usize::from(block.0))?.as_ref()
    }
}

fn keep(ram: &RamFile) -> io::Result<Option<RamFile>> {
    let is_nameless = ram.is_nameless()?;
    if !is_nameless || !ram.is_shmem()? || !ram.is_whole()? || users::has_others(ram.file())? {
        return Ok(None);
    }
    RamFile::new(ram.file().try_clone()?, 0, ram.bytes()).map(Some)
}

impl KeptCopy for Kept {
    fn present(&self, block: BlockId) -> io::Result<PageSet> {
        match (self.file(block), self.blocks.get(usize::from(block.0))) {
            (Some(file), _) => file.present(),
            (None, Some(block)) => Ok(PageSet::empty(block.pages)),
            (None, None) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        self.file(block).ok_or(io::ErrorKind::NotFound)?.read(range, into)
    }

    fn release(&self, block: BlockId, range: PageRange) {
        // What stays takes memory until all of it is dropped.
        if let Some(Err(error)) = self.file(block).map(|file| file.punch(range)) {
            tracing::debug!(%error, "memory that is kept is not given back yet");
        }
    }
}
