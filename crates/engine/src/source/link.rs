//! The source's connections: opened, lost, opened again as the core's [`proto::Link`] decides.

use super::{Signal, SourceDriver};
use crate::{
    Broken,
    compression::BatchCompressor,
    conn::{Conn, LONG_SILENCE, PING, SILENCE, Speaker, listen, now_ns},
    gate::Gate,
    queue::{PushQueue, RoundQueue},
    send::{Said, StreamContext, Streams, serve_faults},
};
use proto::{
    Answer, LinkEffect, LinkEvent, NoLink, Purpose, Rest, SourceEvent, SpoolEvent, Token, control,
    outlives_link,
};
use std::{
    collections::VecDeque,
    io::{self, Write},
    ops::ControlFlow::{self, Break, Continue},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// How long to wait before the target is called again to be told that the migration has ended.
const LATER: Duration = Duration::from_millis(300);

/// A call that is not answered within so long was lost, whatever the link's round trip was before:
/// `ROUND_TRIPS` times that, but at least this.
const ANSWERED: Duration = Duration::from_millis(500);
const ROUND_TRIPS: u32 = 8;

impl SourceDriver {
    /// Something has happened to the link: does what follows. Returns what the migration is told of it.
    pub(super) fn link(&mut self, event: LinkEvent) -> Option<SourceEvent> {
        let mut effects = VecDeque::from(self.link.handle(event));
        let mut told = None;
        while let Some(effect) = effects.pop_front() {
            tracing::debug!(?effect, "link");
            match self.link_effect(effect) {
                Continue(None) => {}
                Continue(Some(event)) => effects.extend(self.link.handle(event)),
                Break(event) => told = Some(event),
            }
        }
        told
    }

    /// Does one act. `Break`: the migration is told this.
    fn link_effect(&mut self, effect: LinkEffect) -> ControlFlow<SourceEvent, Option<LinkEvent>> {
        Continue(match effect {
            LinkEffect::HangUp => {
                self.hang_up();
                None
            }
            LinkEffect::Dial => {
                self.dial_again().err().map(|e| LinkEvent::Unreached(Answer::None, e.to_string()))
            }
            LinkEffect::AwaitWord => {
                let silent = LinkEvent::Silent("the target does not say what it lacks".into());
                self.link_timer = Some((Instant::now() + SILENCE, silent));
                None
            }
            LinkEffect::AwaitGiveUp => {
                self.gives_up_at = Some(Instant::now() + self.options.give_up);
                None
            }
            LinkEffect::Wait(time) => {
                self.link_timer = Some((Instant::now() + time, LinkEvent::Again));
                None
            }
            LinkEffect::LookAtFile => self.target_is_complete().then(|| {
                self.reporter.note("the datastore says that the target has everything".into());
                self.reporter.settled(&control::Settled::default());
                LinkEvent::Complete
            }),
            LinkEffect::Open => Some(match self.open_streams() {
                Ok(()) => LinkEvent::Opened,
                Err(e) => LinkEvent::NotOpened(e.to_string()),
            }),
            LinkEffect::Tell(event) => {
                (self.link_timer, self.gives_up_at) = (None, None);
                match &event {
                    SourceEvent::Rejoined(received) => {
                        self.not_again(*received);
                        self.reporter.link_is_back();
                        self.progress.link_is_back();
                        self.reporter.note(format!("connected to {} again", self.parts.to));
                    }
                    SourceEvent::Message(control::Kind::StillMissing(_)) => {
                        self.reporter.note(format!("connected to {} again", self.parts.to));
                    }
                    _ => {}
                }
                return Break(event);
            }
            LinkEffect::GiveUp(why) => {
                (self.link_timer, self.gives_up_at) = (None, None);
                return Break(self.broke(self.given_up(why)));
            }
            LinkEffect::EndStream(stream) => {
                // It may have been lost because of that; and its thread may wait there.
                self.forget_kept();
                if let Some(streams) = &self.streams {
                    streams.end(stream);
                }
                None
            }
            LinkEffect::OpenStream(stream) => {
                let opens = self.open_stream(stream);
                opens.err().map(|e| LinkEvent::StreamNotOpened(stream, e.to_string()))
            }
            LinkEffect::GoOn(stream) => match self.go_on(stream) {
                Ok(()) => None,
                Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                    return Break(self.broke(Broken::new("go on with a stream", e.to_string())));
                }
                Err(e) => Some(LinkEvent::Silent(e.to_string())),
            },
        })
    }

    /// How long until the link or the record wants something.
    pub(super) fn due_in(&self) -> Duration {
        let link = self.link_timer.as_ref().map(|(at, _)| *at);
        let moment = self.disks.due_at();
        let all = [link, self.gives_up_at, self.asks_at, self.spooling.late_at, moment];
        let first = all.into_iter().flatten().min();
        first.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()))
    }

    pub(super) fn do_what_is_due(&mut self) -> Option<SourceEvent> {
        let now = Instant::now();
        if let Some((_, event)) = self.link_timer.take_if(|(at, _)| *at <= now) {
            return self.link(event);
        }
        if self.gives_up_at.take_if(|at| *at <= now).is_some() {
            return self.link(LinkEvent::GaveUp);
        }
        if self.spooling.late_at.take_if(|at| *at <= now).is_some() {
            return self.spool(SpoolEvent::Late);
        }
        if self.asks_at.take_if(|at| *at <= now).is_some() {
            self.ask_record();
        }
        if self.disks.due_at().is_some_and(|at| at <= now) {
            return self.look_for_moment().unwrap_or_else(|failed| Some(self.broke(failed)));
        }
        None
    }

    fn given_up(&self, why: NoLink) -> Broken {
        let link = "the connection to the target";
        match why {
            NoLink::Unknown => Broken::new("reconnect", format!("{} has given up meanwhile", self.parts.to)),
            NoLink::Stuck => Broken::new(link, "it is lost again and again, at the same place"),
            NoLink::Late(why) => Broken::new(
                link,
                format!(
                    "it was lost, and not back within {} s: {why}; --give-up says how long to wait",
                    self.options.give_up.as_secs_f64()
                ),
            ),
        }
    }

    /// The link is wanted again: the target's guest waits for its pages, and nobody else has them.
    pub(super) fn reconnect(&mut self) -> Option<SourceEvent> {
        self.reporter.note(format!(
            "the connection to {} was lost; its guest waits for pages, reconnecting",
            self.parts.to
        ));
        self.link(LinkEvent::Reconnect)
    }

    /// The link is wanted again while the guest runs on here, for as long as the user wants. What was on its
    /// way is sent again (I2).
    pub(super) fn rejoin(&mut self) -> Option<SourceEvent> {
        self.hang_up();
        self.spool(SpoolEvent::Left);
        self.reporter.note(format!(
            "the connection to {} was lost; the VM runs on here, reconnecting for up to {} s (--give-up)",
            self.parts.to,
            self.options.give_up.as_secs_f64()
        ));
        self.link(LinkEvent::Rejoin)
    }

    /// Calls the target beside the driver.
    fn dial_again(&self) -> io::Result<()> {
        let patience = self.heard.round_trip().map_or(ANSWERED, |time| time * ROUND_TRIPS).max(ANSWERED);
        let (dial, tell, generation) = (self.parts.dial.clone(), self.tell.clone(), self.generation);
        let call = move || {
            let conn = dial.dial_soon(Purpose::Resume, None, patience);
            let _ = tell.send(Signal::Dialled(generation, conn));
        };
        thread::Builder::new().name("dial".into()).spawn(call).map(drop)
    }

    /// The target was called.
    pub(super) fn dialled(&mut self, conn: io::Result<Conn>) -> Option<SourceEvent> {
        let event = match conn.and_then(|conn| self.listen_on(conn, SILENCE)) {
            Ok(()) => LinkEvent::Reached,
            Err(e) => {
                tracing::debug!(%e, "not yet");
                let answer = match e.kind() {
                    io::ErrorKind::ConnectionRefused => Answer::Refused,
                    io::ErrorKind::NotFound => Answer::Unknown,
                    _ => Answer::None,
                };
                LinkEvent::Unreached(answer, e.to_string())
            }
        };
        self.link(event)
    }

    /// A word of the target, on the control connection of this generation.
    pub(super) fn hear_word(&mut self, generation: u32, kind: control::Kind) -> Option<SourceEvent> {
        let current = generation == self.generation;
        if !current && !outlives_link(&kind) {
            return None;
        }
        let first = current && self.link.awaits_word();
        match &kind {
            control::Kind::Received(received) if first => {
                let event = match proto::page_sets(&received.blocks, &self.shape) {
                    Ok(pages) => {
                        // A target that was restarted has another one.
                        self.token = Token::read(&received.token);
                        let event = LinkEvent::Received(received.round, pages.len());
                        self.received = pages;
                        event
                    }
                    Err(e) => LinkEvent::Silent(e.to_string()),
                };
                self.link(event)
            }
            control::Kind::StillMissing(still) if first => {
                self.token = Token::read(&still.token);
                match self.look_at(SourceEvent::Message(kind)) {
                    Some(SourceEvent::Message(_)) => self.link(LinkEvent::NowMissing),
                    wrong => wrong,
                }
            }
            control::Kind::Settled(settled) if first => {
                self.reporter.note(format!("connected to {} again", self.parts.to));
                self.reporter.settled(settled);
                self.link(LinkEvent::Settled)
            }
            _ => self.look_at(SourceEvent::Message(kind)),
        }
    }

    /// The target has all rounds up to this one, and these pages of the next: what is left of the current one
    /// is sent again.
    fn not_again(&mut self, received: u32) {
        let nothing = self.nothing();
        let has = std::mem::replace(&mut self.received, nothing);
        let Some(round) = self.current.clone() else { return };
        match Rest::of(round.number, received) {
            Rest::OfFile => self.dirty.union(&round.leave_file()),
            Rest::Part => {
                let mut left = round.set.clone();
                left.subtract(&has);
                self.current = Some(Arc::new(RoundQueue::new(round.number, left)));
            }
            Rest::Whole => {}
        }
    }

    /// The link was lost, and the migration has ended without the target having heard of it: it is told once
    /// it can be, as long as it waits for us. Nothing but its time is at stake: it gives up by itself. Not
    /// while the guest stands still here: its target would forget the record that is still to be asked.
    pub(super) fn call_off(&self) {
        if !self.asked || self.options.give_up.is_zero() {
            return;
        }
        let (dial, end) = (self.parts.dial.clone(), Instant::now() + self.options.give_up);
        let failed = control::Failed {
            what: "the migration".into(),
            why: "the source has ended it, and its guest runs there".into(),
            cancelled: false,
        };
        let tell = move || {
            while Instant::now() < end {
                match dial.dial_soon(Purpose::Resume, None, ANSWERED) {
                    Ok(mut conn) => {
                        let said = conn.write_all(&proto::encode(control::Kind::Failed(failed.clone())));
                        // It hangs up once it has understood; until then this side does not, so that nothing
                        // is lost in a reset.
                        let heard = said.and_then(|()| conn.silence(Some(SILENCE)));
                        if heard.and_then(|()| io::copy(&mut conn, &mut io::sink())).is_ok() {
                            return;
                        }
                    }
                    Err(e) if e.kind() == io::ErrorKind::NotFound => return,
                    Err(_) => thread::sleep(LATER),
                }
            }
        };
        if let Err(e) = thread::Builder::new().name("call-off".into()).spawn(tell) {
            tracing::debug!(%e, "the target will give up by itself");
        }
    }

    /// After so long a silence the target is taken for lost from here on.
    pub(super) fn bear_silence(&self, time: Duration) {
        if let Some(Err(e)) = self.control.as_ref().map(|conn| conn.silence(Some(time))) {
            tracing::debug!(%e, "the connection is gone already");
        }
    }

    /// Opens the first connection.
    pub(super) fn connect(&mut self) -> io::Result<()> {
        let conn = self.parts.dial.dial(Purpose::Control, None)?;
        self.listen_on(conn, LONG_SILENCE)
    }

    /// A control connection is open: a thread listens on it, and one pings.
    fn listen_on(&mut self, conn: Conn, silence: Duration) -> io::Result<()> {
        let generation = self.generation;
        let speaker = Speaker::new(conn.another()?);
        self.control = Some(conn.another()?);
        self.speaker = Some(speaker.clone());
        let (pinger, tell, heard) = (speaker.clone(), self.tell.clone(), self.heard.clone());
        thread::Builder::new().name("listen".into()).spawn(move || {
            sys::urgent::become_urgent();
            let hear = |kind| drop(tell.send(Signal::Heard(generation, kind)));
            let end = listen(conn, silence, &speaker, &heard, hear);
            let _ = tell.send(Signal::Silent(generation, end));
        })?;
        thread::Builder::new().name("ping".into()).spawn(move || {
            sys::urgent::become_urgent();
            while pinger.say(control::Kind::Ping(control::Ping { sent_ns: now_ns() })).is_ok() {
                thread::sleep(PING);
            }
        })?;
        Ok(())
    }

    /// Opens all that carries pages.
    pub(super) fn open_streams(&mut self) -> io::Result<()> {
        let dial = |kind| self.parts.dial.dial(kind, self.token.as_ref());
        let (tell, generation) = (self.tell.clone(), self.generation);
        let say: Arc<dyn Fn(Said) + Send + Sync> =
            Arc::new(move |said| drop(tell.send(Signal::Said(generation, said))));
        // A queue of this generation's own: what a thread of a lost connection still takes from its queue is
        // lost.
        self.to_push = Arc::new(PushQueue::new(self.nothing()));
        if self.options.post_copy() {
            // First: a guest that waits does so for this one.
            let conn = dial(Purpose::Fault)?;
            self.answering = Some(conn.another()?);
            let (memory, shape) = (self.parts.memory.clone(), self.shape.clone());
            let (say, to_push, pacer) = (say.clone(), self.to_push.clone(), self.pacer.clone());
            thread::Builder::new().name("answer".into()).spawn(move || {
                sys::urgent::become_urgent();
                if let Err(e) = serve_faults(conn, memory, pacer, &shape, |fault| to_push.asked(fault)) {
                    say(Said::Lost(e));
                }
            })?;
        }
        let conns = (0..*self.parts.streams.end())
            .map(|i| dial(Purpose::Data(i as u16)))
            .collect::<io::Result<Vec<_>>>()?;
        // What was sent over these connections, and over no others.
        let blank = self.current.is_none();
        let sent = self.secrets.nothing_sent(&self.shape.0, self.dirty.len(), blank);
        let learnt = self.parts.history.iter().rev().find_map(|past| past.learnt.as_ref());
        let compression = BatchCompressor::new(
            self.options.compress,
            *self.parts.streams.start(),
            (self.parts.cores)(),
            &self.shape.0,
            learnt,
        );
        let gate = Arc::new(Gate::new(self.parts.streams.clone()));
        let (memory, pacer) = (self.parts.memory.clone(), self.pacer.clone());
        let kept = self.kept.clone();
        let shared = StreamContext { memory, pacer, sent, compression, gate, kept };
        self.streams = Some(Streams::start(conns, shared, say)?);
        Ok(())
    }

    pub(super) fn say(&mut self, kind: control::Kind) {
        // If it cannot be said, the listener of the same connection reports why.
        if let Some(Ok(bytes)) = self.speaker.as_ref().map(|speaker| speaker.say(kind)) {
            self.pacer.charge(bytes);
        }
    }

    /// Ends all connections; whatever they still report is of an older generation.
    pub(super) fn hang_up(&mut self) {
        self.generation += 1;
        // A target that lost its source has given back what it kept.
        self.forget_kept();
        self.count_confirmed();
        self.streams = None;
        self.reopened.clear();
        self.link.hung_up();
        self.spooling.core.hung_up();
        if let Some(conn) = self.answering.take() {
            conn.shut();
        }
        self.speaker = None;
        if let Some(conn) = self.control.take() {
            conn.shut();
        }
    }
}
