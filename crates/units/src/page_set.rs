//! Sets of pages: dense bitmaps, because a dirty set has no shape that is worth betting on.

use crate::{BlockId, Bytes, PAGE_SIZE, PageIndex, PageRange};

/// A set of pages of one RAM block: one bit a page, 32 KiB for each GiB. How many pages are in it is counted
/// along: whoever asks that often, for a block of 256 GiB, must not look at 8 MiB each time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
    count: u64,
}

impl PageSet {
    /// No page of a block of `pages` pages.
    pub fn empty(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize], pages, count: 0 }
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
        page.0 < self.pages && self.words[(page.0 / 64) as usize] >> (page.0 % 64) & 1 == 1
    }

    /// Adds every page of `range`, which must lie within the block.
    pub fn insert_range(&mut self, range: PageRange) {
        self.each_word(range, |word, mask| *word |= mask);
    }

    /// Takes every page of `range` out; it must lie within the block.
    pub fn remove_range(&mut self, range: PageRange) {
        self.each_word(range, |word, mask| *word &= !mask);
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
            self.words.fill(0);
            self.count = 0;
        }
    }

    /// Adds the pages of `other`, a set of the same block.
    pub fn union(&mut self, other: &PageSet) {
        self.zip(other, |mine, theirs| *mine |= theirs);
    }

    /// Keeps only the pages that `other`, a set of the same block, has too.
    pub fn intersect(&mut self, other: &PageSet) {
        self.zip(other, |mine, theirs| *mine &= theirs);
    }

    /// Takes out the pages of `other`, a set of the same block.
    pub fn subtract(&mut self, other: &PageSet) {
        self.zip(other, |mine, theirs| *mine &= !theirs);
    }

    /// The bitmap, eight pages a byte, the first page in the lowest bit of the first byte.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.truncate(self.pages.div_ceil(8) as usize);
        bytes
    }

    /// The set that `to_bytes` wrote; `None` if that cannot have been a set of a block of `pages` pages.
    pub fn from_bytes(pages: u64, bytes: &[u8]) -> Option<Self> {
        if bytes.len() as u64 != pages.div_ceil(8) {
            return None;
        }
        let word = |eight: &[u8]| {
            let mut word = [0; 8];
            word[..eight.len()].copy_from_slice(eight);
            u64::from_le_bytes(word)
        };
        let words: Vec<u64> = bytes.chunks(8).map(word).collect();
        let count = words.iter().map(|word| u64::from(word.count_ones())).sum();
        let set = Self { words, pages, count };
        let beyond = set.words.last().is_some_and(|w| !pages.is_multiple_of(64) && w >> (pages % 64) != 0);
        (!beyond).then_some(set)
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

    /// The first page at or after `from`, before `end`, whose membership is `wanted`; `end` if there is none.
    fn find(&self, from: u64, end: u64, wanted: bool) -> u64 {
        let mut at = from;
        while at < end {
            let word = self.words[(at / 64) as usize];
            let word = if wanted { word } else { !word };
            let rest = word >> (at % 64);
            if rest != 0 {
                return end.min(at + u64::from(rest.trailing_zeros()));
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }

    fn each_word(&mut self, range: PageRange, apply: impl Fn(&mut u64, u64)) {
        assert!(range.fits(self.pages), "{range} in a block of {} pages", self.pages);
        let mut at = range.start.0;
        while at < range.end().0 {
            let bit = at % 64;
            let count = (64 - bit).min(range.end().0 - at);
            let word = &mut self.words[(at / 64) as usize];
            let before = u64::from(word.count_ones());
            apply(word, (u64::MAX >> (64 - count)) << bit);
            self.count = self.count - before + u64::from(word.count_ones());
            at += count;
        }
    }

    fn zip(&mut self, other: &PageSet, apply: impl Fn(&mut u64, u64)) {
        assert_eq!(self.pages, other.pages, "sets of different blocks");
        self.count = 0;
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            apply(mine, *theirs);
            self.count += u64::from(mine.count_ones());
        }
    }
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
