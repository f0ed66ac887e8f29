//! What one run came to.

use crate::{
    guest::{Felt, Gaps},
    workload::Pulse,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use units::Rate;

/// What everybody who moves a guest is held to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// The longest pause that may be planned.
    pub(crate) downtime_ms: u64,
    /// When it is ended.
    pub(crate) patience: Duration,
    /// The link that the guest outruns, if it is about that.
    pub(crate) outruns: Option<Rate>,
    /// How closely the guest is watched.
    pub(crate) pulse: Pulse,
    /// Whether the guest then looks at all its memory.
    pub(crate) verify: bool,
}

/// One migration. `None` is what this contender does not have or say.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Run {
    /// What the guest did.
    pub(crate) workload: String,
    /// What the bytes travelled over.
    pub(crate) link: String,
    /// Whether they were protected.
    pub(crate) tls: bool,
    /// Who.
    pub(crate) contender: String,
    /// Which of its runs, from 1 on.
    pub(crate) run: u32,
    /// When it began, in seconds since 1970.
    pub(crate) began: u64,
    /// From where.
    pub(crate) from: String,
    /// From the request, the start of the target's QEMU included, until everything is on the target and the
    /// guest runs there; or until it was ended.
    pub(crate) total_ms: f64,
    /// The part of it in which the target's QEMU was started and both sides made ready.
    pub(crate) start_ms: f64,
    /// The longest time in which the guest did not tick, by a clock that does not stop with it.
    pub(crate) guest_downtime_ms: Option<f64>,
    /// From the guest's last instruction on the source to its first on the target, as the programs tell.
    pub(crate) downtime_ms: Option<f64>,
    /// The longest silence that a client of the guest's echo port saw during it.
    pub(crate) client_gap_ms: Option<f64>,
    /// The longest gap that the guest's own clock saw. That clock stands still while the guest is stopped.
    pub(crate) guest_gap_ms: Option<f64>,
    /// What the source host's network card sent.
    pub(crate) wire_bytes: u64,
    /// Pages (of Redis: commands) that the guest's workloads did meanwhile.
    pub(crate) guest_work: u64,
    /// The same in a second, just before.
    pub(crate) work_per_s: f64,
    /// Processor seconds on both sides, vCPUs apart.
    pub(crate) cpu_s: f64,
    /// Those of the source.
    pub(crate) source_cpu_s: f64,
    /// Whether it came to its end by itself, the guest unharmed.
    pub(crate) finished: bool,
    /// Connections that carried memory.
    pub(crate) streams: Option<u64>,
    /// Bytes a second while nothing but memory was moved: of a first round, or of a plain copy.
    pub(crate) bytes_per_s: Option<f64>,
    /// Passes over dirty memory.
    pub(crate) rounds: Option<u64>,
    /// What had been expected instead of `total_ms`, before anything moved.
    pub(crate) expected_ms: Option<f64>,
    /// Faults of the guest after a post-copy switchover.
    pub(crate) faults: Option<Faults>,
    /// Pages a second that the target took in after the switchover.
    pub(crate) pages_per_s: Option<f64>,
    /// Of a guest that outruns the link.
    pub(crate) outran: Option<Outran>,
    /// Why it is not finished; what became of the guest, if it was harmed.
    pub(crate) trouble: Option<String>,
    /// Whether the guest died of it, or its memory was not right afterwards.
    pub(crate) harmed: bool,
}

/// Pages that the guest waited for, and how long.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
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

/// What a migration did to a guest that outruns the link, until its end. The guest's own clock measures: the
/// pause of the switchover is not in it.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Outran {
    /// The whole time, in times that all RAM takes over the link.
    pub(crate) copies: f64,
    /// The speed of the vCPU that computes, of what it was just before.
    pub(crate) computing: f64,
    /// Of the time before the switchover, how much that vCPU was not held up: it ran, or waited for a
    /// processor of the machine only.
    pub(crate) not_held_up: Option<f64>,
    /// What the writer wrote just before, of what the link carries.
    pub(crate) writing_before: f64,
    /// What it wrote meanwhile.
    pub(crate) writing: f64,
    /// Pages that were sent before and had to be sent again, as whimbrel's rounds tell.
    pub(crate) fresh: Option<f64>,
    /// What a write of one page a millisecond took, in milliseconds: 99 in 100 of them less.
    pub(crate) write_p99_ms: f64,
    /// The longest.
    pub(crate) write_max_ms: f64,
    /// How late those writes began: 99 in 100 of them less.
    pub(crate) late_p99_ms: f64,
    /// The latest.
    pub(crate) late_max_ms: f64,
    /// How long whimbrel made writers wait altogether.
    pub(crate) stalled_ms: Option<f64>,
    /// The longest of it.
    pub(crate) longest_stall_ms: Option<f64>,
}

impl Run {
    /// With what the guest felt.
    pub(crate) fn felt(mut self, felt: Felt) -> Self {
        match felt {
            Felt::Fine(Gaps { ticks, client, guest }) => {
                self.guest_downtime_ms = Some(ticks);
                (self.client_gap_ms, self.guest_gap_ms) = (Some(client), Some(guest));
            }
            Felt::Harmed(why) => {
                self.harmed = true;
                self.finished = false;
                self.trouble = Some(why.to_string());
            }
        }
        self
    }

    /// What the guest got done, of what it would have done undisturbed.
    pub(crate) fn work_share(&self) -> Option<f64> {
        let undisturbed = self.work_per_s * self.total_ms / 1000.0;
        (undisturbed > 0.0).then(|| self.guest_work as f64 / undisturbed)
    }
}
