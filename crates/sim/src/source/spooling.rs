//! What goes into the file when, and what is done when it fails. Mirrors `engine/source/spooling.rs`.

mod securing; // before a post-copy that must survive this side
mod spooler; // the thread that writes it

use super::{bitmap, pages};
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
use proto::{
    SourceEvent,
    control::{self, Kind},
};
use securing::{Securing, SecuringPhase};
pub(crate) use spooler::Said;
use spooler::{Spooler, Task};

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
    /// Pages are missing: it is a post-copy.
    pub owes: bool,
    /// What is missing in a relaxed one is on its way into it.
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
    /// It was given up: the target must say that nothing old will arrive any more.
    Stopping,
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

    /// The target's words about the file are not the machine's business (`spool_word`). Says whether it was
    /// one.
    pub(super) fn spool_word(&mut self, kind: &Kind) -> bool {
        let hasty = self.has(PlantedBug::StopNotAwaited);
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
                    self.round_is_sent();
                }
            }
            Kind::SpoolFailed(_) => self.spool_failed(),
            Kind::NowMissing(missing) => {
                let missing = missing.blocks.first().map_or(Pages::default(), pages);
                work.to_push = Pages(work.to_push.0 & missing.0);
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
            securing.unread.is_some() || matches!(securing.stage, SecuringPhase::Saved { .. })
        });
        if let Some(spooler) = &mut work.spooling.spooler {
            spooler.late = spooler.now.is_some() || !spooler.jobs.is_empty();
            if waits {
                work.heard.push_back(super::Heard::Spool(work.spooling.turn, Said::Late));
            }
        }
    }

    /// The round is over once all streams have sent their shares and the file's part is in the target's
    /// memory (`sent`).
    pub(super) fn round_is_sent(&mut self) {
        let no_barrier = self.has(PlantedBug::NoBarrier);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let all = work.parts.count_ones() as usize == work.streams.len() && !work.streams.is_empty();
        if !all || work.spooling.round != Part::Over {
            return;
        }
        let round = work.round;
        work.event(SourceEvent::Sent(round));
        if no_barrier {
            work.event(SourceEvent::Message(Kind::RoundReceived(control::RoundReceived { round })));
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
        let forgets = self.has(PlantedBug::ReturnedForgotten);
        let hasty = self.has(PlantedBug::StopNotAwaited);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let spooling = &mut work.spooling;
        if let Said::Durable(mark, _) = said {
            spooling.durable = mark;
        }
        if turn != spooling.turn {
            return;
        }
        match said {
            Said::Durable(mark, receive_from) => {
                if spooling.agreed {
                    let (receive, receive_from) = (receive_from.is_some(), receive_from.unwrap_or(0).into());
                    let spooled = control::Spooled { receive, receive_from, ..so_far(mark) };
                    self.source_says(Kind::Spooled(spooled));
                }
            }
            Said::RoundOver(returned, failed) => {
                // Still unacknowledged (I2): nobody knows which of them the target has.
                if !forgets {
                    work.dirty = work.dirty.or(returned);
                }
                spooling.unsure = Pages::default();
                if failed {
                    // Before anything newer is sent, nothing old may arrive any more (I5).
                    spooling.round = if hasty { Part::Over } else { Part::Stopping };
                    self.lose_spool();
                    if hasty {
                        self.round_is_sent();
                    }
                } else {
                    spooling.round = Part::Over;
                    self.round_is_sent();
                }
            }
            Said::Secured => self.secured(),
            Said::Failed => self.spool_failed(),
            Said::Late => self.waits_in_vain(),
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
        let safe = spooling.securing.as_ref().is_some_and(|securing| securing.stage == SecuringPhase::Safe);
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
            Some(SecuringPhase::Passes) => self.decide_without(),
            Some(SecuringPhase::Pausing | SecuringPhase::Saved { .. }) => {
                work.broke("put what the target would lack into the spool")
            }
            Some(SecuringPhase::Safe) | None => {}
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

    /// In a relaxed post-copy nothing that is missing is in the file when the VM changes hands.
    pub(super) fn announce_relaxed(&mut self) {
        let end = self.spool.appended();
        let Some(work) = self.source.work.as_deref() else { return };
        let spooling = &work.spooling;
        if spooling.spooler.is_none() || !spooling.owes || spooling.securing.is_some() {
            return;
        }
        // Not what is durable: more of a round that was interrupted may become so.
        let manifest = Some(manifest(end, work.missing, end));
        let spooled = control::Spooled { manifest, ..so_far(spooling.durable) };
        self.source_says(Kind::Spooled(spooled));
    }

    /// The target runs the guest: in a relaxed post-copy what it lacks goes into the file now.
    pub(super) fn spool_missing(&mut self) {
        let strict = self.is_strict();
        if self.has(PlantedBug::SpoolEndsWithCommit) {
            self.spool.doomed[0] = true;
        }
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let durable = work.spooling.durable;
        if work.spooling.spooler.is_none() {
            return;
        }
        if !strict && !std::mem::replace(&mut work.spooling.follows, true) {
            work.spooling.give(Task::Secure(work.missing), &mut self.timers);
        }
        // A target that was reconnected to may have missed it.
        self.source_says(Kind::Spooled(so_far(durable)));
    }

    /// Whether the target, which cannot be reached, has said in its own file that it has everything. Never
    /// waits for the datastore: what it says is known the next time.
    pub(super) fn target_is_complete(&mut self) -> bool {
        let says = self.spool.up && self.spool.own == Some(Own::Complete);
        let Some(work) = self.source.work.as_deref_mut() else { return false };
        if work.spooling.look == Some(true) {
            return true;
        }
        if work.spooling.agreed {
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
        let agreed = self.source.work.as_deref().is_some_and(|work| work.spooling.agreed);
        self.spool.own_doomed[0] |= agreed && !leaves && self.spool.own.is_some();
    }
}

fn manifest(floor: u16, outdated: Pages, end: u16) -> control::Manifest {
    let outdated = if outdated.none() { vec![] } else { vec![bitmap(outdated)] };
    control::Manifest { floor: floor.into(), outdated, end: end.into() }
}
