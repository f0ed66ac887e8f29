//! Whatever a crash, a bad disk or a hostile host makes of a file: what is read of it is what was written,
//! and of a page whose newest version is gone no older one is taken.

mod common;

use common::*;
use proptest::prelude::*;
use spool::{Content, Index, Reader};
use std::{fs, path::Path};
use units::{BlockId, PAGE_SIZE, PageIndex};

/// Sectors are written wholly or not at all, in any order.
const SECTOR: usize = 512;

fn run() -> impl Strategy<Value = Run> {
    (0u16..2, 0u64..60, prop_oneof![Just(1u64), 1u64..5, Just(128)], 0u8..4, any::<bool>()).prop_map(
        |(block, start, count, seed, compress)| {
            let count = if block == 1 { count.min(64 - start) } else { count };
            Run { block, start, count, seed, compress }
        },
    )
}

fn runs() -> impl Strategy<Value = Vec<Run>> {
    prop::collection::vec(run(), 1..24)
}

/// What the file says of a page: its sequence number, and its content if that can be read.
fn look(reader: &Reader, index: &Index, block: u16, page: u64) -> Option<(u64, Option<Vec<u8>>)> {
    let extent = index.newest(BlockId(block), PageIndex(page))?;
    let content = reader.content(extent).ok().map(|content| match content {
        Content::Nothing => vec![0; PAGE_SIZE],
        Content::Pages(pages) => {
            let at = (page - extent.pages.start.0) as usize * PAGE_SIZE;
            pages[at..at + PAGE_SIZE].to_vec()
        }
    });
    Some((extent.sequence, content))
}

/// Nothing of a damaged file is wrong; returns how many pages are there. `end`: how many extents its writer
/// had made durable.
fn nothing_is_wrong(path: &Path, versions: &Versions, end: u64) -> usize {
    let Ok(reader) = Reader::open(path, &SECRET) else { return 0 };
    let index = reader.scan().unwrap();
    let trusted = index.whole_from(0, end);
    let mut there = 0;
    for (&(block, page), versions) in versions {
        let Some((sequence, content)) = look(&reader, &index, block, page) else { continue };
        let written = versions.iter().find(|(s, _)| *s == sequence).expect("a version that was written");
        if let Some(content) = content {
            assert!(content == written.1, "page {page} of block {block} is not what was written");
            there += 1;
        }
        if index.since(BlockId(block), PageIndex(page), trusted).is_some() {
            let newest = versions.iter().filter(|(s, _)| *s < end).map(|(s, _)| *s).max();
            assert!(Some(sequence) >= newest, "a stale version of page {page} is trusted");
        }
    }
    there
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_whole_file_gives_the_newest_version_of_every_page(runs in runs()) {
        let directory = tempfile::tempdir().unwrap();
        let path = written(directory.path(), &runs);
        let versions = versions(&runs);
        let reader = Reader::open(&path, &SECRET).unwrap();
        let index = reader.scan().unwrap();
        prop_assert_eq!(index.whole_from(0, runs.len() as u64), 0);
        prop_assert_eq!(index.damaged(), 0);
        for (&(block, page), all) in &versions {
            let (sequence, content) = all.last().unwrap();
            prop_assert_eq!(look(&reader, &index, block, page), Some((*sequence, Some(content.clone()))));
        }
    }

    /// Every prefix: what was not written yet is missing, all before it is there.
    #[test]
    fn a_file_that_ends_anywhere_has_all_extents_before_its_end(runs in runs(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 24)) {
        let directory = tempfile::tempdir().unwrap();
        let path = written(directory.path(), &runs);
        let bytes = fs::read(&path).unwrap();
        let reader = Reader::open(&path, &SECRET).unwrap();
        let whole = reader.scan().unwrap();
        let versions = versions(&runs);
        for cut in cuts {
            let cut = cut.index(bytes.len() + 1);
            fs::write(&path, &bytes[..cut]).unwrap();
            nothing_is_wrong(&path, &versions, runs.len() as u64);
            let before = |extents: &[spool::Extent]| extents.iter().filter(|e| e.end() <= cut as u64).count();
            if cut as u64 >= reader.begin() {
                let found = Reader::open(&path, &SECRET).unwrap().scan().unwrap();
                prop_assert!(found.extents().len() >= before(whole.extents()));
                prop_assert!(found.extents().len() <= before(whole.extents()) + 1);
            }
        }
    }

    /// Sectors that were never written, hold what was there before, or are swapped.
    #[test]
    fn torn_sectors_cost_only_what_they_hold(
        runs in runs(),
        torn in prop::collection::vec((any::<prop::sample::Index>(), 0u8..4), 1..12),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = written(directory.path(), &runs);
        let mut bytes = fs::read(&path).unwrap();
        let begin = Reader::open(&path, &SECRET).unwrap().begin() as usize;
        let sectors = bytes.len().div_ceil(SECTOR);
        for (sector, how) in torn {
            let at = (sector.index(sectors) * SECTOR).max(begin);
            let end = (at + SECTOR).min(bytes.len());
            match how {
                0 => bytes[at..end].fill(0),
                1 => bytes[at..end].fill(0xa5),
                2 if end + SECTOR <= bytes.len() => bytes.copy_within(end..end + end - at, at),
                _ => bytes[at..end].reverse(),
            }
        }
        fs::write(&path, &bytes).unwrap();
        nothing_is_wrong(&path, &versions(&runs), runs.len() as u64);
    }

    #[test]
    fn flipped_bits_never_make_a_wrong_page(
        runs in runs(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..40),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = written(directory.path(), &runs);
        let mut bytes = fs::read(&path).unwrap();
        for (at, bit) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        fs::write(&path, &bytes).unwrap();
        nothing_is_wrong(&path, &versions(&runs), runs.len() as u64);
    }
}

fn three() -> Vec<Run> {
    let run = |start, seed| Run { block: 0, start, count: 4, seed, compress: false };
    vec![run(0, 1), run(0, 2), run(100, 3)]
}

#[test]
fn extents_behind_a_damaged_one_are_found_but_not_trusted() {
    let directory = tempfile::tempdir().unwrap();
    let path = written(directory.path(), &three());
    let second = Reader::open(&path, &SECRET).unwrap().scan().unwrap().extents()[1];
    let mut bytes = fs::read(&path).unwrap();
    bytes[second.offset as usize..second.end() as usize].fill(0x77);
    fs::write(&path, &bytes).unwrap();
    let reader = Reader::open(&path, &SECRET).unwrap();
    let index = reader.scan().unwrap();
    assert_eq!(index.extents().iter().map(|e| e.sequence).collect::<Vec<_>>(), [0, 2]);
    assert!(index.damaged() > 0);
    let trusted = index.whole_from(0, 3);
    assert_eq!(trusted, 2);
    assert!(index.since(BlockId(0), PageIndex(0), trusted).is_none(), "its newer version is gone");
    assert!(index.since(BlockId(0), PageIndex(100), trusted).is_some());
}

#[test]
fn no_older_version_is_given_for_one_whose_content_is_torn() {
    let directory = tempfile::tempdir().unwrap();
    let path = written(directory.path(), &three());
    let second = Reader::open(&path, &SECRET).unwrap().scan().unwrap().extents()[1];
    let mut bytes = fs::read(&path).unwrap();
    bytes[second.offset as usize + 1000] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let reader = Reader::open(&path, &SECRET).unwrap();
    let index = reader.scan().unwrap();
    assert_eq!(look(&reader, &index, 0, 0), Some((1, None)));
}

#[test]
fn a_huge_hole_and_much_rubbish_are_passed_over_in_bounded_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = written(directory.path(), &three());
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    // ext4 and tmpfs both take 8 TiB.
    file.set_len(8 << 40).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0x5a; 4 << 20], 4 << 40).unwrap();
    let begun = std::time::Instant::now();
    let index = Reader::open(&path, &SECRET).unwrap().scan().unwrap();
    assert_eq!(index.extents().len(), 3);
    assert!(begun.elapsed() < PATIENCE);
}

#[test]
fn a_file_of_another_secret_or_another_header_gives_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = written(directory.path(), &three());
    let reader = Reader::open(&path, &spool::Secret([43; 32])).unwrap();
    assert!(reader.scan().unwrap().extents().is_empty());
    // The same extents under a header that names another VM.
    let mut bytes = fs::read(&path).unwrap();
    let begin = Reader::open(&path, &SECRET).unwrap().begin() as usize;
    let other = spool::Header { vm: "web2".into(), ..header() }.to_bytes().unwrap();
    assert_eq!(other.len(), begin);
    bytes[..begin].copy_from_slice(&other);
    fs::write(&path, &bytes).unwrap();
    let reader = Reader::open(&path, &SECRET).unwrap();
    assert_eq!(reader.header().vm, "web2");
    assert!(reader.scan().unwrap().extents().is_empty());
}

#[test]
fn what_is_no_regular_file_is_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = written(directory.path(), &three());
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(Reader::open(&link, &SECRET).is_err());
    assert!(Reader::open(directory.path(), &SECRET).is_err());
    assert!(Reader::open(Path::new("/dev/zero"), &SECRET).is_err());
    assert!(Reader::open(&directory.path().join("nothing"), &SECRET).is_err());
}

#[test]
fn whoever_follows_a_file_reads_each_extent_once_and_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let writer = create(directory.path());
    let mut reader = Reader::open(writer.path(), &SECRET).unwrap();
    let mut at = reader.begin();
    for (n, run) in three().iter().enumerate() {
        run.append(&writer);
        let mark = writer.sync(PATIENCE).unwrap();
        reader.refresh().unwrap();
        let piece = reader.next(at).unwrap();
        assert_eq!((piece.extent.sequence, piece.extent.pages), (n as u64, run.range()));
        at = piece.extent.end();
        assert_eq!(at, mark.bytes);
        assert!(reader.next(at).is_err(), "there is none yet");
    }
}
