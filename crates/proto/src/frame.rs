//! What data connections carry: batches of pages, ends of rounds, requests for pages.
//!
//! Every frame begins with a fixed header of 16 bytes. A batch goes on with a table of runs and then the content of
//! its plain runs, one after the other.

use page::Class;
use units::{BlockId, PAGE_SIZE, PageIndex, PageRange};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// Content pages in one batch, at most: 512 KiB. Bounds the buffers of both sides, and how long a page that was pushed waits
/// behind others. Throughput hardly depends on it: from 64 KiB to 2 MiB it was the same to within noise
/// (`cargo bench -p bench --bench micro batch_size`).
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
const PLAIN: u8 = 1;

/// A frame's header as it goes over the wire.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug)]
#[repr(C)]
pub struct Header {
    kind: u8,
    reserved: u8,
    block: U16,
    count: U32,
    argument: U64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireRun {
    start: U64,
    count: U32,
    class: u8,
    reserved: [u8; 3],
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

/// Pages of one class in a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Which pages.
    pub range: PageRange,
    /// What they are sent as.
    pub class: Class,
}

impl Run {
    /// Bytes of content that travel for it.
    pub fn payload(&self) -> usize {
        match self.class {
            Class::Zero => 0,
            Class::Plain => self.range.count as usize * PAGE_SIZE,
        }
    }
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
        "a batch of {runs} runs and {payload} bytes; at most {MAX_RUNS} runs and {MAX_PAYLOAD} bytes are agreed"
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
            Frame::Batch { block, runs, payload } => (BATCH, block.0, runs as u32, payload as u64),
            Frame::RoundEnd(round) => (ROUND_END, 0, round, 0),
            Frame::Want { block, page } => (WANT, block.0, 1, page.0),
        };
        zerocopy::transmute!(Header {
            kind,
            reserved: 0,
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
                Ok(Frame::Batch { block, runs: runs as usize, payload: payload as usize })
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

/// Appends the header and the table of a batch of these runs to `out`; their content goes after it.
pub fn write_batch(block: BlockId, runs: &[Run], out: &mut Vec<u8>) {
    let payload = runs.iter().map(Run::payload).sum();
    debug_assert!(runs.len() <= MAX_RUNS && payload <= MAX_PAYLOAD, "a batch within its bounds");
    out.extend_from_slice(&Frame::Batch { block, runs: runs.len(), payload }.header());
    for run in runs {
        let wire = WireRun {
            start: run.range.start.0.into(),
            count: (run.range.count as u32).into(),
            class: match run.class {
                Class::Zero => ZERO,
                Class::Plain => PLAIN,
            },
            reserved: [0; 3],
        };
        out.extend_from_slice(wire.as_bytes());
    }
}

/// Reads the table of a batch: each run lies within the block, and together they need exactly `payload` bytes.
pub fn parse_runs(
    table: &[u8],
    block: BlockId,
    payload: usize,
    shape: &Shape,
) -> Result<Vec<Run>, FrameError> {
    let mut runs = Vec::with_capacity(table.len() / RUN);
    let mut need = 0u64;
    for entry in table.chunks_exact(RUN) {
        let Ok(wire) = WireRun::read_from_bytes(entry) else { break };
        let range = PageRange::new(PageIndex(wire.start.get()), u64::from(wire.count.get()));
        check(shape, block, range)?;
        let class = match wire.class {
            ZERO => Class::Zero,
            PLAIN => Class::Plain,
            other => return Err(FrameError::Class(other)),
        };
        let run = Run { range, class };
        need += run.payload() as u64;
        runs.push(run);
    }
    if need != payload as u64 {
        return Err(FrameError::Content { runs: need, payload: payload as u64 });
    }
    Ok(runs)
}

fn check(shape: &Shape, block: BlockId, range: PageRange) -> Result<(), FrameError> {
    let pages = shape.pages(block).ok_or(FrameError::Block(block.0))?;
    if range.fits(pages) {
        return Ok(());
    }
    Err(FrameError::Beyond { block: block.0, start: range.start.0, count: range.count, pages })
}
