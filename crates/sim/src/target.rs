//! The target's agent and driver. Mirrors `engine/target.rs` with `engine/target/link.rs`, `engine/accept.rs` and
//! `agent/store/target.rs`, cut at each point at which a crash matters.

use crate::{
    fault::Fault,
    link::{Side, Word},
    pages::Pages,
    printed::Printed,
    qemu::Qemu,
    record::{Answer, Asked, Owner},
    setup::Keeper,
    source::{bitmap, pages, short},
    world::{Timer, World, say},
};
use proto::{
    TargetAct, TargetEnd, TargetEvent,
    control::{self, Kind},
};

mod landing; // pages into memory, and faults out of it
mod link; // its connections
mod recovery; // after a restart
mod store; // the threads that write its store
mod work; // what it holds

pub(crate) use work::{Arrival, Do, Heard, Recording, Session, Stage, TargetAgent};

impl World {
    /// Whether the target's thread can go on.
    pub fn target_can(&self) -> bool {
        let Some(work) = self.target.work.as_deref().filter(|_| self.up[1]) else { return false };
        match work.steps.front() {
            None => !work.todo.is_empty() || !work.heard.is_empty(),
            Some(Do::AwaitRecorded) => work.recording == Recording::Done,
            // The journal is one thread's at a time, and what is owed may still be being recorded.
            Some(Do::Settle | Do::Abandon) => work.recording == Recording::Done && self.store_is_free(),
            Some(Do::Accept | Do::Claim | Do::Intend | Do::Won | Do::Forget) => self.store_is_free(),
            // Loading reads the rings of the virtio devices: they are in page 0.
            Some(Do::Load) => {
                let qemu = &self.qemus[1];
                !qemu.alive || !qemu.watched || qemu.ram.present.has(0) || qemu.waits_for.is_none()
            }
            Some(Do::AwaitAnswer) => work.answer.is_some(),
            Some(Do::Wait) => !self.is_set(Timer::Again(Side::Target)),
            Some(_) => true,
        }
    }

    /// One step of the target's thread.
    pub fn target_moves(&mut self) {
        let Some(work) = self.target.work.as_deref_mut() else { return };
        if let Some(step) = work.steps.pop_front() {
            say!(self, "target: {step:?}");
            return self.target_does(step);
        }
        if let Some(act) = work.todo.pop_front() {
            say!(self, "target: act {}", short(&act.0));
            return self.target_act(act.0);
        }
        if let Some(heard) = work.heard.pop_front() {
            say!(self, "target: hears {}", short(&heard));
            self.target_hears(heard);
        }
    }

    /// Begins an act (`TargetDriver::act`).
    fn target_act(&mut self, act: TargetAct) {
        let early = self.has(Fault::ClaimAfterCont);
        let held = self.setup.keeper == Keeper::Target;
        let Some(work) = self.target.work.as_deref_mut() else { return };
        let steps: &[Do] = match act {
            TargetAct::Send(kind) => return self.target_says(kind),
            TargetAct::Prepare(_) => &[Do::Start, Do::Accept, Do::Sync, Do::Prepared],
            TargetAct::TakeOwed(bitmaps) => {
                let owed = bitmaps.first().map_or(Pages::default(), pages);
                work.steps.extend([Do::Punch(owed), Do::AwaitRecorded, Do::Record, Do::OwedTaken]);
                return;
            }
            TargetAct::KeepHashes(_) => return,
            TargetAct::Compare => return work.event(TargetEvent::Compared(Ok(()))),
            TargetAct::Load(state) => {
                work.state = state.stream.map_or(0, |stream| stream.raw as u16);
                &[Do::Enter, Do::Load, Do::AwaitRecorded, Do::Loaded]
            }
            TargetAct::Claim => {
                work.steps.extend(early.then_some(Do::Run));
                // A driver that asked in vain waits first.
                work.steps.push_back(Do::Wait);
                if held {
                    &[Do::Claim, Do::Sync, Do::Claimed]
                } else {
                    &[Do::Intend, Do::Sync, Do::Ask, Do::AwaitAnswer]
                }
            }
            TargetAct::Resume => &[Do::Resume],
            TargetAct::SendStillOwed => {
                let still = control::StillOwed { blocks: vec![bitmap(work.owed)], ..Default::default() };
                return self.target_says(Kind::StillOwed(still));
            }
            TargetAct::SendLanded => unreachable!("no source comes back before the commit (give_up_ms is 0)"),
            TargetAct::Settle => &[Do::Close, Do::Settle, Do::Sync, Do::SaySettled],
            TargetAct::Destroy => {
                work.watches = false;
                work.steps.extend([Do::Destroy, Do::Abandon, Do::Sync]);
                if work.source_is_back {
                    work.steps.extend([Do::Forget, Do::Sync]);
                }
                return;
            }
            TargetAct::End(end) => return self.target_ends(&end),
        };
        work.steps.extend(steps);
    }

    /// One step of an act.
    fn target_does(&mut self, step: Do) {
        let holes_stay = self.has(Fault::HolesNotMade);
        let idempotent = !self.has(Fault::ClaimNotIdempotent);
        let forgetful = self.has(Fault::AbandonForgetsRecord);
        let late = self.has(Fault::OwedNotRecorded);
        let qemu = &mut self.qemus[1];
        let Some(work) = self.target.work.as_deref_mut() else { return };
        let can_fail = matches!(step, Do::Start | Do::Punch(_) | Do::Load);
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
            Do::Prepared => work.event(TargetEvent::Prepared(Ok(()))),
            Do::Punch(owed) => {
                work.stage = Stage::Lacking;
                for page in owed.iter().filter(|_| !holes_stay) {
                    qemu.ram.punch(page);
                }
                work.owed = work.owed.or(owed);
            }
            Do::AwaitRecorded => {}
            Do::Record => {
                if !late {
                    work.recording = Recording::Asked(work.owed);
                }
                if work.owed.none() {
                    work.heard.push_back(Heard::AllPlaced);
                }
            }
            Do::OwedTaken => work.event(TargetEvent::OwedTaken),
            Do::Enter => {
                if work.owed.none() {
                    work.stage = Stage::Closed;
                }
            }
            Do::Load => {
                if !qemu.alive {
                    return work.broke("load the device state");
                }
                if qemu.can_touch(0) {
                    qemu.state = Some(work.state);
                } else {
                    // Somebody must answer this fault.
                    work.steps.push_front(Do::Load);
                    self.set(Timer::Patience(Side::Target));
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
                if late {
                    work.recording = Recording::Asked(work.owed);
                }
                if qemu.alive {
                    work.event(TargetEvent::Resumed { at_ns: 1 });
                    self.guest_runs(Side::Target);
                } else {
                    work.event(TargetEvent::ResumeFailed("QEMU is gone".into()));
                }
            }
            Do::Run => {
                if qemu.alive && !qemu.runs {
                    self.guest_runs(Side::Target);
                }
            }
            Do::Close => {
                work.stage = Stage::Closed;
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
            Do::SaySettled => self.target_says(Kind::Settled(control::Settled::default())),
            Do::Destroy => qemu.die(),
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

    /// What was heard (`look_at`).
    fn target_hears(&mut self, heard: Heard) {
        let streams = self.setup.streams;
        let Some(work) = self.target.work.as_deref_mut() else { return };
        match heard {
            Heard::Said(kind) => {
                work.source_is_back |= matches!(kind.0, Kind::Failed(_));
                work.event(TargetEvent::Message(kind.0));
            }
            Heard::AllPlaced => {
                if work.owed.none() {
                    work.event(TargetEvent::AllPlaced);
                }
            }
            Heard::Attach(conn) => self.attach(conn),
            Heard::RoundEnd(conn, stream, round) => {
                if !work.conns.contains(&conn) || round != work.round + 1 {
                    return;
                }
                work.ended |= 1 << stream;
                if work.ended.count_ones() == u32::from(streams) {
                    work.round = round;
                    work.ended = 0;
                    work.event(TargetEvent::Landed(round));
                }
            }
            Heard::Lost(conn) => {
                if work.control == Some(conn) || work.conns.contains(&conn) {
                    self.target_hangs_up();
                    if let Some(work) = self.target.work.as_deref_mut() {
                        work.event(TargetEvent::LinkLost("it broke".into()));
                    }
                }
            }
            Heard::Wrong(conn) => {
                if !work.conns.contains(&conn) {
                    return;
                }
                if !work.arrived {
                    return work.event(TargetEvent::Broke {
                        what: "understand the source".into(),
                        why: "its words are wrong".into(),
                    });
                }
                self.target_hangs_up();
                if let Some(work) = self.target.work.as_deref_mut() {
                    work.event(TargetEvent::LinkLost("its words are wrong".into()));
                }
            }
        }
    }

    fn target_ends(&mut self, end: &TargetEnd) {
        say!(self, "target: ends, {}", short(end));
        self.target_hangs_up();
        if let Some(work) = self.target.work.take() {
            // What was accepted for it in this very moment ends with it.
            for heard in work.heard {
                if let Heard::Attach(id) = heard
                    && let Some(conn) = self.conn(id)
                {
                    conn.shut(Side::Target);
                }
            }
        }
        self.call_off(Timer::Again(Side::Target));
        self.call_off(Timer::Patience(Side::Target));
    }

    fn target_says(&mut self, kind: Kind) {
        let Some(work) = self.target.work.as_deref_mut() else { return };
        let control = work.control;
        if let Some(conn) = control.and_then(|id| self.conn(id)) {
            conn.say(Side::Target, Word::Say(Printed(kind)));
        }
    }

    /// A time of the target's has come.
    pub fn target_timer(&mut self, timer: Timer) {
        let Some(work) = self.target.work.as_deref_mut() else { return };
        if timer == Timer::Again(Side::Target) {
            return;
        }
        match work.steps.front() {
            // QEMU did not load it in time: nobody answered its fault.
            Some(Do::Load) => work.broke("load the device state"),
            Some(Do::AwaitAnswer) => work.answer = Some(Answer::Unknown),
            _ => {}
        }
    }
}
