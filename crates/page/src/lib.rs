//! What a page is sent as, and how it becomes a page again. Pure: no sockets, no clocks, no threads.
//!
//! ```text
//! zero? ─ unchanged? ─ kept? ─ known? ─ delta? ─ compressed? ─ plain          (refine, at the source)
//! ```
//!
//! Each step is asked only where those before it said no. [`Sent`] is what most of the first know;
//! [`PageDecoder`] undoes it all.

/// Compression of what crosses the wire beside pages.
mod codec;
/// Pages compressed together.
mod compress;
/// Target: from messages to pages, nothing unverified.
mod decode;
/// A page as a difference.
mod delta;
/// Source: the cheapest message for each page.
mod encode;
/// What tells two contents apart.
mod fingerprint;
/// Source: which page has this content?
mod index;
/// What the target keeps of the VM from before.
mod kept;
/// Content that comes again and again.
mod repeats;
/// What a run of pages is sent as.
mod run;
/// Source: what the target has.
mod sent;
/// Source: the versions that differences are made against.
mod versions;

pub use codec::{DecompressError, compress, decompress};
pub use compress::{Codec, Decoder, Encoder, NotPages};
pub use decode::{PageDecoder, TargetMemory, Undecodable};
pub use encode::{Batch, Compressed, Counts, PAYLOAD_OF_DUPLICATE, References};
pub use fingerprint::{TAG, Tagger, fingerprint, is_zero};
pub use kept::{Kept, NOTHING_KEPT};
pub use run::{Class, Run};
pub use sent::Sent;

/// The parts of `delta` for those who measure it.
#[doc(hidden)]
pub mod measured {
    /// See `delta::encode`.
    pub fn delta(base: &[u8], page: &[u8], out: &mut Vec<u8>) -> bool {
        crate::delta::encode(base, page, out)
    }
}
