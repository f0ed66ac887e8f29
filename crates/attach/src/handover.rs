//! RAM that another process of this host maps as its own: handed over instead of sent.
//!
//! The proof goes through the memory: the source's file gets a lock at a place that was drawn at random, far
//! beyond its end, and the target looks for it through the waiting process' own mapping. A lock belongs to
//! one inode of one kernel, so whoever finds it there maps the same pages; and it changes none of them.

use crate::{
    Error, Memory,
    region::{self, Ram, Region},
};
use ports::{Nonce, Reached};
use std::{collections::BTreeSet, fs::File, io, ops::Range};
use sys::{
    lock::{self, Lock},
    ram::RamFile,
};
use units::BlockId;

/// Where a lock lies that shows a nonce: beyond what any file has, and clear of places that others use.
const MARKS: Range<u64> = Nonce::END..2 * Nonce::END;

/// A block that another process may map, for as long as this lives.
#[derive(Debug)]
pub struct Lent {
    /// Opened for this alone: its lock ends when it is closed.
    file: File,
}

impl Lent {
    /// What the other process is to map, as a whole.
    pub fn file(&self) -> &File {
        &self.file
    }
}

/// The memory of a block, if another process can map it: shared, of the kernel's own, and all of its file.
/// Explicit huge pages are left out: a target refuses them where not all of them are handed over.
fn mappable(region: &Region) -> io::Result<Option<&RamFile>> {
    match &region.ram {
        Ram::Shared(ram) if region.huge.is_none() && ram.is_shmem()? && ram.is_whole()? => Ok(Some(ram)),
        _ => Ok(None),
    }
}

/// Marks a block, if another process can map it.
pub(crate) fn lend(memory: &Memory, id: BlockId, nonce: Nonce) -> io::Result<Option<Lent>> {
    let Some(ram) = mappable(region::get(memory.regions(), id)?)? else { return Ok(None) };
    let file = ram.reopen()?;
    let at = MARKS.start + nonce.number();
    Lock::Read.take(&file, at..at + 1)?;
    Ok(Some(Lent { file }))
}

/// Finds the marks of these blocks of a target, which are not written from now on.
pub(crate) fn reach(memory: &Memory, blocks: &BTreeSet<BlockId>) -> Result<Vec<Reached>, Error> {
    let reached = |id: &BlockId| {
        let region = region::get(memory.regions(), *id);
        let unknown = || Error::NotReached { block: format!("number {}", id.0) };
        let region = region.map_err(|_| unknown())?;
        // Before anything else can fail.
        region.hand_over();
        let nonce = mark(region).ok().flatten();
        let not_reached = || Error::NotReached { block: region.block.name.clone() };
        Ok(Reached { block: *id, nonce: nonce.ok_or_else(not_reached)? })
    };
    blocks.iter().map(reached).collect()
}

/// The nonce that the memory of a block shows.
fn mark(region: &Region) -> io::Result<Option<Nonce>> {
    let Some(ram) = mappable(region)? else { return Ok(None) };
    let found = lock::place_of_others(ram.file(), MARKS)?;
    Ok(found.filter(|at| at.end - at.start == 1).and_then(|at| Nonce::read(at.start - MARKS.start)))
}
