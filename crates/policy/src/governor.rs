use std::time::Duration;

/// A guest may begin to write to pages at this share of the pace at which pages are sent. All rounds together then take at most
/// `1 / (1 − SHARE)` of the first, which is less than twice; a smaller share would end sooner and slow writers more.
pub(crate) const SHARE: f64 = 0.45;

/// What was not used is saved up for so long: enough for threads that wake up late, and little beside a downtime.
pub(crate) const CREDIT: Duration = Duration::from_millis(5);

/// Decides when a guest may go on that wants to write to a page which is protected since the round began.
///
/// A round sends the pages that were opened for writing before it, while the guest opens others. Let `D(k)` be the pages of round
/// `k`, `S` how many are sent in a second, and let the guest open at most `SHARE · S` in a second. The round takes `D(k) / S`, so
///
/// ```text
/// D(k+1) ≤ SHARE · D(k) + B        where B = SHARE · S · CREDIT + one group
/// ```
///
/// and rounds shrink until little more than `B / (1 − SHARE)` is left, which fits into a downtime of milliseconds. Pages that are
/// open cost nothing more however often they are written: only who outruns the link by *new* pages waits.
///
/// Nobody waits longer than `max_stall` at a time: of `writers` that wait at once each is given as many pages as keep the pace when
/// all of them come back at once. (Below `writers` pages each `max_stall` no pace can be kept that way; that is 1.6 MB/s for two
/// writers and 5 ms.)
#[derive(Clone, Debug)]
pub struct Governor {
    max_stall: Duration,
    writers: u32,
    /// Pages a second; none: as they like.
    pace: Option<f64>,
    /// When all that was opened so far has been paid for.
    free_at: Duration,
}

/// What a writer is given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grant {
    /// How many pages are opened.
    pub pages: u64,
    /// After how long.
    pub wait: Duration,
}

impl Governor {
    /// Lets everybody write as they like, until there is a pace.
    pub fn new(max_stall: Duration, writers: u32) -> Self {
        Self { max_stall, writers: writers.max(1), pace: None, free_at: Duration::ZERO }
    }

    /// So many pages are sent in a second: the guest keeps to its share of that from now on.
    pub fn follow(&mut self, sent_per_s: f64) {
        self.pace = Some((SHARE * sent_per_s).max(1.0));
    }

    /// Somebody wants to write. `wish`: how many pages are best opened at once if nothing is to be slowed.
    pub fn ask(&mut self, now: Duration, wish: u64) -> Grant {
        let Some(pace) = self.pace else { return Grant { pages: wish.max(1), wait: Duration::ZERO } };
        let turn = self.max_stall.as_secs_f64() / f64::from(self.writers);
        let pages = ((pace * turn) as u64).clamp(1, wish.max(1));
        let start = self.free_at.max(now.saturating_sub(CREDIT));
        let wait = start.saturating_sub(now).min(self.max_stall);
        // Who need not wait any longer is let go, but what that brings forward is not forgotten beyond one stall.
        let paid = start + Duration::from_secs_f64(pages as f64 / pace);
        self.free_at = paid.min(now + self.max_stall * 2);
        Grant { pages, wait }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STALL: Duration = Duration::from_millis(5);

    /// A guest of so many pages whose writers all want to open a new page as soon as they may. Returns the pages of each round
    /// until they fit into `enough`, the longest wait, and how long all took.
    fn migrate(
        pages: u64,
        sent_per_s: f64,
        writers: u32,
        wish: u64,
        enough: u64,
    ) -> (Vec<u64>, Duration, Duration) {
        let mut governor = Governor::new(STALL, writers);
        governor.follow(sent_per_s);
        let mut rounds = vec![pages];
        let (mut now, mut longest) = (Duration::ZERO, Duration::ZERO);
        // When each writer comes back.
        let mut back = vec![Duration::ZERO; writers as usize];
        while rounds.last().is_some_and(|left| *left > enough) && rounds.len() < 200 {
            let end = now + Duration::from_secs_f64(rounds[rounds.len() - 1] as f64 / sent_per_s);
            let mut opened = 0;
            loop {
                let (writer, at) = back.iter().copied().enumerate().min_by_key(|(_, at)| *at).unwrap();
                if at >= end {
                    break;
                }
                let grant = governor.ask(at, wish);
                longest = longest.max(grant.wait);
                opened += grant.pages;
                // Writing a page takes a little while by itself.
                back[writer] = at + grant.wait + Duration::from_micros(2 * grant.pages);
            }
            now = end;
            rounds.push(opened.min(pages));
        }
        (rounds, longest, now)
    }

    proptest! {
        #[test]
        fn rounds_shrink_and_nobody_waits_long(
            pages in 10_000u64..2_000_000,
            mbit in 50f64..40_000.0,
            writers in 1u32..17,
            wish in 1u64..1024,
        ) {
            let sent_per_s = mbit * 1e6 / 8.0 / units::PAGE_SIZE as f64;
            // Slower links than that cannot be kept to.
            prop_assume!(SHARE * sent_per_s * STALL.as_secs_f64() > f64::from(writers));
            let group = (SHARE * sent_per_s * STALL.as_secs_f64() / f64::from(writers)).max(1.0);
            let burst = SHARE * sent_per_s * CREDIT.as_secs_f64() + group * f64::from(writers);
            let enough = (burst / (1.0 - SHARE) * 1.05) as u64 + 1;
            let (rounds, longest, took) = migrate(pages, sent_per_s, writers, wish, enough);
            prop_assert!(longest <= STALL);
            for pair in rounds.windows(2) {
                prop_assert!(pair[1] as f64 <= SHARE * pair[0] as f64 + burst + 1.0, "{rounds:?}, burst {burst}");
            }
            prop_assert!(rounds.last().is_some_and(|left| *left <= enough), "{rounds:?} of {enough}");
            let first = pages as f64 / sent_per_s;
            prop_assert!(took.as_secs_f64() <= first / (1.0 - SHARE) + 0.1 * rounds.len() as f64, "{took:?} of {first}");
        }
    }

    #[test]
    fn a_writer_gets_most_of_its_share() {
        let sent_per_s = 30_000.0;
        let mut governor = Governor::new(STALL, 2);
        governor.follow(sent_per_s);
        let (mut now, mut opened) = (Duration::ZERO, 0);
        while now < Duration::from_secs(1) {
            let grant = governor.ask(now, 512);
            opened += grant.pages;
            now += grant.wait + Duration::from_micros(1);
        }
        let share = opened as f64 / sent_per_s;
        assert!((0.42..0.48).contains(&share), "{share}");
    }

    #[test]
    fn who_writes_little_never_waits() {
        let mut governor = Governor::new(STALL, 2);
        assert_eq!(governor.ask(Duration::ZERO, 64), Grant { pages: 64, wait: Duration::ZERO });
        governor.follow(30_000.0);
        for n in 0..100u32 {
            // A third of its share.
            let grant = governor.ask(Duration::from_millis(2) * n, 9);
            assert_eq!(grant.wait, Duration::ZERO);
        }
    }
}
