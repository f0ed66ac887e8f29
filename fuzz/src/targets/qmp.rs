use crate::input::Input;
use qemu::fuzz::{QUESTIONS, command_line, monitor};
use serde_json::{Value, json};
use std::path::Path;

/// What begins every connection, up to the answer to the first question.
const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 0, \"minor\": 2, \"major\": 7}, \
                        \"package\": \"\"}, \"capabilities\": []}}\r\n{\"return\": {}, \"id\": 1}\r\n";

/// A byte says what is asked, one whether the greeting is good; then what QEMU says. Or the words of its
/// command line, a NUL after each.
pub(crate) fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let question = usize::from(input.u8()) % (QUESTIONS.len() + 1);
    let greets = input.u8().is_multiple_of(2);
    let said = input.rest();
    match QUESTIONS.get(question) {
        Some(question) if greets => monitor(&[GREETING.as_bytes(), said].concat(), *question).is_ok(),
        Some(question) => monitor(said, *question).is_ok(),
        None => std::str::from_utf8(said).is_ok_and(words),
    }
}

fn words(text: &str) -> bool {
    let argv: Vec<String> = text.split('\0').map(str::to_owned).collect();
    // Boot files are read from end to end, and no file of this machine has anything to do with it.
    if argv.iter().any(|word| word.contains("kernel") || word.contains("initrd")) {
        return false;
    }
    let (recipe, reasons) = command_line(&argv, Path::new("/nowhere"));
    let _ = qemu::recipe::check(&recipe);
    reasons.is_empty()
}

/// Answers to one question after the other.
fn answers(returned: &[Value]) -> Vec<u8> {
    returned
        .iter()
        .map(|value| format!("{}\r\n", json!({ "return": value })))
        .collect::<String>()
        .into_bytes()
}

fn event(name: &str, data: Value) -> Vec<u8> {
    let stamp = json!({ "seconds": 1_700_000_000, "microseconds": 5 });
    format!("{}\r\n", json!({ "event": name, "data": data, "timestamp": stamp })).into_bytes()
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let memdev = json!([{ "id": "ram0", "size": 67_108_864, "share": true, "merge": true, "dump": true }]);
    let old = json!(
        "              Block Name    PSize              Offset               Used              \
         Total\r\n                    ram0    4 KiB  0x0000000000000000 0x0000000004000000 \
         0x0000000004000000\r\n  0000:00:01.0/vga.vram    4 KiB  0x0000000004080000 0x0000000001000000 \
         0x0000000001000000\r\n"
    );
    let new = json!(
        "Block Name    PSize  Offset  Used  Total  HVA  RO\r\n/objects/ram0    4 KiB  0x0 0x4000000 \
         0x4000000 0x00007f8846c00000  rw\r\n"
    );
    let elastic = json!(
        "  0000:00:03.0/m0    4 KiB  0x0000000010000000 0x0000000020000000 0x0000000020000000\r\n  ram0    4 \
         KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\r\n"
    );
    let two = json!([{ "id": "ram0", "size": 67_108_864 }, { "id": "m0", "size": 536_870_912 }]);
    let plugged = json!([{ "type": "virtio-mem", "data": { "memdev": "/objects/m0",
        "memaddr": 4_294_967_296_u64, "size": 0, "max-size": 536_870_912, "id": "vmem0" } },
        { "type": "dimm", "data": { "memdev": "/objects/d0", "addr": 5_368_709_120_u64 } }]);
    let tree = json!(
        "FlatView #0\r\n AS \"memory\", root: system\r\n Root memory region: system\r\n  \
         0000000000000000-0000000003ffffff (prio 0, ram): ram0 KVM\r\n  00000000fd000000-00000000fdffffff \
         (prio 1, ram): vga.vram\r\n"
    );
    let place = |name: &str| json!(format!("Host virtual address for 0x0 ({name}) is 0x7f1990000000\r\n"));
    let status = json!({ "status": "running", "running": true });
    let commands = json!([{ "name": "xen-save-devices-state" }, { "name": "stop" }]);
    let list = |children: &[(&str, &str)]| -> Value {
        children
            .iter()
            .map(|(name, kind)| json!({ "name": name, "type": format!("child<{kind}>") }))
            .collect()
    };
    let cpus = json!([{ "cpu-index": 0, "qom-path": "/machine/unattached/device[0]", "thread-id": 4711,
        "target": "x86_64" },
        { "cpu-index": 1, "thread-id": 4712 }]);
    let node = json!([{ "node-name": "file0", "drv": "file", "file": "/shared/web1.img",
        "cache": { "direct": true } }]);
    let words =
        json!([{ "cpuid-input-eax": 7, "cpuid-input-ecx": 0, "cpuid-register": "EBX", "features": 5 }]);
    let net = json!("nic0: index=0,type=nic,model=virtio\r\n \\ net0: index=0,type=tap,ifname=t0\r\n");
    let drives = json!([{ "device": "", "qdev": "/machine/peripheral/blk0/virtio-backend", "removable": false,
        "inserted": { "node-name": "file0", "file": "/shared/web1.img", "bps": 5, "group": "g" } },
        { "device": "cd0", "qdev": "cd" }]);
    let graph = json!({ "nodes": [{ "id": 1, "type": "block-driver", "name": "file0" },
        { "id": 2, "type": "block-backend", "name": "" },
        { "id": 3, "type": "block-job", "name": "job0" }],
        "edges": [{ "parent": 2, "child": 1, "name": "root" }] });
    let chardevs = json!([{ "label": "serial0", "filename": "unix:/s,server=on", "frontend-open": true }]);
    let differences = [
        status.clone(),
        json!({ "blocked-reasons": ["a device"] }),
        commands.clone(),
        // An object that was added, and what it is like.
        list(&[("t0", "iothread")]),
        json!([{ "name": "type", "type": "string" }, { "name": "poll-max-ns", "type": "int" }]),
        json!("iothread"),
        json!(32_768),
        // Devices, of which one was plugged in; their buses.
        list(&[("rng", "virtio-rng-pci"), ("tab", "usb-tablet")]),
        list(&[("device[0]", "isa-serial")]),
        json!(false),
        json!(true),
        json!(false),
        json!("/machine/q35/pcie.0"),
        json!("/machine/peripheral/usb/usb.0"),
        json!("/machine/unattached/device[4]/isa.0"),
        json!("  Device 0.1, Port 1, Speed 480 Mb/s, Product QEMU USB Tablet, ID: tab\r\n"),
        json!([{ "name": "port", "type": "str" },
            { "name": "usb_version", "type": "uint32", "default-value": 2 }]),
        json!(""),
        json!(1),
        list(&[("device[3]", "qemu64-x86_64-cpu")]),
        list(&[("q35", "q35-pcihost")]),
        drives.clone(),
        node.clone(),
        graph.clone(),
        // Objects, of which a secret is no disk's.
        list(&[("ram0", "memory-backend-memfd"), ("sec0", "secret")]),
        net.clone(),
        chardevs,
        memdev.clone(),
        list(&[("ram0", "memory-backend-memfd")]),
        json!("/objects/ram0"),
        old.clone(),
        cpus.clone(),
    ];
    let migration = json!({ "status": "completed", "blocked-reasons": ["a device"] });
    let short = [
        status.clone(),
        migration,
        graph,
        list(&[("blk0", "virtio-blk-pci")]),
        list(&[("device[0]", "ide-cd")]),
        list(&[("ram0", "memory-backend-memfd"), ("sec0", "secret")]),
    ];
    let ports = list(&[("serial0", "chardev-socket")]);
    let rest = [
        memdev.clone(),
        json!([{ "type": "dimm", "data": { "id": "dimm0", "size": 4096 } }]),
        cpus.clone(),
        ports.clone(),
        drives.clone(),
        node,
        json!([{ "id": "job0", "type": "backup", "status": "running" }]),
        json!([{ "id": "e0", "type": "nbd", "node-name": "file0" }]),
        net.clone(),
    ];
    let begun: Vec<Value> =
        short.iter().chain(&rest).chain(&short).chain([&ports, &drives, &net]).cloned().collect();
    let ring = json!({ "vring-desc": 4096, "inuse": 1, "last-avail-idx": 8, "used-idx": 7 });
    let disks = [
        json!([{ "name": "virtio-blk", "path": "/machine/peripheral/blk0/virtio-backend" },
            { "name": "virtio-net", "path": "/machine/peripheral/n/virtio-backend" }]),
        json!({ "num-vqs": 1 }),
        ring.clone(),
        json!([{ "device": "d", "qdev": "/machine/peripheral/blk0/virtio-backend",
            "stats": { "wr_operations": 5, "wr_total_time_ns": 2_007_746_057, "flush_operations": 1 } }]),
        ring,
    ];
    let all = [
        (8, answers(&begun)),
        (9, answers(&disks)),
        (0, answers(&[memdev.clone(), new])),
        (0, answers(&[memdev.clone(), old.clone(), tree.clone(), place("ram0")])),
        (0, answers(&[two, elastic, plugged, place("m0"), tree.clone(), place("ram0")])),
        (1, [event("STOP", Value::Null), answers(&[status, json!({}), commands])].concat()),
        (2, answers(&differences)),
        (3, answers(&[json!("pc-q35-7.2-machine"), cpus.clone(), words])),
        (5, answers(&[json!({ "fdset-id": 3, "fd": 9 }), json!({})])),
        (6, answers(&[memdev, old, tree.clone(), place("ram0"), tree, place("vga.vram")])),
        (
            7,
            [
                event("MIGRATION", json!({ "status": "active" })),
                event("MIGRATION", json!({ "status": "completed" })),
            ]
            .concat(),
        ),
    ];
    let mut seeds: Vec<Vec<u8>> =
        all.iter().map(|(question, said)| [&[*question, 0], &said[..]].concat()).collect();
    // The greeting too.
    let descriptor = all.iter().filter(|(question, _)| *question == 5);
    seeds.extend(descriptor.map(|(_, said)| [&[5, 1], GREETING.as_bytes(), said].concat()));
    let argv = "qemu-system-x86_64 -nodefaults -name guest=a -machine q35,accel=tcg,memory-backend=ram0 \
         -m size=1G -object memory-backend-memfd,id=ram0,size=1G,share=on -smp 2 \
         -netdev tap,id=n,ifname=t0,script=no,vhost=off -device virtio-net-pci,netdev=n \
         -chardev null,id=c -serial null -display none -global migration.send-configuration=off \
         -qmp unix:/run/q,server=on,wait=off";
    seeds.push([&[QUESTIONS.len() as u8, 0], argv.replace(' ', "\0").as_bytes()].concat());
    seeds
}
