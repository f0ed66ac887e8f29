//! The source's agent and driver. Mirrors `engine/source.rs` with `engine/source/link.rs`, `engine/ship.rs`
//! and `agent/store/source.rs`, cut at each point at which a crash matters.

use crate::{
    driver::Driver,
    fault::Fault,
    link::{Purpose, Side, Word},
    pages::{MOST, Pages, Table},
    printed::Printed,
    qemu::Was,
    setup::{Keeper, Setup},
    watchdog::Word::{Back, Pausing, Promised},
    world::{Timer, Weather, World, say},
};
use proto::{
    LinkEvent, SourceAct, SourceEvent,
    control::{self, Kind},
};

mod call_off; // how the target learns that it is over
mod hears; // what it makes of what it hears
mod link; // its connections, and how it asks the record
mod looking; // what others have done, and what the guest is let do again
mod recovery; // after a restart
mod spooling; // the file on the datastore
mod steps; // its acts, step by step
mod streams; // how it sends pages
mod work; // what it holds

pub(crate) use call_off::Call;
pub(crate) use spooling::{Said, Spooling};
pub(crate) use work::{Departure, Do, Heard, Job, Reopened, Saving, SourceAgent, Stream, Work};

impl World {
    /// Whether the source's thread can go on.
    pub fn source_can(&self) -> bool {
        let Some(work) = self.source.work.as_deref().filter(|_| self.up[0]) else { return false };
        match work.steps.front() {
            None => !work.todo.is_empty() || !work.heard.is_empty() || self.link_is_answered().is_some(),
            Some(Do::AwaitStreams) => {
                let conns = work.streams.iter().map(|s| s.conn).chain(work.answering);
                self.all_answered(conns)
            }
            Some(Do::AwaitAnswer) => {
                work.answer.is_some()
                    || work.asking.is_some_and(|id| {
                        self.conns.iter().find(|c| c.id == id).is_none_or(|c| {
                            c.welcome == Some(false) || (c.over[0].is_some() && c.to[0].is_empty())
                        })
                    })
            }
            Some(Do::Wait) => !self.is_set(Timer::Again(Side::Source)),
            // While it is being saved, QEMU cannot be asked.
            Some(Do::Thaw | Do::Resume | Do::RunOn) => {
                work.saving.is_none() || self.has(Fault::OldStateBelieved)
            }
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
        // Nothing is heard of a control connection before it is known to be welcome; of a stream's, that is
        // known last.
        let answer = self.link_is_answered();
        if answer.as_ref().is_some_and(|answer| !matches!(answer, LinkEvent::StreamOpened(_))) {
            return answer.into_iter().for_each(|answer| self.link_hears(answer));
        }
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if let Some(heard) = work.heard.pop_front() {
            say!(self, "source: hears {}", short(&heard));
            return self.source_hears(heard);
        }
        answer.into_iter().for_each(|answer| self.link_hears(answer));
    }

    /// Begins an act (`SourceDriver::act`).
    fn source_act(&mut self, act: SourceAct) {
        let early = self.has(Fault::PermitBeforePromise);
        let look_first = self.has(Fault::LookBeforeTracking);
        let pause_first = self.has(Fault::PauseBeforeJournal);
        let read_early = self.has(Fault::ReadBeforeProtect);
        let told_late = self.has(Fault::WatchdogToldLate);
        let hash_early = self.has(Fault::HashedTooEarly);
        if act == SourceAct::Rejoin {
            self.leave_spool();
        }
        let frozen_late = self.has(Fault::FrozenAfterPermit);
        let asked_in_vain = self.is_set(Timer::Again(Side::Source));
        if act == SourceAct::JournalPause {
            self.look_at_run_state();
        }
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let (pausing, departure) = (Pausing(work.was), Departure::Pausing(work.was));
        let promised = Departure::Promised(work.was);
        let steps: &[Do] = match act {
            SourceAct::Send(kind) => {
                if frozen_late && matches!(kind, Kind::Permit(_)) {
                    work.steps.push_back(Do::Freeze);
                }
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
            SourceAct::JournalPause if pause_first => return,
            SourceAct::JournalPause if told_late => &[Do::Journal(departure), Do::Sync],
            SourceAct::JournalPause => &[Do::Tell(pausing), Do::Journal(departure), Do::Sync],
            SourceAct::StopGuest if pause_first => {
                &[Do::Stop, Do::Tell(pausing), Do::Journal(departure), Do::Sync, Do::Stopped]
            }
            SourceAct::StopGuest if told_late => &[Do::Stop, Do::Tell(pausing), Do::Stopped],
            SourceAct::StopGuest => &[Do::Stop, Do::Stopped],
            SourceAct::SendOwed => &[Do::Collect, Do::SayOwed],
            SourceAct::Save => {
                work.saving = Some(Saving::Begun);
                if hash_early {
                    work.hashes = hashes(&self.qemus[0].ram.pages, self.setup.pages);
                }
                return;
            }
            SourceAct::SendState(after_round) => {
                if self.setup.verify {
                    if !hash_early {
                        work.hashes = hashes(&self.qemus[0].ram.pages, self.setup.pages);
                    }
                    let hashes = std::mem::take(&mut work.hashes);
                    let hashes = control::Hashes { block: 0, start: 0, hashes, holes: 0 };
                    let control = work.control;
                    if let Some(conn) = control.and_then(|id| self.conn(id)) {
                        conn.say(Side::Source, Word::Say(Printed(Kind::Hashes(hashes))));
                    }
                }
                self.announce_relaxed();
                let Some(work) = self.source.work.as_deref_mut() else { return };
                let was = u64::from(work.was == Was::Stood) << STOOD;
                let stream = control::Packed { raw: u64::from(work.state) | was, lz4: vec![] };
                let state = control::State { after_round, stream: Some(stream), ..Default::default() };
                let control = work.control;
                if let Some(conn) = control.and_then(|id| self.conn(id)) {
                    conn.say(Side::Source, Word::Say(Printed(Kind::State(state))));
                }
                return self.source_event(SourceEvent::StateSent);
            }
            SourceAct::Promise if early && !std::mem::replace(&mut work.permitted_early, true) => {
                work.event(SourceEvent::Promised);
                work.todo.push_back(Printed(SourceAct::Promise));
                return;
            }
            SourceAct::HoldGuest => &[Do::Hold],
            SourceAct::Promise => &[Do::Journal(promised), Do::Sync, Do::Tell(Promised), Do::Promised],
            SourceAct::ResumeGuest => {
                if !work.stopped {
                    return;
                }
                &[Do::Thaw, Do::Resume, Do::Insist(Departure::None), Do::Sync, Do::Tell(Back)]
            }
            SourceAct::RunOn => {
                let owed = std::mem::take(&mut work.owed);
                work.undone = true;
                if self.fault != Some(Fault::OwedLostByRunningOn) {
                    work.dirty = work.dirty.or(owed);
                }
                if !work.stopped {
                    return;
                }
                &[Do::Thaw, Do::RunOn, Do::Insist(Departure::None), Do::Sync, Do::Tell(Back)]
            }
            SourceAct::Claim => {
                work.asks_later = asked_in_vain;
                let steps = &[Do::HangUp, Do::Ask, Do::AwaitAnswer];
                if asked_in_vain { &steps[..1] } else { steps }
            }
            SourceAct::Gone(_) => {
                work.asks_later = false;
                self.timers.retain(|(_, timer)| *timer != Timer::Again(Side::Source));
                &[Do::Insist(Departure::Gone), Do::Sync]
            }
            SourceAct::ServeOwed => {
                work.owing = work.owed;
                work.all_do(Job::Push);
                return self.spool_owed();
            }
            SourceAct::Reconnect => return self.source_link(LinkEvent::Reconnect),
            SourceAct::Rejoin => {
                if self.ghost.weather == Weather::OneCut {
                    self.ghost.weather = Weather::OneCutWaitedFor;
                }
                return self.source_link(LinkEvent::Rejoin);
            }
            SourceAct::ShipRest(_) => &[Do::GiveRest],
            SourceAct::Forget => {
                // The journal forgets the VM in the same step, and its QEMU is ended thereafter.
                &[
                    Do::HangUp,
                    Do::Untrack,
                    Do::Insist(Departure::Settled),
                    Do::Sync,
                    Do::EndSpool,
                    Do::Destroy,
                ]
            }
            SourceAct::End(end) => return self.source_ends(end),
        };
        work.steps.extend(steps);
    }

    /// The record that decides is the target's, or elsewhere.
    pub fn held_by_target(&self) -> bool {
        self.setup.keeper == Keeper::Target
    }
}

/// Where a device state says that the guest stood still: above the state itself.
pub(crate) const STOOD: u32 = 16;

/// A page set as it travels. Not compressed: proto has its own tests for that.
pub(crate) fn bitmap(pages: Pages) -> control::Bitmap {
    control::Bitmap { pages: MOST as u64, packed: pages.0.to_le_bytes().to_vec() }
}

/// The page set that travelled.
pub(crate) fn pages(bitmap: &control::Bitmap) -> Pages {
    Pages(bitmap.packed.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)))
}

/// Each page's hash: here its content.
fn hashes(ram: &Table, pages: u8) -> Vec<u64> {
    (0..pages).map(|page| u64::from(ram.at(page).content)).collect()
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
