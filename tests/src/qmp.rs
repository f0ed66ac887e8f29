//! QEMU's monitor, for machines that a story starts by hand. (The program under test has its own client.)

use crate::{Doing, Error, Result};
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// A connection to a monitor. QEMU serves one at a time: drop it before somebody else is to talk to the machine.
#[derive(Debug)]
pub struct Qmp(BufReader<UnixStream>);

impl Qmp {
    /// Connects and finishes the handshake.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).doing(format!("connect to {}", socket.display()))?;
        // A busy monitor accepts nobody and says nothing: that must end as an error.
        stream.set_read_timeout(Some(Duration::from_secs(20))).doing("set a timeout")?;
        let mut qmp = Self(BufReader::new(stream));
        qmp.line().doing("read QEMU's greeting")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Executes a command; events that come in between are dropped.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.0.get_mut().write_all(line.as_bytes()).doing(format!("send {command}"))?;
        loop {
            let mut answer = self.line()?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                return Err(Error::new(command, &error["desc"]));
            }
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let n = self.0.read_line(&mut line).doing("read from QEMU")?;
        if n == 0 {
            Err(Error::new("read from QEMU", "it hung up"))
        } else {
            serde_json::from_str(&line).doing(line)
        }
    }
}
