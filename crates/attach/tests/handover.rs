//! Memory that another process maps as its RAM: found by a mark that only this memory shows, and never
//! written.

mod bed;

use attach::{Source, Target, Tracking};
use bed::{MIB, Qemu, memfd};
use ports::{GuestMemory, MissingPages, Nonce, Reached, Tracker};
use std::{collections::BTreeSet, os::fd::AsRawFd, time::Duration};
use units::{BlockId, MemorySet, PAGE_SIZE, PageIndex, PageRange};

const RAM: BlockId = BlockId(0);

fn reached() -> BTreeSet<BlockId> {
    [RAM].into()
}

/// A guest in whose page 500 is 99.
fn guest(object: &str) -> (Qemu, Source) {
    let mut qemu = Qemu::start(object, &[]);
    qemu.poke(500, 99);
    let block = qemu.block("mem", 64 * MIB, 0);
    let source = Source::open(qemu.pid(), &[block]).unwrap();
    (qemu, source)
}

#[test]
fn i3_memory_that_is_handed_over_is_reached_and_never_written() {
    let (mut guest, source) = guest(&memfd(64));
    let nonce = Nonce::new(u64::MAX);
    let lent = source.lend(RAM, nonce).unwrap().unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), lent.file().as_raw_fd());
    let object = format!("memory-backend-file,id=mem,share=on,size=64M,mem-path={path}");
    let mut waiting = Qemu::start(&object, &[]);
    let block = waiting.block("mem", 64 * MIB, 0);
    let open = || Target::open_reaching(waiting.pid(), std::slice::from_ref(&block), &reached());
    let (target, found) = open().unwrap();
    assert_eq!(found, [Reached { block: RAM, nonce }]);
    let (memory, page) = (target.memory(), PageRange::new(PageIndex(500), 1));
    memory.write(RAM, page, &[7; PAGE_SIZE]).unwrap_err();
    memory.discard(RAM, page).unwrap_err();
    let again = Target::reopen(waiting.pid(), std::slice::from_ref(&block), &reached()).unwrap();
    again.memory().write(RAM, page, &[7; PAGE_SIZE]).unwrap_err();
    let missing = target.missing().unwrap();
    missing.place(RAM, page, &[7; PAGE_SIZE]).unwrap_err();
    let hole = PageRange::new(PageIndex(9000), 1);
    missing.place(RAM, hole, &[7; PAGE_SIZE]).unwrap_err();
    // Nobody waits for what is not there: it was never written.
    assert_eq!((waiting.peek(9000), missing.next(Duration::ZERO).unwrap()), (0, None));
    missing.finish().unwrap();
    assert_eq!((guest.peek(500), waiting.peek(500)), (99, 99));
    waiting.poke(501, 5);
    assert_eq!(guest.peek(501), 5, "they are the same bytes");
    // A mark ends with what it stands for.
    drop(lent);
    let why = Target::open_reaching(waiting.pid(), &[block], &reached()).unwrap_err().to_string();
    assert!(why.contains("RAM block mem of the waiting VM is not the memory"), "{why}");
    assert_eq!(guest.peek(500), 99);
}

#[test]
fn other_memory_is_not_reached_whatever_its_name() {
    let (_guest, source) = guest(&memfd(64));
    let _lent = source.lend(RAM, Nonce::new(1)).unwrap().unwrap();
    for object in [memfd(64), "memory-backend-ram,id=mem,size=64M".to_owned()] {
        let mut waiting = Qemu::start(&object, &[]);
        waiting.poke(500, 98);
        let block = waiting.block("mem", 64 * MIB, 0);
        Target::open_reaching(waiting.pid(), &[block], &reached()).unwrap_err();
        assert_eq!(waiting.peek(500), 98, "it was left as it is");
    }
}

#[test]
fn what_no_other_process_can_map_is_not_lent() {
    for object in ["memory-backend-ram,id=mem,size=64M", "memory-backend-memfd,id=mem,share=off,size=64M"] {
        let (_guest, source) = guest(object);
        assert!(source.lend(RAM, Nonce::new(1)).unwrap().is_none(), "{object}");
    }
}

#[test]
fn what_is_left_out_is_not_tracked_and_nobody_waits_there() {
    for synchronous in [false, true] {
        let (mut guest, source) = guest(&memfd(64));
        let how = Tracking { writers: 1, max_stall: Duration::from_millis(20), synchronous, group: None };
        let mut tracker = source.switching(how).unwrap();
        tracker.begin().unwrap();
        guest.poke(500, 1);
        tracker.leave_out(&[RAM]).unwrap();
        let mut dirty = MemorySet::empty([64 * MIB / PAGE_SIZE as u64]);
        for (page, value) in (500..).zip(2..9) {
            guest.poke(page, value);
            tracker.collect(&mut dirty).unwrap();
        }
        // Also once its writers are to be throttled, and after another beginning.
        tracker.throttle(1e6).unwrap();
        guest.poke(600, 1);
        tracker.collect(&mut dirty).unwrap();
        tracker.begin().unwrap();
        guest.poke(601, 1);
        tracker.collect(&mut dirty).unwrap();
        assert!(dirty.is_empty(), "synchronous: {synchronous}");
        drop(tracker);
        guest.poke(602, 1);
    }
}
