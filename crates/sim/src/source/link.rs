//! The source's connections, and how it asks the record. Mirrors `engine/source/link.rs` and `SourceDriver::claim`.

use super::{Do, Heard, Job, Stream, purposes};
use crate::{
    driver::Driver,
    fault::Fault,
    link::{Purpose, Side, Word},
    pages::{MOST, Pages, UNKNOWN},
    printed::Printed,
    record::{Answer, Asked},
    world::{Timer, World, say},
};
use proto::{
    SourceEvent,
    control::{self, Kind},
};

impl World {
    /// Ends all connections (`hang_up`).
    pub fn source_hangs_up(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let streams = std::mem::take(&mut work.streams);
        let ids = streams.iter().map(|s| s.conn).chain(work.answering.take()).chain(work.control.take());
        for id in ids.collect::<Vec<_>>() {
            if let Some(conn) = self.conn(id) {
                conn.shut(Side::Source);
            }
        }
    }

    /// `open_streams`, its first half.
    pub fn dial_streams(&mut self) {
        let mut streams = Vec::new();
        let mut answering = None;
        for purpose in purposes(&self.setup) {
            let Some(id) = self.dial(purpose) else { return self.streams_failed() };
            match purpose {
                Purpose::Fault => answering = Some(id),
                _ => streams.push(Stream { conn: id, job: Job::Rest, mine: Pages::default() }),
            }
        }
        self.set(Timer::Patience(Side::Source));
        if let Some(work) = self.source.work.as_deref_mut() {
            (work.streams, work.answering) = (streams, answering);
        }
    }

    /// Its second half: all of them are welcome, or not.
    pub fn streams_answered(&mut self) {
        self.call_off(Timer::Patience(Side::Source));
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let mut ids = work.streams.iter().map(|s| s.conn).chain(work.answering);
        let all = ids.all(|id| {
            self.conns.iter().any(|c| c.id == id && c.welcome == Some(true) && c.over[0].is_none())
        });
        if all {
            // Over these connections nothing was sent yet. A target to which nothing ever was is blank; of what else it has, nothing
            // is known.
            let blank = work.round == 0 || self.fault == Some(Fault::SentTakenForBlank);
            if self.fault != Some(Fault::SentKept) || blank {
                work.sent = [if blank { 0 } else { UNKNOWN }; MOST];
            }
            work.owing = Pages::default();
        } else {
            self.streams_failed();
        }
    }

    fn streams_failed(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if work.steps.contains(&Do::StreamsOpen) {
            work.broke("open the streams");
        } else {
            self.resume_failed();
        }
    }

    /// One attempt to connect again (`resume`).
    pub fn dial_resume(&mut self) {
        let Some(id) = self.dial(Purpose::Resume) else { return self.resume_failed() };
        self.set(Timer::Patience(Side::Source));
        if let Some(work) = self.source.work.as_deref_mut() {
            work.control = Some(id);
            work.refused = false;
            work.steps.push_back(Do::AwaitResume);
        }
    }

    /// It is welcome, or not.
    pub fn resume_answered(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let id = work.control;
        if self.conns.iter().any(|c| Some(c.id) == id && c.welcome == Some(true)) {
            work.steps.push_back(Do::AwaitWord);
        } else if work.rejoining
            && (work.refused || self.conns.iter().any(|c| Some(c.id) == id && c.welcome == Some(false)))
        {
            // It has given up meanwhile.
            self.call_off(Timer::Patience(Side::Source));
            self.source_hangs_up();
            self.rejoin_failed("reconnect");
        } else {
            self.resume_failed();
        }
    }

    /// The target's first word says whether it lacks anything at all.
    pub fn first_word(&mut self) {
        self.call_off(Timer::Patience(Side::Source));
        let dropped = self.has(Fault::OwedDroppedOnReconnect);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let new = work.heard.iter_mut().skip(work.later);
        for heard in new {
            work.later += 1;
            match heard {
                Heard::Said(kind) => match &mut kind.0 {
                    // It speaks of a guest that runs there.
                    Kind::Settled(_) | Kind::StillOwed(_) if work.rejoining => break,
                    Kind::Landed(landed) if work.rejoining => {
                        let rest = landed.blocks.first().map_or(Pages::default(), super::pages);
                        let rejoined = Do::Rejoined(landed.round, rest);
                        work.steps.extend([Do::DialStreams, Do::AwaitStreams, rejoined]);
                        return;
                    }
                    Kind::Settled(_) => return,
                    Kind::StillOwed(still) => {
                        if dropped {
                            still.blocks = vec![super::bitmap(work.owing)];
                        }
                        work.steps.extend([Do::DialStreams, Do::AwaitStreams]);
                        return;
                    }
                    _ => {}
                },
                Heard::Silent(conn) if Some(*conn) == work.control => break,
                _ => {}
            }
        }
        self.resume_failed();
    }

    fn resume_failed(&mut self) {
        self.call_off(Timer::Patience(Side::Source));
        self.set(Timer::Again(Side::Source));
        self.source_hangs_up();
        let rejoining = self.source.work.as_deref().is_some_and(|work| work.rejoining);
        let complete = !rejoining && self.target_is_complete();
        let Some(work) = self.source.work.as_deref_mut() else { return };
        work.steps.clear();
        if complete {
            say!(self, "source: the datastore says that the target has everything");
            let settled = Printed(Kind::Settled(control::Settled::default()));
            work.heard.push_back(Heard::Said(settled));
            self.call_off(Timer::Again(Side::Source));
        } else if !work.rejoining {
            work.steps.extend([Do::Wait, Do::DialResume]);
        } else if work.gave_up {
            self.rejoin_failed("the connection to the target");
        } else {
            work.steps.extend([Do::StillWanted, Do::Wait, Do::StillWanted, Do::DialResume]);
        }
    }

    /// The link was waited for in vain.
    fn rejoin_failed(&mut self, what: &str) {
        self.call_off(Timer::Again(Side::Source));
        self.call_off(Timer::GiveUp(Side::Source));
        if let Some(work) = self.source.work.as_deref_mut() {
            work.rejoining = false;
            work.broke(what);
        }
    }

    /// Whether the user wants the link to be waited for any longer.
    pub fn still_wanted(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if work.heard.iter().any(|heard| matches!(heard, Heard::Cancel)) {
            // It is among what is heard next.
            work.rejoining = false;
            work.steps.clear();
            self.call_off(Timer::Again(Side::Source));
            self.call_off(Timer::GiveUp(Side::Source));
        }
    }

    /// The link was waited for as long as the user wants: the attempt that is being made is the last.
    pub fn source_gives_up(&mut self) {
        if let Some(work) = self.source.work.as_deref_mut() {
            work.gave_up = true;
        }
    }

    /// The link is back, and so are the streams (`rejoin`, `not_again`).
    pub fn source_has_rejoined(&mut self, landed: u32, rest: Pages) {
        /// A link that is lost so often without a page having arrived in between is no use.
        const STUCK: u8 = 3;
        let nothing = self.has(Fault::RestNotSent);
        let believed = self.has(Fault::UnsureCountsAsLanded);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let here = Some((landed, rest.iter().count() as u32));
        work.lost_here = (here, if work.lost_here.0 == here { work.lost_here.1 + 1 } else { 0 });
        if work.lost_here.1 >= STUCK {
            return self.rejoin_failed("the connection to the target");
        }
        let unsure = std::mem::take(&mut work.spooling.unsure);
        if work.round <= landed && !believed {
            // What its streams carried is there; what the file was to bring of it may not be (I2).
            work.dirty = work.dirty.or(unsure);
        }
        if work.round == landed + 1 {
            work.set = if nothing { Pages::default() } else { work.set.less(rest) };
        }
        work.unacknowledged = if landed < work.round { work.set } else { Pages::default() };
        work.rejoining = false;
        work.event(SourceEvent::Rejoined(landed));
        self.call_off(Timer::GiveUp(Side::Source));
    }

    /// Asks the record: over a connection of its own, or elsewhere.
    pub fn source_asks(&mut self) {
        self.set(Timer::Patience(Side::Source));
        if self.source.work.as_ref().is_some_and(|work| work.machine.is_some()) {
            self.set(Timer::Doubt);
        }
        let claim = Asked { claimer: Side::Source };
        if !self.held_by_target() {
            self.ask_elsewhere(Side::Source, claim);
            return;
        }
        let id = self.dial(Purpose::Record);
        if let Some(conn) = id.and_then(|id| self.conn(id)) {
            conn.say(Side::Source, Word::Claim(claim));
        }
        if let Some(work) = self.source.work.as_deref_mut() {
            work.asking = id;
            work.answer = id.is_none().then_some(Answer::Unknown);
        }
    }

    /// A claim on its way to a record elsewhere. An earlier one of this side is no longer waited for, and may arrive all the same.
    pub fn ask_elsewhere(&mut self, side: Side, claim: Asked) {
        for (from, _, waited) in &mut self.record.asked {
            *waited &= *from != side;
        }
        self.record.answers[side.at()] = None;
        self.record.asked.push((side, claim, true));
    }

    /// The record has answered, or will not.
    pub fn source_is_answered(&mut self) {
        self.call_off(Timer::Patience(Side::Source));
        let impatient = self.has(Fault::TimeoutDecides);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let mut answer = work.answer.take().unwrap_or(Answer::Unknown);
        let asking = work.asking.take();
        say!(self, "source: the record says {answer:?}");
        if answer == Answer::Unknown {
            work.in_vain = work.in_vain.saturating_add(1).min(3);
            if impatient && work.in_vain > 1 {
                answer = Answer::Yours(0);
            }
        }
        if work.machine.is_some() {
            work.heard.push_back(Heard::Answer(answer));
        } else {
            work.steps.extend(super::recovery::after(answer));
        }
        if answer == Answer::Unknown {
            self.set(Timer::Again(Side::Source));
        } else {
            self.call_off(Timer::Doubt);
        }
        if let Some(conn) = asking.and_then(|id| self.conn(id)) {
            conn.shut(Side::Source);
        }
    }

    /// A time of the source's has come.
    pub fn source_timer(&mut self, timer: Timer) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if timer == Timer::Again(Side::Source) {
            return;
        }
        match work.steps.front() {
            Some(Do::AwaitStreams) => {
                work.steps.pop_front();
                self.streams_failed();
            }
            Some(Do::AwaitResume | Do::AwaitWord) => self.resume_failed(),
            Some(Do::AwaitAnswer) => {
                work.steps.pop_front();
                self.source_is_answered();
            }
            _ => {}
        }
    }
}
