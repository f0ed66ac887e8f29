//! Hashes of the stopped guest's memory, by which the two sides are compared.

use crate::ports::GuestMemory;
use proto::control;
use std::io;
use units::{BlockId, MemorySet, PAGE_SIZE, PageIndex, PageRange};

/// Pages read at once, and hashes in one message: 8 MiB and 16 KiB. Bounds memory, not speed.
const PIECE: u64 = 2048;

/// Hashes in one message: 1 MiB of them, for 512 MiB of memory.
const MESSAGE: u64 = 64 * PIECE;

/// A page's hash for the comparison: 0 for zeros, so that holes need not be read.
pub(crate) fn hash(page: &[u8]) -> u64 {
    if page::is_zero(page) { 0 } else { page::fingerprint(page).max(1) }
}

/// Hashes all memory, and hands it out in messages.
pub(crate) fn hash_all(
    memory: &dyn GuestMemory,
    mut say: impl FnMut(control::Hashes) -> io::Result<()>,
) -> io::Result<()> {
    for (i, block) in memory.blocks().iter().enumerate() {
        let id = BlockId(i as u16);
        for part in PageRange::new(PageIndex(0), block.pages).pieces(MESSAGE) {
            let hashes = hashes(memory, id, part)?;
            say(control::Hashes { block: u32::from(id.0), start: part.start.0, hashes })?;
        }
    }
    Ok(())
}

/// The hashes of `range`; holes are not read.
fn hashes(memory: &dyn GuestMemory, block: BlockId, range: PageRange) -> io::Result<Vec<u64>> {
    let present = memory.present(block)?;
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
pub(crate) struct Announced(Vec<Vec<u64>>);

impl Announced {
    pub(crate) fn new(memory: &dyn GuestMemory) -> Self {
        Self(memory.blocks().iter().map(|b| Vec::with_capacity(b.pages as usize)).collect())
    }

    /// Takes a message in; they come in order.
    pub(crate) fn keep(&mut self, message: &control::Hashes, memory: &dyn GuestMemory) -> io::Result<()> {
        let block = usize::try_from(message.block).unwrap_or(usize::MAX);
        let (Some(kept), Some(shape)) = (self.0.get_mut(block), memory.blocks().get(block)) else {
            return Err(crate::conn::invalid("hashes of a RAM block that the VM does not have"));
        };
        let end = kept.len() as u64 + message.hashes.len() as u64;
        if message.start != kept.len() as u64 || end > shape.pages {
            return Err(crate::conn::invalid("hashes that do not follow one another"));
        }
        kept.extend_from_slice(&message.hashes);
        Ok(())
    }

    /// The hash of a page that is still to come.
    pub(crate) fn of(&self, block: BlockId, page: PageIndex) -> Option<u64> {
        self.0.get(usize::from(block.0))?.get(page.0 as usize).copied()
    }

    /// The first page outside `owed` whose content is not what was announced, if there is one.
    pub(crate) fn differing(
        &self,
        memory: &dyn GuestMemory,
        owed: &MemorySet,
    ) -> io::Result<Option<(BlockId, PageIndex)>> {
        for (i, block) in memory.blocks().iter().enumerate() {
            let id = BlockId(i as u16);
            let here = hashes(memory, id, PageRange::new(PageIndex(0), block.pages))?;
            let announced = &self.0[i];
            if announced.len() != here.len() {
                return Err(crate::conn::invalid("hashes of a part of the memory are missing"));
            }
            let differs = |page: &u64| {
                here[*page as usize] != announced[*page as usize]
                    && !owed.block(id).contains(PageIndex(*page))
            };
            if let Some(page) = (0..block.pages).find(differs) {
                return Ok(Some((id, PageIndex(page))));
            }
        }
        Ok(None)
    }
}
