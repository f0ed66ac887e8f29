use crate::Extent;
use std::collections::HashMap;
use units::{BlockId, PageIndex};

/// Pages whose places are kept together: 4 KiB of memory for 4 MiB of the guest's, only where the file has
/// any.
const LEAF: u64 = 1024;

type Leaf = Box<[u32; LEAF as usize]>;

/// No extent has this number: pages without a version.
const NONE: u32 = u32::MAX;

/// Which pages a file has. Of a page that it has several times, the newest counts, and only that: if it
/// cannot be read, no older one is taken instead (I5).
#[derive(Debug, Default)]
pub struct Index {
    extents: Vec<Extent>,
    /// For each page, which extent has its newest version.
    pages: HashMap<(BlockId, u64), Leaf>,
    /// Whether `extents` is in the order of sequence numbers.
    sorted: bool,
    /// Up to which byte the file was looked at.
    pub(crate) end: u64,
    /// Bytes that were no extent although extents follow.
    pub(crate) damaged: u64,
}

impl Index {
    /// Nothing yet, of a file that was looked at up to this byte.
    pub(crate) fn from(end: u64) -> Self {
        Self { end, ..Self::default() }
    }

    /// Adds an extent, which a reader has given.
    pub fn insert(&mut self, extent: Extent) {
        let number = self.extents.len() as u32;
        if number == NONE {
            // 4 billion extents are more than any file has.
            return;
        }
        self.sorted = self.extents.last().is_none_or(|last| last.sequence < extent.sequence)
            && (self.sorted || self.extents.is_empty());
        self.extents.push(extent);
        for page in extent.pages.pieces(1).map(|page| page.start.0) {
            let leaf = self
                .pages
                .entry((extent.block, page / LEAF))
                .or_insert_with(|| Box::new([NONE; LEAF as usize]));
            let newest = &mut leaf[(page % LEAF) as usize];
            let newer =
                self.extents.get(*newest as usize).is_none_or(|there| there.sequence < extent.sequence);
            if newer {
                *newest = number;
            }
        }
    }

    /// The newest version of a page.
    pub fn newest(&self, block: BlockId, page: PageIndex) -> Option<&Extent> {
        let number = self.pages.get(&(block, page.0 / LEAF))?[(page.0 % LEAF) as usize];
        self.extents.get(number as usize)
    }

    /// The newest version of a page, if it is of this sequence number or newer.
    pub fn since(&self, block: BlockId, page: PageIndex, sequence: u64) -> Option<&Extent> {
        self.newest(block, page).filter(|extent| extent.sequence >= sequence)
    }

    /// Where trust begins, when the writer says that it has written `end` extents and that those before
    /// `floor` do not matter: what is older than an extent that is missing may be older than that one's
    /// pages. Every extent from the answer to `end` is there.
    pub fn whole_from(&self, floor: u64, end: u64) -> u64 {
        let mut known: Vec<u64> = self.extents.iter().map(|extent| extent.sequence).collect();
        if !self.sorted {
            known.sort_unstable();
        }
        let mut from = end;
        for sequence in known.into_iter().rev().filter(|sequence| *sequence < end) {
            if sequence + 1 != from || from == floor {
                break;
            }
            from = sequence;
        }
        from.max(floor)
    }

    /// All extents, as they follow one another in the file.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Bytes that were no extent although extents follow.
    pub fn damaged(&self) -> u64 {
        self.damaged
    }

    /// Up to which byte the file was looked at.
    pub fn end(&self) -> u64 {
        self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExtentKind;
    use proptest::prelude::*;
    use units::PageRange;

    fn extent(sequence: u64, start: u64, count: u64) -> Extent {
        let pages = PageRange::new(PageIndex(start), count);
        let (kind, block) = (ExtentKind::Zero, BlockId(0));
        Extent { sequence, round: 1, kind, block, pages, offset: sequence * 128, length: 0, tag: [0; 32] }
    }

    proptest! {
        #[test]
        fn the_newest_version_wins_in_whatever_order_it_is_found(
            extents in prop::collection::vec((0u64..3000, 1u64..2000), 1..20).prop_shuffle(),
            order: u64,
        ) {
            let mut all: Vec<Extent> =
                extents.iter().zip(0..).map(|((start, count), n)| extent(n, *start, *count)).collect();
            let turn = order as usize % all.len();
            all.rotate_left(turn);
            let mut index = Index::default();
            all.iter().for_each(|extent| index.insert(*extent));
            for page in (0..5000).step_by(7).map(PageIndex) {
                let has = |e: &&Extent| e.pages.start <= page && page < e.pages.end();
                let newest = all.iter().filter(has).max_by_key(|e| e.sequence);
                prop_assert_eq!(index.newest(BlockId(0), page), newest);
            }
        }

        #[test]
        fn trust_begins_behind_the_last_gap(found: std::collections::BTreeSet<u8>, floor: u8, end: u8) {
            let (floor, end) = (u64::from(floor.min(end)), u64::from(end));
            let mut index = Index::default();
            found.iter().for_each(|n| index.insert(extent(u64::from(*n), 0, 1)));
            let from = index.whole_from(floor, end);
            let there = |n: u64| found.contains(&(n as u8));
            prop_assert!((from..end).all(there));
            prop_assert!(from == floor || !there(from - 1));
        }
    }
}
