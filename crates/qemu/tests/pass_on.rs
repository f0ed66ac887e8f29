//! A running guest passes from one QEMU to another over one shared memory file, and counts on.

mod common;

use common::{ends::Folder, *};
use ports::{Machine, RunState};
use qemu::{Recipe, Vm};
use std::{fs::File, path::PathBuf, time::Instant};

/// Passes a guest on, there and back; says how long each step took.
fn passes_on(name: &str, machine: &str, vga: &str, from: Option<PathBuf>, to: Option<PathBuf>) {
    let Some((kernel, initrd)) = guest() else { return };
    let folder = Folder::new();
    let disk = folder.path().join("disk.img");
    File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let source = host(folder.path(), "a", from);
    let text = format!(
        "name = \"{name}\"\nvcpus = 2\nmemory = \"256MiB\"\nmemory-backend = \"file\"\naccel = \"tcg\"\n\
         kernel = {:?}\ninitrd = {:?}\ncmdline = {:?}\nmachine = {machine:?}\nvga = {vga:?}\n\
         [[disk]]\npath = {:?}\nformat = \"raw\"\n",
        kernel,
        initrd,
        command_line(machine),
        disk
    );
    let mut guest = Vm::run(&recipe(&text, &source), &source).unwrap();
    assert!(guest.recipe().machine.starts_with("pc-q35-") || guest.recipe().machine == "microvm");
    counts_beyond(guest.console().unwrap(), (5, 5));

    let mut target = host(folder.path(), "b", to);
    target.shared_memory = [("ram0".to_owned(), guest.belongings().memory[0].clone())].into();
    let virtio = guest.accepted_of_virtio().unwrap();
    assert!(virtio.iter().any(|one| !one.names.is_empty()), "{virtio:?}");
    let mut next = Vm::incoming(&Recipe { virtio, ..guest.recipe().clone() }, &target).unwrap();
    assert_eq!(next.status().unwrap(), "inmigrate");
    assert_eq!(next.missing_features().unwrap(), Vec::<String>::new());
    assert_eq!(next.missing_of_virtio().unwrap(), Vec::<String>::new());
    hand_over(&mut guest, &mut next);
    guest.restore(RunState::Running).expect_err("the disk's lock is the other one's now");
    guest.destroy().unwrap();
    next.destroy().unwrap();
    assert!(std::fs::read_dir(folder.path().join("a")).unwrap().count() <= 1, "only the console stays");
}

/// Hands the guest over; there it counts on, and writes its disk.
fn hand_over(guest: &mut Vm, next: &mut Vm) {
    let (beats, pages) = counted(guest.console().unwrap());
    let start = Instant::now();
    guest.stop().unwrap();
    let stopped = start.elapsed();
    let state = guest.save().unwrap().state;
    let saved = start.elapsed();
    next.load(&state).unwrap();
    let loaded = start.elapsed();
    next.restore(RunState::Running).unwrap();
    let resumed = start.elapsed();
    next.announce().unwrap();
    let paused = next.resumed_at().unwrap().duration_since(guest.stopped_at().unwrap()).unwrap();
    let private: usize = state.private.iter().map(|(_, bytes)| bytes.len()).sum();
    eprintln!(
        "{} {} -> {}: stop {:?}, save {:?}, load {:?}, cont {:?}; STOP to RESUME {paused:?}; {} + {private} \
         bytes",
        next.name(),
        guest.version(),
        next.version(),
        stopped,
        saved - stopped,
        loaded - saved,
        resumed - loaded,
        state.stream.len(),
    );
    counts_beyond(next.console().unwrap(), (beats + 5, pages + 5));
    assert_eq!(next.status().unwrap(), "running");
}

#[test]
fn a_q35_guest_with_a_disk_counts_on_in_another_qemu() {
    passes_on("q35", "q35", "none", None, None);
}

#[test]
fn a_microvm_guest_counts_on_in_another_qemu() {
    passes_on("micro", "microvm", "none", None, None);
}

#[test]
fn a_guest_with_a_vga_card_keeps_its_video_memory() {
    passes_on("vga", "q35", "std", None, None);
}

#[test]
fn a_q35_guest_counts_on_in_a_newer_qemu() {
    if let Some(qemu_10) = qemu_10() {
        passes_on("newer", "q35", "std", None, Some(qemu_10));
    }
}

#[test]
fn a_q35_guest_of_an_old_machine_counts_on_in_an_older_qemu() {
    if let Some(qemu_10) = qemu_10() {
        passes_on("older", "pc-q35-7.2", "std", Some(qemu_10), None);
    }
}

#[test]
fn a_microvm_guest_counts_on_in_a_newer_qemu() {
    if let Some(qemu_10) = qemu_10() {
        passes_on("newmicro", "microvm", "none", None, Some(qemu_10));
    }
}

#[test]
fn a_guest_of_qemu_10_counts_on_in_another_one() {
    if let Some(qemu_10) = qemu_10() {
        passes_on("ten", "q35", "std", Some(qemu_10.clone()), Some(qemu_10));
    }
}

#[test]
fn a_qemu_ends_with_a_test_that_panics() {
    let lives = |pid: i32| std::path::Path::new(&format!("/proc/{pid}/exe")).exists();
    let started = std::sync::atomic::AtomicI32::new(0);
    let ended = std::panic::catch_unwind(|| {
        let folder = Folder::new();
        let host = host(folder.path(), "run", None);
        let vm = Vm::run(&recipe("name = \"vm\"\nmemory = \"64MiB\"\n", &host), &host).unwrap();
        let pid = vm.process().pid();
        assert!(lives(pid));
        started.store(pid, std::sync::atomic::Ordering::Relaxed);
        panic!("as a check that fails");
    });
    let pid = started.into_inner();
    assert!(ended.is_err() && pid > 0);
    let end = Instant::now() + std::time::Duration::from_secs(10);
    while lives(pid) {
        assert!(Instant::now() < end, "QEMU {pid} lives on");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
