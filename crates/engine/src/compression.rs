//! Source: what compresses the next batch, and who may.

use api::Compression;
use page::{Batch, Codec, Encoder};
use policy::{Compressor, Learnt, Regions, Spent};
use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};
use units::{BlockId, Locked, PageRange};

/// Whether the user allows this.
pub(crate) fn allowed(compress: Compression, codec: policy::Codec) -> bool {
    match compress {
        Compression::Auto => true,
        Compression::None => codec == policy::Codec::None,
        Compression::Lz4 => codec == policy::Codec::Lz4,
        Compression::Zstd => matches!(codec, policy::Codec::Zstd(_)),
    }
}

/// What the streams of a migration share of compressing.
pub(crate) struct BatchCompressor {
    state: Mutex<State>,
    cores: Mutex<Cores>,
    freed: Condvar,
}

struct Cores {
    /// How many threads may compress at a time.
    all: u32,
    busy: u32,
}

struct State {
    compressor: Compressor,
    regions: Regions,
}

impl BatchCompressor {
    /// For a guest with so many pages in its blocks, of which an earlier migration may have taught something.
    pub(crate) fn new(
        compress: Compression,
        streams: u32,
        cores: u32,
        pages: &[u64],
        learnt: Option<&Learnt>,
    ) -> Arc<Self> {
        let cores = cores.max(1);
        let mut compressor = Compressor::new(streams, cores, |codec| allowed(compress, codec));
        if let Some(learnt) = learnt {
            compressor.recall(learnt);
        }
        let state = State { compressor, regions: Regions::new(pages) };
        Arc::new(Self {
            state: Mutex::new(state),
            cores: Mutex::new(Cores { all: cores, busy: 0 }),
            freed: Condvar::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.locked()
    }

    /// What this migration taught so far.
    pub(crate) fn learnt(&self) -> Option<Learnt> {
        self.state().compressor.learnt()
    }

    /// A round begins.
    pub(crate) fn turn(&self, round: u32) {
        self.state().regions.turn(round);
    }

    /// So many cores may compress from now on.
    pub(crate) fn allow(&self, cores: u32) {
        let cores = cores.max(1);
        let before = std::mem::replace(&mut self.cores.locked().all, cores);
        if cores != before {
            tracing::debug!(cores, "another number of cores may compress");
            self.state().compressor.allow(cores);
            self.freed.notify_all();
        }
    }

    /// So many streams are in use now.
    pub(crate) fn spread(&self, streams: u32) {
        self.state().compressor.spread(streams);
    }

    /// Compresses what is best compressed of a batch.
    pub(crate) fn pack(&self, block: BlockId, batch: &mut Batch, encoder: &mut Encoder) -> Compressed {
        let ranges: Vec<PageRange> = batch.raw_ranges().collect();
        let raw = ranges.iter().map(|range| range.bytes().0).sum();
        let mut compressed = Compressed {
            codec: policy::Codec::None,
            spent: Spent { raw, compressed: raw, ..Spent::default() },
        };
        if raw == 0 {
            return compressed;
        }
        let mut state = self.state();
        compressed.codec = state.compressor.choose();
        let codec = match compressed.codec {
            policy::Codec::None => return compressed,
            policy::Codec::Lz4 => Codec::Lz4,
            policy::Codec::Zstd(level) => Codec::Zstd(level),
        };
        let worth: Vec<PageRange> =
            ranges.into_iter().filter(|range| state.regions.worth(block, range.start)).collect();
        drop(state);
        if worth.is_empty() {
            return compressed;
        }
        let begin = Instant::now();
        let core = self.core();
        compressed.spent.queue = begin.elapsed();
        let begin = Instant::now();
        let compression = batch
            .compress(encoder, codec, |range| worth.binary_search_by_key(&range.start, |w| w.start).is_ok());
        drop(core);
        compressed.spent.encode = begin.elapsed();
        if let Some(compression) = compression {
            if compression.used {
                compressed.spent.compressed -= (compression.raw - compression.wire) as u64;
            }
            self.state().regions.tried(block, &worth, compression.raw as u64, compression.wire as u64);
        }
        compressed
    }

    /// What became of a batch that `pack` was asked about.
    pub(crate) fn observe(&self, compressed: &Compressed) {
        self.state().compressor.observe(compressed.codec, &compressed.spent);
    }

    /// One of the cores that may compress, for as long as it is held.
    fn core(&self) -> Core<'_> {
        let cores = self.cores.locked();
        let mut cores =
            self.freed.wait_while(cores, |cores| cores.busy >= cores.all).expect("no one panics here");
        cores.busy += 1;
        Core(self)
    }
}

struct Core<'a>(&'a BatchCompressor);

impl Drop for Core<'_> {
    fn drop(&mut self) {
        self.0.cores.locked().busy -= 1;
        self.0.freed.notify_one();
    }
}

/// What was seen of the link while a batch was made and written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkSample {
    /// Bytes that the target confirmed.
    pub(crate) carried: u64,
    /// Whether something still waited to be sent before it was written, so all the while before.
    pub(crate) waited_before: bool,
    /// The same after it was written.
    pub(crate) waits_now: bool,
}

/// A batch ready to be written.
pub(crate) struct Compressed {
    codec: policy::Codec,
    spent: Spent,
}

impl Compressed {
    /// It was written.
    pub(crate) fn written(mut self, refine: Duration, write: Duration, link: LinkSample) -> Self {
        self.spent.refine = refine;
        self.spent.write = write;
        self.spent.carried = link.carried;
        if link.waited_before {
            self.spent.busy += refine + self.spent.queue + self.spent.encode;
        }
        if link.waits_now {
            self.spent.busy += write;
        }
        self
    }
}
