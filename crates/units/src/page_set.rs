//! Sets of pages. They cost what they contain: a guest of a terabyte has 2^28 pages, of which a pause moves a
//! few hundred.

use crate::{BlockId, Bytes, PAGE_SIZE, PageIndex, PageRange};

/// Pages of a leaf: 16 MiB of memory, 512 bytes. Smaller ones would make the list of leaves longer, larger
/// ones a scattered set bigger.
const LEAF: u64 = 4096;

/// Words of a leaf.
const WORDS: usize = (LEAF / 64) as usize;

/// A set of pages of one RAM block. Where pages are in it, one bit a page; where none are, 8 bytes for each
/// 16 MiB of the block. How many pages are in it is counted along.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageSet {
    /// None where no page is: so two equal sets are the same.
    leaves: Vec<Option<Box<Leaf>>>,
    pages: u64,
    count: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Leaf {
    words: [u64; WORDS],
    count: u32,
}

impl Leaf {
    const EMPTY: Self = Self { words: [0; WORDS], count: 0 };

    fn counted(words: [u64; WORDS]) -> Self {
        Self { words, count: words.iter().map(|word| word.count_ones()).sum() }
    }

    /// As it is kept.
    fn kept(self) -> Option<Box<Self>> {
        (self.count > 0).then(|| Box::new(self))
    }

    /// Applies to each word with what `other` has at its place.
    fn change(&mut self, other: &Self, apply: impl Fn(&mut u64, u64)) {
        self.words.iter_mut().zip(&other.words).for_each(|(mine, theirs)| apply(mine, *theirs));
        *self = Self::counted(self.words);
    }
}

/// How many pages one leaf of a set has.
fn count(leaf: Option<&Leaf>) -> u64 {
    leaf.map_or(0, |leaf| leaf.count.into())
}

impl PageSet {
    /// No page of a block of `pages` pages.
    pub fn empty(pages: u64) -> Self {
        Self { leaves: vec![None; pages.div_ceil(LEAF) as usize], pages, count: 0 }
    }

    /// Every page of a block of `pages` pages.
    pub fn full(pages: u64) -> Self {
        let mut set = Self::empty(pages);
        set.insert_range(PageRange::new(PageIndex(0), pages));
        set
    }

    /// How many pages the block has.
    pub fn capacity(&self) -> u64 {
        self.pages
    }

    /// How many pages are in the set.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether `page` is in the set; a page beyond the block is not.
    pub fn contains(&self, page: PageIndex) -> bool {
        let Some(Some(leaf)) = self.leaves.get((page.0 / LEAF) as usize) else { return false };
        leaf.words[(page.0 % LEAF / 64) as usize] >> (page.0 % 64) & 1 == 1
    }

    /// Adds every page of `range`, which must lie within the block.
    pub fn insert_range(&mut self, range: PageRange) {
        assert!(range.fits(self.pages), "{range} in a block of {} pages", self.pages);
        let mut at = range.start.0;
        while at < range.end().0 {
            let leaf = self.leaves[(at / LEAF) as usize].get_or_insert_with(|| Box::new(Leaf::EMPTY));
            let end = range.end().0.min((at / LEAF + 1) * LEAF);
            let (before, after) = each_word(leaf, at % LEAF, end - at, |word, mask| *word |= mask);
            self.count = self.count - before + after;
            at = end;
        }
    }

    /// Takes every page of `range` out; it must lie within the block.
    pub fn remove_range(&mut self, range: PageRange) {
        assert!(range.fits(self.pages), "{range} in a block of {} pages", self.pages);
        let mut at = range.start.0;
        while at < range.end().0 {
            let place = &mut self.leaves[(at / LEAF) as usize];
            let end = range.end().0.min((at / LEAF + 1) * LEAF);
            if let Some(leaf) = place {
                let (before, after) = each_word(leaf, at % LEAF, end - at, |word, mask| *word &= !mask);
                self.count = self.count - before + after;
                if leaf.count == 0 {
                    *place = None;
                }
            }
            at = end;
        }
    }

    /// Adds `page`; says whether it was new.
    pub fn insert(&mut self, page: PageIndex) -> bool {
        let new = !self.contains(page);
        self.insert_range(PageRange::new(page, 1));
        new
    }

    /// Takes `page` out; says whether it was there.
    pub fn remove(&mut self, page: PageIndex) -> bool {
        let there = self.contains(page);
        self.remove_range(PageRange::new(page, 1));
        there
    }

    /// Takes every page out.
    pub fn clear(&mut self) {
        if self.count > 0 {
            self.leaves.fill(None);
            self.count = 0;
        }
    }

    /// Adds the pages of `other`, a set of the same block.
    pub fn union(&mut self, other: &PageSet) {
        self.zip(other, |mine, theirs| match (mine.as_mut(), theirs) {
            (_, None) => {}
            (None, Some(theirs)) => *mine = Some(Box::new(theirs.clone())),
            (Some(mine), Some(theirs)) => mine.change(theirs, |mine, theirs| *mine |= theirs),
        });
    }

    /// Keeps only the pages that `other`, a set of the same block, has too.
    pub fn intersect(&mut self, other: &PageSet) {
        self.zip(other, |mine, theirs| match (mine.as_mut(), theirs) {
            (None, _) => {}
            (Some(_), None) => *mine = None,
            (Some(mine), Some(theirs)) => mine.change(theirs, |mine, theirs| *mine &= theirs),
        });
    }

    /// Takes out the pages of `other`, a set of the same block.
    pub fn subtract(&mut self, other: &PageSet) {
        self.zip(other, |mine, theirs| {
            if let (Some(mine), Some(theirs)) = (mine, theirs) {
                mine.change(theirs, |mine, theirs| *mine &= !theirs);
            }
        });
    }

    /// The bitmap, eight pages a byte, the first page in the lowest bit of the first byte.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.pages.div_ceil(8) as usize];
        for (chunk, leaf) in bytes.chunks_mut((LEAF / 8) as usize).zip(&self.leaves) {
            let Some(leaf) = leaf else { continue };
            for (eight, word) in chunk.chunks_mut(8).zip(&leaf.words) {
                eight.copy_from_slice(&word.to_le_bytes()[..eight.len()]);
            }
        }
        bytes
    }

    /// The set that `to_bytes` wrote; `None` if that cannot have been a set of a block of `pages` pages.
    pub fn from_bytes(pages: u64, bytes: &[u8]) -> Option<Self> {
        if bytes.len() as u64 != pages.div_ceil(8) {
            return None;
        }
        let beyond = bytes.last().is_some_and(|last| !pages.is_multiple_of(8) && last >> (pages % 8) != 0);
        if beyond {
            return None;
        }
        let leaf = |bytes: &[u8]| {
            let mut words = [0; WORDS];
            for (word, some) in words.iter_mut().zip(bytes.chunks(8)) {
                let mut eight = [0; 8];
                eight[..some.len()].copy_from_slice(some);
                *word = u64::from_le_bytes(eight);
            }
            Leaf::counted(words).kept()
        };
        let leaves: Vec<_> = bytes.chunks((LEAF / 8) as usize).map(leaf).collect();
        let count = leaves.iter().map(|leaf| count(leaf.as_deref())).sum();
        Some(Self { leaves, pages, count })
    }

    /// The maximal contiguous runs of the set, in ascending order.
    pub fn runs(&self) -> Runs<'_> {
        self.runs_within(PageRange::new(PageIndex(0), self.pages))
    }

    /// The runs of the part of the set that lies in `range`, which must lie within the block.
    pub fn runs_within(&self, range: PageRange) -> Runs<'_> {
        assert!(range.fits(self.pages), "{range} in a block of {} pages", self.pages);
        Runs { set: self, at: range.start.0, end: range.end().0 }
    }

    /// The first page of the set at or after `from`.
    pub fn first_from(&self, from: PageIndex) -> Option<PageIndex> {
        let found = self.find(from.0, self.pages, true);
        (found < self.pages).then_some(PageIndex(found))
    }

    /// The first page at or after `from`, before `end`, whose membership is `wanted`; `end` if there is none.
    fn find(&self, from: u64, end: u64, wanted: bool) -> u64 {
        let mut at = from;
        while at < end {
            let Some(leaf) = &self.leaves[(at / LEAF) as usize] else {
                if !wanted {
                    return at;
                }
                at = (at / LEAF + 1) * LEAF;
                continue;
            };
            let word = leaf.words[(at % LEAF / 64) as usize];
            let word = if wanted { word } else { !word };
            let rest = word >> (at % 64);
            if rest != 0 {
                return end.min(at + u64::from(rest.trailing_zeros()));
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }

    /// Changes each leaf by what `other` has in its place.
    fn zip(&mut self, other: &PageSet, apply: impl Fn(&mut Option<Box<Leaf>>, Option<&Leaf>)) {
        assert_eq!(self.pages, other.pages, "sets of different blocks");
        for (mine, theirs) in self.leaves.iter_mut().zip(&other.leaves) {
            if mine.is_none() && theirs.is_none() {
                continue;
            }
            let before = count(mine.as_deref());
            apply(mine, theirs.as_deref());
            let after = count(mine.as_deref());
            if after == 0 {
                *mine = None;
            }
            self.count = self.count - before + after;
        }
    }
}

/// Applies to each word of a leaf in which some of these pages lie, with a mask of them. Says how many pages
/// it had before, and has after.
fn each_word(leaf: &mut Leaf, start: u64, pages: u64, apply: impl Fn(&mut u64, u64)) -> (u64, u64) {
    let (before, mut at, end) = (leaf.count, start, start + pages);
    while at < end {
        let bit = at % 64;
        let some = (64 - bit).min(end - at);
        let word = &mut leaf.words[(at / 64) as usize];
        let had = word.count_ones();
        apply(word, (u64::MAX >> (64 - some)) << bit);
        leaf.count = leaf.count - had + word.count_ones();
        at += some;
    }
    (before.into(), leaf.count.into())
}

/// The runs of a [`PageSet`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    set: &'a PageSet,
    at: u64,
    end: u64,
}

impl Iterator for Runs<'_> {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        let start = self.set.find(self.at, self.end, true);
        self.at = self.set.find(start, self.end, false);
        (start < self.end).then(|| PageRange::new(PageIndex(start), self.at - start))
    }
}

/// A set of pages of a whole VM: one [`PageSet`] for each RAM block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemorySet {
    blocks: Vec<PageSet>,
}

impl MemorySet {
    /// No page of blocks of these many pages each.
    pub fn empty(blocks: impl IntoIterator<Item = u64>) -> Self {
        Self { blocks: blocks.into_iter().map(PageSet::empty).collect() }
    }

    /// The sets of the blocks, in the order of their ids.
    pub fn from_blocks(blocks: Vec<PageSet>) -> Self {
        Self { blocks }
    }

    /// The set of one block. Panics for a block that the VM does not have.
    pub fn block(&self, id: BlockId) -> &PageSet {
        &self.blocks[usize::from(id.0)]
    }

    /// The set of one block. Panics for a block that the VM does not have.
    pub fn block_mut(&mut self, id: BlockId) -> &mut PageSet {
        &mut self.blocks[usize::from(id.0)]
    }

    /// The blocks' ids with their sets.
    pub fn blocks(&self) -> impl Iterator<Item = (BlockId, &PageSet)> {
        self.blocks.iter().enumerate().map(|(i, set)| (BlockId(i as u16), set))
    }

    /// How many pages are in the set.
    pub fn len(&self) -> u64 {
        self.blocks.iter().map(PageSet::len).sum()
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.blocks.iter().all(PageSet::is_empty)
    }

    /// How much memory the set stands for.
    pub fn bytes(&self) -> Bytes {
        Bytes(self.len() * PAGE_SIZE as u64)
    }

    /// Adds the pages of `other`, a set of the same VM.
    pub fn union(&mut self, other: &MemorySet) {
        assert_eq!(self.blocks.len(), other.blocks.len(), "sets of different VMs");
        for (mine, theirs) in self.blocks.iter_mut().zip(&other.blocks) {
            mine.union(theirs);
        }
    }

    /// Takes the pages of `other` out, a set of the same VM.
    pub fn subtract(&mut self, other: &MemorySet) {
        assert_eq!(self.blocks.len(), other.blocks.len(), "sets of different VMs");
        for (mine, theirs) in self.blocks.iter_mut().zip(&other.blocks) {
            mine.subtract(theirs);
        }
    }

    /// Takes every page out.
    pub fn clear(&mut self) {
        self.blocks.iter_mut().for_each(PageSet::clear);
    }
}
