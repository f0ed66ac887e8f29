//! Recipes and what QEMU says of its drives now: the arguments for the target.

use super::*;
use serde_json::json;

/// A node: its name, its driver, its file, and what it lies on.
type NodeRow = (&'static str, &'static str, &'static str, &'static [(&'static str, &'static str)]);
/// A drive: the id of `-drive`, the device's path, and the node it shows.
type DriveRow = (&'static str, &'static str, Option<&'static str>);

fn live(drives: &[DriveRow], nodes: &[NodeRow]) -> Live {
    let drive = |(backend, device, node): &DriveRow| match node {
        Some(node) => json!({ "device": backend, "qdev": device, "inserted": { "node-name": node } }),
        None => json!({ "device": backend, "qdev": device, "removable": true }),
    };
    let id = |name: &str| nodes.iter().position(|(other, ..)| *other == name).unwrap();
    let edges: Vec<Value> = nodes
        .iter()
        .flat_map(|(name, _, _, children)| {
            children
                .iter()
                .map(move |(what, child)| json!({ "name": what, "parent": id(name), "child": id(child) }))
        })
        .collect();
    let graph_node = |(name, ..): &NodeRow| json!({ "name": name, "type": "block-driver", "id": id(name) });
    let node = |(name, driver, file, _): &NodeRow| {
        let ro = file.ends_with("iso");
        json!({ "node-name": name, "drv": driver, "file": file, "ro": ro })
    };
    Live::read(
        &json!(drives.iter().map(drive).collect::<Vec<_>>()),
        &json!(nodes.iter().map(node).collect::<Vec<_>>()),
        &json!({ "nodes": nodes.iter().map(graph_node).collect::<Vec<_>>(), "edges": edges }),
    )
}

fn arguments(text: &[&str]) -> Vec<Argument> {
    text.chunks(2).map(|pair| Argument::new(pair[0], pair[1])).collect()
}

const CD: &str = "if=none,id=cd0,media=cdrom,file=/a.iso,format=raw,readonly=on";
const FILE: &str = "driver=file,node-name=f0,filename=/d.img,locking=on";
const DISK: &str = "driver=raw,node-name=d0,file=f0";
const D0: NodeRow = ("d0", "raw", "/d.img", &[("file", "f0")]);
const F0: NodeRow = ("f0", "file", "/d.img", &[]);
const BLK: &str = "virtio-blk-pci,id=blk0,drive=d0";
const BLK_PATH: &str = "/machine/peripheral/blk0/virtio-backend";

#[test]
fn the_arguments_of_drives_follow_what_they_are_now() {
    let a = ("#block1", "raw", "/a.iso", &[("file", "#block2")][..]);
    let (a_file, b_file) = (("#block2", "file", "/a.iso", &[][..]), ("#block4", "file", "/b.iso", &[][..]));
    let b = ("#block3", "raw", "/b.iso", &[("file", "#block4")][..]);
    let over = ("over", "qcow2", "/o.qcow2", &[("file", "#block5"), ("backing", "d0")][..]);
    let over_file = ("#block5", "file", "/o.qcow2", &[][..]);
    let disk = ["-blockdev", FILE, "-blockdev", DISK, "-device", BLK];
    let overlaid = [
        "-blockdev",
        "qcow2,node-name=over,file.driver=file,file.filename=/o.qcow2",
        "-device",
        "virtio-blk-pci,id=blk0,drive=over",
    ];
    let (from, inner) =
        ("json:{\"driver\": \"raw\", \"offset\": 65536, \"file\": {}}", &[("file", "f0")][..]);
    let none = "json:{\"driver\": \"null-co\", \"read-zeroes\": true, \"size\": 1048576}";
    let table: [(&str, &[&str], Live, &[&str]); 12] = [
        (
            "nothing changed",
            &["-drive", CD],
            live(&[("cd0", "cd", Some("#block1"))], &[a, a_file]),
            &["-drive", CD],
        ),
        (
            "ejected",
            &["-drive", CD],
            live(&[("cd0", "cd", None)], &[]),
            &["-drive", "if=none,id=cd0,media=cdrom"],
        ),
        (
            "another medium",
            &["-drive", CD],
            live(&[("cd0", "cd", Some("#block3"))], &[b, b_file]),
            &["-drive", "if=none,id=cd0,media=cdrom,file=/b.iso,format=raw,readonly=on"],
        ),
        (
            "inserted into an empty drive",
            &["-device", "scsi-cd,id=ecd"],
            live(&[("", "ecd", Some("#block3"))], &[b, b_file]),
            &[
                "-blockdev",
                "raw,node-name=medium0,read-only=on,file.driver=file,file.filename=/b.iso",
                "-device",
                "scsi-cd,id=ecd,drive=medium0",
            ],
        ),
        ("a disk as it was", &disk, live(&[("", BLK_PATH, Some("d0"))], &[D0, F0]), &disk),
        (
            "an overlay of blockdev-snapshot-sync",
            &disk,
            live(&[("", BLK_PATH, Some("over"))], &[D0, F0, over, over_file]),
            &overlaid,
        ),
        (
            "… and committed again",
            &overlaid,
            live(&[("", BLK_PATH, Some("d0"))], &[D0, F0]),
            &[
                "-blockdev",
                "file,node-name=f0,filename=/d.img",
                "-blockdev",
                "raw,node-name=d0,file=f0",
                "-device",
                BLK,
            ],
        ),
        (
            "an overlay over a -drive",
            &["-drive", "if=none,id=disk0,file=/d.img,format=raw"],
            live(
                &[("disk0", "", Some("over"))],
                &[
                    ("over", "qcow2", "/o.qcow2", &[("file", "#block5"), ("backing", "#block6")]),
                    over_file,
                    ("#block6", "raw", "/d.img", &[("file", "#block7")]),
                    ("#block7", "file", "/d.img", &[]),
                ],
            ),
            &["-drive", "if=none,id=disk0,file=/o.qcow2,format=qcow2,node-name=over"],
        ),
        (
            "ejected, its node still there",
            &["-blockdev", FILE, "-blockdev", DISK, "-device", "scsi-cd,id=ecd,drive=d0"],
            live(&[("", "ecd", None)], &[D0, F0]),
            &["-blockdev", FILE, "-blockdev", DISK, "-device", "scsi-cd,id=ecd"],
        ),
        (
            "nodes that were added, with what decides of their content",
            &["-blockdev", FILE],
            live(&[], &[F0, ("late", "raw", from, inner), ("none", "null-co", none, &[])]),
            &[
                "-blockdev",
                FILE,
                "-blockdev",
                "raw,node-name=late,offset=65536,file=f0",
                "-blockdev",
                "null-co,node-name=none,read-zeroes=on,size=1048576",
            ],
        ),
        (
            "one that begins elsewhere now, made anew by the same name",
            &["-blockdev", FILE, "-blockdev", "driver=raw,node-name=d0,file=f0,size=1M"],
            live(&[], &[F0, ("d0", "raw", from, inner)]),
            &["-blockdev", FILE, "-blockdev", "raw,node-name=d0,file=f0,offset=65536"],
        ),
        (
            "one that begins where it began",
            &["-blockdev", FILE, "-blockdev", "driver=raw,node-name=d0,offset=64k,file=f0"],
            live(&[], &[F0, ("d0", "raw", from, inner)]),
            &["-blockdev", FILE, "-blockdev", "driver=raw,node-name=d0,offset=64k,file=f0"],
        ),
    ];
    for (what, before, live, after) in table {
        let (followed, reasons) = follow(&arguments(before), "pc", &live);
        assert_eq!((followed, reasons), (arguments(after), vec![]), "{what}");
    }
}

#[test]
fn i6_a_drive_whose_medium_begins_elsewhere_is_refused() {
    let from = "json:{\"driver\": \"raw\", \"offset\": 65536, \"file\": {}}";
    let inserted = [("late", "raw", from, &[("file", "#f")][..]), ("#f", "file", "/a.iso", &[][..])];
    let (_, reasons) =
        follow(&arguments(&["-drive", CD]), "pc", &live(&[("cd0", "cd", Some("late"))], &inserted));
    let told = "drive cd shows node late, whose offset=65536 a -drive cannot be given; eject it \
                (blockdev-remove-medium)";
    assert_eq!(reasons, [told]);
}

#[test]
fn a_device_without_an_id_that_shows_another_node_is_refused() {
    let live = live(&[("", "/machine/peripheral-anon/device[0]/virtio-backend", Some("over"))], &[D0, F0]);
    let (_, reasons) =
        follow(&arguments(&["-blockdev", DISK, "-device", "virtio-blk-pci,drive=d0"]), "pc", &live);
    let told =
        "device virtio-blk-pci has no id, and shows another node than d0 now; restart the VM with id= for it";
    assert_eq!(reasons, [told]);
}

#[test]
fn the_chain_of_an_image_is_what_qemu_has_open() {
    let live = live(
        &[],
        &[
            ("top", "qcow2", "/top", &[("file", "#1"), ("backing", "#2")]),
            ("#1", "file", "/top", &[]),
            ("#2", "qcow2", "/base", &[("file", "#3")]),
            ("#3", "file", "/base", &[]),
        ],
    );
    assert_eq!(live.chain("top"), ["/top", "/base"]);
    assert_eq!(live.images().collect::<Vec<_>>(), ["#2", "top"]);
}

#[test]
fn a_drive_without_an_id_must_have_what_it_was_started_with() {
    let drive = arguments(&["-drive", "if=ide,media=cdrom,file=/a.iso,format=raw"]);
    let a = ("#block1", "raw", "/a.iso", &[][..]);
    let (_, reasons) = follow(&drive, "pc", &live(&[("ide1-cd0", "", Some("#block1"))], &[a]));
    assert_eq!(reasons, Vec::<String>::new());
    let (_, reasons) = follow(&drive, "pc", &live(&[("ide1-cd0", "", None)], &[]));
    assert!(reasons.len() == 1 && reasons[0].contains("the drive of /a.iso has no id"), "{reasons:#?}");
}
