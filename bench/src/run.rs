//! What one run came to.

use crate::guest::{Felt, Gaps};
use serde::Serialize;

/// One migration. `None` is what this contender does not have or say.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub(crate) struct Run {
    /// Who.
    pub(crate) contender: &'static str,
    /// Which of its runs, from 1 on.
    pub(crate) n: u32,
    /// When it began, in seconds since 1970.
    pub(crate) began: u64,
    /// From where.
    pub(crate) from: String,
    /// To where.
    pub(crate) to: String,
    /// From the request until everything is on the target and the guest runs there.
    pub(crate) total_ms: f64,
    /// The part of `total_ms` in which whimbrel starts the target's QEMU; QEMU's own migration finds it started.
    pub(crate) preflight_ms: f64,
    /// From the guest's last instruction on the source to its first on the target.
    pub(crate) downtime_ms: f64,
    /// What QEMU says of it: the source's view, which ends before the target runs.
    pub(crate) qemu_says_downtime_ms: Option<f64>,
    /// The longest silence that a client of the guest's echo port saw during it.
    pub(crate) client_gap_ms: Option<f64>,
    /// The longest gap that the guest's own clock saw. That clock stands still while the guest is stopped.
    pub(crate) guest_gap_ms: Option<f64>,
    /// What the source host's network card counted, both ways.
    pub(crate) wire_bytes: u64,
    /// Processor seconds on the source, vCPUs apart.
    pub(crate) source_cpu_s: f64,
    /// Processor seconds on the target, vCPUs apart.
    pub(crate) target_cpu_s: f64,
    /// Passes over dirty memory.
    pub(crate) rounds: Option<u64>,
    /// Faults of the guest after a post-copy switchover.
    pub(crate) faults: Option<Faults>,
    /// Pages a second that the target took in after the switchover.
    pub(crate) pages_per_s: Option<f64>,
    /// The guest died of it, or its memory was not right afterwards: what it said.
    pub(crate) harm: Option<String>,
    /// The program's own report.
    pub(crate) report: serde_json::Value,
}

/// Pages that the guest waited for, and how long.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub(crate) struct Faults {
    /// How many.
    pub(crate) count: f64,
    /// The median, in microseconds.
    pub(crate) p50_us: f64,
    /// 99 in 100 are shorter.
    pub(crate) p99_us: f64,
    /// The longest.
    pub(crate) max_us: f64,
}

/// A stretch in which nothing moves: what a gap is when nobody migrates.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub(crate) struct Quiet {
    /// Always `none`.
    pub(crate) contender: &'static str,
    /// The longest silence that a client saw.
    pub(crate) client_gap_ms: f64,
    /// The longest gap that the guest's own clock saw.
    pub(crate) guest_gap_ms: f64,
}

impl Run {
    /// With what the guest felt.
    pub(crate) fn felt(mut self, felt: Felt) -> Self {
        match felt {
            Felt::Fine(Gaps { client, guest }) => {
                (self.client_gap_ms, self.guest_gap_ms) = (Some(client), Some(guest));
            }
            Felt::Harmed(why) => self.harm = Some(why.to_string()),
        }
        self
    }

    /// The total time without what QEMU's own migration finds done.
    pub(crate) fn moving_ms(&self) -> f64 {
        self.total_ms - self.preflight_ms
    }

    /// What crossed the wire, in GiB.
    pub(crate) fn wire_gib(&self) -> f64 {
        self.wire_bytes as f64 / f64::from(1 << 30)
    }
}
