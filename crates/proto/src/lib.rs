//! What crosses the wire, and who says what when. Pure: bytes and events in, bytes and acts out.
//!
//! A migration uses several TCP connections, each of which begins with a [`Preamble`]: one for control
//! (protobuf [`control::Message`]s behind a length), any number for pages, and one for the pages that the
//! guest waits for (both carry [`Frame`]s). [`Source`] and [`Target`] are the two ends as state machines.

mod brief;
mod codec;
mod frame;
mod link;
mod preamble;
mod rounds;
mod source;
mod spool;
mod target;
mod unspool;

pub use brief::Brief;
pub use codec::{ControlError, MAX_CONTROL, bitmaps, compressed, decode, decompressed, encode, page_sets};
pub use frame::{
    BATCH_PAGES, Frame, FrameError, HEADER, Header, MAX_PAYLOAD, MAX_RUNS, RUN, Shape, Table, parse_runs,
    write_batch,
};
pub use link::{Answer, Link, LinkEffect, LinkEvent, NoLink, Rest, outlives_link};
pub use page::Run;
pub use policy::Phase;
pub use preamble::{MAGIC, Preamble, PreambleError, Purpose, REPLY, Reply, Status, Token, VERSION};
pub use rounds::{Decision, Moved, Rounds, Warning};
pub use source::{NextStep, Source, SourceEffect, SourceEnd, SourceEvent};
pub use spool::{AnyPages, SourceSpool, SpoolEffect, SpoolEvent, SpoolMark, SpoolSaid, SpoolTerms, ToSecure};
pub use target::{Target, TargetEffect, TargetEnd, TargetEvent};
pub use unspool::{Follow, Put, TargetSpool};

/// The control messages, generated from `proto/control.proto`.
#[allow(missing_docs, clippy::all, reason = "generated; documented in the .proto file")]
pub mod control {
    include!(concat!(env!("OUT_DIR"), "/whimbrel.control.rs"));
    pub use message::Kind;
}
