//! TLS over a connection. Both directions are used at once, from whichever threads.
//!
//! A connection's end without TLS's own word for it is not told from one with it: what is said over
//! connections says itself when it is complete, and one that is cut off is a lost one.

use crate::conn::{By, GREETING, SPEAKS_PLAINTEXT, Traffic, invalid, unanswered};
use pki::Identity;
use rustls::{ClientConnection, Connection, ServerConnection};
use std::{
    fmt,
    io::{self, IoSlice, Read, Write},
    net::TcpStream,
    sync::{Arc, Mutex, MutexGuard, atomic::Ordering::Relaxed},
    time::Instant,
};
use units::Locked;

/// Bytes that one system call takes in: several records, so that the calls cost little beside deciphering
/// them.
const INBOX: usize = 64 << 10;

/// Bytes that one system call sends, at most. A batch of pages is twice that; more would leave the
/// processor's cache between being enciphered and being sent.
const OUTBOX: usize = 256 << 10;

/// One connection's keys and buffers.
pub(crate) struct Channel {
    /// Held while bytes become records or records bytes, and never while a socket is waited for: one that
    /// waits to write must not keep the other from reading.
    session: Mutex<Connection>,
    inbox: Mutex<Inbox>,
    /// Held from enciphering to sending: records must go out in their order.
    outbox: Mutex<Vec<u8>>,
    identity: Arc<Identity>,
    peer: Vec<String>,
}

/// What has come in and is not deciphered yet.
struct Inbox {
    bytes: Box<[u8]>,
    from: usize,
    to: usize,
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// As the side that called: the other side's certificate must be for `host`, a name or an address.
pub(crate) fn call(
    stream: &TcpStream,
    traffic: &Traffic,
    identity: &Arc<Identity>,
    host: &str,
) -> io::Result<Channel> {
    let name = pki::server_name(host).map_err(invalid)?;
    let session = ClientConnection::new(identity.client(), name);
    let session = session.map_err(|error| invalid(pki::why(&error, identity)))?;
    shake(session.into(), stream, traffic, identity, None)
}

/// As the side that was called: the other side must have a certificate of the workgroup.
pub(crate) fn answer(
    stream: &TcpStream,
    traffic: &Traffic,
    identity: &Arc<Identity>,
    deadline: Option<Instant>,
) -> io::Result<Channel> {
    let session = ServerConnection::new(identity.server());
    let session = session.map_err(|error| invalid(pki::why(&error, identity)))?;
    shake(session.into(), stream, traffic, identity, deadline)
}

fn shake(
    mut session: Connection,
    stream: &TcpStream,
    traffic: &Traffic,
    identity: &Arc<Identity>,
    deadline: Option<Instant>,
) -> io::Result<Channel> {
    let mut line = Line { stream, traffic, begun: Instant::now(), deadline, first: Vec::new() };
    if let Err(error) = session.complete_io(&mut line) {
        // The alert that says why is behind what else was to be sent, and only the first of that was tried.
        while session.wants_write() && session.write_tls(&mut line).is_ok_and(|n| n > 0) {}
        if line.first.starts_with(&proto::MAGIC) {
            return Err(invalid(SPEAKS_PLAINTEXT));
        }
        return Err(match error.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(error) => invalid(pki::why(error, identity)),
            None => unanswered(error),
        });
    }
    session.set_buffer_limit(Some(OUTBOX));
    let peer = session.peer_certificates().and_then(<[_]>::first).map(pki::names_of).unwrap_or_default();
    Ok(Channel {
        session: Mutex::new(session),
        inbox: Mutex::new(Inbox { bytes: vec![0; INBOX].into(), from: 0, to: 0 }),
        outbox: Mutex::default(),
        identity: identity.clone(),
        peer,
    })
}

/// A half-written record is lost with the thread that wrote it, and the connection with it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.locked()
}

impl Channel {
    /// The hosts' names of the peer's certificate.
    pub(crate) fn peer(&self) -> &[String] {
        &self.peer
    }

    /// Reads what there is, and waits if there is nothing.
    pub(crate) fn read(&self, stream: &mut By<'_>, traffic: &Traffic, into: &mut [u8]) -> io::Result<usize> {
        let mut inbox = lock(&self.inbox);
        loop {
            if let Some(n) = self.decipher(&mut inbox, into)? {
                return Ok(n);
            }
            let n = stream.read(&mut inbox.bytes)?;
            if n == 0 {
                return Ok(0);
            }
            traffic.received.fetch_add(n as u64, Relaxed);
            (inbox.from, inbox.to) = (0, n);
        }
    }

    /// What can be read without waiting; `None`: nothing, and all that came in is used up.
    fn decipher(&self, inbox: &mut Inbox, into: &mut [u8]) -> io::Result<Option<usize>> {
        let mut session = lock(&self.session);
        loop {
            match session.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read.map(Some),
            }
            let mut rest = &inbox.bytes[inbox.from..inbox.to];
            if rest.is_empty() {
                return Ok(None);
            }
            session.read_tls(&mut rest)?;
            inbox.from = inbox.to - rest.len();
            session.process_new_packets().map_err(|error| invalid(pki::why(&error, &self.identity)))?;
        }
    }

    /// Sends as much as fits at once, and says how much of it that was.
    pub(crate) fn write(
        &self,
        mut stream: &TcpStream,
        traffic: &Traffic,
        parts: &[IoSlice<'_>],
    ) -> io::Result<usize> {
        let mut outbox = lock(&self.outbox);
        let written = {
            let mut session = lock(&self.session);
            let written = session.writer().write_vectored(parts)?;
            while session.wants_write() {
                session.write_tls(&mut *outbox)?;
            }
            written
        };
        let sent = stream.write_all(&outbox);
        traffic.sent.fetch_add(outbox.len() as u64, Relaxed);
        outbox.clear();
        sent.map(|()| written)
    }
}

/// A connection during the handshake: counted, and not for long.
struct Line<'a> {
    stream: &'a TcpStream,
    traffic: &'a Traffic,
    begun: Instant,
    /// Also while it is waited for what comes next.
    deadline: Option<Instant>,
    /// How the peer's words begin.
    first: Vec<u8>,
}

impl Read for Line<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        // A peer that sends a byte now and then must not hold a thread for longer either.
        if self.begun.elapsed() > GREETING {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let n = By { stream: self.stream, deadline: self.deadline }.read(into)?;
        self.traffic.received.fetch_add(n as u64, Relaxed);
        let missing_mode = proto::MAGIC.len().saturating_sub(self.first.len());
        self.first.extend(&into[..n.min(missing_mode)]);
        Ok(n)
    }
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let n = self.stream.write_vectored(parts)?;
        self.traffic.sent.fetch_add(n as u64, Relaxed);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
