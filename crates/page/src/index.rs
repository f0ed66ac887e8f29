//! Which page has this content? A table of bounded size for many threads, which forgets rather than grows.

use crate::fingerprint::Fingerprint;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Places in a bucket: one line of a core's cache, so that a look costs one miss.
const BUCKET: usize = 8;

/// Buckets are made for so many pages each, of eight that fit: 10.7 bytes a page, and at worst one page in 20
/// is forgotten because its bucket is full (`forgets_little`).
const FILL: usize = 6;

/// Page numbers by print. Answers are candidates: whoever asks compares the page's whole print.
pub(crate) struct Index {
    /// Upper half: a part of the print. Lower half: the page's number plus one.
    slots: Vec<AtomicU64>,
}

impl Index {
    /// For so many pages.
    pub(crate) fn new(pages: u64) -> Self {
        let buckets = (pages as usize).div_ceil(FILL).max(1);
        Self { slots: (0..buckets * BUCKET).map(|_| AtomicU64::new(0)).collect() }
    }

    fn bucket(&self, fingerprint: Fingerprint) -> (&[AtomicU64], u64) {
        let buckets = (self.slots.len() / BUCKET) as u128;
        let at = (u128::from(fingerprint.0 as u64) * buckets) >> 64;
        let at = at as usize * BUCKET;
        // The print's highest bit is always set, so no tag is that of an empty slot.
        (&self.slots[at..at + BUCKET], (fingerprint.0 >> 96) as u64)
    }

    /// Pages that may have this content.
    pub(crate) fn look(&self, fingerprint: Fingerprint) -> impl Iterator<Item = u64> {
        let (bucket, tag) = self.bucket(fingerprint);
        bucket
            .iter()
            .map(|slot| slot.load(Relaxed))
            .filter(move |s| s >> 32 == tag)
            .map(|s| u64::from(s as u32) - 1)
    }

    /// This page has this content now. What it had before is found out of date when somebody asks.
    pub(crate) fn insert(&self, fingerprint: Fingerprint, page: u64) {
        let Some(number) = u32::try_from(page).ok().and_then(|page| page.checked_add(1)) else {
            // Beyond 16 TiB of guest memory; it is sent, but nothing refers to it.
            return;
        };
        let (bucket, tag) = self.bucket(fingerprint);
        let entry = tag << 32 | u64::from(number);
        let free = |slot: &&AtomicU64| {
            let there = slot.load(Relaxed);
            there == 0 || there == entry
        };
        // Another thread may take the same slot at this moment: then one of the two is forgotten.
        let slot = bucket.iter().find(free).unwrap_or(&bucket[tag as usize % BUCKET]);
        slot.store(entry, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn fingerprint(of: u64) -> Fingerprint {
        crate::fingerprint::Fingerprinter::new(&[0; 32]).fingerprint(&of.to_le_bytes().repeat(64))
    }

    proptest! {
        #[test]
        fn it_knows_what_a_map_knows_or_nothing(writes in prop::collection::vec((0u64..40, 0u64..60),
            0..200)) {
            let (index, mut map, mut content) = (Index::new(60), HashMap::<u64, Vec<u64>>::new(),
                HashMap::new());
            for (of, page) in writes {
                index.insert(fingerprint(of), page);
                map.entry(of).or_default().push(page);
                content.insert(page, of);
            }
            for of in 0..40 {
                for page in index.look(fingerprint(of)) {
                    prop_assert!(map.get(&of).is_some_and(|pages| pages.contains(&page)));
                }
            }
        }
    }

    #[test]
    fn forgets_little() {
        let pages = 20_000;
        let index = Index::new(pages);
        (0..pages).for_each(|page| index.insert(fingerprint(page), page));
        let known =
            (0..pages).filter(|page| index.look(fingerprint(*page)).any(|found| found == *page)).count();
        assert!(known as u64 > pages * 94 / 100, "{known}");
    }

    #[test]
    fn pages_beyond_its_numbers_are_left_out() {
        let index = Index::new(10);
        index.insert(fingerprint(1), u64::from(u32::MAX));
        index.insert(fingerprint(1), u64::MAX);
        assert_eq!(index.look(fingerprint(1)).count(), 0);
    }
}
