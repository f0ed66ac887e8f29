//! The agent as a process: it hears a person however large the guest is, and a guest never waits for one that
//! is frozen or dead.

use lab::{
    Datastore, Doing, Guest, Lab, Migration, Oddity, Result, Spec, Stage, TcpClient, Tools, VmFile, ensure,
    story, wait_for,
};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use sys::{process::PidFd, stun::Stun};
use units::Rate;

/// Both hosts hand out more memory than they have.
const OVERCOMMIT: &str = "1000";

/// However large, a guest that has touched next to nothing is moved within this. 3 s on a quiet machine.
const SOON: Duration = Duration::from_secs(45);

/// A person who cancels waits no longer: to protect 256 GiB takes 1 to 3 s, to take that back as long, and
/// more on a busy machine.
const HEARD: Duration = Duration::from_secs(25);

/// A VM that never gets beyond its firmware.
fn start_sparse(stage: &Stage, name: &str, gib: u64) -> Result<()> {
    let path = stage.lab.dir().join(format!("{name}.toml"));
    let text =
        format!("name = {name:?}\nvcpus = 1\nmemory = \"{gib}GiB\"\nmachine = \"q35\"\naccel = \"tcg\"\n");
    fs::write(&path, text).doing("write a VM file")?;
    stage.agent("a").cli().json(&["run", &path.to_string_lossy()]).map(drop)
}

fn overcommitting<'a>(lab: &'a Lab, tools: &'a Tools) -> Result<Stage<'a>> {
    Stage::with(lab, tools, |_| {
        let lines = format!("[memory]\novercommit = {OVERCOMMIT}");
        Oddity { lines, ..Oddity::default() }
    })
}

#[test]
fn a_sparse_guest_of_256_gib_moves_and_is_cancelled() {
    story("a large sparse guest", &["a", "b"], |lab, tools| {
        let stage = overcommitting(lab, tools)?;
        let gib = std::env::var("WHIMBREL_GIB").ok().and_then(|gib| gib.parse().ok()).unwrap_or(256);
        start_sparse(&stage, "big", gib)?;
        let cli = stage.agent("a").cli();
        for phase in ["preflight", "pre-copy"] {
            let mut migration =
                stage.start_migration("big", "a", "b", &["--mode", "pre-copy", "--bandwidth", "64KiB/s"])?;
            migration.until_phase(phase)?;
            let asked = Instant::now();
            cli.run(["cancel", "big"])?.succeeded()?;
            migration.ended("cancelled", 130)?;
            eprintln!("{gib} GiB, cancelled in {phase}: {:?}", asked.elapsed());
            ensure!(asked.elapsed() < HEARD, "in {phase}: {:?}", asked.elapsed());
            stage.runs_only_on("big", "a")?;
        }
        for (from, to, mode) in [("a", "b", "pre-copy"), ("b", "a", "post-copy")] {
            let began = Instant::now();
            let report =
                stage.start_migration("big", from, to, &["--mode", mode, "--verify"])?.completed()?;
            let (pause, total) = (report.number("downtime_ms")?, report.number("total_ms")?);
            eprintln!("{gib} GiB by {mode}: {total} ms, pause {pause} ms, {:?} in all", began.elapsed());
            ensure!(began.elapsed() < SOON, "{gib} GiB by {mode}: {}", report.0);
            ensure!(report.verified() == Some(true), "{}", report.0);
            stage.runs_only_on("big", to)?;
        }
        stage.agent("a").cli().run(["stop", "big"])?.succeeded()?;
        Ok(())
    });
}

/// Always some of its memory is written, so that it waits at once for whoever does not answer.
const WORK: &str = "whimbrel.fill=48M whimbrel.check=16M,rate=4M whimbrel.dirty=40M,rate=24M";
/// A few seconds for a round; several for what is left for a pause.
const SLOW: Rate = Rate(24 << 20);
const CRAWL: Rate = Rate(2 << 20);

/// So long a guest stands still whose agent is frozen: 0.5 s, and what a machine adds on which others want
/// the processors, too.
const STANDS: Duration = Duration::from_millis(1500);
/// And one whose agent waits for a state directory that hangs: 2 s, and the same.
const HANGS: Duration = Duration::from_secs(6);

/// A guest on `a`, whose agent answers each of its writers, and keeps its state in a directory that can hang.
struct Scene<'a> {
    stage: Stage<'a>,
    guest: Guest,
    client: TcpClient,
}

impl<'a> Scene<'a> {
    fn new(lab: &'a Lab, tools: &'a Tools) -> Result<(Self, Datastore)> {
        let (at, under) = (lab.host("a").dir.join("state"), lab.dir().join("under"));
        [&at, &under].iter().try_for_each(fs::create_dir_all).doing("make directories")?;
        let state = Datastore::mount(&at, &under).doing("mount a state directory")?;
        let stage = Stage::with(lab, tools, |_| Oddity {
            lines: "tracker = \"synchronous\"".to_owned(),
            // `ip netns exec` hides what the host has mounted there.
            prelude: "mount -t cgroup2 none /sys/fs/cgroup || true".to_owned(),
            ..Oddity::default()
        })?;
        let guest = stage.run("a", &VmFile::new("web", Spec::new(141, WORK)))?;
        let client = guest.echo(Duration::from_millis(5))?;
        Ok((Self { stage, guest, client }, state))
    }

    /// A migration in the middle of a round, or in its pause.
    fn until(&self, phase: &str) -> Result<Migration> {
        let a = self.stage.lab.host("a");
        a.shape(Some(SLOW))?;
        let options = ["--mode", "pre-copy", "--max-downtime", "60s"];
        let mut migration = self.stage.start_migration("web", "a", "b", &options)?;
        migration.until_moving("pre-copy")?;
        if phase == "switchover" {
            migration.until_round(1)?;
            a.shape(Some(CRAWL))?;
            migration.until_phase(phase)?;
        }
        Ok(migration)
    }

    fn agent(&mut self) -> Result<i32> {
        Ok(self.stage.agent_mut("a").process()?.pid().cast_signed())
    }

    /// Does that to the agent, which is ended for it, and the guest runs on. Says how long it stood still.
    fn freeze(
        &mut self,
        phase: &str,
        how: &str,
        freeze: impl FnOnce(i32) -> Result<Box<dyn FnOnce()>>,
    ) -> Result<()> {
        let agent = self.agent()?;
        let migration = self.until(phase)?;
        self.client.forget_gap();
        let frozen = Instant::now();
        let thaw = freeze(agent)?;
        // A thread of it may stay as a zombie until its debugger has seen that.
        let dead = || {
            let stat = fs::read_to_string(format!("/proc/{agent}/stat")).unwrap_or_default();
            Ok(sys::proc::Stat::parse(&stat).map_or(true, |stat| stat.has_ended()).then_some(()))
        };
        let ended = wait_for("the end of the frozen agent", Duration::from_secs(20), dead);
        let killed = frozen.elapsed();
        thaw();
        ended?;
        self.stage.agent_mut("a").process()?.wait(Duration::from_secs(20))?;
        drop(migration);
        // Nobody has started another agent.
        self.guest.runs()?;
        let gap = self.client.seen().longest_gap;
        eprintln!(
            "{how}, in {phase}: the agent was ended after {killed:?}, the guest stood still for {gap:?}"
        );
        ensure!(gap < STANDS, "{how}, in {phase}: the guest stood still for {gap:?}");
        self.stage.lab.host("a").shape(None)?;
        self.stage.agent_mut("a").begin()?;
        self.stage.runs_only_on("web", "a")?;
        self.guest.verify().map(drop)
    }
}

fn signal(pid: i32, signal: Signal) -> Result<()> {
    kill_process(Pid::from_raw(pid).doing("name a process")?, signal).doing("signal a process")
}

fn nothing() -> Box<dyn FnOnce()> {
    Box::new(|| {})
}

/// The thread of this name of a process.
fn thread(pid: i32, name: &str) -> Result<i32> {
    let named = |tid: &i32| {
        let comm = fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).unwrap_or_default();
        comm.trim() == name
    };
    let threads = PidFd::open(pid).and_then(|process| process.threads()).doing("list threads")?;
    threads.into_iter().find(named).doing(format!("find the thread {name}"))
}

/// The watchdog of an agent, other than this one.
fn watchdog(agent: i32, other_than: Option<i32>) -> Result<i32> {
    wait_for("a watchdog", Duration::from_secs(20), || {
        let tasks = fs::read_dir(format!("/proc/{agent}/task")).doing("list threads")?;
        let children =
            tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        let children: Vec<i32> = children
            .flat_map(|line| line.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
            .collect();
        let is_one = |pid: &i32| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command.ends_with(b"watchdog\0") && Some(*pid) != other_than
        };
        Ok(children.into_iter().find(is_one))
    })
}

/// A cgroup of version 2 that can be frozen, if there may be one here.
struct Freezer {
    at: PathBuf,
}

impl Freezer {
    fn all() -> Vec<Self> {
        let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
        let found = mounts.lines().filter_map(|line| {
            let fields: Vec<_> = line.split(' ').collect();
            let name = format!("whimbrel-test-{}", std::process::id());
            let at = Path::new(fields.get(1)?).join(name);
            (*fields.get(2)? == "cgroup2").then_some(Self { at })
        });
        found.filter(|freezer| fs::create_dir(&freezer.at).is_ok()).collect()
    }

    fn take(&self, pid: i32) -> Result<()> {
        fs::write(self.at.join("cgroup.procs"), pid.to_string()).doing("move a process")
    }

    fn set(&self, frozen: bool) -> Result<()> {
        fs::write(self.at.join("cgroup.freeze"), if frozen { "1" } else { "0" }).doing("freeze a cgroup")
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let _ = self.set(false);
        let _ = fs::remove_dir(&self.at);
    }
}

/// Neither the journal nor what guests print. (The state directory of `a` keeps no modes.)
fn nobody_else_reads(lab: &Lab) -> Result<()> {
    for (host, path) in [("a", "run"), ("a", "run/web.console"), ("b", "state"), ("b", "state/agent.redb")] {
        let found = fs::metadata(lab.host(host).dir.join(path)).doing(format!("look at {path}"))?;
        let mode = found.permissions().mode() & 0o077;
        ensure!(mode == 0, "others may do {mode:o} with {path} of {host}");
    }
    Ok(())
}

#[test]
fn i3_a_guest_never_waits_for_an_agent_that_is_frozen() {
    story("frozen agents", &["a", "b"], |lab, tools| {
        let (mut scene, state) = Scene::new(lab, tools)?;
        nobody_else_reads(lab)?;

        // Its watchdog is frozen, then killed: there is another one, and the migration goes on.
        let (agent, mut migration) = (scene.agent()?, scene.until("pre-copy")?);
        let first = watchdog(agent, None)?;
        signal(first, Signal::STOP)?;
        let second = watchdog(agent, Some(first))?;
        signal(second, Signal::KILL)?;
        watchdog(agent, Some(second))?;
        ensure!(!migration.ends_within(Duration::ZERO)?, "the migration has ended");
        scene.stage.agent("a").cli().run(["cancel", "web"])?.succeeded()?;
        migration.ended("cancelled", 130)?;

        for phase in ["pre-copy", "switchover"] {
            scene.freeze(phase, "SIGSTOP", |agent| signal(agent, Signal::STOP).map(|()| nothing()))?;
        }
        scene.freeze("pre-copy", "a debugger at the thread that answers", |agent| {
            let process = Arc::new(PidFd::open(agent).doing("hold the agent")?);
            let stopped = Stun::begin(&process, &[thread(agent, "throttle")?], Duration::from_secs(60));
            let stopped = stopped.doing("stop a thread")?;
            Ok(Box::new(move || drop(stopped)))
        })?;
        for freezer in Freezer::all() {
            let agent = scene.agent()?;
            freezer.take(agent)?;
            let how = format!("the freezer {}", freezer.at.display());
            scene.freeze("pre-copy", &how, |_| freezer.set(true).map(|()| nothing()))?;
        }

        // The state directory hangs where the promise is to become durable.
        let migration = scene.until("switchover")?;
        state.stall(true);
        scene.stage.lab.host("a").shape(None)?;
        let hung = Instant::now();
        let moving = || {
            let before = scene.client.seen().echoed;
            std::thread::sleep(Duration::from_millis(20));
            Ok((scene.client.seen().echoed > before && hung.elapsed() > Duration::from_millis(200))
                .then_some(()))
        };
        let ran = wait_for("the guest", Duration::from_secs(20), moving);
        let stood = hung.elapsed();
        state.stall(false);
        ran?;
        eprintln!("the state directory hangs: the guest ran on after {stood:?}");
        ensure!(stood < HANGS, "the guest stood still for {stood:?}");
        let report = migration.ended("failed", 1)?;
        ensure!(report.error().contains("the state directory does not answer"), "{}", report.0);
        ensure!(report.vm_runs_on() == Some("a"), "{}", report.0);
        scene.stage.migrate("web", &scene.guest, "a", "b", &["--mode", "pre-copy"])?;
        scene.client.finish(Duration::from_secs(30)).map(drop)
    });
}
