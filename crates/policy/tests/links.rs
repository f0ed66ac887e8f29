//! The choice of codecs over simulated links: as good as the best that one could have fixed beforehand.

use policy::{Codec, Compressor, Spent};
use std::time::Duration;

const BATCH: u64 = 512 << 10;
const CODECS: [Codec; 6] =
    [Codec::None, Codec::Lz4, Codec::Zstd(-3), Codec::Zstd(1), Codec::Zstd(3), Codec::Zstd(6)];

/// What the codecs do with some content: ratio and nanoseconds a byte.
type Content = [(f64, f64); 6];

/// Content by batch.
type Contents = fn(u64) -> Content;

const NOISE: Content = [(1.0, 0.0), (1.0, 0.18), (1.0, 0.28), (1.0, 0.26), (1.0, 0.33), (1.0, 1.1)];
const PROGRAMS: Content = [(1.0, 0.0), (2.3, 3.2), (2.8, 2.95), (3.5, 3.7), (3.9, 5.7), (4.2, 17.8)];
const TEXT: Content = [(1.0, 0.0), (2.2, 3.0), (2.9, 2.8), (3.6, 3.4), (4.0, 6.0), (4.6, 18.0)];
const SPARSE: Content = [(1.0, 0.0), (9.0, 0.5), (11.0, 0.6), (14.0, 0.9), (15.0, 1.3), (19.0, 3.0)];

struct World {
    /// Bytes a nanosecond.
    link: f64,
    streams: usize,
    cores: usize,
    /// How much slower than usual this machine compresses.
    slow: f64,
    /// Content by batch.
    content: Contents,
    /// Nanoseconds a byte of content that the target takes for each stream, besides unpacking.
    target: f64,
}

const REFINE: f64 = 0.3;
const COPY: f64 = 0.35;
/// What sockets hold.
const BUFFER: f64 = 3e6;

impl World {
    /// Seconds to move `total` bytes when `choose` says how.
    fn run(&self, total: u64, mut choose: impl FnMut() -> Codec, mut done: impl FnMut(Codec, &Spent)) -> f64 {
        let mut free_at = vec![0f64; self.streams];
        let mut cores = vec![0f64; self.cores];
        let mut target = vec![0f64; self.streams];
        let mut link_free = 0f64;
        for batch in 0..total / BATCH {
            let (stream, _) = free_at.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1)).unwrap();
            let codec = choose();
            let at = CODECS.iter().position(|c| *c == codec).unwrap();
            let (ratio, cost) = (self.content)(batch)[at];
            let raw = BATCH as f64;
            let wire = raw / ratio;
            let (refine, encode) = (raw * REFINE, raw * cost * self.slow);
            let refined = free_at[stream] + refine;
            let core = cores.iter_mut().min_by(|a, b| a.total_cmp(b)).unwrap();
            let begin = if encode > 0.0 { refined.max(*core) } else { refined };
            if encode > 0.0 {
                *core = begin + encode;
            }
            let encoded = begin + encode;
            // The link takes what all streams give it, in order; a write returns when the rest fits into the buffer. What the
            // target has not read yet stays in the buffer too.
            let copied = encoded + wire * COPY;
            link_free = link_free.max(copied) + wire / self.link;
            target[stream] = target[stream].max(link_free) + raw * self.target;
            let taken =
                (link_free - BUFFER / self.link).max(target[stream] - BUFFER / wire * raw * self.target);
            let written = copied.max(taken);
            free_at[stream] = written;
            let time = |ns: f64| Duration::from_secs_f64(ns / 1e9);
            let spent = Spent {
                raw: BATCH,
                packed: wire as u64,
                wire: wire as u64,
                refine: time(refine),
                encode: time(encode),
                queue: time(begin - refined),
                write: time(written - encoded),
            };
            done(codec, &spent);
        }
        target.iter().fold(0f64, |a, b| a.max(*b)) / 1e9
    }

    fn fixed(&self, total: u64) -> (f64, Codec) {
        let times = CODECS.map(|codec| (self.run(total, || codec, |_, _| {}), codec));
        times.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
    }

    fn adaptive(&self, total: u64) -> f64 {
        let chooser =
            std::cell::RefCell::new(Compressor::new(self.streams as u32, self.cores as u32, |_| true));
        self.run(
            total,
            || chooser.borrow_mut().choose(),
            |codec, spent| chooser.borrow_mut().observe(codec, spent),
        )
    }
}

#[test]
fn over_any_link_it_is_within_a_tenth_of_the_best_fixed_choice() {
    let contents: [(&str, Contents); 6] = [
        ("noise", |_| NOISE),
        ("programs", |_| PROGRAMS),
        ("text", |_| TEXT),
        ("sparse", |_| SPARSE),
        ("mixed", |batch| [PROGRAMS, NOISE, TEXT][(batch / 4 % 3) as usize]),
        ("noise, then text", |batch| if batch < 2000 { NOISE } else { TEXT }),
    ];
    let mut worst = vec![];
    for mbit in [100u32, 300, 1_000, 2_500, 10_000, 25_000, 40_000, 100_000] {
        for (name, content) in contents {
            for (streams, cores, slow) in [(2, 1, 1.0), (2, 2, 1.0), (4, 2, 2.0), (8, 8, 0.7)] {
                let world = World { link: f64::from(mbit) / 8e3, streams, cores, slow, content, target: 0.3 };
                // As much as moves in a few seconds, and a guest's worth at least.
                let total = (4u64 << 30).max(u64::from(mbit) * 1_000_000 / 8 * 5).min(16 << 30);
                let ((best, codec), mine) = (world.fixed(total), world.adaptive(total));
                let ratio = mine / best;
                if ratio > 1.10 {
                    worst.push(format!(
                        "{mbit} Mbit/s, {name}, {streams} streams, {cores} cores × {slow}: {mine:.2} s, best {best:.2} s ({codec:?})"
                    ));
                }
            }
        }
    }
    assert!(worst.is_empty(), "{}\n{}", worst.len(), worst.join("\n"));
}

#[test]
fn a_target_that_is_slow_to_unpack_is_not_taken_for_a_slow_link() {
    let world = World { link: 12.5, streams: 2, cores: 2, slow: 0.1, content: |_| PROGRAMS, target: 0.8 };
    let (best, _) = world.fixed(8 << 30);
    assert!(world.adaptive(8 << 30) < best * 1.1);
}

#[test]
fn what_is_not_allowed_is_not_chosen() {
    for allowed in [Codec::None, Codec::Lz4, Codec::Zstd(3)] {
        let mut compressor = Compressor::new(2, 1, |codec| codec == allowed);
        for _ in 0..1000 {
            let codec = compressor.choose();
            assert_eq!(codec, allowed);
            let second = Duration::from_millis(50);
            let spent = Spent { raw: BATCH, packed: BATCH, wire: BATCH, write: second, ..Default::default() };
            compressor.observe(codec, &spent);
        }
    }
}
