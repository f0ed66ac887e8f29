//! What the target keeps of the VM: its memory as it was when it left that host.
//!
//! The target tells of it by short tags, one a page. The source names a run of pages that have these tags,
//! with one tag for the run, and the target copies what it keeps only if that has the same tag (I7). What is
//! kept never changes, so such a run is true whenever it arrives.

use crate::fingerprint::{TAG, Tagger};
use units::{PAGE_SIZE, PageIndex};

/// The short tag of a page of which nothing is kept.
pub const NOTHING_KEPT: u64 = 0;

/// Half a tag is enough to find content that is probably there: two pages that share one by chance cost a
/// refusal, no wrong page.
fn short(tag: &[u8; TAG]) -> u64 {
    u64::from_le_bytes(*tag.first_chunk().expect("a tag is longer than half of it")).max(NOTHING_KEPT + 1)
}

impl Tagger {
    /// By which a target tells that it keeps this page. Never [`NOTHING_KEPT`].
    pub fn short(&self, page: &[u8]) -> u64 {
        short(&self.tag(page))
    }

    /// The tag of a run: that of its pages' tags, each of which the source has computed to compare it.
    pub(crate) fn tag_of_run(&self, content: &[u8]) -> [u8; TAG] {
        let tags: Vec<u8> = content.chunks(PAGE_SIZE).flat_map(|page| self.tag(page)).collect();
        self.tag(&tags)
    }
}

/// The short tags of neighbouring pages of one block, as the target told them.
#[derive(Clone, Copy)]
pub struct Kept<'a> {
    /// The migration's.
    pub tagger: &'a Tagger,
    /// The page of the first of them.
    pub first: PageIndex,
    /// One a page.
    pub tags: &'a [u64],
}

impl Kept<'_> {
    /// The tag of a page, if the target keeps just that content in the same place.
    pub(crate) fn find(&self, index: PageIndex, page: &[u8]) -> Option<[u8; TAG]> {
        let at = usize::try_from(index.0.checked_sub(self.first.0)?).ok()?;
        let told = self.tags.get(at).filter(|tag| **tag != NOTHING_KEPT)?;
        let tag = self.tagger.tag(page);
        (short(&tag) == *told).then_some(tag)
    }
}
