//! A guest that whimbrel moves.

use crate::{
    contender::{Contender, Way},
    cpu,
    guest::Feelings,
    run::{Faults, Outran, Run, Terms},
};
use lab::{
    Doing, Error, Guest, HandStart, HandStarted, Lab, Migration, Oddity, Report, Result, Stage, Tools, ensure,
};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};
use units::{Locked, PAGE_SIZE};

/// The VM's name.
pub(crate) const VM: &str = "bench";
/// How often the processor time of a QEMU that is about to end is noted.
const GLANCE: Duration = Duration::from_millis(5);

/// Hosts with agents that log as they would for a user (the stories' agents say all that they do), or as
/// WHIMBREL_LOG says.
pub(crate) fn stage<'a>(lab: &'a Lab, tools: &'a Tools, tls: bool) -> Result<Stage<'a>> {
    stage_with(lab, tools, tls, |_| String::new())
}

/// The same, with more lines in the configuration of the host of each name.
pub(crate) fn stage_with<'a>(
    lab: &'a Lab,
    tools: &'a Tools,
    tls: bool,
    more: impl Fn(&str) -> String,
) -> Result<Stage<'a>> {
    let level = std::env::var("WHIMBREL_LOG").unwrap_or_else(|_| "info".to_owned());
    let prelude = format!("export WHIMBREL_LOG='{level}'");
    // Sparse guests are larger than this machine.
    let lines = "memory.overcommit = 64\n";
    Stage::with(lab, tools, |host| Oddity {
        plaintext: !tls,
        prelude: prelude.clone(),
        lines: lines.to_owned() + &more(&host.name),
        ..Oddity::default()
    })
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
        self.start(from, to, &["--mode", mode])?.completed()
    }

    fn start(&self, from: &str, to: &str, options: &[&str]) -> Result<Migration> {
        let always = self.options.iter().map(String::as_str);
        let options: Vec<&str> = options.iter().copied().chain(always).collect();
        self.stage.start_migration(VM, from, to, &options)
    }

    /// Moves it to the other host, unless that takes too long.
    pub(crate) fn hop(&self, contender: Contender, terms: &Terms) -> Result<Run> {
        let Way::Whimbrel { mode, compress } = contender.way else {
            return Err(Error::new(contender.name, "is not whimbrel's"));
        };
        let downtime = format!("{}ms", terms.downtime_ms);
        let options = ["--mode", mode, "--compress", compress, "--max-downtime", &downtime];
        let (here, source) = self.find()?;
        let (from, to) = (&self.stage.lab.hosts()[here], &self.stage.lab.hosts()[1 - here]);
        let (agent_here, agent_there) = (self.agents[here], self.agents[1 - here]);

        let feelings = Feelings::begin(&self.guest, source, terms)?;
        let sent = from.traffic()?.sent;
        let agents = (cpu::process(agent_here)?, cpu::process(agent_there)?);
        let (stamp, began) = (SystemTime::now(), Instant::now());
        let mut migration = self.start(&from.name, &to.name, &options)?;
        let (qemus, ended) = Glances::during(source, |glances| {
            migration.until("the end of preflight", |event| {
                event["outcome"].is_string() || event["event"] == "phase" && event["phase"] != "preflight"
            })?;
            if let Some(target) = machines_in(to.namespace.name())?.first() {
                glances.add(*target);
            }
            migration.ends_within(terms.patience.saturating_sub(began.elapsed()))
        })?;
        let took = began.elapsed();
        let (work, outran) = (feelings.work(), feelings.outran());
        let agents = (cpu::process(agent_here)? - agents.0, cpu::process(agent_there)? - agents.1);
        let wire_bytes = from.traffic()?.sent - sent;
        if !ended {
            migration.interrupt()?;
        }
        let events = migration.events();
        let (status, report) = migration.end()?;
        let completed = report.outcome() == "completed";
        ensure!(completed || !ended, "whimbrel's migration is completed: exit status {status}, {}", report.0);
        let used = |n: usize| qemus.get(n).copied().unwrap_or_default();
        let (source, target) = (agents.0 + used(0), agents.1 + used(1));
        let switchover = phase(&events, "switchover").map(|ms| stamp + Duration::from_secs_f64(ms / 1000.0));
        let not_held_up = feelings.not_held_up(switchover.unwrap_or_else(SystemTime::now));
        let outran = outran.map(|outran| Outran { not_held_up, ..outran });
        let work_per_s = feelings.work_per_s;
        let mut run = Run {
            contender: contender.name.to_owned(),
            began: stamp.duration_since(SystemTime::UNIX_EPOCH).doing("read the clock")?.as_secs(),
            from: from.name.clone(),
            total_ms: took.as_secs_f64() * 1000.0,
            wire_bytes,
            guest_work: work,
            work_per_s,
            cpu_s: (source + target).as_secs_f64(),
            source_cpu_s: source.as_secs_f64(),
            finished: ended,
            rounds: report.0["rounds"].as_array().map(|rounds| rounds.len() as u64),
            streams: report.0["streams"].as_u64(),
            trouble: (!ended).then(|| format!("ended after {:.1} s", took.as_secs_f64())),
            outran,
            ..Run::default()
        };
        if completed {
            run.total_ms = if ended { report.number("total_ms")? } else { run.total_ms };
            run.start_ms = report.number("preflight_ms")?;
            run.downtime_ms = Some(report.number("downtime_ms")?);
            run.faults = (mode != "pre-copy").then(|| faults(&report)).transpose()?;
            run.pages_per_s = pages_per_second(&events);
            run.bytes_per_s = first_round(&report);
            run.expected_ms = expected(&report);
            let fresh = terms.outruns.and_then(|link| fresh(&report).map(|fresh| fresh / link.0 as f64));
            let (stalled, longest) =
                (report.number("throttle.stalled_ms")?, report.number("throttle.longest_ms")?);
            run.outran = outran.map(|outran| Outran {
                fresh,
                stalled_ms: Some(stalled),
                longest_stall_ms: Some(longest),
                ..outran
            });
        }
        Ok(run.felt(feelings.end(terms.verify)))
    }
}

/// The forecast of the whole time.
fn expected(report: &Report) -> Option<f64> {
    let forecast = &report.0["forecast"];
    let estimates = forecast["estimates"].as_array()?;
    let course = estimates.iter().find(|course| course["way"] == forecast["takes"])?;
    Some(course["total_ms"]["likely"].as_f64()? + forecast["preflight_ms"].as_f64()?)
}

/// Bytes a second on the wire in the first round.
fn first_round(report: &Report) -> Option<f64> {
    let round = &report.0["rounds"][0];
    let (bytes, ms) = (round["wire_bytes"].as_f64()?, round["ms"].as_f64()?);
    (ms > 0.0).then(|| bytes / ms * 1000.0)
}

/// Bytes a second that the guest made new after they were sent, over all rounds but the last, in which it
/// stood still.
fn fresh(report: &Report) -> Option<f64> {
    let (_, rounds) = report.0["rounds"].as_array()?.split_last()?;
    let sum = |name: &str| rounds.iter().map(|round| round[name].as_f64()).sum::<Option<f64>>();
    let (pages, ms) = (sum("dirtied")?, sum("ms")?);
    (ms > 0.0).then(|| pages * PAGE_SIZE as f64 / ms * 1000.0)
}

fn faults(report: &Report) -> Result<Faults> {
    Ok(Faults {
        count: report.number("faults.count")?,
        p50_us: report.number("faults.p50_us")?,
        p99_us: report.number("faults.p99_us")?,
        max_us: report.number("faults.max_us")?,
    })
}

/// How fast the target took pages in while the guest ran there: what the phase had to move, by how long it
/// lasted.
fn pages_per_second(events: &[Value]) -> Option<f64> {
    let (began, ended) = (phase(events, "post-copy")?, phase(events, "done")?);
    let ticks = events.iter().filter(|event| event["event"] == "tick" && event["phase"] == "post-copy");
    let told = ticks.filter_map(|tick| tick["of_bytes"].as_f64()).reduce(f64::max);
    // A short phase may end before it says anything: it moves what the last round left.
    let left = events.iter().rev().find(|event| event["event"] == "round");
    let pages = told.map(|bytes| bytes / PAGE_SIZE as f64).or_else(|| left?["dirtied"].as_f64())?;
    let seconds = (ended - began) / 1000.0;
    (pages > 0.0 && seconds > 0.0).then(|| pages / seconds)
}

/// When a phase began, in milliseconds since the migration did.
fn phase(events: &[Value], name: &str) -> Option<f64> {
    let found = events.iter().find(|event| event["event"] == "phase" && event["phase"] == name)?;
    found["at_ms"].as_f64()
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

/// Notes, again and again, how much processor time the main threads of QEMU processes have used: one of them
/// ends with the migration, and its clock with it. (Its main thread saves, loads, and answers the monitor;
/// the rest are vCPUs.)
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
        let used = glances.0.locked();
        Ok((used.iter().map(|glance| glance.last - glance.first).collect(), done))
    }

    fn add(&self, pid: u32) {
        let Ok(now) = cpu::thread(pid, pid) else { return };
        let mut all = self.0.locked();
        all.push(Glance { pid, first: now, last: now });
    }

    fn look(&self) {
        for glance in self.0.locked().iter_mut() {
            // Gone: what was seen last remains.
            glance.last = cpu::thread(glance.pid, glance.pid).unwrap_or(glance.last).max(glance.last);
        }
    }
}
