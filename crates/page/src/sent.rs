//! What the target has, page by page: the source's memory of what it sent.
//!
//! One for each connection to a target, shared by the threads of all streams; what was sent over a connection
//! that is lost is not known to have arrived, so it goes with it. Costs 16 bytes for each page sent (its
//! print), 10.7 for each that the guest ever wrote (the index), and the versions that deltas are made
//! against.

use crate::{
    fingerprint::{Fingerprint, Fingerprinter, Tagger, is_zero},
    index::Index,
    versions::Versions,
};
use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering::Relaxed},
};
use units::{BlockId, PageIndex};

/// Pages whose fingerprints are allocated together: 16 KiB. Holes of the guest cost nothing.
const LEAF: u64 = 1024;

/// What versions may take at most: 32 MiB, half of what an agent may grow by during a migration …
const MOST_VERSIONS: u64 = 32 << 20;

/// … and less for large guests, whose fingerprints and index take their part of this: 48 MiB together, 4 MiB
/// for versions at least.
const BUDGET: u64 = 48 << 20;
const LEAST_VERSIONS: u64 = 4 << 20;
const BYTES_A_PAGE: u64 = 27;

/// Two halves of a print.
type Halves = [AtomicU64; 2];

/// What the target has.
pub struct Sent {
    printer: Fingerprinter,
    pub(crate) tagger: Tagger,
    /// What the target has where nothing was sent.
    unsent: Fingerprint,
    blocks: Vec<Vec<OnceLock<Box<[Halves]>>>>,
    /// The number of each block's first page, counted over all blocks; and of the one after the last.
    starts: Vec<u64>,
    index: Index,
    pub(crate) versions: Versions,
}

impl Sent {
    /// Nothing was sent yet to a target whose memory is all holes. `pages`: the blocks' sizes; `present`: how
    /// many pages the guest ever wrote; `secret` never leaves this side, `tagger` is shared with the target.
    pub fn new(pages: &[u64], present: u64, secret: &[u8; 32], tagger: Tagger) -> Self {
        let mut starts = vec![0];
        starts.extend(pages.iter().scan(0, |sum, pages| {
            *sum += pages;
            Some(*sum)
        }));
        let versions = BUDGET.saturating_sub(present * BYTES_A_PAGE).clamp(LEAST_VERSIONS, MOST_VERSIONS);
        Self {
            printer: Fingerprinter::new(secret),
            tagger,
            unsent: Fingerprint::ZERO,
            blocks: pages.iter().map(|p| (0..p.div_ceil(LEAF)).map(|_| OnceLock::new()).collect()).collect(),
            starts,
            index: Index::new(present),
            versions: Versions::new(versions as usize),
        }
    }

    /// The target has content already, of which nothing is known: no page is taken for unchanged before it
    /// was sent.
    pub fn to_a_target_with_content(self) -> Self {
        Self { unsent: Fingerprint::UNKNOWN, ..self }
    }

    /// Makes the tags that the target verifies.
    pub fn tagger(&self) -> &Tagger {
        &self.tagger
    }

    /// A round begins.
    pub fn turn(&self, round: u32) {
        self.versions.turn(round);
    }

    /// This page, with this content, goes to the target on another way than its streams, which must be over
    /// before the round is. Says whether the target has it already: then it need not go.
    pub fn goes_otherwise(&self, block: BlockId, page: PageIndex, content: &[u8]) -> bool {
        let fingerprint = if is_zero(content) { Fingerprint::ZERO } else { self.fingerprint(content) };
        let unchanged = self.last(block, page) == fingerprint;
        if !unchanged {
            self.versions.forget(self.number(block, page));
            self.set(block, page, fingerprint);
        }
        unchanged
    }

    /// Nobody knows what the target has of this page: it is not taken for unchanged, whatever it holds, and
    /// not referred to.
    pub fn forget(&self, block: BlockId, page: PageIndex) {
        self.versions.forget(self.number(block, page));
        self.set(block, page, Fingerprint::UNKNOWN);
    }

    pub(crate) fn fingerprint(&self, page: &[u8]) -> Fingerprint {
        self.printer.fingerprint(page)
    }

    /// The page's number, counted over all blocks.
    pub(crate) fn number(&self, block: BlockId, page: PageIndex) -> u64 {
        self.starts[usize::from(block.0)] + page.0
    }

    fn place(&self, number: u64) -> Option<(BlockId, PageIndex)> {
        let block = self.starts.partition_point(|start| *start <= number).checked_sub(1)?;
        (block < self.blocks.len()).then(|| (BlockId(block as u16), PageIndex(number - self.starts[block])))
    }

    fn leaf(&self, block: BlockId, page: PageIndex) -> &OnceLock<Box<[Halves]>> {
        &self.blocks[usize::from(block.0)][(page.0 / LEAF) as usize]
    }

    /// What was sent of this page last.
    pub(crate) fn last(&self, block: BlockId, page: PageIndex) -> Fingerprint {
        let Some(leaf) = self.leaf(block, page).get() else { return self.unsent };
        let [low, high] = &leaf[(page.0 % LEAF) as usize];
        // Another thread may be writing the two halves of a page that it is just sending; nobody else refers
        // to that.
        Fingerprint(u128::from(low.load(Relaxed)) | u128::from(high.load(Relaxed)) << 64)
    }

    /// This is being sent of the page.
    pub(crate) fn set(&self, block: BlockId, page: PageIndex, fingerprint: Fingerprint) {
        let halves = |fingerprint: Fingerprint| [fingerprint.0 as u64, (fingerprint.0 >> 64) as u64];
        let unsent = || (0..LEAF).map(|_| halves(self.unsent).map(AtomicU64::new)).collect();
        let [low, high] = &self.leaf(block, page).get_or_init(unsent)[(page.0 % LEAF) as usize];
        let fingerprint = halves(fingerprint);
        low.store(fingerprint[0], Relaxed);
        high.store(fingerprint[1], Relaxed);
    }

    /// Others may refer to the page of this number from now on for its content.
    pub(crate) fn offer(&self, number: u64, fingerprint: Fingerprint) {
        self.index.insert(fingerprint, number);
    }

    /// A page that the target has, with this content, among those that `may_refer` allows.
    pub(crate) fn find(
        &self,
        fingerprint: Fingerprint,
        may_refer: impl Fn(BlockId, PageIndex) -> bool,
    ) -> Option<(BlockId, PageIndex)> {
        self.index
            .look(fingerprint)
            .filter_map(|number| self.place(number))
            .find(|(block, page)| self.has(*block, *page, fingerprint) && may_refer(*block, *page))
    }

    /// Whether the target has this content in this page; false for a page that the VM has not.
    pub(crate) fn has(&self, block: BlockId, page: PageIndex, fingerprint: Fingerprint) -> bool {
        let pages = self.starts[usize::from(block.0) + 1] - self.starts[usize::from(block.0)];
        page.0 < pages && self.last(block, page) == fingerprint
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use units::PAGE_SIZE;

    #[test]
    fn what_goes_another_way_is_known_what_is_forgotten_is_not() {
        let sent = Sent::new(&[100], 100, &[1; 32], Tagger::new([2; 32]));
        let (zeros, ones) = ([0; PAGE_SIZE], [1; PAGE_SIZE]);
        let (block, page) = (BlockId(0), PageIndex(7));
        assert!(sent.goes_otherwise(block, page, &zeros), "the target begins with zeros");
        assert!(!sent.goes_otherwise(block, page, &ones));
        assert!(sent.goes_otherwise(block, page, &ones));
        sent.forget(block, page);
        assert!(!sent.goes_otherwise(block, page, &ones));
        sent.forget(block, page);
        assert!(!sent.goes_otherwise(block, page, &zeros));
    }
}
