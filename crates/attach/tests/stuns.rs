//! A real guest whose vCPUs stand still for half of the time: its QEMU answers, and it runs on afterwards.

mod bed;

use attach::Source;
use bed::{MIB, Qemu, SOON, booting, memfd};
use ports::{Stalls, Stuns};
use serde_json::json;
use std::{
    fs,
    time::{Duration, Instant},
};

const LONGEST: Duration = Duration::from_millis(5);

fn vcpus(qemu: &mut Qemu) -> Vec<i32> {
    let cpus = qemu.qmp("query-cpus-fast", json!({}));
    cpus.as_array().unwrap().iter().map(|cpu| cpu["thread-id"].as_i64().unwrap() as i32).collect()
}

fn of_thread(qemu: &Qemu, tid: i32, file: &str) -> String {
    fs::read_to_string(format!("/proc/{}/task/{tid}/{file}", qemu.pid())).unwrap()
}

/// The processor time that a vCPU has used.
fn used(qemu: &Qemu, tid: i32) -> Duration {
    let text = of_thread(qemu, tid, "schedstat");
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

fn is_traced(qemu: &Qemu, tid: i32) -> bool {
    !of_thread(qemu, tid, "status").contains("TracerPid:\t0\n")
}

/// Waits until the guest computes for so long as if nothing had been.
fn runs(qemu: &Qemu, vcpus: &[i32]) {
    let all = || vcpus.iter().map(|tid| used(qemu, *tid)).sum::<Duration>();
    let (before, since) = (all(), Instant::now());
    while all() < before + Duration::from_millis(200) {
        assert!(since.elapsed() < SOON, "the guest stands still");
        std::thread::yield_now();
    }
}

#[test]
fn a_guest_whose_vcpus_are_stunned_half_the_time_answers() {
    let Some(mut qemu) = booting() else { return };
    let block = qemu.block("mem", 256 * MIB, 0);
    let source = Source::open(qemu.pid(), &[block]).unwrap();
    let vcpus = vcpus(&mut qemu);
    let mut stuns = source.stuns(vcpus.clone(), LONGEST).unwrap();
    assert_eq!(stuns.vcpus(), 2);
    qemu.qmp("cont", json!({}));
    runs(&qemu, &vcpus);
    assert_eq!(stuns.stalls(), Stalls::default());
    let began = Instant::now();
    stuns.stun(0.5, Some(&vcpus)).unwrap();
    let mut answers = vec![];
    while began.elapsed() < Duration::from_secs(3) {
        let asked = Instant::now();
        assert_eq!(qemu.qmp("query-status", json!({}))["status"], "running");
        answers.push(asked.elapsed());
        // Needs QEMU's lock, and what vCPUs do.
        qemu.qmp("human-monitor-command", json!({"command-line": "info registers -a"}));
    }
    let stalls = stuns.stalls();
    let share = stalls.total.as_secs_f64() / 2.0 / began.elapsed().as_secs_f64();
    stuns.calm();
    answers.sort_unstable();
    let (p50, p99, most) =
        (answers[answers.len() / 2], answers[answers.len() * 99 / 100], answers[answers.len() - 1]);
    println!("{stalls:?}, {share:.2} of the time; {} answers: {p50:?}, p99 {p99:?}, {most:?}", answers.len());
    assert!((0.35..0.65).contains(&share), "{share} of the time, {stalls:?}");
    // A machine with something else to do may wake a thread late, now and then.
    assert!(stalls.total / stalls.count as u32 <= LONGEST * 2, "{stalls:?}");
    assert!(p99 < Duration::from_millis(100), "{p99:?} of {most:?}");
    // Nobody is traced any more, nor again.
    assert!(!vcpus.iter().any(|tid| is_traced(&qemu, *tid)));
    runs(&qemu, &vcpus);
    let calm = stuns.stalls().count;
    runs(&qemu, &vcpus);
    assert_eq!(stuns.stalls().count, calm);
    // It can still be stopped, and our own injections find a thread.
    stuns.stun(0.5, Some(&vcpus)).unwrap();
    drop(stuns);
    drop(source.tracker().unwrap());
    qemu.qmp("stop", json!({}));
    qemu.qmp("cont", json!({}));
    runs(&qemu, &vcpus);
}

#[test]
fn who_does_not_write_is_left_alone() {
    // Its guest is stopped: no vCPU does anything.
    let Some(mut qemu) = booting() else { return };
    let block = qemu.block("mem", 256 * MIB, 0);
    let source = Source::open(qemu.pid(), &[block]).unwrap();
    let mut stuns = source.stuns(vcpus(&mut qemu), LONGEST).unwrap();
    stuns.stun(0.5, Some(&[qemu.pid()])).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(stuns.stalls(), Stalls::default(), "QEMU's main thread is no vCPU");
    stuns.stun(0.5, None).unwrap();
    // At first nobody knows, so all are stunned; once it has been looked twice, none is.
    std::thread::sleep(Duration::from_millis(600));
    let known = stuns.stalls().count;
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(stuns.stalls().count, known);
    qemu.qmp("cont", json!({}));
    let since = Instant::now();
    while stuns.stalls().count == known {
        assert!(since.elapsed() < SOON, "a guest that boots writes");
        std::thread::yield_now();
    }
}

/// What stuns of one vCPU cost another one: its processor time in 500 ms, in turns with and without.
#[test]
#[ignore = "prints figures; needs WHIMBREL_GUEST_KERNEL and WHIMBREL_GUEST_INITRD"]
fn figures() {
    let path = |name: &str| std::env::var(name).unwrap();
    let words = "console=ttyS0 quiet panic=-1 cryptomgr.notests noreplace-smp nokaslr tsc=reliable \
                 whimbrel.dirty=64M,rate=max,threads=2";
    let (kernel, initrd) = (path("WHIMBREL_GUEST_KERNEL"), path("WHIMBREL_GUEST_INITRD"));
    let guest = ["-kernel", &kernel, "-initrd", &initrd, "-append", words, "-smp", "2"];
    let more = [&guest[..], &["-cpu", "max,-erms,-fsrm", "-serial", "null"]].concat();
    let mut qemu = Qemu::start(&memfd(256), &more);
    let block = qemu.block("mem", 256 * MIB, 0);
    let source = Source::open(qemu.pid(), &[block]).unwrap();
    let vcpus = vcpus(&mut qemu);
    let mut stuns = source.stuns(vcpus.clone(), LONGEST).unwrap();
    qemu.qmp("cont", json!({}));
    let used = |qemu: &Qemu| [used(qemu, vcpus[0]), used(qemu, vcpus[1])];
    let in_turn = |qemu: &Qemu| {
        let before = used(qemu);
        std::thread::sleep(Duration::from_millis(500));
        let after = used(qemu);
        [after[0] - before[0], after[1] - before[1]].map(|used| used.as_secs_f64())
    };
    let since = Instant::now();
    while in_turn(&qemu)[1] < 0.2 {
        assert!(since.elapsed() < SOON, "its second vCPU has nothing to do");
    }
    let (mut calm, mut stunned) = ([0.0; 2], [0.0; 2]);
    for _ in 0..20 {
        stuns.calm();
        in_turn(&qemu).iter().zip(&mut calm).for_each(|(used, sum)| *sum += used);
        stuns.stun(0.5, Some(&vcpus[..1])).unwrap();
        in_turn(&qemu).iter().zip(&mut stunned).for_each(|(used, sum)| *sum += used);
    }
    println!(
        "of its processor time the stunned vCPU kept {:.2}, the other one {:.2}; {:?}",
        stunned[0] / calm[0],
        stunned[1] / calm[1],
        stuns.stalls()
    );
}
