//! The source's journal: what this host may do with the guest after a crash in the middle of a migration.

use super::{
    DepartureRecord, DepartureState, SELF, Store, StoreError, Trouble, decode, encode, entries, history,
    ownership, vms,
};
use ports::{OwnershipRecord, RunState, SourceJournal};
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde_json::Value;
use std::io;
use units::{Epoch, MigrationId};

/// VM name → [`DepartureRecord`].
const DEPARTURES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("departures");

pub(super) fn prepare(change: &WriteTransaction) -> Result<(), Trouble> {
    change.open_table(DEPARTURES)?;
    Ok(())
}

pub(super) fn forget(change: &WriteTransaction, vm: &str) -> Result<(), Trouble> {
    change.open_table(DEPARTURES)?.remove(vm)?;
    Ok(())
}

/// Whether a migration of this VM to another host is open.
pub(super) fn is_leaving(change: &WriteTransaction, vm: &str) -> Result<bool, Trouble> {
    Ok(change.open_table(DEPARTURES)?.get(vm)?.is_some())
}

/// One VM's way from this host: its journal.
pub struct Departure {
    store: Store,
    vm: String,
    migration: MigrationId,
    to: String,
    address: String,
    decided_by: String,
    /// What the guest did before it was stopped, once that is known.
    before: Option<RunState>,
    memory: Value,
}

/// What a step makes of the journal.
enum Transition {
    /// This is written.
    Write(DepartureState),
    /// It is as it should be already.
    Keep,
    /// The entry goes, and the VM stays.
    Erase,
}

impl Store {
    /// The journal of a migration from here to the host `to` at `address`. Nothing is written before its
    /// first entry.
    pub fn departure(&self, vm: &str, migration: MigrationId, to: &str, address: &str) -> Departure {
        let (vm, to, address) = (vm.to_owned(), to.to_owned(), address.to_owned());
        Departure {
            store: self.clone(),
            vm,
            migration,
            to,
            address,
            decided_by: String::new(),
            before: None,
            memory: Value::Null,
        }
    }

    /// All VMs with an entry in the source's journal.
    pub fn departures(&self) -> Result<Vec<(String, DepartureRecord)>, StoreError> {
        self.look("read the journal of migrations from here", |look| entries(look, DEPARTURES))
    }

    /// The entry of one VM.
    pub fn departure_of(&self, vm: &str) -> Result<Option<DepartureRecord>, StoreError> {
        self.look(&format!("read the journal of {vm}"), |look| {
            look.open_table(DEPARTURES)?.get(vm)?.map(|row| decode(row.value())).transpose()
        })
    }
}

impl Departure {
    /// By a shared record, named by its identity.
    pub fn decided_by(self, identity: &str) -> Self {
        Self { decided_by: identity.to_owned(), ..self }
    }

    /// Of a VM whose memory lies there, in the hypervisor's words.
    pub fn with_memory(self, memory: Value) -> Self {
        Self { memory, ..self }
    }

    /// Changes the entry as `next` says, which sees the state of this migration's entry, if there is one.
    fn step(
        &self,
        what: &str,
        next: impl FnOnce(Option<DepartureState>) -> Result<Transition, String>,
        also: impl FnOnce(&WriteTransaction, Option<DepartureState>) -> Result<(), Trouble>,
    ) -> io::Result<()> {
        let what = format!("record that {} {what}", self.vm);
        let refused = self.store.change(&what, |change| {
            let mut entries = change.open_table(DEPARTURES)?;
            let before: Option<DepartureRecord> =
                entries.get(self.vm.as_str())?.map(|row| decode(row.value())).transpose()?;
            if let Some(entry) = before.as_ref().filter(|entry| entry.migration != self.migration) {
                return Ok(Some(format!("its migration {} to {} is not over", entry.migration, entry.to)));
            }
            let (did, lay) = before.as_ref().map(|entry| (entry.before, entry.memory.clone())).unzip();
            let before = before.map(|entry| entry.state);
            match next(before) {
                Err(why) => return Ok(Some(why)),
                Ok(Transition::Keep) => {}
                Ok(Transition::Erase) => {
                    entries.remove(self.vm.as_str())?;
                }
                Ok(Transition::Write(state)) => {
                    let entry = DepartureRecord {
                        migration: self.migration,
                        to: self.to.clone(),
                        address: self.address.clone(),
                        record: self.decided_by.clone(),
                        before: self.before.or(did).unwrap_or_default(),
                        memory: if self.memory.is_null() {
                            lay.unwrap_or_default()
                        } else {
                            self.memory.clone()
                        },
                        state,
                    };
                    entries.insert(self.vm.as_str(), encode(&entry)?.as_slice())?;
                }
            }
            drop(entries);
            also(change, before)?;
            Ok(None)
        })?;
        match refused {
            None => Ok(()),
            Some(why) => Err(io::Error::other(format!("cannot {what}: {why}"))),
        }
    }

    /// The guest runs here again after a fence that became durable too late: nobody was authorized to
    /// claim, so nobody has, and the VM belongs to this host as it did. Like [`SourceJournal::back`], whose
    /// fence was in time, but without a new epoch.
    pub fn withdrawn(&mut self) -> io::Result<()> {
        let next = |before| match before {
            Some(DepartureState::Gone { .. }) => Err("it belongs to the target (I4)".to_owned()),
            _ => Ok(Transition::Erase),
        };
        self.step("runs here again", next, nothing)
    }

    fn record(&self, owner: &str, epoch: Epoch) -> OwnershipRecord {
        OwnershipRecord { owner: owner.to_owned(), epoch, migration: Some(self.migration) }
    }
}

fn nothing(_: &WriteTransaction, _: Option<DepartureState>) -> Result<(), Trouble> {
    Ok(())
}

impl SourceJournal for Departure {
    fn pausing(&mut self, before: RunState) -> io::Result<()> {
        self.before = Some(before);
        let next = |before| match before {
            None | Some(DepartureState::Pausing) => Ok(Transition::Write(DepartureState::Pausing)),
            Some(_) => Err("it has fenced itself already".to_owned()),
        };
        self.step("is being paused", next, nothing)
    }

    fn fence(&mut self, expected: Epoch) -> io::Result<()> {
        let fenced = DepartureState::Fenced { expected };
        let next = |before| match before {
            Some(DepartureState::Pausing) => Ok(Transition::Write(fenced)),
            Some(state) if state == fenced => Ok(Transition::Keep),
            _ => Err("it was not being paused".to_owned()),
        };
        self.step("is left to its ownership record", next, nothing)
    }

    fn back(&mut self) -> io::Result<()> {
        let next = |before| match before {
            Some(DepartureState::Gone { .. }) => Err("it belongs to the target (I4)".to_owned()),
            _ => Ok(Transition::Erase),
        };
        let host = self.store.host().to_owned();
        self.step("runs here again", next, |change, before| match before {
            // After a fence only a claim of our own brings it back: the next epoch is ours.
            Some(DepartureState::Fenced { expected }) => {
                ownership::note(change, &self.vm, &self.record(&host, expected.next()))
            }
            _ => Ok(()),
        })
    }

    fn gone(&mut self, epoch: Epoch) -> io::Result<()> {
        let next = |before| match before {
            Some(DepartureState::Fenced { .. } | DepartureState::Gone { .. }) => {
                Ok(Transition::Write(DepartureState::Gone { epoch }))
            }
            _ => Err("it has not fenced itself".to_owned()),
        };
        self.step("belongs to the target", next, |change, _| {
            if self.to == SELF {
                // Of its own two QEMUs the host has decided already.
                return Ok(());
            }
            ownership::note(change, &self.vm, &self.record(&self.to, epoch))
        })
    }

    /// The VM is forgotten here with the journal's entry.
    fn settled(&mut self) -> io::Result<()> {
        let next = |before| match before {
            None | Some(DepartureState::Gone { .. }) => Ok(Transition::Erase),
            Some(_) => Err("it does not belong to the target".to_owned()),
        };
        self.step("is complete at the target", next, |change, before| {
            if before.is_some() && self.to != SELF {
                change.open_table(vms::VMS)?.remove(self.vm.as_str())?;
                history::forget(change, &self.vm)?;
            }
            Ok(())
        })
    }
}
