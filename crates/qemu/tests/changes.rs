//! What a second monitor does to a QEMU that is about to be moved, and whom its guest belongs to afterwards.

mod common;

use common::{ends::Folder, hand::*, host};
use ports::{Machine, RunState};
use qemu::{Vm, qmp::Qmp};
use serde_json::{Value, json};
use std::{
    fs::File,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

/// A QEMU with a disk and a CD, in our charge, and a monitor that is not ours.
fn begun(hand: &ByHand, q2: &Path) -> (Vm, Qmp) {
    let mut vm = Vm::adopt("vm", &hand.qmp).unwrap().vm;
    let begun = vm.begin().unwrap();
    assert_eq!(begun.reasons, Vec::<String>::new());
    vm.prepare_stop().unwrap();
    (vm, Qmp::connect(q2).unwrap())
}

fn start(folder: &Path) -> ByHand {
    for (name, bytes) in [("d.img", 8 << 20), ("a.iso", 1 << 20), ("b.iso", 1 << 20)] {
        File::create(folder.join(name)).unwrap().set_len(bytes).unwrap();
    }
    let at = |name: &str| folder.join(name).display().to_string();
    let (disk, cd) = (at("d.img"), at("a.iso"));
    ByHand::start(&with(&[
        "-qmp",
        &format!("unix:{},server=on,wait=off", at("q2")),
        "-blockdev",
        &format!("driver=file,node-name=f0,filename={disk}"),
        "-blockdev",
        "driver=raw,node-name=d0,file=f0",
        "-device",
        "virtio-blk-pci,id=blk0,drive=d0",
        "-drive",
        &format!("if=none,id=cd0,media=cdrom,readonly=on,format=raw,file={cd}"),
        "-device",
        "ide-cd,id=cd,drive=cd0",
        "-device",
        "qemu-xhci,id=usb",
    ]))
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < end, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn status(qmp: &mut Qmp) -> String {
    qmp.execute("query-status", json!({})).unwrap()["status"].as_str().unwrap().to_owned()
}

fn own(qmp: &mut Qmp) -> String {
    qmp.execute("query-migrate", json!({})).unwrap()["status"].as_str().unwrap_or("none").to_owned()
}

#[test]
fn what_a_monitor_does_in_the_pause_is_noticed_in_it() {
    let folder = Folder::new();
    let hand = start(folder.path());
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (mut vm, mut q2) = begun(&hand, &folder.path().join("q2"));
    assert_eq!(vm.watch().unwrap().changes, Vec::<String>::new());
    let medium = |name: &str| json!({ "id": "cd", "filename": at(name), "format": "raw" });
    let nbd = json!({ "addr": { "type": "unix", "data": { "path": at("nbd") } } });
    let export = json!({ "type": "nbd", "id": "e0", "node-name": "d0" });
    let tablet = json!({ "driver": "usb-tablet", "id": "late", "bus": "usb.0" });
    // What is done, what is told, and how it is undone.
    type Acts = Vec<(&'static str, Value)>;
    let table: [(Acts, &str, Acts); 4] = [
        (
            vec![("nbd-server-start", nbd), ("block-export-add", export)],
            "export e0",
            vec![("block-export-del", json!({ "id": "e0" })), ("nbd-server-stop", json!({}))],
        ),
        (
            vec![("blockdev-change-medium", medium("b.iso"))],
            "drive cd is node",
            vec![("blockdev-change-medium", medium("a.iso"))],
        ),
        (vec![("device_add", tablet)], "device late", vec![("device_del", json!({ "id": "late" }))]),
        (
            vec![(
                "blockdev-snapshot-sync",
                json!({ "node-name": "d0", "snapshot-file": at("o"), "snapshot-node-name": "over" }),
            )],
            "drive blk0 is node over",
            vec![],
        ),
    ];
    for (acts, told, undo) in table {
        vm.stop().unwrap();
        for (command, arguments) in acts {
            q2.execute(command, arguments).unwrap();
        }
        after_its_answers(&mut q2);
        let error = vm.save().unwrap_err().to_string();
        assert!(error.starts_with("the VM was changed") && error.contains(told), "{told}: {error}");
        vm.restore(RunState::Running).unwrap();
        assert_eq!(status(&mut q2), "running");
        for (command, arguments) in undo {
            q2.execute(command, arguments).unwrap();
        }
        // As it was, but for names that QEMU gives: so it begins anew.
        until("nothing hinders it", || vm.begin().unwrap().reasons.is_empty());
    }
    // The overlay is in the recipe by now, and what it lies on is in its image.
    let (arguments, files) = (format!("{:?}", vm.recipe().arguments), format!("{:?}", vm.recipe().files));
    assert!(arguments.contains("id=blk0,drive=over") && !arguments.contains("node-name=d0"), "{arguments}");
    assert!(files.contains("d.img"), "{files}");
}

/// What libvirt sets of each VM with a balloon, and of threads on request.
#[test]
fn i9_what_is_set_of_threads_and_balloons_is_carried() {
    let folder = Folder::new();
    let second = format!("unix:{},server=on,wait=off", folder.path().join("q2").display());
    let hand = ByHand::start(&with(&[
        "-object",
        "iothread,id=io0,poll-max-ns=7",
        "-object",
        "iothread,id=io1",
        "-device",
        "virtio-balloon-pci",
        "-qmp",
        &second,
    ]));
    let (mut vm, mut q2) = begun(&hand, &folder.path().join("q2"));
    let settings = [
        ("/objects/io0", "poll-max-ns", 0),
        ("/objects/io1", "aio-max-batch", 9),
        ("/machine/peripheral-anon/device[0]", "guest-stats-polling-interval", 5),
    ];
    let set = |qmp: &mut Qmp, (path, property, value): (&str, &str, u32)| {
        qmp.execute("qom-set", json!({ "path": path, "property": property, "value": value })).unwrap();
    };
    let get = |qmp: &mut Qmp, path: &str, property: &str| {
        qmp.execute("qom-get", json!({ "path": path, "property": property })).unwrap()
    };
    for setting in settings {
        set(&mut q2, setting);
        until("it is seen while the VM is moved", || !vm.watch().unwrap().changes.is_empty());
        assert_eq!(vm.begin().unwrap().reasons, Vec::<String>::new());
    }
    let mut next = Vm::incoming(vm.recipe(), &host(hand.folder.path(), "target", None)).unwrap();
    for (path, property, value) in settings {
        assert_eq!(get(next.qmp(), path, property), value, "{path} {property}");
    }
    assert_eq!(get(next.qmp(), "/objects/io1", "poll-max-ns"), 32_768, "what nobody set is as usual");
    next.destroy().unwrap();
}

/// A QEMU that loads a snapshot writes all of its guest's memory: slowed as a writer it takes minutes.
#[test]
fn i3_a_qemu_that_is_busy_with_a_stopped_guest_ends_a_move() {
    let folder = Folder::new();
    let hand = start(folder.path());
    let (mut vm, mut q2) = begun(&hand, &folder.path().join("q2"));
    let signal = |word: &str| {
        let sent = Command::new("kill").args([word, &hand.child.id().to_string()]).status();
        assert!(sent.unwrap().success());
    };
    let deaf = |vm: &mut Vm, q2: &mut Qmp, command: &str| {
        q2.execute(command, json!({})).unwrap();
        signal("-STOP");
        let mut seen = vm.watch();
        until("it is asked", || {
            let asked = !matches!(&seen, Ok(seen) if seen.changes.is_empty());
            if !asked {
                seen = vm.watch();
            }
            asked
        });
        signal("-CONT");
        seen
    };
    // It may be busy with much else.
    assert!(deaf(&mut vm, &mut q2, "query-status").is_err());
    let seen = deaf(&mut vm, &mut q2, "stop").unwrap();
    assert!(seen.changes[0].contains("QEMU has stopped the guest, and is busy"), "{seen:?}");
    // One that answers goes on as it is.
    assert_eq!(vm.begin().unwrap().reasons, Vec::<String>::new());
    assert_eq!(vm.watch().unwrap().changes, Vec::<String>::new());
}

/// QEMU 7.2 ends itself when it is to resize a disk that is inactive, and whatever else it does then is lost.
#[test]
fn i3_a_saved_vm_does_nothing_that_others_ask_of_it() {
    for _ in 0..8 {
        let folder = tempfile::tempdir().unwrap();
        let hand = start(folder.path());
        let (mut vm, mut q2) = begun(&hand, &folder.path().join("q2"));
        let (tell, told) = std::sync::mpsc::channel();
        let other = std::thread::spawn(move || {
            // To the size that it has: another one would be noticed.
            let size = json!({ "node-name": "d0", "size": 8 << 20 });
            while q2.execute("block_resize", size.clone()).is_ok() && tell.send(()).is_ok() {}
        });
        assert!(told.recv_timeout(Duration::from_secs(10)).is_ok(), "the other monitor resizes it");
        vm.stop().unwrap();
        vm.save().unwrap();
        let done = told.try_iter().count();
        vm.hold().unwrap();
        // What was answered just before it stood still may have been on its way.
        let more = std::iter::from_fn(|| told.recv_timeout(Duration::from_millis(100)).ok()).count();
        assert!(more <= 1, "{done} were answered until it was saved, and {more} after that");
        // Where it aborts, it is stopped before it has ended.
        assert!(!vm.has_ended()() && !hand.said().contains("Assertion"), "{}", hand.said());
        vm.destroy().unwrap();
        other.join().unwrap();
    }
}

#[test]
fn i1_a_guest_that_qemu_took_elsewhere_is_not_resumed() {
    let folder = Folder::new();
    let hand = start(folder.path());
    let (mut vm, mut q2) = begun(&hand, &folder.path().join("q2"));

    // Begun in our pause, it is cancelled: else it would be over at any moment, the guest standing still.
    q2.execute("migrate-set-parameters", json!({ "max-bandwidth": 4096 })).unwrap();
    vm.stop().unwrap();
    q2.execute("migrate", json!({ "uri": "exec:cat >/dev/null" })).unwrap();
    until("it has begun", || own(&mut q2) == "active");
    after_its_answers(&mut q2);
    let error = vm.save().unwrap_err().to_string();
    assert!(error.contains("QEMU's own migration"), "{error}");
    vm.restore(RunState::Running).unwrap();
    assert_eq!((status(&mut q2).as_str(), own(&mut q2).as_str()), ("running", "cancelled"));

    // It is over before we look: the guest is elsewhere, whoever asks for it here.
    q2.execute("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 40 })).unwrap();
    vm.stop().unwrap();
    q2.execute("migrate", json!({ "uri": "exec:cat >/dev/null" })).unwrap();
    until("it is over", || status(&mut q2) == "postmigrate");
    after_its_answers(&mut q2);
    let error = vm.save().unwrap_err().to_string();
    assert!(error.contains("is not set running here"), "{error}");
    let handle = vm.handle();
    for mut vm in [vm].into_iter().chain(std::iter::once_with(|| Vm::reopen(&handle).unwrap())) {
        let error = vm.restore(RunState::Running).unwrap_err().to_string();
        assert!(error.contains("QEMU's own migration has taken it to another QEMU"), "{error}");
        let reasons = vm.begin().unwrap().reasons;
        assert!(reasons[0].contains("is not set running here"), "{reasons:#?}");
    }
    assert_eq!(status(&mut q2), "postmigrate");
}
