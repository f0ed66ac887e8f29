//! The agent as a process: it hears a person however large the guest is, and a guest never waits for one that is frozen or dead.

use lab::{Doing, Lab, Oddity, Result, Stage, Tools, ensure, story};
use std::{
    fs,
    time::{Duration, Instant},
};

/// Both hosts hand out more memory than they have.
const OVERCOMMIT: &str = "1000";

/// However large, a guest that has touched next to nothing is moved within this. 3 s on a quiet machine.
const SOON: Duration = Duration::from_secs(45);

/// A person who cancels waits no longer. One look at 256 GiB takes 0.3 to 0.6 s.
const HEARD: Duration = Duration::from_secs(8);

/// A VM that never gets beyond its firmware.
fn start_sparse(stage: &Stage, name: &str, gib: u64) -> Result<()> {
    let path = stage.lab.dir().join(format!("{name}.toml"));
    let text =
        format!("name = {name:?}\nvcpus = 1\nmemory = \"{gib}GiB\"\nmachine = \"q35\"\naccel = \"tcg\"\n");
    fs::write(&path, text).doing("write a VM file")?;
    stage.agent("a").cli().json(&["run", &path.to_string_lossy()]).map(drop)
}

fn overcommitting<'a>(lab: &'a Lab, tools: &'a Tools) -> Result<Stage<'a>> {
    Stage::with(lab, tools, |_| {
        let lines = format!("[memory]\novercommit = {OVERCOMMIT}");
        Oddity { lines, ..Oddity::default() }
    })
}

#[test]
fn a_sparse_guest_of_256_gib_moves_and_is_cancelled() {
    story("a large sparse guest", &["a", "b"], |lab, tools| {
        let stage = overcommitting(lab, tools)?;
        let gib = std::env::var("WHIMBREL_GIB").ok().and_then(|gib| gib.parse().ok()).unwrap_or(256);
        start_sparse(&stage, "big", gib)?;
        let cli = stage.agent("a").cli();
        for phase in ["preflight", "pre-copy"] {
            let mut migration =
                stage.start_migration("big", "a", "b", &["--mode", "pre-copy", "--bandwidth", "64KiB/s"])?;
            migration.until_phase(phase)?;
            let asked = Instant::now();
            cli.run(["cancel", "big"])?.succeeded()?;
            migration.ended("cancelled", 130)?;
            eprintln!("{gib} GiB, cancelled in {phase}: {:?}", asked.elapsed());
            ensure!(asked.elapsed() < HEARD, "in {phase}: {:?}", asked.elapsed());
            stage.runs_only_on("big", "a")?;
        }
        for (from, to, mode) in [("a", "b", "pre-copy"), ("b", "a", "post-copy")] {
            let began = Instant::now();
            let report =
                stage.start_migration("big", from, to, &["--mode", mode, "--verify"])?.completed()?;
            let (pause, total) = (report.number("downtime_ms")?, report.number("total_ms")?);
            eprintln!("{gib} GiB by {mode}: {total} ms, pause {pause} ms, {:?} in all", began.elapsed());
            ensure!(began.elapsed() < SOON, "{gib} GiB by {mode}: {}", report.0);
            ensure!(report.verified() == Some(true), "{}", report.0);
            stage.runs_only_on("big", to)?;
        }
        stage.agent("a").cli().run(["stop", "big"])?.succeeded()?;
        Ok(())
    });
}
