//! A TCP client outside the guest, whose connection must survive whatever happens to the guest.

use crate::{Doing, Error, Namespace, Result};
use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// What a client saw so far.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ClientCounts {
    /// Messages sent.
    pub sent: u64,
    /// Messages that came back, each the right one at its turn.
    pub echoed: u64,
    /// The longest time in which nothing came back although something was on its way.
    pub longest_gap: Duration,
    /// Why the connection ended, or which message came back wrong.
    pub broken: Option<String>,
}

/// Keeps one connection to a guest's echo port and sends a numbered message every few milliseconds.
#[derive(Debug)]
pub struct TcpClient {
    seen: Arc<Mutex<ClientCounts>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl TcpClient {
    /// Connects from inside `namespace`; fails if there is no connection `within` that time.
    pub fn connect(namespace: &Namespace, to: SocketAddr, every: Duration, within: Duration) -> Result<Self> {
        let stream = connect(namespace, to, within)?;
        let seen = Arc::new(Mutex::new(ClientCounts::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (seen, stop) = (seen.clone(), stop.clone());
            move || {
                if let Err(why) = converse(stream, every, &seen, &stop) {
                    locked(&seen).broken = Some(why.to_string());
                }
            }
        });
        Ok(Self { seen, stop, thread: Some(thread) })
    }

    /// What it saw so far.
    pub fn seen(&self) -> ClientCounts {
        locked(&self.seen).clone()
    }

    /// Starts a new measurement of the longest gap.
    pub fn forget_gap(&self) {
        locked(&self.seen).longest_gap = Duration::ZERO;
    }

    /// Ends the conversation: waits until everything sent has come back, and says what was seen altogether.
    /// Lost messages and a broken connection are errors.
    pub fn finish(mut self, within: Duration) -> Result<ClientCounts> {
        self.stop.store(true, Ordering::Relaxed);
        let last = crate::wait_for("the last echo", within, || {
            let seen = self.seen();
            Ok((seen.broken.is_some() || seen.echoed == seen.sent).then_some(seen))
        });
        self.join();
        match last? {
            ClientCounts { broken: Some(why), .. } => Err(Error::new("the client's connection broke", why)),
            seen => Ok(seen),
        }
    }

    fn join(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for TcpClient {
    fn drop(&mut self) {
        self.join();
    }
}

/// A connection from inside `namespace`, tried again until it works or `within` is over.
pub fn connect(namespace: &Namespace, to: SocketAddr, within: Duration) -> Result<TcpStream> {
    namespace.inside(|| {
        let end = Instant::now() + within;
        loop {
            match TcpStream::connect_timeout(&to, Duration::from_millis(500)) {
                Ok(stream) => {
                    stream.set_nodelay(true).doing("set TCP_NODELAY")?;
                    return Ok(stream);
                }
                Err(why) if Instant::now() > end => {
                    return Err(Error::new(format!("connect to {to} from {}", namespace.name()), why));
                }
                // A refusal comes at once: the guest has only just booted.
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        }
    })
}

fn locked(seen: &Mutex<ClientCounts>) -> std::sync::MutexGuard<'_, ClientCounts> {
    seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Sends and receives until told to stop and nothing is on its way; or until `stop` and silence.
fn converse(
    mut stream: TcpStream,
    every: Duration,
    seen: &Mutex<ClientCounts>,
    stop: &AtomicBool,
) -> std::io::Result<()> {
    /// After being told to stop: how long to wait for what is still on its way.
    const LAST_WAIT: Duration = Duration::from_secs(10);
    let mut buffer = [0; 4096];
    let mut partial = Vec::new();
    let (mut next, mut heard) = (Instant::now(), Instant::now());
    let (mut sent, mut echoed, mut told) = (0_u64, 0_u64, None);
    loop {
        let now = Instant::now();
        if stop.load(Ordering::Relaxed) && told.is_none() {
            told = Some(now);
        }
        if told.is_some_and(|at| sent == echoed || now > at + LAST_WAIT) {
            return Ok(());
        }
        if told.is_none() && now >= next {
            if sent == echoed {
                heard = now; // nothing was on its way: silence begins to count now
            }
            stream.write_all(&sent.to_be_bytes())?;
            sent += 1;
            next = (next + every).max(now);
            locked(seen).sent = sent;
        }
        let wait = next.saturating_duration_since(now).clamp(Duration::from_micros(200), every);
        stream.set_read_timeout(Some(wait))?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(std::io::Error::new(ErrorKind::UnexpectedEof, "the guest closed it")),
            Ok(n) => partial.extend_from_slice(&buffer[..n]),
            // With a time limit, a read ends at a signal, too.
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(e) => return Err(e),
        }
        while let Some((message, rest)) = partial.split_first_chunk() {
            let number = u64::from_be_bytes(*message);
            if number != echoed {
                let words = format!("message {number} came back where {echoed} was due");
                return Err(std::io::Error::new(ErrorKind::InvalidData, words));
            }
            echoed += 1;
            partial = rest.to_vec();
            let now = Instant::now();
            let mut seen = locked(seen);
            seen.echoed = echoed;
            seen.longest_gap = seen.longest_gap.max(now - heard);
            heard = now;
        }
    }
}
