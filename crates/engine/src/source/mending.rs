//! One of the connections that carry pages: lost, and opened again. The others go on meanwhile.
//!
//! The target welcomes the new connection once nothing of the old one can land any more, and says what has landed. What else this
//! stream took of the round goes again (I2), over the new connection and before the stream's end of the round.

use super::{Job, Signal, SourceDriver};
use crate::{
    conn::{Conn, SILENCE},
    report::Phase,
};
use proto::{Kind, SourceEvent, control};
use std::{collections::HashMap, thread};

/// A stream that is lost for the so manieth time is no accident: the link as a whole is taken for lost.
const OFTEN: u32 = 8;

/// What is there of the streams that are being mended: it comes in any order.
#[derive(Debug, Default)]
pub(super) struct Mending {
    streams: HashMap<u32, Pieces>,
    times: u32,
}

#[derive(Debug, Default)]
struct Pieces {
    conn: Option<Conn>,
    back: Option<control::StreamBack>,
}

impl SourceDriver {
    /// A stream was lost. If it cannot be opened again, the whole link is.
    pub(super) fn mend(&mut self, stream: u32, why: &str) -> Option<SourceEvent> {
        let streams = self.streams.as_ref().filter(|streams| stream < streams.count())?;
        if self.mending.streams.contains_key(&stream) {
            return None;
        }
        streams.end(stream);
        self.mending.times += 1;
        if self.mending.times > OFTEN {
            return self.cannot_mend(format!("its connections end again and again: {why}"));
        }
        tracing::info!(stream, why, "a stream was lost; the others go on");
        self.mending.streams.insert(stream, Pieces::default());
        let (dial, token, tell) = (self.parts.dial.clone(), self.token, self.tell.clone());
        let generation = self.generation;
        let open = move || {
            let conn = dial.dial_soon(Kind::Data(stream as u16), token.as_ref(), SILENCE);
            let _ = tell.send(Signal::Opened(generation, stream, conn));
        };
        match thread::Builder::new().name(format!("mend-{stream}")).spawn(open) {
            Ok(_) => None,
            Err(e) => self.cannot_mend(e.to_string()),
        }
    }

    /// It is welcome at the target, or not.
    pub(super) fn opened(&mut self, stream: u32, conn: std::io::Result<Conn>) -> Option<SourceEvent> {
        match conn {
            Ok(conn) => {
                self.mending.streams.get_mut(&stream)?.conn = Some(conn);
                self.go_on(stream)
            }
            Err(e) => self.cannot_mend(e.to_string()),
        }
    }

    /// The target says what it has.
    pub(super) fn stream_is_back(&mut self, back: control::StreamBack) -> Option<SourceEvent> {
        let stream = back.stream;
        self.mending.streams.get_mut(&stream)?.back = Some(back);
        self.go_on(stream)
    }

    fn go_on(&mut self, stream: u32) -> Option<SourceEvent> {
        let pieces = self.mending.streams.get_mut(&stream)?;
        let conn = pieces.conn.take_if(|_| pieces.back.is_some())?;
        let back = self.mending.streams.remove(&stream)?.back?;
        let pages = match proto::page_sets(&back.blocks, &self.shape) {
            Ok(pages) => pages,
            Err(e) => {
                return Some(SourceEvent::Broke { what: "go on with a stream".into(), why: e.to_string() });
            }
        };
        let round = self.current.clone().filter(|round| !back.owed && round.number == back.round + 1);
        let streams = self.streams.as_mut()?;
        if let Err(e) = streams.go_on(stream, conn, round.map(|round| (round, &pages))) {
            return self.cannot_mend(e.to_string());
        }
        if back.owed && self.story.now() == Phase::PostCopy {
            // What the others have on their way goes twice, and lands once.
            self.owing.refill(pages);
            streams.give(&Job::Push(self.owing.clone()));
        }
        self.story
            .note(format!("a connection to {} was lost and opened again; the others went on", self.parts.to));
        None
    }

    fn cannot_mend(&mut self, why: String) -> Option<SourceEvent> {
        self.hang_up();
        Some(SourceEvent::LinkLost(why))
    }
}
