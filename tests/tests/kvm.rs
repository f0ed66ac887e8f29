//! Guests without an operating system, which run under KVM wherever that answers: moved there and back in
//! every mode.

use lab::{Doing, HugePages, Lab, Oddity, Qmp, Result, Stage, Tools, bare, bare::Ram, ensure, story};
use std::{path::Path, sync::Mutex};
use units::Locked;

/// Four vCPUs that never rest are enough for a machine with two processors: one guest after the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// As much as the guest has.
const HUGE: u64 = 64 << 20;

/// There and back in every mode. The last one is slowed: what it writes in a second takes longer to send.
const MOVES: [&[&str]; 4] = [
    &["--mode", "pre-copy"],
    &["--mode", "post-copy"],
    &["--mode", "hybrid"],
    &["--mode", "pre-copy", "--bandwidth", "40Mbit"],
];

/// A connection to the monitor that whimbrel uses too, while it does not.
fn monitor(stage: &Stage, host: &str, vm: &str) -> Result<Qmp> {
    let shown = stage.show(host, vm)?.doing(format!("find {vm} on {host}"))?;
    Qmp::connect(Path::new(shown["qmp"].as_str().doing("find its monitor")?))
}

/// Moves one there and back so often; resets it on its way if that is said.
fn there_and_back(stage: &Stage, vm: &bare::Bare, name: &str, moves: usize, reset: bool) -> Result<()> {
    let dir = stage.lab.dir().join(name);
    std::fs::create_dir_all(&dir).doing("make a directory")?;
    let disk = bare::make_disk(&dir)?;
    let guest = vm.guest();
    let (_process, socket) = vm.start(stage.lab.host("a"), name, &disk)?;
    stage.agent("a").cli().json(&["adopt", name, "--qmp", &socket.to_string_lossy()])?;
    let hosts = ["a", "b"];
    let mut clocks = [0, 0];
    for (n, options) in MOVES.into_iter().cycle().take(moves).enumerate() {
        let (from, to) = (hosts[n % 2], hosts[(n + 1) % 2]);
        let options = [options, &["--verify"]].concat();
        let report = stage.start_migration(name, from, to, &options)?.completed()?;
        ensure!(report.verified() == Some(true), "memory was compared: {}", report.0);
        let mut qmp = monitor(stage, to, name)?;
        guest.goes_on(&mut qmp)?;
        let words = guest.words(&mut qmp)?;
        let first = words[0].doing("find the first vCPU's words")?;
        ensure!(first.blocks > 0, "it reads its disk: {first:?}");
        clocks = [clocks[1], first.clock];
        ensure!(clocks[0] <= clocks[1], "its clock goes on: {clocks:?}");
        // A guest that was moved can be reset.
        if n == 1 && reset {
            qmp.execute("system_reset", serde_json::json!({}))?;
            guest.works(&mut qmp, 2)?;
            clocks = [0, 0];
        }
    }
    let ends_on = hosts[moves % 2];
    stage.runs_only_on(name, ends_on)?;
    monitor(stage, ends_on, name)?.execute("quit", serde_json::json!({}))?;
    Ok(())
}

/// All of them under one accelerator. One of both hosts hears of each write, so that both trackers are at
/// work.
fn all(lab: &Lab, tools: &Tools, accel: &'static str, moves: usize) -> Result<()> {
    let _turn = ONE_AT_A_TIME.locked();
    let synchronous = Oddity { lines: "tracker = \"synchronous\"".to_owned(), ..Oddity::default() };
    let stage = Stage::with(lab, tools, |host| match host.name.as_str() {
        "b" => synchronous.clone(),
        _ => Oddity::default(),
    })?;
    let guests = [
        ("one", bare::Bare { accel, vcpus: 1, ram: Ram::Private, machine: "q35" }),
        ("two", bare::Bare { accel, vcpus: 2, ram: Ram::Memfd, machine: "q35" }),
        ("four", bare::Bare { accel, vcpus: 4, ram: Ram::Memfd, machine: "pc" }),
        ("huge", bare::Bare { accel, vcpus: 1, ram: Ram::Huge, machine: "q35" }),
    ];
    for (name, guest) in &guests {
        // What it moves to has plain pages. (Without KVM it is among those of `tests/field`.)
        let huge = if guest.ram == Ram::Huge && accel == "kvm" { HugePages::reserve(HUGE)? } else { None };
        if guest.ram == Ram::Huge && huge.is_none() {
            continue;
        }
        let moves = if guest.vcpus == 4 || huge.is_some() { moves / 2 } else { moves };
        there_and_back(&stage, guest, name, moves, guest.vcpus == 2)?;
    }
    Ok(())
}

#[test]
fn i2_what_a_bare_guest_writes_arrives() {
    story("bare guests", &["a", "b"], |lab, tools| all(lab, tools, "tcg", MOVES.len()));
}

#[test]
fn i2_what_a_bare_guest_writes_under_kvm_arrives() {
    if !bare::kvm_answers() {
        let why = "there is no /dev/kvm: bare guests ran in software emulation alone";
        return lab::skip("bare guests under KVM", &why);
    }
    story("bare guests under KVM", &["a", "b"], |lab, tools| all(lab, tools, "kvm", MOVES.len()));
}

/// Ten minutes where KVM interprets.
#[test]
#[ignore = "long: cargo test --release -p lab --test kvm -- --ignored"]
fn i2_a_hundred_moves_of_bare_guests_under_kvm() {
    assert!(bare::kvm_answers(), "no /dev/kvm here");
    story("a hundred moves under KVM", &["a", "b"], |lab, tools| all(lab, tools, "kvm", 40));
}
