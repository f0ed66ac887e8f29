//! VMs whose command lines say things in other words: adopted for what they are, or refused for what is
//! wrong.

mod common;

use attach::{Source, Target};
use common::{ends::Folder, hand::*, *};
use ports::{GuestMemory, Machine, RunState};
use qemu::{OpenError, Vm, qmp::Qmp};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};
use units::BlockId;

/// A QEMU that was started in a directory of its own, by names that begin there. Ended when dropped.
struct Daemon(PathBuf);

impl Daemon {
    /// With `-daemonize`: its working directory is `/` then.
    fn start(folder: &Path, before: &[&str], words: &[&str]) -> Self {
        fs::create_dir_all(folder.join("images")).unwrap();
        for image in ["images/a.img", "images/b.img"] {
            if !folder.join(image).exists() {
                fs::File::create(folder.join(image)).unwrap().set_len(1 << 20).unwrap();
            }
        }
        let socket = format!("unix:{},server=on,wait=off", folder.join("qmp").display());
        let pid = folder.join("pid").display().to_string();
        let (first, more) = before.split_first().unwrap_or((&"qemu-system-x86_64", &[]));
        let mut command = Command::new(first);
        command.args(more).args([
            "-accel",
            "tcg",
            "-display",
            "none",
            "-daemonize",
            "-qmp",
            &socket,
            "-pidfile",
            &pid,
        ]);
        command.args(SHARED).args(words).current_dir(folder);
        let started = command.status().unwrap();
        assert!(started.success(), "{words:?}");
        Self(folder.to_owned())
    }

    fn adopt(&self) -> Result<Vm, Vec<String>> {
        match Vm::adopt("daemon", &self.0.join("qmp")) {
            Ok(adopted) => Ok(adopted.vm),
            Err(OpenError::Refused { reasons, .. }) => Err(reasons),
            Err(error) => panic!("{error}"),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Ok(mut qmp) = Qmp::connect_within(&self.0.join("qmp"), Duration::from_secs(10)) {
            let _ = qmp.execute("quit", serde_json::json!({}));
        }
    }
}

const DISKS: &[&str] = &[
    "-drive",
    "file=images/a.img,format=raw,if=none,id=a",
    "-device",
    "virtio-blk-pci,drive=a",
    "-blockdev",
    "driver=file,node-name=f,filename=./images/b.img",
    "-blockdev",
    "driver=raw,node-name=b,file=f",
    "-device",
    "virtio-blk-pci,drive=b,id=b",
];

fn paths(vm: &Vm) -> Vec<PathBuf> {
    vm.recipe().files.iter().map(|file| file.path.clone()).collect()
}

#[test]
fn relative_names_lead_to_what_a_daemon_has_open() {
    let folder = Folder::new();
    let folder = folder.path().canonicalize().unwrap();
    let images = ["images/a.img", "images/b.img"].map(|name| folder.join(name));
    // With a root directory of its own as well.
    let jail = folder.join("jail");
    fs::create_dir(&jail).unwrap();
    for more in [vec![], vec!["-chroot", jail.to_str().unwrap()]] {
        let words: Vec<&str> = DISKS.iter().copied().chain(more).collect();
        let daemon = Daemon::start(&folder, &[], &words);
        let mut vm = daemon.adopt().unwrap();
        assert_eq!(paths(&vm), images);
        vm.check_files().unwrap();
        let host = host(&folder, "target", None);
        assert_eq!(preflight(vm.recipe(), &host), Vec::<String>::new());
    }
}

#[test]
fn a_disk_that_is_not_what_its_name_leads_to_is_refused() {
    let folder = Folder::new();
    let folder = folder.path().canonicalize().unwrap();
    let daemon = Daemon::start(&folder, &[], DISKS);
    meddle(&folder, &mut daemon.adopt().unwrap());
    // Nor is it adopted like that.
    has(&daemon.adopt().unwrap_err(), "a.img");
    drop(daemon);
    // Two that changed names before anybody looked.
    for (image, bytes) in [("images/a.img", 1 << 20), ("images/b.img", 4096)] {
        fs::write(folder.join(image), vec![1; bytes]).unwrap();
    }
    let daemon = Daemon::start(&folder, &[], DISKS);
    for (from, to) in [("a", "c"), ("b", "a"), ("c", "b")] {
        let at = |name: &str| folder.join(format!("images/{name}.img"));
        fs::rename(at(from), at(to)).unwrap();
    }
    has(&daemon.adopt().unwrap_err(), "give the images of this VM their names back");
    drop(daemon);

    let host = host(&folder, "here", None);
    let [a, b] = ["images/a.img", "images/b.img"].map(|name| folder.join(name));
    let text = format!(
        "name = \"ours\"\nmemory = \"64MiB\"\n[[disk]]\npath = {a:?}\nformat = \"raw\"\n[[disk]]\npath = \
         {b:?}\nformat = \"raw\"\n"
    );
    let mut vm = Vm::run(&recipe(&text, &host), &host).unwrap();
    meddle(&folder, &mut vm);
    vm.destroy().unwrap();
}

/// Renames and replaces the disks of a VM, and sees what is said of that.
fn meddle(folder: &Path, vm: &mut Vm) {
    let at = |name: &str| folder.join(name);
    let mut says = |what: &str| {
        let found = vm.check_files().unwrap_err();
        has(&found, what);
        assert_eq!(found, vm.show_files("a", "1").unwrap_err());
    };
    let rename = |from: &str, to: &str| fs::rename(at(from), at(to)).unwrap();
    // The two have changed names.
    rename("images/a.img", "images/c.img");
    rename("images/b.img", "images/a.img");
    rename("images/c.img", "images/b.img");
    says("rename it back");
    rename("images/b.img", "images/c.img");
    rename("images/a.img", "images/b.img");
    // Its name is gone; another has it; it is gone itself.
    says("give the file that QEMU has open this name again");
    fs::copy(at("images/c.img"), at("images/a.img")).unwrap();
    says("is not the file that QEMU has open");
    rename("images/c.img", "images/a.img");
    fs::copy(at("images/a.img"), at("new")).unwrap();
    rename("new", "images/a.img");
    says("deleted or replaced");
}

#[test]
fn a_disk_of_another_mount_namespace_is_refused() {
    let folder = Folder::new();
    let folder = folder.path().canonicalize().unwrap();
    let other = folder.join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("a.img"), vec![1; 1 << 20]).unwrap();
    let script = "mount --bind other images && exec qemu-system-x86_64 \"$@\"";
    let image = folder.join("images/a.img").display().to_string();
    let drive = format!("file={image},format=raw,if=none,id=a");
    let words = ["-drive", &drive, "-device", "virtio-blk-pci,drive=a"];
    let daemon = Daemon::start(&folder, &["unshare", "-m", "sh", "-c", script, "sh"], &words);
    // By the same name this host has another file.
    has(&daemon.adopt().unwrap_err(), "mount it at the same path on the host");
}

fn copy_memory(from: &Vm, to: &Vm) {
    let from = Source::open(from.process().pid(), from.ram_blocks()).unwrap().memory();
    let to = Target::open(to.process().pid(), to.ram_blocks()).unwrap().memory();
    for run in from.present(BlockId(0)).unwrap().runs() {
        let mut bytes = vec![0; run.bytes().0 as usize];
        from.read(BlockId(0), run, &mut bytes).unwrap();
        to.write(BlockId(0), run, &bytes).unwrap();
    }
}

#[test]
fn other_names_of_devices_and_none_at_all_are_understood() {
    for more in [&["-device", "virtio-serial"][..], &["-device", "e1000-82540em,romfile="]] {
        let words = line(
            "-nodefaults -machine q35,memory-backend=mem -m 64M \
             -object memory-backend-ram,id=mem,size=64M,share=on -device virtio-scsi -device virtio-rng \
             -device virtio-keyboard -device virtio-tablet,id=t -device id=m,driver=virtio-mouse \
             -device qemu-xhci -device ahci",
        );
        let words: Vec<&str> = words.into_iter().chain(more.iter().copied()).collect();
        let hand = ByHand::start(&words);
        let mut vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
        let host = host(hand.folder.path(), "target", None);
        assert_eq!(preflight(vm.recipe(), &host), Vec::<String>::new());
        let mut next = Vm::incoming(vm.recipe(), &host).unwrap();
        vm.stop().unwrap();
        copy_memory(&vm, &next);
        let state = vm.save().unwrap().state;
        next.load(&state).unwrap();
        next.restore(RunState::Running).unwrap();
        next.destroy().unwrap();
    }
}
