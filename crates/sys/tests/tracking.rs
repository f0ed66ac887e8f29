//! Writes to a watched process' RAM are seen, exactly.

mod common;

use common::Guest;
use std::{collections::BTreeSet, sync::Arc};
use sys::{
    inject::Borrowed,
    pagemap::Pagemap,
    process::PidFd,
    uffd::{Features, Uffd, Watch},
};
use units::PAGE_SIZE;

#[test]
#[ignore = "not a test: the process that the tests experiment on"]
fn role() {
    common::play();
    // The tracker that is going to be killed.
    let Ok(watched) = std::env::var("ROLE_TRACKS") else { return };
    let numbers: Vec<u64> = watched.split(' ').map(|word| word.parse().unwrap()).collect();
    let process = Arc::new(PidFd::open(numbers[0] as i32).unwrap());
    let addresses = numbers[1]..numbers[2];
    let _uffd = match std::env::var("ROLE_ANSWERS") {
        Ok(_) => watch(&process, addresses, Features::WP | Features::WP_SHMEM),
        Err(_) => track(&process, addresses),
    };
    println!("\n@tracking");
    std::thread::sleep(common::SOON);
}

fn track(process: &Arc<PidFd>, addresses: std::ops::Range<u64>) -> Uffd {
    let features = Features::WP | Features::WP_SHMEM | Features::WP_UNPOPULATED | Features::WP_ASYNC;
    watch(process, addresses, features)
}

fn watch(process: &Arc<PidFd>, addresses: std::ops::Range<u64>, features: Features) -> Uffd {
    let borrowed = Borrowed::seize(process).unwrap();
    let n = borrowed.userfaultfd().unwrap();
    let uffd = Uffd::take(process, n).unwrap();
    borrowed.close(n).unwrap();
    drop(borrowed);
    uffd.enable(features).unwrap();
    uffd.register(addresses.clone(), Watch::Writes).unwrap();
    uffd.protect(addresses).unwrap();
    uffd
}

fn written(pagemap: &mut Pagemap, guest: &Guest) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    let take = |run: std::ops::Range<u64>| {
        let first = (run.start - guest.base) / PAGE_SIZE as u64;
        pages.extend(first..first + (run.end - run.start) / PAGE_SIZE as u64);
    };
    pagemap.take_written(guest.base..guest.end(), take).unwrap();
    pages
}

/// A number that looks random (splitmix64).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 17
}

#[test]
fn every_way_of_writing_is_seen_and_nothing_else() {
    const PAGES: u64 = 20_000;
    let mut guest = Guest::start(PAGES);
    // Half of it exists before it is watched, the other half are holes.
    for page in (0..PAGES).step_by(997) {
        guest.ask(&format!("write {page}"));
    }
    let uffd = track(&guest.process, guest.base..guest.end());
    let mut pagemap = Pagemap::open(&guest.process).unwrap();
    let mut seed = 42;
    assert_eq!(written(&mut pagemap, &guest), BTreeSet::new());
    for round in 0..40 {
        let mut truth = BTreeSet::new();
        for _ in 0..next(&mut seed) % 60 {
            let page = if next(&mut seed).is_multiple_of(3) {
                next(&mut seed) % 16 * 997
            } else {
                next(&mut seed) % PAGES
            };
            let verb = ["write", "thread", "kernel", "read"][next(&mut seed) as usize % 4];
            guest.ask(&format!("{verb} {page}"));
            if verb != "read" {
                truth.insert(page);
            }
        }
        assert_eq!(written(&mut pagemap, &guest), truth, "round {round}");
    }
    // More runs than one call returns.
    guest.ask("fill");
    assert_eq!(written(&mut pagemap, &guest).len() as u64, PAGES);
    for page in (0..PAGES).step_by(2) {
        guest.order(&format!("write {page}"));
    }
    (0..PAGES).step_by(2).for_each(|_| assert_eq!(guest.answer(), "done"));
    assert_eq!(written(&mut pagemap, &guest), (0..PAGES).step_by(2).collect());
    assert!(guest.is_watched());
    drop(uffd);
    assert!(!guest.is_watched());
}

/// A process that tracks the guest; only such a one can be killed.
fn tracker(guest: &Guest, more: &[(&str, &str)]) -> std::process::Child {
    use std::io::BufRead;
    let mut tracker = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "role", "--ignored", "--nocapture", "--test-threads=1"])
        .env("ROLE_TRACKS", format!("{} {} {}", guest.process.pid(), guest.base, guest.end()))
        .envs(more.iter().copied())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let output = std::io::BufReader::new(tracker.stdout.take().unwrap());
    assert!(output.lines().map_while(Result::ok).any(|line| line.contains("@tracking")));
    assert!(guest.is_watched());
    tracker
}

#[test]
fn a_writer_goes_on_when_its_tracker_is_killed() {
    let mut guest = Guest::start(4096);
    guest.ask("write 7");
    let mut tracker = tracker(&guest, &[("ROLE_ANSWERS", "never")]);
    guest.order("write 7");
    assert!(guest.is_silent(), "nobody answers it");
    tracker.kill().unwrap();
    tracker.wait().unwrap();
    assert_eq!(guest.answer(), "done");
    assert!(!guest.is_watched());
    assert_eq!(guest.ask("fill"), "done");
}

#[test]
fn a_guest_whose_tracker_is_killed_runs_on_unwatched() {
    let mut guest = Guest::start(4096);
    guest.ask("fill");
    let mut tracker = tracker(&guest, &[]);
    tracker.kill().unwrap();
    tracker.wait().unwrap();
    assert!(!guest.is_watched());
    assert_eq!(guest.ask("fill"), "done");
    // And another may begin.
    track(&guest.process, guest.base..guest.end());
}
