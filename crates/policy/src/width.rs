use std::{ops::RangeInclusive, time::Duration};

/// What moved is looked at over windows of this length, in which each stream moves so many batches: shorter
/// ones see single batches, longer ones use up a short migration.
const WINDOW: Duration = Duration::from_millis(40);
const BATCHES: u32 = 4;

/// So many windows are compared, by their medians; the first one after a change is not among them.
const WINDOWS: usize = 3;

/// More streams must move so much more, or they are not worth the processor time that they take from guests.
const GAIN: f64 = 1.1;

/// After so many windows more streams are tried again: content and load change. Twice as many after each vain
/// trial.
const REST: u32 = 10;

/// How many streams carry a migration: more as long as they move more. A function of what was observed.
#[derive(Clone, Debug)]
pub struct Width {
    most: u32,
    now: u32,
    /// While more are on trial: how many there were before, and what these moved in a second.
    before: Option<(u32, f64)>,
    rest: u32,
    patience: u32,
    began: Duration,
    moved: u64,
    batches: u32,
    /// Bytes a second in each window since the last decision; `None` for the one to be left out.
    windows: Vec<Option<f64>>,
}

impl Width {
    /// Begins with the fewest.
    pub fn new(streams: RangeInclusive<u32>) -> Self {
        let fewest = (*streams.start()).max(1);
        Self {
            most: (*streams.end()).max(fewest),
            now: fewest,
            before: None,
            rest: 0,
            patience: REST,
            began: Duration::ZERO,
            moved: 0,
            batches: 0,
            windows: Vec::new(),
        }
    }

    /// How many it is now.
    pub fn now(&self) -> u32 {
        self.now
    }

    /// Nothing was asked for until `now`: a window begins.
    pub fn begin(&mut self, now: Duration) {
        (self.began, self.moved, self.batches) = (now, 0, 0);
    }

    /// Some stream moved a batch of `bytes` of guest memory. Returns how many streams it should be from now
    /// on, if that changes.
    pub fn observe(&mut self, now: Duration, bytes: u64) -> Option<u32> {
        self.moved += bytes;
        self.batches += 1;
        let took = now.saturating_sub(self.began);
        let short = took < WINDOW || self.batches < BATCHES * self.now;
        if short || self.now == self.most && self.before.is_none() {
            return None;
        }
        let rate = self.moved as f64 / took.as_secs_f64();
        self.begin(now);
        if self.rest > 0 {
            self.rest -= 1;
            return None;
        }
        let settling = self.before.is_some() && self.windows.is_empty();
        self.windows.push((!settling).then_some(rate));
        let mut rates: Vec<f64> = self.windows.iter().flatten().copied().collect();
        if rates.len() < WINDOWS {
            return None;
        }
        self.windows.clear();
        rates.sort_by(f64::total_cmp);
        self.decide(rates[WINDOWS / 2])
    }

    fn decide(&mut self, rate: f64) -> Option<u32> {
        let was = self.now;
        match self.before.take() {
            Some((fewer, before)) if rate < before * GAIN => {
                self.now = fewer;
                self.rest = self.patience;
                self.patience = self.patience.saturating_mul(2);
            }
            tried => {
                if tried.is_some() {
                    self.patience = REST;
                }
                if self.now < self.most {
                    self.before = Some((self.now, rate));
                    self.now = (self.now + (self.now / 2).max(1)).min(self.most);
                }
            }
        }
        (self.now != was).then_some(self.now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A world in which so many streams move so many bytes a second, give or take 4 %. Returns how many
    /// streams there are in the end, and what was moved compared with what could have been.
    fn run(streams: RangeInclusive<u32>, seconds: f64, rate: impl Fn(u32, f64) -> f64) -> (u32, f64) {
        let best = |at| streams.clone().map(|n| rate(n, at)).fold(0.0, f64::max);
        let mut width = Width::new(streams.clone());
        let (mut now, mut seed, mut moved, mut could) = (0.0, 1u32, 0.0, 0.0);
        width.begin(Duration::ZERO);
        while now < seconds {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let noise = 0.96 + f64::from(seed >> 16) / 65_536.0 * 0.08;
            let bytes = rate(width.now(), now) * 0.002 * noise;
            now += 0.002;
            moved += bytes;
            could += best(now) * 0.002;
            width.observe(Duration::from_secs_f64(now), bytes as u64);
            assert!(streams.contains(&width.now()));
        }
        (width.now(), moved / could)
    }

    #[test]
    fn it_grows_as_long_as_that_moves_more() {
        // Connections of which each carries 1 GB/s, over a link that carries ten: as after a long way.
        let (streams, reached) = run(2..=16, 5.0, |n, _| f64::from(n).min(10.0) * 1e9);
        assert!(streams >= 9 && reached > 0.85, "{streams} streams, {reached}");
        // Two cores do it all.
        let (streams, reached) =
            run(1..=16, 5.0, |n, _| f64::from(n.min(2)) * 1e9 * (1.0 - 0.02 * f64::from(n)));
        assert!((2..=3).contains(&streams) && reached > 0.9, "{streams} streams, {reached}");
        // A slow link is full with the first.
        let (streams, reached) = run(2..=16, 5.0, |_, _| 1.25e8);
        assert!(streams <= 3 && reached > 0.99, "{streams} streams, {reached}");
    }

    #[test]
    fn it_looks_again_when_the_world_may_have_changed() {
        let (streams, _) = run(2..=8, 20.0, |n, at| if at < 2.0 { 1e8 } else { f64::from(n) * 1e9 });
        assert_eq!(streams, 8);
    }

    #[test]
    fn what_was_fixed_stays() {
        assert_eq!(run(3..=3, 1.0, |n, _| f64::from(n)).0, 3);
    }

    #[test]
    fn a_pause_is_not_taken_for_slowness() {
        let mut width = Width::new(2..=3);
        let mut now = Duration::ZERO;
        let mut trial = |width: &mut Width, bytes| {
            let mut changes = Vec::new();
            for _ in 0..WINDOWS + 1 {
                now += WINDOW;
                changes.extend((0..BATCHES * 3).filter_map(|_| width.observe(now, bytes)));
            }
            now += Duration::from_secs(60);
            width.begin(now);
            changes
        };
        assert_eq!(trial(&mut width, 1 << 20), [3]);
        assert_eq!(trial(&mut width, 2 << 20), []);
        assert_eq!(width.now(), 3, "the minute between them is nobody's fault");
    }
}
