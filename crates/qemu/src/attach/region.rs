//! Finds QEMU's RAM blocks among its mappings.

use super::Error;
use engine::ports::Block;
use serde::{Deserialize, Serialize};
use std::{io, ops::Range, sync::Arc};
use sys::{
    maps::{self, Mapping},
    process::PidFd,
    process_ram::ProcessRam,
    ram::RamFile,
};
use units::{BlockId, PAGE_SIZE, PageIndex, PageRange};

/// A RAM block as QEMU tells of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RamBlock {
    /// QEMU's name for it.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Where it begins in QEMU's address space (host virtual address). The only thing that tells two equal blocks apart.
    pub hva: u64,
}

/// What holds the content of a RAM block.
#[derive(Debug)]
pub(super) enum Ram {
    /// A file, which outlives QEMU.
    Shared(RamFile),
    /// QEMU's own address space.
    Private(ProcessRam),
}

/// A RAM block that was found: its place in QEMU and what holds it.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) block: Block,
    pub(super) addresses: Range<u64>,
    pub(super) ram: Ram,
}

impl Region {
    /// Where `range` is in QEMU.
    pub(super) fn addresses_of(&self, range: PageRange) -> Range<u64> {
        let start = self.addresses.start + range.start.offset();
        start..start + range.bytes().0
    }

    /// The pages at `addresses` of QEMU, which begin in this block.
    pub(super) fn pages_at(&self, addresses: &Range<u64>) -> PageRange {
        let first = PageIndex::at_offset(addresses.start - self.addresses.start);
        PageRange::new(first, (addresses.end - addresses.start) / PAGE_SIZE as u64)
    }
}

/// Finds and opens each block. Nothing must be registered with a userfaultfd yet.
pub(super) fn find(process: &Arc<PidFd>, blocks: &[RamBlock]) -> Result<Vec<Region>, Error> {
    if blocks.len() > usize::from(u16::MAX) {
        return Err(Error::TooMany { count: blocks.len() });
    }
    let mappings = maps::read(process).map_err(Error::step("read the mappings", process.pid()))?;
    blocks.iter().map(|block| open(process, &mappings, block)).collect()
}

fn open(process: &Arc<PidFd>, mappings: &[Mapping], wanted: &RamBlock) -> Result<Region, Error> {
    let block = || wanted.name.clone();
    let not_mapped = || Error::NotMapped { block: block(), hva: wanted.hva, bytes: wanted.bytes };
    let end = wanted.hva.checked_add(wanted.bytes).ok_or_else(not_mapped)?;
    let at = mappings.iter().position(|m| m.addresses.contains(&wanted.hva)).ok_or_else(not_mapped)?;
    let first = &mappings[at];
    // The kernel may have split the mapping. Its pieces follow each other in memory, and in the file if there is one.
    let mut last = first;
    for next in &mappings[at + 1..] {
        if last.addresses.end >= end || !continues(last, next) {
            break;
        }
        last = next;
    }
    if last.addresses.end < end || !first.write {
        return Err(not_mapped());
    }
    let addresses = wanted.hva..end;
    let opened = || -> io::Result<(Ram, bool)> {
        if !first.shared {
            let ram = ProcessRam::new(process, addresses.clone(), first.inode != 0)?;
            let huge = ram.is_hugetlb()?;
            return Ok((Ram::Private(ram), huge));
        }
        let file = maps::open_file(process, first)?;
        let ram = RamFile::new(file, first.offset + (wanted.hva - first.addresses.start), wanted.bytes)?;
        let huge = ram.is_hugetlb()?;
        Ok((Ram::Shared(ram), huge))
    };
    let step = |cause| Error::step(format!("open RAM block {}", wanted.name), process.pid())(cause);
    let (ram, huge) = opened().map_err(step)?;
    if huge {
        return Err(Error::HugePages { block: block() });
    }
    let block = Block { name: block(), pages: wanted.bytes / PAGE_SIZE as u64 };
    Ok(Region { block, addresses, ram })
}

/// Whether the block that `mapping` is a piece of goes on in `next`.
fn continues(mapping: &Mapping, next: &Mapping) -> bool {
    let anonymous = mapping.inode == 0 && next.inode == 0;
    mapping.shared == next.shared
        && mapping.write == next.write
        && match anonymous {
            true => mapping.addresses.end == next.addresses.start,
            false => mapping.continues_in(next),
        }
}

/// The region of a block.
pub(super) fn get(regions: &[Region], id: BlockId) -> io::Result<&Region> {
    regions.get(usize::from(id.0)).ok_or_else(|| {
        let text = format!("the VM has no RAM block number {}, only {}", id.0, regions.len());
        io::Error::new(io::ErrorKind::InvalidInput, text)
    })
}
