//! What the source makes of what it hears, and how it ends. Mirrors `SourceDriver::look_at`, `hear`, `saved`,
//! `bring_back` and `finish`.

use super::{Departure, Do, Heard, KeptTable, Saving, pages, short};
use crate::{
    driver::Driver,
    link::Side,
    pages::Pages,
    planted::PlantedBug,
    record::Answer,
    world::{Timer, World, say},
};
use proto::{
    LinkEvent, SourceEffect, SourceEnd, SourceEvent, SpoolEvent,
    control::{self, Kind},
    outlives_link,
};

impl World {
    /// What was heard (`SourceDriver::look_at`, `hear`, `saved`).
    pub(super) fn source_hears(&mut self, heard: Heard) {
        let no_barrier = self.has(PlantedBug::NoBarrier);
        let forgetful = self.has(PlantedBug::WritesOfSaveForgotten);
        let hasty = self.has(PlantedBug::ForgetBeforeSettled);
        let late = self.has(PlantedBug::CommitHeardTooLate);
        let believed = self.has(PlantedBug::OldStateBelieved);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        match heard {
            // Taken for granted when the round was sent.
            Heard::Said(_, kind) if no_barrier && matches!(kind.0, Kind::RoundReceived(_)) => {}
            Heard::Said(conn, mut kind) => {
                let current = work.control == Some(conn);
                if !current && !outlives_link(&kind.0) {
                    return;
                }
                if (current && self.link_word(&mut kind.0)) || self.spool_word(&kind.0) {
                    return;
                }
                let Some(work) = self.source.work.as_deref_mut() else { return };
                match &kind.0 {
                    Kind::Ready(ready) => work.kept = ready.kept.then(KeptTable::default),
                    Kind::Kept(kept) => return work.hear_kept(kept),
                    Kind::StillMissing(still) => {
                        work.missing = still.blocks.first().map_or(work.missing, pages)
                    }
                    Kind::RoundReceived(received) if received.round == work.round => {
                        work.unacknowledged = Pages::default();
                    }
                    _ => {}
                }
                let committed = matches!(kind.0, Kind::Committed(_));
                work.event(SourceEvent::Message(kind.0));
                if late && committed && work.control.is_none() {
                    for effect in work.todo.iter_mut().filter(|effect| effect.0 == SourceEffect::Reconnect) {
                        effect.0 = SourceEffect::ServeMissing;
                    }
                }
                if hasty && committed {
                    work.event(SourceEvent::Message(Kind::Settled(control::Settled::default())));
                }
            }
            Heard::Silent(conn) if work.control == Some(conn) => {
                self.source_link(LinkEvent::Silent("it is silent".into()));
            }
            Heard::Lost(conn) if work.answering == Some(conn) => {
                self.source_link(LinkEvent::Silent("it broke".into()));
            }
            Heard::Lost(conn) => {
                if let Some(stream) = work.streams.iter().position(|s| s.conn == conn) {
                    self.source_link(LinkEvent::StreamLost(stream as u32, "it broke".into()));
                }
            }
            Heard::Silent(_) => {}
            Heard::Shared(conn, round) => {
                if let Some(stream) = work.streams.iter().position(|s| s.conn == conn) {
                    self.source_spool(SpoolEvent::StreamSent(stream as u32, round));
                }
            }
            // Of a pause that came to nothing.
            Heard::Saved(pause, _) if pause != work.aborted_pauses && !believed => {}
            Heard::Saved(_, true) => match &mut self.qemus[0].tracked {
                Some(written) => {
                    let written = std::mem::take(written);
                    if !forgetful {
                        work.dirty = work.dirty.or(written);
                    }
                    work.saved = true;
                    let more = !work.dirty.none();
                    self.source_spool(SpoolEvent::Saved(more));
                }
                None => work.broke("collect"),
            },
            Heard::Saved(_, false) => work.broke("save the device state"),
            Heard::Answer(answer) => {
                let event = match answer {
                    Answer::Yours(_) => SourceEvent::ClaimWon,
                    Answer::Lost(epoch) => SourceEvent::ClaimLost(epoch),
                    Answer::Unknown => SourceEvent::ClaimUnknown("not known".into()),
                };
                work.event(event);
            }
            Heard::Spool(turn, said) => self.hear_spool(turn, said),
            // Unless something else has come between.
            Heard::Moment if std::mem::take(&mut work.moment) => {
                work.steps.extend([Do::Collect, Do::Decided]);
            }
            Heard::Moment => {}
            Heard::SpoolLate => self.source_spool(SpoolEvent::Late),
            Heard::Qemu(news) => self.hear_qemu(news),
            Heard::Cancel => work.event(SourceEvent::Cancel),
            Heard::Resolved => work.event(SourceEvent::Resolved),
        }
    }

    pub(super) fn source_event(&mut self, event: SourceEvent) {
        if let Some(work) = self.source.work.as_deref_mut() {
            work.event(event);
        }
    }

    /// The thread that saves the device state (`Machine::save`): devices may still write to guest memory.
    pub fn source_saves(&mut self) {
        let disks_stay = self.has(PlantedBug::DisksStayActive);
        let changed = self.has_changed();
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let qemu = &mut self.qemus[0];
        if !qemu.alive || (changed && work.saving == Some(Saving::Begun)) || std::mem::take(&mut work.fails) {
            work.saving = None;
            return work.heard.push_back(Heard::Saved(work.aborted_pauses, false));
        }
        if work.saving == Some(Saving::Begun) {
            work.saving = Some(Saving::Wrote);
            let page = (self.setup.guest % u16::from(self.setup.pages)) as u8;
            if self.setup.guest % 2 == 1 {
                let now = self.guest.write(page);
                qemu.ram.put(page, now);
                if let Some(written) = &mut qemu.tracked {
                    written.add(page);
                }
                if let Some(stop) = &mut self.at_stop {
                    **stop = self.guest.clone();
                }
                say!(self, "source: a device writes page {page}");
            }
            return;
        }
        work.saving = None;
        work.state = qemu.state.unwrap_or(0);
        // Whoever let the guest run keeps its disks: QEMU looks.
        qemu.has_disk &= disks_stay || qemu.runs();
        let unchanged = self.freezes() && !changed;
        let Some(work) = self.source.work.as_deref_mut() else { return };
        work.heard.push_back(Heard::Saved(work.aborted_pauses, unchanged));
        say!(self, "source: device state saved");
    }

    /// Lets the guest run here (`bring_back`, `come_back`).
    pub(super) fn source_resumes(&mut self) {
        let qemu = &mut self.qemus[0];
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if work.machine.is_some() && std::mem::take(&mut work.refuses) {
            say!(self, "source: QEMU refuses");
            // It is left to the watchdog and the recovery.
            work.steps.clear();
        } else if qemu.alive {
            work.stopped = false;
            qemu.tracked = None;
            self.as_it_was();
        } else if work.machine.is_some() {
            // There is nothing to bring back; the recovery says so.
            work.steps.clear();
        }
    }

    /// The link is lost, and the guest does not stand still for it (`run_on`).
    pub(super) fn source_runs_on(&mut self) {
        let forgetful = self.has(PlantedBug::WritesLostByRunningOn);
        let qemu = &mut self.qemus[0];
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if !qemu.alive || std::mem::take(&mut work.refuses) {
            return work.broke("let the guest run on");
        }
        (work.stopped, work.saved) = (false, false);
        work.aborted_pauses += 1;
        if forgetful {
            qemu.tracked = Some(Pages::default());
        }
        self.as_it_was();
    }

    pub(super) fn source_ends(&mut self, end: SourceEnd) {
        say!(self, "source: ends, {}", short(&end));
        if matches!(&end, SourceEnd::Failed { what, .. } if what == "the protocol") {
            self.breach(|| format!("two honest sides are out of step: {end:?}"));
        }
        let Some(work) = self.source.work.as_deref() else { return };
        let lost = work.begun && work.control.is_none() && end != SourceEnd::Completed;
        let calls =
            lost && self.setup.rejoin && (!work.stopped || self.has(PlantedBug::CallsOffWithoutGuest));
        self.source_hangs_up();
        self.end_spool();
        self.source.work = None;
        self.qemus[0].tracked = None;
        self.watchdog_is_alone();
        if calls {
            self.begin_call();
        }
        self.call_off(Timer::Doubt);
        self.call_off(Timer::Again(Side::Source));
        self.call_off(Timer::Patience(Side::Source));
        self.call_off(Timer::GiveUp(Side::Source));
        // `Job::run`: whatever the journal still says is settled as after a restart.
        if *self.source.journal.read() != Departure::None {
            self.take_up();
        }
    }
}
