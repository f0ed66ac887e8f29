//! A microvm under the host's KVM, handed from one QEMU to another. It has no operating system: where KVM
//! only interprets, that would take minutes.

mod common;

use common::{ends::Folder, hand::ByHand, host, moved::copy, skip};
use ports::{Machine, RunState};
use qemu::Vm;
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    process::Command,
    time::{Duration, Instant},
};

/// Where the guest counts.
const COUNTER: u64 = 0x1000;

/// Firmware of 64 KiB that counts without end: `inc dword [0x1000]; jmp`, and a jump to it where a processor
/// begins.
fn firmware() -> Vec<u8> {
    const RESET: usize = 0xfff0;
    let mut bytes = vec![0; 64 << 10];
    bytes[..7].copy_from_slice(&[0x66, 0xff, 0x06, 0x00, 0x10, 0xeb, 0xf9]);
    bytes[RESET..RESET + 5].copy_from_slice(&[0xea, 0x00, 0x00, 0x00, 0xf0]);
    bytes
}

fn counter(vm: &mut Vm) -> u32 {
    let said = vm.qmp().human(&format!("xp /1wx {COUNTER:#x}")).unwrap();
    let word = said.split_whitespace().find_map(|word| word.strip_prefix("0x")).unwrap();
    u32::from_str_radix(word, 16).unwrap()
}

/// Waits until it has counted on.
fn counts(vm: &mut Vm) {
    let (before, end) = (counter(vm), Instant::now() + Duration::from_secs(60));
    while counter(vm) == before {
        assert!(Instant::now() < end, "it does not count on from {before}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a guest of ours runs under the KVM of this host, however slowly.
fn kvm_runs() -> Result<(), String> {
    let ran = sys::kvm::measure().map_err(|error| error.to_string())?;
    if ran.turns > 0 { Ok(()) } else { Err("KVM runs no guest".to_owned()) }
}

#[test]
fn i9_a_microvm_counts_on_under_kvm_in_another_qemu() {
    if let Err(why) = kvm_runs() {
        return skip("a microvm under KVM", &why);
    }
    let folder = Folder::new();
    let bios = folder.path().join("count.bin");
    fs::write(&bios, firmware()).unwrap();
    let hand = ByHand::start_by(
        Command::new("qemu-system-x86_64"),
        &[
            "-nodefaults",
            "-machine",
            "microvm,memory-backend=mem",
            "-accel",
            "kvm",
            "-smp",
            "2",
            "-m",
            "64M",
            "-object",
            "memory-backend-memfd,id=mem,size=64M,share=on",
            "-bios",
            bios.to_str().unwrap(),
        ],
    );
    let mut vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
    assert_eq!(vm.recipe().accel.word(), "kvm");
    counts(&mut vm);
    let target = host(hand.folder.path(), "target", None);
    let mut next = Vm::incoming(vm.recipe(), &target).unwrap();
    let words = fs::read(next.process().proc_path("cmdline")).unwrap();
    assert!(String::from_utf8_lossy(&words).contains("-accel\0kvm"), "it waits under KVM, too");
    vm.stop().unwrap();
    let seen = |vm: &mut Vm| (counter(vm), vm.qmp().human("info registers -a").unwrap());
    let before = seen(&mut vm);
    let state = vm.save().unwrap().state;
    copy(&vm, &next);
    next.load(&state).unwrap();
    assert_eq!(seen(&mut next), before);
    next.restore(RunState::Running).unwrap();
    counts(&mut next);
    // What it has counted there is not counted here: they share no memory.
    let (mut here, memory) = ([0; 4], File::open(vm.process().proc_path("mem")).unwrap());
    memory.read_exact_at(&mut here, vm.ram_blocks()[0].hva + COUNTER).unwrap();
    assert_eq!(u32::from_le_bytes(here), before.0);
    next.destroy().unwrap();
    // One that comes to nothing leaves the guest here as it was.
    vm.restore(RunState::Running).unwrap();
    counts(&mut vm);
}
