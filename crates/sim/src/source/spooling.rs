//! What goes into the file when, and what is done when it fails. Mirrors `engine/source/spooling.rs`.

use super::{Work, bitmap, pages};
use crate::{
    driver::Driver,
    fault::Fault,
    link::{Side, Word},
    pages::{Pages, UNKNOWN},
    printed::Printed,
    setup::{Setup, Spooling as Wanted, Way},
    spool::Own,
    world::{Timer, World, say},
};
use proto::{
    SourceEvent, Step,
    control::{self, Kind},
};
use std::collections::VecDeque;

/// Rounds of fewer pages go over the network alone.
const LEAST_ROUND: usize = 2;

/// The file, as the driver sees it.
#[derive(Clone, Hash, Default, Debug)]
pub struct Spooling {
    /// The thread that writes it; none: there is no file, or it is of no use any more.
    pub spooler: Option<Spooler>,
    /// Whether the target has said that it reads it.
    pub agreed: bool,
    /// What the thread says of jobs of other turns does not matter any more.
    pub turn: u8,
    /// Its part in the current round.
    pub round: Part,
    /// Pages of the round that were taken for it, and are not known to be in the target's memory.
    pub unsure: Pages,
    /// Nothing of the round is taken for it any more.
    pub left: bool,
    /// Before a strict post-copy.
    pub securing: Option<Securing>,
    /// Pages are owed: it is a post-copy.
    pub owes: bool,
    /// What is owed in a relaxed one is on its way into it.
    pub follows: bool,
    /// Its durable end.
    pub durable: u16,
    /// Extents that the target has read.
    pub taken: u16,
    /// What the target's file said when it was looked at last.
    pub look: Option<bool>,
    /// No post-copy any more.
    pub forbids_post_copy: bool,
    /// The janitor knows that it is in use.
    pub at_work: bool,
}

/// The file's part in the current round.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum Part {
    /// None, or it is done.
    #[default]
    Over,
    /// The thread takes pages.
    Busy,
    /// It was given up: the target must say that nothing old will land any more.
    Stopping,
}

/// What will be owed is made safe.
#[derive(Clone, Hash, Debug)]
pub struct Securing {
    floor: u16,
    passes: u8,
    insecure: Pages,
    jobs: u8,
    /// The end of a pass that the target has not read yet.
    unread: Option<u16>,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Stage {
    Passes,
    Pausing,
    Saved { more: bool },
    Safe,
}

/// The thread that writes the file: `engine/spooler.rs`.
#[derive(Clone, Hash, Default, Debug)]
pub struct Spooler {
    /// What it is told, and in which turn.
    pub jobs: VecDeque<(u8, Task)>,
    /// What it does.
    pub now: Option<(u8, Doing)>,
    /// How much it said to be durable.
    pub told: u16,
    /// The target reads no further.
    pub over: bool,
    /// It has waited for too long.
    pub late: bool,
    /// The writer has failed for good.
    pub failed: bool,
}

/// What the thread is told.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Task {
    /// To take pages of the round from its end.
    Round,
    /// To put these into the file, until they are durable.
    Secure(Pages),
}

/// How far it is with that.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Doing {
    /// From this extent on; these are under way.
    Round(u16, VecDeque<(u16, u8)>),
    /// These are left; it is durable once this extent is.
    Secure(Pages, Option<u16>),
}

/// What the thread says.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Said {
    /// So much is durable; and from where on it lands now.
    Durable(u16, Option<u16>),
    /// Its part of the round is in the target's memory, but for these; and whether it failed.
    RoundOver(Pages, bool),
    /// A job's pages are durable.
    Secured,
    /// They never will be.
    Failed,
    /// Somebody has waited for the datastore, or for the target that reads it, for too long.
    Late,
}

fn so_far(extents: u16) -> control::Spooled {
    control::Spooled { extents: extents.into(), bytes: extents.into(), ..Default::default() }
}

impl Spooling {
    /// What a migration begins with.
    pub fn begin(setup: &Setup) -> Self {
        let wanted = setup.spooling != Wanted::Off;
        Self { spooler: wanted.then(Spooler::default), at_work: wanted, ..Self::default() }
    }

    /// To the thread.
    fn give(&mut self, task: Task, timers: &mut Vec<(u32, Timer)>) {
        if let Some(spooler) = &mut self.spooler {
            spooler.jobs.push_back((self.turn, task));
            Timer::Stall.set_in(timers);
        }
    }
}

impl World {
    /// Says something about the file.
    fn source_says(&mut self, kind: Kind) {
        let control = self.source.work.as_deref().and_then(|work| work.control);
        if let Some(conn) = control.and_then(|id| self.conn(id)) {
            conn.say(Side::Source, Word::Say(Printed(kind)));
        }
    }

    /// Whether the file has a part in the current round.
    pub fn spool_is_busy(&self) -> bool {
        self.source.work.as_deref().is_some_and(|work| work.spooling.round != Part::Over)
    }

    fn is_strict(&self) -> bool {
        self.setup.spooling == Wanted::Strict
    }

    /// How memory travels from now on.
    pub(super) fn way(&self) -> Way {
        let forbidden = self.source.work.as_deref().is_some_and(|work| work.spooling.forbids_post_copy);
        match self.setup.way {
            _ if forbidden => Way::PreCopy,
            Way::PostCopy if self.is_strict() => Way::Hybrid,
            way => way,
        }
    }

    /// The target's words about the file are not the machine's business (`spool_word`). Says whether it was one.
    pub(super) fn spool_word(&mut self, kind: &Kind) -> bool {
        let hasty = self.has(Fault::StopNotAwaited);
        let Some(work) = self.source.work.as_deref_mut() else { return false };
        match kind {
            Kind::Ready(ready) => {
                work.spooling.agreed = ready.spool;
                if work.spooling.spooler.is_some() && !ready.spool {
                    self.lose_spool();
                }
                return false;
            }
            Kind::SpoolTaken(taken) => {
                let taken = taken.extents as u16;
                if taken > work.spooling.taken {
                    work.spooling.taken = taken;
                    self.spool_moved_on();
                }
                self.pass_is_read();
                self.safe_now();
            }
            Kind::SpoolStopped(_) => {
                if work.spooling.round == Part::Stopping && !hasty {
                    work.spooling.round = Part::Over;
                    self.round_is_shipped();
                }
            }
            Kind::SpoolFailed(_) => self.spool_failed(),
            Kind::Lacking(lacking) => {
                let lacking = lacking.blocks.first().map_or(Pages::default(), pages);
                work.owing = Pages(work.owing.0 & lacking.0);
            }
            _ => return false,
        }
        true
    }

    /// Something has moved: whoever waits has waited for nothing yet.
    pub(super) fn spool_moved_on(&mut self) {
        if self.is_set(Timer::Stall) {
            self.call_off(Timer::Stall);
            self.set(Timer::Stall);
        }
    }

    /// Somebody has waited for too long (`Worker::trouble`, `waits_in_vain`).
    pub fn spool_stalls(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let waits = work.spooling.securing.as_ref().is_some_and(|securing| {
            securing.unread.is_some() || matches!(securing.stage, Stage::Saved { .. })
        });
        if let Some(spooler) = &mut work.spooling.spooler {
            spooler.late = spooler.now.is_some() || !spooler.jobs.is_empty();
            if waits {
                work.heard.push_back(super::Heard::Spool(work.spooling.turn, Said::Late));
            }
        }
    }

    /// The round is over once all streams have sent their shares and the file's part is in the target's memory (`shipped`).
    pub(super) fn round_is_shipped(&mut self) {
        let no_barrier = self.has(Fault::NoBarrier);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let all = usize::from(work.parts) == work.streams.len() && !work.streams.is_empty();
        if !all || work.spooling.round != Part::Over {
            return;
        }
        let round = work.round;
        work.event(SourceEvent::Shipped(round));
        if no_barrier {
            work.event(SourceEvent::Message(Kind::RoundLanded(control::RoundLanded { round })));
        }
    }

    /// A round begins: the file takes part, if that is worth it (`spool_round`).
    pub(super) fn spool_round(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let (spooling, worth) = (&mut work.spooling, !work.stopped && work.set.iter().count() >= LEAST_ROUND);
        (spooling.unsure, spooling.left) = (Pages::default(), false);
        if worth && spooling.agreed && spooling.spooler.is_some() && !work.streams.is_empty() {
            spooling.round = Part::Busy;
            spooling.give(Task::Round, &mut self.timers);
        }
    }

    /// The link was lost while the guest runs here (`leave_spool`).
    pub(super) fn leave_spool(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let spooling = &mut work.spooling;
        spooling.left = true;
        if spooling.spooler.is_some() {
            spooling.turn += 1;
        }
        spooling.round = Part::Over;
        spooling.securing = None;
        // Nothing is: the guest runs here.
        spooling.owes = false;
    }

    /// The thread has something to say (`hear_spool`).
    pub(super) fn hear_spool(&mut self, turn: u8, said: Said) {
        let forgets = self.has(Fault::ReturnedForgotten);
        let hasty = self.has(Fault::StopNotAwaited);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let spooling = &mut work.spooling;
        if let Said::Durable(mark, _) = said {
            spooling.durable = mark;
        }
        if turn != spooling.turn {
            return;
        }
        match said {
            Said::Durable(mark, land_from) => {
                if spooling.agreed {
                    let (land, land_from) = (land_from.is_some(), land_from.unwrap_or(0).into());
                    let spooled = control::Spooled { land, land_from, ..so_far(mark) };
                    self.source_says(Kind::Spooled(spooled));
                }
            }
            Said::RoundOver(returned, failed) => {
                // Owed still (I2): nobody knows which of them the target has.
                if !forgets {
                    work.dirty = work.dirty.or(returned);
                }
                spooling.unsure = Pages::default();
                if failed {
                    // Before anything newer is sent, nothing old may land any more (I5).
                    spooling.round = if hasty { Part::Over } else { Part::Stopping };
                    self.lose_spool();
                    if hasty {
                        self.round_is_shipped();
                    }
                } else {
                    spooling.round = Part::Over;
                    self.round_is_shipped();
                }
            }
            Said::Secured => self.secured(),
            Said::Failed => self.spool_failed(),
            Said::Late => self.waits_in_vain(),
        }
    }

    /// The guest, or a pass, waits for the datastore or for the target that reads it, for too long.
    fn waits_in_vain(&mut self) {
        let Some(work) = self.source.work.as_deref() else { return };
        let waits = work.spooling.securing.as_ref().is_some_and(|securing| {
            securing.unread.is_some() || matches!(securing.stage, Stage::Saved { .. })
        });
        if waits {
            self.spool_failed();
        }
    }

    fn spool_failed(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let spooling = &mut work.spooling;
        if spooling.round == Part::Busy {
            // Its thread gives back what is under way, and then the round goes on.
            if let Some(spooler) = &mut spooling.spooler {
                spooler.over = true;
            }
            return;
        }
        let safe = spooling.securing.as_ref().is_some_and(|securing| securing.stage == Stage::Safe);
        if safe || (spooling.owes && spooling.securing.is_none()) {
            // What is in the file may be all that the target has one day: it stays.
            return;
        }
        let securing = spooling.securing.take();
        if spooling.spooler.is_some() {
            self.lose_spool();
        }
        let Some(work) = self.source.work.as_deref_mut() else { return };
        match securing.map(|securing| securing.stage) {
            Some(Stage::Passes) => self.decide_without(),
            Some(Stage::Pausing | Stage::Saved { .. }) => {
                work.broke("put what the target would lack into the spool")
            }
            Some(Stage::Safe) | None => {}
        }
    }

    /// Without the file from now on.
    fn lose_spool(&mut self) {
        say!(self, "source: the spool is of no use");
        let strict = self.is_strict();
        self.call_off(Timer::Stall);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if work.spooling.spooler.take().is_some() {
            self.spool.doomed[0] = true;
        }
        work.spooling.forbids_post_copy |= strict;
        if work.spooling.agreed {
            self.source_says(Kind::SpoolStop(control::SpoolStop {}));
        }
    }

    /// What comes after a round.
    pub(super) fn source_decides(&mut self) {
        let (strict, even) = (self.is_strict(), self.setup.guest.is_multiple_of(2));
        let (way, usual) = (self.way(), self.next_step());
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let step = match (way, std::mem::take(&mut work.undone)) {
            // What was to be owed goes in a round, or before the guest runs there: with another wish, a spool that was lost.
            (Way::Hybrid, true) if even => Step::Switchover,
            (Way::Hybrid, true) => Step::Round,
            _ => usual,
        };
        if step != Step::PostCopy || !strict || work.spooling.spooler.is_none() {
            return work.event(SourceEvent::Decided(step));
        }
        // A strict post-copy is begun by making what it would owe safe: then nothing is decided yet.
        work.spooling.give(Task::Secure(work.dirty), &mut self.timers);
        work.spooling.securing = Some(Securing {
            floor: self.spool.appended(),
            passes: 0,
            insecure: Pages::default(),
            jobs: 1,
            unread: None,
            stage: Stage::Passes,
        });
    }

    fn next_step(&self) -> Step {
        let rounds = self.source.work.as_deref().map_or(0, |work| work.rounds);
        match self.way() {
            Way::PreCopy if rounds < self.setup.rounds => Step::Round,
            Way::PreCopy => Step::Switchover,
            Way::Hybrid | Way::PostCopy => Step::PostCopy,
        }
    }

    /// What else is done where a post-copy cannot be made safe.
    fn decide_without(&mut self) {
        if let Some(work) = self.source.work.as_deref_mut() {
            work.spooling.forbids_post_copy = true;
        }
        let step = self.next_step();
        if let Some(work) = self.source.work.as_deref_mut() {
            work.event(SourceEvent::Decided(step));
        }
    }

    fn secured(&mut self) {
        // Either way the guest changes hands once all of it is durable.
        let waits_for_reader = self.setup.guest & 2 == 0;
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let durable = work.spooling.durable;
        let Some(securing) = &mut work.spooling.securing else { return };
        securing.jobs -= 1;
        if securing.stage != Stage::Passes {
            return self.safe_now();
        }
        securing.unread = Some(if waits_for_reader { durable } else { 0 });
        if work.spooling.taken < durable {
            // It may have been told over a connection that was lost since.
            self.source_says(Kind::Spooled(so_far(durable)));
            self.set(Timer::Stall);
        }
        self.pass_is_read();
    }

    /// What comes after a pass, once the target has read it.
    fn pass_is_read(&mut self) {
        let (most, guest) = (self.setup.rounds, self.setup.guest);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let taken = work.spooling.taken;
        let Some(securing) = &mut work.spooling.securing else { return };
        if securing.unread.is_none_or(|end| taken < end) {
            return;
        }
        securing.unread = None;
        let Some(tracked) = &mut self.qemus[0].tracked else {
            return work.broke("collect");
        };
        let written = std::mem::take(tracked);
        work.dirty = work.dirty.or(written);
        securing.passes += 1;
        say!(self, "source: pass {} left {written:?}", securing.passes);
        if written.none() || securing.passes >= most && guest % 5 != 3 {
            securing.insecure = written;
            securing.stage = Stage::Pausing;
            work.event(SourceEvent::Decided(Step::PostCopy));
        } else if securing.passes < most.max(2) {
            securing.jobs += 1;
            work.spooling.give(Task::Secure(written), &mut self.timers);
        } else {
            // Hopeless: the guest writes faster than the datastore takes it.
            work.spooling.securing = None;
            self.decide_without();
        }
    }

    /// Collects what will be owed; what of it is not safe yet is made so once the guest stands still (`collect_owed`).
    pub(super) fn secure_owed(&mut self) {
        let forgets = self.has(Fault::InsecureForgotten);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        work.spooling.owes = true;
        let stopped = work.stopped;
        let Some(securing) = &mut work.spooling.securing else { return };
        if stopped && !securing.insecure.none() && !forgets {
            securing.jobs += 1;
            let insecure = std::mem::take(&mut securing.insecure);
            work.spooling.give(Task::Secure(insecure), &mut self.timers);
        }
    }

    /// The tracker was asked: what of it is to be made safe.
    pub(super) fn note_insecure(work: &mut Work, written: Pages) {
        if let Some(securing) = &mut work.spooling.securing {
            securing.insecure = securing.insecure.or(written);
        }
    }

    /// The device state is saved. Before a strict post-copy that is told only when what is owed is safe (`hold`).
    pub(super) fn source_has_saved(&mut self, more: bool) {
        let forgets = self.has(Fault::SavedNotSecured);
        let hasty = self.has(Fault::PromiseBeforeSafe);
        let appended = self.spool.appended();
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let dirty = work.dirty;
        let (Some(securing), true) = (&mut work.spooling.securing, work.spooling.spooler.is_some()) else {
            return work.event(SourceEvent::Saved { more });
        };
        if hasty {
            let manifest = Some(manifest(securing.floor, Pages::default(), appended));
            (securing.jobs, securing.stage) = (0, Stage::Safe);
            work.event(SourceEvent::Saved { more });
            return self.source_says(Kind::Spooled(control::Spooled { manifest, ..so_far(appended) }));
        }
        // What was written while it was saved.
        let add = !dirty.none() && !forgets;
        securing.jobs += u8::from(add);
        securing.stage = Stage::Saved { more };
        if add {
            work.spooling.give(Task::Secure(dirty), &mut self.timers);
        }
        self.set(Timer::Stall);
        self.safe_now();
    }

    /// Whether all that is owed is durable; says what was held back until then, and tells the target what it can live on.
    fn safe_now(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let durable = work.spooling.durable;
        let Some(securing) = &mut work.spooling.securing else { return };
        let Stage::Saved { more } = securing.stage else { return };
        if securing.jobs > 0 {
            return;
        }
        say!(self, "source: what is owed is safe");
        let manifest = Some(manifest(securing.floor, Pages::default(), durable));
        securing.stage = Stage::Safe;
        work.event(SourceEvent::Saved { more });
        self.source_says(Kind::Spooled(control::Spooled { manifest, ..so_far(durable) }));
        self.call_off(Timer::Stall);
    }

    /// In a relaxed post-copy nothing that is owed is in the file when the VM changes hands.
    pub(super) fn announce_relaxed(&mut self) {
        let end = self.spool.appended();
        let Some(work) = self.source.work.as_deref() else { return };
        let spooling = &work.spooling;
        if spooling.spooler.is_none() || !spooling.owes || spooling.securing.is_some() {
            return;
        }
        // Not what is durable: more of a round that was interrupted may become so.
        let manifest = Some(manifest(end, work.owed, end));
        let spooled = control::Spooled { manifest, ..so_far(spooling.durable) };
        self.source_says(Kind::Spooled(spooled));
    }

    /// The target runs the guest: in a relaxed post-copy what it lacks goes into the file now.
    pub(super) fn spool_owed(&mut self) {
        let strict = self.is_strict();
        if self.has(Fault::SpoolEndsWithCommit) {
            self.spool.doomed[0] = true;
        }
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let durable = work.spooling.durable;
        if work.spooling.spooler.is_none() {
            return;
        }
        if !strict && !std::mem::replace(&mut work.spooling.follows, true) {
            work.spooling.give(Task::Secure(work.owed), &mut self.timers);
        }
        // A target that was reconnected to may have missed it.
        self.source_says(Kind::Spooled(so_far(durable)));
    }

    /// Whether the target, which cannot be reached, has said in its own file that it has everything. Never waits for the datastore:
    /// what it says is known the next time.
    pub(super) fn target_is_complete(&mut self) -> bool {
        let says = self.spool.up && self.spool.own == Some(Own::Complete);
        let Some(work) = self.source.work.as_deref_mut() else { return false };
        if work.spooling.look == Some(true) {
            return true;
        }
        if work.spooling.agreed && work.spooling.spooler.is_some() {
            work.spooling.look = Some(says);
            if says {
                // It was left there for us.
                self.spool.own = None;
            }
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

    /// Whether the thread that writes the file can go on (`Worker`).
    pub fn spooler_can(&self) -> bool {
        let Some(work) = self.source.work.as_deref().filter(|_| self.up[0]) else { return false };
        let Some(spooler) = &work.spooling.spooler else { return false };
        let Some((turn, doing)) = &spooler.now else { return !spooler.jobs.is_empty() };
        let durable = self.durable();
        let trouble = spooler.failed || spooler.late || *turn != work.spooling.turn;
        if durable > spooler.told || trouble {
            return true;
        }
        match doing {
            Doing::Round(_, flights) => {
                let landed = flights.front().is_some_and(|(seq, _)| *seq < work.spooling.taken);
                let takes = self.takes_more(work, flights.len());
                let ended = flights.is_empty() && (work.left.none() || work.spooling.left);
                landed || spooler.over || takes || ended
            }
            Doing::Secure(left, end) => {
                spooler.over
                    || (!left.none() && self.spool.up)
                    || (left.none() && end.is_none_or(|end| durable >= end))
            }
        }
    }

    fn takes_more(&self, work: &Work, flights: usize) -> bool {
        /// Pages that are under way at a time.
        const AHEAD: usize = 2;
        flights < AHEAD && self.spool.up && !work.spooling.left && !work.left.none()
    }

    /// What the writer calls durable.
    fn durable(&self) -> u16 {
        if self.has(Fault::SpoolNotSynced) {
            return self.spool.appended();
        }
        self.spool.file.as_ref().map_or(0, |file| file.durable)
    }

    /// It does one thing.
    pub fn spooler_moves(&mut self) {
        let durable = self.durable();
        let appended = self.spool.appended();
        let keeps = self.has(Fault::SpooledIsKnown);
        let more = self.source.work.as_deref().is_some_and(|work| {
            let now = work.spooling.spooler.as_ref().and_then(|spooler| spooler.now.as_ref());
            matches!(now, Some((_, Doing::Round(_, flights))) if self.takes_more(work, flights.len()))
        });
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let (left, given_turn, taken) = (work.spooling.left, work.spooling.turn, work.spooling.taken);
        let Some(spooler) = &mut work.spooling.spooler else { return };
        let Some((turn, doing)) = &mut spooler.now else {
            spooler.late = false;
            let Some((turn, task)) = spooler.jobs.pop_front() else { return };
            say!(self, "spooler: {task:?}");
            spooler.now = Some(match task {
                Task::Round => (turn, Doing::Round(appended, VecDeque::new())),
                Task::Secure(pages) => (turn, Doing::Secure(pages, None)),
            });
            return Timer::Stall.set_in(&mut self.timers);
        };
        let turn = *turn;
        let tell = |said| super::Heard::Spool(turn, said);
        if durable > spooler.told {
            spooler.told = durable;
            let from = match doing {
                Doing::Round(from, _) => Some(*from),
                Doing::Secure(..) => None,
            };
            work.heard.push_back(tell(Said::Durable(durable, from)));
            return self.spool_moved_on();
        }
        let trouble = spooler.failed || spooler.late || spooler.over || turn != given_turn;
        match doing {
            Doing::Round(_, flights) => {
                if let Some((_, page)) = flights.front().copied().filter(|(seq, _)| *seq < taken) {
                    flights.pop_front();
                    if !left {
                        work.spooling.unsure.drop(page);
                    }
                    return self.spool_moved_on();
                }
                if trouble || !more {
                    say!(
                        self,
                        "spooler: the round is over{}",
                        if trouble { ", not as it should" } else { "" }
                    );
                    spooler.now = None;
                    let returned = work.spooling.unsure;
                    for page in returned.iter().filter(|_| !keeps && turn == given_turn) {
                        work.sent[usize::from(page)] = UNKNOWN;
                    }
                    work.heard.push_back(tell(Said::RoundOver(returned, trouble)));
                    return self.call_off(Timer::Stall);
                }
                let Some(page) = work.left.highest() else { return };
                work.left.drop(page);
                work.spooling.unsure.add(page);
                let ram = &self.qemus[0].ram;
                let now = work.read_before.as_ref().map_or(ram.at(page), |read| read.at(page));
                if std::mem::replace(&mut work.sent[usize::from(page)], now.content) == now.content {
                    work.spooling.unsure.drop(page);
                    return;
                }
                flights.push_back((appended, page));
                self.append(page, now);
            }
            Doing::Secure(left, end) => {
                if let Some(page) = left.highest().filter(|_| !trouble && self.spool.up) {
                    left.drop(page);
                    let now = self.qemus[0].ram.at(page);
                    return self.append(page, now);
                }
                if left.none() && end.is_none() {
                    *end = Some(appended);
                    return;
                }
                let done = end.is_some_and(|end| durable >= end);
                if done || trouble {
                    spooler.now = None;
                    work.heard.push_back(tell(if done { Said::Secured } else { Said::Failed }));
                    self.call_off(Timer::Stall);
                    let waits = self.source.work.as_deref().is_some_and(|work| {
                        work.spooling.securing.as_ref().is_some_and(|s| s.stage != Stage::Safe)
                    });
                    if waits {
                        self.set(Timer::Stall);
                    }
                }
            }
        }
    }

    fn append(&mut self, page: u8, what: crate::pages::Page) {
        say!(self, "spooler: page {page} is {}", what.content);
        if let Some(file) = &mut self.spool.file {
            file.extents.push(crate::spool::Extent { page, what, whole: true });
        }
        self.spool_moved_on();
    }
}

fn manifest(floor: u16, lacking: Pages, end: u16) -> control::Manifest {
    let lacking = if lacking.none() { vec![] } else { vec![bitmap(lacking)] };
    control::Manifest { floor: floor.into(), lacking, end: end.into() }
}
