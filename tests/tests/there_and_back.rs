//! VMs that whimbrel started, moved there and back in every mode while a client talks to them.

use lab::{Guest, Report, Result, Spec, Stage, TcpClient, VmFile, ensure, story};
use std::{process::Command, time::Duration};

const EVERY: Duration = Duration::from_millis(5);
const MODES: [&str; 4] = ["pre-copy", "post-copy", "hybrid", "auto"];
const WORK: &str = "whimbrel.check=48M,rate=8M whimbrel.dirty=32M,rate=8M,pattern=hot-cold";

/// One migration in this mode; the client must not notice more than a pause.
fn hop(stage: &Stage, guest: &Guest, client: &TcpClient, mode: &str, from: &str, to: &str) -> Result<Report> {
    client.forget_gap();
    let echoed = client.seen().echoed;
    let before = stage.lab.host(from).traffic()?;
    let report = stage.migrate("web", guest, from, to, &["--mode", mode])?;
    let after = stage.lab.host(from).traffic()?;
    lab::wait_for("the client's echo", Duration::from_secs(10), || {
        let seen = client.seen();
        Ok((seen.echoed > echoed + 2 && seen.echoed + 2 >= seen.sent).then_some(()))
    })?;
    let (downtime, total) = (report.number("downtime_ms")?, report.number("total_ms")?);
    eprintln!("{mode} {from} → {to}: {total:.0} ms, down {downtime:.1} ms; client: {:?}", client.seen());
    ensure!(downtime > 0.0 && downtime < total, "the times are plausible: {}", report.0);
    parts_are_the_downtime(&report, downtime)?;
    ensure!(mode == "auto" || report.mode() == mode, "it ended in {mode}: {}", report.0);
    let wire = (after.sent - before.sent + after.received - before.received) as f64;
    let said = report.number("wire_bytes")?;
    // Headers of packets, and what the agents say to each other besides.
    ensure!(said <= wire && said > 0.8 * wire, "it said {said} bytes where {wire} were counted");
    ensure!(report.number("pages.hole")? > 0.0, "what the guest never wrote was not read: {}", report.0);
    Ok(report)
}

/// Where the downtime went, on both hosts; nothing is left out.
fn parts_are_the_downtime(report: &Report, downtime: f64) -> Result<()> {
    let parts = report.0["downtime"].as_array().map_or(&[][..], Vec::as_slice);
    let sum: f64 = parts.iter().filter_map(|part| part["ms"].as_f64()).sum();
    ensure!((sum - downtime).abs() < 1e-3, "{sum} ms of {downtime}: {parts:?}");
    for (name, side) in [
        ("stop", "source"),
        ("drain", "source"),
        ("last-scan", "source"),
        ("check", "source"),
        ("save", "source"),
        ("freeze", "source"),
        ("read-state", "source"),
        ("send-state", "both"),
        ("load", "target"),
        ("hold", "source"),
        ("fence", "source"),
        ("authorize", "both"),
        ("claim", "target"),
        ("resume", "target"),
        ("announce", "target"),
    ] {
        let named = |part: &&serde_json::Value| part["part"] == name && part["side"] == side;
        let part = parts.iter().find(named);
        ensure!(part.is_some(), "no {name} on the {side}: {parts:?}");
    }
    Ok(())
}

fn every_mode(machine: &str) {
    story(&format!("{machine}, there and back"), &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let vm = VmFile {
            machine: machine.to_owned(),
            memory: "512MiB".to_owned(),
            vcpus: 2,
            ..VmFile::new("web", Spec::new(21, WORK))
        };
        let guest = stage.run("a", &vm)?;
        let client = guest.echo(EVERY)?;
        for (mode, (from, to)) in MODES.iter().zip([("a", "b"), ("b", "a")].into_iter().cycle()) {
            hop(&stage, &guest, &client, mode, from, to)?;
        }
        client.finish(Duration::from_secs(10))?;
        stage.agent("a").cli().json(&["stop", "web"])?;
        ensure!(stage.show("a", "web")?.is_none(), "a stopped VM is forgotten");
        Ok(())
    });
}

#[test]
fn a_q35_goes_there_and_back_and_keeps_its_client() {
    every_mode("q35");
}

#[test]
fn a_microvm_goes_there_and_back_and_keeps_its_client() {
    every_mode("microvm");
}

#[test]
fn a_vm_goes_round_three_hosts_while_agents_come_and_go() {
    story("A → B → C → A", &["a", "b", "c"], |lab, tools| {
        let mut stage = Stage::new(lab, tools)?;
        let disk = lab.dir().join("web.qcow2");
        lab::run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("64M"))?;
        let work = format!("{WORK} whimbrel.disk=vda,set=16M");
        let disks = vec![(disk.clone(), "qcow2".to_owned())];
        let guest = stage.run("a", &VmFile { disks, ..VmFile::new("web", Spec::new(22, work)) })?;
        let client = guest.echo(EVERY)?;
        hop(&stage, &guest, &client, "pre-copy", "a", "b")?;
        // What another QEMU would do first with the image is to lock it (I6).
        let opened = lab::run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write 0 512"]).arg(&disk));
        let why = opened.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(why.contains("lock"), "the disk is the new QEMU's alone: {why}");

        // The agents of both ends are gone: by SIGTERM and by a crash. The VM does not care, and is found
        // again.
        stage.agent_mut("a").end()?;
        stage.agent_mut("b").crash()?;
        guest.runs()?;
        stage.agent_mut("a").begin()?;
        stage.agent_mut("b").begin()?;
        stage.runs_only_on("web", "b")?;

        hop(&stage, &guest, &client, "post-copy", "b", "c")?;
        hop(&stage, &guest, &client, "hybrid", "c", "a")?;
        client.finish(Duration::from_secs(10))?;
        let vm = stage.show("a", "web")?.unwrap_or_default();
        ensure!(vm["epoch"].as_u64() >= Some(3), "each change of hands was counted: {vm}");
        Ok(())
    });
}

#[test]
fn two_vms_cross_each_other() {
    story("two migrations at once", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let here = stage.run("a", &VmFile::new("one", Spec::new(23, WORK)))?;
        let there = stage.run("b", &VmFile::new("two", Spec::new(24, WORK)))?;
        let first = stage.start_migration("one", "a", "b", &["--mode", "pre-copy", "--verify"])?;
        let second = stage.start_migration("two", "b", "a", &["--mode", "post-copy", "--verify"])?;
        ensure!(first.completed()?.verified() == Some(true), "the first was compared");
        ensure!(second.completed()?.verified() == Some(true), "the second was compared");
        stage.check_moved("one", &here, "a", "b")?;
        stage.check_moved("two", &there, "b", "a")
    });
}
