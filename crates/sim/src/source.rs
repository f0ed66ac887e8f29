//! The source's agent and driver. Mirrors `engine/source.rs` with `engine/source/link.rs`,
//! `engine/send.rs` and `agent/store/source.rs`, cut at each point at which a crash matters.

use crate::{
    driver::Driver,
    link::{Purpose, Side},
    pages::{MOST, Pages, Table},
    planted::PlantedBug,
    printed::Printed,
    qemu::Was,
    setup::{Keeper, Setup},
    watchdog::Word::{Back, Fenced, Pausing},
    world::{Conditions, Timer, World, say},
};
use proto::{
    LinkEvent, SourceEffect, SourceEvent, SpoolEvent,
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
pub(crate) use spooling::Spooling;
pub(crate) use work::{Departure, Do, Heard, Job, KeptTable, Reopened, Saving, SourceAgent, Stream, Work};

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
            Some(Do::Thaw | Do::Resume | Do::AbortPause) => {
                work.saving.is_none() || self.has(PlantedBug::OldStateBelieved)
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
        if let Some(effect) = work.todo.pop_front() {
            say!(self, "source: act {}", short(&effect.0));
            return self.source_act(effect.0);
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

    /// Begins an act (`SourceDriver::effect`).
    fn source_act(&mut self, effect: SourceEffect) {
        let early = self.has(PlantedBug::AuthorizesBeforeFence);
        let look_first = self.has(PlantedBug::LookBeforeTracking);
        let pause_first = self.has(PlantedBug::PauseBeforeJournal);
        let read_early = self.has(PlantedBug::ReadBeforeProtect);
        let told_late = self.has(PlantedBug::WatchdogToldLate);
        let hash_early = self.has(PlantedBug::HashedTooEarly);
        if effect == SourceEffect::Rejoin {
            self.source_spool(SpoolEvent::Left);
        }
        let frozen_late = self.has(PlantedBug::FrozenAfterAuthorization);
        let asked_in_vain = self.is_set(Timer::Again(Side::Source));
        if effect == SourceEffect::JournalPause {
            self.look_at_run_state();
        }
        let Some(work) = self.source.work.as_deref_mut() else { return };
        work.moment = false;
        let (pausing, departure) = (Pausing(work.was), Departure::Pausing(work.was));
        let fenced = Departure::Fenced(work.was);
        let steps: &[Do] = match effect {
            SourceEffect::Send(kind) => {
                if frozen_late && matches!(kind, Kind::Authorize(_)) {
                    work.steps.push_back(Do::Freeze);
                }
                return self.source_says(kind);
            }
            SourceEffect::OpenStreams if look_first => {
                &[Do::Look, Do::Track, Do::DialStreams, Do::AwaitStreams, Do::StreamsOpen]
            }
            SourceEffect::OpenStreams => {
                &[Do::Track, Do::Look, Do::DialStreams, Do::AwaitStreams, Do::StreamsOpen]
            }
            SourceEffect::SendRound(round) => {
                work.steps.extend(read_early.then_some(Do::ReadEarly));
                work.steps.extend([Do::Collect, Do::Give(round)]);
                return;
            }
            SourceEffect::Decide => &[Do::Collect, Do::Decide],
            SourceEffect::JournalPause if pause_first => return,
            SourceEffect::JournalPause if told_late => &[Do::Journal(departure), Do::Sync],
            SourceEffect::JournalPause => &[Do::Tell(pausing), Do::Journal(departure), Do::Sync],
            SourceEffect::StopGuest if pause_first => {
                &[Do::Stop, Do::Tell(pausing), Do::Journal(departure), Do::Sync, Do::Stopped]
            }
            SourceEffect::StopGuest if told_late => &[Do::Stop, Do::Tell(pausing), Do::Stopped],
            SourceEffect::StopGuest => &[Do::Stop, Do::Stopped],
            SourceEffect::SendMissing => &[Do::Collect, Do::SayMissing],
            SourceEffect::Save => {
                work.saving = Some(Saving::Begun);
                if hash_early {
                    work.hashes = hashes(&self.qemus[0].ram.pages, self.setup.pages);
                }
                return;
            }
            SourceEffect::SendState(after_round) => {
                if self.setup.verify {
                    if !hash_early {
                        work.hashes = hashes(&self.qemus[0].ram.pages, self.setup.pages);
                    }
                    let hashes = std::mem::take(&mut work.hashes);
                    let hashes = control::Hashes { block: 0, start: 0, hashes, holes: 0 };
                    self.source_says(Kind::Hashes(hashes));
                }
                self.source_spool(SpoolEvent::Sending(self.spool.appended().into()));
                let Some(work) = self.source.work.as_deref_mut() else { return };
                let was = u64::from(work.was == Was::Stood) << STOOD;
                let stream = control::Compressed { raw: u64::from(work.state) | was, lz4: vec![] };
                let state = control::State { after_round, stream: Some(stream), ..Default::default() };
                self.source_says(Kind::State(state));
                return self.source_event(SourceEvent::StateSent);
            }
            SourceEffect::Fence if early && !std::mem::replace(&mut work.authorized_early, true) => {
                work.event(SourceEvent::Fenced);
                work.todo.push_back(Printed(SourceEffect::Fence));
                return;
            }
            SourceEffect::HoldGuest => &[Do::Hold],
            SourceEffect::Fence => &[Do::Journal(fenced), Do::Sync, Do::Tell(Fenced), Do::Fenced],
            SourceEffect::ResumeGuest => {
                if !work.stopped {
                    return;
                }
                &[Do::Thaw, Do::Resume, Do::Insist(Departure::None), Do::Sync, Do::Tell(Back)]
            }
            SourceEffect::AbortPause => {
                let missing = std::mem::take(&mut work.missing);
                work.undone = true;
                if self.bug != Some(PlantedBug::MissingLostByRunningOn) {
                    work.dirty = work.dirty.or(missing);
                }
                if !work.stopped {
                    return work.event(SourceEvent::RanOn(false));
                }
                &[Do::Thaw, Do::AbortPause, Do::Insist(Departure::None), Do::Sync, Do::Tell(Back), Do::RanOn]
            }
            SourceEffect::Claim => {
                work.asks_later = asked_in_vain;
                let steps = &[Do::HangUp, Do::Ask, Do::AwaitAnswer];
                if asked_in_vain { &steps[..1] } else { steps }
            }
            SourceEffect::Gone(_) => {
                work.asks_later = false;
                self.timers.retain(|(_, timer)| *timer != Timer::Again(Side::Source));
                &[Do::Insist(Departure::Gone), Do::Sync]
            }
            SourceEffect::ServeMissing => {
                work.to_push = work.missing;
                if work.round > 0 {
                    work.kept = None;
                }
                work.all_do(Job::Push);
                return self.spool_missing();
            }
            SourceEffect::Reconnect => return self.source_link(LinkEvent::Reconnect),
            SourceEffect::Rejoin => {
                if self.ghost.conditions == Conditions::OneCut {
                    self.ghost.conditions = Conditions::OneCutWaitedFor;
                }
                return self.source_link(LinkEvent::Rejoin);
            }
            SourceEffect::SendRest(_) => &[Do::GiveRest],
            SourceEffect::Forget => {
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
            SourceEffect::End(end) => return self.source_ends(end),
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
    control::Bitmap { pages: MOST as u64, compressed: pages.0.to_le_bytes().to_vec() }
}

/// The page set that travelled.
pub(crate) fn pages(bitmap: &control::Bitmap) -> Pages {
    Pages(bitmap.compressed.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)))
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
    let bug = setup.post_copy().then_some(Purpose::Faults);
    (0..setup.streams).map(Purpose::Data).chain(bug)
}
