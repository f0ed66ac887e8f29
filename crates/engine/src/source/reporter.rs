//! What the source tells of a migration: events on the way, and the report.

use super::{SourceParts, pause};
use crate::{
    conn::{Traffic, at_ns},
    pause::PauseLog,
    ports::{MachineError, RunState, SaveStep, SaveStepKind, Saved, Stalls},
};
use api::{
    Event, Failure, Fate, FaultCounts, Forecast, MigrateOptions, Mode, Outcome, PastMigration, Phase, Report,
    Round, Spooled,
};
use page::Counts;
use policy::{Learnt, PausePart};
use proto::{Moved, Rounds, SourceEnd, Warning, control};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use units::{Bytes, MemorySet, PAGE_SIZE};

/// A rate over less than this says nothing: the last known one holds.
const MEASURABLE: Duration = Duration::from_millis(20);

pub(super) struct Reporter {
    events: Arc<dyn Fn(Event) + Send + Sync>,
    traffic: Arc<Traffic>,
    report: Report,
    begun: Instant,
    /// When the target had everything.
    over: Option<Instant>,
    /// The phase that was told last.
    told: Option<Phase>,
    mode: Mode,
    present: u64,
    /// Since when, with the bytes sent and the pages moved before it.
    round: Option<(Round, Instant, u64, u64)>,
    stop_ns: Option<u64>,
    /// How long the disks were waited for.
    drained: Option<Duration>,
    /// What this side does in the pause.
    pub(super) pause: PauseLog<PausePart>,
    last_tick: (Instant, u64),
    of: u64,
    /// For how much of the time writers waited lately, in percent; none where nobody is slowed.
    slowed: Option<f64>,
    missing: bool,
    paused_because: Option<String>,
    /// Pages with content that went by way of the file.
    otherwise: u64,
    /// When memory began to move.
    moving_since: Option<Instant>,
    not_back: Option<String>,
    /// The guest's QEMU on the target ended before it had all its memory.
    crashed: bool,
    verify: bool,
}

impl Reporter {
    pub(super) fn new(
        parts: &SourceParts,
        options: &MigrateOptions,
        events: Arc<dyn Fn(Event) + Send + Sync>,
    ) -> Self {
        let total: u64 = parts.memory.blocks().iter().map(|b| b.pages).sum();
        let mut report = Report::blank(&parts.vm, &parts.from, &parts.to, options.mode, Outcome::Failed);
        report.pages.total = total;
        report.guest_bytes = total * PAGE_SIZE as u64;
        report.protected = !parts.dial.is_plaintext();
        report.reading_ms = ms(parts.reading.took);
        let now = Instant::now();
        Self {
            events,
            traffic: parts.dial.traffic().clone(),
            report,
            begun: now,
            over: None,
            told: None,
            mode: options.mode,
            present: 0,
            round: None,
            stop_ns: None,
            drained: None,
            pause: PauseLog::default(),
            last_tick: (now, 0),
            of: 0,
            slowed: None,
            missing: false,
            paused_because: None,
            otherwise: 0,
            moving_since: None,
            not_back: None,
            crashed: false,
            verify: options.verify,
        }
    }

    /// Shows the phase.
    pub(super) fn phase(&mut self, phase: Phase) {
        if self.told.replace(phase) != Some(phase) {
            (self.events)(Event::Phase { phase, at_ms: self.at_ms() });
        }
    }

    pub(super) fn note(&self, text: String) {
        tracing::warn!("{text}");
        (self.events)(Event::Note { text });
    }

    /// Something will be different on the target.
    pub(super) fn leaves_behind(&mut self, what: String) {
        self.note(what.clone());
        self.report.left_behind.push(what);
    }

    /// The device state is saved.
    pub(super) fn saved(&mut self, saved: &Saved) {
        self.report.check_ms = ms(saved.took(SaveStepKind::Check));
        self.report.frozen_in_ms = Some(ms(saved.took(SaveStepKind::Freeze)));
        for SaveStep { kind, began, took } in &saved.steps {
            let part = match kind {
                SaveStepKind::Check => PausePart::Check,
                SaveStepKind::Save => PausePart::Save,
                SaveStepKind::Freeze => PausePart::Freeze,
                SaveStepKind::Flush => PausePart::Flush,
                SaveStepKind::Read => PausePart::ReadState,
            };
            self.pause.add(part, at_ns(*began), at_ns(*began + *took));
        }
    }

    /// So many pages do not travel: the target reaches them by itself.
    pub(super) fn handed_over(&mut self, pages: u64) {
        self.report.handed_over = pages * PAGE_SIZE as u64;
    }

    /// Memory begins to move; `present` is what has ever been written.
    pub(super) fn begun(&mut self, present: &MemorySet) {
        self.report.preflight_ms = ms(self.begun.elapsed());
        self.moving_since = Some(Instant::now());
        self.present = present.len();
        let handed_over = self.report.handed_over / PAGE_SIZE as u64;
        self.report.pages.hole = self.report.pages.total.saturating_sub(handed_over + self.present);
    }

    /// What is expected, before anything moves.
    pub(super) fn foreseen(&mut self, forecast: Forecast) {
        let forecast = Box::new(forecast);
        self.report.forecast = Some(forecast.clone());
        (self.events)(Event::Forecast(forecast));
    }

    /// How long it has taken so far.
    pub(super) fn lasted(&self) -> Duration {
        self.begun.elapsed()
    }

    /// How this VM's migrations went, this one included; for the target, as JSON.
    pub(super) fn history(&self, before: &[PastMigration], learnt: Option<Learnt>) -> Vec<u8> {
        let mut history = before.to_vec();
        let mut report = Report { outcome: Outcome::Completed, ..self.report.clone() };
        report.mode = self.ends_in_mode();
        // One that found pages at the target says nothing of what the next one costs, which may find none.
        if let Some(past) = PastMigration::of(&report).filter(|_| report.pages.kept == 0) {
            PastMigration::add(&mut history, PastMigration { learnt, ..past });
        }
        // Plain data: it can be written. If not, the next migration does without.
        serde_json::to_vec(&history).unwrap_or_default()
    }

    pub(super) fn round(&mut self, n: u32, set: &MemorySet) {
        self.of = set.bytes().0;
        let round = Round { n, pages: set.len(), ..Default::default() };
        self.round = Some((round, Instant::now(), self.traffic.sent(), self.moved_pages()));
    }

    /// The link is back: how fast the rest of this round moves tells nothing of the time without one.
    pub(super) fn link_is_back(&mut self) {
        let moved = self.moved_pages();
        let Some((round, since, sent, before)) = &mut self.round else { return };
        round.ms += ms(since.elapsed());
        round.wire_bytes += self.traffic.sent() - *sent;
        (*since, *sent, *before) = (Instant::now(), self.traffic.sent(), moved);
    }

    /// Pages whose content the target was told in whichever way.
    fn moved_pages(&self) -> u64 {
        let pages = &self.report.pages;
        // What went by way of the file says nothing of the network, over which the last round goes alone.
        (pages.duplicate + pages.delta + pages.compressed + pages.raw).saturating_sub(self.otherwise)
    }

    /// Whether pages of this round were found at the target. What else it carried says nothing of how fast
    /// memory travels.
    pub(super) fn finds_kept(&self) -> bool {
        self.report.pages.kept > 0 && self.round.as_ref().is_some_and(|(round, ..)| round.n == 1)
    }

    pub(super) fn streams(&mut self, widest: u32) {
        self.report.streams = self.report.streams.max(widest);
    }

    pub(super) fn sent(&mut self, sent: Counts) {
        let pages = &mut self.report.pages;
        pages.zero += sent.zero;
        pages.unchanged += sent.unchanged;
        pages.kept += sent.kept;
        pages.duplicate += sent.duplicate;
        pages.delta += sent.delta;
        pages.compressed += sent.compressed;
        pages.raw += sent.raw;
    }

    /// This went by way of the file; so many pages of it arrived.
    pub(super) fn spooled(&mut self, counts: Counts, arrived: u64) {
        self.otherwise += counts.raw;
        self.sent(counts);
        self.spool(|spool| spool.pages += arrived);
    }

    /// What is said of the file.
    pub(super) fn spool(&mut self, change: impl FnOnce(&mut Spooled)) {
        change(self.report.spool.get_or_insert_default());
    }

    /// All that is missing is in the file, or on the target.
    pub(super) fn safe(&mut self) {
        let since = self.moving_since;
        self.spool(|spool| {
            spool.safe_ms.get_or_insert(since.map_or(0.0, |since| ms(since.elapsed())));
        });
    }

    /// From now on the guest runs on the target only when all its memory is there.
    pub(super) fn forbid_post_copy(&mut self) {
        if matches!(self.mode, Mode::Hybrid | Mode::PostCopy) {
            self.mode = Mode::PreCopy;
        }
    }

    /// The current round, if there is one, is over. Says what it moved.
    pub(super) fn end_round(&mut self, dirtied: u64) -> Option<Moved> {
        let (mut round, since, sent, moved) = self.round.take()?;
        let (took, wire) = (since.elapsed(), Bytes(self.traffic.sent() - sent));
        round.ms += ms(took);
        round.wire_bytes += wire.0;
        round.dirtied = dirtied;
        let told = self.moved_pages() - moved;
        let moved = Moved { round: round.n, pages: round.pages, told, wire, took };
        (self.events)(Event::Round(round.clone()));
        self.report.rounds.push(round);
        Some(moved)
    }

    /// How long the current round has lasted.
    pub(super) fn round_lasts(&self) -> Option<Duration> {
        self.round.as_ref().map(|(_, since, ..)| since.elapsed())
    }

    /// Bytes that were sent in the current round.
    pub(super) fn sent_in_round(&self) -> u64 {
        self.round.as_ref().map_or(0, |(_, _, sent, _)| self.traffic.sent() - sent)
    }

    /// The next step is not what the user hopes for.
    pub(super) fn warn(&self, warning: Warning) {
        self.note(match warning {
            Warning::LongPause(pause) => format!(
                "to end within --max-time the guest is stopped now, for about {} ms: --max-downtime gives \
                 way",
                pause.as_millis()
            ),
            Warning::NoConvergence(dirty) => format!(
                "this does not converge: the guest writes as fast as the link carries ({dirty} are dirty \
                 after each round); cancel it, allow post-copy (--allow-post-copy), or allow a longer pause \
                 (--max-downtime)"
            ),
        });
    }

    /// The guest's writes are slowed from now on.
    pub(super) fn throttled(&mut self) {
        self.report.throttle.throttled = true;
        self.note(
            "the guest writes faster than the link carries: its writers are slowed, so that this ends".into(),
        );
    }

    /// What that cost its writers so far, and how long they waited lately.
    pub(super) fn stalled(&mut self, all: &Stalls, lately: Duration, passed: Duration) {
        let throttle = &mut self.report.throttle;
        throttle.stalled_ms = ms(all.total);
        throttle.longest_ms = ms(all.longest);
        if passed >= MEASURABLE {
            let percent = lately.as_secs_f64() / passed.as_secs_f64() * 100.0;
            throttle.max_percent = throttle.max_percent.max(percent.round());
            self.slowed = throttle.throttled.then_some(percent.round());
        }
    }

    /// So long the guest ran on because its disks were at work.
    pub(super) fn waited_for_disks(&mut self, time: Duration) {
        self.report.waited_for_disks_ms = ms(time);
    }

    pub(super) fn stopping(&mut self, at_ns: u64) {
        self.stop_ns = Some(at_ns);
        self.pause.clear();
    }

    /// QEMU says now that the guest is stopped, and drained its disks for so long before that.
    pub(super) fn stopped(&mut self, now: u64, drained: Duration) {
        let Some(began) = self.stop_ns else { return };
        let still = now.saturating_sub(drained.as_nanos() as u64).max(began);
        self.pause.add(PausePart::Stop, began, still);
        self.pause.add(PausePart::Drain, still, now);
        self.drained = Some(Duration::from_nanos(now - still));
    }

    /// The guest was stopped, and runs here again: this was no switchover. How long it stood still.
    pub(super) fn runs_again(&mut self, at_ns: u64) -> Duration {
        let stood = self.stop_ns.take().map_or(0, |stopped| at_ns.saturating_sub(stopped));
        let stood = Duration::from_nanos(stood);
        self.pause.clear();
        self.report.aborted_pauses_ms += ms(stood);
        stood
    }

    /// The link was lost in a pause that lasted so long, and the migration goes on.
    pub(super) fn ran_on(&mut self, stood: Duration) {
        if let Some(spool) = &mut self.report.spool {
            spool.safe_ms = None;
        }
        self.note(format!(
            "the link was lost while the guest stood still; it ran on here after {} ms",
            stood.as_millis()
        ));
    }

    /// The target owns the VM; `to_here`: an instant of its clock on this side's.
    pub(super) fn committed(
        &mut self,
        committed: &control::Committed,
        to_here: impl Fn(u64) -> Option<i128>,
    ) {
        self.over = Some(Instant::now());
        if committed.paused_because.is_empty() {
            if let (Some(resumed), Some(stopped)) = (to_here(committed.resumed_ns), self.stop_ns) {
                let stopped = i128::from(stopped);
                let downtime = stopped..resumed.max(stopped);
                let total = (downtime.end - downtime.start) as f64 / 1e6;
                let parts = pause::parts(&self.pause, &committed.steps, to_here, downtime);
                self.report.drain_ms = self.drained.map(ms);
                self.report.downtime_ms = Some(total);
                self.report.downtime.clone_from(&parts);
                (self.events)(Event::Downtime { ms: total, parts });
            }
        } else {
            self.paused_because = Some(committed.paused_because.clone());
        }
        if self.verify {
            self.report.verified = Some(committed.verified);
        }
    }

    pub(super) fn post_copy(&mut self, missing: &MemorySet) {
        self.missing = true;
        self.of = self.of.max(missing.bytes().0);
    }

    pub(super) fn settled(&mut self, settled: &control::Settled) {
        self.over = Some(Instant::now());
        let &control::Settled { faults, p50_us, p99_us, max_us, differing, qemu_ended } = settled;
        self.crashed |= qemu_ended;
        self.report.faults = FaultCounts { count: faults, p50_us, p99_us, max_us };
        if self.verify && differing > 0 {
            self.report.verified = Some(false);
        }
    }

    pub(super) fn not_back(&mut self, why: &MachineError) {
        tracing::error!(%why, "the guest could not be resumed on the source");
        self.not_back = Some(why.to_string());
    }

    pub(super) fn tick(
        &mut self,
        left_pages: u64,
        dirty: &MemorySet,
        rounds: &Rounds,
        ends_in: Option<Duration>,
        spool: Option<(u64, u64)>,
    ) {
        let (since, sent) = self.last_tick;
        let now_sent = self.traffic.sent();
        let rate = Bytes(now_sent - sent).per(since.elapsed());
        self.last_tick = (Instant::now(), now_sent);
        let left = Bytes(left_pages * PAGE_SIZE as u64);
        let predicted =
            if self.stop_ns.is_none() { rounds.predicted(dirty.bytes() + left, rate) } else { None };
        (self.events)(Event::Tick {
            phase: self.told.unwrap_or(Phase::Preflight),
            round: self.round.as_ref().map_or(self.report.rounds.len() as u32, |(r, ..)| r.n),
            left_bytes: left.0,
            of_bytes: self.of,
            rate: rate.0,
            predicted_downtime_ms: predicted.map(ms),
            left_ms: left.time_at(rate).map(|t| t.as_millis() as u64),
            slowed_percent: self.slowed,
            ends_in_ms: ends_in.map(|time| time.as_millis() as u64),
            spool,
            at_ms: self.at_ms(),
        });
    }

    /// Nobody can say yet who owns the VM; the agent goes on asking.
    /// `record`: the shared record that does not answer, by its identity; empty: the target keeps it.
    pub(super) fn in_doubt(&mut self, record: &str) -> Report {
        let to = self.report.to.clone();
        let silent = match record {
            "" => format!("{to} may own the VM and cannot be reached; it is asked again until it answers"),
            record => format!(
                "{to} may own the VM, and the ownership record ({record}) cannot be reached; it is asked \
                 again until it answers"
            ),
        };
        self.report.outcome = Outcome::InDoubt;
        self.report.fate = Some(Fate::Unknown);
        self.report.error = Some(Failure {
            what: "the switchover".into(),
            place: format!("{}, after the authorization", self.report.from),
            why: format!(
                "{silent}. If {to} is down for \
                 good, make sure that it stays off, then: whimbrel resolve {} --here --i-have-fenced {to}",
                self.report.vm
            ),
            vm_runs_on: None,
        });
        self.close()
    }

    /// `here`: what became of the VM if it is the source's; `before`: what it did before it was stopped.
    pub(super) fn finish(&mut self, end: SourceEnd, here: Fate, before: RunState) -> Report {
        self.end_round(0);
        let place = format!("{}, {}", self.report.from, words(self.told.unwrap_or(Phase::Preflight)));
        let runs_here = matches!(here, Fate::On { .. }).then(|| self.report.from.clone());
        let to = self.report.to.clone();
        self.report.fate = Some(match end {
            SourceEnd::Completed if self.crashed => Fate::Ended { host: to },
            SourceEnd::Completed if self.paused_because.is_some() => Fate::Stuck { host: to },
            SourceEnd::Completed => Fate::On { host: to, state: before },
            SourceEnd::Cancelled | SourceEnd::Failed { .. } => here,
        });
        match end {
            SourceEnd::Completed if self.crashed => {
                let to = self.report.to.clone();
                self.report.error = Some(Failure {
                    what: "the guest on the target".into(),
                    why: format!(
                        "its QEMU ended while memory was still on its way; the log of QEMU on {to} may say \
                         why"
                    ),
                    place: to,
                    vm_runs_on: None,
                });
            }
            SourceEnd::Completed => match self.paused_because.take() {
                None => self.report.outcome = Outcome::Completed,
                Some(why) => {
                    self.report.error = Some(Failure {
                        what: "start the guest on the target".into(),
                        place: self.report.to.clone(),
                        why: format!("{why}; {} owns the VM, and it stands still there", self.report.to),
                        vm_runs_on: None,
                    });
                }
            },
            SourceEnd::Cancelled => self.report.outcome = Outcome::Cancelled,
            SourceEnd::Failed { what, why } => {
                self.report.error = Some(Failure { what, place, why, vm_runs_on: runs_here });
            }
        }
        if let Some(why) = self.not_back.take() {
            let error = self.report.error.get_or_insert_with(|| Failure {
                what: "the rollback".into(),
                place: self.report.from.clone(),
                why: String::new(),
                vm_runs_on: None,
            });
            error.why = format!("{}; and the guest could not be resumed here: {why}", error.why);
            error.vm_runs_on = None;
        }
        self.close()
    }

    fn close(&mut self) -> Report {
        self.phase(Phase::Done);
        if self.report.outcome == Outcome::Completed {
            self.report.mode = self.ends_in_mode();
        }
        // The empty QEMU that is left on the source may take a while to end: nobody waits for it.
        self.report.total_ms = ms(self.over.unwrap_or_else(Instant::now) - self.begun);
        self.report.wire_bytes = self.traffic.both();
        if self.report.outcome == Outcome::Completed {
            let expected = self.report.forecast.as_ref().and_then(|forecast| forecast.total_ms());
            let off = |likely: f64| ((self.report.total_ms / likely.max(1.0) - 1.0) * 1e3).round() / 10.0;
            self.report.forecast_off_percent = expected.map(|total| off(total.likely));
        }
        (self.events)(Event::Done(Box::new(self.report.clone())));
        self.report.clone()
    }

    fn ends_in_mode(&self) -> Mode {
        match (self.mode, self.missing) {
            (Mode::PostCopy, _) => Mode::PostCopy,
            (_, true) => Mode::Hybrid,
            (_, false) => Mode::PreCopy,
        }
    }

    fn at_ms(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn words(phase: Phase) -> &'static str {
    match phase {
        Phase::Preflight => "in preflight",
        Phase::PreCopy => "in pre-copy",
        Phase::Switchover => "in the switchover",
        Phase::PostCopy => "in post-copy",
        Phase::Done => "at the end",
    }
}
