//! What is said of a guest's disks.

use std::time::Duration;

/// Requests of one kind that were done, since QEMU began.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Requests {
    /// How many.
    pub done: u64,
    /// How long all of them took together, each from its submission on.
    pub took: Duration,
}

/// Requests that the guest has put into a disk's queues.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Queued {
    /// Another number with each request that QEMU begins.
    pub begun: u64,
    /// How many are under way.
    pub in_flight: u64,
}

/// One of the guest's disks.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Disk {
    /// QEMU's word for it: the same each time.
    pub name: String,
    /// Requests that read.
    pub reads: Requests,
    /// Those that write or discard.
    pub writes: Requests,
    /// Those that make what was written durable.
    pub flushes: Requests,
    /// Its queues; none where QEMU does not tell.
    pub queued: Option<Queued>,
}

impl Disk {
    /// Reads, writes and flushes.
    pub fn done(&self) -> [Requests; 3] {
        [self.reads, self.writes, self.flushes]
    }
}

impl Requests {
    /// Those that were done since then.
    pub fn since(self, before: Self) -> Self {
        Self { done: self.done.saturating_sub(before.done), took: self.took.saturating_sub(before.took) }
    }

    /// How long one took, in seconds.
    pub fn each(self) -> Option<f64> {
        (self.done > 0).then(|| self.took.as_secs_f64() / self.done as f64)
    }
}
