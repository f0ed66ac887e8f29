//! What the source looks at because others act, too: the run state, the VM's configuration, QEMU's events.
//! Mirrors what `SourceDriver` asks its machine around the pause.

use super::{Departure, Do};
use crate::{
    driver::Driver,
    link::Side,
    outside::News,
    planted::PlantedBug,
    qemu::{Run, Theirs, Was},
    watchdog::Word::Pausing,
    world::{World, say},
};

impl World {
    /// How the guest is before it is stopped, for the journal. It can be another way by then.
    pub(super) fn look_at_run_state(&mut self) {
        let run = self.qemus[0].run;
        let assumed = self.has(PlantedBug::RunStateAssumed);
        if let Some(work) = self.source.work.as_deref_mut() {
            work.was = if run.stands_still() && !assumed { Was::Stood } else { Was::Ran };
        }
    }

    /// `stop`, which tells how the guest was.
    pub(super) fn source_stops(&mut self) {
        let assumed = self.has(PlantedBug::RunStateAssumed);
        let zombie = self.has(PlantedBug::EndedGuestCarried);
        let early = self.has(PlantedBug::RunStateReadEarly);
        let qemu = &mut self.qemus[0];
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if !qemu.alive {
            work.stopped = true;
            return work.broke("stop the guest");
        }
        let was = match qemu.run {
            _ if assumed || early => work.was,
            Run::Running => Was::Ran,
            run if run.stands_still() => Was::Stood,
            _ if zombie => Was::Ran,
            run => {
                // It stays as it is; the pause is over all the same, for the journal and the watchdog.
                say!(self, "source: the guest is {run:?}");
                (work.stopped, work.was) = (true, Was::Stood);
                return work.broke("stop the guest");
            }
        };
        work.stopped = true;
        if qemu.runs() {
            qemu.run = Run::Paused;
        }
        qemu.told = News::default();
        if was != work.was {
            work.was = was;
            let again = [Do::Tell(Pausing(was)), Do::Journal(Departure::Pausing(was)), Do::Sync];
            again.into_iter().rev().for_each(|step| work.steps.push_front(step));
        }
        self.at_stop = Some(Box::new(self.guest.clone()));
        self.ghost.wanted_at_stop = self.ghost.wanted;
    }

    /// Whether the VM is another one than when the migration began (`Machine::save`): looked at before its
    /// device state is saved and after it.
    pub(super) fn has_changed(&mut self) -> bool {
        let qemu = &self.qemus[0];
        let changed = qemu.config != 0 && !self.has(PlantedBug::ConfigNotLookedAt);
        let theirs = qemu.theirs != Theirs::None && !self.has(PlantedBug::TheirMigrationIgnored);
        if changed || theirs {
            say!(self, "source: the VM has changed");
        }
        changed || theirs
    }

    /// QEMU stands still as a process as soon as its device state is saved (`Machine::save`). Says whether
    /// nothing has happened to it since our `stop`, by all that its events have told: nothing happens any
    /// more.
    pub(super) fn freezes(&mut self) -> bool {
        let ignored = self.has(PlantedBug::TheirMigrationIgnored);
        let late = self.has(PlantedBug::FrozenAfterAuthorization) || self.has(PlantedBug::NotFrozen);
        let looks_away = self.has(PlantedBug::EventsNotLookedAt);
        let qemu = &mut self.qemus[0];
        (qemu.frozen, qemu.woken) = (!late, false);
        let told = qemu.told.any_of(&[News::RESUMED, News::RESET, News::CHANGED, News::LEFT])
            || (qemu.told.any_of(&[News::MIGRATES]) && !ignored);
        !told || looks_away
    }

    /// Before the promise (`Machine::hold`).
    pub(super) fn hold_frozen(&mut self) {
        let late = self.has(PlantedBug::FrozenAfterAuthorization) || self.has(PlantedBug::NotFrozen);
        let (blind, free) = (self.has(PlantedBug::SignalNotSeen), self.has(PlantedBug::NotHeld));
        let qemu = &mut self.qemus[0];
        let gone = !qemu.alive;
        let still = late || blind || (qemu.frozen && !qemu.woken);
        qemu.held = !gone && !free && qemu.frozen;
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if gone || !still {
            work.broke("leave the guest to the target");
        }
    }

    /// An event of QEMU's.
    pub(super) fn hear_qemu(&mut self, news: News) {
        let left = news.any_of(&[News::LEFT]) && self.qemus[0].alive;
        let ignored = news.any_of(&[News::MIGRATES]) && self.has(PlantedBug::TheirMigrationIgnored)
            || left && self.has(PlantedBug::EndedGuestCarried);
        let deaf = self.has(PlantedBug::EventsNotLookedAt);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let ignored = ignored || (deaf && work.stopped);
        let before = work.machine.as_ref().is_some_and(|machine| machine.cancellable());
        if before && news.ends(work.stopped) && !ignored {
            say!(self, "source: the VM has changed");
            work.broke("the VM has changed");
        }
    }

    /// The guest is on this side again, and runs if it ran before our `stop`; unless it does already, or
    /// others have done with it what they wanted.
    pub(super) fn as_it_was(&mut self) {
        let regardless = self.has(PlantedBug::PausedSetRunning);
        let there_too = self.has(PlantedBug::PostmigrateResumed);
        let qemu = &self.qemus[0];
        let Some(work) = self.source.work.as_deref() else { return };
        let ran = work.was == Was::Ran || regardless;
        // Whoever has let it run in our pause has stopped it again, if it stands still.
        let theirs = work.machine.is_some() && qemu.told.any_of(&[News::RESUMED]);
        let gone = qemu.run == Run::Postmigrate && there_too;
        if qemu.alive && !qemu.frozen && ran && !theirs && (qemu.run.stands_still() || gone) {
            self.guest_runs(Side::Source);
        }
    }

    /// Whoever goes on from the journal knows only what is in it.
    pub(crate) fn state_is_not_recorded(&mut self) {
        if std::mem::take(&mut self.ghost.unrecorded) {
            self.ghost.wanted = None;
        }
    }
}
