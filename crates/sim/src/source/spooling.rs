//! The file on the datastore: what the core's [`SourceSpool`] wants done with it. Mirrors the executor in
//! `engine/source/spooling.rs`.

mod spooler; // the thread that writes it

use super::{Heard, bitmap, pages};
use crate::{
    driver::Driver,
    link::{Side, Word},
    pages::Pages,
    planted::PlantedBug,
    printed::Printed,
    setup::{Setup, Spooling as Wanted, Way},
    spool::Own,
    world::{Timer, World, say},
};
use policy::Budget;
use proto::{
    AnyPages, Moved, NextStep, Rounds, SourceEvent, SourceSpool, SpoolEffect, SpoolEvent, SpoolMark,
    SpoolSaid, SpoolTerms, ToSecure,
    control::{self, Kind},
};
use spooler::{Spooler, Task};
use std::{collections::VecDeque, time::Duration};
use units::Bytes;

/// Rounds of fewer pages go over the network alone.
const LEAST_ROUND: u64 = 2;

/// The file, as the driver sees it.
#[derive(Clone, Hash, Debug)]
pub struct Spooling {
    /// What decides.
    pub core: SourceSpool<Pages>,
    /// The thread that writes it; none: there is no file, or it is of no use any more.
    pub spooler: Option<Spooler>,
    /// Pages of the round that were taken for it, and are not known to be in the target's memory.
    pub unsure: Pages,
    /// Nothing of the round is taken for it any more.
    pub left: bool,
    /// What the target's file said when it was looked at last.
    pub look: Option<bool>,
    /// No post-copy any more.
    pub forbids_post_copy: bool,
    /// The janitor knows that it is in use.
    pub at_work: bool,
}

impl AnyPages for Pages {
    fn count(&self) -> u64 {
        self.0.count_ones().into()
    }

    fn unite(&mut self, others: &Self) {
        *self = self.or(*others);
    }
}

impl Default for Spooling {
    fn default() -> Self {
        Self::with(SpoolTerms::default())
    }
}

impl Spooling {
    fn with(terms: SpoolTerms) -> Self {
        Self {
            core: SourceSpool::new(terms),
            spooler: None,
            unsure: Pages::default(),
            left: false,
            look: None,
            forbids_post_copy: false,
            at_work: false,
        }
    }

    /// What a migration begins with.
    pub fn begin(setup: &Setup) -> Self {
        if setup.spooling == Wanted::Off {
            return Self::default();
        }
        let strict = setup.spooling == Wanted::Strict;
        let terms = SpoolTerms { strict, post_copy_without: true, least_round: LEAST_ROUND };
        let mut begun = Self { spooler: Some(Spooler::default()), at_work: true, ..Self::with(terms) };
        begun.core.handle(Duration::ZERO, SpoolEvent::Made(Ok(())));
        begun
    }

    /// To the thread.
    fn give(&mut self, task: Task, timers: &mut Vec<(u32, Timer)>) {
        if let Some(spooler) = &mut self.spooler {
            spooler.jobs.push_back((self.core.turn(), task));
            Timer::Stall.set_in(timers);
        }
    }
}

impl World {
    /// Something has happened to the file: does what follows.
    pub(super) fn source_spool(&mut self, event: SpoolEvent<Pages>) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let Some(work) = self.source.work.as_deref_mut() else { return };
            for effect in work.spooling.core.handle(Duration::ZERO, event) {
                events.extend(self.spool_effect(effect));
            }
        }
    }

    fn spool_effect(&mut self, effect: SpoolEffect<Pages>) -> Vec<SpoolEvent<Pages>> {
        let forgets = self.has(PlantedBug::ReturnedForgotten);
        let no_barrier = self.has(PlantedBug::NoBarrier);
        let (most, guest) = (self.setup.rounds, self.setup.guest);
        let Some(work) = self.source.work.as_deref_mut() else { return vec![] };
        match effect {
            SpoolEffect::TakeShares => work.spooling.give(Task::Round, &mut self.timers),
            SpoolEffect::Secure(pages) => return self.secure(pages),
            SpoolEffect::EndShares(_) => {
                if let Some(spooler) = &mut work.spooling.spooler {
                    spooler.over = true;
                }
            }
            SpoolEffect::Leave(_) => work.spooling.left = true,
            SpoolEffect::Lose(why) => {
                say!(self, "source: the spool is of no use: {why}");
                self.end_spool();
            }
            SpoolEffect::ForbidPostCopy => work.spooling.forbids_post_copy = true,
            SpoolEffect::Dirty(_) if forgets => {}
            SpoolEffect::Dirty(pages) => work.dirty = work.dirty.or(pages),
            SpoolEffect::Collect => {
                let passes = work.spooling.core.passes() + 1;
                let Some(tracked) = &mut self.qemus[0].tracked else {
                    work.broke("collect");
                    return vec![];
                };
                let written = std::mem::take(tracked);
                work.dirty = work.dirty.or(written);
                say!(self, "source: pass {passes} left {written:?}");
                let outruns = guest % 5 == 3;
                if outruns {
                    self.guest.wake(self.setup.busy);
                }
                let fits = passes >= u32::from(most) && !outruns;
                let downtime = if fits { Duration::from_secs(3600) } else { Duration::ZERO };
                return vec![SpoolEvent::Written(written), SpoolEvent::Collected(downtime)];
            }
            SpoolEffect::Decide => {
                let step = self.next_step(false);
                self.source_event(SourceEvent::Decided(step));
            }
            SpoolEffect::Say(kind) => self.source_says(kind),
            SpoolEffect::Announce { floor, end, outdated } => {
                let (missing, durable) = (work.missing, work.spooling.core.durable());
                let outdated = if outdated && !missing.none() { vec![bitmap(missing)] } else { vec![] };
                let manifest = Some(control::Manifest { floor, outdated, end });
                self.source_says(Kind::Spooled(control::Spooled { manifest, ..durable.so_far() }));
            }
            SpoolEffect::Await(_) => {
                self.call_off(Timer::Stall);
                self.set(Timer::Stall);
            }
            SpoolEffect::Tell(event) => {
                let received = match event {
                    SourceEvent::Sent(round) if no_barrier => Some(control::RoundReceived { round }),
                    _ => None,
                };
                work.event(event);
                if let Some(received) = received {
                    work.event(SourceEvent::Message(Kind::RoundReceived(received)));
                }
            }
            SpoolEffect::Safe(runs_there) => {
                say!(self, "source: what is missing is safe");
                if !runs_there {
                    self.call_off(Timer::Stall);
                }
            }
            SpoolEffect::Release | SpoolEffect::Keep(_) | SpoolEffect::Hopeless => {}
        }
        vec![]
    }

    /// To the thread, until they are durable.
    fn secure(&mut self, pages: ToSecure<Pages>) -> Vec<SpoolEvent<Pages>> {
        let (hasty, appended) = (self.has(PlantedBug::FenceBeforeSafe), self.spool.appended());
        let written_forgotten = self.has(PlantedBug::InsecureForgotten);
        let saved_forgotten = self.has(PlantedBug::SavedNotSecured);
        let Some(work) = self.source.work.as_deref_mut() else { return vec![] };
        let (in_pause, forgotten) = match &pages {
            ToSecure::Dirty => (work.saved, work.saved && saved_forgotten),
            ToSecure::Missing => (false, false),
            ToSecure::These(_) => (work.stopped, work.stopped && written_forgotten),
        };
        let pages = match pages {
            ToSecure::Dirty => work.dirty,
            ToSecure::Missing => work.missing,
            ToSecure::These(pages) => pages,
        };
        if !forgotten {
            work.spooling.give(Task::Secure(pages), &mut self.timers);
        }
        let turn = work.spooling.core.turn();
        let durable = (hasty && in_pause).then_some(SpoolSaid::Durable(mark(appended), None));
        let secured = (forgotten || durable.is_some()).then_some(secured());
        durable.into_iter().chain(secured).map(|said| SpoolEvent::Said(turn, said)).collect()
    }

    /// To the target.
    pub(super) fn source_says(&mut self, kind: Kind) {
        let control = self.source.work.as_deref().and_then(|work| work.control);
        self.say_on(control, Side::Source, Word::Say(Printed(kind)));
    }

    /// Whether the file has a part in the current round.
    pub fn spool_is_busy(&self) -> bool {
        self.source.work.as_deref().is_some_and(|work| work.spooling.core.is_busy())
    }

    /// How memory travels from now on.
    fn way(&self) -> Way {
        let forbidden = self.source.work.as_deref().is_some_and(|work| work.spooling.forbids_post_copy);
        match self.setup.way {
            _ if forbidden => Way::PreCopy,
            Way::PostCopy if self.setup.spooling == Wanted::Strict => Way::Hybrid,
            way => way,
        }
    }

    /// What comes after a round.
    pub(super) fn source_decides(&mut self) {
        let appended = self.spool.appended();
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let undone = std::mem::take(&mut work.undone);
        let step = self.next_step(undone);
        self.source_spool(SpoolEvent::Decided(step, appended.into()));
    }

    /// By the product's rule, for a guest that is never quiet, and a link that is measured to be as fast as
    /// the setup wants it: after its rounds everything fits into the pause, and nothing before.
    fn next_step(&self, undone: bool) -> NextStep {
        let rounds = self.source.work.as_deref().map_or(0, |work| work.rounds);
        let (mode, fits) = match self.way() {
            // What was to be missing goes in a round, or before the guest runs there: with another wish, a
            // spool that was lost.
            Way::Hybrid if undone => (None, self.setup.guest.is_multiple_of(2)),
            Way::PreCopy => (Some(policy::Way::PreCopy), rounds >= self.setup.rounds),
            Way::Hybrid => (Some(policy::Way::Hybrid), false),
            Way::PostCopy => (Some(policy::Way::PostCopy), false),
        };
        let (downtime, second) = (Duration::from_millis(300), Duration::from_secs(1));
        let limits = Budget { downtime, post_copy: self.way() != Way::PreCopy };
        let mut product = Rounds::new(mode, limits, Duration::ZERO);
        let (dirty, wire) = (Bytes(1 << 20), Bytes(if fits { 1 << 40 } else { 1 }));
        product.moved(Moved { round: 1, pages: 1, told: 1, wire, took: second });
        product.decide(Duration::ZERO, dirty).step
    }

    /// The target's words about the file are not the machine's business. Says whether it was one.
    pub(super) fn spool_word(&mut self, kind: &Kind) -> bool {
        let Some(work) = self.source.work.as_deref_mut() else { return false };
        if let Kind::NowMissing(missing) = kind {
            let missing = missing.blocks.first().map_or(Pages::default(), pages);
            work.to_push = Pages(work.to_push.0 & missing.0);
            return true;
        }
        let Some(said) = SpoolEvent::of(kind, "the target") else { return false };
        if matches!(&said, SpoolEvent::Read(extents) if *extents > work.spooling.core.taken()) {
            self.spool_moved_on();
        }
        self.source_spool(said);
        !matches!(kind, Kind::Ready(_))
    }

    /// Something has moved: whoever waits has waited for nothing yet.
    pub(super) fn spool_moved_on(&mut self) {
        if self.is_set(Timer::Stall) {
            self.call_off(Timer::Stall);
            self.set(Timer::Stall);
        }
    }

    /// Somebody has waited for too long (`Worker::trouble`, `Await`).
    pub fn spool_stalls(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if let Some(spooler) = &mut work.spooling.spooler {
            spooler.late = spooler.now.is_some() || !spooler.jobs.is_empty();
            if work.spooling.core.secures() {
                work.heard.push_back(Heard::SpoolLate);
            }
        }
    }

    /// A round begins.
    pub(super) fn spool_round(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        (work.spooling.unsure, work.spooling.left) = (Pages::default(), false);
        let (number, streams, stopped) = (work.round, work.streams.len() as u32, work.stopped);
        let pages = work.set.count();
        self.source_spool(SpoolEvent::Round { number, pages, streams, stopped });
    }

    /// The thread has something to say (`hear_spool`).
    pub(super) fn hear_spool(&mut self, turn: u32, said: SpoolSaid<Pages>) {
        let hasty = self.has(PlantedBug::StopNotAwaited);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let over = turn == work.spooling.core.turn() && matches!(said, SpoolSaid::RoundOver(..));
        let failed = matches!(said, SpoolSaid::RoundOver(_, Some(_)));
        if over {
            work.spooling.unsure = Pages::default();
        }
        self.source_spool(SpoolEvent::Said(turn, said));
        if over && failed && hasty {
            self.source_spool(SpoolEvent::Stopped);
        }
    }

    /// The target runs the guest.
    pub(super) fn spool_missing(&mut self) {
        if self.has(PlantedBug::SpoolEndsWithCommit) {
            self.spool.doomed[0] = true;
        }
        self.source_spool(SpoolEvent::Serving);
    }

    /// Whether the target, which cannot be reached, has said in its own file that it has everything. Never
    /// waits for the datastore: what it says is known the next time.
    pub(super) fn target_is_complete(&mut self) -> bool {
        let says = self.spool.up && self.spool.own == Some(Own::Complete);
        let Some(work) = self.source.work.as_deref_mut() else { return false };
        if work.spooling.look == Some(true) {
            return true;
        }
        if work.spooling.core.is_read() {
            work.spooling.look = Some(says);
        }
        false
    }

    /// Nobody needs the file any more.
    pub(super) fn end_spool(&mut self) {
        self.call_off(Timer::Stall);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if work.spooling.spooler.take().is_some() {
            self.spool.doomed[0] = true;
        }
    }

    /// The target has everything, and this side knows it: what it left there for us goes.
    pub(super) fn end_targets_file(&mut self) {
        let leaves = self.has(PlantedBug::TargetsFileLeft);
        let read = self.source.work.as_deref().is_some_and(|work| work.spooling.core.is_read());
        self.spool.own_doomed[0] |= read && !leaves && self.spool.own.is_some();
    }
}

/// An extent is one page, and as long as one byte.
fn mark(extents: u16) -> SpoolMark {
    SpoolMark { extents: extents.into(), bytes: extents.into() }
}

/// A page a second: only what is told of the pause says whether it fits.
fn secured() -> SpoolSaid<Pages> {
    SpoolSaid::Secured(1, Duration::from_secs(1))
}
