//! The host's end of a channel to an agent in a guest.

use crate::{Doing, Result};
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    thread::{self, JoinHandle},
    time::Duration,
};

/// How long a guest under emulation may take to answer on a busy machine.
const ANSWER: Duration = Duration::from_secs(30);

/// Somebody who talks to the guest's agent.
#[derive(Debug)]
pub struct Channel(BufReader<UnixStream>);

impl Channel {
    /// Connects to the socket at which QEMU listens.
    pub fn connect(socket: &Path) -> Result<Self> {
        let what = || format!("connect to {}", socket.display());
        let stream = UnixStream::connect(socket).doing(what())?;
        stream.set_read_timeout(Some(ANSWER)).doing(what())?;
        Ok(Self(BufReader::new(stream)))
    }

    /// The agent counts what it is asked, wherever its guest is.
    pub fn ask(&mut self, line: &str) -> Result<u64> {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).doing("ask the agent")?;
        loop {
            let mut answer = String::new();
            self.0.read_line(&mut answer).doing("hear the agent")?;
            let (count, said) = answer.trim_end().split_once(' ').doing(format!("understand {answer:?}"))?;
            // What somebody else asked who was cut off comes first.
            if said == line {
                return count.parse().doing(format!("understand {answer:?}"));
            }
        }
    }

    /// Asks without end, until the connection does.
    pub fn chat(mut self) -> JoinHandle<()> {
        thread::spawn(move || while self.ask("chat").is_ok() {})
    }
}
