//! A second QEMU of this host for one of its VMs: which of the two runs the guest is decided here.
//!
//! The VM is this host's throughout, so no other record is asked, and no name could tell the two sides apart
//! (I1). A decision names a side. It is made once, in one transaction with all that follows from it: when the
//! second side wins, the VM's record names the second QEMU from then on, and this one the first, which is to
//! be ended.

use super::{
    Process, Standing, Store, StoreError, Trouble, VmRecord, decode, encode, entries, ownership, records,
    source, target, vms,
};
use ports::RunState;
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{io, path::PathBuf};
use units::MigrationId;

/// What a migration to another QEMU of the same host calls its target.
pub const SELF: &str = "self";

/// VM name → [`SecondRecord`].
const SECONDS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("seconds");

/// Which of a VM's two QEMUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The one in which the guest ran when it began.
    First,
    /// The one that waits for it.
    Second,
}

/// A QEMU as a VM's record names it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Place {
    /// How it was started.
    pub recipe: Value,
    /// Its process.
    pub process: Option<Process>,
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// What goes with it.
    pub belongings: Value,
}

/// What is recorded while a VM has two QEMUs.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SecondRecord {
    /// In which migration.
    #[serde(with = "records::id")]
    pub migration: MigrationId,
    /// The QEMU that the VM's own record does not name: until the second side has won the one that waits,
    /// from then on the one that the guest has left. Either way it is never to run the guest, unless a
    /// decision is still to come.
    pub other: Place,
    /// Who runs the guest, once that is decided.
    #[serde(default)]
    pub decided: Option<Side>,
    /// What the guest does in the second QEMU.
    #[serde(default)]
    pub goes_on: RunState,
}

pub(super) fn prepare(change: &WriteTransaction) -> Result<(), Trouble> {
    change.open_table(SECONDS)?;
    Ok(())
}

pub(super) fn forget(change: &WriteTransaction, vm: &str) -> Result<(), Trouble> {
    change.open_table(SECONDS)?.remove(vm)?;
    Ok(())
}

impl SecondRecord {
    /// The VM as it would be recorded in the QEMU that its record does not name.
    pub fn other_of(&self, vm: &VmRecord) -> VmRecord {
        let Place { recipe, process, qmp, belongings } = self.other.clone();
        VmRecord { recipe, process, qmp, belongings, ..vm.clone() }
    }

    /// Decides for `side`, unless that is decided already; `vm` is changed with it. Says whether it changed
    /// anything.
    fn decide(&mut self, side: Side, vm: &mut VmRecord) -> bool {
        if self.decided.is_some() {
            return false;
        }
        self.decided = Some(side);
        if side == Side::Second {
            self.swap(vm);
        }
        true
    }

    /// The VM's record names the other QEMU from now on.
    fn swap(&mut self, vm: &mut VmRecord) {
        std::mem::swap(&mut self.other.recipe, &mut vm.recipe);
        std::mem::swap(&mut self.other.process, &mut vm.process);
        std::mem::swap(&mut self.other.qmp, &mut vm.qmp);
        std::mem::swap(&mut self.other.belongings, &mut vm.belongings);
    }
}

impl Store {
    /// A second QEMU waits for this VM. Refused, with the reason, for a VM that is not here, or that moves
    /// already.
    pub fn begin_second(
        &self,
        vm: &str,
        migration: MigrationId,
        waits: Place,
    ) -> Result<Result<(), String>, StoreError> {
        self.change(&format!("record a second QEMU for {vm}"), |change| {
            let here = |why: &str| Ok(Err(why.to_owned()));
            let record: Option<VmRecord> =
                change.open_table(vms::VMS)?.get(vm)?.map(|row| decode(row.value())).transpose()?;
            if record.is_none_or(|record| record.standing != Standing::Here) {
                return here("it is not here");
            }
            if source::is_leaving(change, vm)? || target::is_arriving(change, vm)? {
                return here("another migration of it is not over");
            }
            let mut seconds = change.open_table(SECONDS)?;
            if seconds.get(vm)?.is_some() {
                return here("it has a second QEMU already");
            }
            let record = SecondRecord { migration, other: waits, decided: None, goes_on: RunState::Running };
            seconds.insert(vm, encode(&record)?.as_slice())?;
            Ok(Ok(()))
        })
    }

    /// Before the decision: what the guest does in the second QEMU if that wins.
    pub fn second_goes_on(&self, vm: &str, migration: MigrationId, state: RunState) -> io::Result<()> {
        let what = format!("record what {vm} does in its second QEMU");
        let there = self.change(&what, |change| {
            let Some(mut record) = of(change, vm, migration)? else { return Ok(false) };
            record.goes_on = state;
            change.open_table(SECONDS)?.insert(vm, encode(&record)?.as_slice())?;
            Ok(true)
        })?;
        if there { Ok(()) } else { Err(over(vm, migration)) }
    }

    /// The commit: `side` runs the guest, unless the other one won before. Says who does; asked again, the
    /// answer stays. An error: not known, ask again.
    pub fn decide_second(&self, vm: &str, migration: MigrationId, side: Side) -> io::Result<Side> {
        let decided = self.change(&format!("decide which QEMU runs {vm}"), |change| {
            let Some(mut record) = of(change, vm, migration)? else { return Ok(None) };
            let mut changed = false;
            let there = vms::edit(change, vm, |vm| changed = record.decide(side, vm))?;
            if !there {
                return Ok(None);
            }
            if changed {
                change.open_table(SECONDS)?.insert(vm, encode(&record)?.as_slice())?;
                if record.decided == Some(Side::Second) {
                    ownership::start_here(change, vm, self.host())?;
                }
            }
            Ok(record.decided)
        })?;
        decided.ok_or_else(|| over(vm, migration))
    }

    /// Decides for the first QEMU although the second had won: only where the first can still run, so that
    /// nobody was told of it, and whoever was to end the first is gone.
    pub fn take_back_second(&self, vm: &str, migration: MigrationId) -> io::Result<()> {
        let there = self.change(&format!("give {vm} back to its first QEMU"), |change| {
            let Some(mut record) = of(change, vm, migration)? else { return Ok(false) };
            if record.decided == Some(Side::Second) {
                vms::edit(change, vm, |vm| record.swap(vm))?;
                record.decided = Some(Side::First);
                change.open_table(SECONDS)?.insert(vm, encode(&record)?.as_slice())?;
            }
            Ok(true)
        })?;
        if there { Ok(()) } else { Err(over(vm, migration)) }
    }

    /// What is recorded of a VM's second QEMU.
    pub fn second(&self, vm: &str) -> Result<Option<SecondRecord>, StoreError> {
        self.look(&format!("read whether {vm} has a second QEMU"), |look| {
            look.open_table(SECONDS)?.get(vm)?.map(|row| decode(row.value())).transpose()
        })
    }

    /// All VMs that have two QEMUs.
    pub fn seconds(&self) -> Result<Vec<(String, SecondRecord)>, StoreError> {
        self.look("read which VMs have a second QEMU", |look| entries(look, SECONDS))
    }

    /// The QEMU that the guest does not run in has ended. An error before that is decided.
    pub fn end_second(&self, vm: &str, migration: MigrationId) -> io::Result<()> {
        let decided = self.change(&format!("forget the other QEMU of {vm}"), |change| {
            let Some(record) = of(change, vm, migration)? else { return Ok(true) };
            if record.decided.is_some() {
                forget(change, vm)?;
            }
            Ok(record.decided.is_some())
        })?;
        if decided { Ok(()) } else { Err(io::Error::other(format!("nobody has decided yet who runs {vm}"))) }
    }
}

fn of(change: &WriteTransaction, vm: &str, migration: MigrationId) -> Result<Option<SecondRecord>, Trouble> {
    let seconds = change.open_table(SECONDS)?;
    let row: Option<SecondRecord> = seconds.get(vm)?.map(|row| decode(row.value())).transpose()?;
    Ok(row.filter(|record| record.migration == migration))
}

fn over(vm: &str, migration: MigrationId) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{vm} has no second QEMU by migration {migration}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Origin;
    use std::{sync::Barrier, thread};

    const ONE: MigrationId = MigrationId(1);

    fn place(pid: u32) -> Place {
        let process = Some(Process { pid, start_time: 9 });
        Place {
            recipe: serde_json::json!({ "pid": pid }),
            process,
            qmp: format!("/{pid}").into(),
            belongings: Value::Null,
        }
    }

    /// A store with a VM in process 1, for which process 2 waits.
    fn waiting() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), "here").unwrap();
        let Place { recipe, process, qmp, belongings } = place(1);
        let (name, origin, standing) = ("web1".to_owned(), Origin::Run, Standing::Here);
        let vm = VmRecord { name, recipe, process, qmp, belongings, origin, standing };
        assert!(store.add_vm(&vm).unwrap());
        store.begin_second("web1", ONE, place(2)).unwrap().unwrap();
        (dir, store)
    }

    fn pid(store: &Store) -> u32 {
        store.vm("web1").unwrap().unwrap().process.unwrap().pid
    }

    #[test]
    fn i1_the_first_decision_stays_and_the_vms_record_follows_it() {
        for (first, then, runs, other) in [
            (Side::Second, Side::First, 2, 1),
            (Side::First, Side::Second, 1, 2),
            (Side::Second, Side::Second, 2, 1),
            (Side::First, Side::First, 1, 2),
        ] {
            let (_dir, store) = waiting();
            assert!(store.end_second("web1", ONE).is_err(), "nothing is decided yet");
            store.second_goes_on("web1", ONE, RunState::Paused).unwrap();
            let epoch = store.owner("web1").unwrap().unwrap().epoch;
            for side in [first, then, then] {
                assert_eq!(store.decide_second("web1", ONE, side).unwrap(), first);
                assert_eq!(pid(&store), runs);
            }
            let seconds = store.seconds().unwrap();
            let [(name, record)] = &seconds[..] else { panic!("{seconds:?}") };
            assert_eq!((name.as_str(), &record.other), ("web1", &place(other)));
            assert_eq!(record.goes_on, RunState::Paused);
            let owner = store.owner("web1").unwrap().unwrap();
            assert_eq!(owner.owner, "here");
            assert_eq!(owner.epoch, if first == Side::Second { epoch.next() } else { epoch });
            store.end_second("web1", ONE).unwrap();
            store.end_second("web1", ONE).unwrap();
            assert!(store.decide_second("web1", ONE, Side::Second).is_err(), "it is over");
            assert_eq!(pid(&store), runs);
        }
    }

    #[test]
    fn what_the_second_had_won_is_given_back_as_a_whole() {
        for (decided, changes) in [(Some(Side::Second), true), (Some(Side::First), false), (None, false)] {
            let (_dir, store) = waiting();
            if let Some(side) = decided {
                store.decide_second("web1", ONE, side).unwrap();
            }
            store.take_back_second("web1", ONE).unwrap();
            assert_eq!(pid(&store), 1);
            let record = store.second("web1").unwrap().unwrap();
            assert_eq!(record.other, place(2));
            assert_eq!(record.decided, if changes { Some(Side::First) } else { decided });
            assert!(store.take_back_second("web1", MigrationId(2)).is_err(), "another migration");
        }
    }

    #[test]
    fn i1_of_two_sides_at_once_exactly_one_wins() {
        for _ in 0..20 {
            let (_dir, store) = waiting();
            let start = Barrier::new(2);
            let answers = thread::scope(|threads| {
                let sides = [Side::First, Side::Second].map(|side| {
                    let (store, start) = (&store, &start);
                    threads.spawn(move || {
                        start.wait();
                        store.decide_second("web1", ONE, side).unwrap()
                    })
                });
                sides.map(|side| side.join().unwrap())
            });
            assert_eq!(answers[0], answers[1]);
            assert_eq!(pid(&store), if answers[0] == Side::Second { 2 } else { 1 });
        }
    }

    #[test]
    fn one_second_qemu_at_a_time_and_only_for_a_vm_that_is_here() {
        let (_dir, store) = waiting();
        let begin = |vm: &str, n| store.begin_second(vm, MigrationId(n), place(3)).unwrap();
        assert_eq!(begin("web1", 2), Err("it has a second QEMU already".to_owned()));
        assert_eq!(begin("web2", 2), Err("it is not here".to_owned()));
        assert!(store.decide_second("web1", MigrationId(2), Side::Second).is_err(), "another migration");
        assert!(store.second_goes_on("web1", MigrationId(2), RunState::Running).is_err());
        assert_eq!(pid(&store), 1);
        store.remove_vm("web1").unwrap();
        assert!(store.seconds().unwrap().is_empty(), "it is forgotten with its VM");
    }
}
