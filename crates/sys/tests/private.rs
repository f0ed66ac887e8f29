//! RAM that only its process can reach is read, and followed, exactly.

mod common;

use common::Guest;
use std::{collections::BTreeSet, ops::Range, time::Instant};
use sys::{
    inject::Borrowed,
    pagemap::Pagemap,
    process_ram::ProcessRam,
    uffd::{Features, Uffd, Watch},
};
use units::{PAGE_SIZE, PageIndex, PageRange};

#[test]
#[ignore = "not a test: the process that the tests experiment on"]
fn role() {
    common::play();
}

const PAGES: u64 = 4096;
const HUGE: u64 = 512;

fn watch(guest: &Guest, more: Features) -> Uffd {
    let borrowed = Borrowed::seize(&guest.process).unwrap();
    let n = borrowed.userfaultfd().unwrap();
    let uffd = Uffd::take(&guest.process, n).unwrap();
    borrowed.close(n).unwrap();
    uffd.enable(Features::WP | Features::WP_UNPOPULATED | more).unwrap();
    uffd.register(guest.base..guest.end(), Watch::Writes).unwrap();
    uffd.protect(guest.base..guest.end()).unwrap();
    uffd
}

fn pages(guest: &Guest, found: impl FnOnce(&mut dyn FnMut(Range<u64>))) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    found(&mut |run| {
        let first = (run.start - guest.base) / PAGE_SIZE as u64;
        pages.extend(first..first + (run.end - run.start) / PAGE_SIZE as u64);
    });
    pages
}

fn present(ram: &ProcessRam) -> BTreeSet<u64> {
    ram.present().unwrap().runs().flat_map(|run| run.start.0..run.end().0).collect()
}

#[test]
fn what_is_there_is_told_from_what_was_never_written() {
    for huge in [false, true] {
        let mut guest = Guest::start_private(PAGES, huge);
        let ram = ProcessRam::new(&guest.process, guest.base..guest.end(), false).unwrap();
        assert!(present(&ram).is_empty());
        guest.ask("write 7");
        guest.ask("write 3000");
        // The kernel shows its page of zeros.
        guest.ask("read 2000");
        let expected: BTreeSet<u64> =
            if huge { (0..HUGE).chain(5 * HUGE..6 * HUGE).collect() } else { [7, 3000].into() };
        assert_eq!(present(&ram), expected, "huge pages: {huge}");
        // A protection leaves a mark where nothing is.
        let uffd = watch(&guest, Features::WP_ASYNC);
        assert_eq!(present(&ram), expected, "huge pages: {huge}");
        let mut bytes = [0; 2 * PAGE_SIZE];
        ram.read(PageRange::new(PageIndex(6), 2), &mut bytes).unwrap();
        assert_eq!((bytes[17], bytes[PAGE_SIZE + 17]), (0, 7));
        let mut much = vec![0; 32 * PAGE_SIZE];
        ram.read(PageRange::new(PageIndex(2990), 32), &mut much).unwrap();
        assert_eq!((much[10 * PAGE_SIZE + 17], much.iter().filter(|byte| **byte != 0).count()), (7, 1));
        assert_eq!(present(&ram), expected, "reading makes nothing present");
        drop(uffd);
        ram.read(PageRange::new(PageIndex(PAGES), 1), &mut [0; PAGE_SIZE]).unwrap_err();
        drop(guest);
        for pages in [1, 32] {
            ram.read(PageRange::new(PageIndex(0), pages), &mut vec![0; pages as usize * PAGE_SIZE])
                .unwrap_err();
        }
    }
}

#[test]
fn i2_a_write_after_a_discard_is_seen() {
    for huge in [false, true] {
        for synchronous in [false, true] {
            let story = format!("huge pages: {huge}, synchronous: {synchronous}");
            let mut guest = Guest::start_private(PAGES, huge);
            guest.ask("fill");
            let more = if synchronous { Features::NONE } else { Features::WP_ASYNC };
            let uffd = watch(&guest, more);
            let mut pagemap = Pagemap::open(&guest.process).unwrap();
            let addresses = guest.base..guest.end();
            let mut found = |guest: &Guest| {
                let addresses = addresses.clone();
                let found = pages(guest, |report| match synchronous {
                    true => pagemap.unprotected(addresses, report).unwrap(),
                    false => pagemap.take_written(addresses, report).unwrap(),
                });
                for page in &found {
                    uffd.protect(guest.at(*page)..guest.at(*page + 1)).unwrap();
                }
                found
            };
            assert!(found(&guest).is_empty(), "{story}");
            // Single pages, and more than one page table holds.
            for (first, count) in [(9, 1), (100, 30), (HUGE - 8, 3 * HUGE)] {
                guest.ask(&format!("discard {first} {count}"));
                let discarded: BTreeSet<u64> = (first..first + count).collect();
                if synchronous {
                    // Nothing is there, and nothing was written.
                    assert!(found(&guest).is_empty(), "{story}");
                } else {
                    assert!(found(&guest).is_subset(&discarded), "{story}");
                }
                for page in BTreeSet::from([first, first + count - 1]) {
                    let verb = ["write", "thread", "kernel"][page as usize % 3];
                    guest.ask(&format!("{verb} {page}"));
                    let written = found(&guest);
                    assert!(written.contains(&page), "{story}: {page}, {written:?}");
                    assert!(written.is_subset(&discarded), "{story}: {written:?}");
                }
            }
        }
    }
}

/// What to read with: see `ProcessRam`.
#[test]
#[ignore = "a measurement"]
fn figures() {
    const PAGES: u64 = 131_072;
    let mut guest = Guest::start_private(PAGES, false);
    guest.ask("fill");
    let memory = std::fs::File::open(guest.process.proc_path("mem")).unwrap();
    for pages in [1, 4, 8, 16, 64] {
        let mut bytes = vec![0; pages * PAGE_SIZE];
        let rate = |read: &mut dyn FnMut(u64)| {
            let began = Instant::now();
            (0..PAGES).step_by(pages).for_each(|page| read(guest.at(page)));
            PAGES as f64 * PAGE_SIZE as f64 / began.elapsed().as_secs_f64() / 1e6
        };
        let file = rate(&mut |at| {
            std::os::unix::fs::FileExt::read_exact_at(&memory, &mut bytes, at).unwrap();
        });
        let call = rate(&mut |at| guest.process.read_memory(at, &mut bytes).unwrap());
        println!("{pages} pages: /proc/PID/mem {file:.0} MB/s, process_vm_readv {call:.0} MB/s");
    }
    let before = Instant::now();
    let uffd = watch(&guest, Features::WP_ASYNC);
    println!("{} MiB protected in {:?}", PAGES >> 8, before.elapsed());
    drop(uffd);
}
