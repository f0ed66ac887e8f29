//! The source's acts, step by step: between any two of them everything can happen. Mirrors
//! `SourceDriver::effect`.

use super::{Departure, Do, Heard, bitmap};
use crate::{
    driver::Driver,
    link::Side,
    pages::Pages,
    planted::PlantedBug,
    qemu::Was,
    watchdog::Word::{Back, Pausing},
    world::{Timer, World, say},
};
use proto::{
    SourceEvent, SpoolEvent,
    control::{self, Kind},
};

impl World {
    /// One step of an act.
    pub(super) fn source_does(&mut self, step: Do) {
        let qemu = &mut self.qemus[0];
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let can_fail = matches!(step, Do::Journal(_) | Do::Sync | Do::Collect | Do::Stop | Do::DialStreams);
        // What is insisted upon is tried again until it works; so is everything of a recovery.
        let insisted = work.machine.is_none()
            || matches!(self.source.journal.read(), Departure::Gone | Departure::Settled);
        let undoing = step == Do::Sync && *self.source.journal.read() == Departure::None;
        if work.fails && can_fail && !insisted && !undoing {
            work.fails = false;
            if step == Do::Sync {
                // It said that it failed, and yet it may be durable.
                self.source.journal.sync();
            }
            say!(self, "source: that fails");
            work.broke("act");
            // A guest that was not stopped need not be let run (`Watched::pausing`).
            if !work.stopped && matches!(step, Do::Journal(Departure::Pausing(_))) {
                self.tell_watchdog(Back);
            }
            return;
        }
        match step {
            Do::Journal(state) | Do::Insist(state) => self.source.journal.write(|entry| *entry = state),
            Do::Sync => {
                if self.bug == Some(PlantedBug::FenceNotSynced)
                    && matches!(self.source.journal.read(), Departure::Fenced(_))
                {
                    return self.set(Timer::Lazy(Side::Source));
                }
                self.source.journal.sync();
                let ran = Departure::Pausing(Was::Ran) == *self.source.journal.durable()
                    || Departure::Fenced(Was::Ran) == *self.source.journal.durable();
                self.ghost.unrecorded &= ran;
                if *self.source.journal.durable() == Departure::None && work.machine.is_none() {
                    // The recovery has brought it back.
                    self.source.work = None;
                }
            }
            Do::Track => {
                if !qemu.alive {
                    return work.broke("track");
                }
                qemu.tracked = Some(Pages::default());
            }
            Do::Look => work.dirty = work.dirty.or(qemu.ram.present),
            Do::ReadEarly => work.read_before = Some(Box::new(qemu.ram.pages.clone())),
            Do::Collect => match &mut qemu.tracked {
                Some(written) if qemu.alive => {
                    let written = std::mem::take(written);
                    work.dirty = work.dirty.or(written);
                    self.source_spool(SpoolEvent::Written(written));
                }
                _ => work.broke("collect"),
            },
            Do::Give(round) => {
                work.round = round;
                work.set = std::mem::take(&mut work.dirty);
                work.unacknowledged = work.unacknowledged.or(work.set);
                work.give();
                self.spool_round();
            }
            Do::GiveRest => {
                work.give();
                self.spool_round();
            }
            Do::Tell(word) => {
                // A pause that nobody watches over does not begin.
                if !self.tell_watchdog(word)
                    && matches!(word, Pausing(_))
                    && let Some(work) = self.source.work.as_deref_mut()
                {
                    work.broke("journal the pause");
                }
            }
            Do::Decide => {
                work.rounds += 1;
                self.guest.wake(self.setup.busy);
                // Disks that are at work: whatever has been said by now is heard before the moment comes.
                if self.setup.guest.is_multiple_of(3) {
                    work.moment = true;
                    return work.heard.push_back(Heard::Moment);
                }
                self.source_decides();
            }
            Do::Decided => self.source_decides(),
            Do::Stop => self.source_stops(),
            Do::Freeze => qemu.frozen = qemu.alive,
            Do::Hold => self.hold_frozen(),
            Do::Thaw => {
                if self.bug != Some(PlantedBug::NotThawed) {
                    self.thaw(Side::Source);
                }
            }
            Do::Stopped => work.event(SourceEvent::Stopped),
            Do::StreamsOpen => {
                work.begun = true;
                self.guest.wake(self.setup.busy);
                work.event(SourceEvent::StreamsOpen);
            }
            Do::Fenced => work.event(SourceEvent::Fenced),
            Do::SayMissing => {
                let stopped = work.stopped;
                self.source_spool(SpoolEvent::Missing(stopped));
                let Some(work) = self.source.work.as_deref_mut() else { return };
                let missing = std::mem::take(&mut work.dirty);
                work.missing = work.missing.or(missing);
                self.guest.wake(self.setup.busy);
                let missing = control::Missing { blocks: vec![bitmap(missing)] };
                self.source_says(Kind::Missing(missing));
            }
            Do::EndSpool => {
                self.end_spool();
                self.end_targets_file();
            }
            Do::Resume => self.source_resumes(),
            Do::AbortPause => self.source_runs_on(),
            Do::RanOn => work.event(SourceEvent::RanOn(true)),
            Do::HangUp => self.source_hangs_up(),
            Do::Wait => {}
            Do::Ask => self.source_asks(),
            Do::AwaitAnswer => self.source_is_answered(),
            Do::DialStreams => self.dial_streams(),
            Do::AwaitStreams => self.streams_answered(),
            Do::Untrack => qemu.tracked = None,
            Do::Destroy => qemu.die(),
            Do::TakeUp => self.take_up(),
        }
    }
}
