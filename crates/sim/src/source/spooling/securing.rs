//! Before a strict post-copy: what will be missing goes into the file. Mirrors
//! `engine/source/spooling/securing.rs`.

use super::{Task, manifest, so_far};
use crate::{
    driver::Driver,
    pages::Pages,
    planted::PlantedBug,
    setup::Way,
    source::Work,
    world::{Timer, World, say},
};
use policy::Budget;
use proto::{
    Moved, NextStep, Rounds, SourceEvent,
    control::{self, Kind},
};
use std::time::Duration;
use units::Bytes;

/// What will be missing is made safe.
#[derive(Clone, Hash, Debug)]
pub struct Securing {
    floor: u16,
    passes: u8,
    insecure: Pages,
    jobs: u8,
    /// The end of a pass that the target has not read yet.
    pub(super) unread: Option<u16>,
    pub(super) stage: SecuringPhase,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum SecuringPhase {
    Passes,
    Pausing,
    Saved { more: bool },
    Safe,
}

impl World {
    /// What comes after a round.
    pub(in crate::source) fn source_decides(&mut self) {
        let strict = self.is_strict();
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let undone = std::mem::take(&mut work.undone);
        let step = self.next_step(undone);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if step != NextStep::PostCopy || !strict || work.spooling.spooler.is_none() {
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
            stage: SecuringPhase::Passes,
        });
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

    /// What else is done where a post-copy cannot be made safe.
    pub(super) fn decide_without(&mut self) {
        if let Some(work) = self.source.work.as_deref_mut() {
            work.spooling.forbids_post_copy = true;
        }
        let step = self.next_step(false);
        if let Some(work) = self.source.work.as_deref_mut() {
            work.event(SourceEvent::Decided(step));
        }
    }

    pub(super) fn secured(&mut self) {
        // Either way the guest changes hands once all of it is durable.
        let waits_for_reader = self.setup.guest & 2 == 0;
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let durable = work.spooling.durable;
        let Some(securing) = &mut work.spooling.securing else { return };
        securing.jobs -= 1;
        if securing.stage != SecuringPhase::Passes {
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
    pub(super) fn pass_is_read(&mut self) {
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
            securing.stage = SecuringPhase::Pausing;
            work.event(SourceEvent::Decided(NextStep::PostCopy));
        } else if securing.passes < most.max(2) {
            securing.jobs += 1;
            work.spooling.give(Task::Secure(written), &mut self.timers);
        } else {
            // Hopeless: the guest writes faster than the datastore takes it.
            work.spooling.securing = None;
            self.decide_without();
        }
    }

    /// Collects what will be missing; what of it is not safe yet is made so once the guest stands still
    /// (`collect_missing`).
    pub(in crate::source) fn secure_missing(&mut self) {
        let forgets = self.has(PlantedBug::InsecureForgotten);
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
    pub(in crate::source) fn note_insecure(work: &mut Work, written: Pages) {
        if let Some(securing) = &mut work.spooling.securing {
            securing.insecure = securing.insecure.or(written);
        }
    }

    /// The device state is saved. Before a strict post-copy that is told only when what is missing is safe
    /// (`hold`).
    pub(in crate::source) fn source_has_saved(&mut self, more: bool) {
        let forgets = self.has(PlantedBug::SavedNotSecured);
        let hasty = self.has(PlantedBug::FenceBeforeSafe);
        let appended = self.spool.appended();
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let dirty = work.dirty;
        let (Some(securing), true) = (&mut work.spooling.securing, work.spooling.spooler.is_some()) else {
            return work.event(SourceEvent::Saved { more });
        };
        if hasty {
            let manifest = Some(manifest(securing.floor, Pages::default(), appended));
            (securing.jobs, securing.stage) = (0, SecuringPhase::Safe);
            work.event(SourceEvent::Saved { more });
            return self.source_says(Kind::Spooled(control::Spooled { manifest, ..so_far(appended) }));
        }
        // What was written while it was saved.
        let add = !dirty.none() && !forgets;
        securing.jobs += u8::from(add);
        securing.stage = SecuringPhase::Saved { more };
        if add {
            work.spooling.give(Task::Secure(dirty), &mut self.timers);
        }
        self.set(Timer::Stall);
        self.safe_now();
    }

    /// Whether all that is missing is durable; says what was held back until then, and tells the target what
    /// it can live on.
    pub(super) fn safe_now(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let durable = work.spooling.durable;
        let Some(securing) = &mut work.spooling.securing else { return };
        let SecuringPhase::Saved { more } = securing.stage else { return };
        if securing.jobs > 0 {
            return;
        }
        say!(self, "source: what is missing is safe");
        let manifest = Some(manifest(securing.floor, Pages::default(), durable));
        securing.stage = SecuringPhase::Safe;
        work.event(SourceEvent::Saved { more });
        self.source_says(Kind::Spooled(control::Spooled { manifest, ..so_far(durable) }));
        self.call_off(Timer::Stall);
    }

    /// The guest, or a pass, waits for the datastore or for the target that reads it, for too long.
    pub(super) fn waits_in_vain(&mut self) {
        let Some(work) = self.source.work.as_deref() else { return };
        let waits = work.spooling.securing.as_ref().is_some_and(|securing| {
            securing.unread.is_some() || matches!(securing.stage, SecuringPhase::Saved { .. })
        });
        if waits {
            self.spool_failed();
        }
    }
}
