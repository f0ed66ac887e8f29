//! A VM goes to another QEMU of its host, and something gets in the way: one of both ends, refuses, or is let
//! go by somebody; or the agent dies. Both map the same memory, so at most one may ever run the guest (I1).

use lab::{Doing, Guest, HandStart, Lab, Oddity, Qmp, Result, Spec, Stage, VmFile, ensure, story, wait_for};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

const WORK: &str = "whimbrel.check=32M,rate=8M whimbrel.dirty=16M,rate=4M memhp_default_state=online_movable";
const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(30);

/// The QEMUs of a host that live.
fn qemus(lab: &Lab, host: &str) -> Vec<u32> {
    let dir = lab.host(host).dir.display().to_string();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_one = |pid: &u32| {
        // Of a process that was killed nothing is left to read.
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        let program = line.split('\0').next().unwrap_or_default();
        program.contains("qemu-system") && line.contains(&dir)
    };
    pids.filter(is_one).collect()
}

fn shown(stage: &Stage<'_>, vm: &str) -> Result<(u32, PathBuf)> {
    let shown = stage.show("a", vm)?.doing("find the VM")?;
    let pid = shown["pid"].as_u64().doing("find its QEMU")?;
    let qmp = shown["qmp"].as_str().doing("find its monitor")?;
    Ok((pid as u32, qmp.into()))
}

/// Somebody lets a QEMU go on, and has its guest run.
fn somebody_continues(pid: u32, qmp: &Path) {
    let Some(pid) = rustix::process::Pid::from_raw(pid.cast_signed()) else { return };
    if rustix::process::kill_process(pid, rustix::process::Signal::CONT).is_ok()
        && let Ok(mut qmp) = Qmp::connect(qmp)
    {
        // It may refuse, or be gone by then.
        drop(qmp.execute("cont", json!({})));
    }
}

/// One QEMU is left, which is the one that is shown, and its guest is well.
fn one_is_left(lab: &Lab, stage: &Stage<'_>, vm: &str, guest: &Guest) -> Result<()> {
    stage.runs_only_on(vm, "a")?;
    let mut seen = Vec::new();
    let left = wait_for("one QEMU that is left", SOON, || {
        seen = qemus(lab, "a");
        Ok((seen == [shown(stage, vm)?.0]).then_some(()))
    });
    left.map_err(|error| lab::Error::new(error.what, format!("{}; {seen:?}", error.why)))?;
    guest.runs()?;
    guest.verify().map(drop)
}

/// A program that runs QEMU so that it reads no device state as others write it.
fn refusing(dir: &Path) -> Result<PathBuf> {
    let bin = dir.join("odd/bin");
    fs::create_dir_all(&bin).doing("make a directory")?;
    let program = bin.join("qemu");
    let text = "#!/bin/sh\nexec qemu-system-x86_64 \"$@\" -global migration.send-section-footer=off\n";
    fs::write(&program, text).doing("write a program")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).doing("make it one")?;
    Ok(program)
}

#[test]
fn i1_i3_whoever_dies_one_qemu_of_two_runs_the_guest() {
    story("one QEMU of two", &["a"], |lab, tools| {
        let mut stage = Stage::new(lab, tools)?;
        let extra = format!(
            "-m size={}B,slots=2,maxmem=2G -object memory-backend-memfd,id=m0,size={}B,share=on \
             -device pc-dimm,id=dimm0,memdev=m0",
            256 * MIB,
            128 * MIB,
        );
        let extra = extra.split_whitespace().map(str::to_owned).collect();
        let start = HandStart { extra, vcpus: 2, ..HandStart::new(Spec::new(152, WORK)) };
        let (guest, _machine) = stage.adopt("a", "vm", start)?;
        let client = guest.echo(Duration::from_millis(5))?;
        let (first, verify) = (shown(&stage, "vm")?, &["--verify"][..]);

        // Both of its blocks.
        let report = stage.start_migration("vm", "a", "self", verify)?.completed()?;
        ensure!(report.0["handed_over"] == 384 * MIB, "{}", report.0);
        ensure!(report.0["guest_bytes"] == 384 * MIB, "{}", report.0);
        let name = lab.host("a").dir.join("run/vm:console.sock");
        let console = || fs::read_link(&name).doing("follow the console's name");
        let second = (shown(&stage, "vm")?, console()?);
        ensure!(second.0 != first && second.1.exists(), "{second:?}, before {first:?}");
        one_is_left(lab, &stage, "vm", &guest)?;

        // Another QEMU that does not take the device state.
        let refusing = refusing(lab.dir())?;
        let options = ["--qemu", &refusing.to_string_lossy()];
        let report = stage.start_migration("vm", "a", "self", &options)?.ended("failed", 1)?;
        eprintln!("{}", report.error());
        ensure!(report.vm_runs_on() == Some("a"), "{}", report.0);
        ensure!((shown(&stage, "vm")?, console()?) == second && second.1.exists(), "it stays in its QEMU");
        one_is_left(lab, &stage, "vm", &guest)?;

        // The agent dies: before the pause, in it, and about the commit.
        let event = |name: &'static str| move |event: &Value| event["event"] == name;
        let phase = |phase: &'static str| move |event: &Value| event["phase"] == phase;
        type When = Box<dyn Fn(&Value) -> bool>;
        let rows: [(When, u64, &[&str]); 6] = [
            (Box::new(phase("preflight")), 0, verify),
            (Box::new(phase("pre-copy")), 0, verify),
            (Box::new(phase("switchover")), 0, verify),
            (Box::new(phase("switchover")), 20, &[]),
            (Box::new(phase("switchover")), 40, &[]),
            (Box::new(event("downtime")), 0, &[]),
        ];
        for (n, (when, after_ms, options)) in rows.into_iter().enumerate() {
            let before = shown(&stage, "vm")?;
            let mut migration = stage.start_migration("vm", "a", "self", options)?;
            migration.until("the moment", when)?;
            thread::sleep(Duration::from_millis(after_ms));
            stage.agent_mut("a").crash()?;
            somebody_continues(before.0, &before.1);
            stage.agent_mut("a").begin()?;
            one_is_left(lab, &stage, "vm", &guest)?;
            let moved = shown(&stage, "vm")? != before;
            eprintln!("row {n}: it {}", if moved { "has moved" } else { "stayed" });
            ensure!(n != 5 || moved, "it had changed hands");
        }

        // Nobody.
        stage.start_migration("vm", "a", "self", &[])?.completed()?;
        one_is_left(lab, &stage, "vm", &guest)?;
        client.finish(Duration::from_secs(10))?;

        // The QEMU in which it runs ends in the pause: there is no guest any more, in neither.
        let (pid, _) = shown(&stage, "vm")?;
        let mut migration = stage.start_migration("vm", "a", "self", verify)?;
        migration.until_phase("switchover")?;
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).doing("name a process")?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).doing("kill it")?;
        let (_, report) = migration.end()?;
        let alone = || qemus(lab, "a").len() == usize::from(report.outcome() == "completed");
        wait_for("the end of the other", SOON, || Ok(alone().then_some(())))
    });
}

/// With a shared ownership record, in which a move within the host changes nothing; and between hosts then.
#[test]
fn a_vm_with_a_shared_record_goes_on_to_another_host() {
    story("another QEMU, another host", &["a", "b"], |lab, tools| {
        let shared = lab.dir().join("shared");
        fs::create_dir_all(&shared).doing("make a directory")?;
        let lines = format!("[ownership]\ndirectory = {shared:?}\n");
        let stage = Stage::with(lab, tools, |_| Oddity { lines: lines.clone(), ..Oddity::default() })?;
        let guest = stage.run("a", &VmFile::new("web", Spec::new(153, WORK)))?;
        stage.start_migration("web", "a", "self", &[])?.completed()?;
        one_is_left(lab, &stage, "web", &guest)?;

        stage.migrate("web", &guest, "a", "b", &[])?;
        stage.migrate("web", &guest, "b", "a", &["--mode", "post-copy"])?;
        stage.start_migration("web", "a", "self", &[])?.completed()?;
        one_is_left(lab, &stage, "web", &guest)?;
        let refused = stage.agent("a").cli().run(["resolve", "web", "--here", "--i-have-fenced", "self"])?;
        refused.exited(1).map(drop)
    });
}

/// The pause does not depend on the size of the memory that is handed over.
#[test]
#[ignore = "measures; by hand, on a quiet machine: cargo test --release -p lab --test two_qemus -- --ignored"]
fn figures_of_a_move_to_another_qemu() {
    const MOVES: usize = 40;
    story("figures of another QEMU", &["a"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        for (number, memory) in [(154, "1GiB"), (155, "32GiB")] {
            let name = format!("vm{number}");
            let spec = Spec::new(number, "whimbrel.check=16M,rate=1M");
            let guest = stage.run("a", &VmFile { memory: memory.into(), ..VmFile::new(&name, spec) })?;
            let (mut pauses, mut most) = (Vec::new(), 0_f64);
            let mut parts = BTreeMap::<String, Vec<f64>>::new();
            for _ in 0..MOVES {
                let report = stage.start_migration(&name, "a", "self", &[])?.completed()?;
                ensure!(report.0["handed_over"] == report.0["guest_bytes"], "{}", report.0);
                pauses.push(report.number("downtime_ms")?);
                most = most.max(report.number("wire_bytes")?);
                for part in report.0["downtime"].as_array().into_iter().flatten() {
                    let name = format!("{} {}", part["side"], part["part"]);
                    parts.entry(name).or_default().push(part["ms"].as_f64().unwrap_or_default());
                }
            }
            guest.verify()?;
            pauses.sort_by(f64::total_cmp);
            let (median, p99) = (pauses[MOVES / 2], pauses[MOVES * 99 / 100]);
            eprintln!("{memory}: pause {median:.1} ms (median), {p99:.1} ms (99 %), {most} bytes at most");
            for (name, mut took) in parts {
                took.sort_by(f64::total_cmp);
                eprintln!("  {name}: {:.2} ms", took[took.len() / 2]);
            }
            stage.agent("a").cli().json(&["stop", &name])?;
        }
        Ok(())
    });
}
