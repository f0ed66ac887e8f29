//! What is worth remembering of compressing a guest's memory, for its next migration.

use super::{Compressor, LADDER, RUNGS};
use serde::{Deserialize, Serialize};

/// What is remembered counts as much as so many batches that were seen: processors may be less busy by now,
/// and content another.
const REMEMBERED: f64 = 2.0;

/// What a codec was remembered to cost is believed up to so many times what is usual, either way.
const BELIEVED: f64 = 8.0;

/// What the batches of a migration taught. May come from another host: whoever takes it up keeps it within
/// bounds.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Learnt {
    /// To which part zstd 1 shrinks the content.
    pub shrinks_to: f64,
    /// Nanoseconds for a byte with each codec, from the cheapest; none for what was not tried.
    pub costs: Vec<Option<f64>>,
}

impl Compressor {
    /// What the batches taught so far; none before one was compressed.
    pub fn learnt(&self) -> Option<Learnt> {
        (self.seen > 0.0).then(|| Learnt { shrinks_to: (-self.ease).exp(), costs: self.cost.to_vec() })
    }

    /// Begins where another migration of the same guest ended.
    pub fn recall(&mut self, learnt: &Learnt) {
        if !(learnt.shrinks_to > 0.0 && learnt.shrinks_to <= 1.0) {
            return;
        }
        self.ease = -learnt.shrinks_to.max(1e-3).ln();
        for (rung, cost) in (1..RUNGS).zip(learnt.costs.iter().skip(1)) {
            let usual = LADDER[rung].1;
            self.cost[rung] = cost
                .filter(|cost| cost.is_finite())
                .map(|cost| cost.clamp(usual / BELIEVED, usual * BELIEVED));
        }
        self.seen = REMEMBERED;
        self.current = self.best();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::{Codec, Spent};
    use std::time::Duration;

    /// A link of so many bytes a second, zstd that takes so many nanoseconds a byte and shrinks to a half:
    /// what the first so many batches were compressed with.
    fn run(compressor: &mut Compressor, link: f64, cost: f64, batches: u32) -> Vec<Codec> {
        const RAW: u64 = 512 << 10;
        let mut used = vec![];
        for _ in 0..batches {
            let codec = compressor.choose();
            used.push(codec);
            let (ratio, cost) = match codec {
                Codec::None => (1.0, 0.0),
                Codec::Lz4 => (0.66, cost * 0.84),
                Codec::Zstd(level) => (0.5, cost * if level < 0 { 0.8 } else { 1.0 }),
            };
            let compressed = (RAW as f64 * ratio) as u64;
            let (encode, write) = (RAW as f64 * cost / 1e9, compressed as f64 / link);
            let seconds = Duration::from_secs_f64;
            let spent = Spent {
                raw: RAW,
                compressed,
                carried: compressed,
                busy: seconds(write),
                refine: Duration::from_micros(50),
                encode: seconds(encode),
                queue: Duration::ZERO,
                write: seconds(write),
            };
            compressor.observe(codec, &spent);
        }
        used
    }

    #[test]
    fn a_migration_begins_where_the_last_one_ended() {
        // Beside this guest compressing takes five times what it usually does: it does not pay on a link of
        // 100 MB/s.
        let fresh = || Compressor::new(1, 1, |_| true);
        let none = |used: &[Codec]| used.iter().filter(|codec| **codec == Codec::None).count();
        let mut first = fresh();
        run(&mut first, 100e6, 18.0, 100);
        let learnt = first.learnt().unwrap();
        assert!((0.4..0.6).contains(&learnt.shrinks_to), "{learnt:?}");
        let mut second = fresh();
        second.recall(&learnt);
        let (without, with) =
            (none(&run(&mut fresh(), 100e6, 18.0, 12)), none(&run(&mut second, 100e6, 18.0, 12)));
        assert!(with >= without + 4, "of 12 batches as they are: {without}, with memory {with}");
        // And what was learned does not keep it from seeing that it pays by now.
        let mut later = fresh();
        later.recall(&learnt);
        let used = run(&mut later, 30e6, 3.7, 400);
        assert!(none(&used[200..]) < 20, "{used:?}");
    }

    #[test]
    fn what_no_migration_can_have_taught_does_no_harm() {
        for shrinks_to in [f64::NAN, f64::INFINITY, -1.0, 0.0, 7.0, 1e-300] {
            for costs in [vec![], vec![Some(f64::NAN); 99], vec![Some(-1e300); 6], vec![Some(1e300); 2]] {
                let mut compressor = Compressor::new(1, 1, |_| true);
                compressor.recall(&Learnt { shrinks_to, costs });
                let used = run(&mut compressor, 30e6, 3.7, 400);
                assert!(used[200..].iter().any(|codec| *codec != Codec::None), "{shrinks_to}: {used:?}");
            }
        }
    }

    #[test]
    fn who_compressed_nothing_learned_nothing() {
        assert_eq!(Compressor::new(1, 1, |codec| codec == Codec::None).learnt(), None);
    }
}
