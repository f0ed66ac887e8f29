//! Hosts with agents, ready for stories about VMs.

use crate::{
    Agent, Doing, Error, Guest, HandStart, HandStarted, Host, Lab, Migration, Namespace, Oddity, Report,
    Result, Tools, VmFile, ensure, wait_for,
};
use serde_json::Value;
use std::{collections::BTreeMap, fs, path::Path, time::Duration};

/// How long something may take that follows from what has already happened.
const SOON: Duration = Duration::from_secs(20);

/// A laboratory with an agent on every host, and a client.
pub struct Stage<'a> {
    /// The laboratory.
    pub lab: &'a Lab,
    /// What it is made from.
    pub tools: &'a Tools,
    /// Where guests are talked to from.
    pub client: Namespace,
    agents: BTreeMap<String, Agent>,
}

impl<'a> Stage<'a> {
    /// Starts an agent on every host; they know each other by name.
    pub fn new(lab: &'a Lab, tools: &'a Tools) -> Result<Self> {
        Self::with(lab, tools, |_| Oddity::default())
    }

    /// The same, with something odd about some of them.
    pub fn with(lab: &'a Lab, tools: &'a Tools, odd: impl Fn(&Host) -> Oddity) -> Result<Self> {
        let mut agents = BTreeMap::new();
        for host in lab.hosts() {
            let agent = Agent::start_odd(host, lab.hosts(), tools, odd(host))?;
            agents.insert(host.name.clone(), agent);
        }
        Ok(Self { lab, tools, client: lab.client()?, agents })
    }

    /// The agent of a host. Panics where there is no such host: the story is wrong then.
    pub fn agent(&self, host: &str) -> &Agent {
        self.agents.get(host).unwrap_or_else(|| panic!("no agent on {host}"))
    }

    /// The same, to be crashed or restarted.
    pub fn agent_mut(&mut self, host: &str) -> &mut Agent {
        self.agents.get_mut(host).unwrap_or_else(|| panic!("no agent on {host}"))
    }

    /// Starts a VM with `whimbrel run` and waits until its guest answers.
    pub fn run(&self, on: &str, vm: &VmFile) -> Result<Guest> {
        let path = self.lab.dir().join(format!("{}.toml", vm.name));
        fs::write(&path, vm.text(self.tools)).doing(format!("write {}", path.display()))?;
        self.agent(on).cli().json(&["run", &path.to_string_lossy()])?;
        Guest::reach(&self.client, &vm.guest)
    }

    /// Starts a QEMU by hand, waits until its guest answers, and lets the agent adopt it.
    pub fn adopt(&self, on: &str, name: &str, start: HandStart) -> Result<(Guest, HandStarted)> {
        let spec = start.guest.clone();
        let machine = start.start(self.lab.host(on), self.tools)?;
        let guest = Guest::reach(&self.client, &spec)?;
        self.agent(on).cli().json(&["adopt", name, "--qmp", &machine.qmp_socket().to_string_lossy()])?;
        Ok((guest, machine))
    }

    /// Begins a migration.
    pub fn start_migration(&self, vm: &str, from: &str, to: &str, options: &[&str]) -> Result<Migration> {
        Migration::start(&self.agent(from).cli(), vm, to, options)
    }

    /// A whole migration that must succeed with both sides' memory compared; afterwards the VM runs on the
    /// target, the guest's memory is right in the guest's eyes, and nothing of it is left on the source.
    pub fn migrate(&self, vm: &str, guest: &Guest, from: &str, to: &str, options: &[&str]) -> Result<Report> {
        let options: Vec<_> = options.iter().copied().chain(["--verify"]).collect();
        let report = self.start_migration(vm, from, to, &options)?.completed()?;
        ensure!(report.verified() == Some(true), "memory was compared: {}", report.0);
        self.check_moved(vm, guest, from, to)?;
        Ok(report)
    }

    /// The VM runs on `to`, its memory is right in the guest's eyes, and `from` has forgotten it.
    pub fn check_moved(&self, vm: &str, guest: &Guest, from: &str, to: &str) -> Result<()> {
        self.runs_only_on(vm, to)?;
        ensure!(self.show(from, vm)?.is_none(), "{from} has forgotten {vm}");
        guest.runs()?;
        guest.verify().map(drop)
    }

    /// What an agent says of a VM; `None` if it has none of that name.
    pub fn show(&self, host: &str, vm: &str) -> Result<Option<Value>> {
        let list = self.agent(host).cli().json(&["list"])?;
        let vms = list.as_array().doing(format!("understand the list {list}"))?;
        Ok(vms.iter().find(|entry| entry["name"] == vm).cloned())
    }

    /// Waits until exactly one host runs the VM, and it is this one (I1).
    pub fn runs_only_on(&self, vm: &str, host: &str) -> Result<()> {
        let mut last = BTreeMap::new();
        let found = wait_for(&format!("{vm} running on {host} alone"), SOON, || {
            last.clear();
            for name in self.agents.keys() {
                let state =
                    self.show(name, vm)?.map(|entry| entry["state"].as_str().unwrap_or("?").to_owned());
                last.insert(name.clone(), state);
            }
            let right = last.iter().all(|(name, state)| match state.as_deref() {
                Some("running") => name == host,
                None => name != host,
                Some(_) => false,
            });
            Ok(right.then_some(()))
        });
        found.map_err(|error| Error::new(error.what, format!("{}; seen: {last:?}", error.why)))
    }

    /// While the target cannot be reached: the source at least says that the VM runs there.
    pub fn runs_on(&self, vm: &str, host: &str) -> Result<()> {
        wait_for(&format!("{vm} running on {host}"), SOON, || {
            let shown = self.show(host, vm)?;
            Ok(shown.filter(|shown| shown["state"] == "running").map(drop))
        })
    }

    /// A VM whose migration did not happen runs on as if nothing had been tried, and the target has no trace
    /// (I3).
    pub fn check_untouched(
        &self,
        vm: &str,
        guest: &Guest,
        host: &str,
        target: &str,
        before: &Traces,
    ) -> Result<()> {
        self.runs_only_on(vm, host)?;
        guest.runs()?;
        guest.verify()?;
        let target = self.lab.host(target);
        let mut now = Traces::default();
        wait_for(&format!("{} without a trace", target.name), SOON, || {
            now = Traces::of(target)?;
            Ok(now.adds_nothing_to(before).then_some(()))
        })
        .map_err(|error| Error::new(error.what, format!("before: {before:?}, now: {now:?}")))
    }
}

/// What could betray that a VM is or was on a host.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Traces {
    processes: Vec<String>,
    interfaces: Vec<String>,
    files: Vec<String>,
}

impl Traces {
    /// The host's traces now.
    pub fn of(host: &Host) -> Result<Self> {
        let mut processes = Vec::new();
        for pid in
            crate::run(std::process::Command::new("ip").args(["netns", "pids", host.namespace.name()]))?
                .lines()
        {
            // A process may end between the two looks.
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            processes.extend((name.starts_with("qemu")).then(|| name.trim().to_owned()));
        }
        let links: Value =
            serde_json::from_str(&host.namespace.ip("-json link show")?).doing("read ip's links")?;
        let names = links.as_array().into_iter().flatten().filter_map(|link| link["ifname"].as_str());
        let mut interfaces: Vec<_> = names.map(str::to_owned).collect();
        interfaces.sort();
        let mut files = Vec::new();
        below(&host.dir.join("run"), &mut files);
        // What a QEMU said that refused a state is kept for people.
        files.retain(|file| !file.ends_with(".failed.log"));
        files.sort();
        Ok(Self { processes, interfaces, files })
    }
}

impl Traces {
    /// Whether nothing has come since. (An agent that begins asks QEMU for its version: that process may be
    /// gone.)
    pub fn adds_nothing_to(&self, before: &Self) -> bool {
        self.processes.len() <= before.processes.len()
            && self.interfaces == before.interfaces
            && self.files == before.files
    }

    /// Whether a QEMU was there.
    pub fn has_qemu(&self) -> bool {
        !self.processes.is_empty()
    }

    /// Without what guests wrote on their consoles: that stays when they go.
    pub fn without_consoles(mut self) -> Self {
        self.files.retain(|file| !file.ends_with(".console"));
        self
    }
}

fn below(dir: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        found.push(entry.path().display().to_string());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            below(&entry.path(), found);
        }
    }
}
