//! The source's connections: what the core's link wants done with them; and how the source asks the record.
//! Mirrors the executor in `engine/source/link.rs` and `engine/source/ownership.rs`.

use super::{Do, Heard, Job, Reopened, Stream, bitmap, pages, purposes};
use crate::{
    driver::Driver,
    link::{Conn, Purpose, Side, Word},
    pages::{Contents, MOST, Pages, UNKNOWN},
    planted::PlantedBug,
    printed::Printed,
    record::{Answer, Asked},
    world::{Timer, World, say},
};
use proto::{LinkEffect, LinkEvent, Rest, SourceEvent, control::Kind};
use std::collections::VecDeque;

impl World {
    /// Something has happened to the link: does what follows.
    pub(super) fn source_link(&mut self, event: LinkEvent) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let Some(work) = self.source.work.as_deref_mut() else { return };
            for effect in work.link.handle(event) {
                say!(self, "source: link {effect:?}");
                events.extend(self.link_effect(effect));
            }
        }
    }

    fn link_effect(&mut self, effect: LinkEffect) -> Option<LinkEvent> {
        let unreached = || LinkEvent::Unreached(proto::Answer::None, "nobody answers".into());
        match effect {
            LinkEffect::HangUp => {
                self.call_off(Timer::Patience(Side::Source));
                self.source_hangs_up();
            }
            LinkEffect::Dial => {
                let Some(id) = self.dial(Purpose::Resume) else { return Some(unreached()) };
                self.set(Timer::Patience(Side::Source));
                let work = self.source.work.as_deref_mut()?;
                (work.control, work.refused) = (Some(id), false);
            }
            LinkEffect::AwaitWord => {}
            LinkEffect::AwaitGiveUp => {
                self.call_off(Timer::GiveUp(Side::Source));
                self.set(Timer::GiveUp(Side::Source));
            }
            LinkEffect::Wait(_) => self.set(Timer::Again(Side::Source)),
            LinkEffect::LookAtFile => return self.target_is_complete().then_some(LinkEvent::Complete),
            LinkEffect::Open => {
                self.call_off(Timer::Patience(Side::Source));
                let work = self.source.work.as_deref_mut()?;
                work.steps.extend([Do::DialStreams, Do::AwaitStreams]);
            }
            LinkEffect::Tell(event) => {
                self.nothing_is_awaited();
                if let SourceEvent::Rejoined(received) = event {
                    self.not_again(received);
                }
                self.source_event(event);
            }
            LinkEffect::GiveUp(_) => {
                self.nothing_is_awaited();
                self.source.work.as_deref_mut()?.broke("reconnect");
            }
            LinkEffect::EndStream(stream) => {
                let work = self.source.work.as_deref_mut()?;
                work.kept = None;
                let stream = work.streams.get_mut(stream as usize)?;
                (stream.ended, stream.job) = (true, Job::Rest);
                let id = stream.conn;
                self.shut(id, Side::Source);
            }
            LinkEffect::OpenStream(stream) => {
                let Some(id) = self.dial(Purpose::Data(stream as u8)) else {
                    return Some(LinkEvent::StreamNotOpened(stream, "nobody answers".into()));
                };
                let reopened = Reopened { stream: stream as u8, conn: (id, false), back: None };
                self.source.work.as_deref_mut()?.reopened.push(reopened);
            }
            LinkEffect::GoOn(stream) => self.stream_goes_on(stream as u8),
        }
        None
    }

    /// Nothing of the link is waited for any more.
    fn nothing_is_awaited(&mut self) {
        for timer in [Timer::Again(Side::Source), Timer::Patience(Side::Source), Timer::GiveUp(Side::Source)]
        {
            self.call_off(timer);
        }
    }

    /// What has become of a call that the link waits for, once that is known.
    pub(super) fn link_is_answered(&self) -> Option<LinkEvent> {
        let work = self.source.work.as_deref()?;
        let answer = |id: u16| {
            let conn = self.conns.iter().find(|conn| conn.id == id);
            let over = |conn: &Conn| conn.over[0].is_some() || !conn.open[0];
            match conn {
                Some(conn) => conn.welcome.or(over(conn).then_some(false)),
                None => Some(false),
            }
        };
        if work.link.is_dialling()
            && let Some(id) = work.control
            && let Some(welcome) = answer(id)
        {
            let refused = |conn: &Conn| conn.id == id && conn.welcome == Some(false);
            let unknown = work.refused || self.conns.iter().any(refused);
            let said = if unknown { proto::Answer::Unknown } else { proto::Answer::None };
            return Some(match welcome {
                true => LinkEvent::Reached,
                false => LinkEvent::Unreached(said, "it does not answer".into()),
            });
        }
        work.reopened.iter().filter(|reopened| !reopened.conn.1).find_map(|reopened| {
            let stream = u32::from(reopened.stream);
            Some(match answer(reopened.conn.0)? {
                true => LinkEvent::StreamOpened(stream),
                false => LinkEvent::StreamNotOpened(stream, "it is not welcome".into()),
            })
        })
    }

    /// The driver hears of it.
    pub(super) fn link_hears(&mut self, event: LinkEvent) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if let LinkEvent::StreamOpened(stream) = event {
            let mine = work.reopened.iter_mut().filter(|reopened| u32::from(reopened.stream) == stream);
            mine.for_each(|reopened| reopened.conn.1 = true);
        }
        self.source_link(event);
    }

    /// A word of the target that only the link is interested in. Says whether it was one.
    pub(super) fn link_word(&mut self, kind: &mut Kind) -> bool {
        let dropped = self.has(PlantedBug::MissingDroppedOnReconnect);
        let Some(work) = self.source.work.as_deref_mut() else { return true };
        let first = work.link.awaits_word();
        let event = match kind {
            Kind::Received(received) if first => {
                work.received = received.blocks.first().map_or(Pages::default(), pages);
                LinkEvent::Received(received.round, work.received.iter().count() as u64)
            }
            Kind::StillMissing(still) if first => {
                if dropped {
                    still.blocks = vec![bitmap(work.to_push)];
                }
                work.missing = still.blocks.first().map_or(work.missing, pages);
                LinkEvent::NowMissing
            }
            Kind::Settled(_) if first => LinkEvent::Settled,
            Kind::StreamLost(lost) if (lost.stream as usize) < work.streams.len() => {
                LinkEvent::StreamLost(lost.stream, "the target has lost it".into())
            }
            Kind::StreamReopened(back) => {
                let stream = back.stream;
                let mut reopened = work.reopened.iter_mut();
                let Some(reopened) = reopened.find(|reopened| u32::from(reopened.stream) == stream) else {
                    return true;
                };
                reopened.back = Some(Printed(std::mem::take(back)));
                LinkEvent::StreamReopened(stream)
            }
            _ => return false,
        };
        self.source_link(event);
        true
    }

    /// Ends all connections (`hang_up`).
    pub fn source_hangs_up(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        work.link.hung_up();
        work.kept = None;
        work.spooling.core.hung_up();
        let streams = std::mem::take(&mut work.streams);
        let reopened = std::mem::take(&mut work.reopened);
        let ids = streams.iter().map(|s| s.conn).chain(work.answering.take()).chain(work.control.take());
        let ids = ids.chain(reopened.iter().map(|reopened| reopened.conn.0));
        for id in ids.collect::<Vec<_>>() {
            self.shut(id, Side::Source);
        }
    }

    /// `open_streams`, its first half.
    pub fn dial_streams(&mut self) {
        let mut streams = Vec::new();
        let mut answering = None;
        for purpose in purposes(&self.setup) {
            let Some(id) = self.dial(purpose) else { return self.streams_failed() };
            match purpose {
                Purpose::Faults => answering = Some(id),
                _ => {
                    streams.push(Stream { conn: id, job: Job::Rest, mine: Pages::default(), ended: false });
                }
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
        if !all {
            return self.streams_failed();
        }
        // Over these connections nothing was sent yet. A target to which nothing ever was is blank; of what
        // else it has, nothing is known.
        let blank = work.round == 0 || self.bug == Some(PlantedBug::SentTakenForBlank);
        if self.bug != Some(PlantedBug::SentKept) || blank {
            work.sent = Contents([if blank { 0 } else { UNKNOWN }; MOST]);
        }
        work.to_push = Pages::default();
        self.source_link(LinkEvent::Opened);
    }

    fn streams_failed(&mut self) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        work.steps.retain(|step| *step != Do::AwaitStreams);
        if work.steps.contains(&Do::StreamsOpen) {
            work.broke("open the streams");
        } else {
            self.source_link(LinkEvent::NotOpened("a stream cannot be opened".into()));
        }
    }

    /// The link was waited for as long as the user wants.
    pub fn source_gives_up(&mut self) {
        self.source_link(LinkEvent::GaveUp);
    }

    /// The link is back, and so are the streams (`not_again`).
    fn not_again(&mut self, received: u32) {
        let nothing = self.has(PlantedBug::RestNotSent);
        let believed = self.has(PlantedBug::UnsureCountsAsReceived);
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let has = std::mem::take(&mut work.received);
        let unsure = std::mem::take(&mut work.spooling.unsure);
        match Rest::of(work.round, received) {
            Rest::OfFile if believed => {}
            Rest::OfFile => work.dirty = work.dirty.or(unsure),
            Rest::Part if nothing => work.set = Pages::default(),
            Rest::Part => work.set = work.set.less(has),
            Rest::Whole => {}
        }
        work.unacknowledged = if received < work.round { work.set } else { Pages::default() };
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
        self.say_on(id, Side::Source, Word::Claim(claim));
        if let Some(work) = self.source.work.as_deref_mut() {
            work.asking = id;
            work.answer = id.is_none().then_some(Answer::Unknown);
        }
    }

    /// A claim on its way to a record elsewhere. An earlier one of this side is no longer waited for, and may
    /// arrive all the same.
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
        let impatient = self.has(PlantedBug::TimeoutDecides);
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
        asking.into_iter().for_each(|id| self.shut(id, Side::Source));
    }

    /// A time of the source's has come.
    pub fn source_timer(&mut self, timer: Timer) {
        let Some(work) = self.source.work.as_deref_mut() else { return };
        if timer == Timer::Again(Side::Source) {
            if std::mem::take(&mut work.asks_later) {
                work.steps.extend([Do::Ask, Do::AwaitAnswer]);
            } else {
                self.source_link(LinkEvent::Again);
            }
            return;
        }
        match work.steps.front() {
            Some(Do::AwaitStreams) => {
                work.steps.pop_front();
                self.streams_failed();
            }
            Some(Do::AwaitAnswer) => {
                work.steps.pop_front();
                self.source_is_answered();
            }
            _ if work.link.is_up() => {}
            _ => self.source_link(LinkEvent::Silent("the target does not answer".into())),
        }
    }
}
