//! The watchdog's own process.

use super::{
    verdict::{LOOK, Silence, look, verdict},
    words::{Told, Word},
};
use crate::hypervisor::give_back;
use agent::store::{Process, VmRecord};
use ports::RunState;
use rustix::process::getppid;
use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    os::{
        fd::AsFd,
        linux::net::SocketAddrExt,
        unix::{
            fs::MetadataExt,
            net::{SocketAddr, UnixListener},
        },
    },
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};
use sys::{
    cgroup,
    process::{PidFd, readable_within},
};

/// So long it tries to let the guest run. A QEMU that does not answer for longer waits for its storage.
const LIMIT: Duration = Duration::from_secs(10);

/// How long to wait before QEMU is asked again: it answers one at a time, and may not have noticed yet that
/// the agent is gone.
const AGAIN: Duration = Duration::from_millis(20);

/// Said by the watchdog when it watches.
pub(super) const WATCHES: &[u8] = b"watching\n";

/// An agent that was killed has ended within this, unless a freezer of version 1 holds it.
const DIES: Duration = Duration::from_millis(100);

/// What the process does that was started as the watchdog.
pub fn watch() -> ExitCode {
    match watch_agent() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("whimbrel watchdog: {why}");
            ExitCode::FAILURE
        }
    }
}

fn watch_agent() -> Result<(), String> {
    sys::urgent::become_urgent();
    let text = |what: &str, e: &dyn std::fmt::Display| format!("{what}: {e}");
    let agent = agent().map_err(|e| text("cannot hold the agent", &e))?;
    let mut line = String::new();
    let mut words = BufReader::new(File::from(
        io::stdin().as_fd().try_clone_to_owned().map_err(|e| text("cannot hear the agent", &e))?,
    ));
    words.read_line(&mut line).map_err(|e| text("cannot hear which VM", &e))?;
    let vm: VmRecord = serde_json::from_str(&line).map_err(|e| text("cannot understand which VM", &e))?;
    let process = vm.process.ok_or("the VM has no QEMU")?;
    let _alone = alone(process).map_err(|e| text("the VM is watched already", &e))?;
    // What freezes or ends the agent's cgroup must reach this process only where it reaches the guest, too.
    if let Err(e) = cgroup::join(&process.pid.to_string()) {
        eprintln!("whimbrel watchdog: stays in the agent's cgroup: {e}");
    }
    say(WATCHES).map_err(|e| text("the agent is gone", &e))?;
    let told = listen(&mut words, agent.as_ref());
    told.restores().map_or(Ok(()), |before| restore(&vm, process, before))
}

/// Hears the agent until it has ended, and sees that it does where it is frozen and its guest needs it.
fn listen(words: &mut BufReader<File>, agent: Option<&PidFd>) -> Told {
    let (mut told, mut silence, mut looked) = (Told::default(), Silence::default(), Instant::now());
    loop {
        let mut heard = false;
        // An end that is an error is an end, too.
        let there =
            !words.buffer().is_empty() || readable_within(words.get_ref().as_fd(), LOOK).unwrap_or(true);
        if there {
            let Ok(bytes) = words.fill_buf() else { return told };
            if bytes.is_empty() {
                return told;
            }
            let count = bytes.len();
            for byte in bytes {
                heard |= told.hear(*byte) == Some(Word::Beat);
            }
            words.consume(count);
        }
        if heard {
            // An agent that does not hear it starts another watchdog.
            let _ = say(&[Word::Beat.byte()]);
        }
        silence = silence.after(heard, looked.elapsed());
        looked = Instant::now();
        let Some(agent) = agent.filter(|_| told.needs_the_agent() && silence.is_odd()) else { continue };
        // One that cannot be looked at has ended.
        let Some(why) = look(agent.pid()).ok().and_then(|seen| verdict(silence, seen)) else { continue };
        eprintln!(
            "whimbrel watchdog: the agent (process {}) is ended, so that its guest goes on: {why}",
            agent.pid()
        );
        end(agent);
        silence = Silence::default();
    }
}

/// The kernel then lets go whoever waited for the agent. What it had said before that is still to be heard.
fn end(agent: &PidFd) {
    let killed = agent.kill().and_then(|()| agent.wait(DIES)).and_then(|ended| match ended {
        true => Ok(()),
        false => cgroup::thaw(&agent.pid().to_string()),
    });
    if let Err(e) = killed {
        eprintln!("whimbrel watchdog: the agent would not end: {e}");
    }
}

/// The agent that has started this process; none if somebody else has, who is nobody to end.
fn agent() -> io::Result<Option<PidFd>> {
    let program =
        |process: &str| fs::metadata(format!("/proc/{process}/exe")).map(|found| (found.dev(), found.ino()));
    let Some(parent) = getppid() else { return Ok(None) };
    let parent = parent.as_raw_nonzero().get();
    let held = PidFd::open(parent)?;
    // By now it may have ended, and its number be another's.
    let still = getppid().is_some_and(|now| now.as_raw_nonzero().get() == parent);
    Ok((still && program(&parent.to_string())? == program("self")?).then_some(held))
}

fn say(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout();
    out.write_all(bytes).and_then(|()| out.flush())
}

fn restore(vm: &VmRecord, process: Process, before: RunState) -> Result<(), String> {
    thread::spawn(|| {
        thread::sleep(LIMIT);
        // In the middle of whatever it is: nothing may come late.
        std::process::exit(2);
    });
    let begin = Instant::now();
    loop {
        match give_back(vm, before) {
            Ok(_) => return Ok(()),
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
