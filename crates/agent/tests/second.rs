//! An agent dies while another QEMU of its host takes a VM over: afterwards one of the two runs the guest,
//! and the other is gone.

mod fake;

use agent::store::{Place, Process, SELF, Side, Store};
use fake::{Host, until};
use ports::{RunState, SourceJournal};
use serde_json::{Value, json};
use std::path::Path;
use units::{Epoch, MigrationId};

const MIGRATION: MigrationId = MigrationId(0xdef);

/// How far it came, step by step.
#[derive(Clone, Copy, PartialEq, PartialOrd, Debug)]
enum Step {
    Waits,
    Pausing,
    Fenced,
    Decided,
    Killed,
    Gone,
    Settled,
}

/// The agent dies after this step, with a decision for this side. Which of both QEMUs is left then, and
/// whether it is the first.
fn dies(after: Step, side: Side) -> (Host, u32, bool) {
    let mut host = Host::new();
    let first = host.run("web1")["pid"].as_u64().unwrap() as u32;
    host.stop();
    let second = host.vms.spawn();
    let store = Store::open(&host.config().state_dir, "hosta").unwrap();
    let waits = Place {
        recipe: json!({ "machine": "another" }),
        process: Some(Process::of(second).unwrap()),
        qmp: "/run/second.qmp".into(),
        belongings: Value::Null,
    };
    store.begin_second("web1", MIGRATION, waits).unwrap().unwrap();
    host.vms.paused.lock().unwrap().insert(second);
    let mut journal = store.departure("web1", MIGRATION, SELF, "127.0.0.1:1");
    if after >= Step::Pausing {
        host.vms.paused.lock().unwrap().insert(first);
        journal.pausing(RunState::Running).unwrap();
    }
    if after >= Step::Fenced {
        journal.fence(Epoch(1)).unwrap();
    }
    if after >= Step::Decided {
        assert_eq!(store.decide_second("web1", MIGRATION, side).unwrap(), side);
    }
    // Whoever has lost is killed before anybody is told.
    if after >= Step::Killed {
        host.vms.kill(if side == Side::First { second } else { first });
    }
    if after >= Step::Gone {
        journal.gone(Epoch(2)).unwrap();
    }
    if after >= Step::Settled {
        host.vms.paused.lock().unwrap().remove(&second);
        journal.settled().unwrap();
    }
    drop((journal, store));
    host.start().unwrap();
    let is_first = after < Step::Killed || side == Side::First;
    let (left, other) = if is_first { (first, second) } else { (second, first) };
    until("the other QEMU's end", || !Path::new(&format!("/proc/{other}")).exists());
    (host, left, is_first)
}

#[test]
fn i1_i3_whenever_the_agent_dies_one_of_two_qemus_is_left() {
    for (after, side) in [
        (Step::Waits, Side::First),
        (Step::Pausing, Side::First),
        (Step::Fenced, Side::First),
        (Step::Decided, Side::First),
        (Step::Decided, Side::Second),
        (Step::Killed, Side::First),
        (Step::Killed, Side::Second),
        (Step::Gone, Side::Second),
        (Step::Settled, Side::Second),
    ] {
        let (mut host, left, is_first) = dies(after, side);
        let story = format!("{after:?} {side:?}");
        until(&story, || {
            let vm = host.json("GET", "/v1/vms/web1", Value::Null).1;
            vm["state"] == "running" && vm["pid"] == left
        });
        assert!(Path::new(&format!("/proc/{left}")).exists(), "{story}");
        host.stop();
        let store = Store::open(&host.config().state_dir, "hosta").unwrap();
        until(&story, || store.seconds().unwrap().is_empty());
        assert!(store.departures().unwrap().is_empty(), "{story}");
        let vm = store.vm("web1").unwrap().expect("it is this host's");
        assert_eq!(vm.process.unwrap().pid, left, "{story}");
        assert_eq!(vm.recipe["machine"] == "another", !is_first, "{story}");
        assert_eq!(*host.script.asked.lock().unwrap(), 0, "{story}: no other host was asked");
        assert!(host.script.served_gone.lock().unwrap().is_empty(), "{story}");
        host.vms.kill(left);
    }
}
