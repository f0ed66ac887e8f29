//! When something is due again that is done now and then.
//!
//! What it costs grows with the guest: a look at the writes of 256 GiB takes 0.3 s. Whoever does it at a
//! fixed interval does nothing else some day, and hears nobody.

use std::time::{Duration, Instant};

/// What is done now and then takes at most one part in so many of the time.
const PART: u32 = 10;

/// Something that is done now and then.
#[derive(Debug)]
pub(crate) struct Spaced {
    ended: Instant,
    took: Duration,
}

impl Spaced {
    /// Done for the first time after a whole interval.
    pub(crate) fn new() -> Self {
        Self { ended: Instant::now(), took: Duration::ZERO }
    }

    /// It was begun then, and is done now.
    pub(crate) fn done_since(&mut self, began: Instant) {
        self.ended = Instant::now();
        self.took = self.ended - began;
    }

    /// How long it is until it is due, if that is once in `every`.
    pub(crate) fn due_in(&self, every: Duration) -> Duration {
        rest(every, self.took).saturating_sub(self.ended.elapsed())
    }
}

/// How long nothing of it is done, where it took so long the last time.
fn rest(every: Duration, took: Duration) -> Duration {
    every.max(took * (PART - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_long_is_done_less_often() {
        let ms = Duration::from_millis;
        let table =
            [(40, 0, 40), (40, 4, 40), (40, 5, 45), (40, 300, 2700), (250, 300, 2700), (250, 20, 250)];
        for (every, took, expected) in table {
            assert_eq!(rest(ms(every), ms(took)), ms(expected), "every {every} ms, took {took} ms");
        }
    }

    #[test]
    fn it_is_due_once_it_has_rested() {
        let mut spaced = Spaced::new();
        assert!(spaced.due_in(Duration::from_secs(60)) > Duration::from_secs(50));
        let began = Instant::now();
        std::thread::sleep(Duration::from_millis(20));
        spaced.done_since(began);
        assert!(spaced.due_in(Duration::ZERO) > Duration::from_millis(100));
    }
}
