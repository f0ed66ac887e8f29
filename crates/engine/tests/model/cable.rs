//! What connects the two sides, and what can happen to it.

use proto::{Preamble, Purpose};
use socket2::SockRef;
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

const BUFFER: usize = 64 << 10;

/// A cable that can be cut and mended.
#[derive(Clone)]
pub(crate) struct Cable {
    pub(crate) address: SocketAddr,
    ends: Arc<Mutex<Vec<TcpStream>>>,
    pub(crate) cut: Arc<AtomicBool>,
    pub(crate) passed: Arc<AtomicU64>,
    pub(crate) cut_after: Arc<AtomicU64>,
    /// Connections that came while it was cut.
    pub(crate) refused: Arc<AtomicU64>,
    lie: Arc<Mutex<Option<Lie>>>,
    /// The ends of each stream's connection, in the order in which they were made.
    streams: Arc<Mutex<Vec<(u16, TcpStream)>>>,
    /// While set, connections for streams that were cut are not let through.
    pub(crate) held: Arc<AtomicBool>,
    /// What each connection carries in a second, as after a long way.
    pub(crate) each: Arc<AtomicU64>,
}

/// A byte that arrives at the target as another one, counted from the beginning of each data connection.
#[derive(Clone, Copy)]
pub(crate) struct Lie {
    pub(crate) at: usize,
    pub(crate) byte: u8,
}

impl Cable {
    pub(crate) fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // It is no store of what it carries.
        SockRef::from(&listener).set_recv_buffer_size(BUFFER).unwrap();
        let cable = Self {
            address: listener.local_addr().unwrap(),
            ends: Arc::default(),
            cut: Arc::default(),
            passed: Arc::default(),
            cut_after: Arc::new(AtomicU64::new(u64::MAX)),
            refused: Arc::default(),
            lie: Arc::default(),
            streams: Arc::default(),
            held: Arc::default(),
            each: Arc::new(AtomicU64::new(u64::MAX)),
        };
        let this = cable.clone();
        thread::spawn(move || {
            for from in listener.incoming().map_while(Result::ok) {
                if this.cut.load(SeqCst) {
                    this.refused.fetch_add(1, SeqCst);
                    continue;
                }
                let to = TcpStream::connect(target).unwrap();
                SockRef::from(&to).set_send_buffer_size(BUFFER).unwrap();
                let (a, b) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                this.ends.lock().unwrap().extend([a.try_clone().unwrap(), b.try_clone().unwrap()]);
                let lie = *this.lie.lock().unwrap();
                this.pump(from, b, lie, true);
                this.pump(to, a, None, false);
            }
        });
        cable
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream, mut lie: Option<Lie>, forth: bool) {
        let this = self.clone();
        thread::spawn(move || {
            let mut buffer = [0; 16384];
            let mut before = 0;
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                // A preamble is written at once.
                let preamble = buffer[..n].first_chunk().filter(|_| forth && before == 0);
                if let Some(preamble) = preamble.and_then(|bytes| Preamble::parse(bytes).ok()) {
                    lie = lie.filter(|_| matches!(preamble.kind, Purpose::Data(_)));
                    if let Purpose::Data(stream) = preamble.kind {
                        this.streams.lock().unwrap().push((stream, from.try_clone().unwrap()));
                        while this.held.load(SeqCst) {
                            thread::sleep(Duration::from_millis(1));
                        }
                    }
                }
                if let Some(Lie { at, byte }) = lie.filter(|lie| (before..before + n).contains(&lie.at)) {
                    buffer[at - before] = byte;
                }
                before += n;
                thread::sleep(Duration::from_secs_f64(n as f64 / this.each.load(SeqCst) as f64));
                if this.passed.fetch_add(n as u64, SeqCst) + n as u64 > this.cut_after.load(SeqCst) {
                    this.cut_after.store(u64::MAX, SeqCst);
                    this.cut();
                }
                if this.cut.load(SeqCst) || to.write_all(&buffer[..n]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(std::net::Shutdown::Both);
        });
    }

    pub(crate) fn cut(&self) {
        self.cut.store(true, SeqCst);
        for end in self.ends.lock().unwrap().drain(..) {
            let _ = end.shutdown(std::net::Shutdown::Both);
        }
    }

    /// How many connections there were for this stream.
    pub(crate) fn connections(&self, stream: u16) -> usize {
        self.streams.lock().unwrap().iter().filter(|(id, _)| *id == stream).count()
    }

    /// The connection that this stream has now ends, and no other. Says how many there were of it.
    pub(crate) fn cut_stream(&self, stream: u16) -> usize {
        let streams = self.streams.lock().unwrap();
        if let Some((_, last)) = streams.iter().rfind(|(id, _)| *id == stream) {
            // It may have ended by itself.
            let _ = last.shutdown(std::net::Shutdown::Both);
        }
        drop(streams);
        self.connections(stream)
    }

    pub(crate) fn mend(&self) {
        self.cut.store(false, SeqCst);
    }

    /// Connections made from now on are lied on.
    pub(crate) fn lie(&self, lie: Lie) {
        *self.lie.lock().unwrap() = Some(lie);
    }
}
