//! When to go another round, when to stop the guest, what to compress with, how fast to send and over how
//! many streams. Pure functions of what was observed.

/// How to compress the next batch.
mod compress;
/// What it will take.
mod forecast;
/// How fast the guest may write.
mod governor;
/// How many pages one write opens.
mod groups;
/// How fast the link is.
mod link;
/// How fast to send.
mod pace;
/// Which way to go, and what can be promised.
mod plan;
/// Where compressing is of no use.
mod regions;
/// Another round, the switchover, or post-copy?
mod rounds;
/// Whether what is owed is safe enough to stop the guest.
mod secure;
/// For which share of the time writers stand still.
mod stuns;
/// Over how many streams to send.
mod width;
/// How much memory a guest writes.
mod working_set;

pub use compress::{Codec, Compressor, Learnt, Spent};
pub use forecast::{Course, HARD, Measured, Span, Standing, Way};
pub use governor::{Governor, Grant, OUTRUN, SHARE, Writer, share_of_round};
pub use groups::Groups;
pub use pace::Pace;
pub use plan::{LONGEST_STALL, Plan, Promise, Terms, plan};
pub use regions::Regions;
pub use rounds::{Budget, Next, Seen, must_stop, next, predicted_downtime};
pub use secure::{Pass, Secure, secure};
pub use stuns::Duty;
pub use width::Width;
pub use working_set::WorkingSet;
