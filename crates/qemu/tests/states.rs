//! The state of a guest around our `stop`: with real QEMUs, a second monitor that others use, and no guest
//! but the firmware.

mod common;

use common::{ends::Folder, hand::*};
use ports::{Machine, RunState, SaveStepKind};
use qemu::{Vm, frozen, qmp::Qmp};
use serde_json::json;
use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

/// A QEMU with a disk, adopted; and the monitor that others use.
struct Bed {
    vm: Vm,
    others: Qmp,
    disk: std::path::PathBuf,
    _hand: ByHand,
    _folder: Folder,
}

impl Bed {
    fn new(more: &[&str]) -> Self {
        let folder = Folder::new();
        let disk = folder.path().join("a.qcow2");
        let made =
            Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("1M").status();
        assert!(made.unwrap().success());
        let drive = format!("file={},if=none,id=d,format=qcow2", disk.display());
        let second = folder.path().join("second");
        let socket = format!("unix:{},server=on,wait=off", second.display());
        let more: Vec<&str> =
            [&["-drive", &drive, "-device", "virtio-blk-pci,drive=d", "-qmp", &socket], more].concat();
        let hand = ByHand::start(&with(&more));
        let vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
        let others = Qmp::connect(&second).unwrap();
        Self { vm, others, disk, _hand: hand, _folder: folder }
    }

    fn says(&mut self, command: &str) {
        self.others.execute(command, json!({})).unwrap();
    }

    fn until(&mut self, state: RunState) {
        let end = Instant::now() + Duration::from_secs(60);
        while self.vm.run_state().unwrap() != state {
            assert!(Instant::now() < end, "it is {}, not {state}", self.vm.run_state().unwrap());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Writes to an I/O port, as the guest would.
    fn port(&mut self, size: &str, port: u16, value: u16) {
        self.others.human(&format!("o {size} {port:#x} {value:#x}")).unwrap();
    }
}

/// Whether QEMU holds its lock on the image, so that its disk is its own.
fn is_locked(disk: &Path) -> bool {
    let told = Command::new("qemu-img").arg("info").arg(disk).output().unwrap();
    String::from_utf8_lossy(&told.stderr).contains("lock")
}

#[test]
fn i3_a_paused_guest_stays_paused_and_gets_its_disk_back() {
    let mut bed = Bed::new(&[]);
    bed.says("stop");
    assert_eq!(bed.vm.run_state().unwrap(), RunState::Paused);
    for hold in [false, true] {
        assert_eq!(bed.vm.stop().unwrap().before, RunState::Paused);
        bed.vm.save().unwrap();
        assert!(!is_locked(&bed.disk), "saving has inactivated it");
        assert!(frozen::is_frozen(&bed.vm.handle()).unwrap());
        if hold {
            bed.vm.hold().unwrap();
        }
        bed.vm.restore(RunState::Paused).unwrap();
        assert_eq!(bed.vm.run_state().unwrap(), RunState::Paused);
        assert!(is_locked(&bed.disk));
    }
    bed.says("cont");
    // One that runs, runs again.
    assert_eq!(bed.vm.stop().unwrap().before, RunState::Running);
    bed.vm.save().unwrap();
    bed.vm.restore(RunState::Running).unwrap();
    assert_eq!(bed.vm.run_state().unwrap(), RunState::Running);
    // Paused after we had asked what it does, before our `stop`.
    assert_eq!(bed.vm.prepare_stop().unwrap(), RunState::Running);
    bed.says("stop");
    assert_eq!(bed.vm.stop().unwrap().before, RunState::Paused);
}

#[test]
fn i3_a_saving_that_is_poised_does_not_run_after_a_change() {
    let mut bed = Bed::new(&[]);
    assert_eq!(bed.vm.begin().unwrap().reasons, Vec::<String>::new());
    for round in 0..3 {
        assert_eq!(bed.vm.stop().unwrap().before, RunState::Running);
        let object = json!({ "qom-type": "rng-builtin", "id": "r" });
        bed.others.execute("object-add", object).unwrap();
        after_its_answers(&mut bed.others);
        let why = bed.vm.save().unwrap_err().to_string();
        assert!(why.contains("object r (rng-builtin) was added"), "{round}: {why}");
        // QEMU refused the command as it was ended, and the next ones reach it.
        assert!(is_locked(&bed.disk), "its disk has not been inactivated");
        bed.vm.restore(RunState::Running).unwrap();
        assert_eq!(bed.vm.run_state().unwrap(), RunState::Running);
        bed.others.execute("object-del", json!({ "id": "r" })).unwrap();
    }
    bed.vm.stop().unwrap();
    bed.vm.save().unwrap();
    assert!(!is_locked(&bed.disk));
    bed.vm.restore(RunState::Running).unwrap();
}

#[test]
fn i3_a_guest_that_does_not_run_is_left_as_it_is_and_named() {
    // What the guest does, by the ports of a q35: its power management's, and those of the pvpanic device.
    type Act = fn(&mut Bed);
    let table: [(&[&str], Act, RunState, &str); 3] = [
        (&["-no-shutdown"], |bed| bed.port("/w", 0x604, 0x2000), RunState::Shutdown, "has powered off"),
        (&[], |bed| bed.port("/w", 0x604, 0x2400), RunState::Suspended, "sleeps (S3)"),
        (
            &["-no-shutdown", "-device", "pvpanic"],
            |bed| bed.port("/b", 0x505, 1),
            RunState::GuestPanicked,
            "panicked",
        ),
    ];
    for (more, act, state, words) in table {
        let mut bed = Bed::new(more);
        assert_eq!(bed.vm.begin().unwrap().reasons, Vec::<String>::new());
        // The firmware decides where these ports are.
        let end = Instant::now() + Duration::from_secs(60);
        while bed.vm.run_state().unwrap() == RunState::Running {
            assert!(Instant::now() < end, "it does not become {state}");
            act(&mut bed);
            std::thread::sleep(Duration::from_millis(20));
        }
        bed.until(state);
        // At the next look: QEMU has said that something happened.
        assert_eq!(bed.vm.watch().unwrap().state, Some(state));
        assert_eq!(bed.vm.prepare_stop().unwrap(), state);
        let reasons = bed.vm.begin().unwrap().reasons;
        assert!(reasons.iter().any(|reason| reason.contains(words)), "{reasons:?}");
        assert_eq!(bed.vm.stop().unwrap().before, state);
        bed.vm.restore(state).unwrap();
        assert_eq!(bed.vm.run_state().unwrap(), state, "it is as it was");
        assert!(is_locked(&bed.disk));
    }
}

#[test]
fn i1_what_others_do_in_the_pause_is_noticed_before_the_permit() {
    for (command, event, words) in [
        ("cont", "RESUME", "let the guest run on"),
        ("system_reset", "RESET", "was reset"),
        ("system_powerdown", "POWERDOWN", "power off"),
    ] {
        let mut bed = Bed::new(&["-no-shutdown"]);
        assert_eq!(bed.vm.stop().unwrap().before, RunState::Running);
        bed.says(command);
        // QEMU answers before it does it, and tells one monitor after the other.
        let end = Instant::now() + Duration::from_secs(60);
        while !bed.vm.qmp().events_since(0).any(|said| said.name == event) {
            assert!(Instant::now() < end, "{command}");
            bed.vm.qmp().hear().unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
        let changed = bed.vm.save().unwrap_err().to_string();
        assert!(changed.contains(words), "{command}: {changed}");
        bed.vm.restore(RunState::Running).unwrap();
        bed.until(RunState::Running);
        // Continued and stopped again by somebody: it stays stopped.
        bed.vm.stop().unwrap();
        bed.says("cont");
        bed.says("stop");
        bed.vm.save().unwrap_err();
        bed.vm.restore(RunState::Running).unwrap();
        assert_eq!(bed.vm.run_state().unwrap(), RunState::Paused);
    }
}

#[test]
fn i1_nobody_can_set_a_frozen_guest_running() {
    let mut bed = Bed::new(&[]);
    bed.vm.stop().unwrap();
    bed.vm.hold().expect_err("it is not frozen yet");
    bed.vm.save().unwrap();
    bed.vm.hold().unwrap();
    let handle = bed.vm.handle();
    assert!(frozen::is_frozen(&handle).unwrap());
    let asked = bed.others.execute_within("cont", json!({}), Duration::from_millis(200));
    assert!(asked.is_err(), "nobody answers");
    // Not even after a signal.
    let process = sys::process::PidFd::open(handle.pid).unwrap();
    process.thaw().unwrap();
    let asked = bed.others.execute_within("query-status", json!({}), Duration::from_millis(200));
    assert!(asked.is_err(), "nobody answers");
    // The agent ends, and its successor finds it so.
    let Bed { vm, _hand: mut hand, .. } = bed;
    drop(vm);
    let held = frozen::hold_if_frozen(&handle).unwrap();
    assert!(held.is_some());
    process.thaw().unwrap();
    drop(held);
    let end = Instant::now() + Duration::from_secs(60);
    while !frozen::is_frozen(&handle).unwrap() {
        assert!(Instant::now() < end, "it stands still by itself again");
    }
    let began = Instant::now();
    frozen::end(&handle, None).unwrap();
    assert!(began.elapsed() < Duration::from_secs(2), "no monitor was asked: {:?}", began.elapsed());
    assert!(hand.child.wait().unwrap().code().is_none(), "it never ran on");

    // One that is ours again is let go, and its monitor found.
    let mut bed = Bed::new(&[]);
    bed.vm.stop().unwrap();
    bed.vm.save().unwrap();
    let handle = bed.vm.handle();
    let Bed { vm, _hand, others, disk: _disk, _folder } = bed;
    drop((vm, others));
    frozen::thaw(&handle).unwrap();
    let mut vm = Vm::reopen(&handle).unwrap();
    vm.restore(RunState::Running).unwrap();
    assert_eq!(vm.run_state().unwrap(), RunState::Running);
}

#[test]
fn i1_a_signal_that_let_qemu_go_is_seen_before_the_promise() {
    for queued in ["query-status", "cont"] {
        let mut bed = Bed::new(&[]);
        bed.vm.stop().unwrap();
        bed.vm.save().unwrap();
        let process = sys::process::PidFd::open(bed.vm.handle().pid).unwrap();
        process.thaw().unwrap();
        bed.says(queued);
        // As if nothing had been.
        process.freeze(Duration::from_secs(10)).unwrap();
        let seen = bed.vm.hold().unwrap_err().to_string();
        assert!(seen.contains("SIGCONT"), "{seen}");
        bed.vm.restore(RunState::Running).unwrap();
        assert_eq!(bed.vm.run_state().unwrap(), RunState::Running);
        assert!(is_locked(&bed.disk));
    }
}

/// `cargo test --release -p qemu --test states -- freezing --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn looking_and_freezing_take_less_than_milliseconds() {
    const TIMES: usize = 200;
    let mut bed = Bed::new(&["-smp", "4"]);
    let names = ["one question", "stop", "looking", "freezing", "holding", "giving back"];
    let mut took = names.map(|_| Vec::new());
    let mut read_again: Vec<Duration> = (0..20).map(|_| bed.vm.begin().unwrap().took).collect();
    read_again.sort();
    println!("reading all again: median {:?}, most {:?}", read_again[10], read_again[19]);
    for _ in 0..TIMES {
        let mut begin = Instant::now();
        let mut lap = || std::mem::replace(&mut begin, Instant::now()).elapsed();
        bed.vm.status().unwrap();
        let question = lap();
        bed.vm.prepare_stop().unwrap();
        lap();
        bed.vm.stop().unwrap();
        let stop = lap();
        let saved = bed.vm.save().unwrap();
        lap();
        bed.vm.hold().unwrap();
        let hold = lap();
        bed.vm.restore(RunState::Running).unwrap();
        let all =
            [question, stop, saved.took(SaveStepKind::Check), saved.took(SaveStepKind::Freeze), hold, lap()];
        took.iter_mut().zip(all).for_each(|(list, time)| list.push(time));
    }
    for (name, mut list) in names.iter().zip(took) {
        list.sort();
        println!(
            "{name}: median {:?}, 99 % {:?}, most {:?}",
            list[TIMES / 2],
            list[TIMES * 99 / 100],
            list[TIMES - 1]
        );
    }
}
