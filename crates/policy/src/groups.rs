//! How many pages one write opens.

use std::{collections::VecDeque, ops::Range, time::Duration};
use units::{BlockId, MemorySet, PageIndex, PageRange};

/// Pages of a region, which has a group size of its own: 8 MiB.
///
/// Smaller ones see too few writes in a round to learn from them; larger ones mix what programs keep apart.
const REGION: u64 = 2048;

/// Pages that are opened at once, at most: with so many the kernel's own work for each page is ten times that
/// of being asked (`sys/tests/tracker_figures.rs`). A power of two that divides `REGION`.
const LARGEST: u64 = 512;

/// A writer that goes upwards is given up to so many times its region's group.
const UPWARDS: u64 = 8;

/// What a write costs that somebody hears of: 17 to 42 µs were measured.
const FAULT: Duration = Duration::from_micros(30);

/// What a page costs that was opened for nothing: it is protected, read, and found unchanged.
const PAGE: Duration = Duration::from_micros(1);

/// Where fewer writes a second are heard of in a region, larger groups would not be noticed: in 64 such
/// regions, 512 MiB, they take 2 % of one processor.
const FEW: f64 = 10.0;

/// So many ends of groups are remembered, of several writers that go upwards at a time.
const ENDS: usize = 64;

/// The group sizes of a guest's memory, region by region.
///
/// A region's size is moved by two counts: of pages that were sent again although they had not changed, which
/// a smaller group would not have opened, and of writes that were heard of, which a larger one would have
/// spared. Both have a price, and the size is where they cost the same. While the guest is throttled a page
/// costs what its writer waits for it: groups are small then.
///
/// Groups are aligned, so that writers who write all over a region meet it once for each group; but whoever
/// comes to the end of a group goes upwards: its next group begins there and is twice as large as the last
/// one, within 8 times its region's size.
#[derive(Clone, Debug)]
pub struct Groups {
    fixed: Option<u64>,
    blocks: Vec<Block>,
    /// What one write that is heard of is worth, in pages that are opened for nothing.
    worth: f64,
    /// Where the last groups ended, and how long they were.
    ends: VecDeque<(BlockId, PageIndex, u64)>,
    /// Until when, and over which time before that.
    learnt: Duration,
    lasted: Duration,
}

#[derive(Clone, Debug)]
struct Block {
    pages: u64,
    regions: Vec<Region>,
}

#[derive(Clone, Copy, Debug)]
struct Region {
    size: u16,
    now: Opened,
    /// In the round before: what of it is found unchanged is known only when it has been sent.
    before: Opened,
}

#[derive(Clone, Copy, Default, Debug)]
struct Opened {
    writes: u32,
    pages: u32,
}

impl Groups {
    /// For blocks of so many pages each. `fixed`: the same size everywhere, always; the power of two below
    /// it.
    pub fn new(blocks: impl IntoIterator<Item = u64>, fixed: Option<u64>) -> Self {
        let fixed = fixed.map(|pages| 1 << pages.clamp(1, LARGEST).ilog2());
        let worth = worth(None);
        let region = Region { size: size(worth), now: Opened::default(), before: Opened::default() };
        let block = |pages: u64| Block { pages, regions: vec![region; pages.div_ceil(REGION) as usize] };
        let blocks = blocks.into_iter().map(block).collect();
        Self { fixed, blocks, worth, ends: VecDeque::new(), learnt: Duration::ZERO, lasted: Duration::ZERO }
    }

    /// The guest may open so many pages a second from now on. What was learnt while pages were cheap no
    /// longer holds.
    pub fn throttle(&mut self, pace: f64) {
        let cheap = self.worth == worth(None);
        self.worth = worth(Some(pace));
        if cheap {
            let size = size(self.worth);
            self.blocks.iter_mut().flat_map(|block| &mut block.regions).for_each(|region| region.size = size);
        }
    }

    /// How many pages are best opened for a write to this one.
    pub fn wish(&self, block: BlockId, page: PageIndex) -> u64 {
        if let Some(pages) = self.fixed {
            return pages;
        }
        let size = u64::from(self.blocks[usize::from(block.0)].regions[(page.0 / REGION) as usize].size);
        match self.ends.iter().rfind(|(b, end, _)| (*b, *end) == (block, page)) {
            Some((.., pages)) => (pages * 2).clamp(size, (size * UPWARDS).min(LARGEST)),
            None => size,
        }
    }

    /// So many pages may be opened for a write to this one: which?
    pub fn open(&mut self, block: BlockId, page: PageIndex, pages: u64) -> PageRange {
        let at = self.ends.iter().rposition(|(b, end, _)| (*b, *end) == (block, page));
        let upwards = at.and_then(|at| self.ends.remove(at)).is_some();
        let known = &mut self.blocks[usize::from(block.0)];
        let pages = pages.clamp(1, LARGEST);
        let range = if upwards {
            page.0..page.0 + pages
        } else {
            // The largest power of two that was granted.
            let pages = 1 << pages.ilog2();
            let start = page.0 / pages * pages;
            start..start + pages
        };
        // Never beyond what is aligned to the largest: so it stays within its region, and within what is
        // protected at once.
        let range = range.start..range.end.min(page.0 / LARGEST * LARGEST + LARGEST).min(known.pages);
        let count = range.end - range.start;
        let region = &mut known.regions[(page.0 / REGION) as usize];
        region.now.writes = region.now.writes.saturating_add(1);
        region.now.pages = region.now.pages.saturating_add(count as u32);
        if self.ends.len() == ENDS {
            self.ends.pop_front();
        }
        self.ends.push_back((block, PageIndex(range.end), count));
        PageRange::new(PageIndex(range.start), count)
    }

    /// A round has been sent, and these pages of it had not changed.
    pub fn learn(&mut self, now: Duration, unchanged: &MemorySet) {
        let passed = std::mem::replace(&mut self.lasted, now.saturating_sub(self.learnt)).as_secs_f64();
        self.learnt = now;
        for ((_, set), block) in unchanged.blocks().zip(&mut self.blocks) {
            for (n, region) in (0..).zip(&mut block.regions) {
                let Range { start, end } = n * REGION..((n + 1) * REGION).min(block.pages);
                let within = PageRange::new(PageIndex(start), end - start);
                let before = std::mem::replace(&mut region.before, std::mem::take(&mut region.now));
                if before.writes > 0 {
                    let unchanged = set.runs_within(within).map(|run| run.count).sum();
                    region.judge(before, unchanged, within.count, self.worth, passed);
                }
            }
        }
    }
}

impl Region {
    /// Of what so many writes opened in a region of so many pages, so many were opened for nothing.
    fn judge(&mut self, opened: Opened, wasted: u64, pages: u64, worth: f64, passed: f64) {
        let (asked, opened) = (f64::from(opened.writes), f64::from(opened.pages));
        let (wasted, pages) = (wasted as f64, pages as f64);
        if wasted > opened {
            // There was more in the round than what writers opened, as after a change of the way in which
            // writes are seen.
            return;
        }
        let cost = worth * asked + wasted;
        // What is written in so many places that nearly every group is opened is best opened as a whole.
        let whole = worth * pages / LARGEST as f64 + pages - (opened - wasted);
        // Twice the group wastes about twice as much for half the writes: that is still little enough. Where
        // a page costs more than to be asked, to try it would be dear.
        let larger = wasted * 4.0 <= worth * asked && worth >= 1.0;
        if self.size < LARGEST as u16 && asked > FEW * passed && (larger || whole < cost) {
            self.size = if larger { self.size * 2 } else { LARGEST as u16 };
        } else if wasted > worth * asked && self.size > 1 {
            // As small as needed; but where nearly all is open, no more than one step is known to be better.
            let steps = if opened * 2.0 > pages {
                1.0
            } else {
                (wasted / (worth * asked)).log2().ceil().clamp(1.0, 9.0)
            };
            self.size = (self.size >> steps as u32).max(1);
        }
    }
}

/// What one write that is heard of is worth, in pages that are opened for nothing.
fn worth(pace: Option<f64>) -> f64 {
    let page = pace.map_or(0.0, |pace| 1.0 / pace).max(PAGE.as_secs_f64());
    FAULT.as_secs_f64() / page
}

/// The size to begin with where nothing is known yet.
fn size(worth: f64) -> u16 {
    1 << (worth * 2.0).max(1.0).log2().round() as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use units::PageSet;

    const RAM: BlockId = BlockId(0);
    const PAGES: u64 = 4 * REGION;
    const ROUND: Duration = Duration::from_millis(500);

    /// One round: these pages are written in this order. Returns how often somebody had to be asked, and what
    /// was opened for nothing.
    fn round(groups: &mut Groups, writes: &[u64]) -> (u64, PageSet) {
        let (mut open, mut asked) = (PageSet::empty(PAGES), 0);
        for page in writes.iter().map(|page| PageIndex(*page)) {
            if !open.contains(page) {
                let wish = groups.wish(RAM, page);
                let opened = groups.open(RAM, page, wish);
                assert!(
                    opened.start <= page && page < opened.end() && opened.fits(PAGES),
                    "{opened} for {page:?}"
                );
                open.insert_range(opened);
                asked += 1;
            }
        }
        for page in writes {
            open.remove(PageIndex(*page));
        }
        (asked, open)
    }

    /// The price of a round once many went before it.
    fn price(groups: &mut Groups, worth: f64, mut writes: impl FnMut() -> Vec<u64>) -> f64 {
        let mut before = MemorySet::empty([PAGES]);
        let mut price = 0.0;
        for n in 1..=24 {
            let writes = writes();
            let written = writes.iter().collect::<std::collections::BTreeSet<_>>().len() as u64;
            let (asked, unchanged) = round(groups, &writes);
            if n > 16 {
                price += asked as f64 * worth + (unchanged.len() + written) as f64;
            }
            groups.learn(ROUND * n, &before);
            *before.block_mut(RAM) = unchanged;
        }
        price / 8.0
    }

    /// Runs of so many pages, all in other places each time, in ascending or in random order.
    fn writes(run: u64, runs: u64, scattered: bool, seed: &mut u64) -> Vec<u64> {
        let mut next = |below: u64| {
            *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (*seed >> 33) % below
        };
        let mut pages: Vec<u64> = (0..runs)
            .flat_map(|_| {
                let start = next(PAGES - run + 1);
                start..start + run
            })
            .collect();
        if scattered {
            (1..pages.len()).rev().for_each(|i| pages.swap(i, next(i as u64 + 1) as usize));
        }
        pages
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// The obvious way: try every size, and keep the best.
        #[test]
        fn what_is_learnt_costs_at_most_twice_what_the_best_size_would(
            run in prop_oneof![1u64..4, 1u64..2000],
            runs in prop_oneof![50u64..200, 200u64..3000],
            scattered in proptest::bool::ANY,
            pace in prop_oneof![Just(None), (2_000f64..2e5).prop_map(Some)],
            seed in proptest::num::u64::ANY,
        ) {
            let runs = runs.min(4 * PAGES / run);
            let run_one = |fixed| {
                let mut groups = Groups::new([PAGES], fixed);
                if let Some(pace) = pace {
                    groups.throttle(pace);
                }
                let mut seed = seed;
                price(&mut groups, worth(pace), || writes(run, runs, scattered, &mut seed))
            };
            let best = (0..10).map(|power| run_one(Some(1 << power))).fold(f64::INFINITY, f64::min);
            let learnt = run_one(None);
            // What a few writes a second cost in each region is not worth a larger group.
            let few = 4.0 * FEW * ROUND.as_secs_f64() * worth(pace);
            prop_assert!(learnt <= best * 2.0 + few, "{learnt} for {best}, {few}");
        }
    }

    #[test]
    fn regions_learn_by_themselves() {
        let mut groups = Groups::new([PAGES], None);
        let mut before = MemorySet::empty([PAGES]);
        for n in 1..=12u32 {
            // The first region is written all over, the second here and there, the third seldom.
            let all = (0..REGION).map(|page| page * 797 % REGION);
            let some = (0..200).map(|k| REGION + (k * 797 + u64::from(n) * 31) % REGION);
            let writes: Vec<u64> =
                all.chain(some.step_by(16)).chain([2 * REGION + 77 * u64::from(n)]).collect();
            let (_, unchanged) = round(&mut groups, &writes);
            groups.learn(ROUND * n, &before);
            *before.block_mut(RAM) = unchanged;
        }
        let sizes: Vec<_> = (0..4).map(|n| groups.wish(RAM, PageIndex(n * REGION + 1))).collect();
        assert_eq!(sizes[0], LARGEST);
        assert!(sizes[1] <= 32 && sizes[2] <= 32, "{sizes:?}");
        assert_eq!(sizes[3], 64, "where nobody writes nothing is learnt");
    }

    #[test]
    fn pages_that_came_into_the_round_otherwise_teach_nothing() {
        let mut groups = Groups::new([PAGES], None);
        round(&mut groups, &[5]);
        groups.learn(ROUND, &MemorySet::empty([PAGES]));
        groups.learn(ROUND * 2, &MemorySet::from_blocks(vec![PageSet::full(PAGES)]));
        assert_eq!(groups.wish(RAM, PageIndex(7)), 64);
    }

    #[test]
    fn who_goes_upwards_gets_more_and_nobody_else_does() {
        let mut groups = Groups::new([PAGES, PAGES], None);
        // A page a round, so to speak.
        groups.throttle(3_000.0);
        let mut write = |block, page| {
            let pages = groups.wish(BlockId(block), PageIndex(page));
            assert_eq!(
                groups.open(BlockId(block), PageIndex(page), pages),
                PageRange::new(PageIndex(page), pages)
            );
            pages
        };
        let (mut up, mut grown) = (1024, vec![]);
        for n in 0..6 {
            let pages = write(0, up);
            grown.push(pages);
            up += pages;
            // Somebody else writes here and there, and in another block.
            assert_eq!(write(0, 5_000 + n * 719 % 3000), 1);
            assert_eq!(write(1, up), 1);
        }
        assert_eq!(grown, [1, 2, 4, 8, 8, 8]);
    }

    #[test]
    fn without_throttling_groups_grow_and_memory_is_bounded() {
        let mut groups = Groups::new([PAGES], None);
        let mut grown = vec![];
        let mut page = 100;
        for _ in 0..6 {
            let wish = groups.wish(RAM, PageIndex(page));
            let opened = groups.open(RAM, PageIndex(page), wish);
            grown.push(opened.count);
            page = opened.end().0;
        }
        assert_eq!(grown, [64, 128, 256, 512, 512, 512]);
        for page in 0..1000 {
            groups.open(RAM, PageIndex(page * 8), 1);
        }
        assert_eq!(groups.ends.len(), ENDS);
    }

    #[test]
    fn a_fixed_size_is_kept() {
        let mut groups = Groups::new([PAGES], Some(100));
        groups.throttle(10.0);
        for page in [0, 64, 128, 5000, PAGES - 1] {
            assert_eq!(groups.wish(RAM, PageIndex(page)), 64);
            let opened = groups.open(RAM, PageIndex(page), 64);
            assert!(opened.count == 64 || opened.end().0 == PAGES, "{opened}");
        }
        // What the throttle grants beyond no power of two is not used for a page in the middle.
        assert_eq!(groups.open(RAM, PageIndex(1001), 7), PageRange::new(PageIndex(1000), 4));
    }
}
