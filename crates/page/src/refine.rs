//! For each page the cheapest message that is true.

use twox_hash::XxHash3_64;
use units::{PAGE_SIZE, PageIndex, PageRange};

/// What a run of pages is sent as.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Class {
    /// Full of zeros: no content travels.
    Zero,
    /// As it is.
    Plain,
}

/// Neighbouring pages of the same class.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refined {
    /// Which pages.
    pub range: PageRange,
    /// What they are sent as.
    pub class: Class,
}

/// Splits `content`, whole pages from `start` on, into the longest runs of one class, in order.
pub fn refine(start: PageIndex, content: &[u8]) -> Vec<Refined> {
    debug_assert_eq!(content.len() % PAGE_SIZE, 0, "whole pages");
    let mut runs: Vec<Refined> = Vec::new();
    for (page, i) in content.chunks_exact(PAGE_SIZE).zip(0..) {
        let class = if is_zero(page) { Class::Zero } else { Class::Plain };
        match runs.last_mut() {
            Some(run) if run.class == class => run.range.count += 1,
            _ => runs.push(Refined { range: PageRange::new(PageIndex(start.0 + i), 1), class }),
        }
    }
    runs
}

/// Whether there is nothing but zeros. Most pages that are not show it in their first bytes.
#[inline]
pub fn is_zero(bytes: &[u8]) -> bool {
    // 64 bytes a step let the compiler use the widest registers, and a step still ends early.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|c| c.iter().fold(0, |acc, b| acc | b) == 0) && rest.iter().all(|b| *b == 0)
}

/// A hash that tells apart pages which differ by accident (XXH3, 64 bits). No defence against a chosen collision.
pub fn fingerprint(page: &[u8]) -> u64 {
    XxHash3_64::oneshot(page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_rebuild_the_pages(kinds in prop::collection::vec(prop::option::of(0usize..PAGE_SIZE), 0..20)) {
            let mut content = vec![0u8; kinds.len() * PAGE_SIZE];
            for (page, at) in kinds.iter().enumerate() {
                if let Some(at) = at {
                    content[page * PAGE_SIZE + at] = 1;
                }
            }
            let runs = refine(PageIndex(7), &content);
            let classes: Vec<Class> =
                runs.iter().flat_map(|r| vec![r.class; r.range.count as usize]).collect();
            let obvious: Vec<Class> =
                kinds.iter().map(|k| if k.is_some() { Class::Plain } else { Class::Zero }).collect();
            prop_assert_eq!(classes, obvious);
            let mut next = PageIndex(7);
            for pair in runs.windows(2) {
                prop_assert!(pair[0].class != pair[1].class);
            }
            for run in runs {
                prop_assert_eq!(run.range.start, next);
                next = run.range.end();
            }
        }
    }

    #[test]
    fn one_bit_changes_the_fingerprint() {
        let mut page = vec![0; PAGE_SIZE];
        let before = fingerprint(&page);
        page[4095] ^= 1;
        assert_ne!(before, fingerprint(&page));
    }
}
