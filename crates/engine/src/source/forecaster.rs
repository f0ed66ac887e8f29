//! What is expected of a migration: before anything moves, and while it does.

use super::{SourceDriver, SourceParts, disks::DiskWatch};
use crate::{
    Broken, compression,
    conn::Dial,
    ports::GuestMemory,
    survey::{self, Sample},
    why,
};
use api::{Forecast, MigrateOptions, Mode, Outcome, PastMigration, Phase, Round, Way};
use policy::{Compressor, Drain, HARD, Limits, Measured, Plan, Standing, WorkingSet};
use std::{
    collections::BTreeSet,
    io,
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};
use units::{BlockId, MemorySet, PAGE_SIZE, Rate};

/// For so long the link is probed where nobody knows how fast it is: on a link with a bucket of 10 ms, long
/// enough to get beyond it.
const PROBE: Duration = Duration::from_millis(30);

/// The same for `whimbrel plan`, which nobody waits for with a VM.
const LONG_PROBE: Duration = Duration::from_millis(150);

/// A probe that saw next to nothing is made once more, so many times as long: on a busy host nobody may have
/// had a processor to take it in.
const LONGER: u32 = 5;

/// For so long, and so often, `whimbrel plan` watches a guest.
const WATCH: Duration = Duration::from_millis(1000);
const LOOKS: u32 = 4;

/// What a migration does before memory moves, where that was not seen: mostly QEMU's start on the target.
const PREFLIGHT: Duration = Duration::from_millis(150);

/// Bytes that each stream deals with in a second where they do not travel (`./dev bench --only duplicate`:
/// both ends on two cores).
const LOOK: f64 = 0.5e9;

/// A guest that writes less than this part of what it wrote when it was hard to move is not the same guest.
const AS_HARD: f64 = 0.5;

/// What earlier migrations said of the pace is believed within these bounds.
const BELIEVED: (f64, f64) = (0.4, 2.0);

/// A link is the same way as before if it carries as much within this factor, whichever it is; a guest does
/// as before if it writes so.
const ALIKE: f64 = 1.5;

/// Guests that write less than this part of what the link carries are alike.
const LITTLE: f64 = 0.1;

/// Beside sending, the target on the same processors, and the guest, compressing takes so many times what it
/// takes alone: by the workloads of `./dev bench`.
const BESIDE: f64 = 1.5;

/// A first round of fewer pages says little of the pace.
const TELLING_PAGES: u64 = 10_000;

/// So much of a round must have been sent before its pace is believed.
const TELLING: f64 = 0.05;

/// What the source knows of what is to come.
#[derive(Default)]
pub(super) struct Forecaster {
    begun: Option<Instant>,
    written: WorkingSet,
    watched: Duration,
    surveyed: Option<Receiver<Surveyed>>,
    measured: Option<Measured>,
    plan: Option<Plan>,
}

/// What was found beside the driver.
struct Surveyed {
    sample: io::Result<Sample>,
    link: io::Result<Rate>,
}

impl SourceDriver {
    /// Begins to look at the guest and at the link, while the target prepares.
    pub(super) fn look_ahead(&mut self) -> Result<(), Broken> {
        let Some(tracker) = &mut self.parts.tracker else { return Ok(()) };
        tracker.begin().map_err(why("begin tracking"))?;
        self.look_at_disks();
        // What the guest uses from here to the forecast is what it leaves.
        (self.parts.cores)();
        let forecaster = &mut self.forecaster;
        forecaster.begun = Some(Instant::now());
        forecaster.written = WorkingSet::of(self.shape.0.iter().sum());
        let (tell, told) = channel();
        let (memory, dial) = (self.parts.memory.clone(), self.parts.dial.clone());
        let offered = self.parts.offered.ids();
        // A limit is kept by probes too: there is none then.
        let known = self.options.bandwidth.or(self.parts.link_history.link);
        let survey = move || {
            // A receiver that is gone no longer wants to know.
            let _ = tell.send(look((&*memory, &offered), &*dial, known, PROBE));
        };
        thread::Builder::new().name("survey".into()).spawn(survey).map_err(why("start a thread"))?;
        forecaster.surveyed = Some(told);
        Ok(())
    }

    /// What the guest wrote since.
    pub(super) fn look_at_writes(&mut self) -> Result<(), Broken> {
        self.collect()?;
        let Some(begun) = self.forecaster.begun else { return Ok(()) };
        self.forecaster.watched = begun.elapsed();
        self.forecaster.written.see(self.forecaster.watched, self.dirty.len());
        Ok(())
    }

    /// Says what is to be expected. `self.dirty` is all that the guest ever wrote.
    pub(super) fn foresee(&mut self) -> Result<(), Broken> {
        let Some(surveyed) = self.forecaster.surveyed.take() else { return Ok(()) };
        let Ok(Surveyed { sample, link }) = surveyed.recv() else { return Ok(()) };
        let sample = sample.map_err(why("look at the guest's memory"))?;
        let link = match link {
            Ok(link) => link,
            Err(e) => {
                tracing::info!(%e, "the link could not be probed: nothing is foretold");
                return Ok(());
            }
        };
        self.look_at_disks();
        let drain = self.disks.seen.drain();
        let written = &self.forecaster.written;
        let seen = Findings { present: self.dirty.len(), written, sample, link, drain };
        let throttleable = self.parts.tracker.as_ref().is_none_or(|tracker| tracker.can_throttle());
        let measured = unthrottleable(seen.measured(&mut self.parts, &self.options), !throttleable);
        let plan = policy::plan(&measured, &limits(&self.options, self.reporter.lasted()));
        tracing::debug!(?measured, ?plan, "foreseen");
        for limit in &plan.violated {
            self.reporter.note(format!(
                "not all limits can hold; violated: {limit} (--keep says which is kept first)"
            ));
        }
        let forecast =
            seen.forecast(&measured, plan.clone(), self.forecaster.watched, self.reporter.lasted());
        let handed_over = self.handed_over.iter().map(|block| self.shape.0[usize::from(block.0)]);
        let forecast = Forecast { handed_over: handed_over.sum::<u64>() * PAGE_SIZE as u64, ..forecast };
        if forecast.remembered {
            self.reporter.note(
                "when it was moved last it wrote much more than it does now: that is expected again".into(),
            );
        }
        let after = |ms| self.reporter.lasted() + Duration::from_secs_f64(ms / 1e3);
        let end = plan.stop_after_ms.map(after);
        self.rounds.planned(plan.takes, Duration::from_secs_f64(plan.downtime_ms / 1e3), end);
        self.reporter.foreseen(forecast);
        let throttles = plan.takes == Way::PreCopy && measured.hard;
        let pace = measured.pace / PAGE_SIZE as f64 / measured.again.max(0.1);
        (self.forecaster.measured, self.forecaster.plan) = (Some(measured), Some(plan));
        self.agree(self.usual_share(), None);
        if throttles {
            // Before anything was sent: the change of trackers costs nothing yet.
            self.throttle_by_guess(pace)?;
        }
        Ok(())
    }

    /// At which part of the pace of sending the guest may open pages.
    pub(super) fn usual_share(&self) -> f64 {
        self.forecaster.plan.as_ref().map_or(policy::SHARE, |plan| plan.share)
    }

    /// The share from now on, where so many pages are sent in a second. How long a writer may wait gives way
    /// as it was planned, and no further than it has to.
    pub(super) fn agree(&mut self, share: f64, sent_per_s: Option<f64>) {
        let planned = self.forecaster.plan.as_ref().map_or(0.0, |plan| plan.stall_ms / 1e3);
        // A page for each writer and stall, whatever had been expected of the pace.
        let needed =
            sent_per_s.map_or(0.0, |pages| f64::from(self.parts.writers) / (share * pages).max(1e-3));
        let stall = self.options.max_stall.max(Duration::from_secs_f64(planned.min(needed)));
        if let Some(tracker) = &mut self.parts.tracker {
            tracker.agree(share, stall);
        }
    }

    /// How many pages may have travelled in this round, by the bytes that were sent for it.
    pub(super) fn moved_so_far(&self) -> f64 {
        let wire = self.forecaster.measured.as_ref().map_or(1.0, |measured| measured.wire);
        self.reporter.sent_in_round() as f64 / (PAGE_SIZE as f64 * wire.max(0.01))
    }

    /// How many pages were expected to travel in that time.
    pub(super) fn foreseen_in(&self, time: Duration) -> u64 {
        let pace = self.forecaster.measured.as_ref().map_or(0.0, |measured| measured.pace);
        (pace * time.as_secs_f64()) as u64 / PAGE_SIZE as u64
    }

    /// Whether the forecast says that throttling the guest is kinder than post-copy.
    pub(super) fn throttling_is_kinder(&self) -> bool {
        let expected = self.forecaster.plan.as_ref().and_then(Plan::expected);
        expected.is_some_and(|estimate| estimate.way == Way::PreCopy && estimate.throttled)
    }

    /// How much longer all of it will take, by what is known by now.
    pub(super) fn ends_in(&self, left: u64) -> Option<Duration> {
        let (plan, measured) = (self.forecaster.plan.as_ref()?, self.forecaster.measured.as_ref()?);
        if self.phase() != Phase::PreCopy {
            return None;
        }
        let (round, lasted) = (self.current.as_ref()?, self.reporter.round_lasts()?);
        let mut measured = measured.clone();
        let (all, first) = (round.set.len(), round.number == 1);
        let sent = all.saturating_sub(left) as f64;
        if sent > TELLING * all as f64 && first {
            let per_s = sent * PAGE_SIZE as f64 / lasted.as_secs_f64();
            measured.pace = per_s * measured.travels;
        }
        let standing = Standing { left, lasted, first, throttled: self.is_throttled() };
        measured.remaining(plan.takes, &standing, plan).map(Duration::from_secs_f64)
    }
}

/// A plan for a migration that is not begun: watches the guest for a second, and the link for less.
pub fn plan(mut parts: SourceParts, options: &MigrateOptions) -> Result<Forecast, String> {
    let text = |what: &str, e: io::Error| format!("cannot {what}: {e}");
    let begin = Instant::now();
    let mut tracker = parts.tracker.take().ok_or("its writes cannot be followed")?;
    let offered = parts.offered.ids();
    let blocks: Vec<BlockId> = offered.iter().copied().collect();
    tracker.leave_out(&blocks).map_err(|e| text("leave out what is handed over", e))?;
    tracker.begin().map_err(|e| text("follow its writes", e))?;
    let throttleable = tracker.can_throttle();
    (parts.cores)();
    let mut disks = DiskWatch::new();
    disks.look(&mut **parts.machine.lock());
    let begun = Instant::now();
    let pages: Vec<u64> = parts.memory.blocks().iter().map(|block| block.pages).collect();
    let (mut written, mut dirty) =
        (WorkingSet::of(pages.iter().sum()), MemorySet::empty(pages.iter().copied()));
    let (memory, dial) = (parts.memory.clone(), parts.dial.clone());
    let limit = options.bandwidth;
    let without = offered.clone();
    let surveyor = thread::spawn(move || look((&*memory, &without), &*dial, limit, LONG_PROBE));
    for look in 1..=LOOKS {
        // Twice as late each time: what is written soon and what is written late.
        let due = WATCH / 2u32.pow(LOOKS - look);
        thread::sleep(due.saturating_sub(begun.elapsed()));
        tracker.collect(&mut dirty).map_err(|e| text("follow its writes", e))?;
        written.see(begun.elapsed(), dirty.len());
        disks.look(&mut **parts.machine.lock());
    }
    let watched = begun.elapsed();
    drop(tracker);
    let Surveyed { sample, link } = surveyor.join().map_err(|_| "the survey ended in a panic".to_owned())?;
    let link = link.map_err(|e| format!("cannot reach {}: {e}", parts.to))?;
    let sample = sample.map_err(|e| text("look at its memory", e))?;
    let present = survey::present(&*parts.memory, &offered);
    let present = present.map_err(|e| text("look for its pages", e))?.len();
    let seen = Findings { present, written: &written, sample, link, drain: disks.seen.drain() };
    let measured = unthrottleable(seen.measured(&mut parts, options), !throttleable);
    tracing::debug!(?measured, took = ?begin.elapsed(), "a plan");
    let plan = policy::plan(&measured, &limits(options, PREFLIGHT));
    let handed_over = offered.iter().map(|block| pages[usize::from(block.0)] * PAGE_SIZE as u64).sum();
    Ok(Forecast { handed_over, ..seen.forecast(&measured, plan, watched, PREFLIGHT) })
}

/// At the link, and at the memory without the blocks that are handed over.
fn look(
    (memory, without): (&dyn GuestMemory, &BTreeSet<BlockId>),
    dial: &dyn Dial,
    known: Option<Rate>,
    time: Duration,
) -> Surveyed {
    let probe = || {
        survey::probe(dial, time).or_else(|e| match e.kind() {
            io::ErrorKind::TimedOut => survey::probe(dial, time * LONGER),
            _ => Err(e),
        })
    };
    let link = known.map_or_else(probe, Ok);
    let present = survey::present(memory, without);
    Surveyed { sample: present.and_then(|present| survey::sample(memory, &present)), link }
}

fn limits(options: &MigrateOptions, passed: Duration) -> Limits {
    Limits {
        downtime: options.max_downtime,
        time: options.max_time,
        passed,
        stall: options.max_stall,
        keep: options.kept(),
        way: options.mode.demanded(),
        post_copy: options.post_copy(),
    }
}

/// Of a guest that cannot be throttled, whatever it writes.
fn unthrottleable(measured: Measured, unthrottleable: bool) -> Measured {
    Measured { hard: measured.hard && !unthrottleable, unthrottleable, ..measured }
}

/// What was found out about this migration.
struct Findings<'a> {
    present: u64,
    written: &'a WorkingSet,
    sample: Sample,
    link: Rate,
    drain: Drain,
}

impl Findings<'_> {
    fn forecast(&self, measured: &Measured, plan: Plan, watched: Duration, preflight: Duration) -> Forecast {
        let bytes = |pages: f64| (pages * PAGE_SIZE as f64) as u64;
        Forecast {
            memory_bytes: bytes(measured.present as f64),
            handed_over: 0,
            written_per_s: bytes(self.written.per_s()),
            watched_ms: watched.as_secs_f64() * 1e3,
            remembered: measured.written != *self.written,
            shrinks_to: measured.travels * measured.wire,
            link: self.link.0,
            preflight_ms: preflight.as_secs_f64() * 1e3,
            plan,
        }
    }

    /// Together with what earlier migrations of this VM taught.
    fn measured(&self, parts: &mut SourceParts, options: &MigrateOptions) -> Measured {
        let Sample { shrinks_to, cost, .. } = self.sample;
        let link = options.bandwidth.map_or(self.link, |limit| limit.min(self.link));
        let streams = *parts.streams.start();
        let compressor =
            Compressor::new(streams, (parts.cores)(), |codec| compression::allowed(options.compress, codec));
        let (pace, wire) = compressor.foresee(link.0 as f64, shrinks_to, cost * BESIDE);
        let fixed = parts.link_history.switchover.as_secs_f64();
        self.taught(&parts.history, (pace, wire), (streams, parts.writers), fixed)
    }

    /// The same, once it is known what to expect of pace and wire. Part of the history is the word of other
    /// hosts.
    fn taught(
        &self,
        history: &[PastMigration],
        (pace, wire): (f64, f64),
        (streams, writers): (u32, u32),
        fixed: f64,
    ) -> Measured {
        let travels = self.sample.travels;
        let per_s = self.written.per_s() * PAGE_SIZE as f64;
        let past =
            history.iter().rfind(|past| past.outcome == Outcome::Completed && past.mode == Mode::PreCopy);
        let as_before =
            past.is_some_and(|past| past.throttled && per_s >= AS_HARD * past.written_per_s as f64);
        let mut written = self.written.clone();
        for (lasted, dirtied) in rounds_of_one_that_began_like_this(history, per_s, self.link) {
            written.see(lasted, dirtied);
        }
        let look = LOOK * f64::from(streams);
        let again = past.map_or(1.0, |past| again(past, wire));
        Measured {
            present: self.present,
            hard: as_before || written.new_per_s() * PAGE_SIZE as f64 * again >= HARD * pace,
            written,
            travels,
            again,
            pace: past.map_or(pace, |past| believed(past, self.link, travels, look, pace)),
            wire,
            look,
            fixed,
            writers,
            unthrottleable: false,
            drain: self.drain,
        }
    }
}

/// How much the guest wrote within the rounds of its last migration, the shorter ones first, if it was as
/// quiet before that as it is now: what is seen in an instant says little of a guest that writes now and
/// then. One that was watched writing and is quiet now does something else by now.
fn rounds_of_one_that_began_like_this(
    history: &[PastMigration],
    per_s: f64,
    link: Rate,
) -> Vec<(Duration, u64)> {
    let Some(past) = history.iter().rfind(|past| past.outcome == Outcome::Completed) else { return vec![] };
    let (then, little) = (past.written_per_s as f64, link.0 as f64 * LITTLE);
    let alike = per_s <= then * ALIKE + little && then <= per_s * ALIKE + little;
    if !alike || past.throttled {
        // A change of trackers counts everything as written.
        return vec![];
    }
    let later = past.later.n.saturating_sub(1).max(1);
    let usual = (past.later.ms / f64::from(later), past.later.dirtied / u64::from(later));
    let mut rounds: Vec<_> = [usual, (past.first.ms, past.first.dirtied)]
        .into_iter()
        .filter_map(|(ms, dirtied)| Some((Duration::try_from_secs_f64(ms / 1e3).ok()?, dirtied)))
        .collect();
    rounds.sort_unstable();
    rounds
}

/// Which part of what is written again travels: what was sent for it, of what it would have been.
fn again(past: &PastMigration, wire: f64) -> f64 {
    let full = past.later.pages as f64 * PAGE_SIZE as f64 * wire;
    // Of a guest that was throttled, all memory was looked at once more.
    if past.throttled || past.later.pages < 1000 {
        1.0
    } else {
        (past.later.wire_bytes as f64 / full).clamp(0.05, 1.0)
    }
}

/// How fast content of which this part travels moves, by the first round of the last migration on the same
/// way.
fn believed(past: &PastMigration, link: Rate, travels: f64, look: f64, expected: f64) -> f64 {
    let Round { pages, ms, .. } = past.first;
    let alike = (link.0 as f64) < ALIKE * past.link as f64 && (past.link as f64) < ALIKE * link.0 as f64;
    if !alike || pages < TELLING_PAGES || ms <= 0.0 {
        return expected;
    }
    // What does not travel takes its time too.
    let bytes = pages as f64 * PAGE_SIZE as f64;
    let seconds = (ms / 1e3 - bytes * (1.0 - travels) / look).max(ms / 1e4);
    let seen = bytes * travels / seconds;
    seen.clamp(expected * BELIEVED.0, expected * BELIEVED.1)
}

/// See [`crate::fuzz::foresee`].
pub(crate) fn foresee(
    history: &[PastMigration],
    link: Rate,
    present: u64,
    written: &WorkingSet,
    limit: Duration,
) -> Forecast {
    let sample = Sample { travels: 0.9, shrinks_to: 0.5, cost: 1.0 };
    let seen = Findings { present, written, sample, link, drain: Drain::default() };
    let measured = seen.taught(history, (link.0 as f64, 1.0), (2, 2), 0.01);
    let limits = Limits {
        downtime: Duration::from_millis(300),
        time: (!limit.is_zero()).then_some(limit),
        passed: PREFLIGHT,
        stall: Duration::from_millis(5),
        keep: policy::Limit::USUAL,
        way: None,
        post_copy: true,
    };
    let plan = policy::plan(&measured, &limits);
    for way in [Way::PreCopy, Way::Hybrid, Way::PostCopy] {
        let standing = Standing { left: present, lasted: PREFLIGHT, first: true, throttled: measured.hard };
        let _ = measured.remaining(way, &standing, &plan).map(Duration::from_secs_f64);
    }
    seen.forecast(&measured, plan, Duration::from_secs(1), PREFLIGHT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn past(written_per_s: u64, throttled: bool, first: Round, later: Round) -> PastMigration {
        let (to, outcome, mode) = ("b".to_owned(), Outcome::Completed, Mode::Hybrid);
        let (moving_ms, link, stalled_ms, streams) = (0.0, 0, 0.0, 2);
        PastMigration {
            to,
            outcome,
            mode,
            moving_ms,
            written_per_s,
            link,
            throttled,
            stalled_ms,
            streams,
            first,
            later,
            learnt: None,
        }
    }

    fn round(n: u32, ms: f64, dirtied: u64) -> Round {
        Round { n, ms, dirtied, ..Round::default() }
    }

    #[test]
    fn only_a_guest_that_begins_alike_is_expected_to_go_on_alike() {
        let link = Rate(100 << 20);
        let quiet = [past(1 << 20, false, round(1, 4000.0, 20_000), round(4, 6000.0, 51_000))];
        let seconds = Duration::from_secs;
        let told = rounds_of_one_that_began_like_this(&quiet, 2e6, link);
        assert_eq!(told, [(seconds(2), 17_000), (seconds(4), 20_000)]);
        assert!(
            rounds_of_one_that_began_like_this(&quiet, 50e6, link).is_empty(),
            "it writes by itself by now"
        );
        let busy = [past(80 << 20, false, round(1, 4000.0, 20_000), round(4, 6000.0, 51_000))];
        assert!(
            rounds_of_one_that_began_like_this(&busy, 1e6, link).is_empty(),
            "it does something else by now"
        );
        let throttled = [past(1 << 20, true, round(1, 4000.0, 20_000), Round::default())];
        assert!(rounds_of_one_that_began_like_this(&throttled, 1e6, link).is_empty());
    }

    #[test]
    fn what_no_migration_can_have_been_like_does_no_harm() {
        for ms in [f64::NAN, f64::INFINITY, -1.0, 1e300, 0.0] {
            let odd = [past(0, false, round(9, ms, u64::MAX), round(0, ms, u64::MAX))];
            let mut written = WorkingSet::of(1000);
            for (lasted, dirtied) in rounds_of_one_that_began_like_this(&odd, 0.0, Rate(1 << 20)) {
                written.see(lasted, dirtied);
            }
            assert!(written.per_s().is_finite() && written.new_per_s().is_finite(), "{ms}: {written:?}");
        }
    }
}
