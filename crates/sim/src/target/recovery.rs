//! The target's agent after a restart. Mirrors `agent/recovery.rs` (`go_on`, `give_up`) and
//! `host/outgoing.rs` (`serve_missing`).
//!
//! Where the record is held elsewhere, a claim may still be on its way to it when its sender has died: so a
//! target that intended to claim asks until it knows.

use super::{Do, Session, Unspool, WritePolicy};
use crate::{
    planted::PlantedBug,
    qemu::Was,
    record::Answer,
    world::{World, say},
};
use proto::{Target, control};

const GIVE_UP: [Do; 4] = [Do::Abandon, Do::Sync, Do::Destroy, Do::Over];

impl World {
    /// Goes on from what the store says.
    pub fn target_takes_up(&mut self) {
        let Some(arrival) = self.target.store.read().arrival.clone() else {
            return self.target.work = None;
        };
        say!(self, "target: recovery finds {arrival:?}");
        let qemu = &self.qemus[1];
        let mut work = Session::new(None);
        match (arrival.claimed, arrival.missing) {
            (true, _) if !qemu.alive => return self.target.work = None,
            // What is present has been received: a page leaves its hole in one step.
            (true, Some(missing)) if !missing.less(qemu.ram.present).none() => {
                work = Session::new(Some(Target::after_claim(control::Hello::default())));
                work.stage = WritePolicy::PostCopy;
                work.missing = missing.less(qemu.ram.present);
                work.watches = true;
                work.arrived = true;
                work.spool =
                    arrival.spool.filter(|_| !self.has(PlantedBug::SpoolForgotten)).map(Unspool::resume);
                work.steps.push_back(Do::Run);
            }
            // Nothing is missing: whoever waits at a hole goes on, and finds zeros.
            (true, _) => {
                work.steps.extend((!self.has(PlantedBug::WatchLeft)).then_some(Do::Close));
                work.steps.extend([Do::Run, Do::Settle, Do::Sync, Do::Over]);
            }
            (false, _) if arrival.claiming && qemu.alive && !self.has(PlantedBug::IntentForgotten) => {
                work.steps.extend([Do::Ask, Do::AwaitAnswer]);
            }
            // Whoever the record names, it cannot run here any more.
            (false, _) => work.steps.extend(GIVE_UP),
        }
        if arrival.stood {
            work.was = Was::Stood;
        }
        self.target.work = Some(Box::new(work));
    }

    pub(super) fn target_recovery_is_answered(&mut self, answer: Answer) {
        let Some(work) = self.target.work.as_deref_mut() else { return };
        match answer {
            Answer::Yours(_) => work.steps.extend([Do::Won, Do::Sync, Do::TakeUp]),
            Answer::Lost(_) => work.steps.extend(GIVE_UP),
            Answer::Unknown => work.steps.extend([Do::Wait, Do::Ask, Do::AwaitAnswer]),
        }
    }
}
