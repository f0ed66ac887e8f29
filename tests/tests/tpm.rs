//! A TPM (swtpm) goes with its VM: what the guest reads of it, and what outlives a power cycle.

use lab::{
    Doing, Guest, HandStart, HandStarted, Host, Process, Result, Spec, Stage, Tools, ensure, story, wait_for,
};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

const SOON: Duration = Duration::from_secs(20);

/// What a swtpm keeps of a TPM 2.0 over a power cycle.
const KEPT: &str = "tpm2-00.permall";

/// A launcher's swtpm, and a VM with it.
fn start(
    stage: &Stage,
    tools: &Tools,
    host: &Host,
    number: u8,
    model: &str,
) -> Result<(Guest, HandStarted, Process, PathBuf)> {
    let dir = host.dir.join(format!("tpm-{model}"));
    fs::create_dir(&dir).doing("make a directory")?;
    let socket = dir.join("sock");
    let mut command = host.namespace.command("swtpm");
    command.args(["socket", "--tpm2", "--tpmstate"]).arg(format!("dir={}", dir.display()));
    command.arg("--ctrl").arg(format!("type=unixio,path={}", socket.display()));
    let mut swtpm = host.spawn(&format!("swtpm-{model}"), &mut command)?;
    wait_for("a TPM", SOON, || {
        swtpm.must_live()?;
        Ok(socket.exists().then_some(()))
    })?;
    let words = [
        "-chardev".to_owned(),
        format!("socket,id=chrtpm,path={}", socket.display()),
        "-tpmdev".to_owned(),
        "emulator,id=tpm0,chardev=chrtpm".to_owned(),
        "-device".to_owned(),
        format!("{model},tpmdev=tpm0"),
    ];
    let work = "whimbrel.check=16M,rate=4M";
    let start = HandStart { extra: words.to_vec(), ..HandStart::new(Spec::new(number, work)) };
    let spec = start.guest.clone();
    let machine = start.start(host, tools)?;
    let guest = Guest::reach(&stage.client, &spec)?;
    stage.agent(&host.name).cli().json(&[
        "adopt",
        model,
        "--qmp",
        &machine.qmp_socket().to_string_lossy(),
    ])?;
    Ok((guest, machine, swtpm, dir))
}

/// The states of TPMs that an agent's directory holds.
fn states(host: &Host) -> Result<Vec<PathBuf>> {
    let folder = host.dir.join("state/tpm");
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).doing("read a directory")?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

fn kept(folder: &Path) -> Result<Vec<u8>> {
    fs::read(folder.join(KEPT)).doing(format!("read the state in {}", folder.display()))
}

/// swtpms of this host's network namespace that are at work.
fn at_work(host: &Host) -> Result<usize> {
    let pids = lab::run(std::process::Command::new("ip").args(["netns", "pids", host.namespace.name()]))?;
    let is_tpm =
        |pid: &&str| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "swtpm");
    Ok(pids.lines().filter(is_tpm).count())
}

fn asked(guest: &Guest) -> Result<String> {
    let pcrs = guest.ask("pcrs")?;
    ensure!(
        pcrs.split(' ').count() == 24 && pcrs.contains(|c: char| !matches!(c, '0' | 'F' | ' ')),
        "PCRs: {pcrs}"
    );
    Ok(pcrs)
}

#[test]
fn i9_a_tpm_goes_with_its_vm_and_is_at_one_place_only() {
    story("a TPM", &["a", "b"], |lab, tools| {
        let mut stage = Stage::new(lab, tools)?;
        let (a, b) = (lab.host("a").clone(), lab.host("b").clone());
        let (guest, _machine, mut swtpm, dir) = start(&stage, tools, &a, 111, "tpm-tis")?;
        let (before, state) = (asked(&guest)?, kept(&dir)?);

        // It stays, and so does its TPM.
        let slow = ["--mode", "pre-copy", "--bandwidth", "8Mbit"];
        let mut cancelled = stage.start_migration("tpm-tis", "a", "b", &slow)?;
        cancelled.until_moving("pre-copy")?;
        cancelled.interrupt()?;
        cancelled.ended("cancelled", 130)?;
        ensure!(asked(&guest)? == before, "the TPM is as it was");
        wait_for("nothing of it at b", SOON, || {
            Ok((states(&b)?.is_empty() && at_work(&b)? == 0).then_some(()))
        })?;

        stage.migrate("tpm-tis", &guest, "a", "b", &["--mode", "post-copy"])?;
        ensure!(asked(&guest)? == before, "the TPM is what it was");
        let there = states(&b)?;
        ensure!(
            there.len() == 1 && kept(&there[0])? == state,
            "what outlives a power cycle is there: {there:?}"
        );
        ensure!(kept(&dir)? == state, "the launcher's is left as it was");
        // Its agent is not what it lives by.
        stage.agent_mut("b").crash()?;
        stage.agent_mut("b").begin()?;
        ensure!(asked(&guest)? == before && at_work(&b)? == 1, "it lives on");

        stage.migrate("tpm-tis", &guest, "b", "a", &["--mode", "pre-copy"])?;
        ensure!(asked(&guest)? == before, "the TPM is what it was");
        wait_for("nothing of it at b", SOON, || {
            Ok((states(&b)?.is_empty() && at_work(&b)? == 0).then_some(()))
        })?;
        drop(swtpm.kill());
        ensure!(at_work(&a)? == 1, "its own and no other");
        // Who starts it anew needs its state.
        stage.agent("a").cli().json(&["stop", "tpm-tis"])?;
        wait_for("its TPM to end", SOON, || Ok((at_work(&a)? == 0).then_some(())))?;
        ensure!(kept(&a.dir.join("state/tpm/tpm-tis"))? == state, "its state is kept");

        let (guest, _machine, _swtpm, _) = start(&stage, tools, &a, 112, "tpm-crb")?;
        let before = asked(&guest)?;
        stage.migrate("tpm-crb", &guest, "a", "b", &["--mode", "hybrid"])?;
        ensure!(asked(&guest)? == before, "the TPM is what it was");
        Ok(())
    });
}
