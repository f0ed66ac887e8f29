//! QEMUs that were started by hand: what is learned of them, and why some cannot be taken charge of.

mod common;

use common::*;
use engine::ports::Machine;
use qemu::{OpenError, Vm, preflight, qmp::Qmp};
use serde_json::json;
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A QEMU with a QMP socket, ended when dropped.
struct ByHand {
    child: Child,
    qmp: PathBuf,
    folder: tempfile::TempDir,
}

impl ByHand {
    fn start(arguments: &[&str]) -> Self {
        Self::start_with("qemu-system-x86_64".into(), arguments)
    }

    fn start_with(qemu: PathBuf, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let qmp = folder.path().join("qmp");
        let child = Command::new(qemu)
            .args(["-accel", "tcg", "-display", "none"])
            .args(arguments)
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", qmp.display()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        while !qmp.exists() {
            assert!(Instant::now() < end, "QEMU does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        // Greeted only once QEMU is ready.
        drop(Qmp::connect_within(&qmp, Duration::from_secs(60)).unwrap());
        Self { child, qmp, folder }
    }

    fn refusal(&self) -> Vec<String> {
        match Vm::adopt("hand", &self.qmp) {
            Err(OpenError::Refused { reasons, .. }) => reasons,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("it was adopted"),
        }
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const SHARED: &[&str] = &[
    "-nodefaults",
    "-machine",
    "q35,memory-backend=mem",
    "-m",
    "64M",
    "-object",
    "memory-backend-memfd,id=mem,size=64M,share=on",
];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SHARED.iter().chain(more).copied().collect()
}

/// The letters on the VGA card's screen.
fn screen(vm: &mut Vm) -> String {
    let dump = vm.qmp().human("xp /4000xb 0xb8000").unwrap();
    let bytes =
        dump.split_whitespace().filter_map(|word| u8::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    let letters: String =
        bytes.step_by(2).map(char::from).filter(|letter| letter.is_ascii_graphic()).collect();
    letters
}

fn has(reasons: &[String], what: &str) {
    assert!(reasons.iter().any(|reason| reason.contains(what)), "no {what:?} in {reasons:#?}");
}

#[test]
fn what_a_vm_is_made_of_is_learned_and_starts_the_same_vm_elsewhere() {
    let disks = tempfile::tempdir().unwrap();
    File::create(disks.path().join("a.img")).unwrap().set_len(1 << 20).unwrap();
    let drive = format!("driver=file,node-name=f,filename={}", disks.path().join("a.img").display());
    let ram = disks.path().join("ram");
    let object = format!("memory-backend-file,id=mem,size=64M,share=on,mem-path={}", ram.display());
    let hand = ByHand::start(&[
        "-nodefaults",
        "-machine",
        "q35,memory-backend=mem",
        "-m",
        "64M",
        "-object",
        &object,
        "-smp",
        "2",
        "-cpu",
        "qemu64,+ssse3",
        "-vga",
        "std",
        "-serial",
        "file:/dev/null",
        "-device",
        "virtio-rng-pci",
        "-blockdev",
        &drive,
        "-blockdev",
        "driver=raw,node-name=d,file=f",
        "-device",
        "virtio-blk-pci,drive=d,id=disk",
    ]);
    let adopted = Vm::adopt("hand", &hand.qmp).unwrap();
    let mut vm = adopted.vm;
    assert_eq!(adopted.notes, ["the serial port (file:/dev/null) goes to a file on the target"]);
    assert_eq!(vm.process().pid(), hand.child.id() as i32);
    assert!(
        vm.recipe().machine.starts_with("pc-q35-7.2") || vm.version().major != 7,
        "{}",
        vm.recipe().machine
    );
    assert_eq!((vm.recipe().memory_bytes(), vm.recipe().vcpus()), (64 << 20, 2));
    assert!(vm.recipe().cpu_features.iter().any(|word| word.register == "ECX"));

    let mut host = host(hand.folder.path(), "target", None);
    host.shared_memory = [("mem".to_owned(), ram)].into();
    assert_eq!(preflight::check(vm.recipe(), &host), Vec::<String>::new());
    let mut next = Vm::incoming(vm.recipe(), &host).unwrap();
    assert_eq!(next.missing_features().unwrap(), Vec::<String>::new());
    // The firmware has something to say.
    let end = Instant::now() + Duration::from_secs(60);
    while screen(&mut vm).is_empty() {
        assert!(Instant::now() < end, "nothing is on the screen");
        std::thread::sleep(Duration::from_millis(50));
    }
    vm.stop().unwrap();
    let seen = screen(&mut vm);
    let state = vm.save().unwrap();
    assert_eq!(state.private.len(), 1, "the video memory");
    next.load(&state).unwrap();
    assert_eq!(screen(&mut next), seen);
    next.resume().unwrap();
    assert_eq!(next.status().unwrap(), "running");
    // The handle finds it again, as after a restart of the agent.
    let handle = next.handle();
    drop(next);
    let mut again = Vm::reopen(&handle).unwrap();
    again.resume().unwrap();
    again.destroy().unwrap();
    again.destroy().unwrap();
    assert!(matches!(Vm::reopen(&handle), Err(OpenError::Gone { .. })));
}

#[test]
fn a_rollback_leaves_the_guest_running_with_its_disk() {
    let disks = tempfile::tempdir().unwrap();
    File::create(disks.path().join("a.img")).unwrap().set_len(1 << 20).unwrap();
    let drive = format!("driver=file,node-name=f,filename={}", disks.path().join("a.img").display());
    // As another user, as careful people run it.
    let hand = ByHand::start(&with(&[
        "-runas",
        "nobody",
        "-blockdev",
        &drive,
        "-blockdev",
        "driver=raw,node-name=d,file=f",
        "-device",
        "virtio-blk-pci,drive=d,id=disk",
    ]));
    let mut vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
    for _ in 0..3 {
        vm.stop().unwrap();
        vm.stop().unwrap();
        vm.save().unwrap();
        vm.resume().unwrap();
        vm.resume().unwrap();
        vm.announce().unwrap();
        assert_eq!(vm.status().unwrap(), "running");
    }
    vm.save().expect_err("it runs");
    vm.load(&Default::default()).expect_err("it does not wait for a state");
}

#[test]
fn a_broken_state_is_an_error_with_qemus_words_and_nothing_stays() {
    let hand = ByHand::start(SHARED);
    let mut vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
    let host = host(hand.folder.path(), "target", None);
    vm.stop().unwrap();
    let mut state = vm.save().unwrap();
    state.stream.truncate(state.stream.len() / 2);
    let mut next = Vm::incoming(vm.recipe(), &host).unwrap();
    next.resume().expect_err("nothing has been loaded");
    let error = next.load(&state).unwrap_err().to_string();
    assert!(error.contains("load the device state of hand"), "{error}");
    next.destroy().unwrap();
    assert!(fs::read_dir(hand.folder.path().join("target")).unwrap().next().is_none());
    vm.resume().unwrap();
}

#[test]
fn two_equal_memory_blocks_are_told_apart() {
    let two = |qemu: PathBuf| {
        let hand = ByHand::start_with(
            qemu,
            &[
                "-nodefaults",
                "-machine",
                "q35",
                "-m",
                "128M",
                "-smp",
                "2",
                "-object",
                "memory-backend-memfd,id=one,size=64M,share=on",
                "-object",
                "memory-backend-memfd,id=two,size=64M,share=on",
                "-numa",
                "node,memdev=two",
                "-numa",
                "node,memdev=one",
            ],
        );
        let mut vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
        vm.stop().unwrap();
        let names: Vec<_> = vm.ram_blocks().iter().map(|block| block.name.clone()).collect();
        assert_eq!(names, ["one", "two"]);
        // Node 0 is `two`: guest address 32 MiB lies in it, 64 + 32 MiB in `one`. Write from outside, ask QEMU.
        let memory = File::options().read(true).write(true).open(vm.process().proc_path("mem")).unwrap();
        for (block, gpa) in [(1, 32u64 << 20), (0, 96 << 20)] {
            let block = vm.ram_blocks()[block].clone();
            memory.write_all_at(block.name.as_bytes(), block.hva + (32 << 20)).unwrap();
            let said = vm.qmp().human(&format!("xp /3bc {gpa:#x}")).unwrap();
            let spelt: String = block.name.chars().map(|letter| format!(" '{letter}'")).collect();
            assert!(said.contains(&spelt), "{said}");
        }
    };
    two("qemu-system-x86_64".into());
    if let Some(qemu_10) = qemu_10() {
        two(qemu_10);
    }
}

#[test]
fn private_memory_is_refused_with_the_remedy() {
    let hand = ByHand::start(&["-nodefaults", "-machine", "q35", "-m", "64M"]);
    let reasons = hand.refusal();
    assert_eq!(reasons.len(), 1, "{reasons:#?}");
    has(
        &reasons,
        "-object memory-backend-memfd,id=ram0,size=67108864,share=on -machine …,memory-backend=ram0",
    );
}

#[test]
fn every_reason_is_told_at_once() {
    let disks = tempfile::tempdir().unwrap();
    File::create(disks.path().join("a.img")).unwrap().set_len(1 << 20).unwrap();
    let drive = format!("file={},format=raw,if=none,id=d,cache=none", disks.path().join("a.img").display());
    let hand = ByHand::start(&[
        "-machine",
        "q35",
        "-m",
        "64M",
        "-drive",
        &drive,
        "-device",
        "virtio-blk-pci,drive=d",
        "-device",
        "virtio-balloon-pci",
        "-netdev",
        "user,id=u",
        "-device",
        "virtio-net-pci,netdev=u",
        "-device",
        "pcie-root-port,id=rp0",
        "-chardev",
        "socket,id=c,path=/tmp/x,server=on,wait=off",
        "-object",
        "memory-backend-ram,id=m,size=1M,share=on",
        "-device",
        "ivshmem-plain,memdev=m",
    ]);
    let mut qmp = Qmp::connect(&hand.qmp).unwrap();
    qmp.execute("device_add", json!({ "driver": "virtio-rng-pci", "bus": "rp0", "id": "late" })).unwrap();
    drop(qmp);
    let reasons = hand.refusal();
    for what in [
        "is private to QEMU",
        "without -nodefaults",
        "cache.direct=on",
        "a balloon",
        "network u is of kind user",
        "ivshmem",
        "device late (virtio-rng-pci) was plugged in",
        "character device c (socket)",
    ] {
        has(&reasons, what);
    }
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
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    fs::write(&kernel, "one").unwrap();
    let disk = folder.path().join("disk");
    fs::write(&disk, "disk").unwrap();
    let source = host(folder.path(), "source", None);
    let text = format!(
        "name = \"picky\"\nmemory = \"64MiB\"\nkernel = {kernel:?}\n[[disk]]\npath = {disk:?}\nformat = \"raw\"\n\
         [[net]]\nbridge = \"nobr0\"\n"
    );
    let mut recipe = recipe(&text, &source);
    fs::write(&kernel, "two").unwrap();
    // Renamed over, so that the path leads to another file.
    fs::write(folder.path().join("other"), "disk").unwrap();
    fs::rename(folder.path().join("other"), &disk).unwrap();
    recipe.memory[0].bytes = 8 << 40;
    recipe.qemu.major = 99;
    recipe.accel = qemu::recipe::Accel::Kvm;
    let reasons = preflight::check(&recipe, &source);
    for what in ["older than the 99", "KVM", "no bridge nobr0", "disk", "its content differs", "8.0 TiB"] {
        has(&reasons, what);
    }
    assert_eq!(reasons.len(), 6, "{reasons:#?}");
    recipe.qemu.major = 7;
    recipe.machine = "pc-q35-99.0".to_owned();
    has(&preflight::check(&recipe, &source), "has no machine pc-q35-99.0");
}

#[test]
fn qemus_own_words_are_heard_when_it_does_not_start() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), "host", None);
    let mut recipe = recipe("name = \"bad\"\nmemory = \"64MiB\"\n", &host);
    recipe.cpu = "no-such-cpu".to_owned();
    let error = Vm::run(&recipe, &host).unwrap_err().to_string();
    assert!(error.contains("unable to find CPU model 'no-such-cpu'"), "{error}");
    assert!(Path::new(&host.runtime).read_dir().unwrap().next().is_none(), "nothing stays behind");
}

/// A bridge with a name of its own, gone when dropped.
struct Bridge(String);

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", "dev", &self.0]).status();
    }
}

#[test]
fn a_network_card_has_a_tap_on_its_bridge_as_long_as_the_vm_is_there() {
    let bridge = Bridge(format!("wt{}", std::process::id()));
    let made = Command::new("ip").args(["link", "add", &bridge.0, "type", "bridge"]).status().unwrap();
    if !made.success() {
        eprintln!("skipped: no right to make a bridge");
        return;
    }
    let ports = || {
        let listed = Command::new("ip").args(["-o", "link", "show", "master", &bridge.0]).output().unwrap();
        String::from_utf8(listed.stdout).unwrap().lines().count()
    };
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), "host", None);
    let text = format!(
        "name = \"net\"\nmemory = \"64MiB\"\n[[net]]\nbridge = {:?}\n[[net]]\nbridge = {:?}\n",
        bridge.0, bridge.0
    );
    let recipe = recipe(&text, &host);
    let mut vm = Vm::run(&recipe, &host).unwrap();
    assert_eq!(ports(), 2);
    let mut next = Vm::incoming(vm.recipe(), &host).unwrap();
    assert_eq!(ports(), 4, "source and target on one host do not clash");
    vm.stop().unwrap();
    next.destroy().unwrap();
    assert_eq!(ports(), 2);
    vm.resume().unwrap();
    vm.destroy().unwrap();
    assert_eq!(ports(), 0);
    let mut bad = recipe.clone();
    bad.cpu = "no-such-cpu".to_owned();
    Vm::run(&bad, &host).expect_err("there is no such CPU");
    assert_eq!(ports(), 0);
    // What an agent that died while it started a VM leaves behind.
    let lost = Vm::run(&recipe, &host).unwrap();
    let pid = lost.process().pid();
    drop(lost);
    assert_eq!(qemu::launch::sweep("net", &host), 1);
    assert_eq!(ports(), 0);
    assert!(!Path::new(&format!("/proc/{pid}/exe")).exists());
    assert_eq!(qemu::launch::sweep("net", &host), 0);
}
