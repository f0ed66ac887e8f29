//! How much memory a guest writes, and what follows from that for the time after it was watched.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How many distinct pages a guest writes within a time, as far as it was watched.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct WorkingSet {
    /// Seconds since the watch began, and how many different pages were written by then; ascending.
    seen: Vec<(f64, f64)>,
    /// The guest has no more.
    most: f64,
}

/// What follows after the watch ended.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Tail {
    /// What grew more slowly lately will stop growing.
    Ends,
    /// It goes on as it did lately.
    GoesOn,
    /// Between the two.
    Likely,
}

impl WorkingSet {
    /// Of a guest with so many pages, of which nothing was seen yet.
    pub fn of(most: u64) -> Self {
        Self { seen: vec![], most: most as f64 }
    }

    /// So many different pages were written since the watch began.
    pub fn see(&mut self, after: Duration, pages: u64) {
        let (at, pages) = (after.as_secs_f64(), (pages as f64).min(self.most));
        if self.seen.last().is_none_or(|(last, before)| at > *last && pages >= *before) && at > 0.0 {
            self.seen.push((at, pages));
        }
    }

    /// Pages a second at the end of the watch, counted from its beginning.
    pub fn per_s(&self) -> f64 {
        self.seen.last().map_or(0.0, |(at, pages)| pages / at)
    }

    /// Pages a second that had not been written before, in the second half of the watch.
    pub fn new_per_s(&self) -> f64 {
        self.seen.last().map_or(0.0, |(end, all)| (all - self.within(end / 2.0, Tail::Likely)) / (end / 2.0))
    }

    /// Distinct pages that are written within so many seconds.
    pub(crate) fn within(&self, time: f64, tail: Tail) -> f64 {
        let Some(&(end, all)) = self.seen.last() else { return 0.0 };
        let pages = if time <= end {
            let mut before = (0.0, 0.0);
            let next = self.seen.iter().copied().find(|next| {
                let found = time <= next.0;
                if !found {
                    before = *next;
                }
                found
            });
            let next = next.unwrap_or((end, all));
            before.1 + (next.1 - before.1) * (time - before.0) / (next.0 - before.0).max(1e-9)
        } else {
            let half = self.within(end / 2.0, tail);
            let lately = all - half;
            let goes_on = lately * (time - end) / (end / 2.0);
            // Each half as long as the watch brings this part of what the one before it brought.
            let less = if half > 0.0 { lately / half } else { 1.0 };
            let ends = if less > 0.97 {
                goes_on
            } else {
                lately * less / (1.0 - less) * (1.0 - less.powf((time - end) / (end / 2.0)))
            };
            all + match tail {
                Tail::Ends => ends,
                Tail::GoesOn => goes_on,
                Tail::Likely => (ends + goes_on) / 2.0,
            }
        };
        pages.min(self.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a GiB.
    const PAGES: u64 = 1 << 18;

    #[test]
    fn what_was_seen_goes_on_between_its_two_ends() {
        let mut random = WorkingSet::of(PAGES);
        // Random writes to 50,000 pages, 50,000 a second.
        let truth = |s: f64| 50_000.0 * (1.0 - (-s).exp());
        for ms in [125u64, 250, 500, 1000] {
            random.see(Duration::from_millis(ms), truth(ms as f64 / 1e3) as u64);
        }
        for later in [2.0, 4.0, 20.0] {
            let (ends, goes_on) = (random.within(later, Tail::Ends), random.within(later, Tail::GoesOn));
            assert!(
                ends <= goes_on && (ends / truth(later) - 1.0).abs() < 0.1,
                "{later}: {ends} of {}",
                truth(later)
            );
        }
        assert!((random.within(0.3, Tail::Likely) / truth(0.3) - 1.0).abs() < 0.1);
        assert_eq!(random.within(1e9, Tail::GoesOn), PAGES as f64, "no more than there is");
        assert_eq!(WorkingSet::of(9).within(1.0, Tail::Likely), 0.0);
    }
}
