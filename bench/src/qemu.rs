//! A guest that QEMU moves.

use crate::{contender::Contender, cpu, guest::Feelings, run::Run};
use lab::{Console, Doing, Error, Guest, HandStart, HandStarted, Lab, Namespace, Qmp, Result, Tools};
use serde_json::{Value, json};
use std::time::{Duration, SystemTime};

/// Where the target's QEMU listens.
const PORT: u16 = 4444;
/// A mebibyte times a million a second: no cap.
const NO_CAP: u64 = 1 << 40;
/// The longest pause that QEMU may plan, in milliseconds: the worst that whimbrel accepts for itself.
const DOWNTIME_LIMIT: u64 = 20;
/// Lines of a console that show why a guest died.
const LAST_WORDS: usize = 60;

/// A guest whose migrations QEMU does.
pub(crate) struct Moved<'a> {
    lab: &'a Lab,
    tools: &'a Tools,
    start: HandStart,
    client: Namespace,
    guest: Guest,
    here: usize,
    machine: Machine,
    machines: u32,
}

/// One QEMU process and its monitor.
struct Machine {
    started: HandStarted,
    monitor: Qmp,
    vcpus: Vec<u32>,
    console: Console,
    name: String,
}

impl Machine {
    fn start(start: &HandStart, lab: &Lab, host: usize, tools: &Tools, name: String) -> Result<Self> {
        let started = start.start_named(&lab.hosts()[host], tools, &name)?;
        let mut monitor = Qmp::connect(&started.qmp_socket())?;
        let vcpus = monitor.vcpus()?;
        let console = started.console()?;
        Ok(Self { started, monitor, vcpus, console, name })
    }

    fn cpu(&self) -> Result<Duration> {
        cpu::beside_vcpus(self.started.pid(), &self.vcpus)
    }

    /// What both sides of a migration must be told alike.
    fn prepare(&mut self, channels: u32) -> Result<()> {
        let capability = |name: &str, state: bool| json!({"capability": name, "state": state});
        let capabilities = json!([capability("events", true), capability("multifd", channels > 0)]);
        self.monitor.execute("migrate-set-capabilities", json!({"capabilities": capabilities}))?;
        let mut parameters = json!({"max-bandwidth": NO_CAP, "downtime-limit": DOWNTIME_LIMIT});
        if channels > 0 {
            parameters["multifd-channels"] = channels.into();
        }
        self.monitor.execute("migrate-set-parameters", parameters).map(drop)
    }
}

impl<'a> Moved<'a> {
    /// Boots the guest on the first host.
    pub(crate) fn boot(lab: &'a Lab, tools: &'a Tools, start: HandStart) -> Result<Self> {
        let machine = Machine::start(&start, lab, 0, tools, "q0".to_owned())?;
        let client = lab.client()?;
        let guest = Guest::reach(&client, &start.guest)?;
        Ok(Self { lab, tools, start, client, guest, here: 0, machine, machines: 0 })
    }

    /// The guest.
    pub(crate) fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The process that runs it now.
    pub(crate) fn pid(&self) -> u32 {
        self.machine.started.pid()
    }

    /// Moves it to the other host.
    pub(crate) fn hop(&mut self, contender: Contender) -> Result<Run> {
        let Contender::Qemu { channels } = contender else {
            return Err(Error::new(contender.name(), "is not QEMU's"));
        };
        let there = 1 - self.here;
        let (from, to) = (&self.lab.hosts()[self.here], &self.lab.hosts()[there]);
        let incoming = HandStart { extra: vec!["-incoming".into(), "defer".into()], ..self.start.clone() };
        let name = self.next_name();
        let mut target = Machine::start(&incoming, self.lab, there, self.tools, name)?;
        target.prepare(channels)?;
        self.machine.prepare(channels)?;
        let uri = json!({"uri": format!("tcp:{}:{PORT}", to.address)});
        target.monitor.execute("migrate-incoming", uri.clone())?;

        let feelings = Feelings::begin(&self.guest)?;
        self.machine.monitor.forget();
        let traffic = from.traffic()?;
        let cpu = (self.machine.cpu()?, target.cpu()?);
        let began = SystemTime::now();
        self.machine.monitor.execute("migrate", uri)?;
        let sent = self.machine.monitor.event("the end of QEMU's migration", is_completed)?;
        let stopped = self.machine.monitor.named("STOP")?;
        let resumed = target.monitor.named("RESUME")?;
        let cpu = (self.machine.cpu()? - cpu.0, target.cpu()? - cpu.1);
        let wire = {
            let after = from.traffic()?;
            after.sent - traffic.sent + after.received - traffic.received
        };
        let felt = feelings.end();
        let report = self.machine.monitor.execute("query-migrate", json!({}))?;

        let run = Run {
            contender: contender.name(),
            began: began.duration_since(SystemTime::UNIX_EPOCH).doing("read the clock")?.as_secs(),
            from: from.name.clone(),
            to: to.name.clone(),
            total_ms: between(began, sent.max(resumed)),
            downtime_ms: between(stopped, resumed),
            qemu_says_downtime_ms: report["downtime"].as_f64(),
            wire_bytes: wire,
            source_cpu_s: cpu.0.as_secs_f64(),
            target_cpu_s: cpu.1.as_secs_f64(),
            rounds: report["ram"]["dirty-sync-count"].as_u64(),
            report,
            ..Run::default()
        }
        .felt(felt);
        self.replace(target, there)?;
        Ok(run)
    }

    /// Boots the guest again, where it is.
    pub(crate) fn reboot(&mut self) -> Result<()> {
        let name = self.next_name();
        let machine = Machine::start(&self.start, self.lab, self.here, self.tools, name)?;
        self.replace(machine, self.here)?;
        self.guest = Guest::reach(&self.client, &self.start.guest)?;
        Ok(())
    }

    /// The last things that the guest said on its console.
    pub(crate) fn last_words(&self) -> String {
        let lines = self.machine.console.lines();
        lines[lines.len().saturating_sub(LAST_WORDS)..].join("\n")
    }

    fn next_name(&mut self) -> String {
        self.machines += 1;
        format!("q{}", self.machines)
    }

    /// The machine that runs the guest from now on. The one before is ended.
    fn replace(&mut self, machine: Machine, host: usize) -> Result<()> {
        let before = std::mem::replace(&mut self.machine, machine);
        let was = std::mem::replace(&mut self.here, host);
        let tap = format!("link del t-{}", before.name);
        drop(before);
        self.lab.hosts()[was].namespace.ip(&tap).map(drop)
    }
}

fn is_completed(event: &Value) -> Result<bool> {
    let status = &event["data"]["status"];
    match event["event"] == "MIGRATION" {
        true if status == "failed" => Err(Error::new("QEMU's migration", event)),
        migration => Ok(migration && status == "completed"),
    }
}

fn between(from: SystemTime, to: SystemTime) -> f64 {
    to.duration_since(from).map_or(0.0, |time| time.as_secs_f64() * 1000.0)
}
