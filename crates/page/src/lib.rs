//! What a page is sent as, and what tells two pages apart. Pure: no sockets, no clocks, no threads.

mod codec;
mod refine;

pub use codec::{Unpack, pack, unpack};
pub use refine::{Class, Refined, fingerprint, is_zero, refine};
