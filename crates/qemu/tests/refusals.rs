//! Why some QEMUs cannot be taken charge of, and some hosts cannot take a VM over.

mod common;

use common::{ends::Folder, hand::*, *};
use ports::Machine;
use qemu::{Vm, VmFile, qmp::Qmp, recipe::Backing};
use serde_json::json;
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

#[test]
fn memory_that_no_option_names_is_found_by_the_machines_word() {
    let backend = "memory-backend-ram,id=mine,size=64M";
    let rows: [(&[&str], &str); 4] = [
        (&["-machine", "q35", "-m", "64M"], "pc.ram"),
        (&["-machine", "microvm", "-m", "64M"], "microvm.ram"),
        (&["-machine", "pc", "-m", "64M", "-mem-path", "/tmp"], "pc.ram"),
        (&["-machine", "pc,memory-backend=mine", "-m", "64M", "-object", backend], "mine"),
    ];
    for (words, name) in rows {
        let hand = ByHand::start(&[&["-nodefaults"], words].concat());
        let adopted = Vm::adopt("hand", &hand.qmp).unwrap();
        let recipe = adopted.vm.recipe();
        assert_eq!(recipe.main_memory.as_deref(), Some(name), "{words:?}");
        let block = &recipe.memory[0];
        assert_eq!((block.id.as_str(), block.bytes, block.backing), (name, 64 << 20, Backing::Memfd));
        has(&adopted.notes, "it must live until all of it has");
    }
}

#[test]
fn every_reason_is_told_at_once() {
    let disks = Folder::new();
    File::create(disks.path().join("a.img")).unwrap().set_len(1 << 20).unwrap();
    let drive = format!("file={},format=raw,if=none,id=d,cache=none", disks.path().join("a.img").display());
    let hand = ByHand::start(&line(&format!(
        "-machine q35 -m 64M -drive {drive} -device virtio-blk-pci,drive=d \
         -device virtio-crypto-pci,cryptodev=crypto -object cryptodev-backend-builtin,id=crypto \
         -netdev user,id=u -device virtio-net-pci,netdev=u -device pcie-root-port,id=rp0 \
         -chardev socket,id=c,path=/tmp/x,server=on,wait=off \
         -object memory-backend-ram,id=m,size=1M,share=on -device ivshmem-plain,memdev=m"
    )));
    let mut qmp = Qmp::connect(&hand.qmp).unwrap();
    qmp.execute("device_add", json!({ "driver": "virtio-rng-pci", "bus": "rp0", "id": "late" })).unwrap();
    drop(qmp);
    let reasons = hand.refusal();
    for what in ["virtio-crypto-pci): QEMU does not migrate it", "ivshmem"] {
        has(&reasons, what);
    }
    // What was plugged in is carried over.
    assert!(!reasons.iter().any(|reason| reason.contains("late")), "{reasons:#?}");
    let _ = fs::remove_file("/tmp/x");
}

#[test]
fn a_busy_monitor_is_told_from_a_dead_one() {
    let hand = ByHand::start(SHARED);
    let holder = Qmp::connect(&hand.qmp).unwrap();
    let error = Vm::adopt("hand", &hand.qmp).unwrap_err().to_string();
    assert!(error.contains("serves one client at a time"), "{error}");
    drop(holder);
    Vm::adopt("hand", &hand.qmp).unwrap();
}

#[test]
fn a_target_tells_every_reason_why_it_cannot() {
    let folder = Folder::new();
    let kernel = folder.path().join("kernel");
    fs::write(&kernel, "one").unwrap();
    let disk = folder.path().join("disk");
    fs::write(&disk, "disk").unwrap();
    let source = host(folder.path(), "source", None);
    let text = format!(
        "name = \"picky\"\nmemory = \"64MiB\"\nkernel = {kernel:?}\n[[disk]]\npath = {disk:?}\nformat = \
         \"raw\"\n\
         [[net]]\nbridge = \"nobr0\"\n"
    );
    let mut recipe = recipe(&text, &source);
    fs::write(&kernel, "two").unwrap();
    // The source has another one that looks the same.
    let other = folder.path().join("other");
    fs::write(&other, "disk").unwrap();
    let there = |path: &Path| if path == disk { other.clone() } else { path.to_owned() };
    recipe.memory[0].bytes = 8 << 40;
    recipe.qemu.major = 99;
    recipe.accel = qemu::recipe::Accel::Kvm;
    let reasons = preflight_of(&recipe, &source, there);
    for what in [
        "older than the 99",
        "KVM",
        "no bridge nobr0",
        "that the source uses",
        "with the source's content",
        "8.0 TiB",
    ] {
        has(&reasons, what);
    }
    assert_eq!(reasons.len(), 6, "{reasons:#?}");
    recipe.qemu.major = 7;
    recipe.machine = "pc-q35-99.0".to_owned();
    has(&preflight(&recipe, &source), "has no machine pc-q35-99.0");
}

#[test]
fn what_a_real_qemu_can_be_given_is_refused_for_what_it_is() {
    let hand = ByHand::start(&line(
        "-nodefaults -machine q35,memory-backend=mem -m 64M,slots=2,maxmem=512M \
         -object memory-backend-memfd,id=mem,size=64M,share=on \
         -object memory-backend-memfd,id=more,size=64M,share=on -device qemu-xhci \
         -device usb-host,vendorid=0xfff0,productid=0xfff0,id=stick",
    ));
    let mut qmp = Qmp::connect(&hand.qmp).unwrap();
    let backend =
        json!({ "qom-type": "memory-backend-memfd", "id": "late", "size": 64 << 20, "share": true });
    qmp.execute("object-add", backend).unwrap();
    qmp.execute("device_add", json!({ "driver": "pc-dimm", "memdev": "late", "id": "dimm" })).unwrap();
    drop(qmp);
    let reasons = hand.refusal();
    has(&reasons, "device stick (usb-host): it is a USB device of this host");
    assert!(!reasons.iter().any(|reason| reason.contains("late") || reason.contains("dimm")), "{reasons:#?}");
}

/// A qcow2 image over another one, over a raw one: `top.qcow2`, `middle.qcow2`, `base.img`.
fn overlays(folder: &Path) -> PathBuf {
    File::create(folder.join("base.img")).unwrap().set_len(1 << 20).unwrap();
    for (image, over, format) in [("middle.qcow2", "base.img", "raw"), ("top.qcow2", "middle.qcow2", "qcow2")]
    {
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-b", over, "-F", format, image])
            .current_dir(folder)
            .status()
            .unwrap();
        assert!(made.success());
    }
    folder.join("top.qcow2")
}

#[test]
fn a_backing_file_that_the_target_lacks_is_named_first() {
    let folder = Folder::new();
    let top = overlays(folder.path());
    let host = host(folder.path(), "host", None);
    let text = format!("name = \"over\"\nmemory = \"64MiB\"\n[[disk]]\npath = {top:?}\nformat = \"qcow2\"\n");
    let run = recipe(&text, &host);

    let drive = format!("file={},format=qcow2,if=none,id=d", top.display());
    let hand = ByHand::start(&with(&["-drive", &drive, "-device", "virtio-blk-pci,drive=d"]));
    let vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
    let adopted = vm.recipe().clone();
    // It starts there while the source has it open.
    Vm::incoming(&adopted, &host).unwrap().destroy().unwrap();
    drop(vm);

    for recipe in [run, adopted] {
        assert_eq!(preflight(&recipe, &host), Vec::<String>::new());
        let (base, away) = (folder.path().join("base.img"), folder.path().join("away"));
        fs::rename(&base, &away).unwrap();
        let there = |path: &Path| if path == base { away.clone() } else { path.to_owned() };
        let reasons = preflight_of(&recipe, &host, there);
        assert_eq!(reasons.len(), 1, "{reasons:#?}");
        has(&reasons, "base.img is not shown to be the file that the source uses");
        // Another file in its place is no better, and looks no different to the source.
        fs::copy(&away, &base).unwrap();
        assert_eq!(preflight_of(&recipe, &host, there), reasons);
        fs::rename(&away, &base).unwrap();
    }
}

#[test]
fn an_image_whose_backing_file_is_not_there_is_not_run() {
    let folder = Folder::new();
    let top = overlays(folder.path());
    fs::remove_file(folder.path().join("middle.qcow2")).unwrap();
    let text = format!("name = \"over\"\nmemory = \"64MiB\"\n[[disk]]\npath = {top:?}\nformat = \"qcow2\"\n");
    let file = VmFile::parse(&text, Path::new("over.toml")).unwrap();
    let reasons = file.recipe(&host(folder.path(), "host", None)).unwrap_err();
    assert_eq!(reasons.len(), 1, "{reasons:#?}");
    has(&reasons, "middle.qcow2: No such file or directory");
}
