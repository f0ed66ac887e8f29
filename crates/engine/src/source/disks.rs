//! The guest's disks: how slow they are.

use super::SourceDriver;
use crate::ports::{Disk, Machine, Requests};
use policy::{DiskLook, Disks};
use std::time::{Duration, Instant};

/// How often they are looked at while memory moves: a thousandth of QEMU's time at most.
const EVERY: Duration = Duration::from_secs(1);

/// What was seen of them.
pub(super) struct DiskWatch {
    began: Instant,
    asked: Option<Instant>,
    pub(super) seen: Disks,
}

impl DiskWatch {
    pub(super) fn new() -> Self {
        Self { began: Instant::now(), asked: None, seen: Disks::default() }
    }

    /// Looks once more. A QEMU that does not tell is one whose disks nobody knows.
    pub(super) fn look(&mut self, machine: &mut dyn Machine) {
        self.asked = Some(Instant::now());
        match machine.disks() {
            Ok(disks) => self.seen.see(self.began.elapsed(), disks.into_iter().map(told).collect()),
            Err(error) => tracing::info!(%error, "not known"),
        }
    }

    fn is_due(&self) -> bool {
        self.asked.is_none_or(|asked| asked.elapsed() >= EVERY)
    }
}

impl SourceDriver {
    /// Looks at them.
    pub(super) fn look_at_disks(&mut self) {
        self.disks.look(&mut **self.parts.machine.lock());
    }

    /// Looks at them, if it is time.
    pub(super) fn look_at_disks_again(&mut self) {
        if self.disks.is_due() && !self.stopped {
            self.look_at_disks();
        }
    }
}

fn told(Disk { name, reads, writes, flushes, queued }: Disk) -> DiskLook {
    let requests = |Requests { done, took }| policy::Requests { done, took };
    let queued = queued.map(|queued| policy::Queued { begun: queued.begun, in_flight: queued.in_flight });
    DiskLook { name, done: [reads, writes, flushes].map(requests), queued }
}
