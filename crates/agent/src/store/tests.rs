//! The promises of the store: what `Ownership` owes to every migration, and what a crash leaves.

use super::*;
use api::{Mode, Outcome, PastMigration, Report};
use ports::{
    Claim, Claimed, Ownership, OwnershipRecord, RunState, SourceJournal, SpoolRecord, TargetJournal,
};
use std::{env, process::Command, sync::Barrier, thread, time::Duration};
use units::{BlockId, Epoch, MemorySet, MigrationId, PAGE_SIZE, PageIndex, Rate};

const FIRST: MigrationId = MigrationId(0x1111);

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), "there").unwrap();
    (dir, store)
}

fn vm(name: &str, standing: Standing) -> VmRecord {
    let process = Some(Process { pid: 4711, start_time: 99 });
    let recipe = serde_json::json!({"vcpus": 2});
    VmRecord {
        name: name.into(),
        recipe,
        process,
        qmp: "/run/q".into(),
        belongings: serde_json::Value::Null,
        origin: Origin::Run,
        standing,
    }
}

fn arriving(name: &str, migration: MigrationId) -> VmRecord {
    vm(name, Standing::Arriving { migration, from: "here".into() })
}

fn record(owner: &str, epoch: u64) -> OwnershipRecord {
    OwnershipRecord { owner: owner.into(), epoch: Epoch(epoch), migration: None }
}

fn claim(claimer: &str, migration: MigrationId, expected: u64) -> Claim {
    Claim { vm: "web1".into(), migration, expected: Epoch(expected), claimer: claimer.into() }
}

/// A store in which `here` offers `web1`, at epoch 4.
fn offered() -> (tempfile::TempDir, Store, Arrival) {
    let (dir, store) = store();
    let arrival = store.accept(&arriving("web1", FIRST), &record("here", 4)).unwrap();
    (dir, store, arrival)
}

fn lost_to(owner: &str, epoch: u64) -> Claimed {
    Claimed::Lost(OwnershipRecord { owner: owner.into(), epoch: Epoch(epoch), migration: Some(FIRST) })
}

#[test]
fn a_claim_asked_again_gives_the_same_answer() {
    let (_dir, store, _) = offered();
    for _ in 0..3 {
        assert_eq!(store.claim(&claim("there", FIRST, 4)).unwrap(), Claimed::Yours(Epoch(5)));
        assert_eq!(store.claim(&claim("here", FIRST, 4)).unwrap(), lost_to("there", 5));
    }
}

#[test]
fn of_concurrent_claims_exactly_one_wins() {
    for _ in 0..20 {
        let (_dir, store, _) = offered();
        let start = Barrier::new(8);
        let won: Vec<&str> = thread::scope(|threads| {
            let racers: Vec<_> = (0..8)
                .map(|i| {
                    let (store, start) = (&store, &start);
                    threads.spawn(move || {
                        let claimer = ["here", "there"][i % 2];
                        start.wait();
                        matches!(store.claim(&claim(claimer, FIRST, 4)).unwrap(), Claimed::Yours(_))
                            .then_some(claimer)
                    })
                })
                .collect();
            racers.into_iter().filter_map(|racer| racer.join().unwrap()).collect()
        });
        // The winner's own repetitions win too; nobody else's.
        assert_eq!(won.len(), 4, "{won:?}");
        assert!(won.iter().all(|claimer| claimer == &won[0]), "{won:?}");
    }
}

#[test]
fn a_claim_at_a_stale_or_future_epoch_loses() {
    let (_dir, store, _) = offered();
    for expected in [0, 3, 5, u64::MAX - 1] {
        let lost = store.claim(&claim("there", FIRST, expected)).unwrap();
        assert_eq!(lost, Claimed::Lost(record("here", 4)), "expected {expected}");
    }
    assert_eq!(store.claim(&claim("there", FIRST, 4)).unwrap(), Claimed::Yours(Epoch(5)));
    assert_eq!(store.claim(&claim("there", FIRST, 5)).unwrap(), lost_to("there", 5));
}

#[test]
fn a_third_host_never_gets_what_two_others_pass_on() {
    let (_dir, store, _) = offered();
    assert_eq!(store.claim(&claim("elsewhere", FIRST, 4)).unwrap(), Claimed::Lost(record("here", 4)));
    assert_eq!(store.claim(&claim("there", FIRST, 4)).unwrap(), Claimed::Yours(Epoch(5)));
    assert_eq!(store.claim(&claim("elsewhere", FIRST, 5)).unwrap(), lost_to("there", 5));
}

#[test]
fn a_claim_for_an_unknown_migration_is_unknown_not_lost() {
    let (_dir, store, _) = offered();
    let unknown = store.claim(&claim("here", MigrationId(7), 4)).unwrap_err();
    assert_eq!(unknown.kind(), io::ErrorKind::NotFound, "{unknown}");
    let other = Claim { vm: "db".into(), ..claim("here", FIRST, 4) };
    assert_eq!(store.claim(&other).unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn after_the_target_gave_up_only_the_source_can_claim() {
    let (_dir, store, arrival) = offered();
    assert!(arrival.abandon().unwrap());
    assert_eq!(store.vm("web1").unwrap(), None);
    assert_eq!(store.claim(&claim("there", FIRST, 4)).unwrap(), Claimed::Lost(record("here", 4)));
    assert_eq!(store.claim(&claim("here", FIRST, 4)).unwrap(), Claimed::Yours(Epoch(5)));
    assert!(matches!(store.accept(&arriving("web1", FIRST), &record("here", 4)), Err(OfferError::Over(_))));
}

#[test]
fn an_arrival_without_a_permit_leaves_no_trace() {
    let (_dir, store, mut arrival) = offered();
    arrival.abandoned(false).unwrap();
    assert_eq!(store.claim(&claim("there", FIRST, 4)).unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(store.vm("web1").unwrap(), None);
    assert!(!store.has_arrived(FIRST).unwrap());
}

#[test]
fn a_migration_is_settled_once_nothing_is_owed() {
    let (_dir, store, mut arrival) = offered();
    assert!(!store.has_arrived(FIRST).unwrap());
    store.claim(&claim("there", FIRST, 4)).unwrap();
    assert!(!store.has_arrived(FIRST).unwrap());
    arrival.settled().unwrap();
    assert!(store.has_arrived(FIRST).unwrap());
}

#[test]
fn a_claimed_arrival_cannot_be_given_up() {
    let (_dir, store, mut arrival) = offered();
    store.claim(&claim("there", FIRST, 4)).unwrap();
    assert!(!arrival.abandon().unwrap());
    assert!(arrival.abandoned(true).is_err());
    assert_eq!(store.vm("web1").unwrap().unwrap().standing, Standing::Here);
}

#[test]
fn a_claim_of_an_old_migration_never_touches_the_new_one() {
    let (_dir, store, arrival) = offered();
    arrival.abandon().unwrap();
    let second = MigrationId(0x2222);
    let _arrival = store.accept(&arriving("web1", second), &record("here", 4)).unwrap();
    assert_eq!(store.claim(&claim("there", FIRST, 4)).unwrap(), Claimed::Lost(record("here", 4)));
    assert_eq!(store.claim(&claim("there", second, 4)).unwrap(), Claimed::Yours(Epoch(5)));
}

#[test]
fn a_name_that_is_taken_is_not_offered_twice() {
    let (_dir, store, _) = offered();
    let again = store.accept(&arriving("web1", MigrationId(2)), &record("other", 9));
    assert!(matches!(again, Err(OfferError::NameTaken { .. })));
    assert!(!store.add_vm(&vm("web1", Standing::Here)).unwrap());
}

#[test]
fn i5_a_spool_record_goes_with_the_revoked_missing_set() {
    let (_dir, store, mut arrival) = offered();
    let none = MemorySet::empty([1000, 50]);
    let mut pages = none.clone();
    pages.block_mut(BlockId(1)).insert(PageIndex(49));
    let outdated = pages.clone();
    let record = SpoolRecord { directory: "/shared".into(), secret: [7; 32], floor: 3, end: 9, outdated };
    arrival.missing(&pages).unwrap();
    arrival.spool(&record).unwrap();
    assert_eq!(store.spool("web1").unwrap().map(|record| (record.floor, record.end)), Some((3, 9)));
    arrival.missing(&none).unwrap();
    assert!(store.spool("web1").unwrap().is_none());
    assert_eq!(store.missing("web1").unwrap(), Some(none));
}

#[test]
fn what_is_owed_is_durable_before_the_claim() {
    let (dir, store, mut arrival) = offered();
    let mut pages = MemorySet::empty([1000, 50]);
    pages.block_mut(BlockId(1)).insert(PageIndex(49));
    arrival.missing(&pages).unwrap();
    store.claim(&claim("there", FIRST, 4)).unwrap();
    let kept =
        |store: &Store| store.arrivals().unwrap().pop().map(|(_, entry)| (entry.claimed, entry.incomplete));
    assert_eq!(kept(&store), Some((true, true)));
    assert_eq!(store.missing("web1").unwrap(), Some(pages));
    arrival.settled().unwrap();
    drop((arrival, store));
    let store = Store::open(dir.path(), "there").unwrap();
    assert_eq!(kept(&store), None);
    assert_eq!(store.missing("web1").unwrap(), None);
    assert_eq!(store.owner("web1").unwrap().unwrap().owner, "there");
}

#[test]
fn the_source_journal_walks_only_forward() {
    let (_dir, store) = store();
    store.add_vm(&vm("web1", Standing::Here)).unwrap();
    let state = || store.departure_of("web1").unwrap().map(|entry| entry.state);
    let mut journal = store.departure("web1", FIRST, "far", "10.0.0.2:7471");
    assert!(journal.fence(Epoch(1)).is_err(), "a fence before the pause");
    assert!(journal.gone(Epoch(2)).is_err(), "gone without a fence");
    journal.pausing(RunState::Running).unwrap();
    assert_eq!(state(), Some(DepartureState::Pausing));
    journal.back().unwrap();
    assert_eq!(state(), None);
    assert_eq!(store.owner("web1").unwrap(), Some(record("there", 1)));

    journal.pausing(RunState::Running).unwrap();
    journal.fence(Epoch(1)).unwrap();
    assert!(
        store.departure("web1", MigrationId(9), "far", "x:1").pausing(RunState::Running).is_err(),
        "two at once"
    );
    journal.back().unwrap();
    assert_eq!(store.owner("web1").unwrap().unwrap().epoch, Epoch(2), "it was claimed back");

    journal.pausing(RunState::Running).unwrap();
    journal.fence(Epoch(2)).unwrap();
    journal.gone(Epoch(3)).unwrap();
    journal.gone(Epoch(3)).unwrap();
    assert!(journal.back().is_err(), "what is gone never comes back (I4)");
    assert_eq!(store.owner("web1").unwrap().unwrap().owner, "far");
    assert!(store.vm("web1").unwrap().is_some(), "its memory is kept until the target has all of it");
    journal.settled().unwrap();
    journal.settled().unwrap();
    assert_eq!((state(), store.vm("web1").unwrap()), (None, None));
}

#[test]
fn a_vm_started_again_has_a_later_epoch() {
    let (_dir, store) = store();
    for epoch in 1..4 {
        store.add_vm(&vm("web1", Standing::Here)).unwrap();
        assert_eq!(store.owner("web1").unwrap(), Some(record("there", epoch)));
        store.remove_vm("web1").unwrap();
    }
}

#[test]
fn a_second_agent_on_the_same_directory_is_told_so() {
    let (dir, _store) = store();
    let error = Store::open(dir.path(), "there").err().unwrap().to_string();
    assert!(error.contains("in use by another agent (pid "), "{error}");
    assert!(error.contains("--state-dir"), "{error}");
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let error = Store::open(Path::new("/proc/nowhere"), "there").err().unwrap().to_string();
    assert!(error.contains("/proc/nowhere"), "{error}");
}

#[test]
fn what_was_claimed_survives_a_kill() {
    // The child is this test binary again, told by the environment to claim, say so and be killed.
    const DIR: &str = "STORE_TEST_DIR";
    if let Ok(dir) = env::var(DIR) {
        let store = Store::open(Path::new(&dir), "there").unwrap();
        let mut arrival = store.accept(&arriving("web1", FIRST), &record("here", 4)).unwrap();
        let mut pages = MemorySet::empty([100]);
        pages.block_mut(BlockId(0)).insert(PageIndex(3));
        arrival.missing(&pages).unwrap();
        store.claim(&claim("there", FIRST, 4)).unwrap();
        std::process::abort();
    }
    let dir = tempfile::tempdir().unwrap();
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "store::tests::what_was_claimed_survives_a_kill"])
        .env(DIR, dir.path())
        .output()
        .unwrap();
    assert!(!child.status.success());
    let store = Store::open(dir.path(), "there").unwrap();
    assert_eq!(store.claim(&claim("there", FIRST, 4)).unwrap(), Claimed::Yours(Epoch(5)));
    assert_eq!(store.claim(&claim("here", FIRST, 4)).unwrap(), lost_to("there", 5));
    assert_eq!(store.missing("web1").unwrap().map(|set| set.len()), Some(1));
    assert_eq!(store.vm("web1").unwrap().unwrap().standing, Standing::Here);
}

fn report(total_ms: f64, outcome: Outcome) -> Report {
    let mut report = Report::blank("web1", "here", "there", Mode::PreCopy, outcome);
    let round = |n, pages| api::Round {
        n,
        pages,
        wire_bytes: pages * PAGE_SIZE as u64,
        ms: total_ms,
        dirtied: pages / 2,
    };
    report.rounds = vec![round(1, 8000), round(2, 100)];
    report.downtime_ms = Some(total_ms + 9.0);
    report
}

#[test]
fn what_migrations_taught_survives_and_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), "here").unwrap();
    assert_eq!((store.history("web1"), store.link_history("there")), (vec![], Known::default()));
    for n in 0..20 {
        store.learn(&report(f64::from(n), Outcome::Cancelled), false).unwrap();
    }
    drop(store);
    let store = Store::open(dir.path(), "here").unwrap();
    let history = store.history("web1");
    assert_eq!(history.len(), PastMigration::KEPT);
    assert_eq!(history.last().unwrap().moving_ms, 38.0, "the latest is last");
    // What was cut short says nothing of the way; what was limited by the user neither.
    assert_eq!(store.link_history("there"), Known::default());
    store.learn(&report(5.0, Outcome::Completed), true).unwrap();
    assert_eq!(store.link_history("there"), Known::default());
    store.learn(&report(5.0, Outcome::Completed), false).unwrap();
    store.keep_link("there", Rate(7)).unwrap();
    assert_eq!(store.link_history("there").link(), Some(Rate(7)));
    assert_eq!(store.link_history("there").switchover(), Some(Duration::from_millis(9)));
    // A VM that is gone takes it along.
    store.remove_vm("web1").unwrap();
    assert_eq!(store.history("web1"), vec![]);
}

#[test]
fn a_history_from_a_peer_is_taken_with_care() {
    let (_dir, store) = store();
    let all: Vec<PastMigration> =
        (0..30).filter_map(|n| PastMigration::of(&report(f64::from(n), Outcome::Completed))).collect();
    store.keep_history("web1", &serde_json::to_vec(&all).unwrap()).unwrap();
    assert_eq!(store.history("web1"), all[30 - PastMigration::KEPT..]);
    store.keep_history("web1", b"").unwrap();
    assert_eq!(store.history("web1").len(), PastMigration::KEPT, "nothing came");
    let mut absurd = all[0].clone();
    absurd.first.ms = 1e300;
    let mut negative = all[1].clone();
    negative.stalled_ms = -1.0;
    store.keep_history("web1", &serde_json::to_vec(&[absurd, negative, all[2].clone()]).unwrap()).unwrap();
    assert_eq!(store.history("web1"), all[2..3], "what cannot be is left out");
    let endless = format!("[{}]", " ".repeat(1 << 20));
    for bad in ["[{\"to\":7}]", "\u{0}", "{}", &endless] {
        store.keep_history("web1", bad.as_bytes()).unwrap();
        assert_eq!(store.history("web1"), vec![], "{}", &bad[..2]);
    }
}

#[test]
fn an_arrival_in_doubt_waits_for_the_shared_record() {
    let (dir, store) = store();
    let mut arrival =
        store.accept_decided_by(&arriving("web1", FIRST), &record("here", 4), "directory 1").unwrap();
    assert_eq!(store.decided_by(FIRST).unwrap().as_deref(), Some("directory 1"));
    assert_eq!(store.decided_by(MigrationId(7)).unwrap(), None);
    let ours = store.own_claim(FIRST).unwrap().unwrap();
    assert_eq!(ours, claim("there", FIRST, 4));
    store.begin_claim(&ours).unwrap();
    // As after a restart.
    drop(arrival);
    drop(store);
    let store = Store::open(dir.path(), "there").unwrap();
    let entry;
    (arrival, entry) = store.arrival("web1").unwrap().unwrap();
    assert!(entry.claiming && !entry.claimed);
    assert!(!arrival.abandon().unwrap() && arrival.abandoned(true).is_err());
    // It says that it was somebody else's.
    store.lose_claim("web1", FIRST).unwrap();
    assert!(arrival.abandon().unwrap());
    assert!(store.begin_claim(&ours).is_err(), "an arrival that was given up is not claimed any more");
}

#[test]
fn a_shared_records_decision_is_stored_and_found_again() {
    let (_dir, store) = store();
    drop(store.accept_decided_by(&arriving("web1", FIRST), &record("here", 4), "directory 1").unwrap());
    let ours = store.own_claim(FIRST).unwrap().unwrap();
    store.begin_claim(&ours).unwrap();
    assert_eq!(store.claim(&ours).unwrap(), Claimed::Yours(Epoch(5)));
    let (_, entry) = store.arrival("web1").unwrap().unwrap();
    assert!(entry.claimed && !entry.claiming);
    assert_eq!(store.own_claim(FIRST).unwrap().unwrap(), ours);
    assert_eq!(store.claim(&ours).unwrap(), Claimed::Yours(Epoch(5)));
}

#[test]
fn the_newest_epoch_seen_counts_for_one_record_only() {
    let (_dir, store) = store();
    assert_eq!(store.seen_shared("directory 1", "web1").unwrap(), None);
    store.note_shared("directory 1", "web1", &record("there", 9)).unwrap();
    assert_eq!(store.seen_shared("directory 1", "web1").unwrap(), Some(Epoch(9)));
    assert_eq!(store.seen_shared("etcd 2", "web1").unwrap(), None, "another record counts by itself");
    assert_eq!(store.owner("web1").unwrap(), Some(record("there", 9)));
}

#[test]
fn a_departure_says_which_record_decides_it() {
    let (_dir, store) = store();
    for (identity, vm) in [("", "web1"), ("etcd 2", "web2")] {
        let mut journal = store.departure(vm, FIRST, "far", "10.0.0.2:7471").decided_by(identity);
        journal.pausing(RunState::Running).unwrap();
        journal.fence(Epoch(4)).unwrap();
        assert_eq!(store.departure_of(vm).unwrap().unwrap().record, identity);
    }
}

/// Memory that fails to be written while it is told to, as a disk that is full.
#[derive(Clone, Debug, Default)]
struct Disk {
    bytes: std::sync::Arc<std::sync::Mutex<Vec<u8>>>,
    is_full: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl redb::StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let at = offset as usize;
        out.copy_from_slice(&self.bytes.lock().unwrap()[at..at + out.len()]);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.bytes.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.is_full.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let at = offset as usize;
        self.bytes.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }
}

#[test]
fn a_disk_that_was_full_is_used_again_without_a_restart() {
    let disk = Disk::default();
    let backend = disk.clone();
    let opened = Opened::by(move || Builder::new().create_with_backend(backend.clone())).unwrap();
    let store = Store::over(opened, "here").unwrap();
    let full = |full| disk.is_full.store(full, std::sync::atomic::Ordering::SeqCst);
    for name in ["web1", "web2"] {
        full(true);
        for _ in 0..3 {
            store.add_vm(&vm(name, Standing::Here)).unwrap_err();
        }
        full(false);
        store.add_vm(&vm(name, Standing::Here)).unwrap();
    }
    let names: Vec<_> = store.vms().unwrap().into_iter().map(|vm| vm.name).collect();
    assert_eq!(names, ["web1", "web2"]);
}
