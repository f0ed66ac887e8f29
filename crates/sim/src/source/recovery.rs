//! The source's agent after a restart, and after a migration that ended before it was settled. Mirrors
//! `agent/recovery.rs` and `host/outgoing.rs` (`serve_gone`).

use super::{Departure, Do, Heard, Work};
use crate::{
    link::Side,
    planted::PlantedBug,
    printed::Printed,
    record::Answer,
    world::{Timer, World, say},
};
use proto::Source;

/// What follows an answer (`Recovery::ask`).
pub(super) fn after(answer: Answer) -> Vec<Do> {
    match answer {
        Answer::Yours(_) => vec![Do::Thaw, Do::Resume, Do::Insist(Departure::None), Do::Sync],
        Answer::Lost(_) => vec![Do::Insist(Departure::Gone), Do::Sync, Do::TakeUp],
        Answer::Unknown => vec![Do::Wait, Do::Ask, Do::AwaitAnswer],
    }
}

impl World {
    /// Goes on from what the journal says (`take_up`, `settle`).
    pub fn take_up(&mut self) {
        let state = *self.source.journal.read();
        say!(self, "source: recovery finds {state:?}");
        self.state_is_not_recorded();
        let mut work = Work::new(None);
        if let Departure::Pausing(was) | Departure::Fenced(was) = state
            && !self.has(PlantedBug::RecoveryForgetsRunState)
        {
            work.was = was;
        }
        // Whoever finds it frozen keeps it so, whatever signals come.
        let qemu = &mut self.qemus[0];
        qemu.held = qemu.frozen && matches!(state, Departure::Fenced(_) | Departure::Gone);
        match state {
            Departure::None | Departure::Settled => return self.source.work = None,
            Departure::Fenced(_) if !self.has(PlantedBug::ResumeWithoutAsking) => {
                work.steps.extend([Do::Ask, Do::AwaitAnswer]);
            }
            Departure::Pausing(_) | Departure::Fenced(_) => {
                work.steps.extend([Do::Thaw, Do::Resume, Do::Insist(Departure::None), Do::Sync]);
            }
            Departure::Gone => {
                if !self.qemus[0].alive {
                    // The memory that was kept here is gone.
                    return self.source.work = None;
                }
                let (machine, effects) = Source::after_commit();
                work = Work::new(Some(machine));
                work.stopped = true;
                work.todo = effects.into_iter().map(Printed).collect();
            }
        }
        self.source.work = Some(Box::new(work));
    }

    /// After half a minute without an answer the driver leaves the asking to the recovery
    /// (`in_doubt_for_long`).
    pub fn source_in_doubt(&mut self) {
        let Some(work) = self.source.work.as_deref() else { return };
        let asks = work.steps.iter().any(|step| matches!(step, Do::Ask | Do::AwaitAnswer));
        let asking = work.asks_later || asks;
        let is_fenced = matches!(self.source.journal.read(), Departure::Fenced(_));
        if work.machine.is_some() && asking && is_fenced {
            self.source_hangs_up();
            self.call_off(Timer::Patience(Side::Source));
            self.call_off(Timer::Stall);
            self.watchdog_is_alone();
            self.take_up();
        }
    }

    /// A person looks at what did not resolve itself.
    pub fn person(&mut self) {
        if self.record.restored {
            // Whoever restores a backup says what had changed since.
            say!(self, "person: puts the restored record right");
            self.record.restored = false;
            let record = &mut self.record;
            std::mem::swap(&mut record.owner, &mut record.before);
        }
        if !self.burnt[1] || self.burnt[0] || self.ghost.for_good || !self.held_by_target() {
            return;
        }
        let state = *self.source.journal.durable();
        let is_fenced = matches!(state, Departure::Fenced(_));
        if !self.up[0] || (!is_fenced && self.source.work.is_some()) {
            if state != Departure::Gone {
                self.set(Timer::Person);
            }
            return;
        }
        if !is_fenced {
            return;
        }
        let Some(work) = self.source.work.as_deref_mut() else { return };
        say!(self, "person: resolve --here --i-have-fenced");
        self.ghost.spoken = true;
        // Until it is heard.
        Timer::Person.set_in(&mut self.timers);
        if work.machine.is_some() {
            return work.heard.push_back(Heard::Resolved);
        }
        // `resolve_here` of the recovery.
        work.steps.clear();
        work.steps.extend(after(Answer::Yours(0)));
    }
}
