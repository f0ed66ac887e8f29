//! Guest RAM from outside of QEMU.

use super::region::{self, Region};
use engine::ports::{Block, GuestMemory};
use std::io;
use units::{BlockId, PageRange, PageSet};

/// The shared RAM of a QEMU process. Stays readable after the process has ended.
#[derive(Debug)]
pub struct Memory {
    blocks: Vec<Block>,
    regions: Vec<Region>,
    /// Whether it belongs to a guest that has not started.
    fillable: bool,
}

impl Memory {
    pub(super) fn new(regions: Vec<Region>, fillable: bool) -> Self {
        Self { blocks: regions.iter().map(|region| region.block.clone()).collect(), regions, fillable }
    }

    pub(super) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// How many bytes of it are there: all but the holes.
    pub fn allocated(&self) -> u64 {
        self.regions.iter().map(|region| region.ram.allocated()).fold(0, u64::saturating_add)
    }

    /// A block that is no memory of the kernel's own but a file on a disk.
    pub(super) fn on_disk(&self) -> io::Result<Option<&str>> {
        for Region { block, ram, .. } in &self.regions {
            if !ram.is_shmem()? {
                return Ok(Some(&block.name));
            }
        }
        Ok(None)
    }

    fn region(&self, id: BlockId) -> io::Result<&Region> {
        region::get(&self.regions, id)
    }

    fn fillable(&self, id: BlockId) -> io::Result<&Region> {
        if self.fillable {
            return self.region(id);
        }
        Err(io::Error::new(io::ErrorKind::PermissionDenied, "the RAM of a source is never written by us"))
    }
}

impl GuestMemory for Memory {
    fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    fn present(&self, block: BlockId) -> io::Result<PageSet> {
        self.region(block)?.ram.present()
    }

    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        self.region(block)?.ram.read(range, into)
    }

    fn write(&self, block: BlockId, range: PageRange, from: &[u8]) -> io::Result<()> {
        self.fillable(block)?.ram.write(range, from)
    }

    fn discard(&self, block: BlockId, range: PageRange) -> io::Result<()> {
        self.fillable(block)?.ram.punch(range)
    }
}
