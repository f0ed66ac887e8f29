//! An agent whose VMs belong to it by a record that all hosts share.

mod fake;

use agent::store::{Origin, Process, Standing, Store, VmRecord};
use fake::{Host, until};
use ports::shared::{NOBODY, SharedRecord};
use ports::{Claim, Claimed, Offer, Ownership, OwnershipRecord};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex},
};
use units::{Epoch, MigrationId};

/// A record in memory, which may be away.
#[derive(Default)]
struct Ledger {
    owners: Mutex<BTreeMap<String, (String, u64)>>,
    away: Mutex<bool>,
}

impl Ledger {
    fn says(&self, vm: &str) -> Option<(String, u64)> {
        self.owners.lock().unwrap().get(vm).cloned()
    }

    fn write(&self, vm: &str, owner: &str, epoch: u64) {
        self.owners.lock().unwrap().insert(vm.to_owned(), (owner.to_owned(), epoch));
    }

    fn go_away(&self, away: bool) {
        *self.away.lock().unwrap() = away;
    }

    fn answer(&self) -> io::Result<()> {
        if *self.away.lock().unwrap() { Err(io::Error::other("the datastore is away")) } else { Ok(()) }
    }
}

impl Ownership for Ledger {
    fn identity(&self) -> io::Result<String> {
        self.answer().map(|()| "ledger 1".to_owned())
    }

    fn offer(&self, _: &Offer) -> io::Result<()> {
        self.answer()
    }

    fn claim(&self, _: &Claim) -> io::Result<Claimed> {
        Err(io::Error::other("migrations are scripted here"))
    }
}

impl SharedRecord for Ledger {
    fn words(&self) -> String {
        "the ledger".to_owned()
    }

    fn look(&self, vm: &str) -> io::Result<Option<OwnershipRecord>> {
        self.answer()?;
        Ok(self.says(vm).map(|(owner, epoch)| OwnershipRecord {
            owner,
            epoch: Epoch(epoch),
            migration: None,
        }))
    }

    fn start(&self, vm: &str, host: &str, fenced: Option<&str>, _: Option<Epoch>) -> io::Result<Claimed> {
        match self.look(vm)? {
            Some(record)
                if record.owner != NOBODY
                    && record.owner != host
                    && Some(record.owner.as_str()) != fenced =>
            {
                Ok(Claimed::Lost(record))
            }
            record => {
                let epoch = record.map_or(1, |record| record.epoch.0 + 1);
                self.write(vm, host, epoch);
                Ok(Claimed::Yours(Epoch(epoch)))
            }
        }
    }

    fn end(&self, vm: &str, host: &str, _: Option<Epoch>) -> io::Result<()> {
        match self.look(vm)? {
            Some(record) if record.owner == host => self.write(vm, NOBODY, record.epoch.0 + 1),
            _ => {}
        }
        Ok(())
    }
}

fn sharing() -> (Host, Arc<Ledger>) {
    let ledger = Arc::new(Ledger::default());
    (Host::sharing(Some(ledger.clone())), ledger)
}

fn start(host: &Host, body: Value) -> (u16, String) {
    let (status, answer) = host.json("POST", "/v1/vms", body);
    (status, answer.to_string())
}

fn file(name: &str) -> Value {
    json!({ "text": format!("name = {name:?}"), "path": "/vm.toml" })
}

#[test]
fn a_vm_is_this_hosts_by_the_record_from_its_start_to_its_end() {
    let (host, ledger) = sharing();
    let vm = host.run("web1");
    assert_eq!((&vm["owner"], &vm["epoch"]), (&json!("hosta"), &json!(1)));
    assert_eq!(ledger.says("web1"), Some(("hosta".into(), 1)));
    assert_eq!(host.ask("DELETE", "/v1/vms/web1", "").0, 204);
    assert_eq!(ledger.says("web1"), Some((NOBODY.into(), 2)));
    assert_eq!(host.run("web1")["epoch"], 3);
    // One that does not start is not kept from others.
    assert_ne!(start(&host, file("broken")).0, 201);
    assert_eq!(ledger.says("broken"), Some((NOBODY.into(), 2)));
}

#[test]
fn i1_another_hosts_vm_starts_only_if_that_host_is_fenced() {
    let (host, ledger) = sharing();
    ledger.write("web1", "hostb", 7);
    let (status, why) = start(&host, file("web1"));
    assert_eq!(status, 409, "{why}");
    assert!(why.contains("belongs to hostb") && why.contains("--i-have-fenced hostb"), "{why}");
    assert_eq!(host.json("GET", "/v1/vms", Value::Null).1, json!([]), "no trace of it");
    let mut body = file("web1");
    body["fenced"] = json!("hostc");
    assert_eq!(start(&host, body.clone()).0, 409, "another host is");
    body["fenced"] = json!("hostb");
    assert_eq!(start(&host, body).0, 201);
    assert_eq!(ledger.says("web1"), Some(("hosta".into(), 8)));
}

#[test]
fn without_the_record_nothing_starts_and_ends_are_told_later() {
    let (host, ledger) = sharing();
    host.run("web1");
    ledger.go_away(true);
    let (status, why) = start(&host, file("web2"));
    assert!(status >= 500 && why.contains("away"), "{status} {why}");
    let (status, why) = host.ask("DELETE", "/v1/vms/web1", "");
    assert!(status >= 500 && why.contains("try again"), "{status} {why}");
    ledger.go_away(false);
    assert_eq!(host.ask("DELETE", "/v1/vms/web1", "").0, 204);
    assert_eq!(ledger.says("web1"), Some((NOBODY.into(), 2)));
}

#[test]
fn after_a_start_agent_and_record_learn_of_each_others_vms() {
    let mut host = Host::new();
    host.run("web1");
    host.run("web2");
    host.stop();
    let ledger = Arc::new(Ledger::default());
    ledger.write("web2", "hostb", 5);
    host.record = Some(ledger.clone());
    host.start().unwrap();
    until("web1 in the record", || ledger.says("web1") == Some(("hosta".into(), 1)));
    let show = |vm: &str| host.json("GET", &format!("/v1/vms/{vm}"), Value::Null).1;
    until("a word on web2", || show("web2")["note"].as_str().is_some_and(|note| note.contains("hostb")));
    assert_eq!(ledger.says("web2"), Some(("hostb".into(), 5)), "nothing is taken");
    assert_eq!(show("web1")["note"], Value::Null);
}

/// A host whose agent died while it asked a shared record for a VM that had arrived.
fn died_asking(alive: bool) -> (Host, u32) {
    const MIGRATION: MigrationId = MigrationId(0xabc);
    let mut host = Host::new();
    host.stop();
    let pid = host.vms.spawn();
    let process = Process::of(pid).unwrap();
    if !alive {
        host.vms.kill(pid);
    }
    let store = Store::open(&host.config().state_dir, "hosta").unwrap();
    let vm = VmRecord {
        name: "web1".into(),
        recipe: json!({}),
        process: Some(process),
        qmp: "/q".into(),
        belongings: Value::Null,
        origin: Origin::Migrated,
        standing: Standing::Arriving { migration: MIGRATION, from: "far".into() },
    };
    let of_source = OwnershipRecord { owner: "far".into(), epoch: Epoch(4), migration: None };
    drop(store.accept_decided_by(&vm, &of_source, "ledger 1").unwrap());
    store.begin_claim(&store.own_claim(MIGRATION).unwrap().unwrap()).unwrap();
    drop(store);
    (host, pid)
}

#[test]
fn i1_an_arrival_that_may_be_claimed_waits_for_the_record() {
    let (mut host, pid) = died_asking(true);
    host.start().unwrap();
    until("two questions", || *host.script.asked.lock().unwrap() >= 2);
    assert!(host.script.gone_on.lock().unwrap().is_empty(), "no answer is no permission");
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists(), "and no reason to end it");
    *host.script.answer.lock().unwrap() = Some(Claimed::Yours(Epoch(5)));
    until("it goes on", || *host.script.gone_on.lock().unwrap() == ["web1"]);
}

#[test]
fn i1_an_arrival_that_the_source_won_back_is_given_up() {
    let (mut host, pid) = died_asking(true);
    let theirs =
        OwnershipRecord { owner: "far".into(), epoch: Epoch(5), migration: Some(MigrationId(0xabc)) };
    *host.script.answer.lock().unwrap() = Some(Claimed::Lost(theirs));
    host.start().unwrap();
    until("it is forgotten", || host.json("GET", "/v1/vms", Value::Null).1 == json!([]));
    until("its QEMU ends", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert!(host.script.gone_on.lock().unwrap().is_empty());
}

#[test]
fn an_arrival_whose_qemu_is_gone_is_not_claimed() {
    let (mut host, _) = died_asking(false);
    *host.script.answer.lock().unwrap() = Some(Claimed::Yours(Epoch(5)));
    host.start().unwrap();
    until("it is forgotten", || host.json("GET", "/v1/vms", Value::Null).1 == json!([]));
    assert_eq!(*host.script.asked.lock().unwrap(), 0);
}
