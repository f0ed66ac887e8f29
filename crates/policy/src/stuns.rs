use crate::throttle::{CREDIT, SHARE};

/// A round that leaves more than this share of its own pages, although writes are throttled, shrinks too
/// slowly.
const MISSED: f64 = 0.6;

/// Writers stand still for half of the time, at most. A stun passes beside the stalls of whoever waits for a
/// page, so it slows him most where a stall just fits between two stuns; more of it would take time only from
/// those who compute.
const MOST: f64 = 0.5;

/// Less than this is not worth the trouble of stopping anybody.
const LEAST: f64 = 0.05;

/// Decides for which share of the time the guest's writers are stunned, where it does not suffice that their
/// write faults wait ([`Throttle`](crate::Throttle)): each writer opens a page every `max_stall`, and with
/// more writers than `pace · max_stall` that is more than the pace.
///
/// A round that was throttled should leave `SHARE` of its pages and `B`. One that leaves a larger share than
/// `MISSED` shows how much too fast the writers are for the part of the time in which they run; as much less
/// they run from then on. Rounds that shrink again give it back the same way.
#[derive(Clone, Debug)]
pub struct Duty {
    writers: u32,
    duty: f64,
}

impl Duty {
    /// For a guest of which so many threads may write at a time. None is stunned yet.
    pub fn new(writers: u32) -> Self {
        Self { writers, duty: 0.0 }
    }

    /// A round of so many pages, `sent_per_s` of them in a second, was throttled from its beginning, with
    /// this duty, and has left so many dirty. The duty from now on; 0: nobody need be stunned.
    pub fn after(&mut self, pages: u64, left: u64, sent_per_s: f64) -> f64 {
        let burst = SHARE * sent_per_s * CREDIT.as_secs_f64() + f64::from(self.writers);
        let share = (left as f64 - burst).max(0.0) / pages.max(1) as f64;
        if !(SHARE..=MISSED).contains(&share) {
            let runs = (1.0 - self.duty) * SHARE / share;
            let duty = (1.0 - runs).clamp(0.0, MOST);
            self.duty = if duty < LEAST { 0.0 } else { duty };
        }
        self.duty
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Throttle, Writer};
    use proptest::prelude::*;
    use std::time::Duration;

    const STALL: Duration = Duration::from_millis(5);

    /// All stand still for the first part of each period: when does one go on who could at `at`, and has
    /// `work` to do then? A stall passes while he stands still, work does not.
    fn done(mut at: Duration, mut work: Duration, duty: f64) -> Duration {
        if duty == 0.0 {
            return at + work;
        }
        let period = STALL.div_f64(duty);
        loop {
            let into = Duration::from_nanos((at.as_nanos() % period.as_nanos()) as u64);
            at += STALL.saturating_sub(into);
            let run = work.min(period - into.max(STALL));
            (at, work) = (at + run, work - run);
            if work.is_zero() {
                return at;
            }
        }
    }

    /// A guest whose writers compute for so long, then write to a page that is not open, and again. Returns
    /// the pages of each round and the duty after it, until 20 ms are left, or so many.
    fn migrate(
        sent_per_s: f64,
        writers: u32,
        computes: Duration,
        stuns: bool,
        most: usize,
    ) -> Vec<(u64, f64)> {
        const PAGES: u64 = 30_000;
        let mut throttle = Throttle::new(STALL, writers);
        throttle.follow(sent_per_s);
        let mut duty = Duty::new(writers);
        let mut rounds = vec![(PAGES, 0.0)];
        let mut now = Duration::ZERO;
        // When each comes back for another page.
        let mut back: Vec<Duration> = (0..writers).map(|n| Duration::from_micros(n.into())).collect();
        let enough = 2 * u64::from(writers) + (sent_per_s * 0.02) as u64;
        while let Some((left, share)) = rounds.last().copied()
            && left > enough
            && rounds.len() < most
        {
            now += Duration::from_secs_f64(left as f64 / sent_per_s);
            let mut opened = 0;
            for at in &mut back {
                *at = done(*at, Duration::ZERO, share);
            }
            while let Some((writer, at)) = back.iter().copied().enumerate().min_by_key(|(_, at)| *at)
                && at < now
            {
                let grant = throttle.ask(at, Writer(1 + writer as u32), 1);
                opened += grant.pages;
                back[writer] = done(at + grant.wait, computes + Duration::from_micros(2), share);
            }
            let left_dirty = opened.min(PAGES);
            let next = if stuns { duty.after(left, left_dirty, sent_per_s) } else { 0.0 };
            rounds.push((left_dirty, next));
        }
        rounds
    }

    /// Two writers that nearly keep up with the link shrink a round by a twelfth only.
    const ROUNDS: usize = 200;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn stuns_shrink_rounds_that_stalls_do_not(
            writers in 2u32..=128,
            computes_us in 0u64..20_000,
            // Pages that they open in a second if each waits a whole stall for each, beside those that are
            // sent.
            outrun in 0.1f64..1.0,
        ) {
            let computes = Duration::from_micros(computes_us);
            let sent_per_s = f64::from(writers) / (STALL + computes).as_secs_f64() / outrun;
            let rounds = migrate(sent_per_s, writers, computes, true, ROUNDS);
            prop_assert!(rounds.len() < ROUNDS, "it ends: {rounds:?}");
            prop_assert!(rounds.iter().all(|(_, duty)| *duty <= MOST));
            if outrun < 0.9 * SHARE {
                prop_assert!(rounds.iter().all(|(_, duty)| *duty == 0.0), "stalls suffice: {rounds:?}");
            }
            if outrun > 0.85 {
                let without = migrate(sent_per_s, writers, computes, false, ROUNDS);
                prop_assert!(rounds.len() < without.len(), "sooner than without: {rounds:?} {without:?}");
            }
        }
    }

    #[test]
    fn it_goes_as_far_as_a_round_missed_and_back_when_rounds_shrink() {
        let mut duty = Duty::new(4);
        // 29 pages are saved up and one a writer. (Pages, left, duty in percent.)
        let table = [
            (10_000, 4_500, 0),  // as it should be
            (10_000, 6_000, 0),  // shrinking still
            (10_000, 7_000, 35), // they run too fast by half
            (7_000, 7_000, 50),  // and still do
            (7_000, 9_000, 50),  // not more than that
            (9_000, 4_500, 50),  // that is what it takes
            (4_500, 1_500, 31),  // it takes less
            (1_500, 300, 0),     // nothing at all
            (100, 0, 0),
            (40, 44, 0), // little enough: what was saved up
        ];
        for (pages, left, percent) in table {
            let now = duty.after(pages, left, 11_000.0);
            assert_eq!((now * 100.0).round() as u32, percent, "{pages} {left}");
        }
    }
}
