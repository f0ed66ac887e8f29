//! The choice of codecs over simulated links: as good as the best that one could have fixed beforehand.

use policy::{Codec, Compressor, Spent};
use std::{collections::VecDeque, time::Duration};

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
/// What sockets hold on either side.
const UNSENT: f64 = 1.5e6;
const UNREAD: f64 = 1.5e6;

/// What is under way: when each batch begins and ends to be through, and its bytes.
#[derive(Clone, Default)]
struct Way {
    batches: VecDeque<(f64, f64, f64)>,
    through: f64,
}

impl Way {
    /// When all of these but so many bytes are through.
    fn all_but(&self, mut bytes: f64) -> f64 {
        for (begin, end, batch) in self.batches.iter().rev() {
            if *batch > bytes {
                return end - bytes / batch * (end - begin);
            }
            bytes -= batch;
        }
        0.0
    }

    /// Bytes that are through by then, which is never earlier than the last time.
    fn through(&mut self, at: f64) -> f64 {
        while let Some((.., bytes)) = self.batches.front().filter(|(_, end, _)| *end <= at) {
            self.through += bytes;
            self.batches.pop_front();
        }
        let some = |(begin, end, bytes): &(f64, f64, f64)| bytes * ((at - begin) / (end - begin)).max(0.0);
        self.through + self.batches.iter().map(some).sum::<f64>()
    }

    fn is_busy(&self, at: f64) -> bool {
        self.batches.back().is_some_and(|(_, end, _)| *end > at)
    }
}

impl World {
    /// Seconds to move `total` bytes when `choose` says how.
    fn run(&self, total: u64, mut choose: impl FnMut() -> Codec, mut done: impl FnMut(Codec, &Spent)) -> f64 {
        let mut free_at = vec![0f64; self.streams];
        let mut cores = vec![0f64; self.cores];
        let mut link_free = 0f64;
        let mut ways = vec![Way::default(); self.streams];
        let mut targets = ways.clone();
        for batch in 0..total / BATCH {
            let (stream, _) = free_at.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1)).unwrap();
            let codec = choose();
            let at = CODECS.iter().position(|c| *c == codec).unwrap();
            let (ratio, cost) = (self.content)(batch)[at];
            let raw = BATCH as f64;
            let wire = raw / ratio;
            let (refine, encode) = (raw * REFINE, raw * cost * self.slow);
            let encoded = free_at[stream] + refine;
            let core = cores.iter_mut().min_by(|a, b| a.total_cmp(b)).unwrap();
            let begin = if encode > 0.0 { encoded.max(*core) } else { encoded };
            if encode > 0.0 {
                *core = begin + encode;
            }
            let encoded = begin + encode;
            // The link takes what all streams give it, in order; a write returns when the rest fits into the
            // buffer. What the target has not read yet stays in the buffer too.
            let copied = encoded + wire * COPY;
            link_free = (link_free.max(encoded) + wire / self.link).max(copied);
            let (way, target) = (&mut ways[stream], &mut targets[stream]);
            let arrived = link_free.max(target.all_but(UNREAD));
            let unpacked = target.all_but(0.0).max(arrived);
            target.batches.push_back((unpacked, unpacked + raw * self.target, wire));
            let before = free_at[stream];
            let was = way.through(before);
            let waiting = way.is_busy(encoded);
            way.batches.push_back((arrived - wire / self.link, arrived, wire));
            let written = copied.max(way.all_but(UNSENT));
            target.through(written);
            let carried = way.through(written) - was;
            let mut busy = if waiting { encoded - before } else { 0.0 };
            busy += if way.is_busy(written) { written - encoded } else { 0.0 };
            free_at[stream] = written;
            let time = |ns: f64| Duration::from_secs_f64(ns.max(0.0) / 1e9);
            let spent = Spent {
                raw: BATCH,
                compressed: wire as u64,
                carried: carried as u64,
                busy: time(busy),
                refine: time(refine),
                encode: time(encode),
                queue: time(begin - encoded),
                write: time(written - encoded),
            };
            done(codec, &spent);
        }
        targets.iter().map(|target| target.all_but(0.0)).fold(0.0, f64::max) / 1e9
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
                        "{mbit} Mbit/s, {name}, {streams} streams, {cores} cores × {slow}: {mine:.2} s, best \
                         {best:.2} s ({codec:?})"
                    ));
                }
            }
        }
    }
    assert!(worst.is_empty(), "{}\n{}", worst.len(), worst.join("\n"));
}

#[test]
fn a_small_guest_is_not_over_before_the_link_is_known() {
    let mut worst = vec![];
    for mbit in [300u32, 1_000, 2_500, 10_000, 40_000] {
        let contents: [(&str, Contents); 3] = [
            ("noise", |_| NOISE),
            ("programs", |_| PROGRAMS),
            ("a bit of noise, then programs", |batch| if batch < 8 { NOISE } else { PROGRAMS }),
        ];
        for (name, content) in contents {
            for (streams, cores) in [(2, 1), (2, 2)] {
                let world =
                    World { link: f64::from(mbit) / 8e3, streams, cores, slow: 1.0, content, target: 0.3 };
                let ((best, codec), mine) = (world.fixed(100 << 20), world.adaptive(100 << 20));
                if mine > best * 1.25 + 0.005 {
                    worst.push(format!(
                        "{mbit} Mbit/s, {name}, {cores} cores: {mine:.3} s, best {best:.3} s ({codec:?})"
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
            let spent = Spent {
                raw: BATCH,
                compressed: BATCH,
                carried: BATCH,
                write: second,
                busy: second,
                ..Default::default()
            };
            compressor.observe(codec, &spent);
        }
    }
}
