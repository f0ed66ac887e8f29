//! Whoever touches a missing page waits until it is placed.

mod common;

use common::{Guest, SOON};
use std::{ops::Range, time::Duration};
use sys::{
    inject::Borrowed,
    uffd::{Copied, Features, Uffd, Watch},
};
use units::{PAGE_SIZE, PageIndex, PageRange};

#[test]
#[ignore = "not a test: the process that the tests experiment on"]
fn role() {
    common::play();
}

fn watch(guest: &Guest) -> (Uffd, i32) {
    let n = Borrowed::seize(&guest.process).unwrap().userfaultfd().unwrap();
    let uffd = Uffd::take(&guest.process, n).unwrap();
    uffd.enable(Features::MISSING_SHMEM).unwrap();
    uffd.register(guest.base..guest.end(), Watch::Missing).unwrap();
    (uffd, n)
}

fn pages(guest: &Guest, pages: Range<u64>) -> Range<u64> {
    guest.at(pages.start)..guest.at(pages.end)
}

#[test]
fn a_reader_waits_until_the_page_is_placed() {
    let mut guest = Guest::start(64);
    let (uffd, _) = watch(&guest);
    guest.order("read 5");
    let fault = uffd.next(SOON).unwrap().unwrap();
    assert_eq!((fault.address, fault.write, fault.protected), (guest.at(5), false, false));
    assert!(guest.is_silent());
    assert_eq!(uffd.copy(guest.at(4), &[9; 4 * PAGE_SIZE]).unwrap(), Copied::All);
    assert_eq!(guest.answer(), "9");
    assert_eq!(guest.ask("read 7"), "9");
    guest.order("write 9");
    assert!(uffd.next(SOON).unwrap().unwrap().write);
    assert_eq!(uffd.zero(pages(&guest, 9..10)).unwrap(), Copied::All);
    assert_eq!(guest.answer(), "done");
    assert_eq!(uffd.next(Duration::ZERO).unwrap(), None);
}

#[test]
fn a_fault_inside_the_kernel_waits_too() {
    let mut guest = Guest::start(64);
    let (uffd, n) = watch(&guest);
    guest.order("kernel 3");
    assert_eq!(uffd.next(SOON).unwrap().unwrap().address, guest.at(3));
    assert!(guest.is_silent());
    // This thread hangs in the kernel now and cannot be borrowed. That must neither hang us nor harm it.
    let error = Borrowed::seize_thread(&guest.process, guest.tid).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut, "{error}");
    let other = Borrowed::seize(&guest.process).unwrap();
    assert_ne!(other.tid(), guest.tid);
    drop(other);
    uffd.copy(guest.at(3), &[1; PAGE_SIZE]).unwrap();
    assert_eq!(guest.answer(), "done");
    assert_eq!(guest.ask("read 3"), "0");
    Borrowed::seize(&guest.process).unwrap().close(n).unwrap();
}

#[test]
fn a_page_that_is_there_is_never_overwritten() {
    let mut guest = Guest::start(64);
    guest.ask("write 10");
    let (uffd, _) = watch(&guest);
    assert_eq!(uffd.copy(guest.at(8), &[9; 8 * PAGE_SIZE]).unwrap(), Copied::UpTo(2 * PAGE_SIZE as u64));
    assert_eq!(uffd.copy(guest.at(10), &[9; PAGE_SIZE]).unwrap(), Copied::UpTo(0));
    assert_eq!(uffd.zero(pages(&guest, 8..12)).unwrap(), Copied::UpTo(0));
    assert_eq!(guest.ask("read 10"), "7");
    assert_eq!(guest.ask("read 9"), "9");
}

#[test]
fn a_page_that_came_through_the_file_needs_a_wake() {
    let mut guest = Guest::start(64);
    let ram = guest.ram();
    let (uffd, _) = watch(&guest);
    guest.order("read 2");
    uffd.next(SOON).unwrap().unwrap();
    ram.write(PageRange::new(PageIndex(2), 1), &[6; PAGE_SIZE]).unwrap();
    assert!(guest.is_silent());
    assert_eq!(uffd.copy(guest.at(2), &[9; PAGE_SIZE]).unwrap(), Copied::UpTo(0));
    uffd.wake(pages(&guest, 2..3)).unwrap();
    assert_eq!(guest.answer(), "6");
}

#[test]
fn whoever_waits_outlives_us_and_is_served_by_our_successor() {
    let mut guest = Guest::start(64);
    let (uffd, n) = watch(&guest);
    guest.order("read 1");
    uffd.next(SOON).unwrap().unwrap();
    drop(uffd);
    assert!(guest.is_silent(), "it must never read zeros for what it misses");
    let uffd = Uffd::take(&guest.process, n).unwrap();
    assert_eq!(uffd.copy(guest.at(1), &[5; PAGE_SIZE]).unwrap(), Copied::All);
    assert_eq!(guest.answer(), "5");
    guest.order("read 2");
    assert_eq!(uffd.next(SOON).unwrap().unwrap().address, guest.at(2));
    uffd.unregister(guest.base..guest.end()).unwrap();
    assert_eq!(guest.answer(), "0", "holes are zeros again");
    Borrowed::seize(&guest.process).unwrap().close(n).unwrap();
}

#[test]
fn only_a_userfaultfd_of_another_process_is_taken() {
    let guest = Guest::start(1);
    assert!(Uffd::take(&guest.process, 0).unwrap_err().to_string().contains("not a userfaultfd"));
    let me = sys::process::PidFd::open(std::process::id() as i32).unwrap();
    Uffd::take(&me, 0).unwrap_err();
}

#[test]
fn a_punched_page_is_a_hole_again_and_reading_leaves_it_one() {
    let mut guest = Guest::start(1024);
    guest.ask("fill");
    let ram = guest.ram();
    assert_eq!(ram.present().unwrap().len(), 1024);
    ram.punch(PageRange::new(PageIndex(100), 50)).unwrap();
    assert_eq!(ram.present().unwrap().len(), 974);
    let mut page = vec![1; PAGE_SIZE];
    ram.read(PageRange::new(PageIndex(120), 1), &mut page).unwrap();
    assert!(page.iter().all(|byte| *byte == 0));
    assert_eq!(ram.present().unwrap().len(), 974);
    assert!(ram.read(PageRange::new(PageIndex(1024), 1), &mut page).is_err());
    assert!(ram.write(PageRange::new(PageIndex(u64::MAX), 1), &page).is_err());
}
