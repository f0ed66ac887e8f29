//! RAM that QEMU keeps private: firmware, option ROMs, tables, video memory. Every byte of it goes with the
//! guest.

mod common;

use common::{hand::ByHand, host, qemu_10};
use ports::{Machine, RunState};
use qemu::{Vm, ram};
use std::{collections::BTreeMap, fs::File, os::unix::fs::FileExt, path::PathBuf, time::Duration};

/// The private blocks of a QEMU, by name, with what they hold. Where QEMU tells where a block lies, that is
/// where it was found; a guest that runs may write to one between two looks at it.
fn contents(vm: &mut Vm) -> BTreeMap<String, Vec<u8>> {
    const TRIES: u32 = 100;
    (0..TRIES).find_map(|_| look(vm)).expect("blocks are where QEMU says")
}

fn look(vm: &mut Vm) -> Option<BTreeMap<String, Vec<u8>>> {
    const PAGE: usize = 4096;
    let copied = vm.copy_ahead().unwrap();
    let listed = ram::listed(vm.qmp()).unwrap();
    let memory = File::open(vm.process().proc_path("mem")).unwrap();
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap()) as usize;
    let mut found = BTreeMap::new();
    for (name, packed) in copied {
        let listed = listed.iter().find(|listed| listed.name == name).unwrap();
        let mut bytes = vec![0; number(&packed[..8])];
        for page in packed[8..].chunks(8 + PAGE) {
            let at = number(&page[..8]) * PAGE;
            bytes[at..at + page.len() - 8].copy_from_slice(&page[8..]);
        }
        if let Some(hva) = listed.hva {
            let mut told = vec![0; bytes.len()];
            memory.read_exact_at(&mut told, hva).unwrap();
            if told != bytes {
                return None;
            }
        }
        found.insert(name, bytes);
    }
    Some(found)
}

/// What is at the guest's reset vector: a jump, unless the firmware is lost.
fn reset_vector(vm: &mut Vm) -> String {
    vm.qmp().human("xp /4xb 0xfffffff0").unwrap()
}

/// The blocks that differ. A larger firmware may hold the source's at its end.
fn differing(there: &BTreeMap<String, Vec<u8>>, here: &BTreeMap<String, Vec<u8>>) -> Vec<String> {
    let same = |name: &String| match (there.get(name), here.get(name)) {
        (Some(there), Some(here)) if name == "pc.bios" => here.ends_with(there),
        (there, here) => there == here,
    };
    there.keys().chain(here.keys()).filter(|name| !same(name)).cloned().collect()
}

const Q35: &[&str] = &["-machine", "q35,memory-backend=mem", "-vga", "std", "-device", "virtio-rng-pci"];
const PC: &[&str] = &["-machine", "pc,memory-backend=mem", "-vga", "std"];
const MICROVM: &[&str] = &["-machine", "microvm,memory-backend=mem"];

#[test]
fn i9_every_private_byte_is_at_the_target_and_its_guest_resets() {
    let old = PathBuf::from("qemu-system-x86_64");
    let ways = [(old.clone(), None), (old, qemu_10()), (qemu_10().unwrap_or_default(), qemu_10())];
    // Each version at each end, each machine; not all nine, which are slow on a small host.
    let rows = [(Q35, 0), (Q35, 1), (Q35, 2), (PC, 0), (PC, 1), (MICROVM, 0), (MICROVM, 1)];
    for (machine, way) in rows {
        let (from, to) = ways[way].clone();
        if way > 0 && to.is_none() {
            continue;
        }
        let usual = ["-nodefaults", "-m", "64M", "-object", "memory-backend-memfd,id=mem,size=64M,share=on"];
        let hand = ByHand::start_with(from, &[&usual, machine].concat());
        let mut vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
        let story = format!("{} to {to:?}", vm.recipe().machine);
        let target = host(hand.folder.path(), "target", to);
        let mut next = Vm::incoming(vm.recipe(), &target).unwrap();

        let ahead = vm.copy_ahead().unwrap();
        next.take_ahead(&ahead).unwrap_or_else(|error| panic!("{story}: {error}"));
        // Its firmware goes on, and asks for its tables anew.
        vm.qmp().execute("system_reset", serde_json::json!({})).unwrap();
        let reset = vm.qmp().wait_event(Duration::from_secs(60), |event| event.name == "RESET").unwrap();
        assert!(reset.is_some(), "{story}");
        vm.stop().unwrap();
        let state = vm.save().unwrap().state;
        next.load(&state).unwrap_or_else(|error| panic!("{story}: {error}"));
        // It answers again, and does nothing.
        vm.restore(RunState::Paused).unwrap();
        let (there, here) = (contents(&mut vm), contents(&mut next));
        let firmware = there.get("pc.bios").unwrap_or_else(|| panic!("{story}: {:?}", there.keys()));
        assert!(firmware.iter().any(|byte| *byte != 0), "{story}");
        assert_eq!(differing(&there, &here), Vec::<String>::new(), "{story}");
        let vector = reset_vector(&mut next);
        assert!(!vector.contains("0x00 0x00 0x00 0x00"), "{story}: {vector}");
        next.qmp().execute("system_reset", serde_json::json!({})).unwrap();
        next.restore(RunState::Running).unwrap();
        let after = reset_vector(&mut next);
        assert!(!after.contains("0x00 0x00 0x00 0x00"), "{story}: {after}");
        // What it would take along to the host after this one. QEMU itself loads a microvm's firmware anew at
        // a reset: its own, and that firmware keeps its variables between its code.
        if machine != MICROVM {
            assert!(contents(&mut next)["pc.bios"].ends_with(firmware), "{story}");
        }
        assert!(after == vector || machine == MICROVM && way > 0, "{story}: {after}");
        next.destroy().unwrap();
    }
}

#[test]
fn i3_unfit_firmware_is_refused_before_anything_moves() {
    let usual = ["-nodefaults", "-m", "64M", "-object", "memory-backend-memfd,id=mem,size=64M,share=on"];
    let hand = ByHand::start(&[&usual, Q35].concat());
    let mut vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
    let ahead = vm.copy_ahead().unwrap();
    let other = |name: &str, packed: Vec<u8>| vec![(name.to_owned(), packed)];
    let of = |bytes: u64| bytes.to_le_bytes().to_vec();
    let rows = [
        (other("pc.bios", of(1 << 20)), "both hosts need the same firmware files"),
        (other("pc.flash", of(4096)), "there is none of this name"),
        (other("0000:00:01.0/vga.vram", of(32 << 20)), "it has 33554432 bytes there and 16777216 here"),
        (other("pc.bios", vec![1; 9]), "it has"),
        (other("mem", of(4096)), "there is none of this name"),
    ];
    let target = host(hand.folder.path(), "target", None);
    let mut next = Vm::incoming(vm.recipe(), &target).unwrap();
    for (private, said) in rows {
        let error = next.take_ahead(&private).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    // None of them has reached QEMU.
    next.take_ahead(&ahead).unwrap();
    next.destroy().unwrap();
}

#[test]
fn a_guest_that_lost_its_firmware_is_warned_of() {
    let usual = ["-nodefaults", "-m", "64M", "-object", "memory-backend-memfd,id=mem,size=64M,share=on"];
    let hand = ByHand::start(&[&usual, MICROVM].concat());
    let mut vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
    assert_eq!(vm.warnings().unwrap(), Vec::<String>::new());
    let target = host(hand.folder.path(), "target", None);
    let mut next = Vm::incoming(vm.recipe(), &target).unwrap();
    // As a Whimbrel did that carried no firmware.
    vm.stop().unwrap();
    let mut state = vm.save().unwrap().state;
    state.private.retain(|(name, _)| name != "pc.bios");
    next.load(&state).unwrap();
    next.restore(RunState::Running).unwrap();
    let warnings = next.warnings().unwrap();
    assert!(warnings.len() == 1 && warnings[0].contains("cannot reboot"), "{warnings:?}");
    next.destroy().unwrap();
}

#[test]
fn i9_what_qemu_makes_up_at_its_start_is_the_same_at_the_target() {
    let usual = ["-nodefaults", "-m", "64M", "-object", "memory-backend-memfd,id=mem,size=64M,share=on"];
    let hand = ByHand::start(&[&usual, Q35, &["-device", "vmgenid,guid=auto"]].concat());
    let mut vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
    let target = host(hand.folder.path(), "target", None);
    let mut next = Vm::incoming(vm.recipe(), &target).unwrap();
    let generation = |vm: &mut Vm| {
        vm.qmp().execute("query-vm-generation-id", serde_json::json!({})).unwrap()["guid"].clone()
    };
    let there = generation(&mut vm);
    assert!(there.is_string());
    assert_eq!(generation(&mut next), there);
    next.destroy().unwrap();
}
