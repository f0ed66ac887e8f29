//! Starting a QEMU process, and taking away what belonged to it.

mod start;

pub(crate) use start::{Started, open, start};

use crate::{
    host::Host,
    ports::{self, Port},
    qmp::{Qmp, QmpError},
    remove, tap, tpm,
};
use rustix::process::{Signal, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    time::Duration,
};
use sys::process::PidFd;

/// How long QEMU may take until it answers. Large preallocated guests take many seconds.
const START: Duration = Duration::from_secs(60);

/// How long a QEMU that nobody knows may take to say what it does.
const ANSWER: Duration = Duration::from_secs(2);

/// How often we look whether a starting QEMU listens already; its end is noticed at once.
const LOOK: Duration = Duration::from_millis(2);

/// The ending of the files in which belongings are written down.
const NOTE: &str = "belongings";

/// The ending of the log that a QEMU leaves which could not load a VM's state.
const FAILED: &str = "failed.log";

/// How much of QEMU's log is quoted when it does not start.
const QUOTE: u64 = 2000;

/// What exists on this host only for one QEMU process, and goes with it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Belongings {
    /// Who started it; nobody for a QEMU that we did not start.
    #[serde(default)]
    pub owner: PathBuf,
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// Where it makes sockets; nobody but it and root gets there.
    #[serde(default)]
    pub sockets: Option<PathBuf>,
    /// What it prints; none for a QEMU that we did not start.
    #[serde(default)]
    pub log: Option<PathBuf>,
    /// The guest's console; stays when the VM goes, unless nothing was ever written to it.
    #[serde(default)]
    pub console: Option<PathBuf>,
    /// Its TAPs.
    #[serde(default)]
    pub taps: Vec<String>,
    /// Its memory files.
    #[serde(default)]
    pub memory: Vec<PathBuf>,
    /// Where its TPM has its state. It goes only with [`Belongings::remove_all`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<PathBuf>,
    /// What its character devices end in, and its screen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
}

impl Belongings {
    /// Takes everything away that was made for the process. What is gone already is no error.
    fn remove(&self) {
        for tap in &self.taps {
            tap::remove(tap);
        }
        self.ports.iter().for_each(Port::remove);
        let empty = |path: &&PathBuf| fs::metadata(path).is_ok_and(|metadata| metadata.len() == 0);
        let console = self.console.iter().filter(empty);
        self.sockets.iter().for_each(|sockets| remove::folder(sockets));
        // Of a QEMU that somebody else started, nothing is ours.
        let note = self.note();
        let made_by_us = self.log.iter().flat_map(|log| [&self.qmp, log, &note]);
        for path in self.memory.iter().chain(console).chain(made_by_us) {
            if let Err(error) = fs::remove_file(path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "could not be removed");
            }
        }
    }

    /// The same of a process whose guest lives elsewhere, or nowhere yet: with its TPM's state.
    pub fn remove_all(&self) {
        self.remove();
        self.tpm.iter().for_each(|folder| tpm::forget(folder));
    }

    /// The same of a process whose guest has ended here: its TPM's state stays, under the VM's name.
    pub fn remove_ended(&self, vm: &str) {
        self.remove();
        self.tpm.iter().for_each(|folder| tpm::keep(folder, vm));
    }

    /// Has the names of its ports that stay the same lead to this process: its guest runs.
    pub fn take_names(&self) {
        ports::take_names(&self.ports);
    }

    /// Where these are written down as long as the process is there.
    fn note(&self) -> PathBuf {
        self.qmp.with_extension(NOTE)
    }

    /// Writes them down: before a thing is made, so that whatever ends us, [`sweep`] finds it.
    fn write_down(&self) -> io::Result<()> {
        let text = serde_json::to_vec(self)?;
        let new = self.qmp.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(new, self.note())
    }

    /// Keeps all that QEMU printed, if that is anything, under a name that stays when the rest is removed,
    /// until the next of this VM's QEMUs fails here; says where.
    pub(crate) fn keep_log(&self, vm: &str) -> Option<PathBuf> {
        let log = self.log.as_ref().filter(|log| fs::metadata(log).is_ok_and(|file| file.len() > 0))?;
        let kept = log.with_file_name(format!("{vm}.{FAILED}"));
        // A name for the same file: what QEMU still prints gets there, too.
        let _ = fs::remove_file(&kept);
        fs::hard_link(log, &kept).ok()?;
        Some(kept)
    }

    /// The end of what QEMU printed.
    pub fn last_words(&self) -> Option<String> {
        let mut file = File::open(self.log.as_ref()?).ok()?;
        let bytes = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(bytes.saturating_sub(QUOTE))).ok()?;
        let mut text = Vec::new();
        file.take(QUOTE).read_to_end(&mut text).ok()?;
        let text = String::from_utf8_lossy(&text).trim().to_owned();
        (!text.is_empty()).then_some(text)
    }
}

/// Why a VM could not be started here.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The recipe asks for what is not allowed, or what is not there; every reason.
    #[error("cannot start {vm}: {}", reasons.join("; "))]
    Unusable {
        /// The VM.
        vm: String,
        /// Why.
        reasons: Vec<String>,
    },
    /// QEMU ended instead of starting.
    #[error("cannot start {vm}: QEMU said: {words}")]
    Ended {
        /// The VM.
        vm: String,
        /// QEMU's own words.
        words: String,
    },
    /// QEMU runs but does not answer as it should.
    #[error("cannot start {vm}: {cause}")]
    Silent {
        /// The VM.
        vm: String,
        /// What is wrong with its QMP.
        #[source]
        cause: QmpError,
    },
    /// This host would not let us.
    #[error("cannot start {vm}: {what}: {cause}")]
    System {
        /// The VM.
        vm: String,
        /// What was tried.
        what: String,
        /// The system's word.
        #[source]
        cause: io::Error,
    },
}

/// Takes away every QEMU process of this name on this host that we started, and all that belongs to it. Only
/// for a VM that nobody was told of: what an agent leaves that dies while it starts one. Says how many there
/// were.
pub fn sweep(vm: &str, host: &Host) -> usize {
    let of_this_name = |path: &Path| {
        let stem = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.rsplit_once('-'));
        stem.is_some_and(|(name, _)| name == vm)
    };
    let found = noted(host).filter(|(path, _)| of_this_name(path));
    found.map(|(_, belongings)| end(&belongings)).count()
}

/// The same for every process of this owner whose QMP socket nobody knows, and all that was made for one that
/// was not started any more. Only when nobody is starting any. A QEMU that has a guest is never ended for
/// that.
pub fn sweep_others(known: &[&Path], host: &Host) -> usize {
    let unknown = |belongings: &Belongings| {
        belongings.owner == host.owner && !known.contains(&belongings.qmp.as_path())
    };
    let idle = |belongings: &Belongings| {
        let status = status(&belongings.qmp);
        let idle = match &status {
            // It has not begun: what it waits for died with whoever started it.
            Ok(status) => matches!(status.as_str(), "inmigrate" | "prelaunch"),
            // Nobody listens: it has ended, or has only just been started.
            Err(QmpError::Connect { cause, .. })
                if matches!(cause.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) =>
            {
                true
            }
            // One that waited ends by itself when the connection ends by which its device state was to come.
            Err(_) => match started_with(&belongings.qmp) {
                Ok(Some(process)) => process.wait(ANSWER).unwrap_or(false),
                Ok(None) => true,
                Err(_) => false,
            },
        };
        if !idle {
            let qmp = belongings.qmp.display();
            tracing::warn!(%qmp, ?status, "a QEMU that is in no record, and that has a guest, is left alone: \
                                           adopt it, or end it");
        }
        idle
    };
    let found = noted(host).filter(|(_, belongings)| unknown(belongings) && idle(belongings));
    found.map(|(_, belongings)| end(&belongings)).count()
}

/// What is written down here of processes that were started.
fn noted(host: &Host) -> impl Iterator<Item = (PathBuf, Belongings)> {
    let entries = fs::read_dir(&host.runtime).into_iter().flatten().flatten().map(|entry| entry.path());
    let notes = entries.filter(|path| path.extension().is_some_and(|ending| ending == NOTE));
    notes.filter_map(|path| Some((path.clone(), serde_json::from_slice(&fs::read(&path).ok()?).ok()?)))
}

/// Ends the process, if there is one, whatever its monitor says, and takes away what belonged to it. Only for
/// one that we started, and that has no guest: while it waits for one it may be ending by itself just now,
/// and then its monitor answers nobody.
pub fn discard(belongings: &Belongings) -> io::Result<()> {
    if let Some(process) = started_with(&belongings.qmp)? {
        kill(&process);
        if !process.wait(START)? {
            let why = format!("process {} does not end even when it is killed", process.pid());
            return Err(io::Error::other(why));
        }
    }
    belongings.remove_all();
    Ok(())
}

/// One that nobody was told of. If it cannot be ended, what is written down of it stays: the next agent looks
/// again.
fn end(belongings: &Belongings) {
    if let Err(error) = discard(belongings) {
        let qmp = belongings.qmp.display();
        tracing::warn!(%qmp, %error, "a QEMU that nobody was told of cannot be ended");
    }
}

/// The process that was told to listen there, which it may not do yet. The name was drawn at random for it.
fn started_with(qmp: &Path) -> io::Result<Option<PidFd>> {
    let name = qmp.as_os_str().as_encoded_bytes();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|pid| pid.parse::<i32>().ok()) else { continue };
        // Neither kernel threads nor, for others than root, other people's processes have one: they are none
        // of ours.
        let Ok(program) = fs::read_link(format!("/proc/{pid}/exe")) else { continue };
        if !program.to_string_lossy().contains("qemu") {
            continue;
        }
        // Earlier versions gave it the name as an argument.
        for place in ["environ", "cmdline"] {
            let said = while_it_is_there(fs::read(format!("/proc/{pid}/{place}")))?.unwrap_or_default();
            if said.windows(name.len()).any(|part| part == name) {
                return while_it_is_there(PidFd::open(pid));
            }
        }
    }
    Ok(None)
}

/// What was asked of a process; none if it has ended.
pub(crate) fn while_it_is_there<T>(asked: io::Result<T>) -> io::Result<Option<T>> {
    match asked {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

fn status(qmp: &Path) -> Result<String, QmpError> {
    let mut qmp = Qmp::connect_within(qmp, ANSWER)?;
    let answer = qmp.execute("query-status", serde_json::json!({}))?;
    answer["status"].as_str().map(str::to_owned).ok_or_else(|| qmp.strange("query-status", &answer))
}

/// Ends a process at once.
pub(crate) fn kill(process: &PidFd) {
    // The only failure is that it has ended already.
    let _ = pidfd_send_signal(process, Signal::KILL);
}
