//! What a connection was given and has not carried yet (`man 7 tcp`, `man 7 unix`: SIOCOUTQ), and where it
//! leads.

use crate::ioctl;
use nix::libc;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketAddrAny, SocketAddrUnix, getpeername, getsockname,
        sockopt::{socket_acceptconn, socket_domain},
    },
};
use std::{
    ffi::OsStr,
    io,
    net::SocketAddr,
    os::{
        fd::{AsFd, AsRawFd},
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::PathBuf,
};

/// Bytes that wait in a connection's queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Queue {
    /// Given to the connection and not confirmed by the other side.
    pub unconfirmed: u64,
    /// Of these, not even sent: the link, or the other side, takes no more just now.
    pub unsent: u64,
}

/// What waits in the queue of a connected TCP socket.
pub fn queue(socket: impl AsFd) -> io::Result<Queue> {
    let bytes = |request| {
        let mut bytes: libc::c_int = 0;
        // SAFETY: both requests fill an `int`.
        unsafe { ioctl::run(socket.as_fd().as_raw_fd(), request, &mut bytes) }?;
        Ok::<_, io::Error>(u64::try_from(bytes).unwrap_or(0))
    };
    // In this order what is confirmed in between cannot make more unsent than unconfirmed.
    let unsent = bytes(ioctl::SIOCOUTQNSD)?;
    Ok(Queue { unconfirmed: bytes(ioctl::SIOCOUTQ)?.max(unsent), unsent })
}

/// Memory that holds what the other end of a socket pair has not read yet; 0 once it has read everything, or
/// is gone.
pub fn unread(socket: &UnixStream) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request fills an `int`.
    unsafe { ioctl::run(socket.as_raw_fd(), ioctl::SIOCOUTQ, &mut bytes) }?;
    Ok(u64::try_from(bytes).unwrap_or(0))
}

/// How many bytes the other side has confirmed so far (`man 7 tcp`: TCP_INFO).
pub fn confirmed(socket: impl AsFd) -> io::Result<u64> {
    /// `struct tcp_info` of `<linux/tcp.h>` grows at its end only; `tcpi_bytes_acked` (Linux 4.1) is here.
    const BYTES_ACKED: usize = 120;
    let mut info = [0_u8; BYTES_ACKED + 8];
    let mut length = info.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which is what `info` has.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    match info[BYTES_ACKED..].first_chunk() {
        Some(bytes) if length as usize >= info.len() => Ok(u64::from_ne_bytes(*bytes)),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Where a socket leads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ends {
    /// Within this host.
    Unix {
        /// Whether others can connect to it.
        listens: bool,
        /// Its own name; an abstract one begins with `@`. One that is accepted has that of its listener.
        own: Option<PathBuf>,
        /// The name that it is connected to.
        peer: Option<PathBuf>,
    },
    /// To other hosts.
    Internet {
        /// What it is connected to.
        peer: Option<SocketAddr>,
    },
    /// Another family of addresses, by its number (`socket(2)`).
    Other(u16),
}

/// Where this socket leads.
pub fn ends(socket: impl AsFd) -> io::Result<Ends> {
    let socket = socket.as_fd();
    let family = socket_domain(socket)?;
    let peer = || match getpeername(socket) {
        Err(Errno::NOTCONN) => Ok(None),
        peer => peer,
    };
    Ok(match family {
        AddressFamily::UNIX => Ends::Unix {
            listens: socket_acceptconn(socket)?,
            own: name(getsockname(socket)?),
            peer: peer()?.and_then(name),
        },
        AddressFamily::INET | AddressFamily::INET6 => {
            Ends::Internet { peer: peer()?.and_then(|peer| SocketAddr::try_from(peer).ok()) }
        }
        other => Ends::Other(other.as_raw()),
    })
}

fn name(address: SocketAddrAny) -> Option<PathBuf> {
    let address = SocketAddrUnix::try_from(address).ok()?;
    // Of one that has none, it is empty.
    if let Some(name) = address.abstract_name().filter(|name| !name.is_empty()) {
        return Some(PathBuf::from(OsStr::from_bytes(&[b"@", name].concat())));
    }
    let path = address.path().filter(|path| !path.is_empty())?;
    Some(PathBuf::from(OsStr::from_bytes(path.to_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        time::{Duration, Instant},
    };

    #[test]
    fn what_nobody_reads_waits_and_what_was_read_does_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut reader, _) = listener.accept().unwrap();
        assert_eq!(queue(&sender).unwrap(), Queue { unconfirmed: 0, unsent: 0 });
        sender.set_nonblocking(true).unwrap();
        let mut given = 0;
        let block = [0; 1 << 20];
        let since = Instant::now();
        // Until nothing has been taken for a while: the windows have stopped growing.
        while let Ok(n) = sender.write(&block) {
            given += n;
            assert!(since.elapsed() < Duration::from_secs(20), "somebody reads");
        }
        let full = queue(&sender).unwrap();
        let before = confirmed(&sender).unwrap();
        assert!(before > 0 && before <= given as u64, "{before} of {given}");
        assert!(full.unsent > 0 && full.unconfirmed >= full.unsent, "{full:?}");
        assert!(
            full.unconfirmed < given as u64,
            "what the other side holds is confirmed: {full:?} of {given}"
        );
        sender.set_nonblocking(false).unwrap();
        drop(std::thread::spawn(move || {
            let _ = reader.read_exact(&mut vec![0; given]);
            // It stays open until the sender is gone.
            let _ = reader.read(&mut [0]);
        }));
        while queue(&sender).unwrap().unconfirmed > 0 {
            assert!(since.elapsed() < Duration::from_secs(20), "it does not arrive");
            std::thread::yield_now();
        }
        // The first byte is the connection's own.
        assert!(confirmed(&sender).unwrap() >= given as u64);
    }

    #[test]
    fn what_the_other_end_of_a_pair_has_not_read_waits() {
        let (mut one, mut other) = UnixStream::pair().unwrap();
        assert_eq!(unread(&one).unwrap(), 0);
        one.write_all(&[1; 100]).unwrap();
        assert!(unread(&one).unwrap() >= 100);
        other.read_exact(&mut [0; 100]).unwrap();
        assert_eq!(unread(&one).unwrap(), 0);
        one.write_all(&[1; 100]).unwrap();
        drop(other);
        assert_eq!(unread(&one).unwrap(), 0, "nobody will read it");
    }

    #[test]
    fn only_a_socket_has_a_queue() {
        assert!(queue(std::fs::File::open("/dev/null").unwrap()).is_err());
        assert!(confirmed(std::fs::File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn a_socket_says_where_it_leads() {
        use std::os::{linux::net::SocketAddrExt, unix::net};
        let (one, _other) = UnixStream::pair().unwrap();
        let unnamed = Ends::Unix { listens: false, own: None, peer: None };
        assert_eq!(ends(&one).unwrap(), unnamed);
        let name = format!("whimbrel-ends-{}", std::process::id());
        let address = net::SocketAddr::from_abstract_name(&name).unwrap();
        let listener = net::UnixListener::bind_addr(&address).unwrap();
        let client = UnixStream::connect_addr(&address).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let named = Some(PathBuf::from(format!("@{name}")));
        let unix = |listens, own: &Option<PathBuf>, peer: &Option<PathBuf>| Ends::Unix {
            listens,
            own: own.clone(),
            peer: peer.clone(),
        };
        assert_eq!(ends(&listener).unwrap(), unix(true, &named, &None));
        assert_eq!(ends(&client).unwrap(), unix(false, &None, &named));
        assert_eq!(ends(&accepted).unwrap(), unix(false, &named, &None));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(ends(&listener).unwrap(), Ends::Internet { peer: None });
        let at = listener.local_addr().unwrap();
        assert_eq!(ends(TcpStream::connect(at).unwrap()).unwrap(), Ends::Internet { peer: Some(at) });
    }
}
