//! What attaching costs. `cargo test --release -p qemu --test attach_figures -- --ignored --nocapture`

mod bed;

use attach::{Source, Target};
use bed::{MIB, Qemu, SOON, memfd};
use ports::{GuestMemory, MissingPages, Tracker};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use sys::{inject::Borrowed, process::PidFd};
use units::{BlockId, MemorySet, PAGE_SIZE, PageIndex, PageRange};

const RAM: BlockId = BlockId(0);
const GIB: u64 = 1;

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let began = Instant::now();
    let done = work();
    (done, began.elapsed())
}

/// The same in time on a processor: what it would take on a host that does nothing else.
fn worked<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let on_cpu = || {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
    };
    let began = on_cpu();
    let done = work();
    (done, on_cpu() - began)
}

fn show(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e6;
    println!("{what}: p50 {:.0} us, p99 {:.0} us, max {:.0} us ({})", at(50), at(99), at(100), times.len());
}

#[test]
#[ignore = "a measurement"]
fn injection() {
    let mut qemu = Qemu::start(&memfd(64), &[]);
    let process = Arc::new(PidFd::open(qemu.pid()).unwrap());
    let make = || {
        let borrowed = Borrowed::seize(&process).unwrap();
        let n = borrowed.userfaultfd().unwrap();
        borrowed.close(n).unwrap();
    };
    show("borrow, userfaultfd, close, give back", (0..300).map(|_| timed(make).1).collect());
    let block = qemu.block("mem", 64 * MIB, 0);
    let source = Source::open(qemu.pid(), &[block]).unwrap();
    show("attach a tracker", (0..100).map(|_| timed(|| source.tracker().unwrap()).1).collect());
}

#[test]
#[ignore = "a measurement"]
fn tracking() {
    let size = GIB * 1024;
    for (kind, prealloc) in [("all present", ",prealloc=on"), ("all holes", "")] {
        let mut qemu = Qemu::start(&format!("{}{prealloc}", memfd(size)), &[]);
        let block = qemu.block("mem", size * MIB, 0);
        let source = Source::open(qemu.pid(), &[block]).unwrap();
        let memory = source.memory();
        let (present, look) = worked(|| memory.present(RAM).unwrap().len());
        let mut tracker = source.tracker().unwrap();
        let ms = |time: Duration| time.as_secs_f64() * 1e3 / GIB as f64;
        let ((), begin) = worked(|| tracker.begin().unwrap());
        let ((), again) = worked(|| tracker.begin().unwrap());
        let mut dirty = MemorySet::empty([size * MIB / PAGE_SIZE as u64]);
        let mut clean: Vec<_> = (0..20).map(|_| worked(|| tracker.collect(&mut dirty).unwrap()).1).collect();
        clean.sort();
        let ((), drop_time) = worked(|| drop(tracker));
        let mut tracker = source.tracker().unwrap();
        tracker.begin().unwrap();
        let process = PidFd::open(qemu.pid()).unwrap();
        let base = qemu.block("mem", 0, 0).hva;
        let pages = size * MIB / PAGE_SIZE as u64;
        for page in (0..pages).step_by(8) {
            process.write_memory(base + page * PAGE_SIZE as u64, &[1]).unwrap();
        }
        let ((), eighth) = worked(|| tracker.collect(&mut dirty).unwrap());
        println!(
            "{kind}, ms/GiB: present {:.2} ({present} pages), begin {:.2}, again {:.2}, collect clean {:.2}, \
             collect every eighth page {:.2} ({} pages), drop {:.2}",
            ms(look),
            ms(begin),
            ms(again),
            ms(clean[10]),
            ms(eighth),
            dirty.len(),
            ms(drop_time)
        );
        let mut buffer = vec![0; 1 << 20];
        let ((), read) = worked(|| {
            for piece in PageRange::new(PageIndex(0), pages).pieces(256) {
                memory.read(RAM, piece, &mut buffer).unwrap();
            }
        });
        println!("{kind}: read in 1 MiB pieces {:.2} GB/s", (size * MIB) as f64 / read.as_secs_f64() / 1e9);
    }
}

/// What a tracker costs a guest that touched 64 MiB, by the size of its memory: nothing may grow with it.
#[test]
#[ignore = "a measurement"]
fn sparse_guests() {
    const TOUCHED: u64 = 64;
    let mut collects = Vec::new();
    for gib in [1_u64, 16, 64, 256] {
        let mut qemu = Qemu::start(&format!("{},reserve=off", memfd(gib * 1024)), &[]);
        let bytes = gib << 30;
        let block = qemu.block("mem", bytes, 0);
        let process = PidFd::open(qemu.pid()).unwrap();
        let touch = |at: u64| process.write_memory(block.hva + at, &[1]).unwrap();
        // A quarter at the beginning, the rest spread evenly in pieces of 2 MiB.
        (0..TOUCHED << 18).step_by(PAGE_SIZE).for_each(touch);
        let pieces = TOUCHED * 3 / 8;
        for piece in 1..=pieces {
            let at = bytes / (pieces + 1) * piece / (2 << 20) * (2 << 20);
            (at..at + (2 << 20)).step_by(PAGE_SIZE).for_each(touch);
        }
        let source = Source::open(qemu.pid(), std::slice::from_ref(&block)).unwrap();
        let mut tracker = source.tracker().unwrap();
        let ((), begin) = timed(|| tracker.begin().unwrap());
        let (mut dirty, empty) = timed(|| MemorySet::empty([bytes / PAGE_SIZE as u64]));
        let ((), first) = timed(|| tracker.collect(&mut dirty).unwrap());
        let mut clean: Vec<_> = (0..50).map(|_| timed(|| tracker.collect(&mut dirty).unwrap()).1).collect();
        clean.sort();
        touch(bytes / 2 + (32 << 20));
        let ((), new) = timed(|| tracker.collect(&mut dirty).unwrap());
        assert_eq!(dirty.len(), 1, "what was written is found, and nothing else");
        let (present, look) = timed(|| source.memory().present(RAM).unwrap());
        let ((), union) = timed(|| dirty.union(&MemorySet::from_blocks(vec![present])));
        let ((), end) = timed(|| drop(tracker));
        collects.push(clean[25]);
        println!(
            "{gib} GiB: begin {begin:?}, first collect {first:?}, clean {:?} (most {:?}), new part {new:?}, \
             present {look:?}, empty set {empty:?}, union {union:?}, end {end:?}",
            clean[25], clean[49]
        );
    }
    let grows = collects[3].as_secs_f64() / collects[0].as_secs_f64();
    assert!(grows < 3.0, "a scan of 256 GiB takes {grows:.1} times as long as one of 1 GiB: {collects:?}");
}

#[test]
#[ignore = "a measurement"]
fn placing() {
    let size = GIB * 1024;
    let pages = size * MIB / PAGE_SIZE as u64;
    let mut qemu = Qemu::start(&memfd(size), &[]);
    let block = qemu.block("mem", size * MIB, 0);
    let (target, opened) = worked(|| Target::open(qemu.pid(), &[block]).unwrap());
    println!("open the target: {:.2} ms", opened.as_secs_f64() * 1e3);
    let memory = target.memory();
    let all = PageRange::new(PageIndex(0), pages);
    let from = vec![7; 4 << 20];
    let rate = |time: Duration| (size * MIB) as f64 / time.as_secs_f64() / 1e9;
    for piece in [1, 64, 256] {
        let ((), time) = worked(|| {
            for run in all.pieces(piece) {
                memory.write(RAM, run, &from[..run.bytes().0 as usize]).unwrap();
            }
        });
        let ((), punched) = worked(|| memory.discard(RAM, all).unwrap());
        println!(
            "pwrite of {piece} pages: {:.2} GB/s; punching all again {:.2} ms/GiB",
            rate(time),
            punched.as_secs_f64() * 1e3 / GIB as f64
        );
    }
    let missing = target.missing().unwrap();
    for piece in [1, 16, 64, 256, 1024] {
        let ((), time) = worked(|| {
            for run in all.pieces(piece) {
                missing.place(RAM, run, &from[..run.bytes().0 as usize]).unwrap();
            }
        });
        println!("place {piece} pages: {:.2} GB/s", rate(time));
        let ((), time) = worked(|| {
            for run in all.pieces(256) {
                assert_eq!(missing.place(RAM, run, &from[..run.bytes().0 as usize]).unwrap(), 0);
            }
        });
        println!(
            "   all of it there already, 256 pages a call: {:.2} ms/GiB",
            time.as_secs_f64() * 1e3 / GIB as f64
        );
        memory.discard(RAM, all).unwrap();
    }
    let mut plain = Vec::new();
    let mut faulting = Vec::new();
    let mut serving = Vec::new();
    for page in (1000..3000).step_by(2) {
        missing.place(RAM, PageRange::new(PageIndex(page + 1), 1), &from[..PAGE_SIZE]).unwrap();
        plain.push(timed(|| qemu.peek(page + 1)).1);
        let began = Instant::now();
        qemu.send_peek(page);
        let fault = missing.next(SOON).unwrap().unwrap();
        let run = PageRange::new(fault.page, 1);
        serving.push(timed(|| missing.place(RAM, run, &from[..PAGE_SIZE]).unwrap()).1);
        assert_eq!(qemu.gdb_answer(), "07");
        faulting.push(began.elapsed());
    }
    show("a byte read by the gdb stub", plain);
    show("the same from a missing page", faulting);
    show("  of which placing", serving);
    let ((), time) = timed(|| missing.finish().unwrap());
    println!("finish: {:.2} ms", time.as_secs_f64() * 1e3);
}
