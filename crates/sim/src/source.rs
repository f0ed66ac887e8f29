//! The source's agent and driver. Mirrors `engine/source.rs` with `engine/source/link.rs`, `engine/ship.rs` and
//! `agent/store/source.rs`, cut at each point at which a crash matters.

use crate::{
    fault::Fault,
    link::{Purpose, Side, Word},
    pages::{MOST, Pages},
    printed::Printed,
    record::Answer,
    setup::{Keeper, Setup, Spooling, Way},
    world::{Timer, World, say},
};
use proto::{
    SourceAct, SourceEnd, SourceEvent, Step,
    control::{self, Kind},
};

mod link; // its connections, and how it asks the record
mod recovery; // after a restart
mod streams; // how it sends pages
mod work; // what it holds

pub(crate) use work::{Departure, Do, Heard, Job, Saving, SourceAgent, Stream, Work};

impl World {
    /// Whether the source's thread can go on.
    pub fn source_can(&self) -> bool {
        let Some(work) = self.source.work.as_deref().filter(|_| self.up[0]) else { return false };
        match work.steps.front() {
            None => !work.todo.is_empty() || !work.heard.is_empty(),
            Some(Do::AwaitStreams) => {
                let conns = work.streams.iter().map(|s| s.conn).chain(work.answering);
                self.all_answered(conns)
            }
            Some(Do::AwaitResume) => self.all_answered(work.control.into_iter()),
            Some(Do::AwaitWord) => work.heard.iter().skip(work.later).any(|h| {
                let word =
                    matches!(h, Heard::Said(k) if matches!(k.0, Kind::Settled(_) | Kind::StillOwed(_)));
                word || matches!(h, Heard::Silent(conn) if Some(*conn) == work.control)
            }),
            Some(Do::AwaitAnswer) => {
                work.answer.is_some()
                    || work.asking.is_some_and(|id| {
                        self.conns.iter().find(|c| c.id == id).is_none_or(|c| {
                            c.welcome == Some(false) || (c.over[0].is_some() && c.to[0].is_empty())
                        })
                    })
            }
            Some(Do::AwaitSpool) => {
                let lucky = self.has(Fault::SpoolNotSynced);
                work.owed.less(if lucky { self.spool.written } else { self.spool.durable }).none()
            }
            Some(Do::Wait) => {
                !self.is_set(Timer::Again(Side::Source))
                    || work.heard.iter().skip(work.later).any(|h| matches!(h, Heard::Resolved))
            }
            // While it is being saved, QEMU cannot be asked.
            Some(Do::Resume) => work.saving.is_none(),
            Some(_) => true,
        }
    }

    /// Whether each of these was welcomed, or never will be.
    fn all_answered(&self, mut conns: impl Iterator<Item = u16>) -> bool {
        conns.all(|id| {
            let conn = self.conns.iter().find(|c| c.id == id);
            conn.is_none_or(|c| c.welcome.is_some() || c.over[0].is_some())
        })
    }

    /// One step of the source's thread.
    pub fn source_moves(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if let Some(step) = work.steps.pop_front() {
            say!(self, "source: {step:?}");
            return self.source_does(step);
        }
        if let Some(act) = work.todo.pop_front() {
            say!(self, "source: act {}", short(&act.0));
            return self.source_act(act.0);
        }
        if let Some(heard) = work.heard.pop_front() {
            work.later = work.later.saturating_sub(1);
            say!(self, "source: hears {}", short(&heard));
            self.source_hears(heard);
        }
    }

    /// Begins an act (`SourceDriver::act`).
    fn source_act(&mut self, act: SourceAct) {
        let strict = self.setup.spooling == Spooling::Strict;
        let early = self.has(Fault::PermitBeforePromise);
        let look_first = self.has(Fault::LookBeforeTracking);
        let pause_first = self.has(Fault::PauseBeforeJournal);
        let read_early = self.has(Fault::ReadBeforeProtect);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let steps: &[Do] = match act {
            SourceAct::Send(kind) => {
                let control = work.control;
                if let Some(conn) = control.and_then(|id| self.conn(id)) {
                    conn.say(Side::Source, Word::Say(Printed(kind)));
                }
                return;
            }
            SourceAct::OpenStreams if look_first => {
                &[Do::Look, Do::Track, Do::DialStreams, Do::AwaitStreams, Do::StreamsOpen]
            }
            SourceAct::OpenStreams => {
                &[Do::Track, Do::Look, Do::DialStreams, Do::AwaitStreams, Do::StreamsOpen]
            }
            SourceAct::Ship(round) => {
                work.steps.extend(read_early.then_some(Do::ReadEarly));
                work.steps.extend([Do::Collect, Do::Give(round)]);
                return;
            }
            SourceAct::Decide => &[Do::Collect, Do::Decide],
            SourceAct::StopGuest if pause_first => {
                &[Do::Stop, Do::Journal(Departure::Pausing), Do::Sync, Do::Stopped]
            }
            SourceAct::StopGuest => &[Do::Journal(Departure::Pausing), Do::Sync, Do::Stop, Do::Stopped],
            SourceAct::SendOwed => &[Do::Collect, Do::SayOwed],
            SourceAct::Save => {
                work.saving = Some(Saving::Begun);
                return;
            }
            SourceAct::SendState(after_round) => {
                let stream = control::Packed { raw: u64::from(work.state), lz4: vec![] };
                let state = control::State { after_round, stream: Some(stream), ..Default::default() };
                let control = work.control;
                if let Some(conn) = control.and_then(|id| self.conn(id)) {
                    conn.say(Side::Source, Word::Say(Printed(Kind::State(state))));
                }
                return;
            }
            SourceAct::Promise if early && !std::mem::replace(&mut work.permitted_early, true) => {
                work.event(SourceEvent::Promised);
                work.todo.push_back(Printed(SourceAct::Promise));
                return;
            }
            SourceAct::Promise if strict => {
                Timer::Patience(Side::Source).set_in(&mut self.timers);
                &[Do::AwaitSpool, Do::Journal(Departure::Promised), Do::Sync, Do::Promised]
            }
            SourceAct::Promise => &[Do::Journal(Departure::Promised), Do::Sync, Do::Promised],
            SourceAct::ResumeGuest => {
                if !work.stopped {
                    return;
                }
                &[Do::Resume, Do::Insist(Departure::None), Do::Sync]
            }
            SourceAct::Claim => &[Do::HangUp, Do::Wait, Do::Ask, Do::AwaitAnswer],
            SourceAct::Gone(_) => &[Do::Insist(Departure::Gone), Do::Sync],
            SourceAct::ServeOwed => {
                work.owing = work.owed;
                work.streams.iter_mut().for_each(|stream| stream.job = Job::Push);
                return;
            }
            SourceAct::Reconnect => &[Do::HangUp, Do::DialResume],
            SourceAct::ShipRest(_) | SourceAct::Rejoin => {
                unreachable!("a link that is lost before the commit is not waited for here (give_up_ms is 0)")
            }
            SourceAct::Forget => {
                // The journal forgets the VM in the same step, and its QEMU is ended thereafter.
                &[Do::HangUp, Do::Untrack, Do::Insist(Departure::Settled), Do::Sync, Do::Destroy]
            }
            SourceAct::End(end) => return self.source_ends(end),
        };
        work.steps.extend(steps);
    }

    /// One step of an act.
    fn source_does(&mut self, step: Do) {
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
            return work.broke("act");
        }
        match step {
            Do::Journal(state) | Do::Insist(state) => self.source.journal.write(|entry| *entry = state),
            Do::Sync => {
                if self.fault == Some(Fault::PromiseNotSynced)
                    && *self.source.journal.read() == Departure::Promised
                {
                    return self.set(Timer::Lazy(Side::Source));
                }
                self.source.journal.sync();
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
                    work.dirty = work.dirty.or(*written);
                    *written = Pages::default();
                }
                _ => work.broke("collect"),
            },
            Do::Give(round) => {
                work.round = round;
                work.parts = 0;
                work.set = std::mem::take(&mut work.dirty);
                work.left = work.set;
                work.unacknowledged = work.unacknowledged.or(work.set);
                for stream in &mut work.streams {
                    stream.job = Job::Round;
                    stream.mine = Pages::default();
                }
            }
            Do::Decide => {
                work.rounds += 1;
                self.guest.wake(self.setup.busy);
                let step = match self.setup.way {
                    Way::PreCopy if work.rounds < self.setup.rounds => Step::Round,
                    Way::PreCopy => Step::Switchover,
                    Way::Hybrid | Way::PostCopy => Step::PostCopy,
                };
                work.event(SourceEvent::Decided(step));
            }
            Do::Stop => {
                work.stopped = true;
                if !qemu.alive {
                    return work.broke("stop the guest");
                }
                qemu.runs = false;
                self.at_stop = Some(Box::new(self.guest.clone()));
            }
            Do::Stopped => work.event(SourceEvent::Stopped),
            Do::StreamsOpen => {
                work.begun = true;
                self.guest.wake(self.setup.busy);
                work.event(SourceEvent::StreamsOpen);
            }
            Do::Promised => work.event(SourceEvent::Promised),
            Do::SayOwed => {
                let owed = std::mem::take(&mut work.dirty);
                work.owed = work.owed.or(owed);
                self.guest.wake(self.setup.busy);
                let control = work.control;
                let owed = control::Owed { blocks: vec![bitmap(owed)] };
                if let Some(conn) = control.and_then(|id| self.conn(id)) {
                    conn.say(Side::Source, Word::Say(Printed(Kind::Owed(owed))));
                }
            }
            Do::AwaitSpool => self.call_off(Timer::Patience(Side::Source)),
            Do::Resume => self.source_resumes(),
            Do::HangUp => self.source_hangs_up(),
            Do::Wait => {
                work.later = work.heard.len();
                self.call_off(Timer::Again(Side::Source));
            }
            Do::Ask => self.source_asks(),
            Do::AwaitAnswer => self.source_is_answered(),
            Do::DialStreams => self.dial_streams(),
            Do::AwaitStreams => self.streams_answered(),
            Do::DialResume => self.dial_resume(),
            Do::AwaitResume => self.resume_answered(),
            Do::AwaitWord => self.first_word(),
            Do::Untrack => qemu.tracked = None,
            Do::Destroy => qemu.die(),
            Do::TakeUp => self.take_up(),
        }
    }

    /// What was heard (`SourceDriver::look_at`, `hear`, `saved`).
    fn source_hears(&mut self, heard: Heard) {
        let no_barrier = self.has(Fault::NoBarrier);
        let forgetful = self.has(Fault::WritesOfSaveForgotten);
        let hasty = self.has(Fault::ForgetBeforeSettled);
        let late = self.has(Fault::CommitHeardTooLate);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        match heard {
            Heard::Said(kind) => {
                match &kind.0 {
                    Kind::StillOwed(still) => work.owed = still.blocks.first().map_or(work.owed, pages),
                    Kind::RoundLanded(landed) if landed.round == work.round => {
                        work.unacknowledged = Pages::default();
                    }
                    _ => {}
                }
                let committed = matches!(kind.0, Kind::Committed(_));
                work.event(SourceEvent::Message(kind.0));
                if late && committed && work.control.is_none() {
                    for act in work.todo.iter_mut().filter(|act| act.0 == SourceAct::Reconnect) {
                        act.0 = SourceAct::ServeOwed;
                    }
                }
                if hasty && committed {
                    work.event(SourceEvent::Message(Kind::Settled(control::Settled::default())));
                }
            }
            Heard::Silent(conn) if work.control == Some(conn) => {
                self.source_hangs_up();
                self.source_event(SourceEvent::LinkLost("it is silent".into()));
            }
            Heard::Lost(conn)
                if work.answering == Some(conn) || work.streams.iter().any(|s| s.conn == conn) =>
            {
                self.source_hangs_up();
                self.source_event(SourceEvent::LinkLost("a stream broke".into()));
            }
            Heard::Silent(_) | Heard::Lost(_) => {}
            Heard::Shared(round) => {
                work.parts += 1;
                if usize::from(work.parts) == work.streams.len() && !work.streams.is_empty() {
                    work.event(SourceEvent::Shipped(round));
                    if no_barrier {
                        let landed = control::RoundLanded { round };
                        work.event(SourceEvent::Message(Kind::RoundLanded(landed)));
                    }
                }
            }
            Heard::Saved(true) => match &mut self.qemus[0].tracked {
                Some(written) => {
                    let written = std::mem::take(written);
                    if !forgetful {
                        work.dirty = work.dirty.or(written);
                    }
                    work.saved = true;
                    let more = !work.dirty.none();
                    work.event(SourceEvent::Saved { more });
                }
                None => work.broke("collect"),
            },
            Heard::Saved(false) => work.broke("save the device state"),
            Heard::Answer(answer) => {
                let event = match answer {
                    Answer::Yours(_) => SourceEvent::ClaimWon,
                    Answer::Lost(epoch) => SourceEvent::ClaimLost(epoch),
                    Answer::Unknown => SourceEvent::ClaimUnknown("not known".into()),
                };
                work.event(event);
            }
            Heard::Cancel => work.event(SourceEvent::Cancel),
            Heard::Resolved => work.event(SourceEvent::Resolved),
        }
    }

    fn source_event(&mut self, event: SourceEvent) {
        if let Some(work) = self.source.work.as_deref_mut() {
            work.event(event);
        }
    }

    /// The thread that saves the device state (`Machine::save`): devices may still write to guest memory.
    pub fn source_saves(&mut self) {
        let disks_stay = self.has(Fault::DisksStayActive);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let qemu = &mut self.qemus[0];
        if !qemu.alive || std::mem::take(&mut work.fails) {
            work.saving = None;
            return work.heard.push_back(Heard::Saved(false));
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
        qemu.has_disk &= disks_stay;
        work.heard.push_back(Heard::Saved(true));
        say!(self, "source: device state saved");
    }

    /// Lets the guest run here (`bring_back`, `come_back`).
    fn source_resumes(&mut self) {
        let qemu = &mut self.qemus[0];
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if qemu.alive {
            work.stopped = false;
            qemu.tracked = None;
            self.guest_runs(Side::Source);
        } else if work.machine.is_some() {
            // There is nothing to bring back; the recovery says so.
            work.steps.clear();
        }
    }

    fn source_ends(&mut self, end: SourceEnd) {
        say!(self, "source: ends, {}", short(&end));
        self.source_hangs_up();
        self.source.work = None;
        self.call_off(Timer::Doubt);
        self.call_off(Timer::Again(Side::Source));
        self.call_off(Timer::Patience(Side::Source));
        // `Job::run`: whatever the journal still says is settled as after a restart.
        if *self.source.journal.read() != Departure::None {
            self.take_up();
        }
    }

    /// The record that decides is the target's, or elsewhere.
    pub fn held_by_target(&self) -> bool {
        self.setup.keeper == Keeper::Target
    }
}

/// A page set as it travels. Not compressed: proto has its own tests for that.
pub(crate) fn bitmap(pages: Pages) -> control::Bitmap {
    control::Bitmap { pages: MOST as u64, packed: pages.0.to_le_bytes().to_vec() }
}

/// The page set that travelled.
pub(crate) fn pages(bitmap: &control::Bitmap) -> Pages {
    Pages(bitmap.packed.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)))
}

/// What something looks like, without what is empty in it.
pub(crate) fn short(what: &impl std::fmt::Debug) -> String {
    let mut text = format!("{what:?}");
    text.truncate(text.char_indices().nth(70).map_or(text.len(), |(at, _)| at));
    text
}

/// The link's purposes in the order in which the source dials them.
pub(crate) fn purposes(setup: &Setup) -> impl Iterator<Item = Purpose> + use<> {
    let fault = setup.post_copy().then_some(Purpose::Fault);
    (0..setup.streams).map(Purpose::Data).chain(fault)
}
