//! The RAM of a running QEMU is read and its writes are tracked, exactly.

mod bed;

use attach::{Error, RamBlock, Source, Target};
use bed::{MIB, Qemu, booting_on, memfd, mirror};
use ports::{GuestMemory, Tracker};
use serde_json::json;
use std::time::Duration;
use sys::inject::Borrowed;
use units::{BlockId, MemorySet, PAGE_SIZE, PageIndex, PageRange};

const RAM: BlockId = BlockId(0);

fn collect(tracker: &mut impl Tracker, source: &Source) -> Vec<u64> {
    let mut dirty = MemorySet::empty(source.memory().blocks().iter().map(|block| block.pages));
    tracker.collect(&mut dirty).unwrap();
    dirty.block(RAM).runs().flat_map(|run| run.start.0..run.end().0).collect()
}

/// All of `pages` were found, and what else was is zeros.
fn includes(source: &Source, found: &[u64], pages: &[u64]) {
    assert!(pages.iter().all(|page| found.contains(page)), "{found:?} lacks some of {pages:?}");
    for page in found.iter().filter(|page| !pages.contains(page)) {
        let mut content = [1; PAGE_SIZE];
        source.memory().read(RAM, PageRange::new(PageIndex(*page), 1), &mut content).unwrap();
        assert_eq!(content, [0; PAGE_SIZE], "page {page} is none of {pages:?}");
    }
}

/// Memory that only QEMU can reach.
const PRIVATE: &str = "memory-backend-ram,id=mem,size=256M";

/// As QEMU does it for a balloon: a hole in the file, and no mapping any more. A protection outlives both.
#[test]
fn i2_shared_memory_that_is_thrown_away_counts_as_written() {
    const DONTNEED: i32 = 4;
    for hears in [true, false] {
        let mut qemu = Qemu::start(&memfd(256), &[]);
        let block = qemu.block("mem", 256 * MIB, 0);
        let source = Source::open(qemu.pid(), std::slice::from_ref(&block)).unwrap().with_discards(hears);
        let hole = Target::open(qemu.pid(), std::slice::from_ref(&block)).unwrap().memory();
        (1000..1010).for_each(|page| qemu.poke(page, 1));
        let mut tracker = source.tracker().unwrap();
        tracker.begin().unwrap();
        assert!(collect(&mut tracker, &source).is_empty());
        for (first, count) in [(1002, 2), (1007, 1)] {
            let pages = PageRange::new(PageIndex(first), count);
            hole.discard(RAM, pages).unwrap();
            let thread = Borrowed::seize(source.process()).unwrap();
            thread.madvise(block.hva + pages.start.offset(), pages.bytes().0, DONTNEED).unwrap();
        }
        // Read again they are zeros, and nothing was written.
        qemu.peek(1003);
        let found = collect(&mut tracker, &source);
        assert_eq!(found, if hears { vec![1002, 1003, 1007] } else { vec![] }, "hears: {hears}");
        qemu.poke(1002, 2);
        assert_eq!(collect(&mut tracker, &source), [1002]);
        assert_eq!(tracker.may_make_wait(), hears);
        drop(tracker);
        // Nobody waits for us any more.
        let thread = Borrowed::seize(source.process()).unwrap();
        thread.madvise(block.hva, 1 << 20, DONTNEED).unwrap();
    }
}

/// Given up with its page table, or with the entry of a huge page, it shows in no scan of Linux 6.7 to 7.1.
#[test]
fn i2_a_huge_page_thrown_away_as_a_whole_counts_as_written() {
    const DONTNEED: i32 = 4;
    const PART: u64 = 2 << 20;
    let mut qemu = Qemu::start(PRIVATE, &[]);
    let block = qemu.block("mem", 256 * MIB, 0);
    let source = Source::open(qemu.pid(), std::slice::from_ref(&block)).unwrap().with_discards(true);
    let begin = block.hva.next_multiple_of(PART) + 2 * PART;
    let first = (begin - block.hva) / PAGE_SIZE as u64;
    source.process().write_memory(begin, &vec![7; PART as usize]).unwrap();
    let mut tracker = source.tracker().unwrap();
    tracker.begin().unwrap();
    assert!(collect(&mut tracker, &source).is_empty());
    let thread = Borrowed::seize(source.process()).unwrap();
    thread.madvise(begin, PART, DONTNEED).unwrap();
    drop(thread);
    let all: Vec<u64> = (first..first + PART / PAGE_SIZE as u64).collect();
    assert_eq!(collect(&mut tracker, &source), all);
    assert!(collect(&mut tracker, &source).is_empty(), "once is enough");
    qemu.poke(first + 6, 1);
    includes(&source, &collect(&mut tracker, &source), &[first + 6]);
}

/// A hole has no protection. What is written there is found all the same, wherever it lies in its part, also
/// in one that lies between others, and once only.
#[test]
fn i2_the_first_write_to_a_hole_is_found() {
    for (object, pages) in [(memfd(256), 65536), (PRIVATE.to_owned(), 65536_u64)] {
        let mut qemu = Qemu::start(&object, &[]);
        let block = qemu.block("mem", 256 * MIB, 0);
        let source = Source::open(qemu.pid(), &[block]).unwrap();
        let mut tracker = source.tracker().unwrap();
        tracker.begin().unwrap();
        collect(&mut tracker, &source);
        let mut written: Vec<u64> = Vec::new();
        for round in 0..12_u64 {
            let new = [round * 2048 + 511, pages - 1 - round * 1024, 30_000 + round * 512 + round * 37];
            new.iter().for_each(|page| qemu.poke(*page, 1 + round as u8));
            includes(&source, &collect(&mut tracker, &source), &new);
            written.extend(new);
            // By now it is protected like all else.
            assert!(collect(&mut tracker, &source).is_empty(), "round {round}");
            let again = written[round as usize * 2];
            qemu.poke(again, 100 + round as u8);
            assert_eq!(collect(&mut tracker, &source), [again], "round {round}");
        }
    }
}

#[test]
fn exactly_the_pages_that_qemu_wrote_are_dirty() {
    for (object, private) in [(memfd(256), false), (PRIVATE.to_owned(), true)] {
        exactly_what_was_written(&object, private);
    }
}

fn exactly_what_was_written(object: &str, private: bool) {
    let mut qemu = Qemu::start(object, &[]);
    let block = qemu.block("mem", 256 * MIB, 0);
    let source = Source::open(qemu.pid(), &[block]).unwrap();
    assert_eq!(source.private(), private.then_some("mem"));
    source.try_out().unwrap();
    qemu.poke(1000, 1);
    let mut tracker = source.tracker().unwrap();
    tracker.begin().unwrap();
    assert!(collect(&mut tracker, &source).is_empty());
    for round in 0..20_u64 {
        // 1000 was there, the others are holes in the first round.
        let pages = [600 + round % 3, 1000, 5000 + round, 65535];
        pages.iter().for_each(|page| qemu.poke(*page, round as u8));
        // Beside what was there before. Where nothing was, the kernel makes content of a page that is read.
        qemu.peek(1001 + round);
        let found = collect(&mut tracker, &source);
        if round == 0 {
            // Where nothing was, the kernel may make a huge page for one that is written.
            includes(&source, &found, &pages);
        } else {
            assert_eq!(found, pages, "round {round}");
        }
        let mut page = [0; PAGE_SIZE];
        source.memory().read(RAM, PageRange::new(PageIndex(65535), 1), &mut page).unwrap();
        assert_eq!(page[0], round as u8);
    }
    // A second tracker must not take over in silence.
    let mut second = source.tracker().unwrap();
    second.begin().unwrap_err();
    drop(second);
    qemu.poke(7777, 1);
    includes(&source, &collect(&mut tracker, &source), &[7777]);
    qemu.poke(7777, 2);
    assert_eq!(collect(&mut tracker, &source), [7777]);
    drop(tracker);
    let mut third = source.tracker().unwrap();
    third.begin().unwrap();
    qemu.poke(8888, 1);
    includes(&source, &collect(&mut third, &source), &[8888]);
    let memory = source.memory();
    memory.write(RAM, PageRange::new(PageIndex(0), 1), &[0; PAGE_SIZE]).unwrap_err();
    // Shared RAM outlives QEMU, and the death of QEMU is not taken for a guest that writes nothing.
    drop(qemu);
    let mut dirty = MemorySet::empty([256 * MIB / PAGE_SIZE as u64]);
    third.collect(&mut dirty).unwrap_err();
    let mut page = [0; PAGE_SIZE];
    let read = memory.read(RAM, PageRange::new(PageIndex(65535), 1), &mut page);
    if private {
        read.unwrap_err();
        return;
    }
    assert_eq!(page[0], 19);
}

#[test]
fn a_mirror_of_a_booting_guest_is_complete() {
    for object in [memfd(256), PRIVATE.to_owned()] {
        let Some(qemu) = booting_on(&object) else { return };
        is_complete(qemu);
    }
}

fn is_complete(mut qemu: Qemu) {
    let block = qemu.block("mem", 256 * MIB, 0);
    let source = Source::open(qemu.pid(), &[block]).unwrap();
    let mut tracker = source.tracker().unwrap();
    qemu.qmp("cont", json!({}));
    std::thread::sleep(Duration::from_millis(500));
    mirror(&mut qemu, &source.memory(), &mut tracker, Duration::from_secs(4), |_, _| {});
}

#[test]
fn a_qemu_of_another_user_in_a_sandbox_is_attached_to() {
    let sandbox = "on,obsolete=deny,spawn=deny,resourcecontrol=deny";
    let mut qemu = Qemu::start(&memfd(64), &["-runas", "nobody", "-sandbox", sandbox]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", qemu.pid())).unwrap();
    assert!(!status.contains("Uid:\t0\t0"), "{status}");
    let block = qemu.block("mem", 64 * MIB, 0);
    let source = Source::open(qemu.pid(), &[block]).unwrap();
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", source.process().pid())).unwrap().count();
    let before = descriptors();
    let mut tracker = source.tracker().unwrap();
    assert_eq!(descriptors(), before, "nothing of ours stays in QEMU");
    tracker.begin().unwrap();
    qemu.poke(3000, 1);
    assert_eq!(collect(&mut tracker, &source), [3000]);
}

#[test]
fn equal_blocks_are_told_apart() {
    let mut qemu = Qemu::start_machine(
        &"-machine q35 -m 128M -object memory-backend-memfd,id=one,share=on,size=64M \
         -object memory-backend-memfd,id=two,share=on,size=64M -numa node,memdev=one \
         -numa node,memdev=two"
            .split(' ')
            .collect::<Vec<_>>(),
    );
    let blocks = [qemu.block("one", 64 * MIB, 0), qemu.block("two", 64 * MIB, 64 * MIB)];
    let source = Source::open(qemu.pid(), &blocks).unwrap();
    qemu.poke(2000, 11);
    qemu.poke(64 * MIB / PAGE_SIZE as u64 + 2000, 22);
    let mut page = [0; PAGE_SIZE];
    for (id, value) in [(BlockId(0), 11), (BlockId(1), 22)] {
        source.memory().read(id, PageRange::new(PageIndex(2000), 1), &mut page).unwrap();
        assert_eq!(page[0], value);
    }
}

#[test]
fn what_cannot_be_attached_to_is_refused_by_its_name() {
    let mut private = Qemu::start("memory-backend-ram,id=mem,size=64M", &[]);
    let block = private.block("mem", 64 * MIB, 0);
    let error = Target::open(private.pid(), std::slice::from_ref(&block)).unwrap_err();
    assert!(matches!(error, Error::NotShared { .. }), "{error}");
    let error = Source::open(private.pid(), &[RamBlock { hva: 0x1000, ..block }]).unwrap_err();
    assert!(matches!(error, Error::NotMapped { .. }), "{error}");

    let mut short = Qemu::start(&memfd(64), &[]);
    let block = short.block("mem", 128 * MIB, 0);
    let error = Source::open(short.pid(), &[block]).unwrap_err();
    assert!(matches!(error, Error::NotMapped { .. }), "{error}");

    let error = Source::open(i32::MAX, &[]).unwrap_err();
    assert!(matches!(error, Error::Step { .. }), "{error}");
}
