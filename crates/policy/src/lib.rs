//! When to go another round, when to stop the guest, what to compress with, how fast to send and over how many streams. Pure
//! functions of what was observed.

/// How to compress the next batch.
mod compress;
/// How fast the guest may write.
mod governor;
/// How many pages one write opens.
mod groups;
/// How fast the link is.
mod link;
/// How fast to send.
mod pace;
/// Where compressing is of no use.
mod regions;
/// Another round, the switchover, or post-copy?
mod rounds;
/// Over how many streams to send.
mod width;

pub use compress::{Codec, Compressor, Spent};
pub use governor::{Governor, Grant, Writer};
pub use groups::Groups;
pub use pace::Pace;
pub use regions::Regions;
pub use rounds::{Budget, Next, Seen, next, predicted_downtime};
pub use width::Width;
