//! How long things took, in a bounded number of buckets.

use std::fmt::Write;

/// Buckets between one power of two and the next: a figure is at most an eighth too large.
const FINE: usize = 8;
/// `FINE` is two to so many.
const FINE_BITS: usize = FINE.trailing_zeros() as usize;
/// What takes longer than two to so many microseconds (an hour) is counted as that.
const BITS: usize = 32;
const BUCKETS: usize = (BITS - FINE_BITS + 1) * FINE;

/// Times in microseconds.
pub(crate) struct Histogram {
    buckets: [u64; BUCKETS],
    count: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], count: 0, max: 0 }
    }
}

impl Histogram {
    pub(crate) fn add(&mut self, us: u64) {
        self.buckets[bucket(us)] += 1;
        self.count += 1;
        self.max = self.max.max(us);
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// So many in a hundred took no longer than this; zero where there are none.
    pub(crate) fn percentile(&self, percent: u64) -> u64 {
        let wanted = (self.count * percent).div_ceil(100);
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= wanted {
                return (first(i + 1) - 1).min(self.max);
            }
        }
        self.max
    }

    /// `{"p50":…,"p90":…,"p99":…,"max":…}`
    pub(crate) fn json(&self) -> String {
        let mut text = String::from("{");
        for percent in [50, 90, 99] {
            // Writing to a string cannot fail.
            let _ = write!(text, "\"p{percent}\":{},", self.percentile(percent));
        }
        text + &format!("\"max\":{}}}", self.max)
    }
}

/// Which bucket a time belongs to.
fn bucket(us: u64) -> usize {
    let us = us.min((1 << BITS) - 1);
    if us < FINE as u64 {
        return us as usize;
    }
    let power = us.ilog2() as usize - FINE_BITS;
    (power + 1) * FINE + (us >> power) as usize - FINE
}

/// The least time of a bucket.
fn first(bucket: usize) -> u64 {
    match bucket / FINE {
        0 => bucket as u64,
        power => ((FINE + bucket % FINE) as u64) << (power - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_in_the_bucket_that_holds_it() {
        for us in (0..5000).chain((12..BITS).flat_map(|n| [(1 << n) - 1, 1 << n, (1 << n) + 1])) {
            let i = bucket(us);
            assert!((first(i)..first(i + 1)).contains(&us), "{us} in {i}");
            assert!(first(i + 1) - first(i) <= (us / FINE as u64).max(1), "{us}: bucket {i} is too wide");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_those_of_a_sorted_list() {
        let mut seen = Histogram::default();
        assert_eq!(seen.json(), "{\"p50\":0,\"p90\":0,\"p99\":0,\"max\":0}");
        let mut all: Vec<u64> = (0..1000).map(|n| n * n % 7919 * 13).collect();
        all.iter().for_each(|us| seen.add(*us));
        all.sort_unstable();
        for percent in [1, 50, 90, 99, 100] {
            let (true_one, found) = (all[10 * percent - 1], seen.percentile(percent as u64));
            assert!(found >= true_one && found <= true_one + true_one / FINE as u64, "{percent}: {found}");
        }
    }

    #[test]
    fn one_in_two_hundred_is_beyond_the_99th_percentile() {
        let mut seen = Histogram::default();
        (0..199).for_each(|_| seen.add(3));
        seen.add(70_000);
        assert_eq!((seen.count(), seen.percentile(99), seen.percentile(100)), (200, 3, 70_000));
    }
}
