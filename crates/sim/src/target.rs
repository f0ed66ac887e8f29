//! The target's agent and driver. Mirrors `engine/target.rs` with `engine/target/link.rs`, `engine/accept.rs`
//! and `agent/store/target.rs`, cut at each point at which a crash matters.

use crate::{
    driver::Driver,
    link::{Over, Side, Word},
    pages::{Contents, Pages},
    planted::PlantedBug,
    printed::Printed,
    qemu::Was,
    record::Answer,
    setup::Keeper,
    source::{STOOD, bitmap, pages, short},
    world::{Timer, World, say},
};
use proto::{
    TargetEffect, TargetEnd, TargetEvent,
    control::{self, Kind},
};

mod kept; // what it keeps of the VM from before
mod link; // its connections
mod receiving; // pages into memory, and faults out of it
mod recovery; // after a restart
mod spooling; // the file that pages come by, too
mod steps; // its acts, step by step
mod store; // the threads that write its store
mod work; // what it holds

pub(crate) use spooling::{SpoolRecord, SpoolRecording, Unspool, Unspooled};
pub(crate) use work::{Arrival, Do, Heard, Recording, Session, TargetAgent, WritePolicy};

/// How the record is asked.
const ASK_HERE: &[Do] = &[Do::Claim, Do::Sync, Do::Claimed];
const ASK_ELSEWHERE: &[Do] = &[Do::Intend, Do::Sync, Do::Ask, Do::AwaitAnswer];

impl World {
    /// Whether the target's thread can go on.
    pub fn target_can(&self) -> bool {
        let Some(work) = self.target.work.as_deref().filter(|_| self.up[1]) else { return false };
        match work.steps.front() {
            None => !work.todo.is_empty() || !work.heard.is_empty() || self.load_can(),
            Some(Do::AwaitRecorded) => work.recording == Recording::Done,
            // The journal is one thread's at a time, and what is missing may still be being recorded.
            Some(Do::AwaitSpoolRecorded) => work.recording_spool == SpoolRecording::Done,
            Some(Do::Settle | Do::Abandon) => {
                work.recording == Recording::Done
                    && work.recording_spool == SpoolRecording::Done
                    && self.store_is_free()
            }
            Some(Do::Accept | Do::Claim | Do::Intend | Do::Won | Do::Forget) => self.store_is_free(),
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
        if let Some(effect) = work.todo.pop_front() {
            say!(self, "target: act {}", short(&effect.0));
            return self.target_act(effect.0);
        }
        match work.heard.pop_front() {
            Some(heard) => {
                say!(self, "target: hears {}", short(&heard));
                self.target_hears(heard);
            }
            None => self.target_loads(),
        }
    }

    /// Whether the thread that loads a device state can go on: it reads the rings of the virtio devices,
    /// which are in page 0.
    fn load_can(&self) -> bool {
        let qemu = &self.qemus[1];
        let there = !qemu.alive || !qemu.watched || qemu.ram.present.has(0) || qemu.waits_for.is_none();
        there && self.target.work.as_deref().is_some_and(|work| work.loading)
    }

    /// It goes on, beside the driver, which hears what else happens first.
    fn target_loads(&mut self) {
        let Some(work) = self.target.work.as_deref_mut() else { return };
        let qemu = &mut self.qemus[1];
        if !qemu.alive || std::mem::take(&mut work.fails) {
            work.loading = false;
            return work.broke("load the device state");
        }
        if !qemu.can_touch(0) {
            // Somebody must answer this fault.
            return self.set(Timer::Patience(Side::Target));
        }
        say!(self, "target: the device state is loaded");
        work.loading = false;
        qemu.state = Some(work.state);
        work.steps.extend([Do::AwaitRecorded, Do::AwaitSpoolRecorded, Do::Loaded]);
    }

    /// Begins an act (`TargetDriver::effect`).
    fn target_act(&mut self, effect: TargetEffect) {
        let early = self.has(PlantedBug::ClaimAfterCont);
        let held = self.setup.keeper == Keeper::Target;
        let asked_in_vain = self.is_set(Timer::Again(Side::Target));
        let Some(work) = self.target.work.as_deref_mut() else { return };
        let steps: &[Do] = match effect {
            TargetEffect::Send(mut kind) => {
                if let Kind::Ready(ready) = &mut kind {
                    ready.spool = work.spool.is_some();
                    ready.kept = work.keeps();
                }
                let tells = matches!(kind, Kind::Ready(_));
                self.target_says(kind);
                if tells {
                    self.tell_kept();
                }
                return;
            }
            TargetEffect::Prepare(prepare) => {
                work.wants_spool = prepare.spool.is_some();
                &[Do::Start, Do::Accept, Do::Sync, Do::OpenSpool, Do::Prepared]
            }
            TargetEffect::TakeMissing(bitmaps) => {
                let missing = bitmaps.first().map_or(Pages::default(), pages);
                work.steps.extend([Do::Punch(missing), Do::AwaitRecorded, Do::Record, Do::MissingRecorded]);
                return;
            }
            TargetEffect::ForgetAnnounced => {
                &[Do::AwaitRecorded, Do::AwaitSpoolRecorded, Do::ForgetAnnounced]
            }
            TargetEffect::KeepHashes(hashes) => return work.hashes = hashes.hashes,
            TargetEffect::Compare => &[Do::Compare],
            TargetEffect::Load(state) => {
                let raw = state.stream.map_or(0, |stream| stream.raw);
                work.state = raw as u16;
                work.was = if raw >> STOOD == 0 { Was::Ran } else { Was::Stood };
                work.loading = true;
                &[Do::Enter]
            }
            TargetEffect::Claim => {
                work.steps.extend(early.then_some(Do::Run));
                // A driver that asked in vain asks a little later.
                work.asks_later = asked_in_vain;
                match (asked_in_vain, held) {
                    (true, _) => &[],
                    (false, true) => ASK_HERE,
                    (false, false) => ASK_ELSEWHERE,
                }
            }
            TargetEffect::Resume => &[Do::Resume],
            TargetEffect::SendStillMissing => {
                let still =
                    control::StillMissing { blocks: vec![bitmap(work.missing)], ..Default::default() };
                return self.target_says(Kind::StillMissing(still));
            }
            TargetEffect::SendReceived => {
                let blocks = vec![bitmap(work.received)];
                let received = control::Received { round: work.round, blocks, ..Default::default() };
                return self.target_says(Kind::Received(received));
            }
            TargetEffect::Settle => &[Do::Close, Do::Settle, Do::Sync, Do::EndSpool, Do::SaySettled],
            TargetEffect::Destroy => {
                (work.watches, work.loading) = (false, false);
                work.steps.extend([Do::Destroy, Do::Abandon, Do::Sync]);
                if work.source_is_back {
                    work.steps.extend([Do::Forget, Do::Sync]);
                }
                return;
            }
            TargetEffect::End(end) => return self.target_ends(&end),
        };
        work.steps.extend(steps);
    }

    /// What was heard (`look_at`).
    fn target_hears(&mut self, heard: Heard) {
        let streams = self.setup.streams;
        let regardless = self.has(PlantedBug::GivesUpAfterAuthorization);
        let Some(work) = self.target.work.as_deref_mut() else { return };
        match heard {
            Heard::Spooled(conn, spooled) => self.spooled(conn, &spooled.0),
            Heard::Unspooled(said) => self.hear_unspooled(said),
            Heard::Said(conn, kind) if work.control != Some(conn) && !matches!(kind.0, Kind::Failed(_)) => {}
            Heard::Said(_, kind) => {
                if self.target_spool_word(&kind) {
                    return;
                }
                let Some(work) = self.target.work.as_deref_mut() else { return };
                work.source_is_back |= matches!(kind.0, Kind::Failed(_));
                work.authorized |= matches!(kind.0, Kind::Authorize(_));
                work.event(TargetEvent::Message(kind.0));
            }
            Heard::AllPlaced => {
                if work.missing.none() {
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
                    work.received = Pages::default();
                    work.kept = Contents::default();
                    work.event(TargetEvent::Received(round));
                }
            }
            Heard::Lost(conn, over) => {
                if self.stream_lost(conn) {
                    return;
                }
                let Some(work) = self.target.work.as_deref_mut() else { return };
                if work.control == Some(conn) || work.conns.contains(&conn) {
                    self.target_hangs_up();
                    if self.setup.rejoin && !self.has(PlantedBug::NeverGivesUp) {
                        // Soon enough the source has given up, too.
                        self.set(match over {
                            Over::Closed => Timer::Closed,
                            Over::Cut => Timer::GiveUp(Side::Target),
                        });
                    }
                    if let Some(work) = self.target.work.as_deref_mut() {
                        work.event(TargetEvent::LinkLost("it broke".into()));
                    }
                }
            }
            Heard::GiveUp => {
                let authorized = work.authorized;
                work.event(TargetEvent::GiveUp("it was lost, and not back in time".into()));
                if regardless && authorized && work.todo.is_empty() {
                    let (what, why) = ("the connection".into(), "it is lost".into());
                    let effects = [TargetEffect::Destroy, TargetEffect::End(TargetEnd::Failed { what, why })];
                    work.todo.extend(effects.map(Printed));
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
        if matches!(end, TargetEnd::Failed { what, .. } if what == "the protocol") {
            self.breach(|| format!("two honest sides are out of step: {end:?}"));
        }
        self.target_hangs_up();
        if let Some(work) = self.target.work.take() {
            // By now the source has written its last word into its file, or never will.
            self.spool.doomed[1] |= work.spool_settled && self.spool.file.is_some();
            // What was accepted for it in this very moment ends with it.
            for heard in work.heard {
                if let Heard::Attach(id) = heard {
                    self.shut(id, Side::Target);
                }
            }
        }
        for timer in [Timer::Again(Side::Target), Timer::Patience(Side::Target)] {
            self.call_off(timer);
        }
        self.target_is_patient();
    }

    /// A source that was lost is not waited for any longer; or the agent ends.
    pub fn target_gives_up(&mut self) {
        self.target_is_patient();
        if let Some(work) = self.target.work.as_deref_mut().filter(|work| work.machine.is_some()) {
            work.heard.push_back(Heard::GiveUp);
        }
    }

    /// Nothing is waited for.
    fn target_is_patient(&mut self) {
        for timer in [Timer::GiveUp(Side::Target), Timer::Closed] {
            self.call_off(timer);
        }
    }

    pub(super) fn target_says(&mut self, kind: Kind) {
        let control = self.target.work.as_deref().and_then(|work| work.control);
        self.say_on(control, Side::Target, Word::Say(Printed(kind)));
    }

    /// A time of the target's has come.
    pub fn target_timer(&mut self, timer: Timer) {
        let held = self.held_by_target();
        let Some(work) = self.target.work.as_deref_mut() else { return };
        if timer == Timer::Again(Side::Target) {
            if std::mem::take(&mut work.asks_later) {
                work.steps.extend(if held { ASK_HERE } else { ASK_ELSEWHERE });
            }
            return;
        }
        // QEMU did not load it in time: nobody answered its fault.
        if std::mem::take(&mut work.loading) {
            return work.broke("load the device state");
        }
        if let Some(Do::AwaitAnswer) = work.steps.front() {
            work.answer = Some(Answer::Unknown);
        }
    }
}
