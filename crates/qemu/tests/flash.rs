//! Firmware in flash memory, with a variable store that a host has for itself.

mod common;

use common::{
    ends::Folder,
    hand::ByHand,
    host,
    moved::{copy, drawn},
};
use ports::Machine;
use qemu::{Limits, Vm, preflight};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const FIRMWARE: &str = "/usr/share/OVMF";

/// Command lines by the kind of firmware: what is said of the code and of the store.
fn words(how: &str, store: &Path) -> Vec<String> {
    let store = store.display();
    let code = |name: &str| format!("{FIRMWARE}/{name}");
    let text = match how {
        "drives" => format!(
            "-machine q35 -drive if=pflash,format=raw,unit=0,readonly=on,file={} \
             -drive if=pflash,format=raw,unit=1,file={store}",
            code("OVMF_CODE.fd")
        ),
        // As libvirt says it; Secure Boot, whose variables only code in SMM writes.
        _ => format!(
            "-machine q35,smm=on,pflash0=code,pflash1=vars \
             -global driver=cfi.pflash01,property=secure,value=on -global ICH9-LPC.disable_s3=1 \
             -blockdev driver=file,node-name=cf,filename={},read-only=on,auto-read-only=on,discard=unmap \
             -blockdev driver=raw,node-name=code,file=cf,read-only=on \
             -blockdev driver=file,node-name=vf,filename={store} -blockdev driver=raw,node-name=vars,file=vf",
            code("OVMF_CODE_4M.secboot.fd")
        ),
    };
    let always = "-m 128M -nodefaults -device VGA -net none";
    format!("{text} {always}").split_whitespace().map(str::to_owned).collect()
}

/// Takes a VM over to a host of this name that has the firmware, but not the store; it runs there.
fn to(vm: &mut Vm, folder: &Path, name: &str, program: Option<PathBuf>) -> Vm {
    let limits = Limits { boot: vec![FIRMWARE.into()], ..Limits::default() };
    let target =
        qemu::Host { limits, owner: folder.join(name), ..host(folder, &format!("run-{name}"), program) };
    let begun = vm.begin().unwrap();
    assert!(begun.reasons.is_empty(), "{:?}", begun.reasons);
    let shown = vm.show_files("a", "1").unwrap();
    let mut opened = preflight::check(&shown.recipe, &target, "a", "1", || {}).unwrap();
    let mut recipe = shown.recipe.clone();
    preflight::make_stores(&mut recipe, &mut opened, &target).unwrap();
    let recipe = preflight::settle(recipe, &opened);
    let ahead = vm.copy_ahead().unwrap();
    vm.stop().unwrap();
    let state = vm.save().unwrap().state;
    let mut next = Vm::incoming(&recipe, &target).unwrap();
    next.uses(&opened).unwrap();
    copy(vm, &next);
    next.take_ahead(&ahead).unwrap();
    next.load(&state).unwrap();
    vm.destroy().unwrap();
    next.restore(ports::RunState::Running).unwrap();
    next
}

/// The file of a VM's store.
fn store_of(vm: &Vm) -> PathBuf {
    let mut files = vm.recipe().files.iter().map(|file| file.path.clone());
    files.find(|path| !path.starts_with(FIRMWARE)).unwrap()
}

/// What is in a store once the firmware writes no more to it than it was delivered with.
fn settled(store: &Path, delivered: &[u8]) -> Vec<u8> {
    let end = Instant::now() + Duration::from_secs(120);
    let (mut last, mut since) = (delivered.to_vec(), Instant::now());
    loop {
        let now = fs::read(store).unwrap();
        if now != last {
            (last, since) = (now, Instant::now());
        } else if last != delivered && since.elapsed() > Duration::from_secs(2) {
            return last;
        }
        assert!(Instant::now() < end, "{} does not settle", store.display());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until a store has this content: QEMU writes it when the guest begins to run.
fn comes_to(store: &Path, content: &[u8]) {
    let end = Instant::now() + Duration::from_secs(20);
    while fs::read(store).unwrap() != content {
        assert!(Instant::now() < end, "{} has other variables", store.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn i9_variables_of_firmware_go_there_and_back_and_reboot() {
    for (how, delivered) in [("drives", "OVMF_VARS.fd"), ("nodes", "OVMF_VARS_4M.ms.fd")] {
        let folder = Folder::new();
        let store = folder.path().join("vars.fd");
        let delivered = fs::read(format!("{FIRMWARE}/{delivered}")).unwrap();
        fs::write(&store, &delivered).unwrap();
        let words = words(how, &store);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let hand = ByHand::start(&words);
        let variables = settled(&store, &delivered);
        let mut vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
        for name in ["b", "c"] {
            vm = to(&mut vm, folder.path(), name, None);
            let here = store_of(&vm);
            assert!(here.starts_with(folder.path().join(name).join("flash")), "{}", here.display());
            comes_to(&here, &variables);
        }
        // It boots from what it has there, and finds its variables.
        vm.qmp().execute("system_reset", json!({})).unwrap();
        drawn(vm.qmp()).unwrap();
        assert_eq!(fs::metadata(store_of(&vm)).unwrap().len(), variables.len() as u64);
        vm.destroy().unwrap();
    }
}
