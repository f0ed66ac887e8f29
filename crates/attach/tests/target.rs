//! A waiting QEMU is filled, and its guest waits for what is missing.

mod bed;

use attach::Target;
use bed::{MIB, Qemu, SOON, memfd};
use ports::{Fault, GuestMemory, MissingPages, Placed};
use std::time::Duration;
use units::{BlockId, PAGE_SIZE, PageIndex, PageRange};

const RAM: BlockId = BlockId(0);
const A_WHILE: Duration = Duration::from_millis(200);

fn range(start: u64, count: u64) -> PageRange {
    PageRange::new(PageIndex(start), count)
}

fn content(pages: u64, value: u8) -> Vec<u8> {
    vec![value; pages as usize * PAGE_SIZE]
}

fn start(more: &[&str]) -> (Qemu, Target) {
    let mut qemu = Qemu::start(&memfd(64), more);
    qemu.poke(500, 99);
    let block = qemu.block("mem", 64 * MIB, 0);
    let target = Target::open(qemu.pid(), &[block]).unwrap();
    (qemu, target)
}

#[test]
fn it_starts_as_all_holes_and_is_filled() {
    let (mut qemu, target) = start(&[]);
    let memory = target.memory();
    assert!(memory.present(RAM).unwrap().is_empty());
    memory.write(RAM, range(1000, 600), &content(600, 7)).unwrap();
    assert_eq!(memory.present(RAM).unwrap().len(), 600);
    assert_eq!((qemu.peek(1000), qemu.peek(1599)), (7, 7));
    memory.discard(RAM, range(1100, 1)).unwrap();
    assert_eq!(memory.present(RAM).unwrap().len(), 599);
    assert!(!memory.present(RAM).unwrap().contains(PageIndex(1100)));
    assert_eq!(qemu.peek(1100), 0);
    assert!(memory.discard(RAM, range(16_384, 1)).is_err());
    assert!(memory.write(RAM, range(16_383, 2), &content(2, 0)).is_err());
    assert!(memory.write(BlockId(1), range(0, 1), &content(1, 0)).is_err());
}

#[test]
fn qemu_waits_for_a_missing_page_until_it_is_placed() {
    let (mut qemu, target) = start(&[]);
    let memory = target.memory();
    memory.write(RAM, range(1002, 3), &content(3, 1)).unwrap();
    let missing = target.missing().unwrap();
    assert_eq!(missing.next(Duration::ZERO).unwrap(), None);
    assert_eq!(qemu.peek(1002), 1);
    qemu.send_peek(1000);
    let fault = missing.next(SOON).unwrap().unwrap();
    assert_eq!(fault, Fault { block: RAM, page: PageIndex(1000) });
    assert!(qemu.gdb_is_silent(A_WHILE));
    // Three of these are there and stay as they are.
    assert_eq!(missing.place(RAM, range(1000, 10), &content(10, 2)).unwrap(), 7);
    assert_eq!(qemu.gdb_answer(), "02");
    let seen: Vec<u8> = (1000..1010).map(|page| qemu.peek(page)).collect();
    assert_eq!(seen, [2, 2, 1, 1, 1, 2, 2, 2, 2, 2]);
    assert_eq!(missing.place(RAM, range(1000, 10), &content(10, 3)).unwrap(), 0);
    qemu.send_peek(2000);
    let fault = missing.next(SOON).unwrap().unwrap();
    assert_eq!(missing.place_zero(fault).unwrap(), Placed::Now);
    assert_eq!(qemu.gdb_answer(), "00");
    assert_eq!(missing.place_zero(fault).unwrap(), Placed::Already);
    assert!(missing.place(RAM, range(16_380, 10), &content(10, 0)).is_err());
    assert!(missing.place(RAM, range(0, 2), &content(1, 0)).is_err());
    missing.finish().unwrap();
    missing.finish().unwrap();
    assert_eq!(qemu.peek(3000), 0);
    let left = std::fs::read_link(format!("/proc/{}/fd/{}", qemu.pid(), missing.fd_number()));
    assert!(left.is_err(), "the descriptor in QEMU is closed");
}

#[test]
fn a_page_that_was_written_while_somebody_waited_wakes_him() {
    let (mut qemu, target) = start(&[]);
    let missing = target.missing().unwrap();
    qemu.send_peek(1000);
    missing.next(SOON).unwrap().unwrap();
    // The kernel wakes nobody for that; a signal to QEMU's thread might, so it is not asserted that he waits.
    target.memory().write(RAM, range(990, 20), &content(20, 5)).unwrap();
    assert_eq!(missing.place(RAM, range(980, 40), &content(40, 6)).unwrap(), 20);
    assert_eq!(qemu.gdb_answer(), "05");
}

/// An agent is lost while somebody waits for page 1000, and pages 100 to 104 are there. The next one has the
/// number of its descriptor.
fn left(qemu: &mut Qemu, target: Target) -> (Target, i32) {
    let block = qemu.block("mem", 64 * MIB, 0);
    let missing = target.missing().unwrap();
    missing.place(RAM, range(100, 5), &content(5, 8)).unwrap();
    let number = missing.fd_number();
    qemu.send_peek(1000);
    drop(missing);
    drop(target);
    assert!(qemu.gdb_is_silent(A_WHILE), "it must never read zeros for what it misses");
    (Target::reopen(qemu.pid(), &[block], &[].into()).unwrap(), number)
}

#[test]
fn a_watch_for_no_missing_page_is_ended_by_the_next_agent() {
    let (mut qemu, target) = start(&[]);
    let (target, number) = left(&mut qemu, target);
    assert!(target.is_watched(number).unwrap());
    target.end_watch(number).unwrap();
    assert_eq!(qemu.gdb_answer(), "00", "what was never sent is zeros");
    assert_eq!((qemu.peek(100), qemu.peek(2000)), (8, 0));
    // The one before us may have ended it, and not have lived to record that.
    assert!(!target.is_watched(number).unwrap());
    target.end_watch(number).unwrap();
}

#[test]
fn a_guest_whose_agent_dies_waits_for_the_next_one() {
    let (mut qemu, target) = start(&["-runas", "nobody"]);
    let (target, number) = left(&mut qemu, target);
    let missing = target.retake(number).unwrap();
    assert_eq!(target.memory().present(RAM).unwrap().len(), 5, "what had come stays");
    let fault = missing.next(SOON).unwrap().unwrap();
    assert_eq!(fault.page, PageIndex(1000));
    missing.place(RAM, range(1000, 1), &content(1, 4)).unwrap();
    assert_eq!(qemu.gdb_answer(), "04");
    missing.finish().unwrap();
    assert_eq!(qemu.peek(1001), 0);
    target.retake(number).unwrap_err();
}
