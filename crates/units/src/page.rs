//! Where a page is.

use crate::Bytes;
use std::fmt;

/// The size of a guest page, in bytes: what a dirty bit stands for on x86-64.
pub const PAGE_SIZE: usize = 4096;

/// Which RAM block of the VM, by its place in the list that both sides agreed on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockId(pub u16);

/// A page's place within its RAM block, counted in pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// The page that holds byte `offset` of the block.
    pub fn at_offset(offset: u64) -> Self {
        Self(offset / PAGE_SIZE as u64)
    }

    /// Where the page begins in its block, in bytes.
    pub fn offset(self) -> u64 {
        self.0 * PAGE_SIZE as u64
    }
}

/// Contiguous pages of one block. Never reaches beyond 2^52 pages, so its byte offsets fit in 64 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PageRange {
    /// The first page.
    pub start: PageIndex,
    /// How many pages.
    pub count: u64,
}

impl PageRange {
    /// `count` pages from `start` on.
    pub fn new(start: PageIndex, count: u64) -> Self {
        Self { start, count }
    }

    /// The first page after the range.
    pub fn end(self) -> PageIndex {
        PageIndex(self.start.0 + self.count)
    }

    /// Whether it holds no page.
    pub fn is_empty(self) -> bool {
        self.count == 0
    }

    /// How much memory it spans.
    pub fn bytes(self) -> Bytes {
        Bytes(self.count * PAGE_SIZE as u64)
    }

    /// Whether the whole range lies within a block of `pages` pages. Safe for any values, so it is the check
    /// for whatever a peer sends.
    pub fn fits(self, pages: u64) -> bool {
        self.start.0.checked_add(self.count).is_some_and(|end| end <= pages)
    }

    /// Cuts the range into pieces of at most `count` pages.
    pub fn pieces(self, count: u64) -> impl Iterator<Item = PageRange> {
        assert!(count > 0, "pieces need a size");
        (0..self.count.div_ceil(count)).map(move |i| {
            let start = self.start.0 + i * count;
            PageRange::new(PageIndex(start), count.min(self.end().0 - start))
        })
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pages {}..{}", self.start.0, self.start.0.saturating_add(self.count))
    }
}
