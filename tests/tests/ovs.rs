//! TAPs on bridges of Open vSwitch, which runs in the laboratory's namespaces, without a module of the
//! kernel's.

use lab::{Doing, Guest, HandStart, Host, Oddity, Result, Spec, Stage, ensure, run, story, wait_for};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::Child,
    time::Duration,
};

const WORK: &str = "whimbrel.check=32M,rate=8M whimbrel.dirty=8M,rate=2M";

/// Where its programs are.
fn programs() -> Option<PathBuf> {
    let named = std::env::var_os("WHIMBREL_OVS").map(PathBuf::from);
    if named.is_none() {
        eprintln!("skipped: WHIMBREL_OVS must name where tests/ovs.sh has put Open vSwitch");
    }
    named
}

/// A switch of a host's own.
struct Switch<'a> {
    host: &'a Host,
    programs: PathBuf,
    _server: Ended,
    _switch: Ended,
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What has its programs found, and find each other.
fn environment(host: &Host, programs: &Path) -> [(&'static str, String); 4] {
    let path = std::env::var("PATH").unwrap_or_default();
    let dir = host.dir.display().to_string();
    [
        ("PATH", format!("{}:{path}", programs.display())),
        ("OVS_RUNDIR", dir.clone()),
        ("OVS_DBDIR", dir.clone()),
        ("OVS_LOGDIR", dir),
    ]
}

impl<'a> Switch<'a> {
    /// In place of the bridge br0, whose ports become its own.
    fn start(host: &'a Host, programs: PathBuf, ports: &[&str]) -> Result<Self> {
        let database = host.dir.join("conf.db").display().to_string();
        let program = |name: &str, words: &[&str]| {
            let mut command = host.namespace.command(programs.join(name));
            command.args(words).envs(environment(host, &programs));
            command
        };
        let schema = programs.join("vswitch.ovsschema").display().to_string();
        run(&mut program("ovsdb-tool", &["create", &database, &schema]))?;
        let socket = host.dir.join("db.sock").display().to_string();
        let remote = format!("--remote=punix:{socket}");
        let server = program("ovsdb-server", &[&database, &remote]).spawn();
        let server = Ended(server.doing("start ovsdb-server")?);
        let word = format!("unix:{socket}");
        wait_for("its database", Duration::from_secs(20), || {
            let done = run(&mut program("ovs-vsctl", &["--timeout=5", "--no-wait", "init"]));
            Ok(done.is_ok().then_some(()))
        })?;
        // Frames come without checksums from the kernel of the same machine: it adds them.
        let all = ["--no-wait", "set", "Open_vSwitch", ".", "other_config:userspace-tso-enable=true"];
        run(&mut program("ovs-vsctl", &all))?;
        let switch = program("ovs-vswitchd", &[&word, "--disable-system"]).spawn();
        let switch = Ended(switch.doing("start ovs-vswitchd")?);
        let made = Self { host, programs, _server: server, _switch: switch };
        for port in ports {
            host.namespace.ip(&format!("link set dev {port} nomaster"))?;
        }
        host.namespace.ip("link del dev br0")?;
        made.tell("add-br br0 -- set bridge br0 datapath_type=netdev")?;
        host.namespace.ip("link set dev br0 up")?;
        for port in ports {
            made.tell(&format!("add-port br0 {port}"))?;
        }
        Ok(made)
    }

    fn tell(&self, words: &str) -> Result<String> {
        let mut command = self.host.namespace.command(self.programs.join("ovs-vsctl"));
        command
            .arg("--timeout=20")
            .args(words.split_whitespace())
            .envs(environment(self.host, &self.programs));
        run(&mut command)
    }

    /// The ports of VMs on it.
    fn taps(&self) -> Result<Vec<String>> {
        let all = self.tell("list-ports br0")?;
        Ok(all.lines().filter(|port| *port != "uplink").map(str::to_owned).collect())
    }

    /// What it has of a port.
    fn port(&self, tap: &str) -> Result<[Value; 2]> {
        let ids = self.tell(&format!("--format=json --columns=external_ids find Interface name={tap}"))?;
        let port =
            self.tell(&format!("--format=json --columns=tag,trunks,vlan_mode find Port name={tap}"))?;
        let read = |text: &str| serde_json::from_str::<Value>(text).doing("read what Open vSwitch says");
        Ok([read(&port)?["data"].clone(), read(&ids)?["data"].clone()])
    }
}

#[test]
fn i9_a_vm_on_open_vswitch_keeps_its_port() {
    let Some(programs) = programs() else { return };
    story("Open vSwitch", &["a", "b"], |lab, tools| {
        let prelude = |host: &Host| {
            let all = environment(host, &programs).into_iter();
            all.map(|(key, value)| format!("export {key}={value}")).collect::<Vec<_>>().join("\n")
        };
        let stage = Stage::with(lab, tools, |host| Oddity { prelude: prelude(host), ..Default::default() })?;
        let (a, b) = (lab.host("a"), lab.host("b"));
        // Without a module of the kernel's nobody sums up what a guest leaves to its card.
        let plain = ["-global", "virtio-net-pci.csum=off"].map(str::to_owned).to_vec();
        let spec = Spec::new(154, WORK);
        let start = HandStart { extra: plain, ..HandStart::new(spec.clone()) };
        let tap = "t-hand154";
        let machine = start.start(a, tools)?;
        let here = Switch::start(a, programs.clone(), &["uplink", tap])?;
        here.tell(&format!("set Interface {tap} external_ids:iface-id=e4a0-1 external_ids:vm-uuid=7"))?;
        here.tell(&format!("set Port {tap} trunks=0,30"))?;
        let there = Switch::start(b, programs.clone(), &["uplink"])?;
        let guest = Guest::reach(&lab.client()?, &spec)?;
        let socket = machine.qmp_socket();
        let adopt =
            |name: &str| stage.agent("a").cli().run(["adopt", name, "--qmp", &socket.to_string_lossy()]);
        // What cannot go with it is refused.
        here.tell(&format!("set Interface {tap} ingress_policing_rate=1000"))?;
        adopt("limited")?
            .exited(1)?
            .says(&["its TAP t-hand154 has ingress_policing_rate in Open vSwitch"])?;
        here.tell(&format!("set Interface {tap} ingress_policing_rate=0"))?;
        adopt("switched")?.exited(0)?;
        let set = here.port(tap)?;

        let client = guest.echo(Duration::from_millis(5))?;
        stage.migrate("switched", &guest, "a", "b", &["--mode", "pre-copy"])?;
        client.finish(Duration::from_secs(10))?;
        let taps = there.taps()?;
        ensure!(taps.len() == 1, "one TAP: {taps:?}");
        let now = there.port(&taps[0])?;
        ensure!(now == set, "{now:?} is not {set:?}");

        stage.migrate("switched", &guest, "b", "a", &["--mode", "post-copy"])?;
        wait_for("the port to go", Duration::from_secs(10), || Ok(there.taps()?.is_empty().then_some(())))?;
        let mine: Vec<_> = here.taps()?.into_iter().filter(|port| port != tap).collect();
        ensure!(mine.len() == 1, "one TAP: {mine:?}");
        ensure!(here.port(&mine[0])? == set, "it is plugged in as it was");

        // One that is given up leaves no port.
        let migration =
            stage.start_migration("switched", "a", "b", &["--mode", "pre-copy", "--bandwidth", "8Mbit"])?;
        wait_for("its port", Duration::from_secs(20), || Ok((!there.taps()?.is_empty()).then_some(())))?;
        migration.interrupt()?;
        migration.ended("cancelled", 130)?;
        wait_for("its port to go", Duration::from_secs(20), || Ok(there.taps()?.is_empty().then_some(())))?;
        guest.verify().map(drop)
    });
}
