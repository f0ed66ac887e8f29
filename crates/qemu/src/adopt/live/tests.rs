//! What is said of a running QEMU whose devices cannot be had everywhere: a monitor after a script answers
//! for it.

use super::*;
use crate::adopt::cmdline;
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixListener,
    path::Path,
    thread,
};

const RAMBLOCK: &str =
    "  /objects/mem    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\r\n";

/// What a healthy QEMU with nothing in it says; `odd` answers first.
fn answer(command: &str, arguments: &Value, odd: &dyn Fn(&str, &Value) -> Option<Value>) -> Value {
    odd(command, arguments).unwrap_or_else(|| match command {
        "query-status" => json!({ "status": "running" }),
        "query-commands" => json!([{ "name": "xen-save-devices-state" }]),
        "query-cpus-fast" => json!([{ "cpu-index": 0 }]),
        "qom-list" | "query-named-block-nodes" => json!([]),
        "query-memdev" => json!([{ "id": "mem", "size": 64 << 20, "share": true }]),
        "human-monitor-command" if arguments["command-line"] == "info ramblock" => json!(RAMBLOCK),
        "human-monitor-command" => json!(""),
        _ => json!({}),
    })
}

/// What is found in a QEMU with this command line whose monitor says this.
fn found(words: &[&str], odd: impl Fn(&str, &Value) -> Option<Value> + Send + 'static) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let version = json!({ "qemu": { "major": 7, "minor": 2, "micro": 0 }, "package": "" });
        writeln!(stream, "{}", json!({ "QMP": { "version": version, "capabilities": [] } })).unwrap();
        for line in BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok) {
            let asked: Value = serde_json::from_str(&line).unwrap();
            let said = answer(asked["execute"].as_str().unwrap(), &asked["arguments"], &odd);
            writeln!(stream, "{}", json!({ "return": said, "id": asked["id"] })).unwrap();
        }
    });
    let mut qmp = Qmp::connect(&path).unwrap();
    let object = "memory-backend-memfd,id=mem,size=64M,share=on";
    let start = ["qemu", "-nodefaults", "-object", object];
    let argv: Vec<String> = start.iter().chain(words).map(|word| (*word).to_owned()).collect();
    let mut read = cmdline::read(&argv, &Names::In(Path::new("/")));
    let process = PidFd::open(std::process::id() as i32).unwrap();
    differences(&mut qmp, &process, &Names::In(Path::new("/")), &mut read).unwrap()
}

/// A device of this kind where QEMU keeps those that have an id.
fn device(kind: &'static str) -> impl Fn(&str, &Value) -> Option<Value> + Send {
    move |command, arguments| {
        (command == "qom-list" && arguments["path"] == "/machine/peripheral").then(|| {
            json!([{ "name": "it", "type": format!("child<{kind}>") },
                { "name": "type", "type": "string" }])
        })
    }
}

#[test]
fn a_healthy_qemu_has_nothing_against_it() {
    assert_eq!(found(&[], |_, _| None), Vec::<String>::new());
    assert_eq!(found(&["-device", "virtio-rng-pci,id=it"], device("virtio-rng-pci")), Vec::<String>::new());
}

#[test]
fn devices_that_cannot_follow_are_refused_with_a_remedy() {
    let table = [
        ("vfio-pci", "a device of this host", "use a virtio device"),
        ("vhost-vsock-pci", "writes the guest's memory unseen", "without vhost"),
        ("vhost-user-blk-pci", "writes the guest's memory unseen", "without vhost"),
        ("vhost-scsi-pci", "writes the guest's memory unseen", "without vhost"),
        ("ivshmem-plain", "shared with other VMs", "leave it out"),
        ("ivshmem-doorbell", "shared with other VMs", "leave it out"),
        ("usb-host", "a USB device of this host", "unplug it (device_del)"),
        ("usb-redir", "a client of this host", "have the client disconnect"),
        ("virtio-pmem-pci", "a file of this host", "use a disk"),
        ("nvdimm", "a file of this host", "use a disk"),
        ("virtio-9p-pci", "files are this host's", "use a network file system"),
        ("virtio-gpu-gl-pci", "this host's graphics", "use virtio-gpu-pci"),
        ("nvme", "QEMU does not migrate it", "use virtio-blk"),
        ("pci-serial-2x", "QEMU dies when it saves", "use several pci-serial"),
    ];
    for (kind, why, mend) in table {
        // Named on the command line: it is refused for what it is.
        let reasons = found(&["-device", &format!("{kind},id=it")], device(kind));
        assert_eq!(reasons.len(), 1, "{kind}: {reasons:#?}");
        let said = &reasons[0];
        assert!(said.contains(kind) && said.contains(why) && said.contains(mend), "{kind}: {said}");
    }
}

#[test]
fn a_place_for_a_clients_usb_device_moves_while_it_is_empty() {
    let words = ["-chardev", "spicevmc,id=c,name=usbredir", "-device", "usb-redir,chardev=c,id=it"];
    for (channel, refused) in [(1, 0), (9, 1)] {
        let reasons = found(&words, move |command, arguments| match command {
            "query-spice" => Some(json!({ "channels": [{ "channel-type": channel }] })),
            _ => device("usb-redir")(command, arguments),
        });
        assert_eq!(reasons.len(), refused, "{reasons:?}");
    }
    let socket = ["-chardev", "socket,id=c,path=/x", "-device", "usb-redir,chardev=c,id=it"];
    assert_eq!(found(&socket, device("usb-redir")).len(), 1);
}

#[test]
fn what_changed_after_the_start_is_carried_or_refused() {
    let strange = found(&[], device("virtio-rng-pci"));
    assert!(strange[0].contains("device it (virtio-rng-pci) is not on the command line"), "{strange:#?}");
    assert!(strange[0].contains("unplug it (device_del) or start the VM with it"), "{strange:#?}");

    let unplugged = found(&["-device", "virtio-rng-pci,id=gone"], |_, _| None);
    assert_eq!(unplugged, Vec::<String>::new());

    // Plugged in, by QEMU's word; of its properties QEMU says nothing.
    let silent = found(&[], |command, arguments| match command {
        "qom-get" if arguments["property"] == "hotplugged" => Some(json!(true)),
        _ => device("virtio-rng-pci")(command, arguments),
    });
    assert!(
        silent[0].contains("device it (virtio-rng-pci) was plugged in with what cannot be said again"),
        "{silent:#?}"
    );

    let memory = |kind: &'static str| {
        found(&[], move |command, arguments| {
            let backend = |id: &str| json!({ "id": id, "size": 64 << 20, "share": true });
            match command {
                "query-memdev" => Some(json!([backend("mem"), backend("late")])),
                "qom-list" if arguments["path"] == "/objects" => {
                    Some(json!([{ "name": "late", "type": format!("child<{kind}>") }]))
                }
                _ => None,
            }
        })
    };
    assert_eq!(memory("memory-backend-ram"), Vec::<String>::new());
    let told = "memory late (memory-backend-epc) was added after the start and cannot follow the VM; use \
                memory-backend-memfd";
    assert_eq!(memory("memory-backend-epc"), [told]);

    let vcpus = found(&[], |command, _| {
        (command == "query-cpus-fast").then(|| json!([{ "cpu-index": 0 }, { "cpu-index": 1 }]))
    });
    assert!(
        vcpus.len() == 1 && vcpus[0].starts_with("it has 2 vCPUs, of 1 that it was started with"),
        "{vcpus:?}"
    );

    let network = |said: &'static str| {
        found(&[], move |command, arguments| {
            let asked = command == "human-monitor-command" && arguments["command-line"] == "info network";
            asked.then(|| json!(said))
        })
    };
    let tap = network("late: index=0,type=tap,ifname=tap9\r\n");
    assert!(
        tap.len() == 1 && tap[0].starts_with("network late: its TAP tap9 was renamed or replaced"),
        "{tap:?}"
    );
    let user = network("late: index=0,type=user,net=10.0.2.0,restrict=off\r\n");
    assert!(
        user[0].starts_with("network late (user) was added after the start, and QEMU cannot be asked"),
        "{user:?}"
    );
}

#[test]
fn disks_that_are_elsewhere_are_refused() {
    let node = |drv: &str, file: &str| {
        let node = json!({ "node-name": "n", "drv": drv, "file": file, "cache": { "direct": false } });
        move |command: &str, _: &Value| (command == "query-named-block-nodes").then(|| json!([node]))
    };
    for (odd, why, mend) in [
        (node("file", "/dev/fdset/3"), "is not on the command line", "restart the VM with it"),
        (node("nbd", "nbd+unix:///d?socket=/s"), "by a socket of this host", "nbd://HOST:PORT/NAME"),
        (node("rbd", "rbd:pool/vol"), "driver rbd, which is not carried over", "nbd://HOST:PORT/NAME"),
        (node("host_device", "/dev/sdb"), "no image locks between hosts", "shared file system"),
    ] {
        let reasons = found(&[], odd);
        assert_eq!(reasons.len(), 1, "{reasons:#?}");
        assert!(reasons[0].contains(why) && reasons[0].contains(mend), "{reasons:#?}");
    }
    let encrypted = json!({ "node-name": "n", "drv": "qcow2", "file": "/a.img", "encrypted": true,
                            "image": { "format-specific": { "data": { "encrypt": { "format": "aes" } } } } });
    let reasons =
        found(&[], move |command, _| (command == "query-named-block-nodes").then(|| json!([encrypted])));
    assert_eq!(reasons.len(), 1, "{reasons:#?}");
    assert!(reasons[0].contains("old encryption") && reasons[0].contains("qemu-img convert"), "{reasons:#?}");
}

#[test]
fn a_qemu_that_cannot_be_migrated_just_now_says_why() {
    let reasons = found(&[], |command, _| match command {
        "query-status" => Some(json!({ "status": "io-error" })),
        "query-migrate" => Some(json!({ "blocked-reasons": ["the device says no"] })),
        "query-commands" => Some(json!([])),
        _ => None,
    });
    let told = [
        "it is in state io-error: QEMU stopped the guest because a disk fails, which cannot be carried over; \
         mend the disk, then `cont`",
        "QEMU itself refuses to migrate it: the device says no",
        "this QEMU has no xen-save-devices-state; use a QEMU that was built with it",
    ];
    assert_eq!(reasons, told);
}

#[test]
fn a_disk_that_is_in_use_must_be_there() {
    let gone = ["-drive", "file=/nowhere.img,format=raw,if=none,id=d0"];
    let used = |command: &str, _: &Value| match command {
        "query-block" => Some(json!([{ "device": "d0", "qdev": "d", "inserted": { "node-name": "n" } }])),
        "query-named-block-nodes" => {
            Some(json!([{ "node-name": "n", "drv": "raw", "file": "/nowhere.img" }]))
        }
        _ => None,
    };
    assert_eq!(found(&gone, used), ["disk /nowhere.img: No such file or directory (os error 2)"]);
    // One that was taken out of its drive may be gone.
    let ejected = |command: &str, _: &Value| {
        (command == "query-block").then(|| json!([{ "device": "d0", "qdev": "cd" }]))
    };
    assert_eq!(found(&gone, ejected), Vec::<String>::new());
}

#[test]
fn a_card_whose_link_is_not_carried_is_told_of() {
    for kind in ["ne2k_pci", "ne2k_isa", "i82551", "i82559er", "tulip"] {
        let told = lost_link("c0", kind).unwrap_or_default();
        assert!(told.contains(&format!("network card c0 ({kind})")), "{kind}: {told}");
    }
    for kind in
        ["virtio-net-pci", "e1000", "e1000e", "rtl8139", "pcnet", "vmxnet3", "i8042", "i8257", "usb-tablet"]
    {
        assert_eq!(lost_link("c0", kind), None);
    }
}
