//! A guest's RAM, a memfd, is handed from one QEMU to another by its descriptor: not copied, not doubled, and
//! not changed by the other until the guest runs there.

mod common;

use attach::{Memory, Source, SwitchingTracker, Target, Tracking};
use common::{ends::Folder, *};
use ports::{GuestMemory, Machine, Nonce, Reached, RunState, Tracker};
use qemu::{Host, Recipe, Vm};
use std::{
    fs::File,
    hash::{DefaultHasher, Hasher},
    os::fd::AsRawFd,
    path::PathBuf,
    time::Duration,
};
use units::{BlockId, MemorySet, PageIndex, PageRange};

const RAM: BlockId = BlockId(0);

/// No machine of VM files, but of adopted VMs.
const PC: &str = "pc-i440fx-7.2";

/// What is where in it.
fn content(memory: &Memory) -> u64 {
    let mut hasher = DefaultHasher::new();
    for run in memory.present(RAM).unwrap().runs().flat_map(|run| run.pieces(256)) {
        let mut bytes = vec![0; run.bytes().0 as usize];
        memory.read(RAM, run, &mut bytes).unwrap();
        hasher.write_u64(run.start.0);
        hasher.write(&bytes);
    }
    hasher.finish()
}

/// A second QEMU for the guest, which maps this file; and its RAM. The nonce is found through its mapping.
fn second(recipe: &Recipe, host: &Host, file: &File, nonce: Nonce) -> (Vm, Target) {
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let host = Host { shared_memory: [("ram0".to_owned(), path)].into(), ..host.clone() };
    let next = Vm::incoming(recipe, &host).unwrap();
    let (target, reached) =
        Target::open_reaching(next.process().pid(), next.ram_blocks(), &[RAM].into()).unwrap();
    assert_eq!(reached, [Reached { block: RAM, nonce }]);
    (next, target)
}

/// Sees each write of a QEMU to this guest's RAM, also one that changes nothing.
fn writes(vm: &Vm) -> SwitchingTracker {
    let how = Tracking { writers: 2, max_stall: Duration::from_millis(20), synchronous: false, group: None };
    let source = Source::open(vm.process().pid(), vm.ram_blocks()).unwrap();
    let mut tracker = source.switching(how).unwrap();
    tracker.begin().unwrap();
    tracker
}

/// How many pages of it were written.
fn written(tracker: &mut SwitchingTracker, vm: &Vm) -> u64 {
    let mut dirty = MemorySet::empty(vm.ram_blocks().iter().map(|block| block.bytes / 4096));
    tracker.collect(&mut dirty).unwrap();
    dirty.len()
}

/// Hands a guest over: once in vain, and once for good.
fn is_handed_over(name: &str, machine: &str, vga: &str, from: Option<PathBuf>, to: Option<PathBuf>) {
    let Some((kernel, initrd)) = guest() else { return };
    let folder = Folder::new();
    let disk = folder.path().join("disk.img");
    File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let source = host(folder.path(), "a", from);
    let named = if machine == PC { "q35" } else { machine };
    let text = format!(
        "name = \"{name}\"\nvcpus = 2\nmemory = \"256MiB\"\naccel = \"tcg\"\nkernel = {kernel:?}\n\
         initrd = {initrd:?}\ncmdline = {:?}\nmachine = {named:?}\nvga = {vga:?}\n\
         [[disk]]\npath = {disk:?}\nformat = \"raw\"\n",
        command_line(machine),
    );
    let mut of_file = recipe(&text, &source);
    if machine == PC {
        of_file.machine = PC.to_owned();
    }
    let mut guest = Vm::run(&of_file, &source).unwrap();
    counts_beyond(guest.console().unwrap(), (5, 5));
    let ram = Source::open(guest.process().pid(), guest.ram_blocks()).unwrap();
    let memory = ram.memory();
    let nonce = Nonce::new(0x1234_5678_9abc_def0);
    let lent = ram.lend(RAM, nonce).unwrap().expect("its RAM is a memfd");
    let target = host(folder.path(), "b", to);
    let recipe = Recipe { virtio: guest.accepted_of_virtio().unwrap(), ..guest.recipe().clone() };

    // In vain: the second QEMU has loaded the device state, and is ended.
    let (mut next, theirs) = second(&recipe, &target, lent.file(), nonce);
    let one = PageRange::new(PageIndex(1000), 1);
    theirs.memory().write(RAM, one, &[0; 4096]).expect_err("the guest runs in it");
    theirs.memory().discard(RAM, one).expect_err("the guest runs in it");
    assert_eq!(theirs.memory().allocated(), 0, "nothing of it is the second QEMU's own");
    counts_beyond(guest.console().unwrap(), counted(guest.console().unwrap()));
    guest.stop().unwrap();
    let state = guest.save().unwrap().state;
    let before = content(&memory);
    let mut tracker = writes(&next);
    next.load(&state).unwrap();
    assert_eq!(written(&mut tracker, &next), 0, "loading the device state wrote guest memory");
    assert_eq!(content(&memory), before, "loading the device state changed guest memory");
    next.destroy().unwrap();
    assert_eq!(content(&memory), before, "the end of a QEMU that never ran wrote guest memory");
    guest.restore(RunState::Running).unwrap();
    counts_beyond(guest.console().unwrap(), counted(guest.console().unwrap()));

    // For good.
    let (mut next, theirs) = second(&recipe, &target, lent.file(), nonce);
    guest.stop().unwrap();
    let state = guest.save().unwrap().state;
    let before = (content(&memory), memory.allocated());
    let mut tracker = writes(&next);
    next.load(&state).unwrap();
    assert_eq!(written(&mut tracker, &next), 0);
    assert_eq!((content(&memory), memory.allocated()), before);
    let seen = counted(guest.console().unwrap());
    guest.destroy().unwrap();
    assert_eq!(content(&theirs.memory()), before.0, "it outlives the QEMU that had made it");
    next.restore(RunState::Running).unwrap();
    counts_beyond(next.console().unwrap(), (seen.0 + 5, seen.1 + 5));
    assert!(written(&mut tracker, &next) > 0, "it would have been seen");
    drop(tracker);
    next.destroy().unwrap();
}

#[test]
fn i3_a_q35_guest_is_handed_over_and_its_ram_not_written() {
    is_handed_over("q35", "q35", "std", None, None);
}

#[test]
fn i3_a_pc_guest_is_handed_over_and_its_ram_not_written() {
    is_handed_over("pc", PC, "std", None, None);
}

#[test]
fn i3_a_microvm_guest_is_handed_over_and_its_ram_not_written() {
    is_handed_over("micro", "microvm", "none", None, None);
}

#[test]
fn i3_a_guest_is_handed_over_to_a_newer_qemu() {
    if let Some(qemu_10) = qemu_10() {
        is_handed_over("newer", "q35", "std", None, Some(qemu_10));
    }
}

#[test]
fn memory_of_another_size_is_not_mapped() {
    let folder = Folder::new();
    let host = host(folder.path(), "a", None);
    let file = folder.path().join("ram");
    File::create(&file).unwrap().set_len(32 << 20).unwrap();
    let recipe = recipe("name = \"vm\"\nmemory = \"64MiB\"\n", &host);
    let shared = Host { shared_memory: [("ram0".to_owned(), file.clone())].into(), ..host };
    let why = Vm::incoming(&recipe, &shared).err().unwrap().to_string();
    assert!(why.contains("RAM block ram0 has 33554432 bytes, not 67108864"), "{why}");
    assert_eq!(file.metadata().unwrap().len(), 32 << 20, "nobody lengthened it");
}
