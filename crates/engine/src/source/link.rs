//! The source's connections: opened, lost, opened again.

use super::{Mending, Signal, SourceDriver};
use crate::{
    Broken,
    conn::{LONG_SILENCE, PING, SILENCE, Speaker, listen, now_ns},
    gate::Gate,
    packing::Packing,
    queue::{Owing, Round},
    ship::{Said, Shared, Streams, serve_faults},
};
use proto::{Kind, SourceEvent, Token, control};
use std::{
    io::{self, Write},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use units::MemorySet;

/// How long to wait before the target is called again: at first, and at most. Each call is short, so that a link that is back is
/// noticed within a second (`tests/tests/interrupted.rs`).
const SOON: Duration = Duration::from_millis(50);
const LATER: Duration = Duration::from_millis(300);

/// A host that says that nobody listens there, or that its agent knows of no such migration, is called every `SOON`: an agent that is
/// started again is there at any moment, its guest waits, and such a call costs a packet or two. After so many (20 s) it will be longer.
const EAGER: u32 = 400;

/// How long to wait after the last of so many calls failed like this.
fn pause(calls: u32, why: io::ErrorKind) -> Duration {
    let answered = matches!(why, io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound);
    match calls {
        ..=EAGER if answered => SOON,
        calls => LATER.min(SOON * 2_u32.saturating_pow(calls - 1)),
    }
}

/// A call that is not answered within so long was lost, whatever the link's round trip was before: `ROUND_TRIPS` times that, but at
/// least this.
const ANSWERED: Duration = Duration::from_millis(500);
const ROUND_TRIPS: u32 = 8;

/// A link that is lost so often without a page having arrived in between is no use.
const STUCK: u32 = 3;

/// What the target says to a source that is back.
enum Back {
    /// It has everything.
    Settled,
    /// Its guest lacks pages.
    Lacking,
    /// Its guest does not run; it has all of this round, and these pages of the next one.
    Landed(u32, MemorySet),
}

impl SourceDriver {
    /// Connects again, until it works: the target's guest waits for its pages, and nobody else has them.
    pub(super) fn reconnect(&mut self) {
        self.hang_up();
        self.story.note(format!(
            "the connection to {} was lost; its guest waits for pages, reconnecting",
            self.parts.to
        ));
        let mut calls = 0;
        loop {
            calls += 1;
            match self.resume() {
                Ok(_) => return self.story.note(format!("connected to {} again", self.parts.to)),
                Err(e) => {
                    tracing::debug!(%e, "not yet");
                    self.hang_up();
                    if self.target_is_complete() {
                        let settled = control::Kind::Settled(control::Settled::default());
                        self.later.push_back(Signal::Event(SourceEvent::Message(settled)));
                        return self.story.note("the datastore says that the target has everything".into());
                    }
                    self.wait_for_word(pause(calls, e.kind()), |event| {
                        matches!(event, SourceEvent::Resolved)
                    });
                }
            }
        }
    }

    /// Connects again while the guest runs on here, for as long as the user wants. What was on its way is
    /// sent again (I2).
    pub(super) fn rejoin(&mut self) -> Result<Option<SourceEvent>, Broken> {
        self.hang_up();
        self.leave_spool();
        let end = Instant::now() + self.options.give_up;
        self.story.note(format!(
            "the connection to {} was lost; the VM runs on here, reconnecting for up to {} s (--give-up)",
            self.parts.to,
            self.options.give_up.as_secs_f64()
        ));
        let mut calls = 0;
        loop {
            calls += 1;
            let (why, kind) = match self.resume() {
                Ok(Back::Landed(landed, rest)) => {
                    let here = (landed, rest.len());
                    self.lost_here = (here, if self.lost_here.0 == here { self.lost_here.1 + 1 } else { 0 });
                    if self.lost_here.1 >= STUCK {
                        let why = "it is lost again and again, at the same place".to_owned();
                        return Err(Broken::new("the connection to the target", why));
                    }
                    self.story.note(format!("connected to {} again", self.parts.to));
                    self.not_again(landed, &rest);
                    self.story.link_is_back();
                    self.progress.link_is_back();
                    return Ok(Some(SourceEvent::Rejoined(landed)));
                }
                Ok(Back::Settled | Back::Lacking) => {
                    ("it speaks of a VM that runs there already".to_owned(), io::ErrorKind::InvalidData)
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    let why = format!("{} has given up meanwhile", self.parts.to);
                    return Err(Broken::new("reconnect", why));
                }
                Err(e) => (e.to_string(), e.kind()),
            };
            tracing::debug!(why, "not yet");
            self.hang_up();
            let wait = pause(calls, kind);
            if Instant::now() + wait >= end {
                let why = format!(
                    "it was lost, and not back within {} s: {why}; --give-up says how long to wait",
                    self.options.give_up.as_secs_f64()
                );
                return Err(Broken::new("the connection to the target", why));
            }
            let cancels = |event: &SourceEvent| matches!(event, SourceEvent::Cancel);
            let heard = |signal: &Signal| matches!(signal, Signal::Event(event) if cancels(event));
            if self.later.iter().any(heard) || self.wait_for_word(wait, cancels) {
                // It is among what is heard next.
                return Ok(None);
            }
        }
    }

    /// The target has these pages of the round after `landed`: what is left of the current one is sent again.
    fn not_again(&mut self, landed: u32, rest: &MemorySet) {
        let Some(round) = self.current.clone() else { return };
        if round.number <= landed {
            // What its streams carried is there; what the file was to bring of it may not be (I2).
            self.dirty.union(&round.leave_file());
        }
        if round.number != landed + 1 {
            return;
        }
        let mut left = round.set.clone();
        left.subtract(rest);
        self.current = Some(Arc::new(Round::new(round.number, left)));
    }

    /// The link was lost, and the migration has ended without the target having heard of it: it is told once it can be, as long as it
    /// waits for us. Nothing but its time is at stake: it gives up by itself. Not while the guest stands still here: its target would
    /// forget the record that is still to be asked.
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
                match dial.dial_soon(Kind::Resume, None, ANSWERED) {
                    Ok(mut conn) => {
                        let said = conn.write_all(&proto::encode(control::Kind::Failed(failed.clone())));
                        // It hangs up once it has understood; until then this side does not, so that nothing is lost in a reset.
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

    /// One attempt. The target's first word says what it lacks, if anything at all: if not, it takes no more streams.
    fn resume(&mut self) -> io::Result<Back> {
        self.connect(Kind::Resume)?;
        let end = Instant::now() + SILENCE;
        while let Ok(signal) = self.signals.recv_timeout(end.saturating_duration_since(Instant::now())) {
            let back = match &signal {
                Signal::Event(SourceEvent::Message(control::Kind::Settled(_))) => Some(Back::Settled),
                Signal::Event(SourceEvent::Message(control::Kind::StillOwed(still))) => {
                    // A target that was restarted has another one.
                    self.token = Token::read(&still.token);
                    Some(Back::Lacking)
                }
                Signal::Event(SourceEvent::Message(control::Kind::Landed(landed))) => {
                    let rest = proto::page_sets(&landed.blocks, &self.shape)
                        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
                    self.token = Token::read(&landed.token);
                    Some(Back::Landed(landed.round, rest))
                }
                Signal::Silent(generation, _) if *generation == self.generation => {
                    return Err(io::Error::other("the connection was lost again"));
                }
                _ => None,
            };
            self.later.push_back(signal);
            match back {
                None => {}
                Some(Back::Settled) => return Ok(Back::Settled),
                Some(back) => return self.open_streams().map(|()| back),
            }
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "the target does not say what it lacks"))
    }

    /// Opens a control connection, with a thread that listens and one that pings.
    pub(super) fn connect(&mut self, kind: Kind) -> io::Result<()> {
        self.generation += 1;
        let generation = self.generation;
        let conn = match kind {
            Kind::Resume => {
                let patience = self.heard.round_trip().map_or(ANSWERED, |time| time * ROUND_TRIPS);
                self.parts.dial.dial_soon(kind, None, patience.max(ANSWERED))?
            }
            _ => self.parts.dial.dial(kind, None)?,
        };
        let silence = if kind == Kind::Resume { SILENCE } else { LONG_SILENCE };
        let speaker = Speaker::new(conn.another()?);
        self.control = Some(conn.another()?);
        self.speaker = Some(speaker.clone());
        let (pinger, tell, heard) = (speaker.clone(), self.tell.clone(), self.heard.clone());
        thread::Builder::new().name("listen".into()).spawn(move || {
            sys::urgent::become_urgent();
            let hear = |kind| drop(tell.send(Signal::Event(SourceEvent::Message(kind))));
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
        // A queue of this generation's own: what a thread of a lost connection still takes from its queue is lost.
        self.owing = Arc::new(Owing::new(self.nothing()));
        if self.options.post_copy() {
            // First: a guest that waits does so for this one.
            let conn = dial(Kind::Fault)?;
            self.answering = Some(conn.another()?);
            let (memory, shape) = (self.parts.memory.clone(), self.shape.clone());
            let (say, owing, pacer) = (say.clone(), self.owing.clone(), self.pacer.clone());
            thread::Builder::new().name("answer".into()).spawn(move || {
                sys::urgent::become_urgent();
                if let Err(e) = serve_faults(conn, memory, pacer, &shape, |fault| owing.asked(fault)) {
                    say(Said::Lost(e));
                }
            })?;
        }
        let conns = (0..*self.options.streams.end())
            .map(|i| dial(Kind::Data(i as u16)))
            .collect::<io::Result<Vec<_>>>()?;
        // What was sent over these connections, and over no others.
        let blank = self.current.is_none();
        let sent = self.secrets.nothing_sent(&self.shape.0, self.dirty.len(), blank);
        let learnt = self.parts.history.iter().rev().find_map(|past| past.learnt.as_ref());
        let packing = Packing::new(&self.options, (self.parts.cores)(), &self.shape.0, learnt);
        let gate = Arc::new(Gate::new(self.options.streams.clone()));
        let (memory, pacer) = (self.parts.memory.clone(), self.pacer.clone());
        let shared = Shared { memory, pacer, sent, packing, gate };
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
        self.count_confirmed();
        self.streams = None;
        self.mending = Mending::default();
        if let Some(conn) = self.answering.take() {
            conn.shut();
        }
        self.speaker = None;
        if let Some(conn) = self.control.take() {
            conn.shut();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_answers_is_called_again_soon_and_one_that_is_silent_less_often() {
        let ms = |calls, why| pause(calls, why).as_millis();
        let silent = [1, 2, 3, 4, 99].map(|calls| ms(calls, io::ErrorKind::TimedOut));
        assert_eq!(silent, [50, 100, 200, 300, 300]);
        for why in [io::ErrorKind::ConnectionRefused, io::ErrorKind::NotFound] {
            assert_eq!(
                [1, 99, EAGER, EAGER + 1, u32::MAX].map(|calls| ms(calls, why)),
                [50, 50, 50, 300, 300]
            );
        }
    }
}
