//! When to go another round, when to stop the guest, what to compress with, how fast to send and over how
//! many streams. Pure functions of what was observed.

/// How to compress the next batch.
mod compress;
/// How long a stop waits for disks.
mod disks;
/// Where a downtime went.
mod downtime;
/// What it will take.
mod forecast;
/// How many pages one write opens.
mod groups;
/// How fast the link is.
mod link;
/// When its disks have little to do.
mod moment;
/// How fast to send.
mod pace;
/// Where a migration stands.
mod phase;
/// Which way to go, and what can be promised.
mod plan;
/// Where compressing is of no use.
mod regions;
/// Another round, the switchover, or post-copy?
mod rounds;
/// Whether what is missing is safe enough to stop the guest.
mod secure;
/// For which share of the time writers stand still.
mod stuns;
/// How fast the guest may write.
mod throttle;
/// Over how many streams to send.
mod width;
/// How much memory a guest writes.
mod working_set;

pub use compress::{Codec, Compressor, Learnt, Spent};
pub use disks::{Disks, Drain};
pub use downtime::{DowntimePart, PausePart, PauseStep, Side, divide};
pub use forecast::{Estimate, HARD, Measured, Span, Standing, Way};
pub use groups::Groups;
pub use moment::{Moment, Stopping};
pub use pace::Pace;
pub use phase::Phase;
pub use plan::{LONGEST_STALL, Limit, Limits, Plan, plan};
pub use regions::Regions;
pub use rounds::{Budget, Next, RoundsSoFar, must_stop, next, predicted_downtime};
pub use secure::{Pass, Secure, secure};
pub use stuns::Duty;
pub use throttle::{Grant, OUTRUN, SHARE, Throttle, Writer, share_of_round};
pub use width::Width;
pub use working_set::WorkingSet;
