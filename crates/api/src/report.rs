//! What a migration says of itself: while it runs, and when it is over. People and programs read the same
//! structs.

use crate::{Fate, Mode, Robust};
use policy::Learnt;
use serde::{Deserialize, Serialize};

pub use policy::{DowntimePart, Estimate, LONGEST_STALL, Limit, PausePart, Phase, Plan, Side, Span, Way};

/// What went by way of the file on the datastore.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Spooled {
    /// The directory.
    pub directory: String,
    /// What had to be in it.
    pub robust: Robust,
    /// Bytes that were written to it and are durable.
    pub bytes: u64,
    /// Pages that the target read from it while the guest ran on the source.
    pub pages: u64,
    /// Passes over what was missing, before the guest was stopped.
    pub passes: u32,
    /// From when memory began to move until all that was missing was in it or on the target; none where that
    /// was not needed.
    pub safe_ms: Option<f64>,
    /// Memory that was missing and not in the file when the VM changed hands.
    pub trailed_bytes: u64,
    /// Why it was given up.
    pub trouble: Option<String>,
}

/// What happens, as it happens. One JSON object a line in `migrate --json`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A phase begins.
    Phase {
        /// Which.
        phase: Phase,
        /// Milliseconds since the migration began.
        at_ms: u64,
    },
    /// Several times a second.
    Tick {
        /// Where it stands.
        phase: Phase,
        /// Which round, from 1 on; in post-copy the last one.
        round: u32,
        /// Bytes of guest memory that this phase still has to move.
        left_bytes: u64,
        /// Bytes of guest memory that this phase set out to move.
        of_bytes: u64,
        /// Bytes per second on the wire just now.
        rate: u64,
        /// How long the guest would pause if it were stopped now; unknown in the first instants.
        predicted_downtime_ms: Option<f64>,
        /// Time until this phase ends at this rate.
        left_ms: Option<u64>,
        /// Time until the whole migration ends, by what is known by now.
        #[serde(default)]
        ends_in_ms: Option<u64>,
        /// Bytes that are on the datastore by now, and bytes of what the target lacks that are not; none
        /// without a spool.
        #[serde(default)]
        spool: Option<(u64, u64)>,
        /// For how much of the time the guest's writers wait just now, all of them together; unless they are
        /// not slowed.
        #[serde(default)]
        slowed_percent: Option<f64>,
        /// Milliseconds since the migration began.
        at_ms: u64,
    },
    /// What is expected, before anything moves.
    Forecast(Box<Forecast>),
    /// A round is over.
    Round(Round),
    /// Something the user should know, such as that rounds have stopped paying.
    Note {
        /// In words.
        text: String,
    },
    /// The VM changed hands.
    Downtime {
        /// From just before `stop` on the source to the guest running on the target.
        ms: f64,
        /// Where it went: see [`Report::downtime`].
        parts: Vec<DowntimePart>,
    },
    /// Always the last one.
    Done(Box<Report>),
}

/// One pass over a dirty set.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Round {
    /// From 1 on.
    pub n: u32,
    /// Pages that it looked at.
    pub pages: u64,
    /// Bytes written to sockets for it.
    pub wire_bytes: u64,
    /// How long it took, with the barrier.
    pub ms: f64,
    /// Pages that the guest wrote meanwhile.
    pub dirtied: u64,
}

/// What a migration is expected to take, said before anything moves.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Forecast {
    /// Memory that the guest ever wrote, and that has to travel.
    pub memory_bytes: u64,
    /// RAM that the target reaches by itself: nothing of it travels.
    #[serde(default)]
    pub handed_over: u64,
    /// Different memory that it wrote in a second, while it was watched for this.
    pub written_per_s: u64,
    /// For how long that was.
    pub watched_ms: f64,
    /// Whether it is expected to write more than was seen, because it did when it was moved last.
    #[serde(default)]
    pub remembered: bool,
    /// Bytes on the wire for each byte of memory, in the first round.
    pub shrinks_to: f64,
    /// What the link carries, in bytes a second.
    pub link: u64,
    /// How long it took, or is expected to take, before memory begins to move.
    pub preflight_ms: f64,
    /// What is done, and what is expected of it.
    #[serde(flatten)]
    pub plan: Plan,
}

impl Forecast {
    /// From the request to the end, of the way that is taken; none where no end is in sight.
    pub fn total_ms(&self) -> Option<Span> {
        let estimate = self.plan.expected().filter(|estimate| estimate.ends)?;
        Some(estimate.total_ms + self.preflight_ms)
    }
}

/// What is kept of a migration for the next one of the same VM, wherever that begins.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PastMigration {
    /// The target host.
    pub to: String,
    /// How it ended.
    pub outcome: Outcome,
    /// The way that it went.
    pub mode: Mode,
    /// From the first page on, in milliseconds.
    pub moving_ms: f64,
    /// Different memory that the guest wrote in a second before it began, in bytes.
    pub written_per_s: u64,
    /// What the link was expected to carry, in bytes a second.
    pub link: u64,
    /// Whether its writers had to be throttled.
    pub throttled: bool,
    /// How long they waited altogether.
    pub stalled_ms: f64,
    /// The most connections in use.
    pub streams: u32,
    /// The first round.
    pub first: Round,
    /// All further rounds together.
    pub later: Round,
    /// What compressing its memory taught.
    #[serde(default)]
    pub learnt: Option<Learnt>,
}

impl PastMigration {
    /// How many are kept of a VM.
    pub const KEPT: usize = 8;

    /// What is worth knowing of a migration; none if it moved nothing.
    pub fn of(report: &Report) -> Option<Self> {
        let (first, later) = report.rounds.split_first()?;
        let forecast = report.forecast.as_deref();
        Some(Self {
            to: report.to.clone(),
            outcome: report.outcome,
            mode: report.mode,
            moving_ms: report.rounds.iter().map(|round| round.ms).sum(),
            written_per_s: forecast.map_or(0, |forecast| forecast.written_per_s),
            link: forecast.map_or(0, |forecast| forecast.link),
            throttled: report.throttle.throttled,
            stalled_ms: report.throttle.stalled_ms,
            streams: report.streams,
            first: first.clone(),
            later: later.iter().fold(Round::default(), |sum, round| Round {
                n: round.n,
                pages: sum.pages + round.pages,
                wire_bytes: sum.wire_bytes + round.wire_bytes,
                ms: sum.ms + round.ms,
                dirtied: sum.dirtied + round.dirtied,
            }),
            learnt: None,
        })
    }

    /// Whether its figures can be a migration's. It comes along with a VM, by the word of its last host.
    pub fn is_sound(&self) -> bool {
        // A hundred years, and 4 EiB: sums and squares of them are still finite, and so is what is foretold
        // by them.
        let time = |ms: f64| (0.0..=3.2e12).contains(&ms);
        let amount = |n: u64| n <= 1 << 62;
        let round = |round: &Round| {
            time(round.ms) && [round.pages, round.wire_bytes, round.dirtied].into_iter().all(amount)
        };
        time(self.moving_ms)
            && time(self.stalled_ms)
            && [self.written_per_s, self.link].into_iter().all(amount)
            && round(&self.first)
            && round(&self.later)
    }

    /// Adds the latest, and forgets the oldest.
    pub fn add(history: &mut Vec<Self>, latest: Self) {
        history.push(latest);
        history.drain(..history.len().saturating_sub(Self::KEPT));
    }
}

/// How pages travelled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PageCounts {
    /// Pages of the VM.
    pub total: u64,
    /// Never written by the guest, so never looked at.
    pub hole: u64,
    /// Full of zeros.
    pub zero: u64,
    /// Dirty, but the same as what was sent before.
    pub unchanged: u64,
    /// Content that the target kept from when the VM was there before.
    #[serde(default)]
    pub kept: u64,
    /// Content that the target had already.
    pub duplicate: u64,
    /// Sent as a difference.
    pub delta: u64,
    /// Sent compressed.
    pub compressed: u64,
    /// Sent as they are.
    pub raw: u64,
}

/// Faults of a guest that ran before its memory was there, as seen on the target.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct FaultCounts {
    /// How many waited for the source.
    pub count: u64,
    /// Microseconds from fault to page, the median.
    pub p50_us: u64,
    /// The same, the 99th percentile.
    pub p99_us: u64,
    /// The same, the worst.
    pub max_us: u64,
}

/// What slowing the guest's writes cost it.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Throttle {
    /// Whether writers were slowed at all.
    #[serde(default)]
    pub throttled: bool,
    /// The strongest slowing: of a second, how much writers waited altogether; one that waits all the time
    /// makes 100.
    pub max_percent: f64,
    /// The longest time that one writer waited.
    #[serde(default)]
    pub longest_ms: f64,
    /// How long writers waited altogether.
    pub stalled_ms: f64,
}

/// How it ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The VM runs on the target, all of it.
    Completed,
    /// It did not work; `error` says who runs the VM.
    Failed,
    /// The user ended it; the VM runs on the source.
    Cancelled,
    /// Nobody can say yet who owns the VM; `error` says what to do.
    InDoubt,
}

/// An error in four answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// What failed.
    pub what: String,
    /// In which phase, at which side.
    #[serde(rename = "where")]
    pub place: String,
    /// The cause; several lines when there are several.
    pub why: String,
    /// The host that runs the VM now, as far as this side knows.
    pub vm_runs_on: Option<String>,
}

/// The last word on a migration.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The VM's name.
    pub vm: String,
    /// The source host.
    pub from: String,
    /// The target host.
    pub to: String,
    /// How it ended.
    pub outcome: Outcome,
    /// What became of the VM, where that is known: see [`Report::fate`].
    #[serde(default)]
    pub fate: Option<Fate>,
    /// The mode that it ended in: never `auto`, unless it ended before that was decided.
    pub mode: Mode,
    /// From the request to the end, preflight included.
    pub total_ms: f64,
    /// The part of `total_ms` before memory began to move.
    pub preflight_ms: f64,
    /// From just before `stop` on the source to the guest running on the target; `None` if it never paused
    /// for good.
    pub downtime_ms: Option<f64>,
    /// Where the downtime went, on either host, in the order in which the parts began. Their `ms` add up to
    /// `downtime_ms`: what was done beside something that took longer counts for nothing, and what nothing is
    /// known of is `wait` or `link`.
    #[serde(default)]
    pub downtime: Vec<DowntimePart>,
    /// How long QEMU waited for the guest's disks when it stopped the guest: the `drain` of `downtime`.
    #[serde(default)]
    pub drain_ms: Option<f64>,
    /// How long the guest ran on at the source, all but moved, for a moment at which its disks had less to
    /// do.
    #[serde(default)]
    pub waited_for_disks_ms: f64,
    /// The part of the downtime that went into having the source's QEMU stand still, so that nobody can have
    /// the guest run on there.
    #[serde(default)]
    pub frozen_in_ms: Option<f64>,
    /// How long it stood still in pauses after which it ran on at the source: a lost link's, a failure's.
    #[serde(default)]
    pub aborted_pauses_ms: f64,
    /// The part of the downtime in which it was looked whether the VM is still what it was; the rest of it
    /// was sent meanwhile.
    #[serde(default)]
    pub check_ms: f64,
    /// How long the VM was read before anything moved.
    #[serde(default)]
    pub reading_ms: f64,
    /// What is different on the target, by what was said before anything moved.
    #[serde(default)]
    pub left_behind: Vec<String>,
    /// The passes over dirty memory, the final one (with the guest stopped) included.
    pub rounds: Vec<Round>,
    /// How pages travelled.
    pub pages: PageCounts,
    /// The size of the guest's RAM.
    pub guest_bytes: u64,
    /// The part of it that did not travel, in bytes: the target reaches the same memory.
    #[serde(default)]
    pub handed_over: u64,
    /// Bytes written to sockets, both ways.
    pub wire_bytes: u64,
    /// The most data connections that were in use at a time.
    pub streams: u32,
    /// Whether all went over TLS between two hosts that had shown who they are.
    #[serde(default)]
    pub protected: bool,
    /// What was expected before anything moved.
    #[serde(default)]
    pub forecast: Option<Box<Forecast>>,
    /// By how much `total_ms` is more than what was expected, in percent; less is negative.
    #[serde(default)]
    pub forecast_off_percent: Option<f64>,
    /// Faults after a post-copy switchover.
    pub faults: FaultCounts,
    /// What slowing the guest's writes cost it.
    pub throttle: Throttle,
    /// What went by way of a file on a datastore; none where there was to be none.
    #[serde(default)]
    pub spool: Option<Box<Spooled>>,
    /// Whether both sides' memory was compared and found the same; `None` when that was not asked for.
    pub verified: Option<bool>,
    /// Why it did not complete.
    pub error: Option<Failure>,
}

impl Report {
    /// A report on a migration of which nothing is known but this.
    pub fn blank(vm: &str, from: &str, to: &str, mode: Mode, outcome: Outcome) -> Self {
        Self {
            vm: vm.to_owned(),
            from: from.to_owned(),
            to: to.to_owned(),
            outcome,
            fate: None,
            mode,
            total_ms: 0.0,
            preflight_ms: 0.0,
            downtime_ms: None,
            downtime: Vec::new(),
            drain_ms: None,
            waited_for_disks_ms: 0.0,
            frozen_in_ms: None,
            aborted_pauses_ms: 0.0,
            check_ms: 0.0,
            reading_ms: 0.0,
            left_behind: Vec::new(),
            rounds: Vec::new(),
            pages: PageCounts::default(),
            guest_bytes: 0,
            handed_over: 0,
            wire_bytes: 0,
            streams: 0,
            protected: false,
            forecast: None,
            forecast_off_percent: None,
            faults: FaultCounts::default(),
            throttle: Throttle::default(),
            spool: None,
            verified: None,
            error: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_disks_do_to_a_pause_is_told_and_may_be_missing() {
        let mut report = Report::blank("web1", "a", "b", Mode::Auto, Outcome::Completed);
        (report.drain_ms, report.waited_for_disks_ms) = (Some(412.5), 900.0);
        let mut wire = serde_json::to_value(&report).unwrap();
        assert_eq!((&wire["drain_ms"], &wire["waited_for_disks_ms"]), (&412.5.into(), &900.0.into()));
        assert_eq!(serde_json::from_value::<Report>(wire.clone()).unwrap(), report);
        // An older one, as a host may have kept it.
        for name in ["drain_ms", "waited_for_disks_ms"] {
            wire.as_object_mut().unwrap().remove(name);
        }
        let old: Report = serde_json::from_value(wire).unwrap();
        assert_eq!((old.drain_ms, old.waited_for_disks_ms), (None, 0.0));

        let plan = serde_json::json!({
            "estimates": [], "takes": "pre-copy", "because": "", "share": 0.5, "stall_ms": 5.0,
            "downtime_ms": 20.0, "stop_after_ms": null, "violated": []
        });
        let old: Plan = serde_json::from_value(plan).unwrap();
        assert_eq!((old.drain_ms, old.disks_busy_percent), (0.0, 0.0));
        let wire = serde_json::to_value(Plan { drain_ms: 530.0, disks_busy_percent: 84.0, ..old }).unwrap();
        assert_eq!((&wire["drain_ms"], &wire["disks_busy_percent"]), (&530.0.into(), &84.0.into()));
    }
}
