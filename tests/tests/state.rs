//! What a guest does (it runs, a person has paused it, it has powered off) is the same after a migration,
//! wherever it is then; and nobody but whimbrel sets a guest running on a host that it has left.

use lab::{HandStart, Migration, Qmp, Report, Result, Spec, Stage, ensure, story, wait_for};
use serde_json::json;
use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

const WORK: &str = "whimbrel.fill=48M,content=random whimbrel.check=16M,rate=2M";

/// Slow enough for something to happen while memory moves.
const SLOWLY: &[&str] = &["--bandwidth", "20M"];

/// Where its monitor listens on this host.
fn monitor(stage: &Stage, vm: &str, host: &str) -> Result<PathBuf> {
    let shown = stage.show(host, vm)?.unwrap_or_default();
    Ok(shown["qmp"].as_str().unwrap_or_default().into())
}

/// QEMU's and the agent's word for what it does; and it is nowhere else.
fn does(stage: &Stage, vm: &str, host: &str, other: &str, state: &str) -> Result<()> {
    wait_for(&format!("{vm} {state} on {host}"), Duration::from_secs(20), || {
        let (here, there) = (stage.show(host, vm)?, stage.show(other, vm)?);
        let right = here.is_some_and(|here| here["state"] == state) && there.is_none();
        Ok(right.then_some(()))
    })?;
    let status = Qmp::connect(&monitor(stage, vm, host)?)?.execute("query-status", json!({}))?;
    ensure!(status["status"] == state, "{vm} on {host}: {status}");
    Ok(())
}

fn start(stage: &Stage, vm: &str, from: &str, to: &str, mode: &str) -> Result<Migration> {
    stage.start_migration(vm, from, to, &[SLOWLY, &["--mode", mode]].concat())
}

fn fate(report: &Report, host: &str, state: &str) -> Result<()> {
    let right = json!({ "vm": "on", "host": host, "state": state });
    ensure!(report.0["fate"] == right, "{} is not {right}: {}", report.0["fate"], report.0);
    Ok(())
}

#[test]
fn i9_a_guest_does_after_a_migration_what_it_did_before() {
    story("run states", &["a", "b"], |lab, tools| {
        let mut stage = Stage::new(lab, tools)?;
        let second = lab.dir().join("second");
        let words = ["-qmp".to_owned(), format!("unix:{},server=on,wait=off", second.display())];
        let extra = [words.to_vec(), vec!["-no-shutdown".to_owned()]].concat();
        let (guest, machine) =
            stage.adopt("a", "vm", HandStart { extra, ..HandStart::new(Spec::new(141, WORK)) })?;
        let mut others = Qmp::connect(&second)?;

        // Paused by a person before, and cancelled.
        others.execute("stop", json!({}))?;
        let mut migration = start(&stage, "vm", "a", "b", "pre-copy")?;
        migration.until_moving("pre-copy")?;
        migration.interrupt()?;
        fate(&migration.ended("cancelled", 130)?, "a", "paused")?;
        does(&stage, "vm", "a", "b", "paused")?;

        // Paused all the way; on the source, which serves its memory, nobody can have it run (I1).
        let mut migration = start(&stage, "vm", "a", "b", "post-copy")?;
        migration.until_phase("post-copy")?;
        let asked = thread::spawn(move || others.execute("cont", json!({})));
        fate(&migration.completed()?, "b", "paused")?;
        ensure!(asked.join().expect("no panic").is_err(), "the source's QEMU has ended without an answer");
        drop(machine);
        does(&stage, "vm", "b", "a", "paused")?;
        stage.agent_mut("b").crash()?;
        stage.agent_mut("b").begin()?;
        does(&stage, "vm", "b", "a", "paused")?;
        Qmp::connect(&monitor(&stage, "vm", "b")?)?.execute("cont", json!({}))?;
        guest.runs()?;
        guest.verify()?;

        // One that runs, runs.
        let report = start(&stage, "vm", "b", "a", "post-copy")?.completed()?;
        fate(&report, "a", "running")?;
        let frozen_in = report.number("frozen_in_ms")?;
        ensure!(frozen_in < 500.0, "the source stood still after {frozen_in} ms");
        stage.check_moved("vm", &guest, "b", "a")?;

        // Powered off while its memory moves, in a QEMU that stays: nothing comes of it, and it stays powered
        // off.
        let crawl = ["--bandwidth", "1M", "--mode", "pre-copy"];
        let mut migration = stage.start_migration("vm", "a", "b", &crawl)?;
        migration.until_moving("pre-copy")?;
        guest.power_off()?;
        let ordered = Instant::now();
        let report = migration.ended("failed", 1)?;
        // Its memory would move for another minute, and the switchover would come after that.
        ensure!(ordered.elapsed() < Duration::from_secs(20), "it ended after {:?}", ordered.elapsed());
        ensure!(report.error().contains("powered off"), "it says why: {}", report.error());
        fate(&report, "a", "shutdown")?;
        let status = Qmp::connect(&monitor(&stage, "vm", "a")?)?.execute("query-status", json!({}))?;
        ensure!(status["status"] == "shutdown", "it is as it was: {status}");
        // b has to end the QEMU that waited there.
        let rid = || Ok(stage.show("b", "vm")?.is_none().then_some(()));
        wait_for("b without a trace of it", Duration::from_secs(20), rid)?;
        stage.agent("a").cli().json(&["stop", "vm"]).map(drop)
    });
}
