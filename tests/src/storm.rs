//! Real kills: a real VM is migrated to and fro, and each time something is killed at another moment.
//! Whatever that is, the VM runs on exactly one side afterwards, with its memory as it left it and its
//! connections alive; unless what was killed was the very QEMU that ran it.

use crate::{
    Datastore, Doing, Error, Guest, Lab, Migration, Report, Result, Spec, Stage, TcpClient, Tools, Traces,
    VmFile, ensure, wait_for,
};
use std::{
    fmt, fs,
    str::FromStr,
    thread,
    time::{Duration, Instant},
};
use units::Rate;

/// What is struck.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Victim {
    /// The agent that sends.
    SourceAgent,
    /// The agent that receives.
    TargetAgent,
    /// The QEMU that the guest leaves.
    SourceQemu,
    /// The QEMU that the guest goes to.
    TargetQemu,
    /// The link between the two hosts, for a while.
    Link,
    /// The datastore by which a part of the memory goes: it answers nobody, for a while.
    Datastore,
}

/// When: so long after something was seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moment {
    /// After the migration was asked for.
    Asked(u64),
    /// After memory began to move.
    Moving(u64),
    /// After the first round ended.
    Round(u64),
    /// After the guest was about to be stopped.
    Switchover(u64),
    /// After the guest ran on the target, with memory on its way.
    PostCopy(u64),
}

/// One of a storm.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// What.
    pub victim: Victim,
    /// When.
    pub moment: Moment,
}

/// What became of the VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It runs where it was.
    Stayed,
    /// It runs on the target.
    Moved,
    /// Its own QEMU was killed.
    Killed,
    /// The migration was over before the moment came.
    Missed,
}

const VICTIMS: [(&str, Victim); 6] = [
    ("source-agent", Victim::SourceAgent),
    ("target-agent", Victim::TargetAgent),
    ("source-qemu", Victim::SourceQemu),
    ("target-qemu", Victim::TargetQemu),
    ("link", Victim::Link),
    ("datastore", Victim::Datastore),
];

/// Moments in milliseconds; closer together where more happens.
const MOMENTS: [Moment; 24] = [
    Moment::Asked(0),
    Moment::Asked(40),
    Moment::Asked(80),
    Moment::Asked(130),
    Moment::Asked(200),
    Moment::Moving(0),
    Moment::Moving(200),
    Moment::Moving(600),
    Moment::Round(0),
    Moment::Round(20),
    Moment::Round(100),
    Moment::Switchover(0),
    Moment::Switchover(2),
    Moment::Switchover(4),
    Moment::Switchover(7),
    Moment::Switchover(11),
    Moment::Switchover(16),
    Moment::Switchover(24),
    Moment::PostCopy(0),
    Moment::PostCopy(10),
    Moment::PostCopy(40),
    Moment::PostCopy(120),
    Moment::PostCopy(300),
    Moment::PostCopy(700),
];

impl Fault {
    /// All of a storm.
    pub fn all() -> Vec<Self> {
        let each = |(_, victim): &(&str, Victim)| {
            let victim = *victim;
            MOMENTS.map(move |moment| Self { victim, moment })
        };
        VICTIMS.iter().flat_map(each).collect()
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let victim = VICTIMS.iter().find(|(_, victim)| *victim == self.victim).map_or("?", |(name, _)| name);
        write!(f, "{victim}:{}", self.moment)
    }
}

impl Moment {
    /// Those that are tried: closer together where more happens.
    pub fn all() -> impl Iterator<Item = Self> {
        MOMENTS.into_iter()
    }

    /// Waits for it; an error if the migration ends before.
    pub fn wait(self, migration: &mut Migration) -> Result<()> {
        let (seen, after) = match self {
            Self::Asked(ms) => (Ok(()), ms),
            Self::Moving(ms) => (migration.until_moving("pre-copy"), ms),
            Self::Round(ms) => (migration.until_round(1), ms),
            Self::Switchover(ms) => (migration.until_phase("switchover"), ms),
            Self::PostCopy(ms) => (migration.until_phase("post-copy"), ms),
        };
        seen?;
        // Part of what is tried, not a wait for something.
        thread::sleep(Duration::from_millis(after));
        Ok(())
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (moment, ms) = match self {
            Self::Asked(ms) => ("asked", ms),
            Self::Moving(ms) => ("moving", ms),
            Self::Round(ms) => ("round", ms),
            Self::Switchover(ms) => ("switchover", ms),
            Self::PostCopy(ms) => ("post-copy", ms),
        };
        write!(f, "{moment}+{ms}")
    }
}

impl FromStr for Fault {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::all()
            .into_iter()
            .find(|fault| fault.to_string() == text)
            .doing(format!("find the blow {text:?}; one is called like source-agent:switchover+4"))
    }
}

/// Enough memory for a second and a half of a round, and some of it always changing.
const WORK: &str = "whimbrel.fill=64M whimbrel.check=16M,rate=4M whimbrel.dirty=32M,rate=16M";
const LINK: Rate = Rate(64 << 20);

/// An agent that was killed is started again after this time: longer than a watchdog takes.
const RESTARTED: Duration = Duration::from_millis(400);

/// So long a link is gone, or a datastore: longer than it takes to notice.
const CUT: Duration = Duration::from_secs(3);

/// Something that follows from what happened must not take longer.
const SOON: Duration = Duration::from_secs(60);

/// Two hosts, and a VM that goes to and fro.
pub struct Storm<'a> {
    stage: Stage<'a>,
    store: Datastore,
    blank: [Traces; 2],
    vm: Option<(Guest, TcpClient)>,
    at: usize,
}

const HOSTS: [&str; 2] = ["a", "b"];

impl<'a> Storm<'a> {
    /// In a laboratory with the hosts `a` and `b`.
    pub fn new(lab: &'a Lab, tools: &'a Tools) -> Result<Self> {
        // Before the agents: they may not see a mount that is made later.
        let store = Datastore::mount(&lab.dir().join("store"), &lab.dir().join("disk"));
        let store = store.doing("mount a datastore")?;
        let stage = Stage::new(lab, tools)?;
        lab.hosts().iter().try_for_each(|host| host.shape(Some(LINK)))?;
        let blank = [Traces::of(lab.host("a"))?, Traces::of(lab.host("b"))?];
        store.limit(Some(LINK.0));
        Ok(Self { stage, store, blank, vm: None, at: 0 })
    }

    /// Strikes once, and sees that nothing of it harms.
    pub fn strike(&mut self, fault: Fault) -> Result<Fate> {
        self.have_a_vm()?;
        let (from, to) = (HOSTS[self.at], HOSTS[1 - self.at]);
        let mode = if matches!(fault.moment, Moment::PostCopy(_)) { "hybrid" } else { "pre-copy" };
        let source_qemu = self.qemu_of(from)?;
        let mut options = vec!["--mode", mode, "--max-downtime", "300ms"];
        let spool = self.store.path().to_string_lossy().into_owned();
        if fault.victim == Victim::Datastore {
            options.extend(["--spool", &spool]);
        }
        let mut migration = self.stage.start_migration("web", from, to, &options)?;
        fault.moment.wait(&mut migration)?;
        let struck = self.hit(fault.victim, from, to, source_qemu)?;
        let report = match fault.victim {
            Victim::SourceAgent => {
                drop(migration);
                None
            }
            _ => Some(migration.end()?.1),
        };
        let fate = self.settle(fault, report.as_ref(), from, to)?;
        self.at = if fate == Fate::Moved { 1 - self.at } else { self.at };
        Ok(if struck { fate } else { Fate::Missed })
    }

    /// Says whether there was something to strike.
    fn hit(&mut self, victim: Victim, from: &str, to: &str, source_qemu: u32) -> Result<bool> {
        match victim {
            Victim::SourceAgent | Victim::TargetAgent => {
                let host = if victim == Victim::SourceAgent { from } else { to };
                self.stage.agent_mut(host).crash()?;
                thread::sleep(RESTARTED);
                self.stage.agent_mut(host).begin()?;
                Ok(true)
            }
            Victim::SourceQemu => Ok(kill(source_qemu)),
            Victim::TargetQemu => {
                let pids = qemus(&self.stage, to)?;
                Ok(pids.into_iter().filter(|pid| kill(*pid)).count() > 0)
            }
            Victim::Datastore => {
                self.store.stall(true);
                thread::sleep(CUT);
                self.store.stall(false);
                Ok(true)
            }
            Victim::Link => {
                let (a, b) = (self.stage.lab.host(from), self.stage.lab.host(to));
                a.cut_from(b)?;
                thread::sleep(CUT);
                a.mend_to(b)?;
                Ok(true)
            }
        }
    }

    /// Waits until it is clear what became of the VM, and looks whether that is right.
    fn settle(&mut self, fault: Fault, report: Option<&Report>, from: &str, to: &str) -> Result<Fate> {
        let said = report.map_or_else(String::new, |report| report.0.to_string());
        let mut last = [String::new(), String::new()];
        let states = wait_for("one host that runs the VM, or none", SOON, || {
            last = [state(&self.stage, from)?, state(&self.stage, to)?];
            ensure!(last != ["running", "running"], "I1: it runs twice, {said}");
            let settled = |state: &String| matches!(state.as_str(), "running" | "gone" | "none");
            // On its way is neither.
            Ok((last.iter().all(settled) && last.iter().any(|state| state != "none")).then(|| last.clone()))
        })
        .map_err(|e| Error::new(e.what, format!("{}; seen {last:?}; {said}", e.why)))?;
        let qemu_died = matches!(fault.victim, Victim::SourceQemu | Victim::TargetQemu);
        let fate = match [states[0].as_str(), states[1].as_str()] {
            ["running", "none"] => Fate::Stayed,
            ["none", "running"] => Fate::Moved,
            _ if qemu_died && !states.contains(&"running".to_owned()) => Fate::Killed,
            _ => return Err(Error::new("settle", format!("seen {states:?}; {said}"))),
        };
        if fate == Fate::Killed {
            return self.bury(fault, report, from, to);
        }
        if let Some(report) = report {
            let completed = report.outcome() == "completed";
            ensure!(
                completed == (fate == Fate::Moved),
                "the report tells something else than {fate:?}: {said}"
            );
        }
        let (guest, client) = self.vm.as_ref().doing("find the VM")?;
        guest.runs()?;
        guest.verify()?;
        let before = client.seen().echoed;
        wait_for("the client's next answer", SOON, || {
            let seen = client.seen();
            ensure!(seen.broken.is_none(), "the client's connection broke: {:?}", seen.broken);
            Ok((seen.echoed > before).then_some(()))
        })?;
        self.the_datastore_is_empty()?;
        let gone = if fate == Fate::Moved { from } else { to };
        self.nothing_is_left_on(gone)?;
        Ok(fate)
    }

    /// The VM's own QEMU was killed: only then nobody runs it.
    fn bury(&mut self, fault: Fault, report: Option<&Report>, from: &str, to: &str) -> Result<Fate> {
        if let Some(report) = report {
            let other = if fault.victim == Victim::SourceQemu { to } else { from };
            ensure!(report.vm_runs_on() != Some(other), "it was said to run on {other}: {}", report.0);
        }
        self.vm = None;
        for host in [from, to] {
            if state(&self.stage, host)? != "none" {
                self.stage.agent(host).cli().run(["stop", "web"])?.succeeded()?;
            }
            self.nothing_is_left_on(host)?;
        }
        Ok(Fate::Killed)
    }

    fn nothing_is_left_on(&self, host: &str) -> Result<()> {
        let blank = &self.blank[usize::from(host == HOSTS[1])];
        let mut now = Traces::default();
        wait_for(&format!("{host} without a trace"), SOON, || {
            now = Traces::of(self.stage.lab.host(host))?.without_consoles();
            Ok(now.adds_nothing_to(blank).then_some(()))
        })
        .map_err(|error| Error::new(error.what, format!("before: {blank:?}, now: {now:?}")))
    }

    fn the_datastore_is_empty(&self) -> Result<()> {
        wait_for("a datastore without a trace", SOON, || {
            let entries = fs::read_dir(self.store.path()).doing("look into the datastore")?;
            Ok((entries.count() == 0).then_some(()))
        })
    }

    fn have_a_vm(&mut self) -> Result<()> {
        if self.vm.is_none() {
            self.at = 0;
            let guest = self.stage.run("a", &VmFile::new("web", Spec::new(99, WORK)))?;
            let client = guest.echo(Duration::from_millis(20))?;
            self.vm = Some((guest, client));
        }
        Ok(())
    }

    fn qemu_of(&self, host: &str) -> Result<u32> {
        let shown = self.stage.show(host, "web")?.doing("find the VM")?;
        shown["pid"].as_u64().and_then(|pid| pid.try_into().ok()).doing("read its process")
    }
}

/// What a host says of the VM.
fn state(stage: &Stage<'_>, host: &str) -> Result<String> {
    let shown = stage.show(host, "web")?;
    Ok(shown.map_or("none".to_owned(), |vm| vm["state"].as_str().unwrap_or("?").to_owned()))
}

fn qemus(stage: &Stage<'_>, host: &str) -> Result<Vec<u32>> {
    let name = stage.lab.host(host).namespace.name().to_owned();
    let all = crate::run(std::process::Command::new("ip").args(["netns", "pids", &name]))?;
    let is_qemu = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("qemu"))
    };
    Ok(all.lines().filter_map(|line| line.parse().ok()).filter(is_qemu).collect())
}

/// Whether it was there.
fn kill(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok())
}

/// Strikes as often as is wanted, and says how it goes.
pub fn rage(storm: &mut Storm<'_>, faults: &[Fault]) -> Result<Vec<Fate>> {
    let (begin, mut fates) = (Instant::now(), vec![]);
    for (n, fault) in faults.iter().enumerate() {
        let fate = storm.strike(*fault).map_err(|error| {
            Error::new(
                format!("{fault}: {}", error.what),
                format!("{}; again: ./dev storm --kills --only {fault}", error.why),
            )
        })?;
        fates.push(fate);
        let seconds = begin.elapsed().as_secs();
        eprintln!("[{}:{:02}] {}/{} {fault}: {fate:?}", seconds / 60, seconds % 60, n + 1, faults.len());
    }
    Ok(fates)
}
