//! How to compress the next batch, so that most guest memory moves a second.
//!
//! With a codec `c`, memory moves at the least of
//!
//! - what the link carries, times the ratio by which `c` shrinks it,
//! - what the streams' threads can read, compress and write,
//! - what the cores that may be used can compress.
//!
//! All of these are measured, except for what was not tried yet; that follows from how the tried codecs
//! differ from what was expected of them. A codec that looks better is tried, and seen as it is.

mod learnt; // for the next migration

pub use learnt::Learnt;

use crate::link::{Link, LinkWindow};
use std::time::Duration;

/// What a batch's content is compressed with.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Codec {
    /// Not at all.
    None,
    /// LZ4.
    Lz4,
    /// Zstandard at this level.
    Zstd(i8),
}

/// From the cheapest to the smallest result: what it takes for a byte, in nanoseconds, and how it shrinks
/// compared with zstd 1 (the exponent of its ratio). Measured over a system's programs by `cargo bench -p
/// bench --bench micro codecs` on an EPYC with AVX2; only where the search begins, and how it goes on to what
/// was not tried. LZ4 is here for content that is all alike or all noise, and for targets that unpack slowly;
/// elsewhere zstd's fast levels beat it. Levels above 6 shrink a hundredth more in twice the time.
const LADDER: [(Codec, f64, f64); 6] = [
    (Codec::None, 0.0, 0.0),
    (Codec::Lz4, 3.1, 0.66),
    (Codec::Zstd(-3), 2.95, 0.81),
    (Codec::Zstd(1), 3.7, 1.0),
    (Codec::Zstd(3), 5.7, 1.08),
    (Codec::Zstd(6), 17.8, 1.13),
];
const RUNGS: usize = LADDER.len();

/// Where the search begins: zstd 1.
const FIRST: usize = 3;

/// How much of what was believed a new observation replaces, once there are many. Larger, and each unusual
/// batch changes the codec; smaller, and new content is noticed late.
const NEWS: f64 = 0.03;

/// Windows over which it is observed what moves: shorter ones see one kind of content only. The first one is
/// the first batch, so that the link is known at once; each is twice as long as the one before it.
const WINDOW: Duration = Duration::from_millis(20);
const WINDOW_BATCHES: u32 = 16;
/// The first window after another codec was chosen, and the least content in any.
const SHORT: u32 = 2;
const LEAST: u64 = 256 << 10;

/// What is believed before anything was seen counts as much as so many batches.
const PRIOR: f64 = 0.3;
/// How much of it if content begins to shrink again: then codecs cost so much more than before.
const QUICKLY: f64 = 0.2;
/// A batch that took longer than so many times what is usual was kept from a processor.
const STALL: f64 = 2.0;
/// That a codec took longer than usual is forgotten at this rate, a window, while another one is used.
const FORGET: f64 = 0.05;
/// A full batch.
const BATCH: f64 = (512 << 10) as f64;

/// What the kernel takes to copy a byte into a socket, at most, in nanoseconds.
const COPY: f64 = 0.5;

/// By how much another codec must look better before it is used: below, the estimates are noise.
const CLEARLY: f64 = 1.03;

/// What need not be sent is left to others: half the bytes are worth so much of the rate (as an exponent of
/// the ratio).
const THRIFT: f64 = 0.03;

/// What is worth so much of the most is as good.
const AS_GOOD: f64 = 0.98;

/// The least that is expected of compression (logarithm of its ratio): where it costs nothing, because the
/// link is slow, it is tried even if nothing shrank lately.
const LEAST_EASE: f64 = 0.1;

/// In every so many windows another codec is used: in turn the next cheaper one, because what looks like a
/// slow link may be a target that is slow to unpack, and the next better one, which may shrink this content
/// more than it does others.
const DOUBT: u32 = 40;

/// After so many batches without compression one is compressed, where that could pay: content changes. And
/// after so many more one is, even where it could only pay if the content were much easier than usual; after
/// twice as many the next time.
const LOOK_AGAIN: u32 = 32;
const LOOK_ANYHOW: u32 = 256;

/// What a stream did with a batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    /// Bytes of content that would travel as they are, were it not for compression.
    pub raw: u64,
    /// Bytes that travelled for these.
    pub compressed: u64,
    /// Bytes that the other side confirmed while it was made and written.
    pub carried: u64,
    /// How long the link had something to carry meanwhile: all the time, if it is what limits.
    pub busy: Duration,
    /// Time to read and refine.
    pub refine: Duration,
    /// Time spent compressing.
    pub encode: Duration,
    /// Time spent waiting for its turn to compress.
    pub queue: Duration,
    /// Time until the socket had taken everything.
    pub write: Duration,
}

/// Chooses. A function of what was observed: the same observations, the same choices.
#[derive(Clone, Debug)]
pub struct Compressor {
    allowed: Vec<usize>,
    streams: f64,
    cores: f64,
    /// Logarithm of the ratio that zstd 1 has on recent content.
    ease: f64,
    /// Nanoseconds a byte of content that shrinks, for each codec, once it was seen.
    cost: [Option<f64>; RUNGS],
    /// The part of this that recent content took: what does not shrink is given up early.
    toil: f64,
    /// How each shrinks this content compared with zstd 1.
    power: [f64; RUNGS],
    /// What of the predicted rate was reached with it.
    truth: [f64; RUNGS],
    /// Nanoseconds a byte for reading and refining.
    refine: f64,
    /// Nanoseconds a byte for the quickest writes.
    copy: f64,
    link: Link,
    window: Window,
    /// How many batches make a window by now.
    enough: u32,
    /// Windows since the last trial.
    certain: u32,
    idle: u32,
    /// After so many idle batches one is compressed anyhow.
    patience: u32,
    /// Whether the next trial is of a better codec, not of a cheaper one.
    up: bool,
    /// Batches' worth of content whose compression was observed.
    seen: f64,
    current: usize,
    /// For one window, or one batch: instead of `current`.
    trial: Option<usize>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Window {
    spent: Spent,
    batches: u32,
    /// Whether all of it was done with one codec.
    pure: Option<usize>,
    mixed: bool,
}

impl Compressor {
    /// For so many streams of which at most `cores` compress at a time, choosing among what is allowed.
    pub fn new(streams: u32, cores: u32, allowed: impl Fn(Codec) -> bool) -> Self {
        let mut rungs: Vec<usize> = (0..RUNGS).filter(|i| allowed(LADDER[*i].0)).collect();
        if rungs.is_empty() {
            rungs.push(0);
        }
        Self {
            // Until the link is known: no bad choice anywhere. The first batch, as it is, shows the link.
            current: rungs.iter().copied().rfind(|rung| *rung <= FIRST).unwrap_or(rungs[0]),
            trial: Some(rungs[0]),
            allowed: rungs,
            streams: f64::from(streams.max(1)),
            cores: f64::from(cores.max(1)),
            ease: 2f64.ln(),
            cost: [None; RUNGS],
            toil: 1.0,
            power: LADDER.map(|(_, _, power)| power),
            patience: LOOK_ANYHOW,
            up: true,
            truth: [1.0; RUNGS],
            refine: 0.3,
            copy: COPY,
            link: Link::new(),
            window: Window::default(),
            enough: 1,
            // The first trial comes soon.
            certain: DOUBT - 8,
            // The first look comes soon.
            idle: LOOK_ANYHOW - LOOK_AGAIN / 2,
            seen: 0.0,
        }
    }

    /// Over a link of so many bytes a second, with content that zstd 1 shrinks to this part in so many
    /// nanoseconds a byte: how many bytes of content will move in a second, and how many bytes travel for
    /// each.
    pub fn foresee(mut self, link: f64, shrinks_to: f64, cost: f64) -> (f64, f64) {
        self.link.see(&LinkWindow { rate: link / 1e9, full: true, took: 1.0, usual: 1.0, trial: false });
        self.ease = -shrinks_to.clamp(1e-3, 1.0).ln();
        self.cost[FIRST] = Some(cost);
        let best = self.best();
        let wire = if best == 0 { 1.0 } else { 1.0 / self.ratio(best) };
        (self.rate(best) * 1e9, wire.min(1.0))
    }

    /// So many cores may compress at a time from now on.
    pub fn allow(&mut self, cores: u32) {
        self.cores = f64::from(cores.max(1));
    }

    /// There are so many streams from now on.
    pub fn spread(&mut self, streams: u32) {
        self.streams = f64::from(streams.max(1));
    }

    /// How many cores there are to compress with at a time.
    fn cores(&self) -> f64 {
        self.cores.min(self.streams)
    }

    /// What to compress the next batch with.
    pub fn choose(&mut self) -> Codec {
        let rung = self.trial.unwrap_or(self.current);
        if rung == 0 && self.trial.is_none() && self.allowed.len() > 1 {
            self.idle += 1;
            if self.idle >= LOOK_AGAIN {
                let hoped = Self { ease: self.ease.max(2f64.ln()), truth: [1.0; RUNGS], ..self.clone() };
                let best = hoped.best();
                if best != 0
                    && self.idle.is_multiple_of(LOOK_AGAIN)
                    && hoped.rate(best) > hoped.rate(0) * CLEARLY
                {
                    return LADDER[best].0;
                }
                if self.idle >= self.patience {
                    self.idle = 0;
                    self.patience = self.patience.saturating_mul(2);
                    return LADDER[self.allowed[1]].0;
                }
            }
        }
        LADDER[rung].0
    }

    /// What became of a batch that was compressed with `codec`.
    pub fn observe(&mut self, codec: Codec, spent: &Spent) {
        let Some(rung) = LADDER.iter().position(|(c, ..)| *c == codec) else { return };
        let raw = spent.raw as f64;
        if raw > 0.0 {
            self.refine += NEWS * (nanos(spent.refine) / raw - self.refine);
        }
        if rung > 0 && raw > 0.0 {
            self.seen += raw / BATCH;
            let news = NEWS.max(1.0 / (PRIOR + self.seen)) * (raw / BATCH).min(1.0);
            let cost = nanos(spent.encode) / raw;
            let shrunk = (raw / (spent.compressed.max(1) as f64)).max(1.0).ln();
            let believed = self.cost(rung);
            if shrunk > LEAST_EASE {
                let known = self.cost[rung].get_or_insert(believed);
                *known += news * (cost.min(believed * STALL) - *known);
            }
            let toil = (cost / believed).min(1.0);
            let news = if toil > self.toil { QUICKLY } else { news };
            self.toil += news * (toil - self.toil);
            if self.trial == Some(rung) && self.ease > 0.05 {
                let power = (shrunk / self.ease).clamp(0.7, 1.4);
                self.power[rung] +=
                    0.1 * (power.clamp(LADDER[rung].2 * 0.8, LADDER[rung].2 * 1.2) - self.power[rung]);
            } else {
                self.ease += news * (shrunk / self.power[rung] - self.ease);
            }
        }
        self.window.add(rung, spent);
        let Window { spent, .. } = &self.window;
        let took = spent.refine + spent.encode + spent.queue + spent.write;
        let enough = if self.link.rate().is_none() { 1 } else { self.enough.max(self.streams as u32) };
        let part = f64::from(self.enough - 1) / f64::from(WINDOW_BATCHES - 1);
        if took >= WINDOW.mul_f64(self.streams * part) && self.window.batches >= enough && spent.raw >= LEAST
        {
            self.close(nanos(took));
        }
    }

    /// A window is over: what does it say of the link, and what is best now?
    fn close(&mut self, took: f64) {
        let window = std::mem::take(&mut self.window);
        self.enough = (self.enough * 2).min(WINDOW_BATCHES);
        let Spent { raw, compressed, carried, write, busy, .. } = window.spent;
        let full = nanos(busy) > took / 2.0;
        // At first the link had nothing to do while the batch was made.
        let time = if self.link.rate().is_none() && full { nanos(busy) } else { took };
        let carried = self.streams * carried as f64 / time;
        if compressed > 0 {
            self.copy = self.copy.min(nanos(write) / compressed as f64).max(COPY / 4.0);
        }
        // A short window shows what buffers do.
        let pure = window.pure.filter(|_| !window.mixed && window.batches >= WINDOW_BATCHES);
        let predicted = pure.map(|rung| (rung, self.rate(rung)));
        let trial = self.trial.take();
        let usual = nanos(WINDOW) * self.streams;
        self.link.see(&LinkWindow { rate: carried, full, took, usual, trial: trial.is_some() });
        for (rung, truth) in self.truth.iter_mut().enumerate() {
            match predicted {
                Some((seen, rate)) if seen == rung && rate.is_finite() && raw > 0 => {
                    let reached = self.streams * raw as f64 / took / rate * *truth;
                    *truth += 0.3 * (reached.clamp(0.4, 1.2) - *truth);
                }
                _ => *truth += 0.005 * (1.0 - *truth),
            }
        }
        let used = trial.unwrap_or(self.current);
        for (rung, cost) in self.cost.iter_mut().enumerate().filter(|(rung, _)| *rung != used) {
            if let Some(cost) = cost {
                *cost -= FORGET * (*cost - LADDER[rung].1).max(0.0);
            }
        }
        let best = self.best();
        if best != self.current && self.worth(best) > self.worth(self.current) * CLEARLY {
            self.current = best;
            self.patience = LOOK_ANYHOW;
            if best == 0 {
                // If that is wrong, it shows at once.
                self.enough = SHORT;
            }
        }
        self.certain += 1;
        if self.certain >= DOUBT {
            self.certain = 0;
            let at = self.allowed.iter().position(|rung| *rung == self.current).unwrap_or(0);
            // Does it shrink this content more than it does others? Only one that keeps the link busy can be
            // better.
            let better = self.allowed.get(at + 1).copied().filter(|up| {
                let cost = self.cost(*up) * self.toil;
                self.cores() / cost > self.rate(self.current)
                    && self.streams / (self.refine + cost) > self.rate(self.current)
            });
            // Does it cost less than was thought? Or is it not the link, but the target that is slow to
            // unpack?
            let cheaper = at.checked_sub(1).map(|below| self.allowed[below]);
            self.trial = if self.up { better.or(cheaper) } else { cheaper.or(better) };
            self.up = !self.up;
        }
    }

    /// The cheapest of those that are worth about the most.
    fn best(&self) -> usize {
        let most = self.allowed.iter().map(|rung| self.worth(*rung)).fold(0.0, f64::max);
        let good = self.allowed.iter().find(|rung| self.worth(**rung) >= most * AS_GOOD);
        good.copied().unwrap_or(self.current)
    }

    /// What it is worth to use a codec: how fast memory moves, and how little is sent for it.
    fn worth(&self, rung: usize) -> f64 {
        self.rate(rung) * self.ratio(rung).powf(THRIFT)
    }

    fn ratio(&self, rung: usize) -> f64 {
        (self.ease.max(LEAST_EASE) * self.power[rung]).exp()
    }

    /// Bytes of content that would move in a nanosecond.
    fn rate(&self, rung: usize) -> f64 {
        let ratio = self.ratio(rung);
        let cost = self.cost(rung) * self.toil;
        let threads = self.streams / (self.refine + cost + self.copy / ratio);
        let cores = if cost > 0.0 { self.cores() / cost } else { f64::INFINITY };
        let link = self.link.rate().unwrap_or(f64::INFINITY) * ratio;
        threads.min(cores).min(link) * self.truth[rung]
    }

    /// What a codec takes for a byte: as measured, or as far from what is usual as the next one that was
    /// measured.
    fn cost(&self, rung: usize) -> f64 {
        let usual = LADDER[rung].1;
        let near = (1..RUNGS).filter_map(|i| Some((i.abs_diff(rung), self.cost[i]? / LADDER[i].1)));
        let slower = near.min_by_key(|(distance, _)| *distance).map_or(1.0, |(_, slower)| slower);
        self.cost[rung].unwrap_or(usual * slower)
    }
}

impl Window {
    fn add(&mut self, rung: usize, more: &Spent) {
        self.mixed |= self.pure.replace(rung).is_some_and(|before| before != rung);
        self.batches += 1;
        let all = &mut self.spent;
        all.raw += more.raw;
        all.compressed += more.compressed;
        all.carried += more.carried;
        all.busy += more.busy;
        all.refine += more.refine;
        all.encode += more.encode;
        all.queue += more.queue;
        all.write += more.write;
    }
}

fn nanos(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}
