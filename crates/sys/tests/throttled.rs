//! The synchronous tracker on a process that writes at native speed; on an older kernel, too.

mod common;

use attach::{RamBlock, Source, ThrottlingTracker, Tracking};
use common::{Guest, PROBED};
use lab::{
    ensure,
    other_kernel::{Kernel, run_under},
    story,
};
use ports::{GuestMemory, Tracker};
use std::{
    env,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use units::{BlockId, MemorySet, PAGE_SIZE, PageIndex, PageRange};

const RAM: BlockId = BlockId(0);
const HOW: Tracking =
    Tracking { writers: 2, max_stall: Duration::from_millis(5), synchronous: true, group: None };

#[test]
#[ignore = "not a test: the process that the tests experiment on"]
fn role() {
    common::play();
    // The tracker that is going to be killed.
    let Ok(watched) = env::var("ROLE_TRACKS") else { return };
    let numbers: Vec<u64> = watched.split(' ').map(|word| word.parse().unwrap()).collect();
    let (_, mut tracker) = attach(numbers[0] as i32, numbers[1], numbers[2]);
    tracker.begin().unwrap();
    tracker.throttle(10.0).unwrap();
    println!("\n@tracking");
    std::thread::sleep(common::SOON);
}

/// The tracker names exactly the threads that wrote, in a namespace of their own too.
#[test]
fn the_tracker_says_which_threads_write() {
    for inside in [false, true] {
        let mut guest = if inside { Guest::start_inside(64) } else { Guest::start(64) };
        guest.ask("fill");
        let ram = RamBlock { name: "ram".into(), bytes: 64 * PAGE_SIZE as u64, hva: guest.base };
        let source = Source::open(guest.process.pid(), &[ram]).unwrap();
        // Nobody opens a page for anybody else.
        let mut tracker = source.throttled(&Tracking { group: Some(1), ..HOW }).unwrap();
        tracker.begin().unwrap();
        assert_eq!(tracker.writers(), Some(vec![]), "{inside}");
        let before: Vec<u64> = (0..3).map(|page| guest.counted(page)).collect();
        let numbers = guest.count(3);
        while (0..3).any(|page| guest.counted(page) == before[page as usize]) {
            std::thread::yield_now();
        }
        let threads = guest.process.threads_by_inner_number().unwrap();
        let mut expected: Vec<i32> = numbers.iter().map(|inner| threads[&(*inner as u32)]).collect();
        assert_eq!(expected == numbers, !inside, "{expected:?} {numbers:?}");
        let mut writers = tracker.writers().unwrap();
        writers.sort_unstable();
        expected.sort_unstable();
        assert_eq!(writers, expected, "{inside}");
        assert_eq!(tracker.writers(), Some(vec![]), "their pages are open: {inside}");
    }
}

fn attach(pid: i32, base: u64, pages: u64) -> (Source, ThrottlingTracker) {
    let block = RamBlock { name: "ram".into(), bytes: pages * PAGE_SIZE as u64, hva: base };
    let source = Source::open(pid, &[block]).unwrap();
    let tracker = source.throttled(&HOW).unwrap();
    (source, tracker)
}

fn track(guest: &Guest) -> (Source, ThrottlingTracker) {
    attach(guest.process.pid(), guest.base, guest.pages)
}

fn none(guest: &Guest) -> MemorySet {
    MemorySet::empty([guest.pages])
}

#[test]
fn i2_no_write_of_several_threads_is_lost() {
    const PAGES: u64 = 8192;
    let mut guest = Guest::start(PAGES);
    guest.ask("storm 3");
    let (source, mut tracker) = track(&guest);
    let memory = source.memory();
    tracker.begin().unwrap();
    let mut mirror = vec![0; PAGES as usize * PAGE_SIZE];
    let mut copy = |dirty: &MemorySet| {
        for run in dirty.block(RAM).runs() {
            let at = run.start.offset() as usize;
            memory.read(RAM, run, &mut mirror[at..at + run.bytes().0 as usize]).unwrap();
        }
    };
    copy(&MemorySet::from_blocks(vec![memory.present(RAM).unwrap()]));
    let (began, mut rounds, mut throttled) = (Instant::now(), 0, false);
    while rounds < 30 || began.elapsed() < Duration::from_secs(2) {
        let mut dirty = none(&guest);
        tracker.collect(&mut dirty).unwrap();
        copy(&dirty);
        if began.elapsed() > Duration::from_secs(1) && !throttled {
            // What is waited for then must not be lost either.
            tracker.throttle(1_000.0).unwrap();
            throttled = true;
        }
        rounds += 1;
    }
    guest.ask("calm");
    let mut dirty = none(&guest);
    tracker.collect(&mut dirty).unwrap();
    assert!(!dirty.is_empty(), "it wrote until the end");
    copy(&dirty);
    let mut all = vec![0; mirror.len()];
    memory.read(RAM, PageRange::new(PageIndex(0), PAGES), &mut all).unwrap();
    let different = mirror.chunks(PAGE_SIZE).zip(all.chunks(PAGE_SIZE)).filter(|(ours, its)| ours != its);
    assert_eq!(different.count(), 0, "pages were missed in {rounds} rounds");
    assert!(tracker.heard() > 0 && tracker.stalls().count > 0);
}

#[test]
fn a_tracker_that_begins_under_writers_leaves_none_waiting() {
    let mut guest = Guest::start(65_536);
    guest.ask("fill");
    for _ in 0..60 {
        guest.ask("storm 3");
        let (_, mut tracker) = track(&guest);
        tracker.begin().unwrap();
        // Each writes on before it looks whether it is over.
        guest.ask("calm");
    }
}

#[test]
fn writers_that_are_governed_go_on_when_their_tracker_is_killed() {
    let mut guest = Guest::start(8192);
    let mut tracker = Command::new(env::current_exe().unwrap())
        .args(["--exact", "role", "--ignored", "--nocapture", "--test-threads=1"])
        .env("ROLE_TRACKS", format!("{} {} {}", guest.process.pid(), guest.base, guest.pages))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(tracker.stdout.take().unwrap());
    assert!(output.lines().map_while(Result::ok).any(|line| line.contains("@tracking")));
    assert!(guest.is_watched());
    guest.order("fill");
    assert!(guest.is_silent(), "8192 pages take a while, 5 ms each");
    tracker.kill().unwrap();
    tracker.wait().unwrap();
    assert_eq!(guest.answer(), "done");
    assert!(!guest.is_watched());
}

#[test]
fn who_writes_little_does_not_wait_for_who_writes_all_it_can() {
    const PACE: f64 = 10_000.0;
    let mut guest = Guest::start(PROBED * 3);
    guest.ask("fill");
    let (_, mut tracker) = track(&guest);
    tracker.begin().unwrap();
    tracker.throttle(PACE).unwrap();
    // 1,000 pages a second beside somebody who would take 2,000,000; each might have 2,250.
    let began = Instant::now();
    let answer = guest.ask("race sequential 2000");
    let lasted = began.elapsed().as_secs_f64();
    let took: Vec<u64> = answer.split(' ').map(|word| word.parse().unwrap()).collect();
    let mut dirty = none(&guest);
    tracker.collect(&mut dirty).unwrap();
    let probed = dirty.block(RAM).runs_within(PageRange::new(PageIndex(PROBED * 2), PROBED));
    let probed: u64 = probed.map(|run| run.count).sum();
    assert!(probed > 1000, "it wrote to {probed} pages");
    assert!(dirty.len() as f64 <= PACE * lasted * 0.5, "{} pages in {lasted} s", dirty.len());
    let stalls = tracker.stalls();
    assert!(stalls.count > 100, "the other one waited: {stalls:?}");
    // It would be 5 ms if it waited with the other one; most of what is left is this machine's.
    assert!(took[1] < 1000, "its writes took {answer} µs");
    // 99 in 100: below 1 ms on a quiet machine, 7 were seen on one that was not.
    assert!(took[2] < 20_000, "its writes took {answer} µs");
}

/// Debian's 6.1 kernel has no asynchronous tracker.
#[test]
fn the_synchronous_tracker_works_under_linux_6_1() {
    story("the tracker under 6.1", &[], |lab, tools| {
        let tests = [
            "i2_no_write_of_several_threads_is_lost",
            "writers_that_are_governed_go_on_when_their_tracker_is_killed",
        ];
        let arguments = [&["--exact", "--test-threads=1"][..], &tests].concat();
        let program = env::current_exe().map_err(|e| lab::Error::new("find this program", e.to_string()))?;
        let kernel = Kernel::plain(&tools.kernel);
        let (status, said) = run_under(&kernel, &program, &arguments, &[], lab.dir())?;
        ensure!(status == 0 && said.contains("2 passed"), "exit status {status}: {said}");
        Ok(())
    });
}
