//! The tracker that hears of each write carries whole migrations by itself, from the first page on.

use lab::{Oddity, Spec, Stage, VmFile, ensure, story, wait_for};
use std::{fs, time::Duration};

const SOON: Duration = Duration::from_secs(20);

/// Whether one of its threads hears of writes.
fn hears(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads
        .into_iter()
        .any(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "throttle\n"))
}

#[test]
fn a_busy_guest_migrates_with_the_synchronous_tracker_alone() {
    story("synchronous", &["a", "b"], |lab, tools| {
        // One host lets groups grow and shrink, the other keeps to one size.
        let group = |host: &str| if host == "a" { "\"auto\"" } else { "8" };
        let odd = |host: &lab::Host| Oddity {
            lines: format!("tracker = \"synchronous\"\ngroup = {}", group(&host.name)),
            ..Oddity::default()
        };
        let mut stage = Stage::with(lab, tools, odd)?;
        let work = "whimbrel.check=48M,rate=8M whimbrel.dirty=32M,rate=8M,pattern=hot-cold";
        let guest = stage.run("a", &VmFile::new("web", Spec::new(94, work)))?;

        for (from, to) in [("a", "b"), ("b", "a")] {
            let options = ["--mode", "pre-copy", "--verify"];
            let migration = stage.start_migration("web", from, to, &options)?;
            let pid = stage.agent_mut(from).process()?.pid();
            wait_for("a thread that hears of writes", SOON, || Ok(hears(pid).then_some(())))?;
            let report = migration.completed()?;
            ensure!(report.verified() == Some(true), "memory was compared: {}", report.0);
            ensure!(report.0["rounds"][1]["pages"].as_u64() > Some(0), "it wrote meanwhile: {}", report.0);
            stage.check_moved("web", &guest, from, to)?;
        }

        let report = stage.migrate("web", &guest, "a", "b", &["--allow-post-copy"])?;
        // On a busy machine it may be kinder to slow its writers than to have it lack memory.
        let slowed = report.0["forecast"]["takes"] == "pre-copy";
        ensure!(slowed || report.number("throttle.stalled_ms")? == 0.0, "nobody waited: {}", report.0);
        let report = stage.migrate("web", &guest, "b", "a", &["--mode", "hybrid"])?;
        ensure!(report.0["mode"] == "hybrid", "{}", report.0);
        Ok(())
    });
}
