//! The agent as the command line meets it: a real socket, VMs that are processes, migrations from a script.

mod fake;

use fake::{Host, until};
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::PermissionsExt,
    thread,
    time::{Duration, Instant},
};

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["event"].as_str().unwrap()).collect()
}

#[test]
fn a_vm_is_started_listed_shown_and_stopped() {
    let host = Host::new();
    assert_eq!(fs::metadata(host.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(host.json("GET", "/v1/host", Value::Null).1["name"], "hosta");
    let vm = host.run("web1");
    assert_eq!((&vm["state"], &vm["owner"], &vm["epoch"]), (&json!("running"), &json!("hosta"), &json!(1)));
    let (_, list) = host.json("GET", "/v1/vms", Value::Null);
    assert_eq!(list, json!([vm]));
    assert_eq!(host.json("GET", "/v1/vms/web1", Value::Null), (200, vm));
    assert_eq!(host.ask("DELETE", "/v1/vms/web1", "").0, 204);
    assert_eq!(host.json("GET", "/v1/vms", Value::Null).1, json!([]));
}

#[test]
fn every_refusal_answers_what_where_and_why() {
    let host = Host::new();
    host.run("web1");
    let run = |text: &str| json!({ "text": text, "path": "/vms/vm.toml" });
    let table = [
        ("GET", "/v1/vms/wbe1", Value::Null, 404, "did you mean web1?"),
        ("GET", "/v1/vms/zzz", Value::Null, 404, "whimbrel list"),
        ("GET", "/v2/what", Value::Null, 404, "different versions"),
        ("PUT", "/v1/vms", Value::Null, 404, "different versions"),
        ("POST", "/v1/vms", run("name = \"web1\""), 409, "has a VM named web1 already"),
        ("POST", "/v1/vms", run("name = \"a/b\""), 400, "is no name"),
        ("POST", "/v1/vms", run("nmae = \"x\""), 400, "line 1, column 1"),
        ("POST", "/v1/vms", run("name = \"broken\""), 500, "no bridge br0\nno disk"),
        ("POST", "/v1/vms", json!({ "txet": "" }), 400, "unknown field `txet`"),
        ("POST", "/v1/vms/db/adopt", json!({ "qmp": "/nowhere" }), 409, "nothing answers at /nowhere"),
        ("POST", "/v1/vms/web1/migrate", json!({ "to": "godo" }), 400, "did you mean good?"),
        ("POST", "/v1/vms/web1/migrate", json!({ "to": "hosta" }), 400, "is not known"),
        ("POST", "/v1/vms/web1/migrate", json!({ "to": "good", "streams": 0 }), 400, "1 to 64 streams"),
        (
            "POST",
            "/v1/vms/web1/migrate",
            json!({ "to": "good", "max_downtime_ms": -1.0 }),
            400,
            "more than nothing",
        ),
        ("POST", "/v1/vms/nope/migrate", json!({ "to": "good" }), 404, "whimbrel list"),
        ("POST", "/v1/vms/web1/cancel", Value::Null, 409, "nothing to cancel"),
        ("GET", "/v1/vms/web1/migration", Value::Null, 404, "none was started"),
        ("POST", "/v1/vms/web1/resolve", json!({ "here_fenced": "good" }), 409, "nobody doubts"),
    ];
    for (method, path, body, expected, why) in table {
        let (status, answer) = host.json(method, path, body.clone());
        assert_eq!(status, expected, "{method} {path} {body}: {answer}");
        let (what, place, said) = (&answer["what"], &answer["where"], answer["why"].as_str().unwrap());
        assert!(what.is_string() && place == "agent of hosta" && said.contains(why), "{path}: {answer}");
    }
    // Nothing was left by what failed.
    assert_eq!(host.json("GET", "/v1/vms", Value::Null).1.as_array().unwrap().len(), 1);
}

#[test]
fn a_vm_is_adopted_once() {
    let host = Host::new();
    let qmp = host.dir.path().join("db.qmp");
    fs::write(&qmp, host.vms.spawn().to_string()).unwrap();
    let different = json!(["the display stays behind"]);
    let (status, seen) = host.json("POST", "/v1/check", json!({ "qmp": qmp }));
    assert_eq!((status, &seen["different"], &seen["hindrances"]), (200, &different, &json!([])));
    assert_eq!(host.json("GET", "/v1/vms/db", Value::Null).0, 404, "it was only looked at");
    let (status, vm) = host.json("POST", "/v1/vms/db/adopt", json!({ "qmp": qmp }));
    assert_eq!((status, &vm["origin"], &vm["different"]), (201, &json!("adopted"), &different));
    let (status, answer) = host.json("POST", "/v1/vms/other/adopt", json!({ "qmp": qmp }));
    assert_eq!(status, 409);
    assert!(answer["why"].as_str().unwrap().contains("is the VM db already"), "{answer}");
}

#[test]
fn i1_a_vm_is_adopted_by_one_agent_of_its_host() {
    let (mut one, mut other) = (Host::new(), Host::new());
    let (pid, qmp) = (one.vms.spawn(), one.dir.path().join("db.qmp"));
    fs::write(&qmp, pid.to_string()).unwrap();
    let adopt = |host: &Host| host.json("POST", "/v1/vms/db/adopt", json!({ "qmp": qmp }));
    assert_eq!(adopt(&one).0, 201);
    let (status, answer) = adopt(&other);
    assert_eq!(status, 409, "{answer}");
    let why = answer["why"].as_str().unwrap();
    assert!(why.contains("another agent of this host is in charge of its QEMU"), "{answer}");
    assert!(why.contains(&format!("(process {pid})")), "{answer}");
    assert_eq!(other.json("GET", "/v1/vms", Value::Null).1, json!([]));
    // Whoever was refused takes nothing with it when it ends.
    other.stop();
    other.start().unwrap();
    assert_eq!(adopt(&other).0, 409);
    assert_eq!(one.json("GET", "/v1/vms/db", Value::Null).1["state"], "running");
    // Once the first one has ended, the other one may have it.
    one.stop();
    until("its release", || adopt(&other).0 == 201);
}

#[test]
fn a_console_is_shortened_while_its_guest_prints() {
    let host = Host::new();
    let path = host.dir.path().join("run/web1.console");
    // As QEMU has it open.
    let mut guest = File::options().create(true).append(true).open(&path).unwrap();
    guest.write_all(&vec![b'x'; 8 << 20]).unwrap();
    guest.write_all(&vec![b'y'; 1 << 20]).unwrap();
    let printed = Instant::now();
    let old = path.with_extension("console.old");
    until("its end", || old.exists());
    assert!(printed.elapsed() < Duration::from_secs(10), "after {:?}", printed.elapsed());
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    assert!(fs::read(&old).unwrap() == vec![b'y'; 1 << 20], "the last mebibyte is kept");
    guest.write_all(b"more").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"more");
}

#[test]
fn whoever_follows_sees_the_whole_story_however_late() {
    let host = Host::new();
    host.run("web1");
    host.migrate("web1", "postcopy");
    thread::scope(|threads| {
        let early = threads.spawn(|| host.follow("web1"));
        until("post-copy", || {
            host.json("GET", "/v1/vms/web1", Value::Null).1["migration"]["phase"] == "post-copy"
        });
        assert_eq!(host.json("GET", "/v1/vms/web1", Value::Null).1["state"], "migrating");
        let late = threads.spawn(|| host.follow("web1"));
        let (_, so_far) = host.ask("GET", "/v1/vms/web1/migration", "");
        assert!(so_far.ends_with("}\n") && !so_far.contains("\"done\""), "{so_far}");
        host.script.go_on();
        let late = late.join().unwrap();
        // Of three ticks in a row only the last is kept for those who come late.
        let story = ["phase", "phase", "tick", "round", "tick", "phase", "phase", "tick", "done"];
        assert_eq!(kinds(&late), story);
        assert_eq!(late[2]["left_bytes"], 1 << 28);
        let early = early.join().unwrap();
        assert_eq!(early.last(), late.last());
        assert_eq!(early[0], late[0]);
    });
    assert_eq!(host.follow("web1").last().unwrap()["outcome"], "completed");
}

#[test]
fn a_cancelled_migration_ends_and_the_vm_can_be_migrated_again() {
    let host = Host::new();
    host.run("web1");
    host.migrate("web1", "slow");
    for (method, path, body) in
        [("POST", "/v1/vms/web1/migrate", json!({ "to": "good" })), ("DELETE", "/v1/vms/web1", Value::Null)]
    {
        let (status, answer) = host.json(method, path, body);
        assert_eq!(status, 409, "{answer}");
    }
    assert_eq!(host.ask("POST", "/v1/vms/web1/cancel", "").0, 202);
    let end = host.follow("web1").pop().unwrap();
    assert_eq!((&end["outcome"], &end["error"]["vm_runs_on"]), (&json!("cancelled"), &json!("hosta")));
    host.migrate("web1", "good");
    assert_eq!(host.follow("web1").pop().unwrap()["outcome"], "completed");
}

#[test]
fn a_guest_that_runs_on_the_target_cannot_be_cancelled_back() {
    let host = Host::new();
    host.run("web1");
    host.migrate("web1", "postcopy");
    until("post-copy", || {
        host.json("GET", "/v1/vms/web1", Value::Null).1["migration"]["phase"] == "post-copy"
    });
    let (status, answer) = host.json("POST", "/v1/vms/web1/cancel", Value::Null);
    assert_eq!((status, &answer["vm_runs_on"]), (409, &json!("postcopy")));
}

#[test]
fn an_error_of_our_own_in_a_migration_is_a_failed_migration() {
    let host = Host::new();
    host.run("web1");
    host.migrate("web1", "panic");
    let end = host.follow("web1").pop().unwrap();
    assert_eq!((&end["outcome"], &end["error"]["vm_runs_on"]), (&json!("failed"), &json!("hosta")));
    host.migrate("web1", "good");
}

#[test]
fn a_second_agent_is_refused() {
    let mut host = Host::new();
    let error = host.start().unwrap_err().to_string();
    assert!(error.contains("in use by another agent"), "{error}");
    assert_eq!(host.ask("GET", "/v1/host", "").0, 200, "the first one is not disturbed");
}

#[test]
fn other_agents_are_handed_to_the_migrator() {
    // The port is only known from the log; what the accept loop does is tested beside it.
    let host = Host::new();
    assert_eq!(host.json("GET", "/v1/host", Value::Null).1["listen"], "127.0.0.1:0");
}
