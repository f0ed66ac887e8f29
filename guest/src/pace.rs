//! How much may be done by now.

use std::time::Duration;

/// Hands out pages at a steady rate. What was missed is made up for, but no more than a tenth of a second of
/// it: a guest that was paused must not come back with a burst that nobody asked for.
pub(crate) struct Pace {
    /// Pages a second; `None` is no limit.
    rate: Option<f64>,
    credit: f64,
    seen: Duration,
}

/// Pages done between two looks at the clock: a few hundred microseconds of work on an emulated CPU.
const BATCH: u64 = 64;
/// What one look may make up for.
const LATE: Duration = Duration::from_millis(100);
/// How long to wait for the next pages; shorter costs more wake-ups, longer makes the writes come in lumps.
const TICK: Duration = Duration::from_millis(5);

/// What to do now.
#[derive(PartialEq, Eq, Debug)]
pub(crate) enum Turn {
    Pages(u64),
    Wait(Duration),
}

impl Pace {
    /// One of `sharers` that have `rate` pages a second between them.
    pub(crate) fn new(rate: Option<u64>, sharers: usize) -> Self {
        Self { rate: rate.map(|r| r as f64 / sharers.max(1) as f64), credit: 0.0, seen: Duration::ZERO }
    }

    /// `now` is any monotonic time.
    pub(crate) fn turn(&mut self, now: Duration) -> Turn {
        let Some(rate) = self.rate else { return Turn::Pages(BATCH) };
        let passed = now.saturating_sub(self.seen).min(LATE);
        self.seen = now;
        // At least one whole page, or a rate below ten pages a second would never get anywhere.
        let most = (rate * LATE.as_secs_f64()).max(1.0);
        self.credit = (self.credit + rate * passed.as_secs_f64()).min(most);
        if self.credit < 1.0 {
            let missing = Duration::from_secs_f64((1.0 - self.credit) / rate);
            return Turn::Wait(missing.clamp(TICK, LATE));
        }
        let pages = (self.credit as u64).min(BATCH);
        self.credit -= pages as f64;
        Turn::Pages(pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(rate: Option<u64>, sharers: usize, from: Duration, to: Duration) -> u64 {
        let mut pace = Pace::new(rate, sharers);
        let (mut now, mut pages) = (from, 0);
        while now < to {
            match pace.turn(now) {
                Turn::Pages(n) => pages += n,
                Turn::Wait(time) => now += time,
            }
        }
        pages
    }

    #[test]
    fn the_rate_is_kept_over_time() {
        for (rate, sharers) in [(5, 1), (100, 1), (8192, 1), (8192, 4)] {
            let pages = done(Some(rate), sharers, Duration::from_secs(9), Duration::from_secs(19));
            let want = rate * 10 / sharers as u64;
            assert!(pages.abs_diff(want) <= want / 20 + 2, "{rate}/s by {sharers}: {pages} of {want}");
        }
    }

    #[test]
    fn a_long_pause_is_not_made_up_for() {
        let mut pace = Pace::new(Some(1000), 1);
        pace.turn(Duration::from_secs(1));
        let mut pages = 0;
        while let Turn::Pages(n) = pace.turn(Duration::from_secs(60)) {
            pages += n;
        }
        assert!(pages <= 200, "{pages}");
    }
}
