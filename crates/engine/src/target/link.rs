//! The target's connections: welcomed, heard, lost.

use super::{Signal, TargetDriver};
use crate::{
    conn::{Conn, Heard, SILENCE, Speaker, listen},
    receive::receive,
};
use proto::{Purpose, Reply, Status, TargetEvent, control};
use std::{
    io::{self, Write},
    sync::mpsc::Sender,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// A stream that was lost alone is waited for so long. The source needs a round trip or two to open it again,
/// and gives up by itself what it cannot open.
const MISSED: Duration = Duration::from_secs(5);

/// One of the connections that pages travel on, and the thread that receives them.
pub(super) struct Stream {
    conn: Conn,
    lands: JoinHandle<()>,
    /// No other stream of this migration ever has it.
    pub(super) number: u32,
    /// Since when it has ended.
    lost: Option<Instant>,
}

impl Stream {
    /// What was on its way into memory is there when this returns, and nothing follows it: a page that is
    /// sent again is not overwritten by what was sent before (I5).
    fn end(self) {
        self.conn.shut();
        if self.lands.join().is_err() {
            tracing::error!("a thread that receives pages ended in a panic");
        }
    }
}

impl TargetDriver {
    /// A further connection of this migration. The source is welcomed only here: what it says once all its
    /// connections are welcome finds them in use, so that the faults of a device state that is being loaded
    /// are answered.
    pub(super) fn attach(&mut self, kind: Purpose, mut conn: Conn) -> Option<TargetEvent> {
        if kind == Purpose::Resume {
            self.hang_up();
            self.gives_up = None;
        }
        let replaced = match kind {
            Purpose::Data(stream) => self.streams.remove(&stream).map(Stream::end).is_some(),
            _ => false,
        };
        let attached = conn.write_all(&Reply::new(Status::Welcome).to_bytes()).and_then(|()| match kind {
            Purpose::Data(stream) => self.take_stream(stream, conn, replaced),
            Purpose::Fault => self.take_faults(conn),
            Purpose::Resume => self.hear(conn, SILENCE),
            Purpose::Control | Purpose::Record | Purpose::Probe => Ok(()),
        });
        match attached {
            Ok(()) => (kind == Purpose::Resume).then_some(TargetEvent::Reconnected),
            Err(e) => {
                // Short of descriptors or threads, perhaps: the source, which takes itself for welcome,
                // learns why, and that nobody listens.
                tracing::warn!(%e, ?kind, "a connection cannot be used");
                self.say(control::Kind::Failed(control::Failed {
                    what: "take a connection in".into(),
                    why: e.to_string(),
                    cancelled: false,
                }));
                self.lost(e)
            }
        }
    }

    fn take_stream(&mut self, stream: u16, conn: Conn, replaced: bool) -> io::Result<()> {
        let Some(taken) = self.taken.as_ref().filter(|t| u32::from(stream) < t.streams) else {
            return Ok(());
        };
        if let Some((control, _)) = &self.control {
            control.silence(Some(SILENCE))?;
        }
        let another = conn.another()?;
        let (receiver, tell, generation) = (taken.receiver.clone(), self.tell.clone(), self.generation);
        if replaced {
            let missing = receiver.post_copy();
            let pages = if missing { receiver.missing().clone() } else { receiver.received().clone() };
            let blocks = proto::bitmaps(&pages);
            self.say(control::Kind::StreamReopened(control::StreamReopened {
                stream: stream.into(),
                round: self.round,
                blocks,
                missing,
            }));
        }
        self.streams_taken += 1;
        let number = self.streams_taken;
        let lands = thread::Builder::new().name(format!("receive-{stream}")).spawn(move || {
            let round_end = |round| drop(tell.send(Signal::RoundEnd { generation, stream, round }));
            let end = receive(conn, &receiver, round_end);
            let _ = tell.send(Signal::StreamLost(generation, stream, number, end));
        })?;
        self.streams.insert(stream, Stream { conn: another, lands, number, lost: None });
        Ok(())
    }

    /// One connection that pages travel on has ended. The source, which may not have noticed, opens it again,
    /// or hangs up.
    pub(super) fn stream_lost(&mut self, stream: u16, e: io::Error) -> Option<TargetEvent> {
        if e.kind() == io::ErrorKind::InvalidData {
            return self.lost(e);
        }
        tracing::info!(stream, %e, "a stream was lost; the others go on");
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.conn.shut();
            stream.lost = Some(Instant::now());
        }
        self.say(control::Kind::StreamLost(control::StreamLost { stream: stream.into() }));
        None
    }

    /// Whether a stream was lost and not opened again for long: so is the link, then.
    pub(super) fn missed(&self) -> Option<io::Error> {
        let late = |stream: &Stream| stream.lost.is_some_and(|since| since.elapsed() > MISSED);
        let late = self.streams.values().any(late);
        late.then(|| {
            io::Error::new(io::ErrorKind::TimedOut, "a connection with pages was lost, and not opened again")
        })
    }

    fn take_faults(&mut self, conn: Conn) -> io::Result<()> {
        let Some(taken) = self.taken.as_ref() else { return Ok(()) };
        let Some(faults) = &taken.faults else { return Ok(()) };
        self.answering = Some(conn.another()?);
        faults.ask_on(conn.another()?);
        let (receiver, tell, generation) = (taken.receiver.clone(), self.tell.clone(), self.generation);
        thread::Builder::new().name("receive-faults".into()).spawn(move || {
            sys::urgent::become_urgent();
            let end = receive(conn, &receiver, |_| {});
            report_loss(&tell, generation, end);
        })?;
        Ok(())
    }

    /// Listens on a control connection from now on.
    pub(super) fn hear(&mut self, conn: Conn, silence: Duration) -> io::Result<()> {
        let speaker = Speaker::new(conn.another()?);
        self.control = Some((conn.another()?, speaker.clone()));
        let mut rest = conn.another()?;
        let (tell, generation) = (self.tell.clone(), self.generation);
        thread::Builder::new().name("listen".into()).spawn(move || {
            sys::urgent::become_urgent();
            let hear = |kind| {
                drop(tell.send(match kind {
                    control::Kind::Spooled(spooled) => Signal::Spooled(generation, spooled),
                    kind => Signal::Said(generation, kind),
                }));
            };
            let end = listen(conn, silence, &speaker, &Heard::default(), hear);
            let wrong = end.kind() == io::ErrorKind::InvalidData;
            let _ = tell.send(Signal::Lost(generation, end));
            if wrong {
                // Nothing of it is understood any more, but when it ends is heard: unread bytes would turn
                // what is said last into a reset.
                let end = io::copy(&mut rest, &mut io::sink()).err();
                let end = end.unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                let _ = tell.send(Signal::Lost(generation, end));
            }
        })?;
        Ok(())
    }

    /// Ends all connections; whatever they still say is of an older generation, and nothing more arrives that
    /// came over them.
    pub(super) fn hang_up(&mut self) {
        self.generation += 1;
        self.ended_streams.clear();
        // A source that comes back names nothing of it.
        if let Some(taken) = &self.taken {
            taken.receiver.forget_kept();
        }
        if let Some((conn, _)) = self.control.take() {
            conn.shut();
        }
        if let Some(conn) = self.answering.take() {
            conn.shut();
        }
        self.streams.values().for_each(|stream| stream.conn.shut());
        self.streams.drain().for_each(|(_, stream)| stream.end());
        if let Some(spool) = self.taken.as_ref().and_then(|taken| taken.spool.as_ref()) {
            spool.thread.core().stop();
        }
    }

    pub(super) fn say(&self, kind: control::Kind) {
        // If it cannot be said, the listener of the same connection reports why.
        if let Some((_, speaker)) = &self.control {
            let _ = speaker.say(kind);
        }
    }

    /// Until it hangs up or, not having heard the last word, connects again: then whoever asks after us is
    /// answered.
    pub(super) fn wait_for_the_other_side(&self) {
        let end = Instant::now() + SILENCE;
        while let Ok(signal) = self.signals.recv_timeout(end.saturating_duration_since(Instant::now())) {
            match signal {
                Signal::Lost(generation, _) if generation == self.generation => return,
                Signal::Attach(..) => return,
                _ => {}
            }
        }
    }
}

/// A connection for faults that the source closed is no news: it says why on the control connection, or loses
/// that too.
fn report_loss(tell: &Sender<Signal>, generation: u32, end: io::Error) {
    if end.kind() != io::ErrorKind::UnexpectedEof {
        let _ = tell.send(Signal::Lost(generation, end));
    }
}
