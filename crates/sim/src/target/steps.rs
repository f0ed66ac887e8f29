//! The target's acts, step by step: between any two of them everything can happen. Mirrors
//! `TargetDriver::effect`.

use super::{Arrival, Do, Heard, Recording, WritePolicy};
use crate::{
    driver::Driver,
    link::Side,
    pages::Pages,
    planted::PlantedBug,
    qemu::{Qemu, Run, Was},
    record::{Answer, Asked, Owner},
    setup::Keeper,
    spool::Own,
    world::{Timer, World, say},
};
use proto::{
    TargetEvent,
    control::{self, Kind},
};

impl World {
    /// One step of an act.
    pub(super) fn target_does(&mut self, step: Do) {
        let holes_stay = self.has(PlantedBug::HolesNotMade);
        let idempotent = !self.has(PlantedBug::ClaimNotIdempotent);
        let forgetful = self.has(PlantedBug::AbandonForgetsRecord);
        let late = self.has(PlantedBug::MissingNotRecorded);
        let skipped = self.has(PlantedBug::VerifySkipped);
        let kept = self.has(PlantedBug::MissingKeptByTarget);
        let written = self.has(PlantedBug::MissingKeptInJournal);
        let complete = self.has(PlantedBug::CompleteTooEarly);
        let regardless = self.has(PlantedBug::TargetForgetsRunState);
        let qemu = &mut self.qemus[1];
        let Some(work) = self.target.work.as_deref_mut() else { return };
        let stood = work.was == Was::Stood;
        let can_fail = matches!(step, Do::Start | Do::Punch(_));
        if can_fail && std::mem::take(&mut work.fails) {
            say!(self, "target: that fails");
            if step == Do::Start {
                work.steps.clear();
                return work.event(TargetEvent::Prepared(Err(vec!["chance".into()])));
            }
            return work.broke("act");
        }
        match step {
            Do::Start => {
                *qemu = Qemu::waiting();
                qemu.watched = self.setup.post_copy();
                work.watches = qemu.watched;
            }
            Do::Accept => {
                let held = self.setup.keeper == Keeper::Target;
                self.target.store.write(|store| {
                    store.offer = held.then_some(Owner::BEFORE);
                    store.arrival = Some(Arrival::default());
                    store.seen = true;
                });
            }
            Do::Sync => self.target_syncs(),
            Do::OpenSpool => self.open_spool(),
            Do::Prepared => {
                work.event(TargetEvent::Prepared(Ok(())));
                self.find_kept();
            }
            Do::Punch(missing) => {
                work.stage = WritePolicy::PostCopy;
                for page in missing.iter().filter(|_| !holes_stay) {
                    qemu.ram.punch(page);
                    self.ghost.damaged.drop(page);
                }
                work.missing = work.missing.or(missing);
            }
            Do::AwaitRecorded | Do::AwaitSpoolRecorded => {}
            Do::Record => {
                if !late {
                    work.recording = Recording::Asked(work.missing);
                }
                if work.missing.none() {
                    work.heard.push_back(Heard::AllPlaced);
                }
            }
            Do::ForgetAnnounced => {
                work.hashes.clear();
                if work.stage == WritePolicy::PostCopy && !kept {
                    work.stage = WritePolicy::Before;
                    work.missing = Pages::default();
                    if let Some(spool) = &mut work.spool {
                        spool.core.forget();
                    }
                    if !written {
                        work.recording = Recording::Asked(Pages::default());
                    }
                }
            }
            Do::MissingRecorded => work.event(TargetEvent::MissingRecorded),
            Do::Compare => {
                let differs = |page: &u8| {
                    work.hashes.get(usize::from(*page)) != Some(&u64::from(qemu.ram.at(*page).content))
                };
                let all = Pages::first(self.setup.pages).less(work.missing);
                let same = match all.iter().find(differs).filter(|_| !skipped) {
                    Some(page) => Err(format!("page {page} differs")),
                    None => Ok(()),
                };
                say!(self, "target: compares: {same:?}");
                work.event(TargetEvent::Compared(same));
            }
            Do::Enter => {
                if work.missing.none() {
                    work.stage = WritePolicy::Closed;
                }
            }
            Do::Loaded => {
                self.timers.retain(|(_, timer)| *timer != Timer::Patience(Side::Target));
                work.event(TargetEvent::Loaded);
            }
            Do::Claim => {
                let claim = Asked { claimer: Side::Target };
                let mut answer = Answer::Unknown;
                self.target.store.write(|store| {
                    if let Some(offer) = &mut store.offer {
                        answer = offer.claim(claim, idempotent);
                    }
                    if let (Answer::Yours(_), Some(arrival)) = (answer, &mut store.arrival) {
                        arrival.claimed = true;
                        arrival.stood = stood;
                    }
                });
                work.answer = Some(answer);
            }
            Do::Claimed => {
                let answer = work.answer.take().unwrap_or(Answer::Unknown);
                self.target_is_answered(answer);
            }
            Do::Intend => self.target.store.write(|store| {
                if let Some(arrival) = &mut store.arrival {
                    arrival.claiming = true;
                    arrival.stood = stood;
                }
            }),
            Do::Ask => {
                work.answer = None;
                self.ask_elsewhere(Side::Target, Asked { claimer: Side::Target });
                self.set(Timer::Patience(Side::Target));
            }
            Do::AwaitAnswer => {
                let answer = work.answer.take().unwrap_or(Answer::Unknown);
                self.call_off(Timer::Patience(Side::Target));
                self.target_is_answered(answer);
            }
            Do::Won => self.target.store.write(|store| {
                if let Some(arrival) = &mut store.arrival {
                    arrival.claimed = true;
                }
            }),
            Do::TellWon => work.event(TargetEvent::ClaimWon(crate::record::EPOCH + 1)),
            Do::Wait => {}
            Do::Resume => {
                work.arrived = true;
                work.recording_spool = work.record_late.take().unwrap_or(work.recording_spool);
                if complete && self.spool.own == Some(Own::Made) {
                    self.spool.own = Some(Own::Asked);
                }
                if late {
                    work.recording = Recording::Asked(work.missing);
                }
                if qemu.alive {
                    work.spool.iter_mut().for_each(|spool| spool.core.place());
                    work.event(TargetEvent::Resumed { at_ns: 1 });
                    qemu.started = true;
                    qemu.run = Run::Paused;
                    if !stood || regardless {
                        self.guest_runs(Side::Target);
                    }
                } else {
                    work.event(TargetEvent::ResumeFailed("QEMU is gone".into()));
                }
            }
            Do::Run => {
                if qemu.started && self.ghost.wanted.is_some_and(Run::stands_still) {
                    // Whether it was let run before the agent died is not recorded.
                    self.ghost.wanted = None;
                }
                if qemu.alive {
                    qemu.started = true;
                    if qemu.run == Run::Prelaunch {
                        qemu.run = Run::Paused;
                    }
                    if qemu.run.stands_still() && (!stood || regardless) {
                        self.guest_runs(Side::Target);
                    }
                }
            }
            Do::Close => {
                work.stage = WritePolicy::Closed;
                work.watches = false;
                // Whoever waits goes on: what was not sent is zeros.
                qemu.watched = false;
                qemu.waits_for = None;
            }
            Do::Settle => self.target.store.write(|store| {
                if store.arrival.as_ref().is_some_and(|arrival| arrival.claimed) {
                    store.arrival = None;
                    store.arrived = true;
                }
            }),
            Do::EndSpool => self.end_spool_here(),
            Do::SaySettled => self.target_says(Kind::Settled(control::Settled::default())),
            Do::Destroy => {
                qemu.die();
                self.drop_spool();
            }
            Do::Abandon => self.target.store.write(|store| {
                if store.arrival.as_ref().is_none_or(|arrival| !arrival.claimed) {
                    store.arrival = None;
                    if let Some(offer) = &mut store.offer {
                        offer.open = false;
                    }
                    if forgetful {
                        store.offer = None;
                    }
                }
            }),
            Do::Forget => self.target.store.write(|store| store.offer = None),
            Do::TakeUp => self.target_takes_up(),
            Do::Over => self.target.work = None,
        }
    }

    /// What came of a claim.
    fn target_is_answered(&mut self, answer: Answer) {
        say!(self, "target: the record says {answer:?}");
        let held = self.held_by_target();
        if answer == Answer::Unknown {
            self.set(Timer::Again(Side::Target));
        }
        let Some(work) = self.target.work.as_deref_mut() else { return };
        if work.machine.is_none() {
            return self.target_recovery_is_answered(answer);
        }
        match answer {
            Answer::Yours(epoch) if held => work.event(TargetEvent::ClaimWon(epoch)),
            Answer::Yours(_) => work.steps.extend([Do::Won, Do::Sync, Do::TellWon]),
            Answer::Lost(_) => work.event(TargetEvent::ClaimLost("the source".into())),
            Answer::Unknown => work.event(TargetEvent::ClaimUnknown("not known".into())),
        }
    }
}
