//! Lines from a socket, bounded in length and in time.

use super::QmpError;
use rustix::{io::Errno, net::RecvFlags};
use std::{
    io::{self, Read},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

/// The longest line that is read. The memory tree of a large guest is under 1 MiB; whoever sends more is not
/// QEMU, or means us harm.
const LONGEST: usize = 16 << 20;

/// What came from the socket and has not been given out yet.
#[derive(Debug, Default)]
pub(super) struct Lines {
    buffer: Vec<u8>,
    /// Up to here there is no line end.
    searched: usize,
}

impl Lines {
    pub(super) fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The beginning of what came, for an error message.
    pub(super) fn glimpse(&self) -> String {
        String::from_utf8_lossy(&self.buffer[..self.buffer.len().min(60)]).into_owned()
    }

    /// The first line ever. What does not begin like JSON is given out without waiting for its end.
    pub(super) fn first(&mut self, socket: &UnixStream, end: Instant) -> Result<Vec<u8>, QmpError> {
        while self.buffer.is_empty() {
            self.fill(socket, end)?;
        }
        if self.buffer[0] != b'{' {
            return Ok(std::mem::take(&mut self.buffer));
        }
        self.next(socket, end)
    }

    /// The next line, without its end.
    pub(super) fn next(&mut self, socket: &UnixStream, end: Instant) -> Result<Vec<u8>, QmpError> {
        loop {
            // At once, not line by line: each line moves what comes after it.
            if self.searched == 0 && self.buffer.first().is_some_and(u8::is_ascii_whitespace) {
                let blank = self.buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
                self.buffer.drain(..blank);
            }
            if let Some(at) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(self.searched + at + 1);
                self.searched = 0;
                return Ok(std::mem::replace(&mut self.buffer, rest));
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > LONGEST {
                return Err(QmpError::TooLong { command: String::new(), limit: LONGEST });
            }
            self.fill(socket, end)?;
        }
    }

    /// The next line if all of it is there already. Never waits.
    pub(super) fn there(&mut self, socket: &UnixStream) -> Result<Option<Vec<u8>>, QmpError> {
        let mut chunk = [0; 16 << 10];
        loop {
            if self.buffer[self.searched..].contains(&b'\n') {
                return match self.next(socket, Instant::now()) {
                    // An empty one.
                    Err(QmpError::Timeout { .. }) => Ok(None),
                    line => line.map(Some),
                };
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > LONGEST {
                return Err(QmpError::TooLong { command: String::new(), limit: LONGEST });
            }
            match rustix::net::recv(socket, &mut chunk[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(QmpError::Closed { command: String::new() }),
                Ok((_, got)) => self.buffer.extend_from_slice(&chunk[..got]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => {
                    return Err(QmpError::Broken { command: String::new(), cause: error.into() });
                }
            }
        }
    }

    fn fill(&mut self, mut socket: &UnixStream, end: Instant) -> Result<(), QmpError> {
        let broken = |cause| QmpError::Broken { command: String::new(), cause };
        let timeout = || QmpError::Timeout { command: String::new(), waited: Duration::ZERO };
        let mut chunk = [0; 16 << 10];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(timeout());
            }
            socket.set_read_timeout(Some(left)).map_err(broken)?;
            match socket.read(&mut chunk) {
                Ok(0) => return Err(QmpError::Closed { command: String::new() }),
                Ok(got) => {
                    self.buffer.extend_from_slice(&chunk[..got]);
                    return Ok(());
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => return Err(timeout()),
                    io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                        return Err(QmpError::Closed { command: String::new() });
                    }
                    _ => return Err(broken(error)),
                },
            }
        }
    }
}
