//! The target's connections: welcomed, heard, lost.

use super::{Signal, TargetDriver};
use crate::{
    conn::{Conn, Heard, SILENCE, Speaker, listen},
    land::receive,
};
use proto::{Kind, Reply, Status, TargetEvent, control};
use std::{
    io::{self, Write},
    sync::mpsc::Sender,
    thread,
    time::Instant,
};

impl TargetDriver {
    /// A further connection of this migration. The source is welcomed only here: what it says once all its connections are
    /// welcome finds them in use, so that the faults of a device state that is being loaded are answered.
    pub(super) fn attach(&mut self, kind: Kind, mut conn: Conn) -> Option<TargetEvent> {
        if kind == Kind::Resume {
            self.hang_up();
            self.gives_up = None;
        }
        let attached = conn.write_all(&Reply::new(Status::Welcome).to_bytes()).and_then(|()| match kind {
            Kind::Data(stream) => self.take_stream(stream, conn),
            Kind::Fault => self.take_faults(conn),
            Kind::Resume => self.hear(conn),
            Kind::Control | Kind::Record | Kind::Probe => Ok(()),
        });
        match attached {
            Ok(()) => (kind == Kind::Resume).then_some(TargetEvent::Reconnected),
            Err(e) => Some(TargetEvent::LinkLost(e.to_string())),
        }
    }

    fn take_stream(&mut self, stream: u16, conn: Conn) -> io::Result<()> {
        let Some(taken) = self.taken.as_ref().filter(|t| u32::from(stream) < t.streams) else {
            return Ok(());
        };
        let another = conn.another()?;
        let (landing, tell, generation) = (taken.landing.clone(), self.tell.clone(), self.generation);
        let lands = thread::Builder::new().name(format!("land-{stream}")).spawn(move || {
            let round_end = |round| drop(tell.send(Signal::RoundEnd { generation, stream, round }));
            let end = receive(conn, &landing, round_end);
            report_loss(&tell, generation, end);
        })?;
        self.conns.push((another, Some(lands)));
        Ok(())
    }

    fn take_faults(&mut self, conn: Conn) -> io::Result<()> {
        let Some(taken) = self.taken.as_ref() else { return Ok(()) };
        let Some(faults) = &taken.faults else { return Ok(()) };
        self.conns.push((conn.another()?, None));
        faults.ask_on(conn.another()?);
        let (landing, tell, generation) = (taken.landing.clone(), self.tell.clone(), self.generation);
        thread::Builder::new().name("land-faults".into()).spawn(move || {
            let end = receive(conn, &landing, |_| {});
            report_loss(&tell, generation, end);
        })?;
        Ok(())
    }

    /// Listens on a control connection from now on.
    pub(super) fn hear(&mut self, conn: Conn) -> io::Result<()> {
        let speaker = Speaker::new(conn.another()?);
        self.control = Some((conn.another()?, speaker.clone()));
        let mut rest = conn.another()?;
        let (tell, generation) = (self.tell.clone(), self.generation);
        thread::Builder::new().name("listen".into()).spawn(move || {
            let hear = |kind| drop(tell.send(Signal::Event(TargetEvent::Message(kind))));
            let end = listen(conn, &speaker, &Heard::default(), hear);
            let wrong = end.kind() == io::ErrorKind::InvalidData;
            let _ = tell.send(Signal::Lost(generation, end));
            if wrong {
                // Nothing of it is understood any more, but when it ends is heard: unread bytes would turn what is said
                // last into a reset.
                let end = io::copy(&mut rest, &mut io::sink()).err();
                let end = end.unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                let _ = tell.send(Signal::Lost(generation, end));
            }
        })?;
        Ok(())
    }

    /// Ends all connections; whatever they still say is of an older generation. What was on its way into memory is there when this
    /// returns, and nothing follows it: a page that is sent again is not overwritten by what was sent before (I5).
    pub(super) fn hang_up(&mut self) {
        self.generation += 1;
        self.ended_streams.clear();
        if let Some((conn, _)) = self.control.take() {
            conn.shut();
        }
        self.conns.iter().for_each(|(conn, _)| conn.shut());
        for lands in self.conns.drain(..).filter_map(|(_, lands)| lands) {
            if lands.join().is_err() {
                tracing::error!("a thread that lands pages ended in a panic");
            }
        }
    }

    pub(super) fn say(&self, kind: control::Kind) {
        // If it cannot be said, the listener of the same connection reports why.
        if let Some((_, speaker)) = &self.control {
            let _ = speaker.say(kind);
        }
    }

    /// Until it hangs up or, not having heard the last word, connects again: then whoever asks after us is answered.
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

/// A data connection that the source closed is no news: it says why on the control connection, or loses that too.
fn report_loss(tell: &Sender<Signal>, generation: u32, end: io::Error) {
    if end.kind() != io::ErrorKind::UnexpectedEof {
        let _ = tell.send(Signal::Lost(generation, end));
    }
}
