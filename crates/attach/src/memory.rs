//! Guest RAM from outside of its process.

use crate::region::{self, Ram, Region};
use ports::{Block, GuestMemory};
use std::io;
use sys::ram::RamFile;
use units::{BlockId, PageRange, PageSet};

/// The RAM of another process. What is shared stays readable after the process has ended.
#[derive(Debug)]
pub struct Memory {
    blocks: Vec<Block>,
    regions: Vec<Region>,
    /// Whether it belongs to a guest that has not started.
    fillable: bool,
}

impl Memory {
    pub(crate) fn new(regions: Vec<Region>, fillable: bool) -> Self {
        Self { blocks: regions.iter().map(|region| region.block.clone()).collect(), regions, fillable }
    }

    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// How many bytes of it are there: all but the holes. What is private is not counted, nor what was handed
    /// over: that is there already, and is the source's.
    pub fn allocated(&self) -> u64 {
        let own = self.regions.iter().filter(|region| !region.is_handed_over());
        let shared = own.filter_map(|region| match &region.ram {
            Ram::Shared(ram) => Some(ram.allocated()),
            Ram::Private(_) => None,
        });
        shared.fold(0, u64::saturating_add)
    }

    /// A block that is no memory of the kernel's own but a file on a disk.
    pub(crate) fn on_disk(&self) -> io::Result<Option<&str>> {
        for Region { block, ram, huge, .. } in &self.regions {
            let on_disk = match ram {
                Ram::Shared(ram) => huge.is_none() && !ram.is_shmem()?,
                Ram::Private(ram) => ram.is_of_file(),
            };
            if on_disk {
                return Ok(Some(&block.name));
            }
        }
        Ok(None)
    }

    /// A block of explicit huge pages, and their size.
    pub fn huge(&self) -> Option<(&str, u64)> {
        let huge = |region: &Region| region.huge.is_some();
        let found = self.regions.iter().find(|region| huge(region))?;
        Some((&found.block.name, found.page_bytes()))
    }

    /// A block that only its process can reach.
    pub fn private(&self) -> Option<&str> {
        let private = |region: &&Region| matches!(region.ram, Ram::Private(_));
        self.regions.iter().find(private).map(|region| region.block.name.as_str())
    }

    fn region(&self, id: BlockId) -> io::Result<&Region> {
        region::get(&self.regions, id)
    }

    fn fillable(&self, id: BlockId) -> io::Result<&RamFile> {
        let region = self.region(id)?;
        if region.is_handed_over() {
            // Until the commit the source's guest runs in it (I3).
            let text = format!("RAM block {} was handed over: nothing is written to it", region.block.name);
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        match &region.ram {
            Ram::Shared(ram) if self.fillable => Ok(ram),
            _ => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "only the shared RAM of a target is written by us",
            )),
        }
    }
}

impl GuestMemory for Memory {
    fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    fn present(&self, block: BlockId) -> io::Result<PageSet> {
        let region = self.region(block)?;
        match (&region.ram, &region.huge) {
            (Ram::Private(ram), _) => ram.present(),
            (Ram::Shared(ram), None) => ram.present(),
            (Ram::Shared(ram), Some(huge)) => {
                let mut present = PageSet::empty(region.block.pages);
                for run in huge.shared(|| ram.allocated())? {
                    present.insert_range(region.pages_at(&run));
                }
                Ok(present)
            }
        }
    }

    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        match &self.region(block)?.ram {
            Ram::Shared(ram) => ram.read(range, into),
            Ram::Private(ram) => ram.read(range, into),
        }
    }

    fn write(&self, block: BlockId, range: PageRange, from: &[u8]) -> io::Result<()> {
        self.fillable(block)?.write(range, from)
    }

    fn discard(&self, block: BlockId, range: PageRange) -> io::Result<()> {
        self.fillable(block)?.punch(range)
    }
}
