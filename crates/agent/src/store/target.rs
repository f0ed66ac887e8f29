//! The target's journal: what this host must do with an arriving guest after a crash.

use super::{
    ArrivalRecord, Store, StoreError, Trouble, decode, encode, entries, missing, ownership, spools, vms,
};
use ports::{Claim, RunState, SpoolRecord, TargetJournal};
use redb::{ReadTransaction, ReadableTable, TableDefinition, WriteTransaction};
use std::io;
use units::{MemorySet, MigrationId};

/// VM name → [`ArrivalRecord`].
const ARRIVALS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("arrivals");
/// VM name → the missing set.
const MISSING: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("missing");

pub(super) fn prepare(change: &WriteTransaction) -> Result<(), Trouble> {
    change.open_table(ARRIVALS)?;
    change.open_table(MISSING)?;
    Ok(())
}

pub(super) fn forget(change: &WriteTransaction, vm: &str) -> Result<(), Trouble> {
    change.open_table(ARRIVALS)?.remove(vm)?;
    change.open_table(MISSING)?.remove(vm)?;
    spools::forget(change, vm)
}

pub(super) fn put(change: &WriteTransaction, vm: &str, arrival: &ArrivalRecord) -> Result<(), Trouble> {
    change.open_table(ARRIVALS)?.insert(vm, encode(arrival)?.as_slice())?;
    Ok(())
}

fn get(
    change: &WriteTransaction,
    vm: &str,
    migration: MigrationId,
) -> Result<Option<ArrivalRecord>, Trouble> {
    let arrivals = change.open_table(ARRIVALS)?;
    let row: Option<ArrivalRecord> = arrivals.get(vm)?.map(|row| decode(row.value())).transpose()?;
    Ok(row.filter(|arrival| arrival.migration == migration))
}

/// Whether the arrival of this VM is not over.
pub(super) fn is_arriving(change: &WriteTransaction, vm: &str) -> Result<bool, Trouble> {
    Ok(change.open_table(ARRIVALS)?.get(vm)?.is_some())
}

pub(super) fn entry(look: &ReadTransaction, vm: &str) -> Result<Option<ArrivalRecord>, Trouble> {
    look.open_table(ARRIVALS)?.get(vm)?.map(|row| decode(row.value())).transpose()
}

/// This host has claimed the VM.
pub(super) fn claimed(change: &WriteTransaction, claim: &Claim) -> Result<(), Trouble> {
    let Some(mut arrival) = get(change, &claim.vm, claim.migration)? else {
        return Ok(());
    };
    arrival.claimed = true;
    arrival.claiming = false;
    put(change, &claim.vm, &arrival)
}

/// Whether a shared record may say by now that this host owns the VM.
pub(super) fn claiming(
    change: &WriteTransaction,
    vm: &str,
    migration: MigrationId,
    claiming: bool,
) -> Result<bool, Trouble> {
    let Some(mut arrival) = get(change, vm, migration)? else { return Ok(false) };
    arrival.claiming = claiming;
    put(change, vm, &arrival)?;
    Ok(true)
}

/// One VM's way to this host: its journal.
pub struct Arrival {
    store: Store,
    vm: String,
    migration: MigrationId,
}

impl Store {
    /// All VMs with an entry in the target's journal.
    pub fn arrivals(&self) -> Result<Vec<(String, ArrivalRecord)>, StoreError> {
        self.look("read the journal of migrations to here", |look| entries(look, ARRIVALS))
    }

    /// The journal of an arrival that was recorded before the agent was started again.
    pub fn arrival(&self, vm: &str) -> Result<Option<(Arrival, ArrivalRecord)>, StoreError> {
        let entry = self.look(&format!("read the journal of {vm}"), |look| entry(look, vm))?;
        Ok(entry.map(|entry| (Arrival::new(self.clone(), vm.to_owned(), entry.migration), entry)))
    }

    /// The pages that a VM missed when it started here.
    pub fn missing(&self, vm: &str) -> Result<Option<MemorySet>, StoreError> {
        self.look(&format!("read what {vm} is missing"), |look| {
            let table = look.open_table(MISSING)?;
            let Some(row) = table.get(vm)? else { return Ok(None) };
            missing::decode(row.value())
                .map(Some)
                .ok_or_else(|| Trouble::Unreadable("a damaged missing set".to_owned()))
        })
    }
}

impl Arrival {
    pub(super) fn new(store: Store, vm: String, migration: MigrationId) -> Self {
        Self { store, vm, migration }
    }

    /// Changes the entry; harmless where it is gone, because all is settled.
    fn change_arrival(&self, what: &str, how: impl FnOnce(&mut ArrivalRecord)) -> io::Result<()> {
        self.store.change(what, |change| {
            let Some(mut arrival) = get(change, &self.vm, self.migration)? else { return Ok(()) };
            how(&mut arrival);
            put(change, &self.vm, &arrival)
        })?;
        Ok(())
    }

    /// The migration did not come to its commit: the VM is forgotten here, and nobody can claim it for this
    /// host any more; the source still can for itself. Says `false`, and changes nothing, if this host has
    /// claimed it already.
    pub fn abandon(&self) -> Result<bool, StoreError> {
        self.store.change(&format!("give up the arrival of {}", self.vm), |change| {
            match get(change, &self.vm, self.migration)? {
                Some(arrival) if arrival.claimed || arrival.claiming => return Ok(false),
                Some(_) => {
                    change.open_table(vms::VMS)?.remove(self.vm.as_str())?;
                    forget(change, &self.vm)?;
                }
                None => {}
            }
            ownership::withdraw(change, self.migration)?;
            Ok(true)
        })
    }
}

impl TargetJournal for Arrival {
    fn missing(&mut self, pages: &MemorySet) -> io::Result<()> {
        let bytes = missing::encode(pages);
        let what = format!("record what {} is missing", self.vm);
        let there = self.store.change(&what, |change| {
            let Some(mut arrival) = get(change, &self.vm, self.migration)? else { return Ok(false) };
            arrival.incomplete = true;
            put(change, &self.vm, &arrival)?;
            change.open_table(MISSING)?.insert(self.vm.as_str(), bytes.as_slice())?;
            if pages.is_empty() {
                // Of an announcement that was taken back: the file's later parts are of a guest that ran on.
                spools::forget(change, &self.vm)?;
            }
            Ok(true)
        })?;
        if there { Ok(()) } else { Err(io::Error::other(format!("cannot {what}: its arrival was given up"))) }
    }

    fn goes_on(&mut self, state: RunState) -> io::Result<()> {
        self.change_arrival(&format!("record what {} does here", self.vm), |arrival| {
            arrival.goes_on = state;
        })
    }

    fn went_on(&mut self) -> io::Result<()> {
        self.change_arrival(&format!("record that {} went on", self.vm), |arrival| arrival.went_on = true)
    }

    fn spool(&mut self, record: &SpoolRecord) -> io::Result<()> {
        let what = format!("record where the spool of {} is", self.vm);
        let there = self.store.change(&what, |change| {
            let there = get(change, &self.vm, self.migration)?.is_some();
            if there {
                spools::put(change, &self.vm, record)?;
            }
            Ok(there)
        })?;
        if there { Ok(()) } else { Err(io::Error::other(format!("cannot {what}: its arrival was given up"))) }
    }

    /// The VM is forgotten here, and nobody can claim it for this host any more; the source still can for
    /// itself, as long as it may have to.
    fn abandoned(&mut self, source_may_ask: bool) -> io::Result<()> {
        if !self.abandon()? {
            return Err(io::Error::other(format!(
                "{} is claimed by this host and cannot be given up",
                self.vm
            )));
        }
        if !source_may_ask {
            self.store.forget_offer(self.migration)?;
        }
        Ok(())
    }

    /// Once the VM is claimed and nothing is missing, its arrival is over and the journal's entry goes.
    fn settled(&mut self) -> io::Result<()> {
        self.store.change(&format!("record that {} is complete", self.vm), |change| {
            let Some(mut arrival) = get(change, &self.vm, self.migration)? else { return Ok(()) };
            if arrival.claimed {
                return forget(change, &self.vm);
            }
            arrival.incomplete = false;
            change.open_table(MISSING)?.remove(self.vm.as_str())?;
            put(change, &self.vm, &arrival)
        })?;
        Ok(())
    }
}
