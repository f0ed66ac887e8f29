//! RAM of explicit huge pages (hugetlbfs): what is there, what was written, and what was thrown away, exactly
//! and at no cost of huge pages. `HUGE` pages of 4 KiB are one.

mod bed;

use attach::{Error, Source, Target, Tracking};
use bed::{MIB, Qemu, booting_on, mirror};
use ports::{GuestMemory, Tracker};
use std::{fs, path::PathBuf, process::Command, time::Duration};
use units::{BlockId, MemorySet, PAGE_SIZE, PageIndex, PageRange};

const RAM: BlockId = BlockId(0);
const HUGE: u64 = 512;

/// Huge pages of this machine and a place for files of them, given back in the end. None: it has none to
/// spare.
struct Huge {
    before: String,
    at: PathBuf,
}

impl Huge {
    const COUNT: &str = "/proc/sys/vm/nr_hugepages";

    fn reserve(pages: u64) -> Option<Self> {
        let count = || fs::read_to_string(Self::COUNT).unwrap().trim().parse::<u64>().unwrap();
        let before = count();
        let reserved =
            fs::write(Self::COUNT, (before + pages).to_string()).is_ok() && count() >= before + pages;
        let at = std::env::temp_dir().join(format!("attach-huge-{}", std::process::id()));
        let huge = Self { before: before.to_string(), at };
        if !reserved {
            eprintln!("\n*** SKIPPED: this machine has no {pages} huge pages to set aside ***");
            return None;
        }
        fs::create_dir_all(&huge.at).unwrap();
        let mut mount = Command::new("mount");
        assert!(mount.args(["-t", "hugetlbfs", "none"]).arg(&huge.at).status().unwrap().success());
        Some(huge)
    }

    /// Shared by a memfd, shared by a file, and private in two ways.
    fn objects(&self, mib: u64) -> [String; 4] {
        let (path, new) = (self.at.display(), self.at.join("ram"));
        [
            format!("memory-backend-memfd,id=mem,share=on,size={mib}M,hugetlb=on,hugetlbsize=2M"),
            format!("memory-backend-file,id=mem,share=on,size={mib}M,mem-path={}", new.display()),
            format!("memory-backend-file,id=mem,size={mib}M,mem-path={path}"),
            format!("memory-backend-memfd,id=mem,share=off,size={mib}M,hugetlb=on"),
        ]
    }
}

impl Drop for Huge {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.at).status());
        drop(fs::remove_dir(&self.at));
        drop(fs::write(Self::COUNT, &self.before));
    }
}

fn huge_pages_of(source: &Source) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/status", source.process().pid())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("HugetlbPages:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 2048
}

fn runs(set: &MemorySet) -> Vec<(u64, u64)> {
    set.block(RAM).runs().map(|run| (run.start.0, run.count)).collect()
}

fn collect(tracker: &mut impl Tracker, source: &Source) -> Vec<(u64, u64)> {
    let mut dirty = MemorySet::empty(source.memory().blocks().iter().map(|block| block.pages));
    tracker.collect(&mut dirty).unwrap();
    runs(&dirty)
}

/// All in one: huge pages are the whole machine's.
#[test]
fn i2_huge_pages_are_followed_exactly_and_at_no_cost() {
    let Some(huge) = Huge::reserve(80) else { return };
    // The last huge page reaches beyond the end of the block, where QEMU allows that.
    for (object, bytes) in huge.objects(32).iter().map(|object| (object, 32 * MIB)) {
        follows(object, bytes);
    }
    follows(&huge.objects(31)[2], 31 * MIB);
    refuses_a_file_with_content(&huge);
    for object in [&huge.objects(128)[0], &huge.objects(128)[2]] {
        let Some(mut qemu) = booting_on(object) else { return };
        let block = qemu.block("mem", 128 * MIB, 0);
        let source = Source::open(qemu.pid(), &[block]).unwrap();
        qemu.qmp("cont", serde_json::json!({}));
        let mut tracker = source.tracker().unwrap();
        mirror(&mut qemu, &source.memory(), &mut tracker, Duration::from_secs(2), |_, _| {});
    }
}

fn follows(object: &str, bytes: u64) {
    let mut qemu = Qemu::start(object, &["-m", &format!("{bytes}B")]);
    let block = qemu.block("mem", bytes, 0);
    let source = Source::open(qemu.pid(), std::slice::from_ref(&block)).unwrap();
    let (memory, pages) = (source.memory(), bytes / PAGE_SIZE as u64);
    assert_eq!(source.huge(), Some(("mem", 2 * MIB)), "{object}");
    assert_eq!(source.on_disk().unwrap(), None, "{object}");
    source.try_out().unwrap();
    // It is not to be slowed, nor filled page by page.
    let how = Tracking { writers: 1, max_stall: Duration::from_millis(5), synchronous: true, group: None };
    assert!(matches!(source.switching(how.clone()).unwrap_err(), Error::HugePages { .. }), "{object}");
    assert!(matches!(source.throttled(&how).unwrap_err(), Error::HugePages { .. }), "{object}");
    let refused = Target::open(qemu.pid(), std::slice::from_ref(&block)).unwrap_err();
    assert!(matches!(refused, Error::HugeTarget { .. } | Error::NotShared { .. }), "{object}: {refused}");

    let last = (pages - 1) / HUGE * HUGE;
    qemu.poke(3 * HUGE + 7, 1);
    let mut tracker = source.switching(Tracking { synchronous: false, ..how }).unwrap();
    assert!(!tracker.can_throttle() && !tracker.may_make_wait());
    tracker.begin().unwrap();
    // Firmware has pages of its own low in memory.
    let there: Vec<_> = memory.present(RAM).unwrap().runs().collect();
    assert!(there.contains(&PageRange::new(PageIndex(3 * HUGE), HUGE)), "{object}: {there:?}");
    assert_eq!(collect(&mut tracker, &source), [], "{object}");
    // What is not there is zeros, and does not come into being by being read; not even in part of a read.
    let held = huge_pages_of(&source);
    let mut some = vec![1; 600 * PAGE_SIZE];
    memory.read(RAM, PageRange::new(PageIndex(3 * HUGE), 600), &mut some).unwrap();
    assert_eq!((some[7 * PAGE_SIZE], some.iter().filter(|byte| **byte != 0).count()), (1, 1), "{object}");
    let mut one = [1; PAGE_SIZE];
    memory.read(RAM, PageRange::new(PageIndex(pages - 1), 1), &mut one).unwrap();
    assert_eq!(one, [0; PAGE_SIZE], "{object}");
    assert_eq!(huge_pages_of(&source), held, "{object}");

    qemu.poke(3 * HUGE + 8, 2);
    qemu.poke(pages - 1, 3);
    assert_eq!(collect(&mut tracker, &source), [(3 * HUGE, HUGE), (last, pages - last)], "{object}");
    assert_eq!(collect(&mut tracker, &source), [], "{object}");
    memory.read(RAM, PageRange::new(PageIndex(pages - 1), 1), &mut one).unwrap();
    assert_eq!(one[0], 3, "{object}");

    // As QEMU does it for a balloon.
    let path = format!("/proc/{}/map_files", qemu.pid());
    let mut mapped = fs::read_dir(path).unwrap().flatten().map(|entry| entry.path());
    let begins = format!("{:x}-", block.hva);
    let file = mapped.find(|path| path.file_name().unwrap().to_string_lossy().starts_with(&begins));
    let file = fs::OpenOptions::new().write(true).open(file.unwrap()).unwrap();
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, flags, 3 * HUGE * PAGE_SIZE as u64, 2 * MIB).unwrap();
    let written = collect(&mut tracker, &source);
    assert_eq!(written, [(3 * HUGE, HUGE)], "{object}");
    memory.read(RAM, PageRange::new(PageIndex(3 * HUGE + 7), 1), &mut one).unwrap();
    assert_eq!(one, [0; PAGE_SIZE], "{object}");
    assert!(!memory.present(RAM).unwrap().contains(PageIndex(3 * HUGE)), "{object}");
    assert_eq!(collect(&mut tracker, &source), [], "{object}");
    qemu.poke(3 * HUGE + 9, 4);
    assert_eq!(collect(&mut tracker, &source), [(3 * HUGE, HUGE)], "{object}");
    assert_eq!(qemu.peek(3 * HUGE + 7), 0, "{object}");
}

/// A file that was there before, of which QEMU has a private mapping: what is not there yet is what the file
/// holds.
fn refuses_a_file_with_content(huge: &Huge) {
    let objects = huge.objects(16);
    let mut first = Qemu::start(&objects[1], &["-m", "16M"]);
    first.poke(5, 5);
    let mut second = Qemu::start(&objects[1].replace("share=on", "share=off"), &["-m", "16M"]);
    let block = second.block("mem", 16 * MIB, 0);
    let error = Source::open(second.pid(), &[block]).unwrap_err();
    assert!(matches!(error, Error::HugeFile { .. }), "{error}");
}
