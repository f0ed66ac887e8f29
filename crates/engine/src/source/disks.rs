//! The guest's disks: how slow they are, and a moment at which they have little to do.
//!
//! A stop waits for what they have to do. So the guest that is to be stopped runs on for a while where they
//! are slow and busy, with the target all but ready; not for long, and its writes are followed on.

use super::SourceDriver;
use crate::{Broken, ports::Machine, spaced::Spaced};
use policy::{Disks, Moment, Stopping};
use proto::{NextStep, SourceEvent, SpoolEvent};
use std::{
    thread,
    time::{Duration, Instant},
};

/// How often they are looked at while memory moves: a thousandth of QEMU's time, or with many queues a
/// hundredth.
const EVERY: Duration = Duration::from_secs(1);

/// How often it is looked at what the guest wrote while a moment is waited for, and sent if it has become
/// much.
const SCAN: Duration = Duration::from_millis(500);

/// A shorter wait is not worth a word.
const TELLING: Duration = Duration::from_millis(100);

/// What was seen of them.
pub(super) struct DiskWatch {
    began: Instant,
    asked: Option<Instant>,
    pub(super) seen: Disks,
    /// How long the last look took.
    took: Duration,
    waiting: Option<Waiting>,
    /// How long a moment was waited for before.
    waited: Duration,
    told: bool,
}

/// A step that waits for a moment.
struct Waiting {
    step: NextStep,
    since: Instant,
    look_at: Instant,
    scanned: Spaced,
}

impl DiskWatch {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            asked: None,
            seen: Disks::default(),
            took: Duration::ZERO,
            waiting: None,
            waited: Duration::ZERO,
            told: false,
        }
    }

    /// Looks once more. A QEMU that does not tell is one whose disks nobody knows.
    pub(super) fn look(&mut self, machine: &mut dyn Machine) {
        let asked = Instant::now();
        match machine.disks() {
            Ok(disks) => self.seen.see(self.began.elapsed(), disks),
            Err(error) => {
                tracing::info!(%error, "not known");
                self.seen = Disks::default();
            }
        }
        (self.asked, self.took) = (Some(asked), asked.elapsed());
        let (under_way, drain) = (self.seen.under_way(), self.seen.drain());
        tracing::debug!(under_way, ?drain, took = ?self.took, "disks");
    }

    fn is_due(&self) -> bool {
        self.waiting.is_none() && self.asked.is_none_or(|asked| asked.elapsed() >= EVERY)
    }

    /// How long a moment has been waited for altogether.
    pub(super) fn waited(&self) -> Duration {
        self.waited + self.waiting.as_ref().map_or(Duration::ZERO, |waiting| waiting.since.elapsed())
    }

    /// Something else has come between.
    pub(super) fn wait_no_more(&mut self) {
        self.waited = self.waited();
        self.waiting = None;
    }

    /// When they are to be looked at for a moment.
    pub(super) fn due_at(&self) -> Option<Instant> {
        self.waiting.as_ref().map(|waiting| waiting.look_at)
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

    /// The next step is known. One that stops the guest may have to wait for a moment.
    pub(super) fn decided(&mut self, step: NextStep) -> Option<SourceEvent> {
        if step == NextStep::Round || !self.awaits_moment(step) {
            return self.take(step);
        }
        None
    }

    fn take(&mut self, step: NextStep) -> Option<SourceEvent> {
        self.spool(SpoolEvent::Decided(step, self.spooled_so_far()))
    }

    fn stopping(&self) -> Stopping {
        let lasted = self.reporter.lasted();
        let (pause, limit) = self.rounds.pause();
        let promised = self.options.max_time.map(|time| time.saturating_sub(lasted + pause));
        let end = [self.rounds.time_left(lasted), promised].into_iter().flatten().min();
        // Whatever the moment, the stop may wait for them in the end.
        let drain = Duration::from_secs_f64(self.disks.seen.drain().wait);
        let left = end.map(|left| left.saturating_sub(drain));
        Stopping { limit, pause, waited: self.disks.waited(), left, look: self.disks.took }
    }

    fn awaits_moment(&mut self, step: NextStep) -> bool {
        if self.stopping().any_moment(&self.disks.seen) {
            return false;
        }
        self.look_at_disks();
        let Moment::Later(after) = self.stopping().moment(&self.disks.seen) else { return false };
        let now = Instant::now();
        let waiting = Waiting { step, since: now, look_at: now + after, scanned: Spaced::new() };
        self.disks.waiting = Some(waiting);
        true
    }

    /// Looks whether the moment has come.
    pub(super) fn look_for_moment(&mut self) -> Result<Option<SourceEvent>, Broken> {
        self.look_at_disks();
        let stopping = self.stopping();
        let moment = stopping.moment(&self.disks.seen);
        if stopping.waited >= TELLING && !std::mem::replace(&mut self.disks.told, true) {
            let drain = self.disks.seen.drain();
            self.reporter.note(format!(
                "its disks are at work, and a stop would wait about {} ms for them: a quieter moment is \
                 waited for, for {:.1} s at most",
                (drain.wait * 1e3).round(),
                stopping.patience(&self.disks.seen).as_secs_f64()
            ));
        }
        let Some(waiting) = &mut self.disks.waiting else { return Ok(None) };
        let wanted = waiting.step;
        if let Moment::Later(after) = moment {
            waiting.look_at = Instant::now() + after;
            if !waiting.scanned.due_in(SCAN).is_zero() {
                return Ok(None);
            }
        }
        let began = Instant::now();
        self.collect()?;
        let step = self.rounds.still(self.reporter.lasted(), self.dirty.bytes(), wanted);
        if let (Moment::Later(_), Some(waiting)) = (moment, &mut self.disks.waiting) {
            waiting.scanned.done_since(began);
            if step == wanted {
                return Ok(None);
            }
        }
        self.disks.wait_no_more();
        if moment == Moment::Late && step == wanted {
            let (waited, drain) = (self.disks.waited(), self.disks.seen.drain());
            self.reporter.note(format!(
                "no quiet moment of its disks came in {:.1} s: the guest is stopped now, which waits about \
                 {} ms for them",
                waited.as_secs_f64(),
                (drain.wait * 1e3).round()
            ));
        }
        Ok(self.take(step))
    }

    /// The guest is stopped next. What its disks finish in an instant is let finish.
    pub(super) fn look_before_the_stop(&mut self) {
        self.reporter.waited_for_disks(self.disks.waited());
        if self.stopping().any_moment(&self.disks.seen) {
            return;
        }
        self.look_at_disks();
        if let Some(wait) = self.stopping().soon(&self.disks.seen) {
            thread::sleep(wait);
        }
    }
}
