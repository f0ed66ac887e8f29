//! The promises.

use crate::{
    child::{Claimer, Pid, words},
    places::{Place, claim, known},
};
use ownership::Patient;
use ports::shared::{NOBODY, SharedRecord};
use ports::{Claimed, Ownership, OwnershipRecord};
use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Barrier, Condvar, Mutex},
    thread,
    time::Duration,
};
use units::{Epoch, MigrationId};

/// How often a race is run. Few, because each costs several `fsync`, and etcd's are slow here.
const RACES: u32 = 8;

/// One test for each promise, so that one that is broken is known by its name.
macro_rules! promises {
    ($place:expr, $($name:ident)*) => {
        $(#[test]
        fn $name() {
            if let Some(mut place) = $place {
                suite::$name(&mut place);
            }
        })*
    };
}

macro_rules! nothing_more {
    ($place:expr) => {};
}

/// For records that all hosts share.
macro_rules! what_is_shared {
    ($place:expr) => {
        suite::promises!($place,
            i1_of_many_processes_exactly_one_side_wins
            i1_of_hosts_that_start_the_same_vm_one_may
            a_vm_that_ended_is_free_and_a_fenced_hosts_can_be_taken
            a_vm_that_goes_from_host_to_host_has_one_owner_at_each_epoch
            a_record_behind_what_is_known_is_not_believed
        );

        #[test]
        fn hosts_that_ask_the_same_record_know_that_they_do() {
            if let (Some(place), Some(other)) = ($place, $place) {
                suite::hosts_that_ask_the_same_record_know_that_they_do(&place, &other);
            }
        }
    };
}
pub(crate) use {nothing_more, promises, what_is_shared};

fn lost_to(owner: &str, epoch: u64, migration: u128) -> Claimed {
    let migration = Some(MigrationId(migration));
    Claimed::Lost(OwnershipRecord { owner: owner.into(), epoch: Epoch(epoch), migration })
}

pub(crate) fn the_same_claim_asked_again_gets_the_same_answer(place: &Place) {
    let (a, b) = (place.record("a"), place.record("b"));
    for (number, first) in [(1, "b"), (2, "a")] {
        let offer = place.offered(&format!("vm{number}"), number);
        let next = offer.expected.next();
        for _ in 0..3 {
            let (yours, others) = if first == "b" { (&b, &a) } else { (&a, &b) };
            let second = if first == "b" { "a" } else { "b" };
            assert_eq!(yours.claim(&claim(&offer, first)).unwrap(), Claimed::Yours(next));
            assert_eq!(others.claim(&claim(&offer, second)).unwrap(), lost_to(first, next.0, number));
        }
    }
}

pub(crate) fn i1_of_many_threads_exactly_one_side_wins(place: &Place) {
    let records = [("a", place.record("a")), ("b", place.record("b"))];
    for race in 0..RACES {
        let offer = place.offered(&format!("vm{race}"), u128::from(race) + 1);
        let start = Barrier::new(8);
        let answers: Vec<(&str, Claimed)> = thread::scope(|threads| {
            let racers: Vec<_> = (0..8)
                .map(|i| {
                    let ((host, record), start, offer) = (&records[i % 2], &start, &offer);
                    threads.spawn(move || {
                        start.wait();
                        (*host, known(|| record.claim(&claim(offer, host))))
                    })
                })
                .collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        one_side_won(&answers, offer.expected.next());
    }
}

/// All who are of one mind about it.
fn one_side_won(answers: &[(&str, Claimed)], epoch: Epoch) {
    let winners: BTreeSet<&str> = answers
        .iter()
        .map(|(host, answer)| match answer {
            Claimed::Yours(at) => {
                assert_eq!(*at, epoch);
                *host
            }
            Claimed::Lost(record) => {
                assert_eq!(record.epoch, epoch);
                assert_ne!(record.owner, *host, "who lost is not the owner");
                &record.owner
            }
        })
        .collect();
    assert_eq!(winners.len(), 1, "{answers:?}");
}

pub(crate) fn a_stale_epoch_and_a_claim_that_nobody_offered_win_nothing(place: &Place) {
    let offer = place.offered("vm", 1);
    let (a, b) = (place.record("a"), place.record("b"));
    let wins = |record: &Arc<dyn Ownership>, claim| matches!(record.claim(&claim), Ok(Claimed::Yours(_)));
    for epoch in [offer.expected.0 - 1, offer.expected.0 + 1, offer.expected.0 + 7] {
        let stale = ports::Offer { expected: Epoch(epoch), ..offer.clone() };
        assert!(!wins(&b, claim(&stale, "b")) && !wins(&a, claim(&stale, "a")), "epoch {epoch}");
    }
    let other = ports::Offer { migration: MigrationId(99), ..offer.clone() };
    assert!(!wins(&b, claim(&other, "b")), "a migration that nobody offered");
    assert!(!wins(&b, claim(&offer, "c")), "a host that it was not offered to");
    let elsewhere = ports::Offer { vm: "other".into(), ..offer.clone() };
    assert!(!wins(&b, claim(&elsewhere, "b")), "another VM");
    // All that has changed nothing.
    assert_eq!(known(|| b.claim(&claim(&offer, "b"))), Claimed::Yours(offer.expected.next()));
    // And now the old epoch is stale, whoever comes with whatever.
    assert!(!wins(&a, claim(&offer, "a")) && !wins(&a, claim(&other, "a")));
}

pub(crate) fn a_claimer_that_is_killed_after_its_success_has_won(place: &mut Place) {
    let offer = place.offered("vm", 1);
    place.close();
    let mut claimer = Claimer::start(&place.at, &place.memory("b"), &claim(&offer, "b"), &Pid::default());
    let yours = words(&Claimed::Yours(offer.expected.next()));
    assert_eq!(claimer.answer(), Some(yours));
    claimer.kill();
    place.open();
    assert_eq!(known(|| place.record("a").claim(&claim(&offer, "a"))), lost_to("b", offer.expected.0 + 1, 1));
    assert_eq!(known(|| place.record("b").claim(&claim(&offer, "b"))), Claimed::Yours(offer.expected.next()));
}

pub(crate) fn i1_of_many_processes_exactly_one_side_wins(place: &Place) {
    for race in 0..2 {
        let offer = place.offered(&format!("vm{race}"), u128::from(race as u32) + 1);
        let hosts = ["a", "b", "a", "b", "a", "b"];
        let mut claimers: Vec<Claimer> = (hosts.iter().enumerate())
            .map(|(i, host)| {
                let memory = place.memory(&format!("{host}{i}"));
                Claimer::start(&place.at, &memory, &claim(&offer, host), &Pid::default())
            })
            .collect();
        let next = offer.expected.next();
        let owner = match known(|| place.record("a").claim(&claim(&offer, "a"))) {
            Claimed::Yours(_) => "a",
            Claimed::Lost(_) => "b",
        };
        for (claimer, host) in claimers.iter_mut().zip(hosts) {
            let expected = if host == owner { format!("yours {next}") } else { format!("{owner} {next}") };
            assert_eq!(claimer.answer(), Some(expected), "{host}");
        }
    }
}

pub(crate) fn i1_of_hosts_that_start_the_same_vm_one_may(place: &Place) {
    let hosts = ["a", "b", "c", "d"];
    let records = hosts.map(|host| (host, place.shared(host)));
    for race in 0..3 {
        let (vm, start) = (format!("vm{race}"), Barrier::new(hosts.len()));
        let answers: Vec<(&str, Claimed)> = thread::scope(|threads| {
            let racers = records.each_ref().map(|(host, record)| {
                let (vm, start) = (&vm, &start);
                threads.spawn(move || {
                    start.wait();
                    (*host, known(|| record.start(vm, host, None, None)))
                })
            });
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        one_side_won(&answers, Epoch(1));
        let winner = answers.iter().find(|(_, answer)| matches!(answer, Claimed::Yours(_))).unwrap().0;
        assert_eq!(records[0].1.look(&vm).unwrap().unwrap().owner, winner);
    }
}

pub(crate) fn a_vm_that_ended_is_free_and_a_fenced_hosts_can_be_taken(place: &Place) {
    let (a, b) = (place.shared("a"), place.shared("b"));
    assert_eq!(b.look("vm").unwrap(), None);
    assert_eq!(a.start("vm", "a", None, None).unwrap(), Claimed::Yours(Epoch(1)));
    let of_a = OwnershipRecord { owner: "a".into(), epoch: Epoch(1), migration: None };
    assert_eq!(b.look("vm").unwrap(), Some(of_a.clone()));
    assert_eq!(b.start("vm", "b", None, None).unwrap(), Claimed::Lost(of_a.clone()));
    assert_eq!(b.start("vm", "b", Some("c"), None).unwrap(), Claimed::Lost(of_a), "another host was fenced");
    // What does not belong to it is not its to end.
    b.end("vm", "b", None).unwrap();
    assert_eq!(b.look("vm").unwrap().unwrap().owner, "a");
    a.end("vm", "a", Some(Epoch(1))).unwrap();
    assert_eq!(b.look("vm").unwrap().unwrap().owner, NOBODY);
    assert_eq!(b.start("vm", "b", None, None).unwrap(), Claimed::Yours(Epoch(3)));
    assert_eq!(a.start("vm", "a", Some("b"), Some(Epoch(1))).unwrap(), Claimed::Yours(Epoch(4)));
    // Started again by its owner, as after a reboot.
    assert_eq!(a.start("vm", "a", None, Some(Epoch(4))).unwrap(), Claimed::Yours(Epoch(5)));
    for bad in ["", "../vm", "a/b", "a\nb", ".."] {
        assert!(a.start(bad, "a", None, None).is_err() && a.look(bad).is_err(), "{bad:?}");
        assert!(a.start("vm2", bad, None, None).is_err(), "{bad:?}");
    }
}

pub(crate) fn a_vm_that_goes_from_host_to_host_has_one_owner_at_each_epoch(place: &Place) {
    let records = ["a", "b"].map(|host| (host, place.shared(host)));
    let mut offer = place.offered("vm", 1);
    let mut asked = vec![];
    for n in 1..=12_u64 {
        let (winner, loser) = if n % 3 == 0 { (0, 1) } else { (1, 0) };
        // By its own name, whichever role it has: the source wins each third time.
        let name = |i: usize| if i == 0 { offer.from.clone() } else { offer.to.clone() };
        let record = |host: &str| &records.iter().find(|(name, _)| *name == host).unwrap().1;
        let (winner, loser) = (name(winner), name(loser));
        assert_eq!(
            record(&winner).claim(&claim(&offer, &winner)).unwrap(),
            Claimed::Yours(offer.expected.next())
        );
        asked.push((claim(&offer, &loser), winner.clone()));
        let other = if winner == "a" { "b" } else { "a" };
        offer = ports::Offer {
            vm: "vm".into(),
            migration: MigrationId(u128::from(n) + 1),
            expected: offer.expected.next(),
            from: winner,
            to: other.into(),
        };
        known(|| record(&offer.from).offer(&offer));
    }
    // Whoever lost long ago and asks only now has lost.
    for (claim, _) in asked {
        let record = &records.iter().find(|(name, _)| *name == claim.claimer).unwrap().1;
        let answer = record.claim(&claim);
        assert!(matches!(answer, Ok(Claimed::Lost(_))), "{claim:?}: {answer:?}");
    }
    let now = records[0].1.look("vm").unwrap().unwrap();
    assert_eq!(
        (now.owner, now.epoch),
        (offer.from.clone(), offer.expected),
        "the open offer can still be taken"
    );
    let target = &records.iter().find(|(name, _)| *name == offer.to).unwrap().1;
    assert_eq!(target.claim(&claim(&offer, &offer.to)).unwrap(), Claimed::Yours(offer.expected.next()));
    if let crate::places::Where::Directory(path) = &place.at {
        let files = std::fs::read_dir(path.join("vms/vm")).unwrap().count();
        assert!(files < 20, "{files} files are left of 13 migrations");
    }
}

pub(crate) fn a_record_behind_what_is_known_is_not_believed(place: &Place) {
    let a = place.shared("a");
    a.start("vm", "a", None, None).unwrap();
    for known in [Some(Epoch(7)), Some(Epoch(2))] {
        for error in [a.start("vm", "a", None, known).map(drop), a.end("vm", "a", known)] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains("old backup") && error.contains("epoch 1"), "{error}");
        }
    }
    let error = a.start("never-heard-of", "a", None, Some(Epoch(1))).unwrap_err().to_string();
    assert!(error.contains("old backup"), "{error}");
}

pub(crate) fn hosts_that_ask_the_same_record_know_that_they_do(place: &Place, other: &Place) {
    let start = Barrier::new(4);
    let identities: BTreeSet<String> = thread::scope(|threads| {
        let racers = ["a", "b", "c", "d"].map(|host| {
            let (record, start) = (place.shared(host), &start);
            threads.spawn(move || {
                start.wait();
                known(|| record.identity())
            })
        });
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    assert_eq!(identities.len(), 1, "{identities:?}");
    let other = other.shared("e").identity().unwrap();
    assert!(!identities.contains(&other), "made alike, and not the same: {other}");
}

/// A record that answers when it is let.
struct Stuck {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Ownership for Stuck {
    fn identity(&self) -> io::Result<String> {
        Ok("stuck".into())
    }
    fn offer(&self, _: &ports::Offer) -> io::Result<()> {
        Err(io::Error::other("not asked here"))
    }
    fn claim(&self, claim: &ports::Claim) -> io::Result<Claimed> {
        let open = self.open.lock().unwrap();
        drop(self.opened.wait_while(open, |open| !*open).unwrap());
        Ok(Claimed::Yours(claim.expected.next()))
    }
}

impl SharedRecord for Stuck {
    fn words(&self) -> String {
        "the stuck record".into()
    }
    fn look(&self, _: &str) -> io::Result<Option<OwnershipRecord>> {
        Ok(None)
    }
    fn start(&self, _: &str, _: &str, _: Option<&str>, _: Option<Epoch>) -> io::Result<Claimed> {
        Err(io::Error::other("not asked here"))
    }
    fn end(&self, _: &str, _: &str, _: Option<Epoch>) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_silent_record_is_an_error_in_time_and_holds_up_nobody() {
    let stuck = Arc::new(Stuck { open: Mutex::default(), opened: Condvar::new() });
    let patient = Patient::new(stuck.clone()).waiting(Duration::from_millis(50));
    let ask = |vm: &str| {
        let claim = ports::Claim {
            vm: vm.into(),
            migration: MigrationId(1),
            expected: Epoch(1),
            claimer: "a".into(),
        };
        patient.claim(&claim)
    };
    for _ in 0..3 {
        let error = ask("vm").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("the stuck record"), "{error}");
    }
    assert_eq!(patient.look("vm").unwrap(), None, "other questions are answered");
    *stuck.open.lock().unwrap() = true;
    stuck.opened.notify_all();
    assert_eq!(known(|| ask("vm")), Claimed::Yours(Epoch(2)));
}
