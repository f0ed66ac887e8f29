//! `PageSet` is clever; `BTreeSet` is obvious. Whatever is done to both, they agree.

use proptest::prelude::*;
use std::collections::BTreeSet;
use units::{PageIndex, PageRange, PageSet};

#[derive(Clone, Debug)]
enum Change {
    Insert(u64, u64),
    Remove(u64, u64),
    Union(Vec<u64>),
    Intersect(Vec<u64>),
    Subtract(Vec<u64>),
}

/// Small blocks, and such that do not fit into a leaf of the set.
fn pages() -> impl Strategy<Value = u64> {
    prop_oneof![1u64..300, 4000u64..4200, 8000u64..9000]
}

fn range(pages: u64) -> impl Strategy<Value = (u64, u64)> {
    (0..pages).prop_flat_map(move |start| (Just(start), 0..=pages - start))
}

fn change(pages: u64) -> impl Strategy<Value = Change> {
    let some = || prop::collection::vec(0..pages, 0..40);
    prop_oneof![
        range(pages).prop_map(|(s, n)| Change::Insert(s, n)),
        range(pages).prop_map(|(s, n)| Change::Remove(s, n)),
        some().prop_map(Change::Union),
        some().prop_map(Change::Intersect),
        some().prop_map(Change::Subtract),
    ]
}

fn set_of(pages: u64, members: &[u64]) -> PageSet {
    let mut set = PageSet::empty(pages);
    for page in members {
        set.insert(PageIndex(*page));
    }
    set
}

proptest! {
    #[test]
    fn agrees_with_the_obvious_set(
        (pages, changes) in pages().prop_flat_map(|n| (Just(n), prop::collection::vec(change(n), 0..20))),
        (a, b) in (0u64..10_000, 0u64..10_000),
    ) {
        let mut clever = PageSet::empty(pages);
        let mut obvious = BTreeSet::new();
        for change in changes {
            match change {
                Change::Insert(s, n) => {
                    clever.insert_range(PageRange::new(PageIndex(s), n));
                    obvious.extend(s..s + n);
                }
                Change::Remove(s, n) => {
                    clever.remove_range(PageRange::new(PageIndex(s), n));
                    obvious.retain(|p| !(s..s + n).contains(p));
                }
                Change::Union(v) => {
                    clever.union(&set_of(pages, &v));
                    obvious.extend(v);
                }
                Change::Intersect(v) => {
                    clever.intersect(&set_of(pages, &v));
                    obvious.retain(|p| v.contains(p));
                }
                Change::Subtract(v) => {
                    clever.subtract(&set_of(pages, &v));
                    obvious.retain(|p| !v.contains(p));
                }
            }
        }
        prop_assert_eq!(clever.len(), obvious.len() as u64);
        prop_assert_eq!(clever.is_empty(), obvious.is_empty());
        let members: Vec<u64> = clever.runs().flat_map(|r| r.start.0..r.end().0).collect();
        prop_assert_eq!(&members, &obvious.iter().copied().collect::<Vec<_>>());
        // Equal sets are the same, however they came about.
        prop_assert_eq!(&clever, &set_of(pages, &members));
        for page in 0..pages + 5000 {
            prop_assert_eq!(clever.contains(PageIndex(page)), obvious.contains(&page));
        }
        for page in [a, b, 0, pages] {
            let first = obvious.range(page..).next().copied();
            prop_assert_eq!(clever.first_from(PageIndex(page)), first.map(PageIndex));
        }
        let (start, end) = (a.min(b).min(pages), a.max(b).min(pages));
        let part = PageRange::new(PageIndex(start), end - start);
        let within: Vec<u64> = clever.runs_within(part).flat_map(|r| r.start.0..r.end().0).collect();
        prop_assert_eq!(within, obvious.range(start..end).copied().collect::<Vec<_>>());
    }

    #[test]
    fn a_large_set_survives_being_written_and_read(
        (pages, members) in pages().prop_flat_map(|n| (Just(n), prop::collection::vec(0..n, 0..50))),
    ) {
        let set = set_of(pages, &members);
        let bytes = set.to_bytes();
        for page in 0..pages {
            let bit = bytes[(page / 8) as usize] >> (page % 8) & 1 == 1;
            prop_assert_eq!(bit, members.contains(&page), "{}", page);
        }
        prop_assert_eq!(PageSet::from_bytes(pages, &bytes), Some(set));
    }

    #[test]
    fn a_set_survives_being_written_and_read(members in prop::collection::vec(0u64..500, 0..200)) {
        let set = set_of(500, &members);
        let bytes = set.to_bytes();
        prop_assert_eq!(PageSet::from_bytes(500, &bytes), Some(set));
        prop_assert_eq!(PageSet::from_bytes(499, &[&bytes[..62], &[0xff]].concat()), None);
        prop_assert_eq!(PageSet::from_bytes(500, &bytes[1..]), None);
    }

    #[test]
    fn runs_never_touch(members in prop::collection::btree_set(0u64..500, 0..200)) {
        let set = set_of(500, &members.into_iter().collect::<Vec<_>>());
        let runs: Vec<_> = set.runs().collect();
        for pair in runs.windows(2) {
            prop_assert!(pair[0].end() < pair[1].start);
        }
    }

    #[test]
    fn pieces_cover_a_range_in_order(start in 0u64..1000, count in 0u64..1000, piece in 1u64..200) {
        let range = PageRange::new(PageIndex(start), count);
        let pages: Vec<u64> = range.pieces(piece).flat_map(|r| {
            assert!(r.count <= piece && r.count > 0);
            r.start.0..r.end().0
        }).collect();
        prop_assert_eq!(pages, (start..start + count).collect::<Vec<_>>());
    }

    #[test]
    fn no_range_from_a_peer_fits_that_reaches_beyond(start: u64, count: u64, pages in 0u64..1 << 40) {
        let fits = PageRange::new(PageIndex(start), count).fits(pages);
        prop_assert_eq!(fits, u128::from(start) + u128::from(count) <= u128::from(pages));
    }
}
