//! Guests that are reset: after they were moved, while they are moved, and moved while they boot. Whoever was
//! moved without its firmware is dead at its next reboot.

use lab::{Error, Guest, HandStart, Host, Qmp, Result, Spec, Stage, VmFile, ensure, story, wait_for};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

const WORK: &str = "whimbrel.check=16M,rate=4M";

/// Resets the guest behind a monitor; it has begun to boot when this returns.
fn reset(socket: &Path) -> Result<()> {
    let mut qmp = Qmp::connect(socket)?;
    qmp.execute("system_reset", json!({}))?;
    qmp.event("its reset", |event| Ok(event["event"] == "RESET")).map(drop)
}

/// The monitor of the only QEMU that a host's agent has started.
fn monitor(host: &Host) -> Result<PathBuf> {
    wait_for("a monitor", Duration::from_secs(10), || {
        let entries = std::fs::read_dir(host.dir.join("run")).into_iter().flatten().flatten();
        let mut sockets =
            entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "qmp"));
        Ok(sockets.next().filter(|_| sockets.next().is_none()))
    })
}

/// It boots to its end and is right.
fn boots(stage: &Stage, spec: &Spec) -> Result<()> {
    let guest = Guest::reach(&stage.client, spec)?;
    guest.runs()?;
    guest.verify().map(drop)
}

/// Nothing that happened to it was noted as lost.
fn ensure_quiet(report: &Value) -> Result<()> {
    let left = report["left_behind"].as_array().cloned().unwrap_or_default();
    ensure!(
        !left.iter().any(|note| note.to_string().contains("firmware")),
        "its firmware is not lost: {left:?}"
    );
    Ok(())
}

#[test]
fn i9_a_q35_reboots_after_and_during_every_mode() {
    story("a q35 that reboots", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let spec = Spec::new(61, WORK);
        let second = lab.dir().join("second.qmp");
        let extra = vec!["-qmp".to_owned(), format!("unix:{},server=on,wait=off", second.display())];
        let (_, _machine) =
            stage.adopt("a", "web", HandStart { vga: true, extra, ..HandStart::new(spec.clone()) })?;
        // Reset while it is moved.
        let mut moving =
            stage.start_migration("web", "a", "b", &["--mode", "pre-copy", "--bandwidth", "160Mbit"])?;
        moving.until_moving("pre-copy")?;
        reset(&second)?;
        ensure_quiet(&moving.completed()?.0)?;
        boots(&stage, &spec)?;
        // Reset after it was moved, and moved at once.
        for (mode, from, to) in [("post-copy", "b", "a"), ("hybrid", "a", "b"), ("pre-copy", "b", "a")] {
            reset(&monitor(lab.host(from))?)?;
            let report = stage.start_migration("web", from, to, &["--mode", mode])?.completed()?;
            ensure_quiet(&report.0)?;
            boots(&stage, &spec).map_err(|error| Error::new(format!("{mode}: {}", error.what), error.why))?;
        }
        reset(&monitor(lab.host("a"))?)?;
        boots(&stage, &spec)
    });
}

#[test]
fn i9_a_microvm_reboots_after_it_was_moved() {
    story("a microvm that reboots", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let spec = Spec::new(62, WORK);
        let vm = VmFile { machine: "microvm".to_owned(), ..VmFile::new("web", spec.clone()) };
        stage.run("a", &vm)?;
        for (mode, from, to) in [("pre-copy", "a", "b"), ("post-copy", "b", "a")] {
            let report = stage.start_migration("web", from, to, &["--mode", mode])?.completed()?;
            ensure_quiet(&report.0)?;
            reset(&monitor(lab.host(to))?)?;
            boots(&stage, &spec).map_err(|error| Error::new(format!("{mode}: {}", error.what), error.why))?;
        }
        Ok(())
    });
}

#[test]
fn i9_a_pc_that_moved_to_qemu_10_reboots() {
    story("a pc that moves to QEMU 10 and reboots", &["a", "b"], |lab, tools| {
        let Some(qemu_10) = &tools.qemu_10 else {
            let why = "WHIMBREL_QEMU_10 must name a QEMU 10 (tests/qemu-10.sh unpacks one)";
            lab::skip("a pc that moves to QEMU 10 and reboots", &why);
            return Ok(());
        };
        let newer = |host: &Host| match host.name.as_str() {
            "b" => lab::Oddity { lines: format!("qemu = {qemu_10:?}"), ..Default::default() },
            _ => Default::default(),
        };
        let stage = Stage::with(lab, tools, newer)?;
        let spec = Spec::new(63, WORK);
        let start =
            HandStart { machine: "pc-i440fx-7.2".to_owned(), vga: true, ..HandStart::new(spec.clone()) };
        let (_, _machine) = stage.adopt("a", "web", start)?;
        stage.start_migration("web", "a", "b", &["--mode", "pre-copy"])?.completed()?;
        reset(&monitor(lab.host("b"))?)?;
        boots(&stage, &spec)
    });
}
