//! What only etcd, and the way to it, can do to those who ask it.

use crate::{
    child::{Claimer, Pid, words},
    places::{Place, Where, claim, known},
};
use lab::{EtcdServer, OnTheWay, copy_dir};
use ownership::{Etcd, Memory};
use pki::ClientFiles;
use ports::Claimed;
use ports::shared::SharedRecord;
use std::{
    fs, net::SocketAddr, os::unix::fs::PermissionsExt, sync::atomic::Ordering::SeqCst, time::Duration,
};

const STORY: &str = "ownership in etcd";

#[test]
fn i1_a_claim_killed_at_any_request_can_be_settled() {
    let Some(place) = Place::etcd(STORY) else { return };
    let way = place.way.as_ref().unwrap();
    let direct = Where::Etcd(vec![place.etcd.as_ref().unwrap().address()]);
    let (mut won, mut lost, mut number) = (0, 0, 0);
    for passes in [OnTheWay::Lost, OnTheWay::AnswerLost] {
        for fatal in 0.. {
            number += 1;
            let offer = place.offered(&format!("vm{number}"), number);
            let pid = Pid::default();
            let killer = pid.clone();
            way.trouble(move |n| {
                if n != fatal {
                    return OnTheWay::Passes;
                }
                let pid = i32::try_from(killer.load(SeqCst)).ok().and_then(rustix::process::Pid::from_raw);
                let _ = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
                passes
            });
            let mut claimer = Claimer::start(&place.at, &place.memory("b"), &claim(&offer, "b"), &pid);
            let answer = claimer.answer();
            claimer.kill();
            way.wait_until_empty();
            way.trouble(|_| OnTheWay::Passes);
            let sure = known(|| direct.shared(&place.memory("a-direct")).claim(&claim(&offer, "a")));
            let b = known(|| place.shared("b").claim(&claim(&offer, "b")));
            match (&sure, &b) {
                (Claimed::Yours(_), Claimed::Lost(_)) => lost += 1,
                (Claimed::Lost(_), Claimed::Yours(_)) => won += 1,
                both => panic!("killed at request {fatal}: {both:?}"),
            }
            if let Some(answer) = answer {
                assert_eq!(answer, words(&b), "what it was told stays");
                break;
            }
        }
    }
    assert!(won >= 3 && lost >= 3, "won {won}, lost {lost}");
}

#[test]
fn a_lost_answer_is_found_again_and_a_slow_one_awaited() {
    let Some(place) = Place::etcd(STORY) else { return };
    let way = place.way.as_ref().unwrap();
    for (number, lost) in [(1, 0), (2, 1), (3, 2)] {
        let offer = place.offered(&format!("vm{number}"), number);
        way.trouble(move |n| if n == lost { OnTheWay::AnswerLost } else { OnTheWay::Passes });
        assert_eq!(
            known(|| place.shared("b").claim(&claim(&offer, "b"))),
            Claimed::Yours(offer.expected.next())
        );
        way.trouble(|_| OnTheWay::Late(Duration::from_millis(50)));
        assert!(matches!(place.shared("a").claim(&claim(&offer, "a")).unwrap(), Claimed::Lost(_)));
        way.trouble(|_| OnTheWay::Passes);
    }
}

#[test]
fn an_etcd_that_is_down_decides_nothing_until_it_is_back() {
    let Some(mut place) = Place::etcd(STORY) else { return };
    let offer = place.offered("vm", 1);
    let (a, b) = (place.shared("a"), place.shared("b"));
    place.etcd.as_mut().unwrap().crash().unwrap();
    for _ in 0..3 {
        assert!(a.claim(&claim(&offer, "a")).is_err() && b.claim(&claim(&offer, "b")).is_err());
        assert!(a.look("vm").is_err() && a.start("vm", "a", None, None).is_err() && a.identity().is_err());
    }
    place.etcd.as_mut().unwrap().begin().unwrap();
    assert_eq!(known(|| b.claim(&claim(&offer, "b"))), Claimed::Yours(offer.expected.next()));
    assert!(matches!(known(|| a.claim(&claim(&offer, "a"))), Claimed::Lost(_)));
}

#[test]
fn an_end_point_that_is_dead_is_passed_over() {
    let Some(place) = Place::etcd(STORY) else { return };
    let offer = place.offered("vm", 1);
    // Nobody listens there.
    let dead: SocketAddr = ([127, 0, 0, 1], 1).into();
    let ends = Where::Etcd(vec![dead, place.etcd.as_ref().unwrap().address()]);
    let b = ends.shared(&place.memory("b2"));
    assert_eq!(b.claim(&claim(&offer, "b")).unwrap(), Claimed::Yours(offer.expected.next()));
}

#[test]
fn an_etcd_that_was_set_back_is_noticed_after_a_restart_too() {
    let Some(mut place) = Place::etcd(STORY) else { return };
    let (a, b) = (place.shared("a"), place.shared("b"));
    a.start("vm", "a", None, None).unwrap();
    b.identity().unwrap();
    let server = place.etcd.as_mut().unwrap();
    server.crash().unwrap();
    let backup = place.dir.path().join("backup");
    copy_dir(server.data(), &backup).unwrap();
    server.begin().unwrap();
    let offer = place.offered("vm", 1);
    // The source's host has seen more; the target's has not, and lacks the offer.
    let server = place.etcd.as_mut().unwrap();
    server.crash().unwrap();
    fs::remove_dir_all(server.data()).unwrap();
    copy_dir(&backup, server.data()).unwrap();
    server.begin().unwrap();
    let remembers = place.at.shared(&place.memory("a"));
    for record in [&remembers, &place.shared("a")] {
        let error = record.claim(&claim(&offer, "a")).unwrap_err().to_string();
        assert!(error.contains("backwards") && error.contains("old backup"), "{error}");
        assert!(record.look("vm").is_err() && record.start("vm", "a", None, None).is_err());
    }
    let error = b.claim(&claim(&offer, "b")).unwrap_err().to_string();
    assert!(error.contains("old backup"), "{error}");
}

#[test]
fn another_cluster_in_its_place_is_noticed() {
    let Some(mut place) = Place::etcd(STORY) else { return };
    let a = place.shared("a");
    let identity = a.identity().unwrap();
    assert!(identity.starts_with("etcd "), "{identity}");
    // The same address, and somebody else behind it.
    let server = place.etcd.as_mut().unwrap();
    server.crash().unwrap();
    fs::remove_dir_all(server.data()).unwrap();
    server.begin().unwrap();
    for record in [a, place.shared("a")] {
        let error = record.identity().unwrap_err().to_string();
        assert!(error.contains("not the one that it was") || error.contains("backwards"), "{error}");
    }
}

#[test]
fn i1_etcd_is_asked_by_tls_and_only_by_whom_it_knows() {
    if let Some(missing) = EtcdServer::missing() {
        return lab::skip(STORY, &missing);
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let loopback = ["127.0.0.1".to_owned()];
    for (ca, host) in [("ours", "etcd"), ("ours", "a"), ("theirs", "b")] {
        if !at(ca).exists() {
            pki::init(&at(ca), ca).unwrap();
        }
        pki::issue(&at(ca), host, &loopback, 30, &at(host)).unwrap();
    }
    let server = EtcdServer::start_with(&at("data"), Some(&at("etcd"))).unwrap();
    let files = |host: &str| ClientFiles {
        ca: at(host).join("ca.crt"),
        client: Some((at(host).join("host.crt"), at(host).join("host.key"))),
    };
    let ask = |end: String, tls: Option<&ClientFiles>| {
        let memory = Memory::at(&at("memory.json")).unwrap();
        Etcd::new(&[end], tls, memory).and_then(|etcd| etcd.start("vm", "a", None, None))
    };
    let secure = format!("https://{}", server.address());
    assert!(matches!(ask(secure.clone(), Some(&files("a"))).unwrap(), Claimed::Yours(_)));
    let nobody = ClientFiles { client: None, ..files("a") };
    for (what, tls) in [("another authority", files("b")), ("no certificate", nobody)] {
        let error = ask(secure.clone(), Some(&tls)).expect_err(what).to_string();
        assert!(error.contains("etcd does not answer"), "{what}: {error}");
    }
    // In plaintext it is not asked by mistake, and a key that others may read is none.
    assert!(ask(format!("http://{}", server.address()), Some(&files("a"))).is_err());
    fs::set_permissions(at("a").join("host.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let error = ask(secure, Some(&files("a"))).unwrap_err().to_string();
    assert!(error.contains("chmod 600"), "{error}");
}
