//! The source's connections: opened, lost, opened again.

use super::{AGAIN, Signal, SourceDriver};
use crate::{
    conn::{PING, SILENCE, Speaker, listen, now_ns},
    gate::Gate,
    packing::Packing,
    queue::Owing,
    ship::{Said, Shared, Streams, serve_faults},
};
use proto::{Kind, SourceEvent, Token, control};
use std::{io, sync::Arc, thread, time::Instant};
use units::MemorySet;

impl SourceDriver {
    /// Connects again, until it works: the target's guest waits for its pages, and nobody else has them.
    pub(super) fn reconnect(&mut self) {
        self.hang_up();
        self.story.note(format!(
            "the connection to {} was lost; its guest waits for pages, reconnecting",
            self.parts.to
        ));
        loop {
            match self.resume() {
                Ok(()) => return self.story.note(format!("connected to {} again", self.parts.to)),
                Err(e) => {
                    tracing::debug!(%e, "not yet");
                    self.hang_up();
                    self.wait_for_resolution(AGAIN);
                }
            }
        }
    }

    /// One attempt. The target's first word says whether it lacks anything at all: if not, it takes no more streams.
    fn resume(&mut self) -> io::Result<()> {
        self.connect(Kind::Resume)?;
        let end = Instant::now() + SILENCE;
        while let Ok(signal) = self.signals.recv_timeout(end.saturating_duration_since(Instant::now())) {
            let (settled, lacking, lost) = match &signal {
                Signal::Event(SourceEvent::Message(control::Kind::Settled(_))) => (true, false, false),
                Signal::Event(SourceEvent::Message(control::Kind::StillOwed(_))) => (false, true, false),
                Signal::Silent(generation, _) => (false, false, *generation == self.generation),
                _ => (false, false, false),
            };
            if let Signal::Event(SourceEvent::Message(control::Kind::StillOwed(still))) = &signal {
                // A target that was restarted has another one.
                self.token = Token::read(&still.token);
            }
            self.later.push_back(signal);
            if lost {
                return Err(io::Error::other("the connection was lost again"));
            }
            if settled {
                return Ok(());
            }
            if lacking {
                return self.open_streams();
            }
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "the target does not say what it lacks"))
    }

    /// Opens a control connection, with a thread that listens and one that pings.
    pub(super) fn connect(&mut self, kind: Kind) -> io::Result<()> {
        self.generation += 1;
        let generation = self.generation;
        let conn = self.parts.dial.dial(kind, None)?;
        let speaker = Speaker::new(conn.another()?);
        self.control = Some(conn.another()?);
        self.speaker = Some(speaker.clone());
        let (pinger, tell, heard) = (speaker.clone(), self.tell.clone(), self.heard.clone());
        thread::Builder::new().name("listen".into()).spawn(move || {
            let hear = |kind| drop(tell.send(Signal::Event(SourceEvent::Message(kind))));
            let end = listen(conn, &speaker, &heard, hear);
            let _ = tell.send(Signal::Silent(generation, end));
        })?;
        thread::Builder::new().name("ping".into()).spawn(move || {
            while pinger.say(control::Kind::Ping(control::Ping { sent_ns: now_ns() })).is_ok() {
                thread::sleep(PING);
            }
        })?;
        Ok(())
    }

    /// Opens all that carries pages.
    pub(super) fn open_streams(&mut self) -> io::Result<()> {
        let dial = |kind| self.parts.dial.dial(kind, self.token.as_ref());
        let conns = (0..*self.options.streams.end())
            .map(|i| dial(Kind::Data(i as u16)))
            .collect::<io::Result<Vec<_>>>()?;
        let (tell, generation) = (self.tell.clone(), self.generation);
        let say = move |said| drop(tell.send(Signal::Said(generation, said)));
        // A queue of this generation's own: what a thread of a lost connection still takes from its queue is lost.
        self.owing = Arc::new(Owing::new(MemorySet::empty(self.shape.0.iter().copied())));
        if self.options.post_copy() {
            let conn = dial(Kind::Fault)?;
            self.answering = Some(conn.another()?);
            let (memory, shape) = (self.parts.memory.clone(), self.shape.clone());
            let (say, owing, pacer) = (say.clone(), self.owing.clone(), self.pacer.clone());
            thread::Builder::new().name("answer".into()).spawn(move || {
                if let Err(e) = serve_faults(conn, memory, pacer, &shape, |fault| owing.asked(fault)) {
                    say(Said::Lost(e));
                }
            })?;
        }
        // What was sent over these connections, and over no others.
        let sent = self.secrets.nothing_sent(&self.shape.0, self.dirty.len());
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
        self.streams = None;
        if let Some(conn) = self.answering.take() {
            conn.shut();
        }
        self.speaker = None;
        if let Some(conn) = self.control.take() {
            conn.shut();
        }
    }
}
