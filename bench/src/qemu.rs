//! A guest that QEMU moves.

use crate::{
    contender::{Contender, Qemu, Way},
    cpu,
    guest::Feelings,
    run::{Outran, Run, Terms},
};
use lab::{Console, Doing, Error, Guest, HandStart, HandStarted, Host, Lab, Namespace, Qmp, Result, Tools};
use serde_json::{Value, json};
use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

/// Where the target's QEMU listens.
const PORT: u16 = 4444;
/// The name of QEMU's credentials, and of a host's directory with them.
const TLS: &str = "qemu-tls";
/// What is decided already comes so soon, or something is broken: a cancelled migration's end, the guest's
/// first instruction.
const SOON: Duration = Duration::from_secs(10);
/// Lines of a console that show why a guest died.
const LAST_WORDS: usize = 60;

/// A guest whose migrations QEMU does.
pub(crate) struct Moved<'a> {
    lab: &'a Lab,
    tools: &'a Tools,
    start: HandStart,
    tls: bool,
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

    /// What both sides of a migration must be told alike, and who each is if connections are protected.
    fn prepare(&mut self, qemu: Qemu, downtime_ms: u64, tls: Option<(&str, &Path)>) -> Result<()> {
        if let Some((end, dir)) = tls {
            // It may have been the other end of an earlier migration.
            let _ = self.monitor.execute("object-del", json!({"id": TLS}));
            let creds = json!({"qom-type": "tls-creds-x509", "id": TLS, "endpoint": end, "dir": dir,
                "verify-peer": true});
            self.monitor.execute("object-add", creds)?;
            self.monitor.execute("migrate-set-parameters", json!({"tls-creds": TLS}))?;
        }
        self.monitor.execute("migrate-set-capabilities", json!({"capabilities": qemu.capabilities()}))?;
        self.monitor.execute("migrate-set-parameters", qemu.parameters(downtime_ms)).map(drop)
    }

    /// Waits for the migration's end: when that was, or `None` when its time is over. Starts post-copy after
    /// the first round.
    fn follow(&mut self, qemu: Qemu, until: SystemTime) -> Result<Option<SystemTime>> {
        let left = || until.duration_since(SystemTime::now()).unwrap_or_default();
        if qemu.post_copy {
            let second = |event: &Value| {
                let pass = event["event"] == "MIGRATION_PASS" && event["data"]["pass"].as_u64() >= Some(2);
                Ok(pass || is_completed(event)?)
            };
            if self.monitor.event_within("the second round", left(), second)?.is_none() {
                return Ok(None);
            }
            // It may be over already.
            let _ = self.monitor.execute("migrate-start-postcopy", json!({}));
        }
        self.monitor.event_within("the end of QEMU's migration", left(), is_completed)
    }

    /// Ends a migration; the guest goes on where it is. After the switch to post-copy there is no way back:
    /// what becomes of the guest then is seen.
    fn cancel(&mut self, qemu: Qemu) -> Result<()> {
        let _ = self.monitor.execute("migrate_cancel", json!({}));
        let over = |event: &Value| {
            let status = &event["data"]["status"];
            Ok(event["event"] == "MIGRATION"
                && (status == "cancelled" || status == "completed" || status == "failed"))
        };
        let within = if qemu.post_copy { Duration::from_secs(1) } else { SOON };
        self.monitor.event_within("the end of a cancelled migration", within, over).map(drop)
    }
}

impl<'a> Moved<'a> {
    /// Boots the guest on the first host.
    pub(crate) fn boot(lab: &'a Lab, tools: &'a Tools, start: HandStart, tls: bool) -> Result<Self> {
        for host in lab.hosts().iter().filter(|_| tls) {
            credentials(host)?;
        }
        let machine = Machine::start(&start, lab, 0, tools, "q0".to_owned())?;
        let client = lab.client()?;
        let guest = Guest::reach(&client, &start.guest)?;
        Ok(Self { lab, tools, start, tls, client, guest, here: 0, machine, machines: 0 })
    }

    /// The process that runs it now.
    pub(crate) fn pid(&self) -> u32 {
        self.machine.started.pid()
    }

    /// Moves it to the other host, unless that takes too long.
    pub(crate) fn hop(&mut self, contender: Contender, terms: &Terms) -> Result<Run> {
        let Way::Qemu(qemu) = contender.way else {
            return Err(Error::new(contender.name, "is not QEMU's"));
        };
        let there = 1 - self.here;
        let (from, to) = (&self.lab.hosts()[self.here], &self.lab.hosts()[there]);
        let incoming = HandStart { extra: self.incoming(), ..self.start.clone() };
        let name = self.next_name();
        let feelings = Feelings::begin(&self.guest, self.pid(), terms)?;
        let (sent, began) = (from.traffic()?.sent, SystemTime::now());

        let mut target = Machine::start(&incoming, self.lab, there, self.tools, name)?;
        let [mine, its] = [from, to].map(|host| host.dir.join(TLS));
        target.prepare(qemu, terms.downtime_ms, self.tls.then_some(("server", &its)))?;
        self.machine.prepare(qemu, terms.downtime_ms, self.tls.then_some(("client", &mine)))?;
        let uri = json!({"uri": format!("tcp:{}:{PORT}", to.address)});
        target.monitor.execute("migrate-incoming", uri.clone())?;
        self.machine.monitor.forget();
        let cpu = (self.machine.cpu()?, target.cpu()?);
        let started = SystemTime::now();
        self.machine.monitor.execute("migrate", uri)?;
        let ended = self.machine.follow(qemu, began + terms.patience)?;
        let resumed = match ended {
            Some(_) => target.monitor.event_within("the guest's start", SOON, is("RESUME"))?,
            None => None,
        };
        let (work, outran) = (feelings.work(), feelings.outran());
        let cpu = (self.machine.cpu()? - cpu.0, target.cpu()? - cpu.1);
        let wire_bytes = from.traffic()?.sent - sent;
        let report = self.machine.monitor.execute("query-migrate", json!({}))?;
        let stopped = self.machine.monitor.event_within("its stop", Duration::ZERO, is("STOP"))?;
        if ended.is_none() {
            self.machine.cancel(qemu)?;
        }
        let not_held_up = feelings.not_held_up(stopped.unwrap_or_else(SystemTime::now));
        let outran = outran.map(|outran| Outran { not_held_up, ..outran });
        let work_per_s = feelings.work_per_s;
        let felt = feelings.end(terms.verify);

        let finish = ended.zip(resumed).map(|(sent, resumed)| sent.max(resumed));
        let run = Run {
            contender: contender.name.to_owned(),
            began: began.duration_since(SystemTime::UNIX_EPOCH).doing("read the clock")?.as_secs(),
            from: from.name.clone(),
            total_ms: finish.map_or(terms.patience.as_secs_f64() * 1000.0, |end| between(began, end)),
            start_ms: between(began, started),
            downtime_ms: stopped.zip(resumed).map(|(stopped, resumed)| between(stopped, resumed)),
            wire_bytes,
            guest_work: work,
            work_per_s,
            cpu_s: (cpu.0 + cpu.1).as_secs_f64(),
            source_cpu_s: cpu.0.as_secs_f64(),
            finished: finish.is_some(),
            streams: Some(u64::from(qemu.channels.max(1))),
            outran,
            rounds: report["ram"]["dirty-sync-count"].as_u64(),
            trouble: finish.is_none().then(|| format!("ended after {:?}", terms.patience)),
            ..Run::default()
        }
        .felt(felt);
        if ended.is_some() {
            self.replace(target, there)?;
        } else {
            self.discard(target, there)?;
        }
        Ok(run)
    }

    fn incoming(&self) -> Vec<String> {
        self.start.extra.iter().cloned().chain(["-incoming".into(), "defer".into()]).collect()
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
        self.discard(before, was)
    }

    fn discard(&self, machine: Machine, host: usize) -> Result<()> {
        let tap = format!("link del t-{}", machine.name);
        drop(machine);
        self.lab.hosts()[host].namespace.ip(&tap).map(drop)
    }
}

/// A host's certificate and key, under the names by which QEMU looks for them.
fn credentials(host: &Host) -> Result<()> {
    let (dir, files) = (host.dir.join(TLS), pki::Files::within(&host.dir.join("tls")));
    fs::create_dir_all(&dir).doing(format!("make {}", dir.display()))?;
    for (file, names) in [
        (&files.ca, &["ca-cert.pem"][..]),
        (&files.cert, &["server-cert.pem", "client-cert.pem"]),
        (&files.key, &["server-key.pem", "client-key.pem"]),
    ] {
        for name in names {
            fs::copy(file, dir.join(name)).doing(format!("copy {}", file.display()))?;
        }
    }
    Ok(())
}

fn is(name: &str) -> impl Fn(&Value) -> Result<bool> {
    move |event| Ok(event["event"] == name)
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
