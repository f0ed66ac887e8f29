//! QEMU's monitor, for machines that are started by hand, with its events: they carry QEMU's own time stamps.
//! (The program under test has its own client.)

use crate::{Doing, Error, Result};
use rustix::{
    fs::{MemfdFlags, Mode, OFlags, memfd_create, open},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
};
use serde_json::{Value, json};
use std::{
    fs::File,
    io::{BufRead, BufReader, ErrorKind, IoSlice, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::{Duration, Instant, SystemTime},
};

/// No answer and no event takes longer; a busy monitor accepts nobody and says nothing, which must end as an
/// error.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a monitor, and every event since. QEMU serves one at a time: drop it before somebody else
/// is to talk to the machine.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    /// A line that has not come to its end yet.
    begun: Vec<u8>,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects and finishes the handshake.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).doing(format!("connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(PATIENCE)).doing("set a timeout")?;
        let mut qmp = Self { stream: BufReader::new(stream), begun: Vec::new(), events: Vec::new() };
        qmp.line().doing("read QEMU's greeting")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Executes a command; events that come in between are kept.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.stream.get_mut().write_all(line.as_bytes()).doing(format!("send {command}"))?;
        loop {
            let mut answer = self.line()?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                return Err(Error::new(command, &error["desc"]));
            }
            self.events.push(answer);
        }
    }

    /// Executes a command for people; its answer.
    pub fn human(&mut self, line: &str) -> Result<String> {
        match self.execute("human-monitor-command", json!({ "command-line": line }))? {
            Value::String(said) => Ok(said.replace('\r', "")),
            other => Err(Error::new(line, other)),
        }
    }

    /// What the guest's first screen shows, as `screendump` writes it.
    pub fn picture(&mut self) -> Result<Vec<u8>> {
        let what = "take a picture of a screen";
        let mut file = File::from(memfd_create("picture", MemfdFlags::CLOEXEC).doing(what)?);
        // QEMU takes a descriptor that was opened as it would open the file itself.
        let name = format!("/proc/self/fd/{}", file.as_raw_fd());
        let writes = open(name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).doing(what)?;
        let added = self.pass("add-fd", writes.as_fd())?;
        let set = added["fdset-id"].as_u64().doing(format!("{what}: read {added}"))?;
        self.execute("screendump", json!({ "filename": format!("/dev/fdset/{set}") }))?;
        self.execute("remove-fd", json!({ "fdset-id": set }))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).doing(what)?;
        Ok(bytes)
    }

    /// Executes a command that takes a descriptor.
    fn pass(&mut self, command: &str, fd: BorrowedFd) -> Result<Value> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        // With a blank, because a descriptor needs a byte to go with; the command itself follows.
        let sent = sendmsg(self.stream.get_ref(), &[IoSlice::new(b" ")], &mut control, SendFlags::NOSIGNAL);
        sent.doing(format!("send a descriptor for {command}"))?;
        self.execute(command, json!({}))
    }

    /// Forgets all events so far.
    pub fn forget(&mut self) {
        self.events.clear();
    }

    /// Waits for an event and says when it happened, by QEMU's clock. Those that have come already count.
    pub fn event(&mut self, what: &str, wanted: impl Fn(&Value) -> Result<bool>) -> Result<SystemTime> {
        let found = self.event_within(what, PATIENCE, wanted)?;
        found.ok_or_else(|| Error::new(format!("wait for {what}"), format!("in vain, for {PATIENCE:?}")))
    }

    /// The same; `None` when the time is over.
    pub fn event_within(
        &mut self,
        what: &str,
        within: Duration,
        wanted: impl Fn(&Value) -> Result<bool>,
    ) -> Result<Option<SystemTime>> {
        let (end, mut looked_at) = (Instant::now() + within, 0);
        loop {
            for event in &self.events[looked_at..] {
                if wanted(event)? {
                    return stamp(event).map(Some);
                }
            }
            looked_at = self.events.len();
            match self.line_by(end).map_err(|why| Error::new(format!("wait for {what}"), why))? {
                Some(event) => self.events.push(event),
                None => return Ok(None),
            }
        }
    }

    /// Waits for an event by its name.
    pub fn named(&mut self, name: &str) -> Result<SystemTime> {
        self.event(name, |event| Ok(event["event"] == name))
    }

    /// The threads of the vCPUs.
    pub fn vcpus(&mut self) -> Result<Vec<u32>> {
        let vcpus = self.execute("query-cpus-fast", json!({}))?;
        let ids = vcpus.as_array().into_iter().flatten().filter_map(|vcpu| vcpu["thread-id"].as_u64());
        Ok(ids.map(|id| id as u32).collect())
    }

    fn line(&mut self) -> Result<Value> {
        let line = self.line_by(Instant::now() + PATIENCE)?;
        line.ok_or_else(|| Error::new("read from QEMU", format!("it has said nothing for {PATIENCE:?}")))
    }

    /// The next line; `None` when the time is over.
    fn line_by(&mut self, end: Instant) -> Result<Option<Value>> {
        let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.get_ref().set_read_timeout(Some(left)).doing("set a timeout")?;
        match self.stream.read_until(b'\n', &mut self.begun) {
            Ok(0) => return Err(Error::new("read from QEMU", "it hung up")),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(None),
            Err(e) => return Err(Error::new("read from QEMU", e)),
        }
        let line = std::mem::take(&mut self.begun);
        serde_json::from_slice(&line).doing(String::from_utf8_lossy(&line)).map(Some)
    }
}

fn stamp(event: &Value) -> Result<SystemTime> {
    let part = |name: &str| event["timestamp"][name].as_u64().doing(format!("read the time of {event}"));
    Ok(SystemTime::UNIX_EPOCH
        + Duration::from_secs(part("seconds")?)
        + Duration::from_micros(part("microseconds")?))
}
