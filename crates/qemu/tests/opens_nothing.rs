//! Real QEMUs are given what the allow-list lets pass, made from what they say of themselves (`-device
//! NAME,help`), with the name of a file in every place that takes one. Whoever opens that file is seen from
//! outside.

mod common;

use common::{hand::ByHand, host, recipe};
use qemu::{
    qmp::Qmp,
    recipe::{Argument, check, check_argument},
};
use rustix::fs::inotify;
use std::{
    collections::BTreeSet,
    fs,
    mem::MaybeUninit,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// A directory that nobody has a reason to look into.
struct Canary {
    folder: tempfile::TempDir,
    watch: std::os::fd::OwnedFd,
}

impl Canary {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("canary"), "sings").unwrap();
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap();
        let all = inotify::WatchFlags::OPEN
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::ACCESS
            | inotify::WatchFlags::MODIFY;
        inotify::add_watch(&watch, folder.path(), all).unwrap();
        Self { folder, watch }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// The files in it that were touched since the last look.
    fn touched(&self) -> BTreeSet<String> {
        let mut room = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.watch, &mut room);
        let mut touched = BTreeSet::new();
        while let Ok(event) = reader.next() {
            touched.extend(event.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
        touched
    }
}

fn said(qemu: &Path, arguments: &[&str]) -> String {
    let output = Command::new(qemu).args(arguments).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The properties of a device or an object: those that are no numbers and no switches.
fn properties(text: &str) -> Vec<String> {
    let harmless = ["<bool>", "<OnOffAuto>", "<int", "<uint", "<size>"];
    let property = |line: &str| {
        let (name, kind) = line.trim().split_once("=<")?;
        (!harmless.iter().any(|start| format!("<{kind}").starts_with(start))).then(|| name.to_owned())
    };
    text.lines().filter_map(property).collect()
}

/// What a device needs in order to be made at all.
fn needs(device: &str, number: usize) -> String {
    match device {
        d if d.starts_with("virtio-blk")
            || ["scsi-hd", "scsi-cd", "ide-hd", "ide-cd", "usb-storage", "sd-card", "floppy"]
                .contains(&d) =>
        {
            format!(",drive=d{number}")
        }
        "virtserialport" | "virtconsole" | "isa-serial" => format!(",chardev=c{number}"),
        d if d.starts_with("virtio-rng") => ",rng=r".to_owned(),
        _ => String::new(),
    }
}

/// Every device that may be made, with the canary's name in each property that is allowed to have it.
/// `buses`: where those on PCI go, in turn.
fn devices(qemu: &Path, canary: &Canary, buses: &[&str]) -> Vec<String> {
    // One that is only unpacked cannot list all: it looks for modules of the installed one.
    let list = said("qemu-system-x86_64".as_ref(), &["-device", "help"]);
    let names = list.lines().filter_map(|line| line.strip_prefix("name \"")?.split('"').next());
    let passes = |value: &str| check_argument(&Argument::new("-device", value), &[]).is_ok();
    let mut devices = Vec::new();
    for (n, name) in names.filter(|name| passes(name)).enumerate() {
        let help = said(qemu, &["-device", &format!("{name},help")]);
        if help.is_empty() {
            continue;
        }
        let mut value = format!("{name}{},id=dev{n}", needs(name, n));
        if let Some(bus) = buses.get(n % buses.len().max(1)).filter(|_| help.contains("multifunction=")) {
            value.push_str(&format!(",bus={bus}"));
        }
        for property in properties(&help) {
            let named = |given: &str| format!("{value},{property}={given}");
            // The last is a monitor that is ours.
            let given = [canary.path("canary"), "canary".to_owned(), "whimbrel-qmp".to_owned()];
            if let Some(longer) = given.iter().map(|given| named(given)).find(|longer| passes(longer)) {
                value = longer;
            }
        }
        assert!(passes(&value), "{value}");
        devices.push(value);
    }
    devices
}

/// What QEMU is started with for them.
fn bed(count: usize) -> Vec<String> {
    let mut bed = Vec::new();
    let mut add = |option: &str, value: String| bed.extend([option.to_owned(), value]);
    add("-object", "rng-builtin,id=r".to_owned());
    for n in 0..count {
        add("-blockdev", format!("driver=null-co,node-name=d{n},read-zeroes=on,size=1048576"));
        add("-chardev", format!("null,id=c{n}"));
    }
    for device in ["pci-bridge,id=b1,chassis_nr=1", "pci-bridge,id=b2,chassis_nr=2"] {
        add("-device", device.to_owned());
    }
    for device in ["virtio-scsi-pci,id=s", "virtio-serial-pci,id=v", "qemu-xhci,p2=15,p3=15"] {
        add("-device", device.to_owned());
    }
    bed
}

/// Descriptors of a process that lead to something with a name.
fn named_descriptors(pid: u32) -> BTreeSet<PathBuf> {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = links.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    // Two ends of one that a process has made for itself (qxl) have no name either.
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    let pairs: BTreeSet<String> = sockets
        .lines()
        .filter(|line| line.split_whitespace().count() == 7)
        .filter_map(|line| Some(format!("socket:[{}]", line.split_whitespace().last()?)))
        .collect();
    let nameless = |link: &PathBuf| {
        let link = link.to_string_lossy();
        pairs.contains(&*link)
            || link.starts_with("anon_inode:")
            || link.starts_with("/memfd:")
            || link.starts_with("pipe:")
    };
    // The first three are ours, and sockets of the monitor are there before.
    links.filter(|link| !nameless(link)).collect()
}

fn installed() -> Vec<PathBuf> {
    let other = std::env::var_os("WHIMBREL_QEMU_10").map(PathBuf::from);
    std::iter::once("qemu-system-x86_64".into()).chain(other).collect()
}

#[test]
fn devices_that_pass_open_nothing_in_a_real_qemu() {
    for qemu in installed() {
        let canary = Canary::new();
        let devices = devices(&qemu, &canary, &["pci.0", "b1", "b2"]);
        let bed = bed(100);
        let arguments: Vec<_> = ["-S", "-nodefaults", "-machine", "pc", "-m", "64M"]
            .into_iter()
            .chain(bed.iter().map(String::as_str))
            .collect();
        let hand = ByHand::start_with(qemu.clone(), &arguments);
        let mut qmp = Qmp::connect_within(&hand.qmp, Duration::from_secs(60)).unwrap();
        let before = named_descriptors(hand.child.id());
        let mut made = 0;
        for device in &devices {
            // As on a command line: the same parser, the same setters.
            let answer = qmp.human(&format!("device_add {device}")).unwrap();
            made += usize::from(answer.trim().is_empty());
            let after = named_descriptors(hand.child.id());
            assert!(after.is_subset(&before), "{device} opened {:?}", after.difference(&before));
            assert_eq!(canary.touched(), BTreeSet::new(), "{device}");
        }
        assert!(made >= 30, "only {made} of {} devices could be made", devices.len());
        let threads = fs::read_dir(format!("/proc/{}/task", hand.child.id())).unwrap();
        for thread in threads.flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            assert_eq!(children.trim(), "", "it runs a program");
        }
        // What is looked for is seen: this one does not pass.
        let harmful = format!("usb-tablet,pcap={}", canary.path("captured"));
        check_argument(&Argument::new("-device", harmful.clone()), &[]).unwrap_err();
        qmp.human(&format!("device_add {harmful}")).unwrap();
        assert!(canary.touched().contains("captured"));
    }
}

#[test]
fn objects_and_machines_take_no_name_of_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), "run", None);
    let good = recipe("name = \"web\"\nmemory = \"64MiB\"\n", &host);
    for qemu in installed() {
        let list = said(&qemu, &["-object", "help"]);
        for kind in list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.contains(' ')) {
            for property in properties(&said(&qemu, &["-object", &format!("{kind},help")])) {
                for path in ["/any/file", "file", "/dev/hwrng"] {
                    let value = format!("{kind},id=o,{property}={path}");
                    assert!(
                        check_argument(&Argument::new("-object", value.clone()), &[]).is_err(),
                        "{value}"
                    );
                }
            }
        }
        for machine in ["q35", "pc", "microvm"] {
            for property in properties(&said(&qemu, &["-machine", &format!("{machine},help")])) {
                let mut bad = good.clone();
                bad.machine = format!("{machine},{property}=/any/file");
                assert_eq!(check(&bad).len(), 1, "{}", bad.machine);
            }
        }
    }
}

/// Each in a QEMU of its own, on each machine: also what cannot be plugged in later. Takes minutes: `cargo
/// test --release -p qemu --test opens_nothing -- --ignored`.
#[test]
#[ignore = "starts several hundred QEMUs"]
fn every_device_that_passes_opens_nothing_from_the_start() {
    for qemu in installed() {
        let canary = Canary::new();
        let devices = devices(&qemu, &canary, &[]);
        for (machine, (n, device)) in ["q35", "pc", "microvm"]
            .iter()
            .flat_map(|machine| devices.iter().enumerate().map(move |d| (machine, d)))
        {
            let mut command = Command::new(&qemu);
            command.args(["-nodefaults", "-display", "none", "-machine", machine, "-m", "64M"]);
            command.args(["-object", "rng-builtin,id=r", "-chardev", &format!("null,id=c{n}")]);
            command
                .args(["-blockdev", &format!("driver=null-co,node-name=d{n},read-zeroes=on,size=1048576")]);
            // It ends by itself as soon as it is there.
            command.args(["-device", device, "-S", "-monitor", "stdio"]).stdin(std::process::Stdio::null());
            command.current_dir(canary.folder.path()).env("QEMU_AUDIO_DRV", "none");
            let mut child = command
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_millis(400));
            let _ = child.kill();
            let _ = child.wait();
            assert_eq!(canary.touched(), BTreeSet::new(), "{machine} {device}");
        }
    }
}
