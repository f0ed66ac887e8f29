//! What data connections carry: batches of pages, ends of rounds, requests for pages.
//!
//! Every frame begins with a fixed header of 16 bytes. A batch goes on with
//!
//! ```text
//! a table of runs │ what travels for each run alone │ what all packed runs share, compressed as one
//! ```
//!
//! The table says how long the first part is for each run; the shared part is what remains of the payload.

use page::{Class, Codec, Run};
use units::{BlockId, PAGE_SIZE, PageIndex, PageRange};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// Content pages in one batch, at most: 512 KiB. Bounds the buffers of both sides, and how long a page that
/// was pushed waits behind others. Throughput hardly depends on it: from 64 KiB to 2 MiB it was the same to
/// within noise (`cargo bench -p bench --bench micro batch_size`).
pub const BATCH_PAGES: u64 = 128;

/// Bytes of content in one batch, at most.
pub const MAX_PAYLOAD: usize = BATCH_PAGES as usize * PAGE_SIZE;

/// Runs in one batch, at most: as many as it has pages when no two neighbours are alike.
pub const MAX_RUNS: usize = BATCH_PAGES as usize;

/// Bytes of a frame's header.
pub const HEADER: usize = size_of::<Header>();

/// Bytes of a run in a batch's table.
pub const RUN: usize = size_of::<WireRun>();

const BATCH: u8 = 1;
const ROUND_END: u8 = 2;
const WANT: u8 = 3;

const ZERO: u8 = 0;
const RAW: u8 = 1;
const DUPLICATE: u8 = 2;
const DELTA: u8 = 3;
const COMPRESSED: u8 = 4;
const KEPT: u8 = 5;

const UNCOMPRESSED: u8 = 0;
const LZ4: u8 = 1;
const ZSTD: u8 = 2;

/// A frame's header as it goes over the wire.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug)]
#[repr(C)]
pub struct Header {
    kind: u8,
    /// How what packed runs share is compressed.
    codec: u8,
    block: U16,
    count: U32,
    argument: U64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireRun {
    start: U64,
    bytes: U32,
    count: U16,
    class: u8,
    reserved: u8,
}

/// What a header announces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Frame {
    /// `runs` table entries follow, then `payload` bytes of content.
    Batch {
        /// Of which block.
        block: BlockId,
        /// Entries of the table.
        runs: usize,
        /// Bytes of content.
        payload: usize,
        /// How what packed runs share is compressed; `None` when no run is packed.
        codec: Option<Codec>,
    },
    /// This stream has sent its share of the round.
    RoundEnd(u32),
    /// A guest waits for this page.
    Want {
        /// Its block.
        block: BlockId,
        /// Its place in the block.
        page: PageIndex,
    },
}

/// The sizes of the VM's blocks in pages: what a peer's page numbers are checked against.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shape(pub Vec<u64>);

impl Shape {
    /// How many pages `block` has; `None` if the VM has no such block.
    pub fn pages(&self, block: BlockId) -> Option<u64> {
        self.0.get(usize::from(block.0)).copied()
    }
}

/// A frame that cannot be right. Whoever gets one ends the connection.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    /// Not a frame of this version.
    #[error("frame kind {0} is not known")]
    Kind(u8),
    /// A batch larger than agreed, or empty.
    #[error(
        "a batch of {runs} runs and {payload} bytes; at most {MAX_RUNS} runs and {MAX_PAYLOAD} bytes are \
         agreed"
    )]
    Size {
        /// Announced runs.
        runs: u64,
        /// Announced bytes.
        payload: u64,
    },
    /// A block that the VM does not have.
    #[error("RAM block {0} is not one of this VM's")]
    Block(u16),
    /// Pages that the block does not have.
    #[error("{count} pages from {start} on reach beyond RAM block {block}, which has {pages}")]
    Beyond {
        /// The block.
        block: u16,
        /// The first page.
        start: u64,
        /// How many.
        count: u64,
        /// What the block has.
        pages: u64,
    },
    /// A page class of another version.
    #[error("page class {0} is not known")]
    Class(u8),
    /// A codec of another version.
    #[error("codec {0} is not known")]
    Codec(u8),
    /// A run whose bytes cannot be so many.
    #[error("a run of {count} pages of class {class} with {bytes} bytes")]
    Run {
        /// Its class on the wire.
        class: u8,
        /// Its pages.
        count: u64,
        /// Its bytes.
        bytes: u32,
    },
    /// More pages than a batch may restore to.
    #[error("the runs of a batch stand for {0} pages; at most {BATCH_PAGES} are agreed")]
    Pages(u64),
    /// The table does not match the content.
    #[error("the runs need {runs} bytes of content, the batch carries {payload}")]
    Content {
        /// By the table.
        runs: u64,
        /// By the header.
        payload: u64,
    },
}

impl Frame {
    /// The header of this frame.
    pub fn header(&self) -> [u8; HEADER] {
        let (kind, block, count, argument) = match *self {
            Frame::Batch { block, runs, payload, .. } => (BATCH, block.0, runs as u32, payload as u64),
            Frame::RoundEnd(round) => (ROUND_END, 0, round, 0),
            Frame::Want { block, page } => (WANT, block.0, 1, page.0),
        };
        let codec = match self {
            Frame::Batch { codec: Some(Codec::Lz4), .. } => LZ4,
            Frame::Batch { codec: Some(Codec::Zstd(_)), .. } => ZSTD,
            _ => UNCOMPRESSED,
        };
        zerocopy::transmute!(Header {
            kind,
            codec,
            block: block.into(),
            count: count.into(),
            argument: argument.into(),
        })
    }

    /// Reads a header that a peer sent, for a VM of this shape.
    pub fn parse(bytes: &[u8; HEADER], shape: &Shape) -> Result<Self, FrameError> {
        let header: Header = zerocopy::transmute!(*bytes);
        let block = BlockId(header.block.get());
        let (count, argument) = (header.count.get(), header.argument.get());
        match header.kind {
            BATCH => {
                let (runs, payload) = (u64::from(count), argument);
                if runs == 0 || runs > MAX_RUNS as u64 || payload > MAX_PAYLOAD as u64 {
                    return Err(FrameError::Size { runs, payload });
                }
                shape.pages(block).ok_or(FrameError::Block(block.0))?;
                let codec = match header.codec {
                    UNCOMPRESSED => None,
                    LZ4 => Some(Codec::Lz4),
                    ZSTD => Some(Codec::Zstd(0)),
                    other => return Err(FrameError::Codec(other)),
                };
                Ok(Frame::Batch { block, runs: runs as usize, payload: payload as usize, codec })
            }
            ROUND_END => Ok(Frame::RoundEnd(count)),
            WANT => {
                let page = PageIndex(argument);
                check(shape, block, PageRange::new(page, 1))?;
                Ok(Frame::Want { block, page })
            }
            other => Err(FrameError::Kind(other)),
        }
    }
}

/// Appends the header and the table of a batch of these runs to `out`. What travels for each run goes after
/// it, then what the packed ones share: so many bytes by this codec.
pub fn write_batch(block: BlockId, runs: &[Run], compressed: Option<(Codec, usize)>, out: &mut Vec<u8>) {
    let own: usize = runs.iter().map(Run::payload).sum();
    let payload = own + compressed.map_or(0, |(_, bytes)| bytes);
    debug_assert!(runs.len() <= MAX_RUNS && payload <= MAX_PAYLOAD, "a batch within its bounds");
    let codec = compressed.map(|(codec, _)| codec);
    out.extend_from_slice(&Frame::Batch { block, runs: runs.len(), payload, codec }.header());
    for run in runs {
        let wire = WireRun {
            start: run.range.start.0.into(),
            bytes: run.bytes.into(),
            count: (run.range.count as u16).into(),
            class: match run.class {
                Class::Zero => ZERO,
                Class::Raw => RAW,
                Class::Kept => KEPT,
                Class::Duplicate => DUPLICATE,
                Class::Delta => DELTA,
                Class::Compressed => COMPRESSED,
            },
            reserved: 0,
        };
        out.extend_from_slice(wire.as_bytes());
    }
}

/// The table of a batch, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    /// The runs.
    pub runs: Vec<Run>,
    /// Bytes of the payload that travel for single runs; the packed ones share the rest.
    pub own: usize,
    /// Bytes of pages that the shared part unpacks to.
    pub raw: usize,
}

/// Reads the table of a batch: each run lies within the block and has as many bytes as its class can have,
/// all together fill the payload, and what they stand for is no more than a batch may hold.
pub fn parse_runs(
    table: &[u8],
    block: BlockId,
    payload: usize,
    codec: Option<Codec>,
    shape: &Shape,
) -> Result<Table, FrameError> {
    let mut runs = Vec::with_capacity(table.len() / RUN);
    let (mut own, mut pages, mut compressed) = (0u64, 0u64, 0u64);
    for entry in table.chunks_exact(RUN) {
        let Ok(wire) = WireRun::read_from_bytes(entry) else { break };
        let range = PageRange::new(PageIndex(wire.start.get()), u64::from(wire.count.get()));
        check(shape, block, range)?;
        let class = match wire.class {
            ZERO => Class::Zero,
            RAW => Class::Raw,
            KEPT => Class::Kept,
            DUPLICATE => Class::Duplicate,
            DELTA => Class::Delta,
            COMPRESSED => Class::Compressed,
            other => return Err(FrameError::Class(other)),
        };
        let run = Run { range, class, bytes: wire.bytes.get() };
        if range.is_empty() || !run.is_sound() {
            return Err(FrameError::Run { class: wire.class, count: range.count, bytes: run.bytes });
        }
        own += u64::from(run.bytes);
        pages += range.count;
        compressed += if class == Class::Compressed { range.count } else { 0 };
        runs.push(run);
    }
    if pages > BATCH_PAGES {
        return Err(FrameError::Pages(pages));
    }
    // What is shared exists if and only if somebody shares it.
    let shared = (payload as u64).checked_sub(own).filter(|rest| (*rest > 0) == (compressed > 0));
    if shared.is_none() || codec.is_some() != (compressed > 0) {
        return Err(FrameError::Content { runs: own, payload: payload as u64 });
    }
    Ok(Table { runs, own: own as usize, raw: compressed as usize * PAGE_SIZE })
}

fn check(shape: &Shape, block: BlockId, range: PageRange) -> Result<(), FrameError> {
    let pages = shape.pages(block).ok_or(FrameError::Block(block.0))?;
    if range.fits(pages) {
        return Ok(());
    }
    Err(FrameError::Beyond { block: block.0, start: range.start.0, count: range.count, pages })
}
