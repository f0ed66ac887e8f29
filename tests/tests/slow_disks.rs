//! Disks whose storage is slow: QEMU waits for them when it stops the guest, and that is the guest's pause.

use lab::{Doing, HandStart, LateDisk, Report, Result, Spec, Stage, ensure, story};
use serde_json::Value;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);

/// What a write takes.
const LATE: Duration = Duration::from_millis(400);

/// Its disk is written all the time, one record after the other.
const BUSY: &str = "whimbrel.check=8M,rate=1M whimbrel.disk=vda,set=1M,direct=on,rate=max";

fn number(value: &Value, name: &str) -> Result<f64> {
    value[name].as_f64().doing(format!("find {name} in {value}"))
}

/// The part of the pause by this name: how long it took, in milliseconds.
fn part(report: &Report, name: &str) -> f64 {
    let parts = report.0["downtime"].as_array().into_iter().flatten();
    parts.filter(|part| part["part"] == name).filter_map(|part| part["took_ms"].as_f64()).sum()
}

#[test]
fn a_plan_names_slow_disks_and_the_report_what_they_cost() {
    story("slow disks", &["a", "b"], |lab, tools| {
        // Before any agent: they see only mounts that are older than they.
        let disk = LateDisk::mount(&lab.dir().join("late"), 16 << 20)?;
        let stage = Stage::new(lab, tools)?;
        // A disk with a thread of its own is waited for before QEMU says that the guest is stopped.
        let rows = [(74, "plain", ""), (75, "threaded", ",iothread=io0")];
        for (number_of, name, thread) in rows {
            disk.takes_no_time();
            let drive = format!("file={},format=raw,if=none,id=d", disk.path().display());
            let device = format!("virtio-blk-pci,drive=d{thread}");
            let extra = ["-object", "iothread,id=io0", "-drive", &drive, "-device", &device];
            let extra = extra.map(str::to_owned).to_vec();
            let start = HandStart { extra, ..HandStart::new(Spec::new(number_of, BUSY)) };
            let (guest, _machine) = stage.adopt("a", name, start)?;
            disk.takes(LATE, SOON)?;

            let cli = stage.agent("a").cli();
            let plan = cli.json(&["plan", name, "--to", "b"])?;
            let (drain, busy) = (number(&plan, "drain_ms")?, number(&plan, "disks_busy_percent")?);
            ensure!((380.0..900.0).contains(&drain) && busy > 80.0, "{drain} ms, {busy} %: {plan}");
            let violated = plan["violated"][0].as_str().unwrap_or_default();
            ensure!(violated.starts_with("--max-downtime 20.0 ms: stopping the guest waits about"), "{plan}");
            let allowed = ["plan", name, "--to", "b", "--max-downtime", "3s"];
            let violated = &cli.json(&allowed)?["violated"];
            ensure!(violated.as_array().is_some_and(Vec::is_empty), "{violated}");
            cli.run(allowed)?.succeeded()?.says(&["A stop waits about", "for its disks"])?;

            let mut migration = stage.start_migration(name, "a", "b", &[])?;
            migration.until_note("violated: --max-downtime 20.0 ms: stopping the guest waits about")?;
            let report = migration.completed()?;
            stage.check_moved(name, &guest, "a", "b")?;
            let (drain, stop) = (report.number("drain_ms")?, part(&report, "stop"));
            eprintln!("{name}: drain {drain:.1} ms of {:.1} ms", report.number("downtime_ms")?);
            ensure!((drain - part(&report, "drain")).abs() < 0.1, "one number: {}", report.0);
            ensure!(
                drain < 1.5 * LATE.as_secs_f64() * 1e3 && stop < 50.0,
                "{drain} and {stop}: {}",
                report.0
            );
            stage.agent("b").cli().json(&["stop", name])?;
        }
        Ok(())
    });
}
