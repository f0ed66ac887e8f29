//! What only a shared directory can do to those who ask it.

use crate::{
    child::{Claimer, Pid, words},
    places::{Place, Where, claim, known},
};
use lab::{Call, FaultyDir, Trouble, copy_dir};
use ports::Claimed;
use std::{
    fs,
    sync::{
        Arc, Barrier,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};
use units::MigrationId;

const STORY: &str = "ownership in a directory through FUSE";

fn kill(pid: &Pid) {
    let pid = i32::try_from(pid.load(SeqCst)).ok().and_then(rustix::process::Pid::from_raw);
    // It may have ended by itself.
    let _ = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
}

/// The claimer is killed in the middle of each of its calls in turn, before that call is done or after; then
/// the other side asks.
#[test]
fn i1_a_claim_killed_at_any_call_can_be_settled() {
    let Some(place) = Place::view(STORY) else { return };
    let view = place.view.as_ref().unwrap();
    let shared = Where::Directory(place.dir.path().join("shared"));
    let (mut won, mut lost, mut number) = (0, 0, 0);
    for done in [Trouble::NotDone, Trouble::None] {
        for fatal in 0.. {
            number += 1;
            let offer = place.offered(&format!("vm{number}"), number);
            let pid = Pid::default();
            let killer = pid.clone();
            view.trouble(move |n, _| {
                if n == fatal {
                    kill(&killer);
                    return done;
                }
                Trouble::None
            });
            let mut claimer = Claimer::start(&place.at, &place.memory("b"), &claim(&offer, "b"), &pid);
            let answer = claimer.answer();
            claimer.kill();
            view.well();
            let a = shared.shared(&place.memory("a-outside"));
            let sure = known(|| a.claim(&claim(&offer, "a")));
            let b = known(|| place.shared("b").claim(&claim(&offer, "b")));
            match (&sure, &b) {
                (Claimed::Yours(_), Claimed::Lost(record)) => {
                    lost += 1;
                    assert_eq!(record.owner, "a");
                }
                (Claimed::Lost(record), Claimed::Yours(_)) => {
                    won += 1;
                    assert_eq!(record.owner, "b");
                }
                both => panic!("killed at call {fatal}: {both:?}"),
            }
            if let Some(answer) = answer {
                assert_eq!(answer, words(&b), "what it was told stays");
                break;
            }
        }
    }
    assert!(won > 2 && lost > 4, "killed before the link {lost} times, after it {won} times");
}

/// Both sides see the directory through views of their own that lose answers, show old things, and are slow
/// or away, at random.
#[test]
fn i1_two_hosts_whose_datastore_misbehaves_agree_on_one_owner() {
    let Some(place) = Place::view(STORY) else { return };
    let dir = place.dir.path();
    let Ok(other) = FaultyDir::mount(&dir.join("view-a"), &dir.join("shared")) else { return };
    let views = [
        ("b", place.view.as_ref().unwrap(), place.at.clone()),
        ("a", &other, Where::Directory(dir.join("view-a"))),
    ];
    for round in 0..25_u64 {
        let offer = place.offered(&format!("vm{round}"), u128::from(round) + 1);
        for (i, (_, view, _)) in views.iter().enumerate() {
            view.remember();
            let mut random = Random(round * 2 + i as u64 + 1);
            view.trouble(move |_, _| match random.next() % 10 {
                0 => Trouble::LostReply,
                1 => Trouble::Repeated,
                2 => Trouble::NotDone,
                3 => Trouble::Blind,
                4 => Trouble::Late(Duration::from_millis(1)),
                _ => Trouble::None,
            });
        }
        let start = Barrier::new(6);
        let answers: Vec<(&str, String)> = thread::scope(|threads| {
            let racers: Vec<_> = (0..6)
                .map(|i| {
                    let ((host, _, at), start, offer) = (&views[i % 2], &start, &offer);
                    let record = at.shared(&dir.join(format!("{host}{i}.json")));
                    threads.spawn(move || {
                        start.wait();
                        (*host, words(&known(|| record.claim(&claim(offer, host)))))
                    })
                })
                .collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        views.iter().for_each(|(_, view, _)| view.well());
        let epoch = offer.expected.next();
        let truth = known(|| place.shared("b").claim(&claim(&offer, "b")));
        let owner = if matches!(truth, Claimed::Yours(_)) { "b" } else { "a" };
        for (host, answer) in answers {
            let right = if host == owner { format!("yours {epoch}") } else { format!("{owner} {epoch}") };
            assert_eq!(answer, right, "round {round}, {host}");
        }
    }
}

/// Deterministic, so that a round can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
}

#[test]
fn an_answer_that_was_lost_after_the_link_is_found_again() {
    let Some(place) = Place::view(STORY) else { return };
    let view = place.view.as_ref().unwrap();
    for (number, trouble) in [(1, Trouble::LostReply), (2, Trouble::Repeated)] {
        let offer = place.offered(&format!("vm{number}"), number);
        let b = place.shared("b");
        let hit = Arc::new(AtomicU32::new(0));
        let counted = hit.clone();
        view.trouble(move |_, call| {
            if call == Call::Link && counted.fetch_add(1, SeqCst) == 0 { trouble } else { Trouble::None }
        });
        let first = b.claim(&claim(&offer, "b"));
        assert!(hit.load(SeqCst) > 0);
        // NFS tells who asks a second time that the name is taken: by ourselves.
        assert_eq!(first.is_ok(), trouble == Trouble::Repeated, "{first:?}");
        assert_eq!(b.claim(&claim(&offer, "b")).unwrap(), Claimed::Yours(offer.expected.next()));
    }
}

#[test]
fn what_cannot_be_seen_yet_is_never_taken_for_what_is_not_there() {
    let Some(place) = Place::view(STORY) else { return };
    let view = place.view.as_ref().unwrap();
    let outside = Where::Directory(place.dir.path().join("shared"));
    let a = outside.shared(&place.memory("a-outside"));
    known(|| a.start("vm", "a", None, None));
    view.remember();
    // Everything from here on is not seen by b.
    let offer = place.offered("vm", 1);
    assert_eq!(known(|| a.claim(&claim(&offer, "a"))), Claimed::Yours(offer.expected.next()));
    view.trouble(|_, _| Trouble::Blind);
    let b = place.shared("b");
    let blind = b.claim(&claim(&offer, "b"));
    assert!(blind.is_err(), "{blind:?}");
    // One that would start it: what it sees is free, and the server knows better.
    view.trouble(|_, call| if call == Call::List { Trouble::Blind } else { Trouble::None });
    let started = known(|| b.start("vm", "b", None, None));
    assert!(matches!(&started, Claimed::Lost(record) if record.owner == "a"), "{started:?}");
    view.well();
    assert!(matches!(b.claim(&claim(&offer, "b")).unwrap(), Claimed::Lost(record) if record.owner == "a"));
}

#[test]
fn a_directory_that_is_away_decides_nothing_until_it_is_back() {
    let Some(place) = Place::view(STORY) else { return };
    let view = place.view.as_ref().unwrap();
    let offer = place.offered("vm", 1);
    let (a, b) = (place.shared("a"), place.shared("b"));
    view.trouble(|_, _| Trouble::NotDone);
    for _ in 0..3 {
        assert!(a.claim(&claim(&offer, "a")).is_err() && b.claim(&claim(&offer, "b")).is_err());
        assert!(a.start("vm", "a", None, None).is_err() && a.look("vm").is_err() && a.identity().is_err());
    }
    view.trouble(|_, _| Trouble::Late(Duration::from_millis(20)));
    assert_eq!(
        b.claim(&claim(&offer, "b")).unwrap(),
        Claimed::Yours(offer.expected.next()),
        "slow is not away"
    );
    view.well();
    assert!(matches!(a.claim(&claim(&offer, "a")).unwrap(), Claimed::Lost(_)));
}

#[test]
fn a_directory_that_was_set_back_is_noticed() {
    let place = Place::directory();
    let path = place.dir.path().join("shared");
    let backup = |name: &str| {
        let to = place.dir.path().join(name);
        copy_dir(&path, &to).unwrap();
        to
    };
    let restore = |from: &std::path::Path| {
        fs::remove_dir_all(&path).unwrap();
        copy_dir(from, &path).unwrap();
    };
    let (a, b) = (place.shared("a"), place.shared("b"));
    a.identity().unwrap();
    let empty = backup("empty");
    a.start("vm", "a", None, None).unwrap();
    let before = backup("before");
    let offer = place.offered("vm", 1);
    let after = backup("after");
    for old in [&empty, &before] {
        restore(old);
        for (record, host) in [(&a, "a"), (&b, "b")] {
            let error = record.claim(&claim(&offer, host)).unwrap_err().to_string();
            assert!(error.contains("old backup") && error.contains("shared"), "{error}");
        }
        let again = ports::Offer { migration: MigrationId(2), ..offer.clone() };
        let error = a.offer(&again).unwrap_err().to_string();
        assert!(error.contains("old backup"), "{error}");
        let error = a.start("vm", "a", None, Some(offer.expected)).unwrap_err().to_string();
        assert!(error.contains("old backup"), "{error}");
    }
    // Emptied, or not mounted: whoever has met it before does not make it another one.
    fs::remove_dir_all(&path).unwrap();
    fs::create_dir(&path).unwrap();
    for error in [a.identity().map(drop), a.start("vm", "a", None, None).map(drop)] {
        assert!(error.unwrap_err().to_string().contains("mounted"));
    }
    // Another one in its place.
    place.at.shared(&place.memory("stranger")).identity().unwrap();
    let error = a.identity().unwrap_err().to_string();
    assert!(error.contains("not the one that it was"), "{error}");
    restore(&after);
    assert_eq!(b.claim(&claim(&offer, "b")).unwrap(), Claimed::Yours(offer.expected.next()));
}

#[test]
fn files_that_hold_no_record_are_told_of_and_name_no_owner() {
    let place = Place::directory();
    let dir = place.dir.path().join("shared/vms/vm");
    let offer = place.offered("vm", 1);
    let next = dir.join(ownership::record::epoch_name(offer.expected.0 + 1));
    let now = fs::read(dir.join(ownership::record::epoch_name(offer.expected.0))).unwrap();
    let other_vm = {
        place.offered("other", 2);
        fs::read(place.dir.path().join("shared/vms/other").join(ownership::record::epoch_name(1))).unwrap()
    };
    for (bad, what) in [
        (vec![], "empty"),
        (now[..now.len() / 2].to_vec(), "torn"),
        (vec![0; 4096], "zeros"),
        (b"owner = a\n".to_vec(), "garbage"),
        (now, "another epoch's"),
        (other_vm, "another VM's"),
    ] {
        fs::write(&next, &bad).unwrap();
        for host in ["a", "b"] {
            let error = place.shared(host).claim(&claim(&offer, host)).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::InvalidData, "{what}: {error}");
            assert!(error.to_string().contains("epoch-"), "it names the file: {error}");
        }
        assert!(place.shared("a").look("vm").is_err(), "{what}");
    }
    fs::remove_file(&next).unwrap();
    // What others keep there does not matter.
    fs::write(dir.join("README"), "hello").unwrap();
    fs::create_dir(dir.join("lost+found")).unwrap();
    assert_eq!(place.shared("b").claim(&claim(&offer, "b")).unwrap(), Claimed::Yours(offer.expected.next()));
}
