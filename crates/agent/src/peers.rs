//! Connections that other agents make: accepted here, served by the migrator, each on a thread of its own.

mod door; // who may wait until it is known what they want

pub use door::Pass;

use crate::config::Address;
use door::Door;
use socket2::SockRef;
use std::{
    io,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};
use tracing::{debug, warn};

/// Connections served at once. A migration takes a dozen; beyond this somebody only wants to exhaust our
/// threads.
const MOST_CONNECTIONS: usize = 1024;

/// How long to leave the listener alone when the host has run out of descriptors or memory: nothing tells
/// when it has some again.
const BREATH: Duration = Duration::from_millis(100);

/// The agent's TCP port.
pub struct Peers {
    listener: Arc<TcpListener>,
    address: SocketAddr,
    accepting: Option<JoinHandle<()>>,
}

impl Peers {
    /// Listens at `address`, and has every connection served by `serve` on its own thread. For `known` hosts
    /// there is always room.
    pub fn listen(
        address: SocketAddr,
        known: Vec<Address>,
        serve: impl Fn(TcpStream, SocketAddr, Pass) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let listener = Arc::new(TcpListener::bind(address)?);
        let address = listener.local_addr()?;
        let door = Door::default();
        let accepting = thread::Builder::new().name("peers".to_owned()).spawn({
            let (listener, serve, door) = (listener.clone(), Arc::new(serve), door.clone());
            move || accept(&listener, &door, &serve)
        })?;
        // A name may take its time to be looked up. A host that cannot be known now is once it has called.
        let look_up = move || {
            for one in known.iter().flat_map(Address::each).map(|(one, _)| one) {
                door.know(one.to_socket_addrs().into_iter().flatten().map(|found| found.ip()));
            }
        };
        if let Err(error) = thread::Builder::new().name("look-up".to_owned()).spawn(look_up) {
            warn!(%error, "peers are known once they have called");
        }
        Ok(Self { listener, address, accepting: Some(accepting) })
    }

    /// Where it listens; tells the port if that was left to the system.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// No connection is accepted any more; those that are served go on.
impl Drop for Peers {
    fn drop(&mut self) {
        // Wakes `accept`, which then fails with EINVAL.
        let _ = SockRef::from(&*self.listener).shutdown(Shutdown::Both);
        if let Some(thread) = self.accepting.take() {
            let _ = thread.join();
        }
    }
}

fn accept<S: Fn(TcpStream, SocketAddr, Pass) + Send + Sync + 'static>(
    listener: &TcpListener,
    door: &Door,
    serve: &Arc<S>,
) {
    let served = Arc::new(AtomicUsize::new(0));
    loop {
        let (connection, from) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
            // The peer had gone before we came to it.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                thread::sleep(BREATH);
                continue;
            }
        };
        if served.fetch_add(1, Ordering::Relaxed) >= MOST_CONNECTIONS {
            served.fetch_sub(1, Ordering::Relaxed);
            warn!(%from, "turned away: {MOST_CONNECTIONS} connections are open");
            continue;
        }
        let (serve, done) = (serve.clone(), Counted(served.clone()));
        let pass = match door.arrive(&connection, from.ip()) {
            Ok(Some(pass)) => pass,
            Ok(None) => {
                debug!(%from, "turned away: it has too many connections that say nothing");
                continue;
            }
            Err(error) => {
                warn!(%from, %error, "a connection cannot be taken in");
                continue;
            }
        };
        debug!(%from, "connection");
        let work = move || {
            let _done = done;
            serve(connection, from, pass);
        };
        if let Err(error) = thread::Builder::new().name(format!("peer {from}")).spawn(work) {
            warn!(%from, %error, "no thread for a connection");
        }
    }
}

/// Counts a connection as closed, also when its thread panics or never began.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        net::Ipv4Addr,
    };

    #[test]
    fn each_connection_is_served_and_the_end_is_clean() {
        let here = (Ipv4Addr::LOCALHOST, 0).into();
        let peers = Peers::listen(here, vec![], |mut connection, _, _| {
            let mut byte = [0];
            connection.read_exact(&mut byte).unwrap();
            assert_ne!(byte, [0], "a panic while serving ends one connection only");
            connection.write_all(&byte).unwrap();
        })
        .unwrap();
        let mut connections: Vec<_> = (0..4).map(|_| TcpStream::connect(peers.address()).unwrap()).collect();
        for (i, connection) in connections.iter_mut().enumerate().rev() {
            connection.write_all(&[i as u8]).unwrap();
            let mut back = Vec::new();
            connection.read_to_end(&mut back).unwrap();
            assert_eq!(back.first().copied().unwrap_or(0), i as u8);
        }
        let address = peers.address();
        drop(peers);
        assert!(TcpStream::connect(address).is_err());
    }
}
