//! An agent whose VMs are `sleep` processes and whose migrations are played from a script named by their
//! target.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use agent::{
    AgentError,
    config::{Config, Flags},
    hypervisor::{Condition, Examined, Found, Hypervisor, Reasons, StartPlan},
    migrate::{Events, MigrateRequest, Migrator, Wishes},
    peers::Pass,
    run_until,
    store::{Arrival, ArrivalRecord, DepartureRecord, Store, VmRecord},
};
use api::{Event, Failure, Forecast, Mode, Outcome, PageCounts, Phase, Report, Round};
use ports::shared::SharedRecord;
use ports::{Claim, Claimed, RunState};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    collections::{HashMap, HashSet},
    fs, io,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use tokio::sync::mpsc::UnboundedSender;

/// Longer than anything here should take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How long an agent's last threads may take to end on a busy machine.
const SOON: Duration = Duration::from_secs(2);

/// VMs that are `sleep` processes. Outlives agents, as QEMU processes do.
#[derive(Default)]
pub struct Sleepers {
    children: Mutex<HashMap<u32, Child>>,
    pub paused: Mutex<HashSet<u32>>,
    pub swept: Mutex<Vec<String>>,
    /// Their monitors do not answer.
    pub silent: AtomicBool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: String,
}

impl Sleepers {
    pub fn spawn(&self) -> u32 {
        let child = Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pid = child.id();
        self.children.lock().unwrap().insert(pid, child);
        pid
    }

    pub fn kill(&self, pid: u32) {
        if let Some(mut child) = self.children.lock().unwrap().remove(&pid) {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Hypervisor for Sleepers {
    fn plan(&self, text: &str, path: &Path) -> Result<StartPlan, Reasons> {
        let file: File = toml::from_str(text).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(StartPlan { name: file.name, recipe: recipe() })
    }

    fn start(&self, plan: &StartPlan) -> Result<Found, Reasons> {
        if plan.name == "broken" {
            return Err(Reasons(vec!["no bridge br0".into(), "no disk".into()]));
        }
        let qmp = format!("/run/{}.qmp", plan.name).into();
        Ok(Found { pid: self.spawn(), qmp, recipe: recipe(), belongings: Value::Null })
    }

    fn inspect(&self, name: &str, qmp: &Path) -> Result<(Found, Vec<String>), Reasons> {
        let text =
            fs::read_to_string(qmp).map_err(|e| format!("nothing answers at {}: {e}", qmp.display()))?;
        let pid = text.trim().parse().map_err(|_| format!("{} is not QEMU", qmp.display()))?;
        assert!(!name.is_empty());
        let found = Found { pid, qmp: qmp.to_owned(), recipe: recipe(), belongings: Value::Null };
        Ok((found, vec!["the display stays behind".to_owned()]))
    }

    fn examine(&self, qmp: &Path) -> Result<Examined, Reasons> {
        let (found, different) = self.inspect("it", qmp)?;
        Ok(Examined { pid: found.pid, carried: vec![], different, hindrances: vec![] })
    }

    fn condition(&self, vm: &VmRecord) -> Condition {
        match self.paused.lock().unwrap().contains(&vm.process.unwrap().pid) {
            true => Condition::Paused("paused".to_owned()),
            false => Condition::Running,
        }
    }

    fn sweep(&self, name: &str) {
        self.swept.lock().unwrap().push(name.to_owned());
    }

    fn sweep_others(&self, _: &[VmRecord]) {}

    fn learn(&self) {}

    fn restore(&self, vm: &VmRecord, before: RunState) -> Result<(), Reasons> {
        if before == RunState::Running {
            self.paused.lock().unwrap().remove(&vm.process.unwrap().pid);
        }
        Ok(())
    }

    fn can_run(&self, vm: &VmRecord) -> Result<bool, Reasons> {
        Ok(self.children.lock().unwrap().contains_key(&vm.process.unwrap().pid))
    }

    fn kill(&self, vm: &VmRecord) -> Result<(), Reasons> {
        Self::kill(self, vm.process.unwrap().pid);
        Ok(())
    }

    fn stop(&self, vm: &VmRecord) -> Result<(), Reasons> {
        if self.silent.load(SeqCst) {
            return Err("its monitor does not answer".into());
        }
        self.discard(vm)
    }

    fn discard(&self, vm: &VmRecord) -> Result<(), Reasons> {
        Self::kill(self, vm.process.unwrap().pid);
        Ok(())
    }
}

fn recipe() -> Value {
    json!({
        "machine": "pc-q35-7.2,smm=off",
        "accel": "tcg",
        "smp": "2,maxcpus=2",
        "memory": [{ "id": "ram", "bytes": 1u64 << 30, "backing": "memfd" }],
    })
}

/// Plays migrations. What happens is named by the target: `good`, `bad`, `slow` (waits for a cancel),
/// `postcopy` (waits, uncancellable, until [`Script::go_on`]), `doubt`, `panic`.
#[derive(Default)]
pub struct Script {
    gate: Mutex<bool>,
    opened: Condvar,
    /// What the target's record answers; `None`: it cannot be reached.
    pub answer: Mutex<Option<Claimed>>,
    pub asked: Mutex<u32>,
    pub served_gone: Mutex<Vec<String>>,
    /// Arrivals that went on.
    pub gone_on: Mutex<Vec<String>>,
}

impl Script {
    pub fn go_on(&self) {
        *self.gate.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn wait(&self) {
        let gate = self.gate.lock().unwrap();
        drop(self.opened.wait_timeout_while(gate, PATIENCE, |open| !*open).unwrap());
    }
}

impl Migrator for Script {
    fn migrate(&self, request: &MigrateRequest, events: Events, wishes: &Wishes) -> Report {
        let here = "hosta".to_owned();
        let mut report = request.blank_report(&here, Outcome::Completed);
        report.error = None;
        report.protected = true;
        let fail = |why: &str, runs: Option<&str>| {
            Some(Failure {
                what: format!("migrate {} to {}", request.vm.name, request.options.to),
                place: "preflight, target".to_owned(),
                why: why.to_owned(),
                vm_runs_on: runs.map(str::to_owned),
            })
        };
        events(Event::Phase { phase: Phase::Preflight, at_ms: 0 });
        if request.options.to == "bad" {
            report.outcome = Outcome::Failed;
            report.error = fail("there is no bridge br0 on bad\nits QEMU is too old", Some(&here));
            return report;
        }
        events(Event::Phase { phase: Phase::PreCopy, at_ms: 312 });
        for left in (1..4).rev() {
            events(tick(Phase::PreCopy, left << 28));
        }
        let round = Round { n: 1, pages: 262_144, wire_bytes: 1 << 30, ms: 2310.0, dirtied: 12_034 };
        events(Event::Round(round.clone()));
        events(tick(Phase::PreCopy, 12_034 * 4096));
        match request.options.to.as_str() {
            "slow" => {
                if wishes.cancel.wait(PATIENCE) {
                    report.outcome = Outcome::Cancelled;
                    report.error = fail("cancelled by the user", Some(&here));
                    return report;
                }
            }
            "panic" => panic!("as the script says"),
            "postcopy" => {
                events(Event::Phase { phase: Phase::Switchover, at_ms: 2700 });
                events(Event::Phase { phase: Phase::PostCopy, at_ms: 2710 });
                events(tick(Phase::PostCopy, 1 << 20));
                self.wait();
            }
            "doubt" => {
                report.outcome = Outcome::InDoubt;
                report.error = fail("the target was lost right after the authorization", None);
                return report;
            }
            _ => events(Event::Phase { phase: Phase::Switchover, at_ms: 2700 }),
        }
        report.mode = Mode::PreCopy;
        report.total_ms = 2720.0;
        report.preflight_ms = 312.0;
        report.downtime_ms = Some(8.412);
        report.rounds =
            vec![round, Round { n: 2, pages: 12_034, wire_bytes: 49_000_000, ms: 8.0, dirtied: 0 }];
        report.pages =
            PageCounts { total: 262_144, hole: 180_000, zero: 2_144, raw: 80_000, ..PageCounts::default() };
        report.guest_bytes = 1 << 30;
        report.wire_bytes = 330_000_000;
        report.streams = 2;
        report.verified = request.options.verify.then_some(true);
        report
    }

    fn plan(&self, _: &MigrateRequest) -> Result<Forecast, String> {
        Err("the script has no plan".into())
    }

    fn serve(&self, mut connection: TcpStream, _: SocketAddr, _: Pass) {
        let _ = connection.write_all(b"served");
    }

    fn ask(&self, _: &DepartureRecord, claim: &Claim) -> io::Result<Claimed> {
        *self.asked.lock().unwrap() += 1;
        let _ = claim;
        self.answer.lock().unwrap().clone().ok_or_else(|| io::Error::other("no route to host"))
    }

    fn ask_here(&self, claim: &Claim) -> io::Result<Claimed> {
        *self.asked.lock().unwrap() += 1;
        assert_eq!(claim.claimer, "hosta");
        self.answer.lock().unwrap().clone().ok_or_else(|| io::Error::other("the datastore is away"))
    }

    fn hold(&self, _: &VmRecord) -> Option<Box<dyn Send>> {
        None
    }

    fn shut_down(&self) {}

    fn go_on(&self, vm: &VmRecord, _: Arrival, record: &ArrivalRecord) {
        assert!(record.claimed);
        self.gone_on.lock().unwrap().push(vm.name.clone());
    }

    fn serve_gone(&self, vm: &VmRecord, _: &DepartureRecord) {
        self.served_gone.lock().unwrap().push(vm.name.clone());
    }
}

fn tick(phase: Phase, left_bytes: u64) -> Event {
    Event::Tick {
        phase,
        round: 1,
        left_bytes,
        of_bytes: 1 << 30,
        rate: 118 << 20,
        predicted_downtime_ms: Some(12.0),
        left_ms: Some(3500),
        ends_in_ms: Some(4200),
        spool: None,
        slowed_percent: None,
        at_ms: 500,
    }
}

/// A host: a directory, VMs, and, while it runs, an agent.
pub struct Host {
    pub dir: tempfile::TempDir,
    pub vms: Arc<Sleepers>,
    pub script: Arc<Script>,
    /// Who owns which VM, where all hosts can ask.
    pub record: Option<Arc<dyn SharedRecord>>,
    running: Option<Running>,
}

struct Running {
    end: UnboundedSender<&'static str>,
    thread: JoinHandle<Result<(), AgentError>>,
}

impl Host {
    /// With an agent that is ready.
    pub fn new() -> Self {
        Self::sharing(None)
    }

    /// The same, with a record that all hosts share.
    pub fn sharing(record: Option<Arc<dyn SharedRecord>>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut host = Self { dir, vms: Arc::default(), script: Arc::default(), record, running: None };
        host.start().unwrap();
        host
    }

    pub fn config(&self) -> Config {
        let peer = |name: &str| (name.to_owned(), "127.0.0.1:1".parse().unwrap());
        let names = ["good", "bad", "slow", "postcopy", "doubt", "panic"];
        Config::load(
            None,
            Flags {
                name: Some("hosta".to_owned()),
                state_dir: Some(self.dir.path().join("state")),
                runtime_dir: Some(self.dir.path().join("run")),
                listen: Some(([127, 0, 0, 1], 0).into()),
                peers: names.map(peer).to_vec(),
                ..Flags::default()
            },
        )
        .unwrap()
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("run/agent.sock")
    }

    /// Starts the agent again, with the same VMs.
    pub fn start(&mut self) -> Result<(), AgentError> {
        let (config, vms, script) = (self.config(), self.vms.clone(), self.script.clone());
        let record = self.record.clone();
        let (ready, is_ready) = mpsc::channel();
        let thread = thread::spawn(move || {
            run_until(
                config,
                vms,
                record,
                |_| script,
                move || {
                    let (end, ended) = tokio::sync::mpsc::unbounded_channel();
                    ready.send(end).unwrap();
                    Ok(ended)
                },
            )
        });
        match is_ready.recv() {
            Ok(end) => {
                self.running = Some(Running { end, thread });
                Ok(())
            }
            Err(_) => Err(thread.join().unwrap().unwrap_err()),
        }
    }

    /// Ends the agent as SIGTERM does.
    pub fn stop(&mut self) {
        let running = self.running.take().unwrap();
        running.end.send("SIGTERM").unwrap();
        running.thread.join().unwrap().unwrap();
        // Its threads would end with its process; here they end soon, but for one that a script has stuck.
        let (config, end) = (self.config(), Instant::now() + SOON);
        while Store::open(&config.state_dir, &config.name).is_err() && Instant::now() < end {
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Status and body of a request. HTTP 1.0, so that the end of the answer is the end of the connection.
    pub fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut socket = UnixStream::connect(self.socket()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        write!(socket, "{method} {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
        let mut answer = Vec::new();
        match socket.read_to_end(&mut answer) {
            // It was refused before its body was read: the answer comes before that.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset && !answer.is_empty() => {}
            ended => drop(ended.unwrap()),
        }
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// The same for JSON.
    pub fn json(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let (status, text) =
            self.ask(method, path, &if body.is_null() { String::new() } else { body.to_string() });
        (status, if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() })
    }

    /// Starts a VM.
    pub fn run(&self, name: &str) -> Value {
        let (status, vm) =
            self.json("POST", "/v1/vms", json!({ "text": format!("name = {name:?}"), "path": "/vm.toml" }));
        assert_eq!(status, 201, "{vm}");
        vm
    }

    /// Starts a migration.
    pub fn migrate(&self, vm: &str, to: &str) {
        let (status, answer) = self.json("POST", &format!("/v1/vms/{vm}/migrate"), json!({ "to": to }));
        assert_eq!(status, 202, "{answer}");
    }

    /// All events of the VM's migration, to its end.
    pub fn follow(&self, vm: &str) -> Vec<Value> {
        let (status, text) = self.ask("GET", &format!("/v1/vms/{vm}/migration?follow=true"), "");
        assert_eq!(status, 200, "{text}");
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.script.go_on();
        if let Some(running) = self.running.take() {
            // It may be gone already, and a panic here would hide what went wrong.
            let _ = running.end.send("SIGTERM");
            let _ = running.thread.join();
        }
        let pids: Vec<u32> = self.vms.children.lock().unwrap().keys().copied().collect();
        pids.into_iter().for_each(|pid| self.vms.kill(pid));
    }
}

/// Waits for something that another thread brings about and that no event tells.
pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < end, "not in time: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
