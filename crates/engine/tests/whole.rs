//! Whole migrations of a model VM over real sockets.

mod changed;
mod disks;
mod doubt;
mod handed_over;
mod kept;
mod model;
mod paused;
mod shared;
mod spooled;
mod states;
mod streams;
mod stuns;
mod trust;

use api::{Compression, Event, MigrateOptions, Mode, Outcome, PastMigration, PausePart, Phase, Report, Side};
use engine::{
    Acceptor, Conn, Dial, Handle, LinkHistory, Offered, RemoteRecord, SharedPort, SourceDriver, SourceParts,
    TcpDial, Traffic,
};
use model::{cable::*, *};
use pki::Security;
use ports::{GuestMemory, Handover, Host, Nonce, Ownership, Request};
use std::{
    io::Write,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::SeqCst},
        mpsc::channel,
    },
    thread,
    time::{Duration, Instant},
};
use units::{BlockId, Epoch, MemorySet, MigrationId, PageIndex, Rate};

const MIGRATION: MigrationId = MigrationId(42);
const PAGES: [u64; 2] = [6000, 300];

fn listen(inn: &Arc<Inn>) -> SocketAddr {
    listen_as(inn, Security::Plaintext)
}

fn listen_as(inn: &Arc<Inn>, security: Security) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = Acceptor::new(inn.clone(), security);
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let acceptor = acceptor.clone();
            thread::spawn(move || acceptor.serve(stream));
        }
    });
    address
}

struct Source {
    ram: Arc<Ram>,
    cpu: Cpu,
    journal: Journal,
    stuns: Option<Stunned>,
    /// After how long in doubt it says so; none means: as always.
    doubt: Option<Duration>,
    /// How earlier migrations went.
    history: Vec<PastMigration>,
    /// Who owns the VM, if it is not for the target to say.
    record: Option<Arc<dyn Ownership>>,
    /// What is known of the link.
    link: Option<Rate>,
    /// What the target may reach by itself.
    offers: Vec<(Handover, Nonce)>,
}

impl Source {
    fn new() -> Self {
        Self::with(&PAGES)
    }

    fn with(pages: &[u64; 2]) -> Self {
        let ram = Ram::new(pages);
        for page in 0..pages[0] * 2 / 3 {
            ram.guest_writes(0, page, page * 1000 + 1);
        }
        for page in 0..pages[1] {
            ram.guest_writes(1, page, if page % 3 == 0 { 0 } else { page + 5 });
        }
        let cpu = Cpu::new(&ram, true);
        Self {
            cpu,
            ram,
            journal: Journal::default(),
            stuns: None,
            doubt: None,
            history: vec![],
            record: None,
            link: Some(Rate(1 << 30)),
            offers: vec![],
        }
    }

    /// A guest that writes wherever it runs, `rate` pages a round of its loop.
    fn guest(&self, rate: u64) {
        let (cpu, ram, stuns) = (self.cpu.clone(), self.ram.clone(), self.stuns.clone().unwrap_or_default());
        thread::spawn(move || {
            let mut n = 1u64;
            while !cpu.destroyed.load(SeqCst) {
                {
                    let _step = cpu.step.lock().unwrap();
                    if cpu.running.load(SeqCst) && !stuns.stands_still() {
                        for _ in 0..rate {
                            n = n.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                            ram.guest_writes(0, (n >> 33) % 5000, n >> 20);
                        }
                    }
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
    }

    fn migrate(
        &self,
        address: SocketAddr,
        options: MigrateOptions,
        run: impl FnOnce(Handle),
    ) -> (Report, Vec<Event>) {
        let dial = TcpDial::new(vec![address], "here", MIGRATION, Security::Plaintext);
        self.migrate_by(Arc::new(dial), options, run)
    }

    fn migrate_by(
        &self,
        dial: Arc<dyn Dial>,
        options: MigrateOptions,
        run: impl FnOnce(Handle),
    ) -> (Report, Vec<Event>) {
        let migration = MIGRATION;
        let parts = SourceParts {
            vm: "vm".into(),
            from: "source".into(),
            to: "target".into(),
            migration,
            epoch: Epoch(3),
            came_by: Some(MigrationId(7)),
            recipe: b"{}".to_vec(),
            private: vec![],
            reading: Default::default(),
            memory: self.ram.clone(),
            offered: Offered { blocks: self.offers.clone(), keeps: None },
            tracker: Some(Box::new(ModelTracker(self.ram.clone()))),
            stuns: self.stuns.clone().map(|stuns| Box::new(stuns) as Box<_>),
            machine: SharedPort::new(Box::new(self.cpu.clone())),
            journal: Box::new(self.journal.clone()),
            cores: Box::new(|| 1),
            history: self.history.clone(),
            link_history: LinkHistory { link: self.link, switchover: Duration::from_millis(8) },
            streams: options.streams.map_or(2..=2, |most| 1..=most.into()),
            writers: 1,
            record: self.record.clone().unwrap_or_else(|| Arc::new(RemoteRecord(dial.clone()))),
            dial,
        };
        let events = Arc::new(Mutex::new(vec![]));
        let heard = events.clone();
        let (driver, handle) =
            SourceDriver::new(parts, options, Arc::new(move |e| heard.lock().unwrap().push(e)));
        let driver = match self.doubt {
            Some(doubt) => driver.doubting_after(doubt),
            None => driver,
        };
        let (done, report) = channel();
        thread::spawn(move || drop(done.send(driver.run())));
        run(handle);
        let report = report.recv_timeout(Duration::from_secs(60)).expect("every migration ends");
        let events = events.lock().unwrap().clone();
        (report, events)
    }
}

fn options(mode: Mode) -> MigrateOptions {
    MigrateOptions { mode, verify: true, give_up: Duration::from_secs(20), ..MigrateOptions::to("target") }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < Duration::from_secs(30), "{what} never came");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn all_modes_bring_the_same_memory() {
    for mode in [Mode::Auto, Mode::PreCopy, Mode::Hybrid, Mode::PostCopy] {
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        source.guest(1);
        let (report, events) = source.migrate(listen(&inn), options(mode), |_| {});
        assert_eq!(report.outcome, Outcome::Completed, "{mode:?} {:?}", report.error);
        assert_eq!(report.verified, Some(true), "{mode:?}");
        assert!(inn.cpu.running.load(SeqCst) && !source.cpu.running.load(SeqCst));
        assert!(source.cpu.destroyed.load(SeqCst), "{mode:?}: the source's copy is left behind");
        assert_eq!(inn.ram.content(), source.ram.content(), "{mode:?}");
        assert_eq!(inn.ram.overwritten(), 0, "{mode:?}: I5");
        assert!(report.downtime_ms.is_some_and(|ms| ms > 0.0 && ms < 1000.0), "{:?}", report.downtime_ms);
        parts_are_the_downtime(&report, &events, mode);
        assert_eq!(report.aborted_pauses_ms, 0.0, "{mode:?}");
        wait_until("the target's end", || *inn.ended.lock().unwrap() == Some(true));
        let journal = source.journal.events.lock().unwrap().join(",");
        assert_eq!(journal, "pausing,promise,gone 4,settled", "{mode:?}");
        if mode == Mode::PostCopy {
            assert_eq!(report.rounds.len(), 0);
        }
    }
}

/// Both hosts' parts are there, each in its place, and add up.
fn parts_are_the_downtime(report: &Report, events: &[Event], mode: Mode) {
    use PausePart::*;
    let total = report.downtime_ms.unwrap_or_default();
    let sum: f64 = report.downtime.iter().map(|part| part.ms).sum();
    assert!((sum - total).abs() < 1e-6, "{mode:?}: {sum} of {total} ms: {:?}", report.downtime);
    let told = Event::Downtime { ms: total, parts: report.downtime.clone() };
    assert_eq!(events.iter().filter(|event| **event == told).count(), 1, "{mode:?}");
    let missing = report.rounds.is_empty() || report.mode == Mode::Hybrid;
    let pages = if missing { (Missing, Side::Source) } else { (LastPages, Side::Both) };
    let expected = [
        (Stop, Side::Source),
        (LastScan, Side::Source),
        pages,
        (Hash, Side::Source),
        (SendState, Side::Both),
        (Compare, Side::Target),
        (Load, Side::Target),
        (Fence, Side::Source),
        (Claim, Side::Target),
        (Resume, Side::Target),
    ];
    // Either host's in its order.
    let mut at = [0.0; 2];
    for (part, side) in expected {
        let found = report.downtime.iter().find(|p| (p.part, p.side) == (part, side));
        let found = found.unwrap_or_else(|| panic!("{mode:?}: no {part:?} in {:?}", report.downtime));
        let at = &mut at[usize::from(side == Side::Target)];
        assert!(found.at_ms >= *at, "{mode:?}: {part:?} is early: {:?}", report.downtime);
        assert!(found.ms <= found.took_ms, "{mode:?}: {found:?}");
        *at = found.at_ms;
    }
}

/// What takes long shows as such, on whichever host.
#[test]
fn a_slow_part_of_the_downtime_is_named() {
    const LONG: Duration = Duration::from_millis(120);
    let slow = || -> OnTheWay { Box::new(|| thread::sleep(LONG)) };
    for part in [PausePart::Stop, PausePart::Save, PausePart::Hold, PausePart::Claim] {
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        match part {
            PausePart::Stop => source.cpu.on_stop.lock().unwrap().push_back(slow()),
            PausePart::Save => source.cpu.on_save.lock().unwrap().push_back(slow()),
            PausePart::Hold => *source.cpu.on_hold.lock().unwrap() = Some(slow()),
            _ => *inn.record.on_claim.lock().unwrap() = Some(slow()),
        }
        let wish = MigrateOptions { verify: false, ..options(Mode::PostCopy) };
        let (report, _) = source.migrate(listen(&inn), wish, |_| {});
        assert_eq!(report.outcome, Outcome::Completed, "{part:?} {:?}", report.error);
        let longest = report.downtime.iter().max_by(|a, b| a.ms.total_cmp(&b.ms)).unwrap();
        assert_eq!(longest.part, part, "{:?}", report.downtime);
        assert!(longest.ms >= LONG.as_secs_f64() * 900.0, "{part:?}: {longest:?}");
    }
}

#[test]
fn a_device_state_that_reads_a_missing_page_gets_it() {
    let (source, mut inn) = (Source::new(), Inn::usual(&PAGES));
    inn.cpu.load_reads = Some(3999);
    let inn = Arc::new(inn);
    let (report, _) = source.migrate(listen(&inn), options(Mode::PostCopy), |_| {});
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.error);
    assert!(report.faults.count >= 2, "{:?}", report.faults);
    assert_eq!(inn.ram.content(), source.ram.content());
}

#[test]
fn a_refusal_lists_every_reason_and_leaves_the_guest_alone() {
    let source = Source::new();
    let refuse = vec!["no bridge br9".into(), "no disk".into()];
    let inn = Arc::new(Inn { refuse, ..Inn::usual(&PAGES) });
    let (report, _) = source.migrate(listen(&inn), options(Mode::Auto), |_| {});
    let error = report.error.unwrap();
    assert_eq!(report.outcome, Outcome::Failed);
    assert_eq!((error.what.as_str(), error.why.as_str()), ("preflight", "no bridge br9\nno disk"));
    assert_eq!(error.vm_runs_on.as_deref(), Some("source"));
    assert!(source.cpu.running.load(SeqCst));
}

#[test]
fn i3_a_cancelled_migration_leaves_the_guest_and_no_trace() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    source.guest(400);
    let mut wish = options(Mode::PreCopy);
    wish.max_downtime = Duration::from_millis(1);
    let ram = inn.ram.clone();
    let (report, _) = source.migrate(listen(&inn), wish, |handle| {
        wait_until("memory on the target", || ram.content()[0].len() > 100);
        handle.cancel();
    });
    assert_eq!(report.outcome, Outcome::Cancelled);
    assert!(source.cpu.running.load(SeqCst));
    wait_until("the target's end", || *inn.ended.lock().unwrap() == Some(false));
    assert!(inn.cpu.destroyed.load(SeqCst) && !inn.cpu.running.load(SeqCst));
    assert_eq!(*inn.journal.events.lock().unwrap(), ["abandoned false"]);
}

/// What was to follow an act that failed is not done, a promise above all: after it only the record could
/// bring the guest back.
#[test]
fn i3_nothing_is_promised_once_something_has_failed() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    source.ram.lost_by_saving.store(true, SeqCst);
    // The hashes of the stopped guest's memory cannot be made.
    let (report, _) = source.migrate(listen(&inn), options(Mode::PostCopy), |_| {});
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(source.cpu.running.load(SeqCst));
    assert_eq!(*source.journal.events.lock().unwrap(), ["pausing", "back"]);
}

/// Mends it as soon as it was cut for long enough to be noticed, if it ever is.
fn mend_after_the_cut(cable: Cable) {
    thread::spawn(move || {
        let since = Instant::now();
        while !cable.cut.load(SeqCst) {
            if since.elapsed() > Duration::from_secs(60) {
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
        thread::sleep(Duration::from_millis(100));
        cable.mend();
    });
}

#[test]
fn i1_i2_i3_a_link_cut_at_any_point_leaves_one_whole_guest() {
    let mut completed = 0;
    let total = {
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        let cable = Cable::to(listen(&inn));
        source.migrate(cable.address, options(Mode::Hybrid), |_| {});
        cable.passed.load(SeqCst)
    };
    for mode in [Mode::PreCopy, Mode::Hybrid, Mode::PostCopy] {
        for part in 0..12 {
            let (source, inn) = (Source::new(), Inn::new(&PAGES));
            let cable = Cable::to(listen(&inn));
            // Not evenly: the last bytes hold the switchover and the commit.
            let at = [
                1,
                40,
                200,
                600,
                total / 4,
                total / 2,
                total - 60000,
                total - 20000,
                total - 6000,
                total - 2000,
                total - 500,
                total - 60,
            ][part];
            cable.cut_after.store(at, SeqCst);
            println!("{mode:?}, cut after {at} of {total} bytes");
            let mender = cable.clone();
            let (report, _) = source.migrate(cable.address, options(mode), |_| mend_after_the_cut(mender));
            let story = format!("{mode:?} cut after {at} of {total}: {report:?}");
            let (here, there) = (source.cpu.running.load(SeqCst), inn.cpu.running.load(SeqCst));
            assert!(here != there, "I1: {story}");
            match report.outcome {
                Outcome::Completed => {
                    assert!(there, "{story}");
                    assert_eq!(inn.ram.content(), source.ram.content(), "{story}");
                    completed += 1;
                }
                Outcome::Failed => {
                    assert!(here && !source.cpu.destroyed.load(SeqCst), "{story}");
                    assert_eq!(report.error.unwrap().vm_runs_on.as_deref(), Some("source"));
                }
                _ => panic!("{story}"),
            }
        }
    }
    assert!((3..36).contains(&completed), "cuts before and after the commit: {completed} of 36 completed");
}

/// When five hundred pages are there, and more than three thousand are not.
const CUT: u64 = 2 << 20;

/// A guest that writes now and then, over a link that is cut in the middle of its first round.
fn cut_in_the_first_round(
    addresses: impl Fn(&Inn, SocketAddr, SocketAddr) -> Vec<SocketAddr>,
    mend: bool,
) -> Report {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    source.guest(1);
    let target = listen(&inn);
    let (first, second) = (Cable::to(target), Cable::to(target));
    let dial =
        TcpDial::new(addresses(&inn, first.address, second.address), "here", MIGRATION, Security::Plaintext);
    let wish = MigrateOptions {
        compress: Compression::None,
        bandwidth: Some(Rate(20 << 20)),
        ..options(Mode::PreCopy)
    };
    first.cut_after.store(CUT, SeqCst);
    let (mender, ram) = (first.clone(), source.ram.clone());
    let (report, events) = source.migrate_by(Arc::new(dial), wish, move |_| {
        thread::spawn(move || {
            wait_until("the cut", || mender.cut.load(SeqCst));
            // What the target has of these is not zeros any more when the source is back, knowing nothing of
            // it.
            (0..50).for_each(|page| ram.guest_writes(0, page, 0));
            if mend {
                // It has called in vain by then.
                wait_until("an attempt", || mender.refused.load(SeqCst) >= 2);
                mender.mend();
            }
        });
    });
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.error);
    assert_eq!((report.verified, inn.ram.overwritten()), (Some(true), 0), "I5");
    assert_eq!(inn.ram.content(), source.ram.content(), "I2: nothing that was on its way is missing");
    let said = |word: &str| events.iter().any(|e| matches!(e, Event::Note { text } if text.contains(word)));
    assert!(said("was lost; the VM runs on here") && said("connected to target again"), "{events:?}");
    report
}

#[test]
fn i2_i3_i5_a_link_that_comes_back_goes_on_where_it_was() {
    let report = cut_in_the_first_round(|_, first, _| vec![first], true);
    // What had landed was not sent again: that is half a thousand pages. Of what was written a fifth is
    // zeros.
    let all = (PAGES[0] * 2 / 3 + PAGES[1] * 2 / 3) * 4096;
    let written: u64 = report.rounds.iter().skip(1).map(|round| round.pages * 4096).sum();
    let sent = report.wire_bytes;
    assert!(sent < all + written, "{sent} bytes for {all} of memory, and {written} that was written later");
}

/// Its first look at the link sees nothing: that connection hardly carries anything.
struct Disturbed {
    dial: TcpDial,
    disturbed: TcpDial,
    probes: AtomicU32,
}

impl Dial for Disturbed {
    fn dial(&self, kind: proto::Purpose, token: Option<&proto::Token>) -> std::io::Result<Conn> {
        let first = kind == proto::Purpose::Probe && self.probes.fetch_add(1, SeqCst) == 0;
        if first { &self.disturbed } else { &self.dial }.dial(kind, token)
    }

    fn dial_soon(
        &self,
        kind: proto::Purpose,
        token: Option<&proto::Token>,
        _: Duration,
    ) -> std::io::Result<Conn> {
        self.dial(kind, token)
    }

    fn is_plaintext(&self) -> bool {
        self.dial.is_plaintext()
    }

    fn traffic(&self) -> &Arc<Traffic> {
        self.dial.traffic()
    }
}

#[test]
fn a_link_that_could_not_be_seen_is_looked_at_once_more() {
    // On a busy machine the first look may have seen no more than what buffers take in: then another
    // migration.
    for attempt in 1.. {
        let (mut source, inn) = (Source::new(), Inn::new(&PAGES));
        source.link = None;
        let target = listen(&inn);
        let cable = Cable::to(target);
        cable.each.store(16 << 10, SeqCst);
        let dial = |to| TcpDial::new(vec![to], "here", MIGRATION, Security::Plaintext);
        let (dial, disturbed) = (dial(target), dial(cable.address));
        let dial = Arc::new(Disturbed { dial, disturbed, probes: AtomicU32::new(0) });
        let (report, _) = source.migrate_by(dial.clone(), options(Mode::PreCopy), |_| {});
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.error);
        if dial.probes.load(SeqCst) == 2 {
            return assert!(report.forecast.is_some_and(|forecast| forecast.link > 1 << 20));
        }
        assert!(attempt < 20, "it was never looked at again");
    }
}

#[test]
fn another_address_of_the_target_is_as_good() {
    cut_in_the_first_round(|_, first, second| vec![first, second], false);
}

#[test]
fn i3_a_link_that_stays_away_ends_the_migration_in_time() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    let cable = Cable::to(listen(&inn));
    cable.cut_after.store(2 << 20, SeqCst);
    let wish = MigrateOptions {
        give_up: Duration::from_millis(700),
        bandwidth: Some(Rate(20 << 20)),
        ..options(Mode::PreCopy)
    };
    let begin = Instant::now();
    let (report, _) = source.migrate(cable.address, wish, |_| {});
    let error = report.error.unwrap();
    assert_eq!((report.outcome, error.vm_runs_on.as_deref()), (Outcome::Failed, Some("source")));
    assert!(error.why.contains("not back within 0.7 s") && error.why.contains("--give-up"), "{error:?}");
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    assert!(source.cpu.running.load(SeqCst));
    wait_until("the target's end", || *inn.ended.lock().unwrap() == Some(false));
    assert!(inn.cpu.destroyed.load(SeqCst), "it waits a little longer than the source, and leaves nothing");
}

#[test]
fn a_target_in_preparation_hears_of_a_lost_link_later() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    inn.held.store(true, SeqCst);
    let cable = Cable::to(listen(&inn));
    let (report, _) = source.migrate(cable.address, options(Mode::PreCopy), |_| {
        wait_until("the request", || inn.asked.load(SeqCst));
        cable.cut();
        inn.held.store(false, SeqCst);
    });
    assert_eq!(report.outcome, Outcome::Failed, "{:?}", report.error);
    cable.mend();
    let mended = Instant::now();
    wait_until("the target's end", || *inn.ended.lock().unwrap() == Some(false));
    // By itself it waits for five seconds for a source that hung up, and for a minute for one that fell
    // silent.
    assert!(mended.elapsed() < Duration::from_secs(3), "{:?}", mended.elapsed());
    assert!(inn.cpu.destroyed.load(SeqCst) && source.cpu.running.load(SeqCst));
}

#[test]
fn a_migration_that_waits_for_its_link_can_be_cancelled() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    let cable = Cable::to(listen(&inn));
    cable.cut_after.store(2 << 20, SeqCst);
    let wish = MigrateOptions { bandwidth: Some(Rate(20 << 20)), ..options(Mode::PreCopy) };
    let (report, _) = source.migrate(cable.address, wish, |handle| {
        wait_until("two attempts", || cable.refused.load(SeqCst) >= 2);
        handle.cancel();
    });
    assert_eq!(report.outcome, Outcome::Cancelled, "{:?}", report.error);
    assert!(source.cpu.running.load(SeqCst));
}

/// Its record could not be asked by anybody, and the guest would stand still for as long.
#[test]
fn i3_a_target_whose_disk_is_full_is_not_authorized() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    inn.journal.is_full.store(true, SeqCst);
    let (report, _) = source.migrate(listen(&inn), options(Mode::PreCopy), |_| {});
    let error = report.error.unwrap();
    assert_eq!((report.outcome, error.vm_runs_on.as_deref()), (Outcome::Failed, Some("source")));
    assert!(error.what.contains("write the state of this host"), "{error:?}");
    assert!(source.cpu.running.load(SeqCst) && !inn.cpu.running.load(SeqCst));
    wait_until("the target's end", || *inn.ended.lock().unwrap() == Some(false));
    // It is forgotten as soon as that can be written.
    assert!(inn.journal.events.lock().unwrap().is_empty());
    inn.journal.is_full.store(false, SeqCst);
    wait_until("the abandoned migration to be forgotten", || {
        inn.journal.events.lock().unwrap().iter().any(|event| event.starts_with("abandoned"))
    });
}

#[test]
fn i3_a_target_that_refuses_the_device_state_has_nothing() {
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        inn.cpu.refuses.store(true, SeqCst);
        let (report, _) = source.migrate(listen(&inn), options(mode), |_| {});
        let error = report.error.unwrap();
        assert_eq!((report.outcome, error.vm_runs_on.as_deref()), (Outcome::Failed, Some("source")));
        assert_eq!((error.what.as_str(), error.why.as_str()), ("load the device state", "no such device"));
        assert!(source.cpu.running.load(SeqCst) && !inn.cpu.running.load(SeqCst));
        wait_until("the target's end", || *inn.ended.lock().unwrap() == Some(false));
        assert!(inn.cpu.destroyed.load(SeqCst));
    }
}

#[test]
fn a_state_that_cannot_be_loaded_names_what_others_changed() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    inn.cpu.refuses.store(true, SeqCst);
    let differs = source.cpu.differs.clone();
    let plug = Box::new(move || differs.lock().unwrap().push("device late was plugged in".into()));
    inn.cpu.on_load.lock().unwrap().push_back(plug);
    let (report, _) = source.migrate(listen(&inn), options(Mode::PreCopy), |_| {});
    let why = report.error.unwrap().why;
    assert_eq!(why, "no such device; the VM was changed meanwhile: device late was plugged in");
    assert!(source.cpu.running.load(SeqCst));
}

#[test]
fn i3_a_target_that_waits_for_a_page_hears_that_it_is_over() {
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        let (source, mut inn) = (Source::new(), Inn::usual(&PAGES));
        inn.cpu.load_waits = true;
        let (inn, runs) = (Arc::new(inn), source.cpu.running.clone());
        // Somebody lets the guest run on, in the pause, so that the source takes it back.
        *source.cpu.on_hold.lock().unwrap() = Some(Box::new(move || runs.store(true, SeqCst)));
        let (report, _) = source.migrate(listen(&inn), options(mode), |_| {});
        let error = report.error.unwrap();
        assert_eq!((report.outcome, error.vm_runs_on.as_deref()), (Outcome::Failed, Some("source")));
        assert!(error.why.contains("somebody let the guest run on"), "{error:?}");
        wait_until("the target's end", || *inn.ended.lock().unwrap() == Some(false));
        assert!(inn.cpu.ended.load(SeqCst), "it was not waited for until a load is given up");
    }
}

#[test]
fn i3_a_target_whose_qemu_has_ended_does_not_claim() {
    // Found right after the device state was loaded, or with the authorization.
    for (mode, looks) in [(Mode::PreCopy, 0), (Mode::PostCopy, 0), (Mode::PreCopy, 1), (Mode::PostCopy, 1)] {
        let (source, mut inn) = (Source::new(), Inn::usual(&PAGES));
        inn.cpu.dies_loaded = Some(looks);
        let inn = Arc::new(inn);
        let (report, _) = source.migrate(listen(&inn), options(mode), |_| {});
        let error = report.error.unwrap();
        let told = (report.outcome, error.vm_runs_on.as_deref());
        assert_eq!(told, (Outcome::Failed, Some("source")), "{mode:?}: {error:?}");
        assert!(error.what.contains("waiting QEMU") && error.why.contains("ended"), "{error:?}");
        assert!(source.cpu.running.load(SeqCst));
    }
}

#[test]
fn a_qemu_that_ends_is_named_on_either_side() {
    let slowly = || MigrateOptions { bandwidth: Some(Rate(4 << 20)), ..options(Mode::PreCopy) };
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    let dies = source.cpu.clone();
    let (report, _) = source.migrate(listen(&inn), slowly(), |_| {
        wait_until("memory on the target", || inn.ram.content()[0].len() > 100);
        dies.dies();
    });
    let error = report.error.unwrap();
    assert_eq!((report.outcome, error.vm_runs_on.as_deref()), (Outcome::Failed, None), "{error:?}");
    assert!(error.why.contains("its QEMU has ended"), "{error:?}");
    wait_until("the target's end", || *inn.ended.lock().unwrap() == Some(false));

    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    let dies = inn.cpu.clone();
    let (report, _) = source.migrate(listen(&inn), slowly(), |_| {
        wait_until("memory on the target", || inn.ram.content()[0].len() > 100);
        dies.dies();
    });
    let error = report.error.unwrap();
    assert_eq!((report.outcome, error.vm_runs_on.as_deref()), (Outcome::Failed, Some("source")), "{error:?}");
    assert!(error.what.contains("waiting QEMU") && error.why.contains("ended"), "{error:?}");
    assert!(source.cpu.running.load(SeqCst));

    // In post-copy: nobody can bring that guest back, and nobody waits for it.
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    let dies = inn.cpu.clone();
    let wish = MigrateOptions { bandwidth: Some(Rate(1 << 20)), ..options(Mode::PostCopy) };
    let (report, _) = source.migrate(listen(&inn), wish, |_| {
        wait_until("the guest on the target", || inn.cpu.running.load(SeqCst));
        dies.dies();
    });
    let error = report.error.unwrap();
    assert_eq!((report.outcome, error.vm_runs_on), (Outcome::Failed, None));
    assert!(error.why.contains("its QEMU ended while memory was still on its way"), "{}", error.why);
    assert!(!source.cpu.running.load(SeqCst), "I4");
}

#[test]
fn a_link_lost_before_the_last_page_is_not_waited_for_in_vain() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    let cable = Cable::to(listen(&inn));
    let all = source.ram.content().iter().map(|block| block.len()).sum();
    let while_it_lands = cable.clone();
    let lose_the_link = move || {
        while_it_lands.cut();
        // The source has tried to connect again, and again after a while: by now the target knows, too.
        wait_until("two attempts", || while_it_lands.refused.load(SeqCst) >= 2);
        while_it_lands.mend();
    };
    *inn.ram.on_the_way.lock().unwrap() = Some((all, Box::new(lose_the_link)));
    let (report, _) = source.migrate(cable.address, options(Mode::PostCopy), |_| {});
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.error);
    assert!(cable.refused.load(SeqCst) >= 2, "the link was lost on the way");
    assert_eq!(inn.ram.content(), source.ram.content());
}

#[test]
fn a_target_that_is_not_there_is_named() {
    let source = Source::new();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (report, _) = source.migrate(nobody, options(Mode::Auto), |_| {});
    let error = report.error.unwrap();
    assert_eq!(error.what, "reach target");
    assert!(error.why.contains("refused"), "{}", error.why);
    assert!(source.cpu.running.load(SeqCst));
}

#[test]
fn a_peer_that_sends_garbage_is_no_whimbrel() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    });
    let source = Source::new();
    let (report, _) = source.migrate(address, options(Mode::Auto), |_| {});
    let why = report.error.unwrap().why;
    assert!(why.contains("does not speak Whimbrel's protocol"), "{why}");
    assert!(source.cpu.running.load(SeqCst));
}

#[test]
fn a_source_whose_frames_are_wrong_is_told_so() {
    let frame = proto::Preamble::SIZE + proto::Token::SIZE;
    // The kind of the first frame, and the first page of the first run in its table.
    let lies = [
        (Lie { at: frame, byte: 255 }, "frame kind 255 is not known"),
        (Lie { at: frame + proto::HEADER + 5, byte: 1 }, "RAM block 0"),
    ];
    for (lie, words) in lies {
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        let cable = Cable::to(listen(&inn));
        cable.lie(lie);
        let options = MigrateOptions { streams: Some(1), ..options(Mode::PreCopy) };
        let (report, _) = source.migrate(cable.address, options, |_| {});
        let error = report.error.unwrap();
        assert!(error.why.contains(words), "{error:?}");
        assert_eq!((report.outcome, error.vm_runs_on.as_deref()), (Outcome::Failed, Some("source")));
        assert!(source.cpu.running.load(SeqCst) && !inn.cpu.running.load(SeqCst));
        wait_until("the target's end", || *inn.ended.lock().unwrap() == Some(false));
        assert!(inn.cpu.destroyed.load(SeqCst), "nothing is left at the target");
    }
}

#[test]
fn a_guest_that_outruns_the_link_is_reported_not_hidden() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    source.guest(400);
    let mut wish = options(Mode::Auto);
    wish.bandwidth = Some(units::Rate(20 << 20));
    wish.max_downtime = Duration::from_millis(9);
    let journal = source.journal.clone();
    let (report, events) = source.migrate(listen(&inn), wish, |handle| {
        thread::sleep(Duration::from_secs(8));
        assert!(journal.events.lock().unwrap().is_empty(), "it was stopped");
        handle.cancel();
    });
    assert_eq!(report.outcome, Outcome::Cancelled);
    assert!(report.rounds.len() > 3, "{:?}", report.rounds);
    let notes =
        events.iter().filter(|e| matches!(e, Event::Note { text } if text.contains("does not converge")));
    assert_eq!(notes.count(), 1);
}

#[test]
fn a_guest_that_outruns_the_link_is_slowed_until_it_fits() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    *source.ram.throttle.lock().unwrap() = Some(policy::Throttle::new(Duration::from_millis(5), 1));
    source.guest(400);
    let mut wish = options(Mode::PreCopy);
    wish.bandwidth = Some(units::Rate(20 << 20));
    wish.compress = Compression::None;
    let (report, events) = source.migrate(listen(&inn), wish, |_| {});
    assert_eq!((report.outcome, report.mode), (Outcome::Completed, Mode::PreCopy), "{:?}", report.error);
    assert_eq!(report.verified, Some(true));
    let notes: Vec<&Event> =
        events.iter().filter(|e| matches!(e, Event::Note { text } if text.contains("slowed"))).collect();
    assert_eq!(notes.len(), 1, "the user is told, once: {events:?}");
    assert_eq!((report.throttle.stalled_ms, report.throttle.longest_ms), (30.0, 5.0));
    // From the round on in which it began, each leaves less than the one before.
    let dirtied: Vec<u64> = report.rounds.iter().map(|round| round.dirtied).filter(|n| *n > 100).collect();
    assert!(dirtied.windows(2).all(|pair| pair[1] < pair[0]), "{:?}", report.rounds);
}

#[test]
fn a_guest_that_outruns_the_link_ends_in_post_copy() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    source.guest(400);
    let mut wish = options(Mode::Auto);
    wish.allow_post_copy = true;
    wish.bandwidth = Some(units::Rate(40 << 20));
    wish.max_downtime = Duration::from_millis(9);
    let (report, _) = source.migrate(listen(&inn), wish, |_| {});
    assert_eq!((report.outcome, report.mode), (Outcome::Completed, Mode::Hybrid), "{:?}", report.error);
    assert_eq!(report.verified, Some(true));
    assert_eq!(inn.ram.content(), source.ram.content());
}

/// A guest whose programs copy pages, rewrite them with the same content, and count in them.
fn copies_and_counts(source: &Source) {
    let (cpu, ram) = (source.cpu.clone(), source.ram.clone());
    thread::spawn(move || {
        let mut n = 0u64;
        while !cpu.destroyed.load(SeqCst) {
            {
                let _step = cpu.step.lock().unwrap();
                if cpu.running.load(SeqCst) {
                    for page in 0..40 {
                        // As some other page was from the beginning, as the page is already, and something
                        // that changes a little.
                        ram.guest_writes(0, 4000 + page, (page + 40 + n % 7 * 50) * 1000 + 1);
                        ram.guest_writes(0, 100 + page, (100 + page) * 1000 + 1);
                        ram.guest_counts(0, 200 + page, n);
                    }
                    n += 1;
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn i7_pages_travel_as_little_as_they_can_and_arrive_as_they_are() {
    for compress in [Compression::Auto, Compression::None, Compression::Lz4, Compression::Zstd] {
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        copies_and_counts(&source);
        let mut wish = options(Mode::PreCopy);
        wish.compress = compress;
        wish.bandwidth = Some(units::Rate(40 << 20));
        wish.max_downtime = Duration::from_micros(8_500);
        // What the guest keeps writing does not fit into that pause for a while: there are several rounds.
        let (report, _) = source.migrate(listen(&inn), wish, |_| {});
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.error);
        assert_eq!(report.verified, Some(true));
        assert_eq!(inn.ram.content(), source.ram.content());
        let pages = report.pages;
        assert!(pages.duplicate > 0 && pages.unchanged > 0, "{compress:?}: {pages:?}");
        if report.rounds.len() > 3 {
            assert!(pages.delta > 0, "{compress:?}: {pages:?}");
        }
        // The tracker is told of each round before the last which pages need not have been in it.
        let learnt = source.ram.learnt.lock().unwrap();
        // The last are one or two: what devices write while they are saved may have to wait for a barrier.
        assert!((1..=2).contains(&(report.rounds.len() - learnt.len())), "{:?}", report.rounds);
        let told = |page| learnt.iter().any(|round| round.block(BlockId(0)).contains(PageIndex(page)));
        assert!((100..140).all(told), "what was written again as it was");
        assert!(!learnt[0].block(BlockId(0)).contains(PageIndex(100)), "it was new in the first round");
        match compress {
            Compression::None => assert_eq!(pages.compressed, 0),
            Compression::Lz4 | Compression::Zstd => assert!(pages.compressed > pages.raw, "{pages:?}"),
            Compression::Auto => {}
        }
    }
}

#[test]
fn more_streams_are_used_where_they_move_more() {
    // So much that there is time to find out.
    let pages = [24_000, 1];
    let (source, inn) = (Source::with(&pages), Inn::new(&pages));
    let cable = Cable::to(listen(&inn));
    cable.each.store(8 << 20, SeqCst);
    let wish = MigrateOptions { streams: Some(4), compress: Compression::None, ..options(Mode::PreCopy) };
    let (report, _) = source.migrate(cable.address, wish, |_| {});
    assert_eq!((report.outcome, report.verified), (Outcome::Completed, Some(true)), "{:?}", report.error);
    assert_eq!(inn.ram.content(), source.ram.content());
    assert!((2..=4).contains(&report.streams), "{} streams", report.streams);
}

#[test]
fn i3_i7_a_target_with_other_memory_takes_nothing_over() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    copies_and_counts(&source);
    // So much that there is no end to the rounds.
    source.guest(400);
    let mut wish = options(Mode::PreCopy);
    wish.bandwidth = Some(units::Rate(20 << 20));
    wish.max_downtime = Duration::from_micros(8_001);
    let spoilt = inn.ram.clone();
    let (done, stop) = channel::<()>();
    let (report, _) = source.migrate(listen(&inn), wish, |_| {
        thread::spawn(move || {
            while stop.recv_timeout(Duration::from_millis(1)).is_err()
                && spoilt.is_overwritten_with_rubbish(0..400)
            {}
        });
    });
    drop(done);
    assert_eq!(report.outcome, Outcome::Failed);
    let error = report.error.unwrap();
    assert_eq!(error.vm_runs_on.as_deref(), Some("source"));
    assert!(error.why.contains("tagged"), "{}", error.why);
    assert!(source.cpu.running.load(SeqCst) && !inn.cpu.running.load(SeqCst));
}

#[test]
fn an_owed_set_of_other_blocks_is_refused_and_not_believed() {
    let inn = Inn::new(&PAGES);
    let acceptor = Acceptor::new(inn.clone(), Security::Plaintext);
    let request = Request {
        migration: MIGRATION,
        vm: "vm".into(),
        from: "source".into(),
        epoch: Epoch(3),
        recipe: b"{}".to_vec(),
        handovers: vec![],
        private: vec![],
        blocks: inn.ram.blocks().to_vec(),
        post_copy: true,
        came_by: None,
        record: String::new(),
        history: vec![],
    };
    for pages in [&[6000][..], &[6000, 301], &[6000, 300, 1], &[]] {
        let waiting = inn.prepare(&request).unwrap();
        let missing = MemorySet::empty(pages.iter().copied());
        let error = acceptor.go_on(request.clone(), waiting, missing, None).unwrap_err();
        assert!(error.to_string().contains("recorded as missing"), "{error}");
    }
    assert!(!inn.cpu.running.load(SeqCst));
}
