//! A process of its own that watches over each pause of a migration: killed between `stop` and the promise, the agent leaves a guest
//! that stands still, and nobody but a restarted agent would let it run again. The watchdog does so at once.
//!
//! It reads words from a pipe that only the agent writes to. When that ends, the last word says what to do. The kernel keeps what was
//! written before a death, so the word is never older than the agent's last act:
//!
//! | last word | written | it then |
//! |---|---|---|
//! | pausing | before the journal says so, and before `stop` | lets the guest run |
//! | pausing a guest that somebody had stopped | the same | gives it its disks back, and leaves it so |
//! | promised | when the promise is durable, before the permit is sent | does nothing: only the record decides by now (I1) |
//! | back | when the journal says so | does nothing |
//!
//! Killed between the durable promise and its word, it lets the guest run although the promise is durable. That harms nobody: the
//! permit was not sent and never will be, so the target cannot claim; a restarted agent claims first, and finds it running.
//!
//! A watchdog must not outlive its pause: a `cont` that comes late could start a guest that a later migration has taken away. So it
//! ends by itself after `LIMIT`, whatever it waits for, and a VM has one at a time: a second one cannot be started.

use crate::hypervisor::open;
use agent::store::{Departure, Process, VmRecord};
use engine::ports::{Machine, RunState, SourceJournal};
use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::{
            net::{SocketAddr, UnixListener},
            process::CommandExt,
        },
    },
    process::{Child, ChildStdin, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};
use units::Epoch;

/// So long it tries to let the guest run. A QEMU that does not answer for longer waits for its storage.
const LIMIT: Duration = Duration::from_secs(10);

/// How long to wait before QEMU is asked again: it answers one at a time, and may not have noticed yet that the agent is gone.
const AGAIN: Duration = Duration::from_millis(20);

/// How the command is called that becomes the watchdog.
pub const COMMAND: &str = "watchdog";

/// Said by the watchdog when it watches.
const WATCHES: &[u8] = b"watching\n";

const PAUSING: u8 = b'p';
const PAUSED: u8 = b's';
const PROMISED: u8 = b'x';
const BACK: u8 = b'b';

/// The agent's end.
pub(crate) struct Watchdog {
    child: Child,
    words: Option<ChildStdin>,
    /// Whether it would act.
    armed: bool,
}

impl Watchdog {
    /// Starts one for this VM. Returns once it watches.
    pub(crate) fn start(vm: &VmRecord) -> io::Result<Self> {
        // The program that runs, also where another version has taken its place by now.
        let mut child = Command::new("/proc/self/exe")
            .arg(COMMAND)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // What ends the agent's group, such as Ctrl-C, is no reason to leave a guest alone.
            .process_group(0)
            .spawn()?;
        let (words, says) = (child.stdin.take(), child.stdout.take());
        let mut dog = Self { child, words, armed: false };
        let mut line = serde_json::to_vec(vm)?;
        line.push(b'\n');
        dog.write(&line)?;
        let mut said = vec![];
        says.ok_or(io::ErrorKind::BrokenPipe)?.take(WATCHES.len() as u64).read_to_end(&mut said)?;
        if said != WATCHES {
            return Err(io::Error::other("an older one still tries to let the guest run; try again later"));
        }
        Ok(dog)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.words.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write_all(bytes)
    }

    fn say(&mut self, word: u8) -> io::Result<()> {
        self.write(&[word])?;
        self.armed = matches!(word, PAUSING | PAUSED);
        Ok(())
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if !self.armed {
            // Killed rather than waited for: nothing is left to do.
            let _ = self.child.kill();
        }
        drop(self.words.take());
        // If it is armed, it has the guest run, or gives up.
        let _ = self.child.wait();
    }
}

/// The source's journal, of whose pauses a watchdog hears.
pub(crate) struct Watched {
    pub(crate) journal: Departure,
    pub(crate) watchdog: Watchdog,
}

impl SourceJournal for Watched {
    fn pausing(&mut self, before: RunState) -> io::Result<()> {
        let word = if before == RunState::Running { PAUSING } else { PAUSED };
        self.watchdog
            .say(word)
            .map_err(|e| io::Error::new(e.kind(), format!("the pause's watchdog is gone: {e}")))?;
        self.journal.pausing(before)
    }

    fn promise(&mut self, expected: Epoch) -> io::Result<()> {
        self.journal.promise(expected)?;
        self.tell(PROMISED);
        Ok(())
    }

    fn back(&mut self) -> io::Result<()> {
        self.journal.back()?;
        self.tell(BACK);
        Ok(())
    }

    fn gone(&mut self, epoch: Epoch) -> io::Result<()> {
        self.journal.gone(epoch)
    }

    fn settled(&mut self) -> io::Result<()> {
        self.journal.settled()
    }
}

impl Watched {
    /// Calls the watchdog off. One that cannot hear it is gone, or must go.
    fn tell(&mut self, word: u8) {
        if let Err(error) = self.watchdog.say(word) {
            tracing::warn!(%error, "the pause's watchdog is gone");
            let _ = self.watchdog.child.kill();
            self.watchdog.armed = false;
        }
    }
}

/// What the process does that was started as the watchdog.
pub fn watch() -> ExitCode {
    match watch_words(&mut BufReader::new(io::stdin())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("whimbrel watchdog: {why}");
            ExitCode::FAILURE
        }
    }
}

fn watch_words(words: &mut impl BufRead) -> Result<(), String> {
    let text = |what: &str, e: &dyn std::fmt::Display| format!("{what}: {e}");
    let mut line = String::new();
    words.read_line(&mut line).map_err(|e| text("cannot hear which VM", &e))?;
    let vm: VmRecord = serde_json::from_str(&line).map_err(|e| text("cannot understand which VM", &e))?;
    let process = vm.process.ok_or("the VM has no QEMU")?;
    let _alone = alone(process).map_err(|e| text("the VM is watched already", &e))?;
    let told = io::stdout().write_all(WATCHES).and_then(|()| io::stdout().flush());
    told.map_err(|e| text("the agent is gone", &e))?;
    let mut all = vec![];
    // An end that is an error is an end, too.
    let _ = words.read_to_end(&mut all);
    let before = match all.last() {
        Some(&PAUSING) => RunState::Running,
        Some(&PAUSED) => RunState::Paused,
        _ => return Ok(()),
    };
    thread::spawn(|| {
        thread::sleep(LIMIT);
        // In the middle of whatever it is: nothing may come late.
        std::process::exit(2);
    });
    let begin = Instant::now();
    loop {
        let resumed = open(&vm).map_err(|e| e.to_string()).and_then(|mut machine| {
            machine.restore(before).map_err(|e| e.to_string())?;
            // It may have been announced elsewhere; a network that knows where it is anyway is not harmed.
            let _ = machine.announce();
            Ok(())
        });
        match resumed {
            Ok(()) => return Ok(()),
            Err(_) if !process.is_alive() => return Ok(()),
            Err(why) if begin.elapsed() > LIMIT => return Err(why),
            Err(_) => thread::sleep(AGAIN),
        }
    }
}

/// Held by a VM's only watchdog, and let go by its end, however that comes: a name in the kernel, no file.
fn alone(process: Process) -> io::Result<UnixListener> {
    let boot = File::open("/proc/sys/kernel/random/boot_id").and_then(io::read_to_string)?;
    let name = format!("whimbrel-watchdog-{}-{}-{}", process.pid, process.start_time, boot.trim());
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)
}
