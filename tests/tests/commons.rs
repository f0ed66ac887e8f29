//! What a host keeps of a VM that has left, for when it comes back.

use lab::{Guest, Lab, Oddity, Report, Result, Spec, Stage, Tools, VmFile, ensure, story};

const MODES: [&str; 3] = ["pre-copy", "hybrid", "post-copy"];
/// Idle, with memory that cannot be compressed, and a little that the guest watches over.
const WORK: &str = "whimbrel.fill=128M,content=random whimbrel.check=2M,rate=256K";

/// Only `a` keeps what leaves it.
fn stage<'a>(lab: &'a Lab, tools: &'a Tools) -> Result<Stage<'a>> {
    Stage::with(lab, tools, |host| {
        let lines = if host.name == "a" { "commons.keep = \"50%\"" } else { "" };
        Oddity { lines: lines.to_owned(), ..Oddity::default() }
    })
}

fn run(stage: &Stage, on: &str, number: u8) -> Result<Guest> {
    stage.run(on, &VmFile { memory: "384MiB".to_owned(), ..VmFile::new("web", Spec::new(number, WORK)) })
}

fn hop(stage: &Stage, guest: &Guest, mode: &str, from: &str, to: &str) -> Result<(f64, f64)> {
    // With a limit, nobody probes a link that is new to it.
    let report: Report = stage.migrate("web", guest, from, to, &["--mode", mode, "--bandwidth", "4Gbit"])?;
    let (kept, wire) = (report.number("pages.kept")?, report.number("wire_bytes")?);
    let (total, downtime) = (report.number("total_ms")?, report.number("downtime_ms")?);
    eprintln!(
        "{mode} {from} → {to}: {wire} bytes, {total:.0} ms, down {downtime:.1} ms, {}",
        report.0["pages"]
    );
    // What is found there says nothing of the link: nobody is slowed for it, and no round is in vain.
    let rounds = report.0["rounds"].as_array().map_or(0, Vec::len);
    ensure!(rounds <= 4, "{mode} {from} → {to}: {rounds} rounds of an idle guest");
    ensure!(report.0["throttle"]["throttled"] == false, "{mode} {from} → {to}: an idle guest was throttled");
    Ok((kept, wire))
}

#[test]
fn i2_i7_a_vm_that_returns_costs_what_changed() {
    story("there and back to a host that keeps", &["a", "b"], |lab, tools| {
        let stage = stage(lab, tools)?;
        let guest = run(&stage, "a", 111)?;
        let mut costly = vec![];
        for mode in MODES {
            let (kept, there) = hop(&stage, &guest, mode, "a", "b")?;
            ensure!(kept == 0.0, "{mode}: b keeps nothing");
            let (kept, back) = hop(&stage, &guest, mode, "b", "a")?;
            ensure!(kept > 30_000.0, "{mode}: only {kept} pages were kept");
            costly
                .extend((back >= there / 20.0).then(|| format!("{mode}: {there} bytes there, {back} back")));
        }
        ensure!(costly.is_empty(), "{costly:?}");
        Ok(())
    });
}

#[test]
fn what_is_kept_is_not_for_another_vm_of_that_name() {
    story("another VM of the same name", &["a", "b"], |lab, tools| {
        let stage = stage(lab, tools)?;
        let guest = run(&stage, "a", 112)?;
        hop(&stage, &guest, "pre-copy", "a", "b")?;
        stage.agent("b").cli().json(&["stop", "web"])?;
        drop(guest);
        let other = run(&stage, "b", 113)?;
        let (kept, _) = hop(&stage, &other, "pre-copy", "b", "a")?;
        ensure!(kept == 0.0, "{kept} pages of another VM were named");
        Ok(())
    });
}

#[test]
fn what_an_agent_keeps_ends_with_it() {
    story("an agent that keeps and is killed", &["a", "b"], |lab, tools| {
        let mut stage = stage(lab, tools)?;
        let guest = run(&stage, "a", 114)?;
        hop(&stage, &guest, "pre-copy", "a", "b")?;
        stage.agent_mut("a").crash()?;
        stage.agent_mut("a").begin()?;
        let (kept, _) = hop(&stage, &guest, "pre-copy", "b", "a")?;
        ensure!(kept == 0.0, "{kept} pages outlived the agent that kept them");
        Ok(())
    });
}
