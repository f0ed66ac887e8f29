//! What an agent does at its end, and what the next one makes of it.

mod fake;

use agent::store::{Origin, Process, Standing, Store, VmRecord};
use fake::{Host, until};
use ports::{Claimed, OwnershipRecord, RunState, SourceJournal};
use serde_json::{Value, json};
use std::sync::atomic::Ordering::SeqCst;
use units::{Epoch, MigrationId};

const MIGRATION: MigrationId = MigrationId(0xabc);

fn show(host: &Host, vm: &str) -> Value {
    host.json("GET", &format!("/v1/vms/{vm}"), Value::Null).1
}

fn pid(vm: &Value) -> u32 {
    vm["pid"].as_u64().unwrap() as u32
}

/// A host whose agent died in the middle of migrating `web1`, after what `journal` wrote.
fn died(journal: impl FnOnce(&mut dyn SourceJournal)) -> (Host, u32) {
    let mut host = Host::new();
    let pid = pid(&host.run("web1"));
    host.stop();
    host.vms.paused.lock().unwrap().insert(pid);
    let store = open(&host);
    journal(&mut store.departure("web1", MIGRATION, "far", "127.0.0.1:1"));
    (host, pid)
}

fn open(host: &Host) -> Store {
    Store::open(&host.config().state_dir, "hosta").unwrap()
}

fn fenced(journal: &mut dyn SourceJournal) {
    journal.pausing(RunState::Running).unwrap();
    journal.fence(Epoch(1)).unwrap();
}

#[test]
fn ending_the_agent_rolls_back_and_leaves_every_vm_alone() {
    let mut host = Host::new();
    let before = host.run("web1");
    host.migrate("web1", "slow");
    host.stop();
    assert!(!host.socket().exists());
    host.start().unwrap();
    assert_eq!(show(&host, "web1"), before, "found again, and runs");
    let end = host.follow("web1").pop().unwrap();
    assert_eq!((&end["event"], &end["outcome"]), (&json!("done"), &json!("cancelled")));
}

#[test]
fn a_post_copy_does_not_hold_the_end_up() {
    let mut host = Host::new();
    host.run("web1");
    host.migrate("web1", "postcopy");
    until("post-copy", || show(&host, "web1")["migration"]["phase"] == "post-copy");
    host.stop();
}

#[test]
fn a_vm_whose_qemu_ended_is_reported_and_can_be_forgotten() {
    let mut host = Host::new();
    let pid = pid(&host.run("web1"));
    host.stop();
    host.vms.kill(pid);
    host.start().unwrap();
    let vm = show(&host, "web1");
    assert_eq!(vm["state"], "gone");
    assert!(vm["note"].as_str().unwrap().contains("whimbrel stop web1"), "{vm}");
    let (status, answer) = host.json("POST", "/v1/vms/web1/migrate", json!({ "to": "good" }));
    assert_eq!(status, 409, "{answer}");
    assert_eq!(host.ask("DELETE", "/v1/vms/web1", "").0, 204);
}

#[test]
fn a_start_that_was_interrupted_is_swept_away() {
    let mut host = Host::new();
    host.stop();
    let vm = VmRecord {
        name: "half".into(),
        recipe: Value::Null,
        process: None,
        qmp: "".into(),
        belongings: Value::Null,
        origin: Origin::Run,
        standing: Standing::Here,
    };
    assert!(open(&host).add_vm(&vm).unwrap());
    host.start().unwrap();
    assert_eq!(host.json("GET", "/v1/vms", Value::Null).1, json!([]));
    assert_eq!(*host.vms.swept.lock().unwrap(), ["half"]);
}

#[test]
fn a_guest_that_was_paused_before_the_promise_runs_on_at_once() {
    let (mut host, pid) = died(|journal| journal.pausing(RunState::Running).unwrap());
    host.start().unwrap();
    assert!(!host.vms.paused.lock().unwrap().contains(&pid));
    assert_eq!(show(&host, "web1")["state"], "running");
    let end = host.follow("web1").pop().unwrap();
    assert_eq!((&end["outcome"], &end["error"]["vm_runs_on"]), (&json!("failed"), &json!("hosta")));
    assert_eq!(*host.script.asked.lock().unwrap(), 0, "nobody else had a say in it");
}

#[test]
fn i9_a_guest_that_was_paused_stays_paused_after_a_crash() {
    let paused: [fn(&mut dyn SourceJournal); 2] = [
        |journal| journal.pausing(RunState::Paused).unwrap(),
        // Paused by somebody in the instant before our stop, which was found out after it.
        |journal| {
            journal.pausing(RunState::Running).unwrap();
            journal.pausing(RunState::Paused).unwrap();
        },
    ];
    for journal in paused {
        let (mut host, pid) = died(|departure| journal(departure));
        host.start().unwrap();
        assert!(host.vms.paused.lock().unwrap().contains(&pid));
        assert_eq!(show(&host, "web1")["state"], "paused");
        let end = host.follow("web1").pop().unwrap();
        assert_eq!(end["fate"], json!({ "vm": "on", "host": "hosta", "state": "paused" }));
    }
    // The same after the promise, once the record has said that it is ours.
    let (mut host, pid) = died(|journal| {
        journal.pausing(RunState::Paused).unwrap();
        journal.fence(Epoch(1)).unwrap();
    });
    *host.script.answer.lock().unwrap() = Some(Claimed::Yours(Epoch(2)));
    host.start().unwrap();
    until("the record's word", || show(&host, "web1")["state"] == "paused");
    assert!(host.vms.paused.lock().unwrap().contains(&pid));
}

#[test]
fn after_the_promise_only_the_record_brings_the_guest_back() {
    let (mut host, pid) = died(fenced);
    host.start().unwrap();
    until("asked", || *host.script.asked.lock().unwrap() >= 2);
    assert!(host.vms.paused.lock().unwrap().contains(&pid), "no answer is not an answer (I1)");
    assert_eq!(show(&host, "web1")["state"], "in-doubt");
    assert_eq!(host.follow("web1").pop().unwrap()["outcome"], "in-doubt");
    for (method, path) in [("DELETE", "/v1/vms/web1"), ("POST", "/v1/vms/web1/migrate")] {
        assert_eq!(host.ask(method, path, "{\"to\":\"good\"}").0, 409, "{path}");
    }
    *host.script.answer.lock().unwrap() = Some(Claimed::Yours(Epoch(2)));
    until("running", || show(&host, "web1")["state"] == "running");
    assert!(!host.vms.paused.lock().unwrap().contains(&pid));
    assert_eq!(show(&host, "web1")["epoch"], 2);
}

#[test]
fn a_guest_that_the_target_claimed_never_runs_here_again() {
    let (mut host, pid) = died(fenced);
    let record = OwnershipRecord { owner: "far".into(), epoch: Epoch(2), migration: Some(MIGRATION) };
    *host.script.answer.lock().unwrap() = Some(Claimed::Lost(record));
    host.start().unwrap();
    until("served", || !host.script.served_gone.lock().unwrap().is_empty());
    let vm = show(&host, "web1");
    assert_eq!((&vm["state"], &vm["owner"], &vm["epoch"]), (&json!("left"), &json!("far"), &json!(2)));
    assert!(host.vms.paused.lock().unwrap().contains(&pid), "kept as it was, for the target");
    assert_eq!(host.ask("DELETE", "/v1/vms/web1", "").0, 409);
    assert_eq!(host.json("POST", "/v1/vms/web1/resolve", json!({ "here_fenced": "far" })).0, 409);

    // And at the next start too.
    host.stop();
    host.start().unwrap();
    until("served again", || host.script.served_gone.lock().unwrap().len() == 2);
    host.stop();
    open(&host).departure("web1", MIGRATION, "far", "x:1").settled().unwrap();
    host.start().unwrap();
    let (status, answer) = host.json("GET", "/v1/vms/web1", Value::Null);
    assert_eq!((status, &answer["vm_runs_on"]), (404, &json!("far")));
}

#[test]
fn a_person_who_fenced_the_target_brings_the_guest_back() {
    let (mut host, pid) = died(fenced);
    host.start().unwrap();
    let resolve = |host: &Host, fenced: &str| {
        host.json("POST", "/v1/vms/web1/resolve", json!({ "here_fenced": fenced }))
    };
    let (status, answer) = resolve(&host, "another");
    assert_eq!(status, 400, "{answer}");
    assert!(host.vms.paused.lock().unwrap().contains(&pid));
    assert_eq!(resolve(&host, "far").0, 204);
    assert_eq!(show(&host, "web1")["state"], "running");
    // A late word of the target no longer matters.
    let record = OwnershipRecord { owner: "far".into(), epoch: Epoch(2), migration: Some(MIGRATION) };
    *host.script.answer.lock().unwrap() = Some(Claimed::Lost(record));
    host.stop();
    assert_eq!(open(&host).departure_of("web1").unwrap(), None);
}

#[test]
fn an_arrival_without_a_claim_leaves_no_trace() {
    let mut host = Host::new();
    host.stop();
    let pid = host.vms.spawn();
    let store = open(&host);
    let vm = VmRecord {
        name: "web9".into(),
        recipe: Value::Null,
        process: Some(Process::of(pid).unwrap()),
        qmp: "/run/q".into(),
        belongings: Value::Null,
        origin: Origin::Migrated,
        standing: Standing::Arriving { migration: MIGRATION, from: "far".into() },
    };
    let source = OwnershipRecord { owner: "far".into(), epoch: Epoch(7), migration: None };
    store.accept(&vm, &source).unwrap();
    drop(store);
    // Its QEMU may be ending by itself just now.
    host.vms.silent.store(true, SeqCst);
    host.start().unwrap();
    assert_eq!(host.json("GET", "/v1/vms", Value::Null).1, json!([]));
    assert!(!Process::of(pid).is_ok_and(|process| process.is_alive()));
    host.stop();
    assert!(matches!(open(&host).arrival("web9"), Ok(None)));
    assert_eq!(open(&host).departures().unwrap(), Vec::<(String, agent::store::DepartureRecord)>::new());
}
