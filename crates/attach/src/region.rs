//! Finds the RAM blocks of a process among its mappings.

use crate::Error;
use ports::Block;
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};
use sys::{
    huge::HugePages,
    maps::{self, Mapping},
    process::PidFd,
    process_ram::ProcessRam,
    ram::RamFile,
};
use units::{BlockId, PAGE_SIZE, PageIndex, PageRange};

/// A RAM block as its VMM tells of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RamBlock {
    /// The VMM's name for it.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Where it begins in the process' address space (host virtual address). The only thing that tells two
    /// equal blocks apart.
    pub hva: u64,
}

/// What holds the content of a RAM block.
#[derive(Debug)]
pub(crate) enum Ram {
    /// A file, which outlives the process.
    Shared(RamFile),
    /// The process' own address space.
    Private(ProcessRam),
}

/// A RAM block that was found: its place in the process and what holds it.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) block: Block,
    pub(crate) addresses: Range<u64>,
    pub(crate) ram: Ram,
    /// It consists of explicit huge pages. One is written, protected and thrown away as a whole.
    pub(crate) huge: Option<HugePages>,
    /// It is the same memory at the source and at the target. Never taken back.
    handed_over: AtomicBool,
}

impl Region {
    /// From now on it is neither tracked nor filled.
    pub(crate) fn hand_over(&self) {
        self.handed_over.store(true, SeqCst);
    }

    /// Whether it is the same memory at the source and at the target.
    pub(crate) fn is_handed_over(&self) -> bool {
        self.handed_over.load(SeqCst)
    }

    /// Where `range` is in the process.
    pub(crate) fn addresses_of(&self, range: PageRange) -> Range<u64> {
        let start = self.addresses.start + range.start.offset();
        start..start + range.bytes().0
    }

    /// The pages at `addresses` of the process, which begin in this block. A huge page may reach beyond its
    /// end.
    pub(crate) fn pages_at(&self, addresses: &Range<u64>) -> PageRange {
        let first = PageIndex::at_offset(addresses.start - self.addresses.start);
        PageRange::new(first, (addresses.end.min(self.addresses.end) - addresses.start) / PAGE_SIZE as u64)
    }

    /// What of the process is watched for its sake: whole pages of whatever size they are.
    pub(crate) fn watched(&self) -> Range<u64> {
        self.huge.as_ref().map_or_else(|| self.addresses.clone(), HugePages::addresses)
    }

    /// The size of its pages, which all that is said to the kernel must be a multiple of.
    pub(crate) fn page_bytes(&self) -> u64 {
        self.huge.as_ref().map_or(PAGE_SIZE as u64, HugePages::page)
    }
}

/// Finds and opens each block. Nothing must be registered with a userfaultfd yet.
pub(crate) fn find(process: &Arc<PidFd>, blocks: &[RamBlock]) -> Result<Vec<Region>, Error> {
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
    // The kernel may have split the mapping. Its pieces follow each other in memory, and in the file if there
    // is one.
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
    let step = |cause| Error::step(format!("open RAM block {}", wanted.name), process.pid())(cause);
    let held = hold(process, first, addresses.clone()).map_err(step)?;
    let Some((ram, huge)) = held else { return Err(Error::HugeFile { block: block() }) };
    if huge.as_ref().is_some_and(|huge| huge.addresses().end > last.addresses.end) {
        return Err(not_mapped());
    }
    let block = Block { name: block(), pages: wanted.bytes / PAGE_SIZE as u64 };
    Ok(Region { block, addresses, ram, huge, handed_over: AtomicBool::new(false) })
}

/// What holds the content of these addresses, which lie in `mapping`, and their huge pages. None: huge pages
/// of a file that has content of its own beneath them.
fn hold(
    process: &Arc<PidFd>,
    mapping: &Mapping,
    addresses: Range<u64>,
) -> io::Result<Option<(Ram, Option<HugePages>)>> {
    let (bytes, offset) = (addresses.end - addresses.start, addresses.start - mapping.addresses.start);
    let of_file = |file: File| RamFile::new(file, mapping.offset + offset, bytes);
    let pages = |page| HugePages::new(process, addresses.clone(), page);
    if mapping.shared {
        let ram = of_file(maps::open_file(process, mapping)?)?;
        let huge = ram.huge_page()?.map(pages).transpose()?;
        return Ok(Some((Ram::Shared(ram), huge)));
    }
    if !maps::flags_at(process, addresses.start)?.iter().any(|flag| flag == "ht") {
        let ram = ProcessRam::new(process, addresses, mapping.inode != 0)?;
        return Ok(Some((Ram::Private(ram), None)));
    }
    let file = of_file(maps::open_file(process, mapping)?)?;
    let no_size = || io::Error::other("its huge pages have no size");
    let page = file.huge_page()?.ok_or_else(no_size)?;
    if file.allocated() > 0 {
        return Ok(None);
    }
    let ram = ProcessRam::huge(process, addresses.clone(), page)?;
    Ok(Some((Ram::Private(ram), Some(pages(page)?))))
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
pub(crate) fn get(regions: &[Region], id: BlockId) -> io::Result<&Region> {
    regions.get(usize::from(id.0)).ok_or_else(|| {
        let text = format!("the VM has no RAM block number {}, only {}", id.0, regions.len());
        io::Error::new(io::ErrorKind::InvalidInput, text)
    })
}
