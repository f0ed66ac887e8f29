//! A missing set as bytes: for each RAM block its size and its runs, as gaps and lengths.
//!
//! Most missing sets are a few long runs; the worst, every other page, takes two bytes a run.

use units::{MemorySet, PageIndex, PageRange, PageSet};

/// The set as bytes.
pub(super) fn encode(set: &MemorySet) -> Vec<u8> {
    let mut bytes = Vec::new();
    put(&mut bytes, set.blocks().count() as u64);
    for (_, block) in set.blocks() {
        put(&mut bytes, block.capacity());
        let mut at = 0;
        for run in block.runs() {
            put(&mut bytes, run.start.0 - at);
            put(&mut bytes, run.count);
            at = run.end().0;
        }
        // No run has the length 0: it ends the block.
        put(&mut bytes, 0);
        put(&mut bytes, 0);
    }
    bytes
}

/// 64 TiB, all blocks together. Beyond it the file is damaged, and bitmaps for it would only exhaust memory.
const MOST_PAGES: u64 = 1 << 34;

/// The set that [`encode`] wrote; `None` for anything else.
pub(super) fn decode(bytes: &[u8]) -> Option<MemorySet> {
    decode_within(bytes, MOST_PAGES)
}

pub(super) fn decode_within(mut bytes: &[u8], most_pages: u64) -> Option<MemorySet> {
    let mut room = most_pages;
    let from = &mut bytes;
    let count = take(from)?;
    let mut blocks = Vec::new();
    for _ in 0..count {
        let pages = take(from)?;
        room = room.checked_sub(pages)?;
        let mut block = PageSet::empty(pages);
        let mut at = 0u64;
        loop {
            let (gap, length) = (take(from)?, take(from)?);
            if length == 0 {
                break;
            }
            let run = PageRange::new(PageIndex(at.checked_add(gap)?), length);
            if !run.fits(pages) {
                return None;
            }
            block.insert_range(run);
            at = run.end().0;
        }
        blocks.push(block);
    }
    from.is_empty().then(|| MemorySet::from_blocks(blocks))
}

/// Seven bits a byte, the lowest first; the eighth says that more follow.
fn put(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use units::BlockId;

    #[test]
    fn an_owed_set_survives_being_written_and_read() {
        let mut set = MemorySet::empty([70_000, 0, 3, 262_144]);
        for (block, start, count) in [(0, 0, 1), (0, 5, 69_995), (2, 1, 1), (3, 0, 262_144)] {
            set.block_mut(BlockId(block)).insert_range(PageRange::new(PageIndex(start), count));
        }
        for page in (0..1000).step_by(2) {
            set.block_mut(BlockId(3)).remove(PageIndex(page));
        }
        let bytes = encode(&set);
        assert_eq!(decode(&bytes), Some(set));
        for cut in 0..bytes.len() {
            assert_eq!(decode(&bytes[..cut]), None, "cut at {cut}");
        }
    }

    #[test]
    fn damaged_bytes_are_no_set() {
        // A run beyond its block, a block beyond all memory, a number without an end.
        let beyond = [1, 4, 2, 3, 0, 0];
        let huge = [1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 0, 0];
        // Each block may be as large as all of them together, but only once.
        let block = [0x80, 0x80, 0x40, 0, 0];
        let blocks = |count: u8| [&[count][..], &block.repeat(count.into())].concat();
        assert!(decode_within(&blocks(1), 1 << 20).is_some());
        assert_eq!(decode_within(&blocks(2), 1 << 20), None);
        for bytes in [&beyond[..], &huge[..], &[0xff; 32][..], &[0, 0][..], &[][..]] {
            assert_eq!(decode(bytes), None, "{bytes:?}");
        }
    }
}
