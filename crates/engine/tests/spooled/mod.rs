//! Memory that goes by way of a file on a datastore, too: what the target has of it when the source, the link
//! or the datastore is lost.

#[allow(dead_code, unreachable_pub, reason = "the laboratory's, as it is")]
#[path = "../../../../tests/src/datastore.rs"]
mod datastore;

use super::*;
use ::spool::{BlockShape, Content, FileName, Header, Secret, Side, Writer};
use api::Robust;
use datastore::Datastore;
use ports::{Block, GuestMemory, MissingPages, Request, SpoolRecord, Waiting};
use std::{fs, path::Path};
use units::{MemorySet, PAGE_SIZE, PageRange};

/// 42 MiB that are not zero: enough for a round to go both ways.
const LARGE: [u64; 2] = [16_000, 300];

/// What moves so much in a second keeps a migration busy for longer than it takes to disturb it.
const SLOW: u64 = 8 << 20;

const PATIENCE: Duration = Duration::from_secs(60);

/// A disk's error.
const EIO: i32 = 5;

fn spooling(mode: Mode, robust: Robust, directory: &Path) -> MigrateOptions {
    let (spool, robust) = (Some(directory.to_owned()), Some(robust));
    MigrateOptions { spool, robust, compress: Compression::None, ..options(mode) }
}

/// A directory whose store is as quick as it gets: what else this machine writes to its disk does not stall
/// it.
fn in_memory() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.unwrap()
}

/// A datastore that can be made to fail; it goes before its directory. None where nothing can be mounted.
fn datastore() -> Option<(tempfile::TempDir, Datastore)> {
    let directory = in_memory();
    let store = Datastore::mount(&directory.path().join("at"), &directory.path().join("of")).ok()?;
    Some((directory, store))
}

/// With time for a pause on a busy machine.
fn patient(options: MigrateOptions) -> MigrateOptions {
    MigrateOptions { max_downtime: Duration::from_millis(500), ..options }
}

/// It has completed, and nothing of the guest's memory is missing. Returns what happened.
fn whole(source: &Source, inn: &Inn, report: &Report, events: &[Event]) -> String {
    let story = format!("{report:?}\n{}", notes(events));
    assert_eq!(report.outcome, Outcome::Completed, "{story}");
    assert_eq!(inn.ram.content(), source.ram.content(), "{story}");
    story
}

fn files(directory: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    fs::read_dir(directory).unwrap().map(name).collect()
}

/// Nothing stays behind.
fn no_files(directory: &Path, story: &str) {
    let since = Instant::now();
    while !files(directory).is_empty() {
        assert!(since.elapsed() < Duration::from_secs(30), "{:?} stay behind: {story}", files(directory));
        thread::sleep(Duration::from_millis(2));
    }
}

fn notes(events: &[Event]) -> String {
    let text = |event: &Event| match event {
        Event::Note { text } => Some(text.clone()),
        _ => None,
    };
    events.iter().filter_map(text).collect::<Vec<_>>().join("\n")
}

fn has(journal: &Journal, word: &str) -> bool {
    journal.events.lock().unwrap().iter().any(|event| event == word)
}

#[test]
fn all_modes_bring_the_same_memory_and_leave_no_file() {
    for robust in [Robust::Strict, Robust::Relaxed] {
        for mode in [Mode::Auto, Mode::PreCopy, Mode::Hybrid, Mode::PostCopy] {
            let directory = in_memory();
            let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
            source.guest(1);
            let wish = spooling(mode, robust, directory.path());
            let (report, events) = source.migrate(listen(&inn), wish, |_| {});
            let story = format!("{mode:?} {robust:?}: {report:?}\n{}", notes(&events));
            assert_eq!(report.outcome, Outcome::Completed, "{story}");
            assert_eq!(report.verified, Some(true), "{story}");
            assert_eq!(inn.ram.content(), source.ram.content(), "{mode:?} {robust:?}");
            assert_eq!(inn.ram.overwritten(), 0, "{mode:?}: I5");
            let spool = report.spool.as_deref().expect("a spool was wanted");
            assert_eq!(spool.trouble, None, "{story}");
            if mode != Mode::PostCopy || robust == Robust::Strict {
                assert!(spool.pages > 0, "the file carried a part: {story}");
            }
            let post_copy = matches!(report.mode, Mode::Hybrid | Mode::PostCopy);
            assert_eq!(
                spool.safe_ms.is_some() && robust == Robust::Strict,
                post_copy && robust == Robust::Strict,
                "{story}"
            );
            if post_copy {
                assert!(has(&inn.journal, "spool"), "{story}");
            }
            no_files(directory.path(), &story);
        }
    }
}

/// The target's guest gets all its memory without the source, which is there again when it has.
fn finishes_alone(inn: &Inn, cable: &Cable) {
    wait_until("the target's guest", || inn.cpu.running.load(SeqCst));
    wait_until("all memory on the target", || has(&inn.journal, "settled"));
    assert!(cable.cut.load(SeqCst), "nothing came from the source since the commit");
    cable.mend();
}

/// From the commit on the source may burn.
#[test]
fn strict_a_source_lost_at_the_commit_is_not_needed() {
    for rate in [0, 1, 5] {
        let directory = in_memory();
        let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
        source.guest(rate);
        let cable = Cable::to(listen(&inn));
        let at_the_commit = cable.clone();
        *inn.record.on_claim.lock().unwrap() = Some(Box::new(move || at_the_commit.cut()));
        // Without it there is nothing to owe.
        if rate == 0 {
            source.ram.guest_writes(0, 5, 77);
        }
        let wish = spooling(Mode::PostCopy, Robust::Strict, directory.path());
        let (report, events) = source.migrate(cable.address, wish, |_| finishes_alone(&inn, &cable));
        let story = format!("{rate}: {report:?}\n{}", notes(&events));
        assert_eq!(inn.ram.content(), source.ram.content(), "{story}");
        assert_eq!(report.outcome, Outcome::Completed, "{story}");
        assert!(inn.cpu.running.load(SeqCst) && !source.cpu.running.load(SeqCst), "I1, I4: {story}");
        assert!(report.spool.unwrap().safe_ms.is_some(), "{story}");
        no_files(directory.path(), &story);
    }
}

/// One that could not be read may be read again: nobody else has these pages any more.
#[test]
fn strict_a_target_without_source_retries_what_it_cannot_read() {
    let Some((_directory, store)) = datastore() else { return };
    let store = Arc::new(store);
    let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
    source.guest(1);
    let cable = Cable::to(listen(&inn));
    let (cut, away) = (cable.clone(), store.clone());
    *inn.record.on_claim.lock().unwrap() = Some(Box::new(move || {
        away.fail_reads(Some(EIO));
        cut.cut();
    }));
    let wish = patient(spooling(Mode::Hybrid, Robust::Strict, store.path()));
    let (report, events) = source.migrate(cable.address, wish, |_| {
        wait_until("the target's guest", || inn.cpu.running.load(SeqCst));
        let missing = inn.journal.missing.lock().unwrap().as_ref().map_or(0, MemorySet::len);
        assert!(missing > 0, "a part of it is only in the file");
        wait_until("reading in vain", || store.failed_reads() > 0);
        assert!(!has(&inn.journal, "settled"));
        store.fail_reads(None);
        finishes_alone(&inn, &cable);
    });
    whole(&source, &inn, &report, &events);
}

/// What a target leaves on the datastore for a source that it cannot tell goes, too, when the source hears it
/// over the network after all.
#[test]
fn a_target_that_is_heard_again_leaves_no_word_in_the_file() {
    // Whether the file is looked at first is a matter of milliseconds: until it is not.
    for attempt in 1.. {
        let directory = in_memory();
        let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
        source.guest(1);
        let cable = Cable::to(listen(&inn));
        let (cut, there) = (cable.clone(), inn.clone());
        *inn.record.on_claim.lock().unwrap() = Some(Box::new(move || cut.cut()));
        let wish = spooling(Mode::Hybrid, Robust::Strict, directory.path());
        let (report, events) = source.migrate(cable.address, wish, |_| {
            wait_until("all memory on the target", || has(&there.journal, "settled"));
            cable.mend();
        });
        let story = format!("{report:?}\n{}", notes(&events));
        assert_eq!(report.outcome, Outcome::Completed, "{story}");
        no_files(directory.path(), &story);
        if notes(&events).contains("connected to") {
            return;
        }
        assert!(attempt < 20, "the file was always first: {story}");
    }
}

/// The guest of a target that can no longer ask its source reads what it needs at once, not at the end.
#[test]
fn strict_a_waiting_guest_gets_its_page_from_the_file() {
    let directory = in_memory();
    let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
    source.guest(5);
    let cable = Cable::to(listen(&inn));
    let (cut, ram) = (cable.clone(), inn.ram.clone());
    let (tell, told) = channel();
    *inn.record.on_claim.lock().unwrap() = Some(Box::new(move || {
        cut.cut();
        thread::spawn(move || {
            let begun = Instant::now();
            let read = (0..5000).step_by(10).map(|page| ram.guest_reads(0, page)).collect::<Vec<_>>();
            tell.send((read, begun.elapsed())).unwrap();
        });
    }));
    let mender = cable.clone();
    let (report, _) =
        source.migrate(cable.address, spooling(Mode::Hybrid, Robust::Strict, directory.path()), |_| {
            let (read, took) = told.recv_timeout(PATIENCE).expect("every page comes");
            for (page, read) in (0..5000).step_by(10).zip(read) {
                assert_eq!(read, source.ram.guest_reads(0, page), "page {page}");
            }
            assert!(took < Duration::from_secs(20), "{took:?}");
            mender.mend();
        });
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.error);
}

#[test]
fn relaxed_missing_pages_reach_the_file_after_the_commit() {
    let directory = in_memory();
    let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
    let cable = Cable::to(listen(&inn));
    cable.each.store(SLOW, SeqCst);
    let cut = cable.clone();
    let there = inn.clone();
    let wish =
        MigrateOptions { verify: false, ..spooling(Mode::PostCopy, Robust::Relaxed, directory.path()) };
    let (report, events) = source.migrate(cable.address, wish, |_| {
        wait_until("all memory on the target", || {
            // All of it is in the file before the slow link has carried a quarter.
            let names = files(directory.path());
            let written: u64 = names
                .iter()
                .filter_map(|n| fs::metadata(directory.path().join(n)).ok())
                .map(|m| m.len())
                .sum();
            if written > 40 << 20 {
                cut.cut();
            }
            has(&there.journal, "settled")
        });
        cut.mend();
    });
    let story = whole(&source, &inn, &report, &events);
    assert!(report.spool.unwrap().trailed_bytes > 40 << 20, "{story}");
    assert!(report.wire_bytes < 40 << 20, "most of it came by the file: {story}");
}

#[test]
fn a_target_without_the_directory_goes_without_the_file() {
    let directory = in_memory();
    let source = Source::with(&LARGE);
    let inn = Arc::new(Inn { spools: false, ..Inn::usual(&LARGE) });
    let (report, events) =
        source.migrate(listen(&inn), spooling(Mode::Hybrid, Robust::Strict, directory.path()), |_| {});
    let story = format!("{report:?}\n{}", notes(&events));
    assert_eq!(report.outcome, Outcome::Completed, "{story}");
    assert_eq!(report.mode, Mode::PreCopy, "{story}");
    assert!(notes(&events).contains("is not allowed here"), "{story}");
    assert!(report.spool.unwrap().trouble.is_some());
    no_files(directory.path(), &story);
}

#[test]
fn a_directory_that_is_not_there_costs_nothing_but_the_spool() {
    let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
    let wish = spooling(Mode::Auto, Robust::Strict, Path::new("/nowhere/at/all"));
    let (report, events) = source.migrate(listen(&inn), wish, |_| {});
    assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
    assert!(notes(&events).contains("/nowhere/at/all"), "{}", notes(&events));
}

/// The datastore stops answering in the middle of a round that goes both ways.
#[test]
fn i2_i5_a_datastore_that_stalls_gives_its_share_back() {
    for mode in [Mode::PreCopy, Mode::Hybrid] {
        let Some((_directory, store)) = datastore() else { return };
        store.limit(Some(2 * SLOW));
        let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
        source.guest(1);
        let cable = Cable::to(listen(&inn));
        cable.each.store(SLOW, SeqCst);
        let wish = patient(spooling(mode, Robust::Strict, store.path()));
        let (report, events) = source.migrate(cable.address, wish, |_| {
            wait_until("a share in the file", || store.traffic().0 > 1 << 20);
            store.stall(true);
            // Once it was given up, the old versions that it still holds may come back: nobody takes them.
            let ram = inn.ram.clone();
            wait_until("the target's guest", || inn.cpu.running.load(SeqCst) || ram.content().is_empty());
            store.stall(false);
        });
        let story = format!("{mode:?}: {report:?}\n{}", notes(&events));
        assert_eq!(report.outcome, Outcome::Completed, "{story}");
        assert_eq!(report.mode, Mode::PreCopy, "strict without a spool: {story}");
        assert_eq!(inn.ram.content(), source.ram.content(), "{story}");
        assert_eq!(inn.ram.overwritten(), 0, "I5: {story}");
        let trouble = report.spool.unwrap().trouble;
        assert!(trouble.is_some(), "{story}");
        assert!(notes(&events).contains("over the network alone"), "{story}");
    }
}

#[test]
fn a_datastore_that_lies_about_fsync_is_not_relied_on() {
    let Some((_directory, store)) = datastore() else { return };
    let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
    source.guest(1);
    let cable = Cable::to(listen(&inn));
    cable.each.store(SLOW, SeqCst);
    let wish = patient(spooling(Mode::Hybrid, Robust::Strict, store.path()));
    let (report, events) = source.migrate(cable.address, wish, |_| {
        wait_until("a share in the file", || store.traffic().0 > 1 << 20);
        store.fail_fsync(Some(EIO));
    });
    let story = format!("{report:?}\n{}", notes(&events));
    assert_eq!(report.outcome, Outcome::Completed, "{story}");
    assert_eq!(report.mode, Mode::PreCopy, "{story}");
    assert_eq!(inn.ram.content(), source.ram.content(), "{story}");
}

#[test]
fn i1_i2_i3_with_a_spool_a_cut_link_leaves_one_whole_guest() {
    let directory = in_memory();
    let wish = || spooling(Mode::Hybrid, Robust::Strict, directory.path());
    let total = {
        let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
        let cable = Cable::to(listen(&inn));
        source.migrate(cable.address, wish(), |_| {});
        no_files(directory.path(), "without a cut");
        cable.passed.load(SeqCst)
    };
    for at in [
        40,
        total / 3,
        total - 300_000,
        total - 60_000,
        total - 20_000,
        total - 6000,
        total - 2000,
        total - 200,
    ] {
        let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
        source.guest(1);
        let cable = Cable::to(listen(&inn));
        cable.cut_after.store(at, SeqCst);
        let mender = cable.clone();
        let (report, events) = source.migrate(cable.address, wish(), |_| mend_after_the_cut(mender));
        let story = format!("cut after {at} of {total}: {report:?}\n{}", notes(&events));
        let (here, there) = (source.cpu.running.load(SeqCst), inn.cpu.running.load(SeqCst));
        assert!(here != there, "I1: {story}");
        match report.outcome {
            Outcome::Completed => assert_eq!(inn.ram.content(), source.ram.content(), "{story}"),
            Outcome::Failed => assert_eq!(report.error.unwrap().vm_runs_on.as_deref(), Some("source")),
            _ => panic!("{story}"),
        }
        assert_eq!(inn.ram.overwritten(), 0, "I5: {story}");
        no_files(directory.path(), &story);
    }
}

/// What went only into the file is not there: the streams' part of the round had landed when the link was
/// lost, the file's had not.
#[test]
fn i2_a_lost_link_sends_again_what_only_the_file_has() {
    let Some((_directory, store)) = datastore() else { return };
    store.limit(Some(2 * SLOW));
    // On a machine that has much else to do the datastore is given up before the link is cut; then once more.
    for attempt in 1.. {
        let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
        let cable = Cable::to(listen(&inn));
        let wish = spooling(Mode::PreCopy, Robust::Strict, store.path());
        let there = || LARGE.iter().zip(0..).map(|(_, n)| inn.ram.present(BlockId(n)).unwrap().len()).sum();
        let (report, events) = source.migrate(cable.address, wish, |_| {
            let before = store.traffic().0;
            wait_until("a share in the file", || store.traffic().0 > before + (1 << 20));
            store.stall(true);
            let mut last = (0u64, Instant::now());
            wait_until("the streams' end", || {
                let now = there();
                if now != last.0 {
                    last = (now, Instant::now());
                }
                now > 0 && last.1.elapsed() > Duration::from_millis(200)
            });
            cable.cut();
            wait_until("an attempt", || cable.refused.load(SeqCst) >= 1);
            store.stall(false);
            cable.mend();
        });
        let story = whole(&source, &inn, &report, &events);
        wait_until("the end of the files", || files(store.path()).is_empty());
        if notes(&events).contains("connected to target again") {
            return assert_eq!(report.verified, Some(true), "{story}");
        }
        assert!(attempt < 5, "{story}");
    }
}

/// The target still reads what was written before the link was lost when it has newer pages already.
#[test]
fn i5_the_file_of_a_lost_link_does_not_undo_newer_pages() {
    let Some((_directory, store)) = datastore() else { return };
    store.limit(Some(2 * SLOW));
    let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
    let cable = Cable::to(listen(&inn));
    cable.each.store(SLOW, SeqCst);
    let wish = spooling(Mode::PreCopy, Robust::Strict, store.path());
    let ram = inn.ram.clone();
    let (report, events) = source.migrate(cable.address, wish, |_| {
        wait_until("half of the file's share", || store.traffic().0 > 12 << 20);
        store.stall(true);
        cable.cut();
        // More than will go into the file first next time, and all that the target has yet to read of it.
        for page in 5500..10_600 {
            source.ram.guest_writes(0, page, page + 7);
        }
        wait_until("an attempt", || cable.refused.load(SeqCst) >= 1);
        cable.each.store(u64::MAX, SeqCst);
        cable.mend();
        wait_until("new content", || ram.guest_reads(0, 7000) == 7007);
        store.stall(false);
    });
    let story = format!("{report:?}\n{}", notes(&events));
    assert_eq!((report.outcome, report.verified), (Outcome::Completed, Some(true)), "{story}");
    assert_eq!(inn.ram.content(), source.ram.content(), "{story}");
}

/// What was made safe before the link was lost is made safe anew: the guest has written since.
#[test]
fn strict_a_link_lost_while_securing_makes_nothing_less_safe() {
    let Some((_directory, store)) = datastore() else { return };
    store.limit(Some(SLOW));
    let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
    let cable = Cable::to(listen(&inn));
    cable.each.store(SLOW, SeqCst);
    let at_the_commit = cable.clone();
    *inn.record.on_claim.lock().unwrap() = Some(Box::new(move || at_the_commit.cut()));
    // Ends long before the datastore has taken what was written.
    let write = |seed: u64| (1000..4000).for_each(|page| source.ram.guest_writes(0, page, page + seed));
    let there = inn.clone();
    let wish = spooling(Mode::Hybrid, Robust::Strict, store.path());
    let (report, events) = source.migrate(cable.address, wish, |_| {
        wait_until("the first round", || there.ram.content()[0].len() > 500);
        write(1);
        wait_until("memory on the target", || there.ram.content()[0].len() > 10_600);
        let before = store.traffic().0;
        wait_until("a part of it in the file", || store.traffic().0 > before + (4 << 20));
        cable.cut();
        wait_until("an attempt", || cable.refused.load(SeqCst) >= 1 || there.cpu.running.load(SeqCst));
        write(2);
        cable.mend();
        wait_until("the target's guest", || there.cpu.running.load(SeqCst));
        wait_until("all memory on the target", || has(&there.journal, "settled"));
        cable.mend();
    });
    let story = whole(&source, &inn, &report, &events);
    assert!(report.spool.unwrap().safe_ms.is_some(), "{story}");
}

/// A target whose agent was restarted after the commit, and whose source is gone for good.
struct Restarted {
    directory: tempfile::TempDir,
    inn: Arc<Inn>,
    writer: Writer,
}

const SECRET: [u8; 32] = [5; 32];

impl Restarted {
    fn new() -> Self {
        let directory = in_memory();
        let inn = Inn::new(&PAGES);
        let blocks = inn.ram.blocks().iter();
        let header = Header {
            migration: MIGRATION,
            side: Side::Source,
            host: "source".into(),
            vm: "vm".into(),
            created: 0,
            blocks: blocks.map(|b| BlockShape { name: b.name.clone(), pages: b.pages }).collect(),
        };
        let writer = Writer::create(directory.path(), &header, &Secret(SECRET), PATIENCE).unwrap();
        Self { directory, inn, writer }
    }

    fn page(seed: u64) -> Vec<u8> {
        (seed..).take(PAGE_SIZE / 8).flat_map(u64::to_le_bytes).collect()
    }

    /// Pages of block 0 in one extent.
    fn write(&self, start: u64, seeds: &[u64]) {
        let content = seeds.iter().flat_map(|seed| Self::page(*seed)).collect();
        let range = PageRange::new(PageIndex(start), seeds.len() as u64);
        self.writer.append(1, BlockId(0), range, Content::Pages(content), false).unwrap();
        self.writer.sync(PATIENCE).unwrap();
    }

    fn set(pages: &[u64]) -> MemorySet {
        let mut set = MemorySet::empty(PAGES);
        for page in pages {
            set.block_mut(BlockId(0)).insert(PageIndex(*page));
        }
        set
    }

    /// Goes on; nobody waits for its end.
    fn go_on(&self, missing: &[u64], floor: u64, end: u64, outdated: &[u64]) {
        let acceptor = Acceptor::new(self.inn.clone(), Security::Plaintext);
        let request = Request {
            migration: MIGRATION,
            vm: "vm".into(),
            from: "source".into(),
            epoch: Epoch(0),
            recipe: vec![],
            handovers: vec![],
            private: vec![],
            record: String::new(),
            blocks: PAGES
                .iter()
                .zip(0..)
                .map(|(p, i)| Block { name: format!("ram{i}"), pages: *p })
                .collect(),
            post_copy: true,
            came_by: None,
            history: vec![],
        };
        self.inn.ram.watch();
        let waiting = Waiting {
            memory: self.inn.ram.clone(),
            reached: vec![],
            kept: None,
            missing: Some(self.inn.ram.clone() as Arc<dyn MissingPages>),
            machine: Box::new(self.inn.cpu.clone()),
            journal: Box::new(self.inn.journal.clone()),
        };
        let record = SpoolRecord {
            directory: self.directory.path().to_owned(),
            secret: SECRET,
            floor,
            end,
            outdated: Self::set(outdated),
        };
        let missing = Self::set(missing);
        thread::spawn(move || acceptor.go_on(request, waiting, missing, Some(record)));
    }

    fn there(&self, page: u64) -> Option<Vec<u8>> {
        self.inn.ram.content()[0].get(&page).cloned()
    }
}

#[test]
fn a_restarted_target_without_a_source_finishes_from_the_file() {
    let host = Restarted::new();
    host.write(10, &[1, 2, 3]);
    host.write(11, &[20]);
    let zeros = PageRange::new(PageIndex(50), 5);
    host.writer.append(1, BlockId(0), zeros, Content::Nothing, false).unwrap();
    host.writer.sync(PATIENCE).unwrap();
    host.go_on(&[10, 11, 12, 50], 0, 3, &[]);
    wait_until("all memory", || has(&host.inn.journal, "settled"));
    for (page, seed) in [(10, 1), (11, 20), (12, 3)] {
        assert_eq!(host.there(page), Some(Restarted::page(seed)), "page {page}");
    }
    assert_eq!(host.inn.ram.guest_reads(0, 50), 0);
    let source = FileName { migration: MIGRATION, side: Side::Source }.to_string();
    wait_until("the end of the file", || !files(host.directory.path()).contains(&source));
}

/// A datastore may be back later than the agent.
#[test]
fn a_restarted_target_waits_for_its_file_and_finishes() {
    let host = Restarted::new();
    host.write(10, &[1, 2]);
    let (path, away) = (host.writer.path().to_owned(), host.directory.path().join("away"));
    fs::rename(&path, &away).unwrap();
    host.go_on(&[10, 11], 0, 1, &[]);
    // Nothing tells of a look in vain; on a slow machine the first one comes later, and the file is there.
    thread::sleep(Duration::from_millis(200));
    assert_eq!(host.there(10), None);
    fs::rename(&away, &path).unwrap();
    wait_until("all memory", || has(&host.inn.journal, "settled"));
    assert_eq!((host.there(10), host.there(11)), (Some(Restarted::page(1)), Some(Restarted::page(2))));
}

/// I5: what the guest wrote after it was put into the file must not be undone by the file.
#[test]
fn i5_what_is_stale_or_may_be_is_not_taken_from_the_file() {
    // The source said that the file lacks the last version of page 11.
    let host = Restarted::new();
    host.write(10, &[1, 2]);
    host.go_on(&[10, 11], 0, 1, &[11]);
    wait_until("the other page", || host.there(10).is_some());
    assert_eq!(host.there(11), None);

    // An extent is gone: what was in the file before it may be older than what it held.
    let host = Restarted::new();
    host.write(10, &[1]);
    host.write(10, &[2]);
    host.write(12, &[3]);
    let path = host.writer.path().to_owned();
    let reader = ::spool::Reader::open(&path, &Secret(SECRET)).unwrap();
    let second = reader.scan().unwrap().extents()[1];
    let mut bytes = fs::read(&path).unwrap();
    bytes[second.offset as usize..second.end() as usize].fill(0);
    fs::write(&path, bytes).unwrap();
    host.go_on(&[10, 12], 0, 3, &[]);
    wait_until("the other page", || host.there(12).is_some());
    assert_eq!(host.there(10), None);
    assert!(!has(&host.inn.journal, "settled"));
}

/// What the file held before a pause that came to nothing is none of what is missing after the next one.
#[test]
fn strict_a_link_lost_in_a_pause_keeps_the_next_pause_safe() {
    let directory = in_memory();
    let (source, inn) = (Source::with(&LARGE), Inn::new(&LARGE));
    source.guest(1);
    let cable = Cable::to(listen(&inn));
    let cutter = cable.clone();
    source.cpu.on_save.lock().unwrap().push_back(Box::new(move || cutter.cut()));
    let at_the_commit = cable.clone();
    *inn.record.on_claim.lock().unwrap() = Some(Box::new(move || at_the_commit.cut()));
    // On a busy machine, too, the last pass is small enough for such a pause.
    let wish = patient(spooling(Mode::Hybrid, Robust::Strict, directory.path()));
    let (report, events) = source.migrate(cable.address, wish, |_| {
        wait_until("the cut", || cable.cut.load(SeqCst));
        wait_until("an attempt", || cable.refused.load(SeqCst) > 0);
        assert!(source.cpu.running.load(SeqCst), "a guest waits for a link");
        // Some of it was safe.
        (0..2000).step_by(3).for_each(|page| source.ram.guest_writes(0, page, page + 7));
        cable.mend();
        finishes_alone(&inn, &cable);
    });
    let story = whole(&source, &inn, &report, &events);
    assert_eq!(inn.cpu.loaded.load(SeqCst), 2, "{story}");
    let missing = inn.journal.missing.lock().unwrap().as_ref().map(MemorySet::len);
    assert!(missing.is_some_and(|pages| pages > 0), "{story}");
    assert!(report.spool.unwrap().safe_ms.is_some(), "{story}");
    assert!(notes(&events).contains("it ran on here after"), "{story}");
}
