//! Hashes of the stopped guest's memory, by which the two sides are compared.

use crate::{conn::invalid, ports::GuestMemory};
use proto::control;
use std::{collections::BTreeMap, io};
use units::{BlockId, MemorySet, PAGE_SIZE, PageIndex, PageRange, PageSet};

/// Pages read at once, and hashes in one message: 8 MiB and 16 KiB. Bounds memory, not speed.
const PIECE: u64 = 2048;

/// Hashes in one message, and kept in one part: 1 MiB of them, for 512 MiB of memory.
const MESSAGE: u64 = 64 * PIECE;

/// A page's hash for the comparison: 0 for zeros, so that holes need not be read.
pub(crate) fn hash(page: &[u8]) -> u64 {
    if page::is_zero(page) { 0 } else { page::fingerprint(page).max(1) }
}

/// Hashes all memory, and hands it out in messages. Of what the guest never wrote only its length is said.
pub(crate) fn hash_all(
    memory: &dyn GuestMemory,
    mut say: impl FnMut(control::Hashes) -> io::Result<()>,
) -> io::Result<()> {
    for (i, block) in memory.blocks().iter().enumerate() {
        let id = BlockId(i as u16);
        let present = memory.present(id)?;
        let mut holes = PageRange::new(PageIndex(0), 0);
        let message = |start: PageIndex, hashes, holes| control::Hashes {
            block: id.0.into(),
            start: start.0,
            hashes,
            holes,
        };
        for part in PageRange::new(PageIndex(0), block.pages).pieces(MESSAGE) {
            if present.runs_within(part).next().is_none() {
                holes.count += part.count;
                continue;
            }
            if !holes.is_empty() {
                say(message(holes.start, vec![], holes.count))?;
            }
            say(message(part.start, hashes(memory, id, &present, part)?, 0))?;
            holes = PageRange::new(part.end(), 0);
        }
        if !holes.is_empty() {
            say(message(holes.start, vec![], holes.count))?;
        }
    }
    Ok(())
}

/// The hashes of `range`; holes are not read.
fn hashes(
    memory: &dyn GuestMemory,
    block: BlockId,
    present: &PageSet,
    range: PageRange,
) -> io::Result<Vec<u64>> {
    let mut hashes = vec![0; range.count as usize];
    let mut content = vec![0; PIECE as usize * PAGE_SIZE];
    for run in present.runs_within(range) {
        for piece in run.pieces(PIECE) {
            let content = &mut content[..piece.count as usize * PAGE_SIZE];
            memory.read(block, piece, content)?;
            let at = (piece.start.0 - range.start.0) as usize;
            for (page, into) in content.chunks_exact(PAGE_SIZE).zip(&mut hashes[at..]) {
                *into = hash(page);
            }
        }
    }
    Ok(hashes)
}

/// What the source announced of its memory. Checked against the VM's shape when it arrives.
#[derive(Debug)]
pub(crate) struct Announced(Vec<OfBlock>);

/// What was announced of one block.
#[derive(Debug, Default)]
struct OfBlock {
    /// So many pages so far.
    pages: u64,
    /// The hashes of each `MESSAGE` pages that are not all holes.
    parts: BTreeMap<u64, Vec<u64>>,
}

impl Announced {
    pub(crate) fn new(memory: &dyn GuestMemory) -> Self {
        Self(memory.blocks().iter().map(|_| OfBlock::default()).collect())
    }

    /// Takes a message in; they come in order, and each but the last ends where a part does.
    pub(crate) fn keep(&mut self, message: &control::Hashes, memory: &dyn GuestMemory) -> io::Result<()> {
        let block = usize::try_from(message.block).unwrap_or(usize::MAX);
        let (Some(kept), Some(shape)) = (self.0.get_mut(block), memory.blocks().get(block)) else {
            return Err(invalid("hashes of a RAM block that the VM does not have"));
        };
        let hashes = message.hashes.len() as u64;
        let end = kept.pages.checked_add(hashes).and_then(|end| end.checked_add(message.holes));
        let Some(end) = end.filter(|end| message.start == kept.pages && *end <= shape.pages) else {
            return Err(invalid("hashes that do not follow one another"));
        };
        let whole = kept.pages.is_multiple_of(MESSAGE) && (end.is_multiple_of(MESSAGE) || end == shape.pages);
        if !whole || hashes > MESSAGE || (hashes > 0 && message.holes > 0) {
            return Err(invalid("hashes in other parts than agreed"));
        }
        if hashes > 0 {
            kept.parts.insert(kept.pages / MESSAGE, message.hashes.clone());
        }
        kept.pages = end;
        Ok(())
    }

    /// The hash of a page that is still to come.
    pub(crate) fn of(&self, block: BlockId, page: PageIndex) -> Option<u64> {
        let block = self.0.get(usize::from(block.0)).filter(|block| page.0 < block.pages)?;
        let part = block.parts.get(&(page.0 / MESSAGE));
        Some(part.and_then(|part| part.get((page.0 % MESSAGE) as usize)).copied().unwrap_or(0))
    }

    /// The first page outside `missing` whose content is not what was announced, if there is one.
    pub(crate) fn differing(
        &self,
        memory: &dyn GuestMemory,
        missing: &MemorySet,
    ) -> io::Result<Option<(BlockId, PageIndex)>> {
        for (i, block) in memory.blocks().iter().enumerate() {
            let id = BlockId(i as u16);
            if self.0[i].pages != block.pages {
                return Err(invalid("hashes of a part of the memory are missing"));
            }
            let present = memory.present(id)?;
            for part in PageRange::new(PageIndex(0), block.pages).pieces(MESSAGE) {
                let announced = self.0[i].parts.get(&(part.start.0 / MESSAGE));
                if announced.is_none() && present.runs_within(part).next().is_none() {
                    continue;
                }
                let here = hashes(memory, id, &present, part)?;
                let there = |n: usize| announced.map_or(0, |announced| announced[n]);
                let at = |n: usize| PageIndex(part.start.0 + n as u64);
                let differs = |n: &usize| here[*n] != there(*n) && !missing.block(id).contains(at(*n));
                if let Some(n) = (0..here.len()).find(differs) {
                    return Ok(Some((id, at(n))));
                }
            }
        }
        Ok(None)
    }
}
