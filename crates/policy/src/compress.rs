//! How to compress the next batch, so that most guest memory moves a second.
//!
//! With a codec `c`, memory moves at the least of
//!
//! - what the link carries, times the ratio by which `c` shrinks it,
//! - what the streams' threads can read, compress and write,
//! - what the cores that may be used can compress.
//!
//! All of these are measured, except for what was not tried yet; that follows from how the tried codecs differ from what was
//! expected of them. A codec that looks better is tried, and seen as it is.

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

/// From the cheapest to the smallest result: what it takes for a byte, in nanoseconds, and how it shrinks compared with
/// zstd 1 (the exponent of its ratio). Measured over a system's programs by `cargo bench -p bench --bench micro codecs` on
/// an EPYC with AVX2; only where the search begins, and how it goes on to what was not tried. LZ4 is here for content that is
/// all alike or all noise, and for targets that unpack slowly; elsewhere zstd's fast levels beat it. Levels above 6 shrink a
/// hundredth more in twice the time.
const LADDER: [(Codec, f64, f64); 6] = [
    (Codec::None, 0.0, 0.0),
    (Codec::Lz4, 3.1, 0.66),
    (Codec::Zstd(-3), 2.95, 0.81),
    (Codec::Zstd(1), 3.7, 1.0),
    (Codec::Zstd(3), 5.7, 1.08),
    (Codec::Zstd(6), 17.8, 1.13),
];
const RUNGS: usize = LADDER.len();

/// How much of what was believed a new observation replaces, once there are many. Larger, and each unusual batch changes the
/// codec; smaller, and new content is noticed late.
const NEWS: f64 = 0.03;

/// Windows over which the link is observed: shorter ones see the socket's buffer instead of the link, or one kind of content.
const WINDOW: Duration = Duration::from_millis(20);
const WINDOW_BATCHES: u32 = 16;

/// What the kernel takes to copy a byte into a socket, at most, in nanoseconds: a write slower than twice the quickest seen, or
/// than twice this, waited for the link.
const COPY: f64 = 0.5;

/// By how much another codec must look better before it is used: below, the estimates are noise.
const CLEARLY: f64 = 1.03;

/// While the link is not full nobody knows how fast it is: believed to be so much faster with each window.
const HOPE: f64 = 1.02;

/// In every so many windows that wait for the link, another codec is used: in turn the next cheaper one, because what looks
/// like a slow link may be a target that is slow to unpack, and the next better one, which may shrink this content more
/// than it does others.
const DOUBT: u32 = 40;

/// After so many batches without compression one is compressed, where that could pay: content changes. And after so many
/// more one is, even where it could only pay if the content were much easier than usual; after twice as many the next time.
const LOOK_AGAIN: u32 = 32;
const LOOK_ANYHOW: u32 = 256;

/// What a stream did with a batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    /// Bytes of content that would travel as they are, were it not for compression.
    pub raw: u64,
    /// Bytes that travelled for these.
    pub packed: u64,
    /// Bytes written altogether.
    pub wire: u64,
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
    /// Nanoseconds a byte, for each codec, once it was seen.
    cost: [Option<f64>; RUNGS],
    /// How each shrinks this content compared with zstd 1.
    power: [f64; RUNGS],
    /// What of the predicted rate was reached with it.
    truth: [f64; RUNGS],
    /// Nanoseconds a byte for reading and refining.
    refine: f64,
    /// Nanoseconds a byte for the quickest writes.
    copy: f64,
    /// Bytes a nanosecond; `None` before the first window.
    link: Option<f64>,
    window: Window,
    windows_full: u32,
    idle: u32,
    /// After so many idle batches one is compressed anyhow.
    patience: u32,
    /// Whether the next trial is of a better codec, not of a cheaper one.
    up: bool,
    /// Batches whose compression was observed.
    seen: u32,
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
            current: rungs[0],
            allowed: rungs,
            streams: f64::from(streams.max(1)),
            cores: f64::from(cores.max(1)),
            ease: 2f64.ln(),
            cost: [None; RUNGS],
            power: LADDER.map(|(_, _, power)| power),
            patience: LOOK_ANYHOW,
            up: true,
            truth: [1.0; RUNGS],
            refine: 0.3,
            copy: COPY,
            link: None,
            window: Window::default(),
            // The first trial comes soon.
            windows_full: DOUBT * 3 / 4,
            // The first look comes soon.
            idle: LOOK_ANYHOW - LOOK_AGAIN / 2,
            seen: 0,
            trial: None,
        }
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
            self.seen = self.seen.saturating_add(1);
            let news = NEWS.max(1.0 / f64::from(self.seen));
            let cost = nanos(spent.encode) / raw;
            let known = self.cost[rung].get_or_insert(cost);
            *known += news.min(0.3) * (cost - *known);
            let shrunk = (raw / (spent.packed.max(1) as f64)).max(1.0).ln();
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
        if took >= WINDOW.mul_f64(self.streams) && self.window.batches >= WINDOW_BATCHES && spent.wire > 0 {
            self.close(nanos(took));
        }
    }

    /// A window is over: what does it say of the link, and what is best now?
    fn close(&mut self, took: f64) {
        let window = std::mem::take(&mut self.window);
        let Spent { raw, wire, write, .. } = window.spent;
        let carried = self.streams * wire as f64 / took;
        let slowness = nanos(write) / wire as f64;
        let full = slowness > 2.0 * self.copy;
        self.copy = self.copy.min(slowness).max(COPY / 4.0);
        let predicted = window.pure.filter(|_| !window.mixed).map(|rung| (rung, self.rate(rung)));
        let trial = self.trial.take();
        self.link = Some(match self.link {
            None => carried,
            // What came through is possible, whatever was believed.
            Some(link) if carried > link => carried,
            // A trial of something else only shows what is possible.
            Some(link) if trial.is_some() => link,
            Some(link) if full => link + 0.5 * (carried - link),
            Some(link) => link * HOPE,
        });
        for (rung, truth) in self.truth.iter_mut().enumerate() {
            match predicted {
                Some((seen, rate)) if seen == rung && rate.is_finite() && raw > 0 => {
                    let reached = self.streams * raw as f64 / took / rate * *truth;
                    *truth += 0.3 * (reached.clamp(0.4, 1.2) - *truth);
                }
                _ => *truth += 0.005 * (1.0 - *truth),
            }
        }
        let best = self.best();
        if best != self.current && self.rate(best) > self.rate(self.current) * CLEARLY {
            self.current = best;
            self.patience = LOOK_ANYHOW;
        }
        if full {
            self.windows_full += 1;
        }
        if self.windows_full >= DOUBT {
            self.windows_full = 0;
            let at = self.allowed.iter().position(|rung| *rung == self.current).unwrap_or(0);
            self.trial = match self.up {
                // Only one that keeps the link busy can be better.
                true => self.allowed.get(at + 1).copied().filter(|up| {
                    self.cores() / self.cost(*up) > self.rate(self.current)
                        && self.streams / (self.refine + self.cost(*up)) > self.rate(self.current)
                }),
                false => at.checked_sub(1).map(|below| self.allowed[below]),
            };
            self.up = !self.up;
        }
    }

    /// The cheapest of those that are about as good as the best.
    fn best(&self) -> usize {
        let most = self.allowed.iter().map(|rung| self.rate(*rung)).fold(0.0, f64::max);
        let good = self.allowed.iter().find(|rung| self.rate(**rung) * 1.01 >= most);
        good.copied().unwrap_or(self.current)
    }

    /// Bytes of content that would move in a nanosecond.
    fn rate(&self, rung: usize) -> f64 {
        let ratio = (self.ease * self.power[rung]).exp();
        let cost = self.cost(rung);
        let threads = self.streams / (self.refine + cost + self.copy / ratio);
        let cores = if cost > 0.0 { self.cores() / cost } else { f64::INFINITY };
        let link = self.link.unwrap_or(f64::INFINITY) * ratio;
        threads.min(cores).min(link) * self.truth[rung]
    }

    /// What a codec takes for a byte: as measured, or as far from what is usual as the next one that was measured.
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
        all.packed += more.packed;
        all.wire += more.wire;
        all.refine += more.refine;
        all.encode += more.encode;
        all.queue += more.queue;
        all.write += more.write;
    }
}

fn nanos(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}
