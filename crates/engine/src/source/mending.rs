//! One of the connections that carry pages: opened again while the others go on.
//!
//! The target welcomes the new connection once nothing of the old one can arrive any more, and says what has
//! arrived.

use super::{Signal, SourceDriver};
use crate::{
    conn::{Conn, SILENCE},
    send::Job,
};
use api::Phase;
use proto::{LinkEvent, Purpose, Rest, SourceEvent, control};
use std::{io, thread};

/// What is there of a stream that is opened again, in any order: its connection, and what the target says
/// that it has.
pub(super) type Reopened = (Option<Conn>, Option<control::StreamReopened>);

impl SourceDriver {
    /// A stream was lost, by this side's word or by the target's.
    pub(super) fn stream_lost(&mut self, stream: u32, why: &str) -> Option<SourceEvent> {
        self.streams.as_ref().filter(|streams| stream < streams.count())?;
        tracing::info!(stream, why, "a stream was lost; the others go on");
        self.link(LinkEvent::StreamLost(stream, why.to_owned()))
    }

    pub(super) fn open_stream(&mut self, stream: u32) -> io::Result<()> {
        self.reopened.insert(stream, (None, None));
        let (dial, token, tell) = (self.parts.dial.clone(), self.token, self.tell.clone());
        let generation = self.generation;
        let open = move || {
            let conn = dial.dial_soon(Purpose::Data(stream as u16), token.as_ref(), SILENCE);
            let _ = tell.send(Signal::Opened(generation, stream, conn));
        };
        thread::Builder::new().name(format!("mend-{stream}")).spawn(open).map(drop)
    }

    /// It is welcome at the target, or not.
    pub(super) fn opened(&mut self, stream: u32, conn: io::Result<Conn>) -> Option<SourceEvent> {
        let event = match conn {
            Ok(conn) => {
                self.reopened.get_mut(&stream)?.0 = Some(conn);
                LinkEvent::StreamOpened(stream)
            }
            Err(e) => LinkEvent::StreamNotOpened(stream, e.to_string()),
        };
        self.link(event)
    }

    /// The target says what it has.
    pub(super) fn stream_is_back(&mut self, back: control::StreamReopened) -> Option<SourceEvent> {
        let stream = back.stream;
        self.reopened.get_mut(&stream)?.1 = Some(back);
        self.link(LinkEvent::StreamReopened(stream))
    }

    /// Both sides are ready. What else this stream took of the round goes again (I2), before the stream's end
    /// of the round.
    pub(super) fn go_on(&mut self, stream: u32) -> io::Result<()> {
        let Some((Some(conn), Some(back))) = self.reopened.remove(&stream) else { return Ok(()) };
        let pages = proto::page_sets(&back.blocks, &self.shape)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
        let nothing = self.nothing();
        // The current round may have begun since the target said that: then this stream has sent none of it
        // yet.
        let job = self.current.clone().filter(|_| !back.missing).and_then(|round| {
            match Rest::of(round.number, back.round) {
                Rest::OfFile => None,
                Rest::Part => Some((round, &pages)),
                Rest::Whole => Some((round, &nothing)),
            }
        });
        let Some(streams) = &mut self.streams else { return Ok(()) };
        streams.go_on(stream, conn, job).map_err(io::Error::other)?;
        if self.phase() == Phase::PostCopy {
            if back.missing {
                // What the others have on their way goes twice, and arrives once.
                self.to_push.refill(&pages);
            }
            if let Some(streams) = &self.streams {
                streams.give(&Job::Push(self.to_push.clone()));
            }
        }
        let to = &self.parts.to;
        self.reporter.note(format!("a connection to {to} was lost and opened again; the others went on"));
        Ok(())
    }
}
