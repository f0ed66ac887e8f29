//! Disks whose storage is slow: QEMU waits for them when it stops the guest, and that is the guest's pause.

use lab::{Doing, HandStart, LateDisk, Report, Result, Spec, Stage, ensure, story};
use serde_json::Value;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);

/// What a write takes.
const LATE: Duration = Duration::from_millis(400);

/// Its disk is written all the time, one record after the other.
const BUSY: &str = "whimbrel.check=8M,rate=1M whimbrel.disk=vda,set=1M,direct=on,rate=max";

fn number_of(value: &Value, name: &str) -> Result<f64> {
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
        for (guest_number, name, thread) in rows {
            disk.takes_no_time();
            let drive = format!("file={},format=raw,if=none,id=d", disk.path().display());
            let device = format!("virtio-blk-pci,drive=d{thread}");
            let extra = ["-object", "iothread,id=io0", "-drive", &drive, "-device", &device];
            let extra = extra.map(str::to_owned).to_vec();
            let start = HandStart { extra, ..HandStart::new(Spec::new(guest_number, BUSY)) };
            let (guest, _machine) = stage.adopt("a", name, start)?;
            disk.takes(LATE, SOON)?;

            let cli = stage.agent("a").cli();
            let plan = cli.json(&["plan", name, "--to", "b"])?;
            let (drain, busy) = (number_of(&plan, "drain_ms")?, number_of(&plan, "disks_busy_percent")?);
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

/// What migrations of a guest with this work say, one for each of these modes, whose disk takes so long for a
/// write.
fn moved(name: &str, number: u8, work: &str, latency: Duration, modes: &[&str]) -> Vec<Report> {
    let mut reports = Vec::new();
    story(name, &["a", "b"], |lab, tools| {
        let disk = LateDisk::mount(&lab.dir().join("late"), 16 << 20)?;
        let stage = Stage::new(lab, tools)?;
        let start = HandStart::new(Spec::new(number, work)).disk(disk.path(), "");
        let (guest, _machine) = stage.adopt("a", name, start)?;
        disk.takes(latency, SOON)?;
        for (mode, (from, to)) in modes.iter().zip([("a", "b"), ("b", "a")].into_iter().cycle()) {
            reports.push(stage.start_migration(name, from, to, &["--mode", mode])?.completed()?);
            stage.check_moved(name, &guest, from, to)?;
        }
        Ok(())
    });
    reports
}

/// In milliseconds, sorted.
fn all<'a>(reports: impl IntoIterator<Item = &'a Report>, name: &str) -> Vec<f64> {
    let mut all: Vec<f64> = reports.into_iter().map(|report| report.number(name).unwrap()).collect();
    all.sort_by(f64::total_cmp);
    all
}

#[test]
fn a_guest_is_stopped_between_requests_to_a_slow_disk() {
    // A write begins 150 ms after the end of the last one. A migration by post-copy alone waits for no
    // moment.
    let latency = Duration::from_millis(800);
    let work = "whimbrel.check=8M,rate=1M whimbrel.disk=vda,set=1M,direct=on,rate=4p";
    let reports = moved("gaps", 76, work, latency, &["pre-copy", "post-copy"].repeat(7));
    if reports.is_empty() {
        return;
    }
    let (chosen, any) = (|| reports.iter().step_by(2), || reports.iter().skip(1).step_by(2));
    let (chosen_drains, any_drains) = (all(chosen(), "drain_ms"), all(any(), "drain_ms"));
    let waited = all(chosen(), "waited_for_disks_ms");
    eprintln!(
        "a write takes 800 ms; chosen {chosen_drains:.1?} ms after {waited:.0?} ms, any {any_drains:.0?} ms"
    );
    assert!(chosen_drains[4] < 80.0, "five of seven: {chosen_drains:?}");
    assert!(waited.iter().all(|ms| *ms < 6000.0), "{waited:?}");
}

#[test]
fn a_disk_that_is_always_busy_holds_no_migration_up() {
    let reports = moved("busy", 77, BUSY, LATE, &["pre-copy"; 5]);
    if reports.is_empty() {
        return;
    }
    let (drains, waited) = (all(&reports, "drain_ms"), all(&reports, "waited_for_disks_ms"));
    eprintln!("a write takes 400 ms; drains {drains:.1?} ms, waited {waited:.0?} ms");
    // Five times as long as a request takes, and what looks take.
    assert!(waited.iter().all(|ms| *ms < 4000.0), "{waited:?}");
    assert!(drains.iter().all(|ms| *ms < 2000.0), "{drains:?}");
}
