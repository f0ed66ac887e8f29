//! QEMUs that were started by hand: what is learned of them, and that they are taken over as they are.

mod common;

use common::{
    ends::{Ended, Folder},
    hand::*,
    *,
};
use ports::{Machine, RunState};
use qemu::{Host, OpenError, Vm, qmp::Qmp};
use std::{
    fs::{self, File},
    os::{
        fd::OwnedFd,
        unix::{fs::FileExt, net::UnixListener},
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// The letters on the VGA card's screen.
fn screen(vm: &mut Vm) -> String {
    let dump = vm.qmp().human("xp /4000xb 0xb8000").unwrap();
    let bytes =
        dump.split_whitespace().filter_map(|word| u8::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    let letters: String =
        bytes.step_by(2).map(char::from).filter(|letter| letter.is_ascii_graphic()).collect();
    letters
}

#[test]
fn what_is_learned_of_a_vm_starts_the_same_vm_elsewhere() {
    let disks = Folder::new();
    File::create(disks.path().join("a.img")).unwrap().set_len(1 << 20).unwrap();
    let drive = format!("driver=file,node-name=f,filename={}", disks.path().join("a.img").display());
    let ram = disks.path().join("ram");
    let object = format!("memory-backend-file,id=mem,size=64M,share=on,mem-path={}", ram.display());
    let hand = ByHand::start(&line(&format!(
        "-nodefaults -machine q35,memory-backend=mem -m 64M -object {object} -smp 2 -cpu qemu64,+ssse3 \
         -vga std -serial file:/dev/null -device virtio-rng-pci -blockdev {drive} \
         -blockdev driver=raw,node-name=d,file=f -device virtio-blk-pci,drive=d,id=disk"
    )));
    let adopted = Vm::adopt("hand", &hand.qmp).unwrap();
    let mut vm = adopted.vm;
    // Whether its memory is on a disk depends on where temporary files are.
    let notes: Vec<_> = adopted.notes.iter().filter(|note| !note.contains("is a file on a disk")).collect();
    assert_eq!(notes, ["the serial port (file:/dev/null) goes to a file on the target, hand.console"]);
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
    assert_eq!(preflight(vm.recipe(), &host), Vec::<String>::new());
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
    let state = vm.save().unwrap().state;
    let carried = |name: &str| state.private.iter().any(|(block, _)| block.ends_with(name));
    assert!(carried("vga.vram") && carried("pc.bios"), "video memory and firmware");
    next.load(&state).unwrap();
    assert_eq!(screen(&mut next), seen);
    next.restore(RunState::Running).unwrap();
    assert_eq!(next.status().unwrap(), "running");
    // The handle finds it again, as after a restart of the agent.
    let handle = next.handle();
    drop(next);
    let mut again = Vm::reopen(&handle).unwrap();
    again.restore(RunState::Running).unwrap();
    again.destroy().unwrap();
    again.destroy().unwrap();
    assert!(matches!(Vm::reopen(&handle), Err(OpenError::Gone { .. })));
}

#[test]
fn a_rollback_leaves_the_guest_running_with_its_disk() {
    let disks = Folder::new();
    File::create(disks.path().join("a.img")).unwrap().set_len(1 << 20).unwrap();
    let drive = format!("driver=file,node-name=f,filename={}", disks.path().join("a.img").display());
    // As another user, as careful people run it.
    let hand = ByHand::start(&with(&line(&format!(
        "-runas nobody -blockdev {drive} -blockdev driver=raw,node-name=d,file=f \
         -device virtio-blk-pci,drive=d,id=disk"
    ))));
    let mut vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
    for _ in 0..3 {
        vm.stop().unwrap();
        vm.stop().expect_err("it is stopped already");
        vm.save().unwrap();
        vm.save().expect_err("it is saved already");
        vm.restore(RunState::Running).unwrap();
        vm.restore(RunState::Running).unwrap();
        vm.announce().unwrap();
        assert_eq!(vm.status().unwrap(), "running");
    }
    vm.save().expect_err("it runs");
    vm.load(&Default::default()).expect_err("it does not wait for a state");
}

#[test]
fn a_broken_state_is_qemus_error_and_nothing_stays() {
    let hand = ByHand::start(SHARED);
    let mut vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
    let host = host(hand.folder.path(), "target", None);
    vm.stop().unwrap();
    let mut state = vm.save().unwrap().state;
    state.stream.truncate(state.stream.len() / 2);
    let mut next = Vm::incoming(vm.recipe(), &host).unwrap();
    next.restore(RunState::Running).expect_err("nothing has been loaded");
    let error = next.load(&state).unwrap_err().to_string();
    assert!(error.contains("load the device state of hand"), "{error}");
    let kept = hand.folder.path().join("target/hand.failed.log");
    assert!(error.contains("its last words:") && error.contains(&kept.display().to_string()), "{error}");
    next.destroy().unwrap();
    let stays: Vec<_> =
        fs::read_dir(hand.folder.path().join("target")).unwrap().flatten().map(|e| e.path()).collect();
    assert_eq!(stays, std::slice::from_ref(&kept));
    let words = fs::read_to_string(kept).unwrap();
    assert!(words.contains("load of migration failed") || words.contains("error"), "{words}");
    vm.restore(RunState::Running).unwrap();
}

#[test]
fn two_equal_memory_blocks_are_told_apart() {
    let two = |qemu: PathBuf| {
        let hand = ByHand::start_with(
            qemu,
            &line(
                "-nodefaults -machine q35 -m 128M -smp 2 \
                 -object memory-backend-memfd,id=one,size=64M,share=on \
                 -object memory-backend-memfd,id=two,size=64M,share=on -numa node,memdev=two \
                 -numa node,memdev=one",
            ),
        );
        let mut vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
        vm.stop().unwrap();
        let names: Vec<_> = vm.ram_blocks().iter().map(|block| block.name.clone()).collect();
        assert_eq!(names, ["one", "two"]);
        // Node 0 is `two`: guest address 32 MiB lies in it, 64 + 32 MiB in `one`. Write from outside, ask
        // QEMU.
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
fn qemus_own_words_are_heard_when_it_does_not_start() {
    let folder = Folder::new();
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
fn a_network_card_has_its_tap_while_the_vm_is_there() {
    let bridge = Bridge(format!("wt{}", std::process::id()));
    let made = Command::new("ip").args(["link", "add", &bridge.0, "type", "bridge"]).status().unwrap();
    if !made.success() {
        return skip("a network card and its TAP", "no right to make a bridge");
    }
    let ports = || {
        let listed = Command::new("ip").args(["-o", "link", "show", "master", &bridge.0]).output().unwrap();
        String::from_utf8(listed.stdout).unwrap().lines().count()
    };
    let folder = Folder::new();
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
    vm.restore(RunState::Running).unwrap();
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

/// Also when the test fails, none of its machines stays.
struct Swept(Host);

impl Drop for Swept {
    fn drop(&mut self) {
        qemu::launch::sweep("vm", &self.0);
    }
}

#[test]
fn only_what_a_killed_agent_had_begun_is_swept() {
    let folder = Folder::new();
    let host = |owner: &str| Host { owner: owner.into(), ..host(folder.path(), "host", None) };
    let ours = host("ours");
    let _swept = Swept(ours.clone());
    let recipe = recipe("name = \"vm\"\nmemory = \"64MiB\"\n", &ours);
    let incoming = |host: &Host| Vm::incoming(&recipe, host).unwrap();
    let (lost, known, dead) = (incoming(&ours), incoming(&ours), incoming(&ours));
    let (others, runs) = (incoming(&host("others")), Vm::run(&recipe, &ours).unwrap());
    let pid = |vm: &Vm| rustix::process::Pid::from_raw(vm.process().pid()).unwrap();
    rustix::process::kill_process(pid(&dead), rustix::process::Signal::KILL).unwrap();
    let noted = |vm: &Vm| vm.belongings().qmp.with_extension("belongings");
    let notes = [&lost, &dead, &known, &others, &runs].map(noted);
    let (known_qmp, lost_pid, runs_pid) = (known.belongings().qmp.clone(), pid(&lost), pid(&runs));
    // With them go their connections, as with an agent that is killed.
    drop([lost, known, runs, dead, others]);
    assert_eq!(qemu::launch::sweep_others(&[&known_qmp], &ours), 2);
    assert_eq!(notes.map(|note| note.exists()), [false, false, true, true, true]);
    // One that has ended may not have been collected yet, but runs nothing any more.
    let lives =
        |pid: rustix::process::Pid| Path::new(&format!("/proc/{}/exe", pid.as_raw_nonzero())).exists();
    assert!(!lives(lost_pid) && lives(runs_pid), "a guest that runs is nobody's to end");
    assert_eq!(qemu::launch::sweep("vm", &ours), 3);
    assert!(!lives(runs_pid));
}

/// It may be ending by itself, or another client may hold its monitor: an arrival that comes to nothing
/// leaves no trace all the same.
#[test]
fn a_waiting_qemu_that_does_not_answer_is_ended_too() {
    let folder = Folder::new();
    let host = host(folder.path(), "host", None);
    let _swept = Swept(host.clone());
    let recipe = recipe("name = \"vm\"\nmemory = \"64MiB\"\n", &host);
    let waits = Vm::incoming(&recipe, &host).unwrap();
    let (handle, pid) = (waits.handle(), waits.process().pid());
    let stopped = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(stopped, rustix::process::Signal::STOP).unwrap();
    drop(waits);
    assert!(matches!(Vm::reopen(&handle), Err(OpenError::Qmp(_))), "nobody answers");
    qemu::launch::discard(&handle.belongings).unwrap();
    assert!(!Path::new(&format!("/proc/{pid}/exe")).exists());
    assert!(!handle.belongings.qmp.exists());
    qemu::launch::discard(&handle.belongings).unwrap();
}

#[test]
fn memory_modules_that_it_was_started_with_follow_the_vm() {
    let folder = Folder::new();
    let path = |id: &str| folder.path().join(id);
    let object = |id: &str, size: &str| {
        format!("memory-backend-file,id={id},size={size},share=on,mem-path={}", path(id).display())
    };
    let hand = ByHand::start(&[
        "-nodefaults",
        "-machine",
        "q35,memory-backend=mem",
        "-m",
        "64M,slots=2,maxmem=512M",
        "-object",
        &object("mem", "64M"),
        "-object",
        &object("module", "32M"),
        "-device",
        "pc-dimm,memdev=module,id=dimm",
    ]);
    let mut vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
    assert_eq!(vm.recipe().memory_bytes(), 96 << 20);
    let mut host = host(hand.folder.path(), "target", None);
    host.shared_memory = ["mem", "module"].map(|id| (id.to_owned(), path(id))).into();
    let mut next = Vm::incoming(vm.recipe(), &host).unwrap();
    let names = |vm: &Vm| vm.ram_blocks().iter().map(|block| block.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&vm), ["mem", "module"]);
    assert_eq!(names(&next), names(&vm));
    vm.stop().unwrap();
    next.load(&vm.save().unwrap().state).unwrap();
    next.restore(RunState::Running).unwrap();
    assert_eq!(next.status().unwrap(), "running");
    next.destroy().unwrap();
}

#[test]
fn a_qemu_is_found_behind_a_socket_that_its_launcher_made() {
    let folder = Folder::new();
    let path = folder.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-display", "none"]);
    let monitor = ["-chardev", "socket,id=mon,fd=0,server=on,wait=off", "-mon", "chardev=mon,mode=control"];
    command.args(with(&monitor)).stdin(OwnedFd::from(listener));
    let mut child = Ended(command.spawn().unwrap());
    // Greeted only once QEMU is ready.
    let qmp = Qmp::connect_within(&path, Duration::from_secs(60)).unwrap();
    let launcher = std::process::id() as i32;
    assert_eq!(sys::process::peer_pid(qmp.socket()).unwrap(), launcher, "the kernel names who listened");
    drop(qmp);
    let mut vm = Vm::adopt("hand", &path).unwrap().vm;
    assert_eq!(vm.process().pid(), child.0.id() as i32, "QEMU's own threads say who it is");
    vm.stop().unwrap();
    vm.restore(RunState::Running).unwrap();
    // Found again, as after a restart of the agent.
    let handle = vm.handle();
    drop(vm);
    assert_eq!(Vm::reopen(&handle).unwrap().process().pid(), child.0.id() as i32);
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    assert!(matches!(Vm::reopen(&handle), Err(OpenError::Gone { .. })));
}
