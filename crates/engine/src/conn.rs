//! Connections between the two sides.

use crate::channel::{self, Channel};
use pki::Security;
use proto::{MAX_CONTROL, Preamble, Purpose, REPLY, Reply, Status, Token, control};
use socket2::{SockRef, TcpKeepalive};
use std::{
    io::{self, IoSlice, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use sys::socket::Queue;
use units::{Locked, MigrationId};

/// A side that says nothing for this long is taken for lost. Both sides speak at least each [`PING`].
/// Shorter, and a host that is merely busy would be taken for lost, which costs a round's rest; longer, and a
/// guest that waits for pages of a source that is connected again waits for nothing.
pub(crate) const SILENCE: Duration = Duration::from_millis(1500);

/// The same in preflight, while the target starts a QEMU on a host that may be busy, and between fence and
/// commit: what is taken for lost there costs the whole migration.
pub(crate) const LONG_SILENCE: Duration = Duration::from_secs(5);

/// What a connection was given and the peer does not confirm within this time, ends it.
pub(crate) const UNCONFIRMED: Duration = Duration::from_secs(5);

/// How often the source pings.
pub(crate) const PING: Duration = Duration::from_millis(250);

/// How long a peer may take for its first bytes. A port scanner must not hold a thread for longer.
pub(crate) const GREETING: Duration = Duration::from_secs(5);

/// Bytes that went over a migration's connections, as this side's sockets saw them.
#[derive(Debug, Default)]
pub struct Traffic {
    pub(crate) sent: AtomicU64,
    pub(crate) received: AtomicU64,
}

impl Traffic {
    /// Bytes written.
    pub fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// Bytes written and read.
    pub fn both(&self) -> u64 {
        self.sent() + self.received.load(Relaxed)
    }
}

/// One connection of a migration.
#[derive(Debug)]
pub struct Conn {
    stream: TcpStream,
    traffic: Arc<Traffic>,
    /// None where it is not protected.
    channel: Option<Arc<Channel>>,
    /// By when all must have been read that is being waited for, however little comes at a time.
    deadline: Option<Instant>,
}

impl Conn {
    fn new(stream: TcpStream, traffic: Arc<Traffic>) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let socket = SockRef::from(&stream);
        socket.set_tcp_user_timeout(Some(UNCONFIRMED))?;
        socket
            .set_tcp_keepalive(&TcpKeepalive::new().with_time(UNCONFIRMED).with_interval(UNCONFIRMED / 5))?;
        Ok(Self { stream, traffic, channel: None, deadline: None })
    }

    /// Whether the peer's certificate is for a host of this name. Where there are no certificates, anybody is
    /// anybody.
    pub(crate) fn is_of(&self, host: &str) -> bool {
        self.peer().is_none_or(|names| names.iter().any(|name| name == host))
    }

    /// What is wrong if the peer calls itself so.
    pub(crate) fn belies(&self, host: &str) -> Option<String> {
        let names = self.peer().filter(|_| !self.is_of(host))?.join(", ");
        Some(format!("the other side calls itself {host}, but its certificate is for {names}"))
    }

    /// The names that the peer's certificate is for; none where there are no certificates.
    pub(crate) fn peer(&self) -> Option<&[String]> {
        self.channel.as_deref().map(Channel::peer)
    }

    /// Another handle of the same connection.
    pub(crate) fn another(&self) -> io::Result<Self> {
        let (traffic, channel) = (self.traffic.clone(), self.channel.clone());
        Ok(Self { stream: self.stream.try_clone()?, traffic, channel, deadline: self.deadline })
    }

    /// What it was given and has not carried yet.
    pub(crate) fn queue(&self) -> io::Result<Queue> {
        sys::socket::queue(&self.stream)
    }

    /// How many bytes of it the other side has confirmed so far.
    pub(crate) fn confirmed(&self) -> io::Result<u64> {
        sys::socket::confirmed(&self.stream)
    }

    /// Ends the connection for all its handles; whoever is blocked on it comes back.
    pub(crate) fn shut(&self) {
        // It may be gone already, which is what is wanted.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// From now on reading ends after this time, however little comes at a time; `None`: as usual.
    pub(crate) fn all_within(&mut self, time: Option<Duration>) -> io::Result<()> {
        self.deadline = time.map(|time| Instant::now() + time);
        self.silence(time)
    }

    pub(crate) fn silence(&self, limit: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(limit)
    }

    /// Writes all parts, in order, in as few system calls as the kernel allows.
    pub(crate) fn write_parts(&mut self, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        /// More are refused by the kernel (`UIO_MAXIOV`).
        const MAX_PARTS: usize = 1024;
        while !parts.is_empty() {
            let some = parts.len().min(MAX_PARTS);
            match self.write_vectored(&parts[..some]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => IoSlice::advance_slices(&mut parts, n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// A connection that is read until then at the latest.
pub(crate) struct By<'a> {
    pub(crate) stream: &'a TcpStream,
    pub(crate) deadline: Option<Instant>,
}

impl Read for By<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
        }
        self.stream.read(into)
    }
}

impl Read for Conn {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut stream = By { stream: &self.stream, deadline: self.deadline };
        if let Some(channel) = &self.channel {
            return channel.read(&mut stream, &self.traffic, buf);
        }
        let n = stream.read(buf)?;
        self.traffic.received.fetch_add(n as u64, Relaxed);
        Ok(n)
    }

    /// As by default, but what is said of an early end is meant for people.
    fn read_exact(&mut self, mut rest: &mut [u8]) -> io::Result<()> {
        while !rest.is_empty() {
            match self.read(rest) {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the peer closed the connection",
                    ));
                }
                Ok(n) => rest = &mut rest[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl Write for Conn {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        if let Some(channel) = &self.channel {
            return channel.write(&self.stream, &self.traffic, bufs);
        }
        let n = self.stream.write_vectored(bufs)?;
        self.traffic.sent.fetch_add(n as u64, Relaxed);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How the source reaches the target.
pub trait Dial: Send + Sync {
    /// A new connection of this migration. `token`: where the kind needs one.
    fn dial(&self, kind: Purpose, token: Option<&Token>) -> io::Result<Conn>;

    /// The same, soon given up at each of the peer's addresses: it may be back at any moment, and at any of
    /// them.
    fn dial_soon(&self, kind: Purpose, token: Option<&Token>, within: Duration) -> io::Result<Conn>;

    /// Whether what is said can be read and changed on the way.
    fn is_plaintext(&self) -> bool;

    /// What went over all of them.
    fn traffic(&self) -> &Arc<Traffic>;
}

/// Over TCP.
#[derive(Debug)]
pub struct TcpDial {
    /// Where the host is called, and what its certificate must be for there: a name or an address.
    to: Vec<(SocketAddr, String)>,
    /// The one of these that worked last.
    works: AtomicUsize,
    migration: MigrationId,
    security: Security,
    traffic: Arc<Traffic>,
}

impl TcpDial {
    /// To a host that has these addresses, and whose certificate must be for `host`: a name or an address.
    pub fn new(
        to: Vec<SocketAddr>,
        host: impl Into<String>,
        migration: MigrationId,
        security: Security,
    ) -> Self {
        let host = host.into();
        Self::at(to.into_iter().map(|address| (address, host.clone())).collect(), migration, security)
    }

    /// The same, where what the certificate must be for differs from address to address.
    pub fn at(to: Vec<(SocketAddr, String)>, migration: MigrationId, security: Security) -> Self {
        Self { to, works: AtomicUsize::new(0), migration, security, traffic: Arc::default() }
    }

    /// Waits at each address for at most so long until somebody is there, and then again until they answer.
    fn call(&self, kind: Purpose, token: Option<&Token>, within: Duration) -> io::Result<Conn> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
        let first = self.works.load(Relaxed);
        for i in (0..self.to.len()).map(|i| (first + i) % self.to.len()) {
            let (address, host) = &self.to[i];
            let connected = TcpStream::connect_timeout(address, within)
                .and_then(|stream| self.greet(stream, host, kind, token, within));
            match connected {
                Ok(conn) => {
                    self.works.store(i, Relaxed);
                    return Ok(conn);
                }
                Err(e) => last = io::Error::new(e.kind(), format!("{address}: {e}")),
            }
        }
        Err(last)
    }

    fn greet(
        &self,
        stream: TcpStream,
        host: &str,
        kind: Purpose,
        token: Option<&Token>,
        within: Duration,
    ) -> io::Result<Conn> {
        let mut conn = Conn::new(stream, self.traffic.clone())?;
        conn.silence(Some(within))?;
        if let Security::Tls(identity) = &self.security {
            let channel = channel::call(&conn.stream, &conn.traffic, identity, host);
            // The alert that says why not must not be lost in a reset.
            let channel = channel.inspect_err(|_| drain(&conn.stream))?;
            conn.channel = Some(Arc::new(channel));
        }
        let mut first = Preamble::new(kind, self.migration).to_bytes().to_vec();
        first.extend(token.filter(|_| kind.needs_token()).iter().flat_map(|token| token.0));
        conn.write_all(&first)?;
        let mut reply = [0; REPLY];
        conn.read_exact(&mut reply).map_err(unanswered)?;
        let refused = match Reply::parse(&reply).map_err(|e| invalid(e.to_string()))?.status {
            Status::Welcome => {
                conn.silence(None)?;
                return Ok(conn);
            }
            Status::Unknown => {
                return Err(io::Error::new(io::ErrorKind::NotFound, "the peer knows no such migration"));
            }
            Status::Busy | Status::Version => "the peer takes nothing in just now",
            Status::Stranger => "the peer does not take this connection for one of this migration's",
            Status::Secured => SPEAKS_TLS,
            Status::Unsecured => SPEAKS_PLAINTEXT,
        };
        Err(invalid(refused))
    }
}

/// Said by a side without certificates.
const SPEAKS_TLS: &str = "the other side speaks TLS, and this side plaintext (--insecure-plaintext): start \
     both with certificates, or both without";

/// Said by a side with certificates.
pub(crate) const SPEAKS_PLAINTEXT: &str = "the other side speaks plaintext (--insecure-plaintext), and this \
     side TLS: start both with certificates, or both without";

impl Dial for TcpDial {
    fn dial(&self, kind: Purpose, token: Option<&Token>) -> io::Result<Conn> {
        self.call(kind, token, GREETING)
    }

    fn dial_soon(&self, kind: Purpose, token: Option<&Token>, within: Duration) -> io::Result<Conn> {
        self.call(kind, token, within)
    }

    fn is_plaintext(&self) -> bool {
        matches!(self.security, Security::Plaintext)
    }

    fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }
}

/// The first byte of a TLS connection: a handshake record.
const TLS: u8 = 22;

/// What this side reads as the peer's words goes through here, so that its first bytes are checked once.
/// All of it within this time.
pub(crate) fn welcome(
    stream: TcpStream,
    security: &Security,
    within: Duration,
) -> io::Result<(Conn, Preamble, Option<Token>)> {
    let mut conn = Conn::new(stream, Arc::default())?;
    conn.all_within(Some(within))?;
    let mut first = [0];
    let speaks_tls = conn.stream.peek(&mut first)? == 1 && first[0] == TLS;
    match security {
        Security::Plaintext if speaks_tls => return turn_away(conn, Status::Unsecured, SPEAKS_TLS),
        Security::Tls(_) if !speaks_tls => {
            let why = if first[0] == proto::MAGIC[0] { SPEAKS_PLAINTEXT } else { "the peer speaks no TLS" };
            return turn_away(conn, Status::Secured, why);
        }
        Security::Plaintext => {}
        Security::Tls(identity) => {
            match channel::answer(&conn.stream, &conn.traffic, identity, conn.deadline) {
                Ok(channel) => conn.channel = Some(Arc::new(channel)),
                Err(e) => {
                    // The alert that says why must not be lost in a reset.
                    drain(&conn.stream);
                    return Err(e);
                }
            }
        }
    }
    let mut bytes = [0; Preamble::SIZE];
    conn.read_exact(&mut bytes)?;
    let preamble = match Preamble::parse(&bytes) {
        Ok(preamble) => preamble,
        Err(e) => {
            let _ = conn.write_all(&Reply::new(Status::Version).to_bytes());
            return Err(invalid(e.to_string()));
        }
    };
    let mut token = None;
    if preamble.kind.needs_token() {
        let mut bytes = [0; Token::SIZE];
        conn.read_exact(&mut bytes)?;
        token = Some(Token(bytes));
    }
    conn.all_within(None)?;
    Ok((conn, preamble, token))
}

/// Says in plaintext why nothing comes of it.
fn turn_away<T>(mut conn: Conn, status: Status, why: &str) -> io::Result<T> {
    let _ = conn.write_all(&Reply::new(status).to_bytes());
    drain(&conn.stream);
    Err(invalid(why))
}

/// Hangs up, but so that what was said last arrives: bytes that nobody read would turn it into a reset.
fn drain(stream: &TcpStream) {
    /// More than a peer says before it listens, and longer than that takes to arrive.
    const ENOUGH: u64 = 64 << 10;
    const LONG: Duration = Duration::from_secs(1);
    let _ = stream.shutdown(Shutdown::Write);
    let stream = By { stream, deadline: Some(Instant::now() + LONG) };
    let _ = io::copy(&mut stream.take(ENOUGH), &mut io::sink());
}

pub(crate) fn invalid(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

fn timed_out(e: io::Error, words: &str) -> io::Error {
    match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => io::Error::new(io::ErrorKind::TimedOut, words),
        _ => e,
    }
}

/// Why a greeting was not answered.
pub(crate) fn unanswered(e: io::Error) -> io::Error {
    match e.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
            invalid("the peer hung up instead of answering; is a Whimbrel agent there?")
        }
        _ => timed_out(e, "the peer does not answer; is a Whimbrel agent there?"),
    }
}

/// Reads one control message. Memory is spent only as the bytes arrive.
pub(crate) fn read_control(conn: &mut impl Read) -> io::Result<control::Kind> {
    let mut length = [0; 4];
    conn.read_exact(&mut length).map_err(|e| timed_out(e, "nothing was heard from the peer for too long"))?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_CONTROL {
        return Err(invalid(format!(
            "a control message of {length} bytes; at most {MAX_CONTROL} are agreed"
        )));
    }
    let mut bytes = Vec::new();
    Read::by_ref(conn).take(length as u64).read_to_end(&mut bytes)?;
    if bytes.len() < length {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the peer hung up in the middle of a message",
        ));
    }
    proto::decode(&bytes).map_err(|e| invalid(e.to_string()))
}

/// The writing end of a control connection; any thread may speak.
#[derive(Clone, Debug)]
pub(crate) struct Speaker(Arc<Mutex<Conn>>);

impl Speaker {
    pub(crate) fn new(conn: Conn) -> Self {
        Self(Arc::new(Mutex::new(conn)))
    }

    /// How many bytes that was.
    pub(crate) fn say(&self, kind: control::Kind) -> io::Result<usize> {
        let bytes = proto::encode(kind);
        self.0.lock().expect("no one panics while speaking").write_all(&bytes)?;
        Ok(bytes.len())
    }
}

/// What the pings taught of the peer's clock.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    best: Mutex<Option<(Duration, i128)>>,
    /// When the last answer came.
    last: Mutex<Option<Instant>>,
}

impl Heard {
    fn pong(&self, pong: &control::Pong) {
        *self.last.locked() = Some(Instant::now());
        let now = now_ns();
        let round_trip = Duration::from_nanos(now.saturating_sub(pong.sent_ns));
        let middle = i128::from(pong.sent_ns) + round_trip.as_nanos() as i128 / 2;
        let offset = i128::from(pong.here_ns) - middle;
        let mut best = self.best.locked();
        // The quickest answer knows the time best (as in NTP).
        if best.is_none_or(|(quickest, _)| round_trip < quickest) {
            *best = Some((round_trip, offset));
        }
    }

    /// When the last answer came.
    pub(crate) fn last(&self) -> Option<Instant> {
        *self.last.locked()
    }

    /// The quickest answer took so long.
    pub(crate) fn round_trip(&self) -> Option<Duration> {
        self.best.locked().map(|(round_trip, _)| round_trip)
    }

    /// An instant of the peer's clock on this side's.
    pub(crate) fn to_here(&self, theirs_ns: u64) -> Option<i128> {
        let best = *self.best.locked();
        best.map(|(_, offset)| i128::from(theirs_ns) - offset)
    }
}

/// This side's clock: nanoseconds since the process first looked at it.
pub(crate) fn now_ns() -> u64 {
    at_ns(Instant::now())
}

/// An instant on this side's clock; one before anybody looked at it is its beginning.
pub(crate) fn at_ns(instant: Instant) -> u64 {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    instant.saturating_duration_since(*START).as_nanos() as u64
}

/// Reads control messages until the connection ends, or is silent for so long; pings are answered on the
/// spot. Returns why it ended.
pub(crate) fn listen(
    mut conn: Conn,
    silence: Duration,
    speaker: &Speaker,
    heard: &Heard,
    mut tell: impl FnMut(control::Kind),
) -> io::Error {
    if let Err(e) = conn.silence(Some(silence)) {
        return e;
    }
    // A peer that has gone hears no answer any more, and what it said last is behind its last ping: that it
    // gives up, and why.
    let mut unanswered = None;
    loop {
        match read_control(&mut conn) {
            Ok(control::Kind::Ping(ping)) if unanswered.is_none() => {
                let pong = control::Pong { sent_ns: ping.sent_ns, here_ns: now_ns() };
                unanswered = speaker.say(control::Kind::Pong(pong)).err();
            }
            Ok(control::Kind::Ping(_)) => {}
            Ok(control::Kind::Pong(pong)) => heard.pong(&pong),
            Ok(kind) => tell(kind),
            // What is understood no more is worse than a lost connection, and is told as such.
            Err(e) if e.kind() == io::ErrorKind::InvalidData => return e,
            Err(e) => return unanswered.unwrap_or(e),
        }
    }
}

#[cfg(test)]
mod tests;
