//! What a host has set on a VM's TAP and on its bridge: carried over, or refused before anything moves. And
//! links and strangers that misbehave.

use lab::{
    Doing, HandStart, Host, Namespace, Oddity, PORT, Result, Spec, Stage, Traces, VmFile, ensure, run, story,
    wait_for,
};
use serde_json::Value;
use std::{
    fs,
    io::Write,
    net::{SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use units::Rate;

const WORK: &str = "whimbrel.check=32M,rate=8M whimbrel.dirty=8M,rate=2M";

/// An interface, as `ip` sees it.
fn link(host: &Host, name: &str) -> Result<Value> {
    let said = host.namespace.ip(&format!("-details -json link show dev {name}"))?;
    let links: Value = serde_json::from_str(&said).doing("read ip's links")?;
    Ok(links[0].clone())
}

/// The only TAP of a host.
fn tap(host: &Host) -> Result<Value> {
    let said = host.namespace.ip("-details -json link show type tun")?;
    let links: Value = serde_json::from_str(&said).doing("read ip's links")?;
    ensure!(links.as_array().is_some_and(|links| links.len() == 1), "one TAP: {said}");
    Ok(links[0].clone())
}

/// Runs `bridge` on a host.
fn bridge(host: &Host, arguments: &str) -> Result<String> {
    run(Command::new("bridge").args(["-n", host.namespace.name()]).args(arguments.split_whitespace()))
}

/// What of a TAP goes with its VM.
fn carried(tap: &Value) -> Value {
    let port = &tap["linkinfo"]["info_slave_data"];
    let flags = ["isolated", "hairpin", "learning", "mcast_flood", "multicast_router", "priority"];
    let flags: Vec<_> = flags.iter().map(|flag| port[*flag].clone()).collect();
    let queues = &tap["linkinfo"]["info_data"]["numqueues"];
    serde_json::json!([tap["mtu"], tap["txqlen"], tap["ifalias"], queues, tap["flags"], flags])
}

/// A bridge that carries its host's address, that nobody gave an address of its own, and whose only port has
/// a high one.
fn address_of_host(host: &Host, ip: &str) -> Result<Value> {
    host.namespace.ip("link set uplink address fa:ff:ff:ff:ff:00")?;
    host.namespace.ip(&format!("address add {ip}/24 dev br0"))?;
    Ok(link(host, "br0")?["address"].clone())
}

#[test]
fn i9_a_vm_of_run_keeps_what_its_host_set_on_its_tap() {
    story("settings of a TAP", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let (a, b) = (lab.host("a"), lab.host("b"));
        let before = [(a, address_of_host(a, "10.78.0.11")?), (b, address_of_host(b, "10.78.0.12")?)];
        a.namespace.ip("link set uplink mtu 9000")?;
        // Where there is none, it is left out, and that is said.
        let vhost = !Path::new("/dev/vhost-net").exists();
        let file = VmFile { vcpus: 2, queues: 2, vhost, ..VmFile::new("web", Spec::new(151, WORK)) };
        let guest = stage.run("a", &file)?;
        let made = tap(a)?;
        ensure!(made["mtu"] == 9000, "a TAP has its bridge's MTU: {made}");
        let name = made["ifname"].as_str().doing("name the TAP")?;
        a.namespace.ip(&format!("link set dev {name} txqueuelen 333 alias web1"))?;
        let flags = "isolated on hairpin on mcast_flood off priority 8 mcast_router 2";
        a.namespace.ip(&format!("link set dev {name} type bridge_slave {flags}"))?;
        let here = tap(a)?;

        // Its packets would not fit there.
        let traces = Traces::of(b)?;
        let report = stage.start_migration("web", "a", "b", &[])?.ended("failed", 1)?;
        ensure!(report.error().contains("ip link set br0 mtu 9000"), "says what to do: {}", report.0);
        stage.check_untouched("web", &guest, "a", "b", &traces)?;

        b.namespace.ip("link set uplink mtu 9000")?;
        // Called by one of its addresses, each of which has its own certificate.
        let addresses = format!("{}:{PORT},10.77.0.250:{PORT}", a.address);
        for (from, to, mode, called) in [(a, b, "pre-copy", "b"), (b, a, "post-copy", addresses.as_str())] {
            let mut migration =
                stage.start_migration("web", &from.name, called, &["--mode", mode, "--verify"])?;
            if vhost {
                let without = "its networks run without vhost: there is no /dev/vhost-net";
                migration.until_note(&format!("on {}, {without}", to.name))?;
            }
            migration.completed()?;
            stage.check_moved("web", &guest, &from.name, &to.name)?;
            let there = tap(to)?;
            ensure!(carried(&there) == carried(&here), "{} is not {}", carried(&there), carried(&here));
            ensure!(link(to, "br0")?["mtu"] == 9000, "the bridge's MTU on {} has fallen", to.name);
            ensure!(there["address"].as_str().is_some_and(|mac| mac.starts_with("fe:")), "{there}");
        }
        for (host, address) in &before {
            let now = &link(host, "br0")?["address"];
            ensure!(now == address, "the bridge of {} had {address} and has {now}", host.name);
        }
        Ok(())
    });
}

#[test]
fn i9_an_adopted_vm_keeps_its_queues_and_waits_for_stp() {
    story("queues, STP", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let (a, b) = (lab.host("a"), lab.host("b"));
        let start = HandStart { vcpus: 2, queues: 2, ..HandStart::new(Spec::new(152, WORK)) };
        let (guest, _machine) = stage.adopt("a", "queues", start)?;
        // Changed after it was adopted.
        a.namespace.ip("link set dev t-hand152 type bridge_slave isolated on")?;
        let here = tap(a)?;

        // A new port forwards after twice this delay, longer than all else takes.
        b.namespace.ip("link set br0 type bridge stp_state 1 forward_delay 300")?;
        wait_for("the uplink to forward", Duration::from_secs(20), || {
            let state = link(b, "uplink")?["linkinfo"]["info_slave_data"]["state"].clone();
            Ok((state == "forwarding").then_some(()))
        })?;
        let client = guest.echo(Duration::from_millis(5))?;
        let mut migration = stage.start_migration("queues", "a", "b", &["--mode", "pre-copy", "--verify"])?;
        migration.until_note("does not forward yet (STP)")?;
        // It can be given up meanwhile, and tried again.
        let given_up = Instant::now();
        migration.interrupt()?;
        migration.ended("cancelled", 130)?;
        ensure!(given_up.elapsed() < Duration::from_secs(4), "it was given up at once");
        wait_for("the target to forget it", Duration::from_secs(20), || {
            Ok(stage.show("b", "queues")?.is_none().then_some(()))
        })?;
        let migration = stage.start_migration("queues", "a", "b", &["--mode", "pre-copy", "--verify"])?;
        migration.completed()?;
        let there = tap(b)?;
        let state = &there["linkinfo"]["info_slave_data"]["state"];
        ensure!(state == "forwarding", "the guest was resumed on a port that is {state}");
        ensure!(carried(&there) == carried(&here), "{} is not {}", carried(&there), carried(&here));
        stage.check_moved("queues", &guest, "a", "b")?;
        client.finish(Duration::from_secs(10)).map(drop)
    });
}

#[test]
fn what_a_host_set_on_a_tap_and_cannot_be_carried_is_refused() {
    story("rules on a TAP", &["a"], |lab, tools| {
        let (a, bin) = (lab.host("a"), lab.dir().join("bin"));
        // No firewall is installed with which a rule could be made.
        fs::create_dir(&bin).doing("make a directory")?;
        let (nft, rules) = (bin.join("nft"), bin.join("rules"));
        fs::write(&nft, format!("#!/bin/sh\ncat {}\n", rules.display())).doing("write a script")?;
        fs::set_permissions(&nft, fs::Permissions::from_mode(0o755)).doing("allow a script")?;
        fs::write(&rules, "{\"nftables\":[]}").doing("write rules")?;
        let prelude = format!("export PATH={}:$PATH", bin.display());
        let stage = Stage::with(lab, tools, |_| Oddity { prelude: prelude.clone(), ..Default::default() })?;
        let mut machine = HandStart::new(Spec::new(153, "")).start(a, tools)?;
        let socket = machine.qmp_socket();
        let tap = "t-hand153";
        let ip = |arguments: &str| a.namespace.ip(&arguments.replace("TAP", tap));
        let tc = |arguments: &str| a.namespace.tc(&arguments.replace("TAP", tap));
        let fdb = |verb: &str| bridge(a, &format!("fdb {verb} 52:54:00:00:00:01 dev {tap} master static"));
        let rule = |to: &str| {
            let said = format!(
                r#"{{"nftables":[{{"rule":{{"family":"bridge","table":"f","chain":"in","expr":[{{"match":
                {{"op":"==","left":{{"meta":{{"key":"iifname"}}}},"right":{to}}}}}]}}}}]}}"#
            );
            fs::write(&rules, said).doing("write rules").map(|()| String::new())
        };
        type Act<'a> = &'a dyn Fn() -> Result<String>;
        let table: &[(&str, Act<'_>, Act<'_>, &[&str])] = &[
            (
                "shaped",
                &|| tc("qdisc add dev TAP root tbf rate 1gbit burst 64k latency 50ms"),
                &|| tc("qdisc del dev TAP root"),
                &["traffic control tbf", "tc qdisc del dev t-hand153 root"],
            ),
            (
                "policed",
                &|| tc("qdisc add dev TAP ingress"),
                &|| tc("qdisc del dev TAP ingress"),
                &["traffic control ingress", "tc qdisc del dev t-hand153 ingress"],
            ),
            ("tied", &|| fdb("add"), &|| fdb("del"), &["52:54:00:00:00:01", "bridge fdb del"]),
            (
                "ruled",
                &|| rule(&format!("{tap:?}")),
                &|| rule("\"other\""),
                &["nftables rule in bridge f in names its TAP t-hand153"],
            ),
            (
                "alone",
                &|| ip("link set TAP nomaster"),
                &|| ip("link set TAP master br0"),
                &["is on no bridge"],
            ),
            (
                "mapped",
                &|| ip("link set TAP type bridge_slave vlan_tunnel on"),
                &|| ip("link set TAP type bridge_slave vlan_tunnel off"),
                &["maps VLANs to tunnels"],
            ),
            (
                "renamed",
                &|| ip("link set TAP down").and_then(|_| ip("link set TAP name other")),
                &|| ip("link set other name TAP").and_then(|_| ip("link set TAP up")),
                &["was renamed or replaced", "other"],
            ),
        ];
        for (name, act, undo, words) in table {
            act()?;
            let answer = stage.agent("a").cli().run(["adopt", name, "--qmp", &socket.to_string_lossy()])?;
            answer.exited(1)?.says(words)?;
            undo()?;
        }
        machine.process().must_live()?;
        // And one that is made after the VM was taken charge of.
        stage.agent("a").cli().json(&["adopt", "late", "--qmp", &socket.to_string_lossy()])?;
        tc("qdisc add dev TAP ingress")?;
        let answer = stage.agent("a").cli().run(["migrate", "late", "--to", "nowhere"])?;
        answer.exited(1)?.says(&["traffic control ingress"]).map(drop)
    });
}

/// Keeps so many connections busy that say a byte now and then, and never whose they are; opens them again
/// when they are ended.
struct Strangers {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Strangers {
    fn from(namespace: &Namespace, to: SocketAddr, count: usize) -> Self {
        let (namespace, stop) = (namespace.clone(), Arc::new(AtomicBool::new(false)));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            namespace.move_in()?;
            let mut connections: Vec<Option<TcpStream>> = (0..count).map(|_| None).collect();
            // One of them says something each millisecond: each about every second and a half.
            for i in (0..count).cycle() {
                if stopped.load(SeqCst) {
                    return Ok(());
                }
                let connection = &mut connections[i];
                if connection.as_mut().is_none_or(|connection| connection.write_all(&[22]).is_err()) {
                    *connection = TcpStream::connect_timeout(&to, Duration::from_secs(1)).ok();
                }
                thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Strangers {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn i3_links_that_drop_and_strangers_that_hold_on_harm_no_vm() {
    story("a link that drops large packets, strangers", &["a", "b", "c"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let (a, b, c) = (lab.host("a"), lab.host("b"), lab.host("c"));
        a.carry_large()?;
        b.carry_large()?;
        let work = "whimbrel.fill=48M whimbrel.check=16M,rate=4M";
        let guest = stage.run("a", &VmFile::new("web", Spec::new(154, work)))?;
        let traces = Traces::of(b)?;
        // What is said first of a VM is large, too.
        a.drop_large()?;
        let report = stage.start_migration("web", "a", "b", &["--mode", "pre-copy"])?.ended("failed", 1)?;
        ensure!(report.error().contains("MTU"), "says what to look at: {}", report.0);
        a.carry_large()?;
        a.shape(Some(Rate(16 << 20)))?;

        let mut migration =
            stage.start_migration("web", "a", "b", &["--mode", "pre-copy", "--give-up", "6s"])?;
        migration.until_moving("pre-copy")?;
        a.drop_large()?;
        let begun = Instant::now();
        let report = migration.ended("failed", 1)?;
        let reason = "small packets pass, large ones do not: MTU";
        ensure!(report.error().contains(reason), "says why: {}", report.0);
        ensure!(begun.elapsed() < Duration::from_secs(30), "ended after {:?}", begun.elapsed());
        a.carry_large()?;
        stage.check_untouched("web", &guest, "a", "b", &traces)?;

        let _strangers = Strangers::from(&c.namespace, SocketAddr::from((b.address, PORT)), 1400);
        // All of them have come, some of them again.
        let here = b.address.to_string();
        let list = ["-Htn", "state", "established", "src", here.as_str()];
        wait_for("the strangers", Duration::from_secs(60), || {
            let said = run(b.namespace.command("ss").args(list))?;
            Ok((said.lines().count() >= 30).then_some(()))
        })?;
        let mut migration = stage.start_migration("web", "a", "b", &["--mode", "hybrid", "--verify"])?;
        migration.until_moving("pre-copy")?;
        a.cut_from(b)?;
        migration.until_note("the VM runs on here")?;
        a.mend_to(b)?;
        migration.until_note("connected to b again")?;
        migration.completed()?;
        stage.check_moved("web", &guest, "a", "b")
    });
}
