use std::time::Duration;
use units::{Bytes, Rate};

/// A sender that overslept may catch up with this much of its rate at once. Sleeping threads of a busy
/// machine wake up some milliseconds late; without credit each time would be lost, with this much no second
/// holds over 2 % too much.
const CREDIT: Duration = Duration::from_millis(15);

/// One write holds this much of the rate, so that neither a slow rate nor large batches make bursts.
const QUANTUM: Duration = Duration::from_millis(5);

/// Smaller writes would cost more than they smooth.
const LEAST: u64 = 4 << 10;

/// Keeps a flow to a rate over any second, from both sides as long as there is something to send.
#[derive(Clone, Debug)]
pub struct Pace {
    rate: Rate,
    /// When all that was sent so far has gone at that rate.
    free_at: Duration,
}

impl Pace {
    /// Times are since an arbitrary start.
    pub fn new(rate: Rate) -> Self {
        Self { rate: Rate(rate.0.max(1)), free_at: Duration::ZERO }
    }

    /// How much may be written at once.
    pub fn quantum(&self) -> u64 {
        ((self.rate.0 as f64 * QUANTUM.as_secs_f64()) as u64).max(LEAST)
    }

    /// Takes `bytes` of the rate; they may be sent after this long. What cannot wait is sent at once all the
    /// same: what comes after it waits for both.
    pub fn take(&mut self, now: Duration, bytes: u64) -> Duration {
        let start = self.free_at.max(now.saturating_sub(CREDIT));
        self.free_at = start + Bytes(bytes).time_at(self.rate).unwrap_or_default();
        start.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = units::PAGE_SIZE as u64;
    const SECOND: Duration = Duration::from_secs(1);

    proptest! {
        /// Writers that wake up late, of several streams, some of them answering faults at once.
        #[test]
        fn any_second_holds_what_was_asked_for(
            rate in 1_000_000u64..2_000_000_000,
            late_us in prop::collection::vec(0u64..15_000, 1..50),
            urgent in prop::collection::vec(0u64..50, 1..20),
        ) {
            let mut pace = Pace::new(Rate(rate));
            let quantum = pace.quantum();
            let (mut now, mut sent, mut turn) = (Duration::ZERO, Vec::new(), 0);
            while now < SECOND * 3 {
                turn += 1;
                // One in so many writes is a fault's page.
                if urgent[turn % urgent.len()] == 1 {
                    pace.take(now, PAGE);
                    sent.push((now, PAGE));
                }
                let wait = pace.take(now, quantum);
                if wait > Duration::ZERO {
                    now += wait + Duration::from_micros(late_us[turn % late_us.len()]);
                }
                sent.push((now, quantum));
            }
            // Every window that begins with a write; the first second is the start's.
            let mut end = 0;
            let mut held = 0;
            for begin in 0..sent.len() {
                while end < sent.len() && sent[end].0 < sent[begin].0 + SECOND {
                    held += sent[end].1;
                    end += 1;
                }
                if end == sent.len() {
                    break;
                }
                let share = held as f64 / rate as f64;
                prop_assert!((0.95..=1.05).contains(&share), "a second of {share} from {:?} \
                                                              on", sent[begin].0);
                held -= sent[begin].1;
            }
        }
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let mut pace = Pace::new(Rate(1_000_000));
        assert_eq!(pace.take(Duration::ZERO, 500_000), Duration::ZERO);
        assert_eq!(pace.take(Duration::ZERO, 1), SECOND / 2);
        // A minute later there is credit for 15 ms, not for a minute.
        let later = SECOND * 60;
        assert_eq!(pace.take(later, 15_000), Duration::ZERO);
        assert_eq!(pace.take(later, 10_000), Duration::ZERO);
        assert_eq!(pace.take(later, 1), Duration::from_millis(10));
    }

    #[test]
    fn what_cannot_wait_is_made_up_for_by_what_can() {
        let mut pace = Pace::new(Rate(1_000_000));
        let now = SECOND;
        pace.take(now, 15_000 + 100_000);
        assert_eq!(pace.take(now, 1), Duration::from_millis(100));
    }
}
