//! A QMP client: one socket, one question at a time, events kept for whoever wants them.
//!
//! Tolerant of what it does not know (unknown events, unknown fields, late answers), strict in what protects
//! us: every wait ends, a line is bounded, and a socket that is not QEMU's is told apart from one that is
//! busy.

mod asked;
mod error;
mod line;
#[cfg(test)]
mod tests;

pub(crate) use asked::Asked;
pub use error::QmpError;

use line::Lines;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::{
    collections::{BTreeSet, VecDeque},
    fmt,
    io::{IoSlice, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};
use sys::{freeze::StopAtData, process::PidFd};

/// How long QEMU may take to greet: a QMP socket serves one client at a time and lets the next one wait in
/// silence.
pub const GREETING: Duration = Duration::from_secs(2);

/// How long a command may take unless its caller says otherwise. QEMU's main loop can be held up by a slow
/// disk for seconds; a shorter time would give up on healthy guests.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Events that nobody asked for are kept up to this many; beyond, the oldest go.
const EVENTS_KEPT: usize = 1024;

/// Answers that came before somebody waited for them are kept up to this many: more than are ever asked for
/// ahead.
const EARLY_KEPT: usize = 64;

/// The lines of all events that are kept, in bytes: four times what so many take usually. In memory they are
/// up to 16 times as large. Beyond, the oldest go.
const EVENT_BYTES: usize = 1 << 20;

/// QEMU's version, as it says in its greeting.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Version {
    /// 10 of 10.0.2.
    pub major: u32,
    /// 0 of 10.0.2.
    pub minor: u32,
    /// 2 of 10.0.2.
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// How a command ends.
const END: &str = "}\n";

/// How one ends that is not to run: no QEMU knows this member, and each refuses a command with it.
const WITHDRAWN: &str = ",\"withdrawn\":true}\n";

/// Something that QEMU told by itself.
#[derive(Clone, PartialEq, Debug)]
pub struct Event {
    /// Such as `RESUME`.
    pub name: String,
    /// What belongs to it; `null` when nothing does.
    pub data: Value,
    /// When it happened, by QEMU's clock.
    pub at: SystemTime,
    /// Of all that came on this connection, counted from 0.
    pub number: u64,
}

/// A connection to QEMU's monitor.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    socket: UnixStream,
    lines: Lines,
    version: Version,
    next_id: u64,
    /// The number of a command of which QEMU has all but the end.
    poised: Option<u64>,
    /// The numbers of questions of which QEMU was told none: it answers in the order in which it was asked.
    unnamed: VecDeque<u64>,
    /// Answers that came while only events were heard, in their order.
    early: VecDeque<Value>,
    /// The names of events that came since somebody asked for them.
    noticed: BTreeSet<String>,
    /// With the length of its line.
    events: VecDeque<(Event, usize)>,
    /// How many events came so far.
    heard: u64,
}

impl Qmp {
    /// Connects, reads the greeting, and asks to be heard ahead of the answers.
    pub fn connect(path: &Path) -> Result<Self, QmpError> {
        Self::connect_within(path, GREETING)
    }

    /// Like [`Qmp::connect`], waiting as long as this for the greeting.
    pub fn connect_within(path: &Path, patience: Duration) -> Result<Self, QmpError> {
        let socket =
            UnixStream::connect(path).map_err(|cause| QmpError::Connect { path: path.to_owned(), cause })?;
        Self::greet(path, socket, patience)
    }

    /// Reads the greeting; see [`Qmp::connect`].
    pub(crate) fn greet(path: &Path, socket: UnixStream, patience: Duration) -> Result<Self, QmpError> {
        let end = Instant::now() + patience;
        let mut lines = Lines::default();
        let not_qemu = |got: String| QmpError::NotQemu { path: path.to_owned(), got };
        let greeting = match lines.first(&socket, end) {
            Err(QmpError::Timeout { .. }) if lines.is_empty() => {
                return Err(QmpError::Busy { path: path.to_owned(), waited: patience });
            }
            Err(QmpError::Timeout { .. } | QmpError::Closed { .. } | QmpError::TooLong { .. }) => {
                return Err(not_qemu(lines.glimpse()));
            }
            other => other?,
        };
        let text = String::from_utf8_lossy(&greeting);
        let value: Value =
            serde_json::from_str(&text).map_err(|_| not_qemu(text.chars().take(60).collect()))?;
        let said = &value["QMP"]["version"]["qemu"];
        let number = |name: &str| said[name].as_u64().and_then(|n| u32::try_from(n).ok());
        let (Some(major), Some(minor), Some(micro)) = (number("major"), number("minor"), number("micro"))
        else {
            return Err(not_qemu(text.chars().take(60).collect()));
        };
        let version = Version { major, minor, micro };
        let mut qmp = Self {
            path: path.to_owned(),
            socket,
            lines,
            version,
            next_id: 1,
            poised: None,
            unnamed: VecDeque::new(),
            early: VecDeque::new(),
            noticed: BTreeSet::new(),
            events: VecDeque::new(),
            heard: 0,
        };
        // With it QEMU takes in up to 8 questions ahead; without it, it begins to read the next one once it
        // has answered the last, which costs each of them a change of threads there.
        let ahead = value["QMP"]["capabilities"].as_array().is_some_and(|all| all.contains(&json!("oob")));
        let enable = if ahead { json!({ "enable": ["oob"] }) } else { json!({}) };
        qmp.execute("qmp_capabilities", enable)?;
        Ok(qmp)
    }

    /// The version in the greeting.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Where it is connected to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The connection itself, for `SO_PEERCRED`.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Runs one command and returns what it returned.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.ask(command, arguments, None, PATIENCE)
    }

    /// Like [`Qmp::execute`], waiting as long as this. After a timeout the connection is still good: the late
    /// answer will be passed over.
    pub fn execute_within(
        &mut self,
        command: &str,
        arguments: Value,
        patience: Duration,
    ) -> Result<Value, QmpError> {
        self.ask(command, arguments, None, patience)
    }

    /// The names of the events that came since this was asked last. Never waits.
    pub(crate) fn notice(&mut self) -> Result<BTreeSet<String>, QmpError> {
        self.hear()?;
        Ok(std::mem::take(&mut self.noticed))
    }

    /// One line for the human monitor; returns its answer as it is.
    pub fn human(&mut self, line: &str) -> Result<String, QmpError> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(answer.as_str().unwrap_or_default().replace("\r\n", "\n"))
    }

    /// Gives QEMU a descriptor under a name (`fd:name`).
    pub fn get_fd(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
        self.ask("getfd", json!({ "fdname": name }), Some(fd), PATIENCE).map(drop)
    }

    /// Gives QEMU a descriptor as a set of its own; returns the set's number N, for `/dev/fdset/N`.
    pub fn add_fd(&mut self, fd: BorrowedFd<'_>) -> Result<i64, QmpError> {
        let answer = self.ask("add-fd", json!({}), Some(fd), PATIENCE)?;
        answer["fdset-id"].as_i64().ok_or_else(|| self.strange("add-fd", &answer))
    }

    /// Takes a set of descriptors back.
    pub fn remove_fd_set(&mut self, set: i64) -> Result<(), QmpError> {
        self.execute("remove-fd", json!({ "fdset-id": set })).map(drop)
    }

    /// Waits for an event that `wanted` accepts; events that came earlier count. `None` when the time is
    /// over.
    pub fn wait_event(
        &mut self,
        patience: Duration,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Option<Event>, QmpError> {
        let end = Instant::now() + patience;
        loop {
            if let Some(at) = self.events.iter().position(|(event, _)| wanted(event)) {
                return Ok(self.events.remove(at).map(|(event, _)| event));
            }
            match self.lines.next(&self.socket, end) {
                Ok(line) => drop(self.take(&line)?),
                Err(QmpError::Timeout { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes in what QEMU has said by now. Never waits.
    pub fn hear(&mut self) -> Result<(), QmpError> {
        while let Some(line) = self.lines.there(&self.socket)? {
            if let Some(answer) = self.take(&line)?
                && self.early.len() < EARLY_KEPT
            {
                self.early.push_back(answer);
            }
        }
        Ok(())
    }

    /// Drops the events of this name that came so far.
    pub fn forget_events(&mut self, name: &str) {
        self.events.retain(|(event, _)| event.name != name);
    }

    /// How many events came so far: the number of the next one.
    pub fn heard(&self) -> u64 {
        self.heard
    }

    /// The events from this number on that are kept, oldest first. Asks and waits for nothing.
    pub fn events_since(&self, number: u64) -> impl Iterator<Item = &Event> {
        self.events.iter().map(|(event, _)| event).filter(move |event| event.number >= number)
    }

    /// What to say when an answer lacks what QEMU promises.
    pub(crate) fn strange(&self, command: &str, answer: &Value) -> QmpError {
        let mut got = answer.to_string();
        got.truncate(got.char_indices().nth(200).map_or(got.len(), |(at, _)| at));
        QmpError::Strange { command: command.to_owned(), got }
    }

    fn ask(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        patience: Duration,
    ) -> Result<Value, QmpError> {
        let id = self.next_id;
        let line = self.line(command, &arguments, Some(id));
        let broken = |cause| QmpError::Broken { command: command.to_owned(), cause };
        self.socket.set_write_timeout(Some(patience)).map_err(broken)?;
        self.send(line.as_bytes(), fd).map_err(broken)?;
        let end = Instant::now() + patience;
        self.answer(id, command, end, patience)?
    }

    /// A command, and nothing that QEMU does not need: its monitor reads byte by byte, of which each costs it
    /// 4 us. What is poised is withdrawn before it.
    fn line(&mut self, command: &str, arguments: &Value, id: Option<u64>) -> String {
        self.next_id += 1;
        let mut line = json!({ "execute": command });
        if !arguments.as_object().is_some_and(Map::is_empty) {
            line["arguments"] = arguments.clone();
        }
        if let Some(id) = id {
            line["id"] = id.into();
        }
        let withdrawn = self.poised.take().map_or("", |_| WITHDRAWN);
        format!("{withdrawn}{line}\n")
    }

    /// Writes all of a command but its end, while QEMU answers what was asked before: it needs no time for
    /// reading it later. [`Qmp::execute_last`] runs it; whatever else is asked first withdraws it.
    pub(crate) fn poise(&mut self, command: &str, arguments: &Value) -> Result<(), QmpError> {
        let id = self.next_id;
        let line = self.line(command, arguments, Some(id));
        self.socket
            .write_all(line.trim_end_matches(END).as_bytes())
            .map_err(|cause| QmpError::Broken { command: command.to_owned(), cause })?;
        self.poised = Some(id);
        Ok(())
    }

    /// The answer to one question. The outer error is the connection's, the inner one QEMU's word.
    fn answer(
        &mut self,
        id: u64,
        command: &str,
        end: Instant,
        patience: Duration,
    ) -> Result<Result<Value, QmpError>, QmpError> {
        loop {
            let answer = match self.early.pop_front() {
                Some(answer) => Some(answer),
                None => {
                    let line = self.lines.next(&self.socket, end);
                    self.take(&line.map_err(|error| error.during(command, patience))?)?
                }
            };
            if let Some(answer) = answer
                && let Some(said) = self.said(id, command, answer)
            {
                return said;
            }
        }
    }

    /// Runs one command, which may be poised, and has the process that answers it stand still from its answer
    /// on: nothing that others have asked of it is done after that.
    pub(crate) fn execute_last(
        &mut self,
        command: &str,
        arguments: Value,
        patience: Duration,
        process: &PidFd,
    ) -> Result<Value, QmpError> {
        let broken = |cause| QmpError::Broken { command: command.to_owned(), cause };
        let socket = self.socket.try_clone().map_err(broken)?;
        // A host that does not allow it has whoever froze it afterwards be late by a moment.
        let _stop = StopAtData::begin(&socket, process)
            .inspect_err(|error| tracing::info!(%error, "QEMU cannot be stopped at its answer"));
        let end = Instant::now() + patience;
        let id = match self.poised.take() {
            Some(id) => self.socket.write_all(END.as_bytes()).map(|()| id).map_err(broken)?,
            None => {
                let id = self.next_id;
                self.ask_all(&[(command, arguments)], patience)?;
                id
            }
        };
        loop {
            while let Some(line) = self.lines.there(&self.socket).map_err(|e| e.during(command, patience))? {
                if let Some(answer) = self.take(&line)?
                    && let Some(said) = self.said(id, command, answer)
                {
                    return said?;
                }
            }
            // It has said something else, and stands still on account of that.
            process.thaw().map_err(broken)?;
            let left = end.saturating_duration_since(Instant::now());
            if !sys::process::readable_within(self.socket.as_fd(), left).map_err(broken)? {
                return Err(QmpError::Timeout { command: command.to_owned(), waited: patience });
            }
        }
    }

    /// What an answer says to the question with this number, if it is to that. The outer error is the
    /// connection's, the inner one QEMU's word.
    fn said(
        &self,
        id: u64,
        command: &str,
        mut answer: Value,
    ) -> Option<Result<Result<Value, QmpError>, QmpError>> {
        // An answer to a question that was given up is passed over; one without an id is to a line that QEMU
        // could not parse, and so to this one.
        if answer.get("id").is_some_and(|got| got.as_u64() != Some(id)) {
            return None;
        }
        if let Some(error) = answer.get("error") {
            let text = |name: &str| error[name].as_str().unwrap_or("unknown").to_owned();
            return Some(Ok(Err(QmpError::Refused {
                command: command.to_owned(),
                class: text("class"),
                why: text("desc"),
            })));
        }
        // Not by its index, which would panic where the answer is no object.
        Some(match answer.get_mut("return") {
            Some(returned) => Ok(Ok(returned.take())),
            None => Err(self.strange(command, &answer)),
        })
    }

    fn send(&mut self, line: &[u8], fd: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
        let Some(fd) = fd else { return self.socket.write_all(line) };
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = sendmsg(&self.socket, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?;
        self.socket.write_all(&line[sent..])
    }

    /// An event is kept and gives `None`; everything else is an answer.
    fn take(&mut self, line: &[u8]) -> Result<Option<Value>, QmpError> {
        let mut value: Value = serde_json::from_slice(line).map_err(|_| QmpError::NotQemu {
            path: self.path.clone(),
            got: String::from_utf8_lossy(line).chars().take(60).collect(),
        })?;
        let Some(name) = value["event"].as_str() else {
            if let Some(answer) = value.as_object_mut()
                && answer.get("id").is_none_or(Value::is_null)
                && let Some(id) = self.unnamed.pop_front()
            {
                answer.insert("id".to_owned(), id.into());
            }
            return Ok(Some(value));
        };
        let stamp = |name: &str| value["timestamp"][name].as_u64();
        let at = match (stamp("seconds"), stamp("microseconds")) {
            // QEMU writes -1 where its clock failed.
            (Some(seconds), Some(micros)) => SystemTime::UNIX_EPOCH
                .checked_add(Duration::from_secs(seconds) + Duration::from_micros(micros.min(999_999)))
                .unwrap_or_else(SystemTime::now),
            _ => SystemTime::now(),
        };
        if self.noticed.len() < EVENTS_KEPT {
            self.noticed.insert(name.to_owned());
        }
        let event = Event { name: name.to_owned(), data: value["data"].clone(), at, number: self.heard };
        self.heard += 1;
        self.events.push_back((event, line.len()));
        let mut bytes: usize = self.events.iter().map(|(_, bytes)| bytes).sum();
        // The one that has just come stays whatever its size: somebody may be waiting for it.
        while self.events.len() > 1 && (self.events.len() > EVENTS_KEPT || bytes > EVENT_BYTES) {
            bytes -= self.events.pop_front().map_or(0, |(_, bytes)| bytes);
        }
        Ok(None)
    }
}
