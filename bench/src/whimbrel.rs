//! A guest that whimbrel moves.

use crate::{
    contender::Contender,
    cpu,
    guest::Feelings,
    run::{Faults, Run},
};
use lab::{
    Doing, Error, Guest, HandStart, HandStarted, Lab, Migration, Oddity, Report, Result, Stage, Tools,
};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime},
};
use units::PAGE_SIZE;

/// The VM's name.
pub(crate) const VM: &str = "bench";
/// How often the processor time of a QEMU that is about to end is noted.
const GLANCE: Duration = Duration::from_millis(5);

/// Hosts with agents that log as they would for a user (the stories' agents say all that they do), or as WHIMBREL_LOG says.
pub(crate) fn stage<'a>(lab: &'a Lab, tools: &'a Tools, tls: bool) -> Result<Stage<'a>> {
    let level = std::env::var("WHIMBREL_LOG").unwrap_or_else(|_| "info".to_owned());
    let prelude = format!("export WHIMBREL_LOG='{level}'");
    Stage::with(lab, tools, |_| Oddity { plaintext: !tls, prelude: prelude.clone(), ..Oddity::default() })
}

/// A guest in whimbrel's care.
pub(crate) struct Moved<'a> {
    stage: Stage<'a>,
    guest: Guest,
    agents: [u32; 2],
    /// What every migration is started with.
    options: Vec<String>,
    /// Where it was born. Only there to be killed in the end.
    _machine: HandStarted,
}

impl<'a> Moved<'a> {
    /// Boots the guest on the first host and lets whimbrel adopt it. It will move over so many streams.
    pub(crate) fn boot(mut stage: Stage<'a>, start: HandStart, streams: Option<u16>) -> Result<Self> {
        let hosts = stage.lab.hosts();
        let names = [hosts[0].name.clone(), hosts[1].name.clone()];
        let (guest, machine) = stage.adopt(&names[0], VM, start)?;
        let mut agents = [0; 2];
        for (agent, name) in agents.iter_mut().zip(&names) {
            *agent = stage.agent_mut(name).process()?.pid();
        }
        let options = streams.map(|n| format!("--streams={n}")).into_iter().collect();
        Ok(Self { stage, guest, agents, options, _machine: machine })
    }

    /// The guest.
    pub(crate) fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The agents' processes.
    pub(crate) fn agents(&self) -> [u32; 2] {
        self.agents
    }

    /// The process that runs it now, on whichever host that is.
    pub(crate) fn pid(&self) -> Result<u32> {
        self.find().map(|(_, pid)| pid)
    }

    fn find(&self) -> Result<(usize, u32)> {
        let mut found = Vec::new();
        for (i, host) in self.stage.lab.hosts().iter().enumerate() {
            found.extend(machines_in(host.namespace.name())?.into_iter().map(|pid| (i, pid)));
        }
        match found[..] {
            [one] => Ok(one),
            _ => Err(Error::new("find the QEMU of the VM", format!("there are {}: {found:?}", found.len()))),
        }
    }

    /// Moves it to the other host, and returns nothing but the report.
    pub(crate) fn move_over(&self, mode: &str) -> Result<Report> {
        let (hosts, (here, _)) = (self.stage.lab.hosts(), self.find()?);
        let (from, to) = (&hosts[here].name, &hosts[1 - here].name);
        self.start(from, to, mode)?.completed()
    }

    fn start(&self, from: &str, to: &str, mode: &str) -> Result<Migration> {
        let options: Vec<&str> =
            ["--mode", mode].into_iter().chain(self.options.iter().map(String::as_str)).collect();
        self.stage.start_migration(VM, from, to, &options)
    }

    /// Moves it to the other host.
    pub(crate) fn hop(&self, contender: Contender) -> Result<Run> {
        let Contender::Whimbrel(mode) = contender else {
            return Err(Error::new(contender.name(), "is not whimbrel's"));
        };
        let (here, source) = self.find()?;
        let (from, to) = (&self.stage.lab.hosts()[here], &self.stage.lab.hosts()[1 - here]);
        let (agent_here, agent_there) = (self.agents[here], self.agents[1 - here]);

        let feelings = Feelings::begin(&self.guest)?;
        let traffic = from.traffic()?;
        let agents = (cpu::process(agent_here)?, cpu::process(agent_there)?);
        let began = SystemTime::now();
        let mut migration = self.start(&from.name, &to.name, mode)?;
        let (qemus, events) = Glances::during(source, |glances| {
            migration.until("the end of preflight", |event| {
                event["outcome"].is_string() || event["event"] == "phase" && event["phase"] != "preflight"
            })?;
            if let Some(target) = machines_in(to.namespace.name())?.first() {
                glances.add(*target);
            }
            // The report itself comes with the end of the command, which is waited for below.
            migration.until("its end", |event| event["event"] == "phase" && event["phase"] == "done")?;
            Ok(migration.events())
        })?;
        let agents = (cpu::process(agent_here)? - agents.0, cpu::process(agent_there)? - agents.1);
        let wire = {
            let after = from.traffic()?;
            after.sent - traffic.sent + after.received - traffic.received
        };
        let report = migration.completed()?;
        let (from, to) = (from.name.clone(), to.name.clone());
        let felt = feelings.end();
        let used = |n: usize| qemus.get(n).copied().unwrap_or_default();
        Ok(Run {
            contender: contender.name(),
            began: began.duration_since(SystemTime::UNIX_EPOCH).doing("read the clock")?.as_secs(),
            from,
            to,
            total_ms: report.number("total_ms")?,
            preflight_ms: report.number("preflight_ms")?,
            downtime_ms: report.number("downtime_ms")?,
            wire_bytes: wire,
            source_cpu_s: (agents.0 + used(0)).as_secs_f64(),
            target_cpu_s: (agents.1 + used(1)).as_secs_f64(),
            rounds: report.0["rounds"].as_array().map(|rounds| rounds.len() as u64),
            faults: (mode != "pre-copy").then(|| faults(&report)).transpose()?,
            pages_per_s: pages_per_second(&events),
            report: report.0,
            ..Run::default()
        }
        .felt(felt))
    }
}

fn faults(report: &Report) -> Result<Faults> {
    Ok(Faults {
        count: report.number("faults.count")?,
        p50_us: report.number("faults.p50_us")?,
        p99_us: report.number("faults.p99_us")?,
        max_us: report.number("faults.max_us")?,
    })
}

/// How fast the target took pages in while the guest ran there: what the phase had to move, by how long it lasted.
fn pages_per_second(events: &[Value]) -> Option<f64> {
    let phase = |name: &str| {
        let found = events.iter().find(|event| event["event"] == "phase" && event["phase"] == name)?;
        found["at_ms"].as_f64()
    };
    let (began, ended) = (phase("post-copy")?, phase("done")?);
    let ticks = events.iter().filter(|event| event["event"] == "tick" && event["phase"] == "post-copy");
    let told = ticks.filter_map(|tick| tick["of_bytes"].as_f64()).reduce(f64::max);
    // A short phase may end before it says anything: it moves what the last round left.
    let left = events.iter().rev().find(|event| event["event"] == "round");
    let pages = told.map(|bytes| bytes / PAGE_SIZE as f64).or_else(|| left?["dirtied"].as_f64())?;
    let seconds = (ended - began) / 1000.0;
    (pages > 0.0 && seconds > 0.0).then(|| pages / seconds)
}

/// The QEMU processes of a host.
fn machines_in(namespace: &str) -> Result<BTreeSet<u32>> {
    let path = format!("/run/netns/{namespace}");
    let inode = fs::metadata(&path).doing(format!("look at {path}"))?.ino();
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").doing("list processes")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process may end between two looks.
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let inside = || fs::metadata(entry.path().join("ns/net")).is_ok_and(|net| net.ino() == inode);
        if comm.starts_with("qemu") && inside() {
            found.insert(pid);
        }
    }
    Ok(found)
}

/// Notes, again and again, how much processor time the main threads of QEMU processes have used: one of them ends with
/// the migration, and its clock with it. (Its main thread saves, loads, and answers the monitor; the rest are vCPUs.)
struct Glances(Mutex<Vec<Glance>>);

struct Glance {
    pid: u32,
    first: Duration,
    last: Duration,
}

impl Glances {
    /// How much each process used while `what` lasted, `first` at first.
    fn during<T>(first: u32, what: impl FnOnce(&Self) -> Result<T>) -> Result<(Vec<Duration>, T)> {
        let (glances, over) = (Self(Mutex::default()), AtomicBool::new(false));
        glances.add(first);
        let done = thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    glances.look();
                    thread::sleep(GLANCE);
                }
            });
            let done = what(&glances);
            over.store(true, Ordering::Relaxed);
            done
        })?;
        glances.look();
        let used = glances.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok((used.iter().map(|glance| glance.last - glance.first).collect(), done))
    }

    fn add(&self, pid: u32) {
        let Ok(now) = cpu::thread(pid, pid) else { return };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(Glance { pid, first: now, last: now });
    }

    fn look(&self) {
        for glance in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
            // Gone: what was seen last remains.
            glance.last = cpu::thread(glance.pid, glance.pid).unwrap_or(glance.last).max(glance.last);
        }
    }
}
