//! The agent's end of a watchdog: keeps one alive, and beats.

use super::{
    COMMAND,
    process::WATCHES,
    verdict::LOOK,
    words::{Told, Word},
};
use agent::store::VmRecord;
use std::{
    io::{self, Read, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard,
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use sys::{process::readable_within, pulse::Pulse};
use units::Locked;

/// How long a watchdog may take to start: 10 ms, and what a busy machine adds.
const STARTS: Duration = Duration::from_secs(3);

/// A watchdog that has not answered for so long is replaced, which costs as much as to start one.
const ANSWERS: Duration = Duration::from_secs(1);

/// Where none can be started, it is tried again after so long …
const AGAIN: Duration = Duration::from_millis(200);

/// … and for so long writers are made to wait without one: a start may fail once, on a busy machine.
const WITHOUT: Duration = Duration::from_secs(3);

/// A watchdog, and the thread that beats for it. Dropped in the middle of a pause, it lets the guest run.
pub(crate) struct Watchdog {
    shared: Arc<HeartbeatState>,
    beats: Option<(Sender<()>, JoinHandle<()>)>,
}

struct HeartbeatState {
    /// What each is told at first.
    vm: Vec<u8>,
    pulse: Pulse,
    watchdog: Mutex<Kept>,
}

struct Kept {
    /// None: the last one is gone, and no other could be started, for this reason.
    watchdog: Result<WatchdogProcess, String>,
    told: Told,
    /// How long it has not answered.
    silent: Duration,
    tried: Instant,
    /// Since when nobody watches.
    gone: Option<Instant>,
}

/// One process.
struct WatchdogProcess {
    child: Child,
    /// Taken when it is to act.
    words: Option<ChildStdin>,
    says: ChildStdout,
}

impl Watchdog {
    /// Starts one for this VM, and beats as long as all that has a part in `pulse` gets on. Returns once it
    /// watches.
    pub(crate) fn start(vm: &VmRecord, pulse: &Pulse) -> io::Result<Self> {
        let mut line = serde_json::to_vec(vm)?;
        line.push(b'\n');
        let kept = Kept {
            watchdog: Ok(WatchdogProcess::start(&line)?),
            told: Told::default(),
            silent: Duration::ZERO,
            tried: Instant::now(),
            gone: None,
        };
        let shared = Arc::new(HeartbeatState { vm: line, pulse: pulse.clone(), watchdog: Mutex::new(kept) });
        let (end, ended) = channel::<()>();
        let of = shared.clone();
        let beat = move || {
            sys::urgent::become_urgent();
            let mut last = Instant::now();
            while ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                let passed = last.elapsed();
                last = Instant::now();
                of.beat(passed);
            }
        };
        let beats = thread::Builder::new().name("heartbeat".into()).spawn(beat)?;
        Ok(Self { shared, beats: Some((end, beats)) })
    }

    /// Says a word, which it hears whatever becomes of us from now on. An error: nobody watches.
    pub(super) fn say(&self, word: Word) -> io::Result<()> {
        let mut kept = self.shared.locked();
        let before = kept.told;
        kept.told.hear(word.byte());
        let said = kept.write(word);
        if said.is_err() && matches!(word, Word::Pausing | Word::PausingStopped) {
            // Then there is no pause.
            kept.told = before;
        }
        said
    }

    /// Whether somebody watches, or will again soon.
    pub(super) fn watches(&self) -> io::Result<()> {
        let mut kept = self.shared.locked();
        if kept.gone.is_none_or(|since| since.elapsed() < WITHOUT) {
            Ok(())
        } else {
            kept.watchdog().map(drop)
        }
    }
}

impl Kept {
    fn watchdog(&mut self) -> io::Result<&mut WatchdogProcess> {
        self.watchdog
            .as_mut()
            .map_err(|why| io::Error::other(format!("the migration's watchdog is gone: {why}")))
    }

    fn write(&mut self, word: Word) -> io::Result<()> {
        self.watchdog()?.write(&[word.byte()])
    }
}

impl HeartbeatState {
    fn locked(&self) -> MutexGuard<'_, Kept> {
        self.watchdog.locked()
    }

    /// One beat, if all get on; and another watchdog, if this one does not.
    fn beat(&self, passed: Duration) {
        // A heart that beats while somebody is stuck would be a lie.
        let goes_on = self.pulse.goes_on();
        let mut kept = self.locked();
        let answered = kept.watchdog.as_mut().is_ok_and(|watchdog| watchdog.has_answered().unwrap_or(false));
        // As in `verdict::Silence`.
        kept.silent = if answered || !goes_on { Duration::ZERO } else { kept.silent + passed.min(LOOK * 2) };
        let there = if goes_on { kept.write(Word::Beat) } else { Ok(()) };
        if kept.told.is_fenced() || (there.is_ok() && kept.silent < ANSWERS) {
            return;
        }
        if kept.watchdog.is_err() && kept.tried.elapsed() < AGAIN {
            return;
        }
        kept.watchdog = Err("it does not answer".to_owned());
        (kept.tried, kept.silent) = (Instant::now(), Duration::ZERO);
        let started = WatchdogProcess::start(&self.vm).and_then(|mut watchdog| {
            watchdog.write(&kept.told.again())?;
            Ok(watchdog)
        });
        tracing::warn!(started = started.is_ok(), "the migration's watchdog was gone, or silent");
        kept.gone = if started.is_ok() { None } else { kept.gone.or(Some(Instant::now())) };
        kept.watchdog = started.map_err(|e| e.to_string());
    }
}

impl WatchdogProcess {
    fn start(vm: &[u8]) -> io::Result<Self> {
        // The program that runs, also where another version has taken its place by now.
        let mut child = Command::new("/proc/self/exe")
            .arg(COMMAND)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // What ends the agent's group, such as Ctrl-C, is no reason to leave a guest alone.
            .process_group(0)
            .spawn()?;
        let (Some(words), Some(says)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        let mut watchdog = Self { child, words: Some(words), says };
        watchdog.write(vm)?;
        let (end, mut said) = (Instant::now() + STARTS, vec![]);
        while said.len() < WATCHES.len() {
            let left = end.saturating_duration_since(Instant::now());
            if !readable_within(watchdog.says.as_fd(), left)? {
                return Err(io::Error::other(format!("it did not start within {STARTS:?}")));
            }
            let mut part = vec![0; WATCHES.len() - said.len()];
            match watchdog.says.read(&mut part)? {
                0 => break,
                n => said.extend_from_slice(&part[..n]),
            }
        }
        if said != WATCHES {
            let why = "another migration of the VM is under way, or an older watchdog still tries to let the \
                       guest run; try again later";
            return Err(io::Error::other(why));
        }
        Ok(watchdog)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.words.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write_all(bytes)
    }

    /// Whether it has answered since.
    fn has_answered(&mut self) -> io::Result<bool> {
        if !readable_within(self.says.as_fd(), Duration::ZERO)? {
            return Ok(false);
        }
        Ok(self.says.read(&mut [0; 256])? > 0)
    }
}

impl Drop for WatchdogProcess {
    fn drop(&mut self) {
        if self.words.is_some() {
            // It acts only when its pipe ends while it lives: killed first, it does nothing.
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if let Some((end, beats)) = self.beats.take() {
            drop(end);
            // Its panic was printed.
            let _ = beats.join();
        }
        let mut kept = self.shared.locked();
        if kept.told.restores().is_none() {
            return;
        }
        if let Ok(watchdog) = &mut kept.watchdog {
            // Then it has the guest run, or gives up.
            drop(watchdog.words.take());
        }
    }
}
