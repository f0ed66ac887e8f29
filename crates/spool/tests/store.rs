//! Datastores that are full, stall, lie or vanish; and what is left behind on them.

#[allow(dead_code, reason = "for the other tests")]
mod common;
#[allow(dead_code, unreachable_pub, reason = "the laboratory's, as it is")]
#[path = "../../../tests/src/datastore.rs"]
mod datastore;

use common::*;
use datastore::Datastore;
use spool::{Content, FileName, Header, Reader, Refused, Side, SpoolError, Verdict, Writer, sweep};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant, SystemTime},
};
use units::{BlockId, MigrationId, PAGE_SIZE, PageIndex, PageRange};

/// As long as a test waits for a store of which it knows that it does not answer.
const SOON: Duration = Duration::from_millis(200);

/// A file system of memory that is unmounted when the test ends, however it does.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: &Path, options: &str) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at).status();
        mounted.is_ok_and(|status| status.success()).then(|| Self(at.to_owned()))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn pages(n: u64) -> Run {
    Run { block: 0, start: n * 32 % 4000, count: 32, seed: (n % 200) as u8 + 1, compress: false }
}

/// Appends until it is refused for good; a busy store is waited for.
fn fill(writer: &Writer, most: u64) -> Result<(), SpoolError> {
    for n in 0..most {
        let run = pages(n);
        let content: Vec<u8> = (run.start..run.start + run.count).flat_map(|p| run.page(p)).collect();
        loop {
            match writer.append(1, BlockId(0), run.range(), Content::Pages(content.clone()), false) {
                Ok(_) => break,
                Err(Refused::Failed(why)) => return Err(why),
                Err(Refused::Busy) => {
                    writer.wait(PATIENCE, |now| now.waiting < 4 << 20);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_full_store_is_an_error_and_keeps_what_was_durable() {
    let directory = tempfile::tempdir().unwrap();
    let Some(tmpfs) = Tmpfs::mount(&directory.path().join("small"), "size=4m") else { return };
    let writer = create(&tmpfs.0);
    fill(&writer, 8).unwrap();
    let before = writer.sync(PATIENCE).unwrap();
    let failed = fill(&writer, 1000).and_then(|()| writer.sync(PATIENCE).map(drop)).unwrap_err();
    assert!(failed.is_full(), "{failed}");
    let durable = writer.progress().durable;
    assert!(durable >= before);
    assert!(matches!(
        writer.append(1, BlockId(0), pages(0).range(), Content::Nothing, false),
        Err(Refused::Failed(_))
    ));
    assert!(writer.sync(PATIENCE).is_err());
    let index = Reader::open(writer.path(), &SECRET).unwrap().scan().unwrap();
    assert_eq!(index.whole_from(0, durable.extents), 0);
    let path = writer.path().to_owned();
    assert!(writer.remove(PATIENCE));
    assert!(!path.exists());
}

#[test]
fn after_one_failed_fsync_nothing_is_ever_durable_again() {
    let directory = tempfile::tempdir().unwrap();
    let Ok(store) = Datastore::mount(&directory.path().join("at"), &directory.path().join("of")) else {
        return;
    };
    let writer = create(store.path());
    pages(0).append(&writer);
    let before = writer.sync(PATIENCE).unwrap();
    store.fail_fsync(Some(5));
    pages(1).append(&writer);
    let first = writer.sync(PATIENCE).unwrap_err().to_string();
    // The kernel reports a lost write once and then calls the file clean: the writer remembers.
    store.fail_fsync(None);
    assert!(matches!(
        writer.append(1, BlockId(0), pages(2).range(), Content::Nothing, false),
        Err(Refused::Failed(_))
    ));
    assert_eq!(writer.sync(PATIENCE).unwrap_err().to_string(), first);
    assert_eq!(writer.progress().durable, before);
}

#[test]
fn nobody_waits_longer_than_wanted_for_a_store_that_stalls() {
    let directory = tempfile::tempdir().unwrap();
    let Ok(store) = Datastore::mount(&directory.path().join("at"), &directory.path().join("of")) else {
        return;
    };
    let writer = create(store.path());
    pages(0).append(&writer);
    writer.sync(PATIENCE).unwrap();
    assert_eq!(writer.progress().silent, None, "nothing is asked of it");
    store.stall(true);
    pages(1).append(&writer);
    let begun = Instant::now();
    assert!(matches!(writer.sync(SOON), Err(SpoolError::Stalled { .. })));
    assert!(writer.progress().silent.is_some_and(|silent| silent >= SOON));
    // What may wait is bounded, and asking costs no time.
    let mut accepted = 0;
    let busy = loop {
        let run = pages(accepted + 2);
        let content = Content::Pages(vec![1; 32 * PAGE_SIZE]);
        match writer.append(1, BlockId(0), run.range(), content, false) {
            Ok(_) => accepted += 1,
            Err(refused) => break refused,
        }
    };
    assert!(matches!(busy, Refused::Busy), "{busy:?}");
    assert!(accepted * 32 * PAGE_SIZE as u64 <= 16 << 20, "{accepted} extents were accepted");
    // A second file cannot even be made.
    let other = Header { migration: MigrationId(2), ..header() };
    assert!(matches!(Writer::create(store.path(), &other, &SECRET, SOON), Err(SpoolError::Stalled { .. })));
    assert!(begun.elapsed() < PATIENCE);
    // It answers again, and goes on as if nothing had been.
    store.stall(false);
    let mark = writer.sync(PATIENCE).unwrap();
    assert_eq!(mark.extents, accepted + 2);
    let index = Reader::open(writer.path(), &SECRET).unwrap().scan().unwrap();
    assert_eq!(index.whole_from(0, mark.extents), 0);
    // What nobody waited for is not left behind.
    goes(&store.path().join(FileName { migration: MigrationId(2), side: Side::Source }.to_string()));
}

/// There is no event for it: another thread removes it.
fn goes(file: &Path) {
    let end = Instant::now() + PATIENCE;
    while file.exists() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!file.exists(), "{} is left behind", file.display());
}

/// Whoever wanted it may have stopped waiting for it, or have failed at what comes next.
#[test]
fn a_file_that_nobody_has_kept_goes_with_its_writer() {
    let directory = tempfile::tempdir().unwrap();
    let writer = Writer::create(directory.path(), &header(), &SECRET, PATIENCE).unwrap();
    pages(0).append(&writer);
    let path = writer.path().to_owned();
    assert!(path.exists());
    drop(writer);
    goes(&path);
    let kept = create(directory.path());
    pages(0).append(&kept);
    drop(kept);
    // Its thread finishes what it was given, and leaves it there.
    let extents = || Reader::open(&path, &SECRET).unwrap().scan().unwrap().extents().len();
    let end = Instant::now() + PATIENCE;
    while extents() == 0 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(extents(), 1);
}

#[test]
fn a_writer_given_up_in_a_stall_calls_nothing_durable() {
    let directory = tempfile::tempdir().unwrap();
    let Ok(store) = Datastore::mount(&directory.path().join("at"), &directory.path().join("of")) else {
        return;
    };
    let writer = create(store.path());
    store.stall(true);
    pages(0).append(&writer);
    let why = writer.sync(SOON).unwrap_err();
    writer.give_up(why);
    store.stall(false);
    writer.remove(Duration::ZERO);
    goes(writer.path());
}

#[test]
fn a_store_that_is_read_only_or_not_there_is_an_error_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let refused = |at: &Path| Writer::create(at, &header(), &SECRET, PATIENCE).unwrap_err().to_string();
    let nowhere = directory.path().join("nowhere");
    assert!(refused(&nowhere).contains("nowhere"));
    let Some(tmpfs) = Tmpfs::mount(&directory.path().join("ro"), "ro") else { return };
    assert!(refused(&tmpfs.0).contains("ead-only"), "{}", refused(&tmpfs.0));
}

#[test]
fn what_nobody_can_find_any_more_is_not_durable() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path().join("store");
    fs::create_dir(&at).unwrap();
    let writer = create(&at);
    pages(0).append(&writer);
    writer.sync(PATIENCE).unwrap();
    fs::remove_dir_all(&at).unwrap();
    pages(1).append(&writer);
    let why = writer.sync(PATIENCE).unwrap_err();
    assert!(matches!(why, SpoolError::Vanished { .. }), "{why}");
    assert_eq!(writer.progress().durable.extents, 1);
}

#[test]
fn two_migrations_never_write_one_file() {
    let directory = tempfile::tempdir().unwrap();
    let writer = create(directory.path());
    pages(0).append(&writer);
    writer.sync(PATIENCE).unwrap();
    assert!(Writer::create(directory.path(), &header(), &SECRET, PATIENCE).is_err());
    // The other side of the same migration has a file of its own.
    let target = Header { side: Side::Target, ..header() };
    let theirs = Writer::create(directory.path(), &target, &SECRET, PATIENCE).unwrap();
    theirs.here(BlockId(0), PageRange::new(PageIndex(5), 7)).unwrap();
    theirs.complete().unwrap();
    theirs.sync(PATIENCE).unwrap();
    let kinds: Vec<_> = Reader::open(theirs.path(), &SECRET)
        .unwrap()
        .scan()
        .unwrap()
        .extents()
        .iter()
        .map(|e| e.kind)
        .collect();
    assert_eq!(kinds, [spool::ExtentKind::Here, spool::ExtentKind::Complete]);
}

#[test]
fn released_extents_take_no_room_later_ones_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let writer = create(directory.path());
    for n in 0..40 {
        pages(n).append(&writer);
    }
    let released = writer.sync(PATIENCE).unwrap();
    writer.release();
    pages(50).append(&writer);
    let mark = writer.sync(PATIENCE).unwrap();
    let reader = Reader::open(writer.path(), &SECRET).unwrap();
    let index = reader.scan().unwrap();
    assert_eq!(index.whole_from(released.extents, mark.extents), released.extents);
    let page = PageIndex(pages(50).start);
    assert!(index.since(BlockId(0), page, released.extents).is_some());
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(writer.path()).unwrap());
    assert!(blocks * 512 < released.bytes, "{blocks} blocks of 512 bytes");
}

#[test]
fn zeros_cost_a_header_only() {
    let directory = tempfile::tempdir().unwrap();
    let writer = create(directory.path());
    writer.append(1, BlockId(0), PageRange::new(PageIndex(0), 4096), Content::Nothing, false).unwrap();
    let mark = writer.sync(PATIENCE).unwrap();
    assert_eq!(mark.bytes - Reader::open(writer.path(), &SECRET).unwrap().begin(), spool::ALIGN);
}

#[test]
fn the_janitor_removes_what_is_old_and_ours_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let make = |id: u128, host: &str| {
        let header = Header { migration: MigrationId(id), host: host.into(), ..header() };
        let writer = Writer::create(directory.path(), &header, &SECRET, PATIENCE).unwrap();
        writer.keep();
        writer.path().to_owned()
    };
    let (ours, live, theirs) = (make(1, "hosta"), make(2, "hosta"), make(3, "hostb"));
    let known_over = make(4, "hostb");
    let torn = directory.path().join(FileName { migration: MigrationId(5), side: Side::Source }.to_string());
    fs::write(&torn, b"wh-spool").unwrap();
    let other = directory.path().join("web1.img");
    fs::write(&other, b"a disk").unwrap();
    let link = directory.path().join(FileName { migration: MigrationId(6), side: Side::Source }.to_string());
    std::os::unix::fs::symlink(&other, &link).unwrap();
    let judge = |found: &spool::Found| {
        let here = found.header.as_ref().is_some_and(|header| header.host == "hosta");
        let over = found.name.migration == MigrationId(4);
        let runs = found.name.migration == MigrationId(2);
        if (here || over) && !runs { Verdict::Remove } else { Verdict::Keep }
    };
    let hour = Duration::from_secs(3600);
    let now = SystemTime::now();
    assert!(sweep(directory.path(), hour, now, judge).unwrap().is_empty(), "all of them are young");
    // A clock that is behind makes nothing old.
    assert!(sweep(directory.path(), hour, now - hour * 24, judge).unwrap().is_empty());
    let mut removed = sweep(directory.path(), hour, now + hour * 2, judge).unwrap();
    removed.sort();
    assert_eq!(removed, [ours, known_over]);
    assert!(live.exists() && theirs.exists() && torn.exists() && other.exists());
    assert!(fs::symlink_metadata(&link).is_ok());
}

/// `cargo test --release -p spool --test store -- --ignored --nocapture throughput`; `WHIMBREL_SPOOL_DIR`
/// says where.
#[test]
#[ignore = "a measurement"]
fn throughput() {
    let directory = match std::env::var_os("WHIMBREL_SPOOL_DIR") {
        Some(at) => tempfile::tempdir_in(at).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    let total = 1u64 << 30;
    let content = |seed: u8| -> Vec<u8> {
        (0..512 << 10).map(|i: u32| (i as u8).wrapping_mul(seed) ^ (i >> 8) as u8).collect()
    };
    let memory: Vec<Vec<u8>> = (0..8).map(|n| content(2 * n + 1)).collect();
    let header = Header {
        blocks: vec![spool::BlockShape { name: "pc.ram".into(), pages: total / PAGE_SIZE as u64 }],
        ..header()
    };
    let writer = Writer::create(directory.path(), &header, &SECRET, PATIENCE).unwrap();
    let begun = Instant::now();
    for n in 0..total / (512 << 10) {
        let range = PageRange::new(PageIndex(n * 128), 128);
        let mut content = Content::Pages(memory[n as usize % 8].clone());
        while let Err(refused) = writer.append(1, BlockId(0), range, content, false) {
            assert!(matches!(refused, Refused::Busy), "{refused:?}");
            writer.wait(PATIENCE, |now| now.waiting < 6 << 20);
            content = Content::Pages(memory[n as usize % 8].clone());
        }
    }
    writer.sync(PATIENCE * 10).unwrap();
    let gb = |since: Instant| total as f64 / 1e9 / since.elapsed().as_secs_f64();
    println!("write, durable: {:.2} GB/s", gb(begun));
    let begun = Instant::now();
    let reader = Reader::open(writer.path(), &SECRET).unwrap();
    let index = reader.scan().unwrap();
    println!("scan: {:.3} s a GiB in extents of 512 KiB", begun.elapsed().as_secs_f64());
    let begun = Instant::now();
    for extent in index.extents() {
        reader.content(extent).unwrap();
    }
    println!("read, verified: {:.2} GB/s", gb(begun));
    assert!(writer.remove(PATIENCE));
}
