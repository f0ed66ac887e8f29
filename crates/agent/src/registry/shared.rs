//! The record that all hosts share, if they do: a VM that runs here must be this host's there, too.

use crate::{refusal::RefusalKind, store::Store};
use ports::shared::{NOBODY, SharedRecord, not_behind};
use ports::{Claimed, OwnershipRecord};
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex},
};
use tracing::{error, info};
use units::Locked;

/// The record, and what it said of this host's VMs.
pub(super) struct SharedRecords {
    record: Option<Arc<dyn SharedRecord>>,
    /// VMs that are here and belong to another host.
    others: Mutex<HashMap<String, String>>,
}

impl SharedRecords {
    pub(super) fn new(record: Option<Arc<dyn SharedRecord>>) -> Self {
        Self { record, others: Mutex::default() }
    }

    pub(super) fn record(&self) -> Option<&Arc<dyn SharedRecord>> {
        self.record.as_ref()
    }

    /// The host to which a VM that is here belongs, by the record.
    pub(super) fn owned_by_other(&self, vm: &str) -> Option<String> {
        self.others.locked().get(vm).cloned()
    }

    fn others(&self, vm: &str, owner: Option<String>) {
        let mut others = self.others.locked();
        match owner {
            Some(owner) => others.insert(vm.to_owned(), owner),
            None => others.remove(vm),
        };
    }

    /// The VM becomes this host's, before anything is started for it.
    pub(super) fn take(
        &self,
        store: &Store,
        vm: &str,
        fenced: Option<&str>,
    ) -> Result<(), (RefusalKind, String)> {
        let Some(record) = &self.record else { return Ok(()) };
        let unknown = |error: io::Error| {
            let why = format!("the ownership record cannot say whether it belongs to another host: {error}");
            (RefusalKind::Failed, why)
        };
        let identity = record.identity().map_err(unknown)?;
        let known = store.seen_shared(&identity, vm).map_err(|e| unknown(e.into()))?;
        match record.start(vm, store.host(), fenced, known).map_err(unknown)? {
            Claimed::Yours(epoch) => {
                let now = OwnershipRecord { owner: store.host().to_owned(), epoch, migration: None };
                self.others(vm, None);
                store.note_shared(&identity, vm, &now).map_err(|e| unknown(e.into()))
            }
            Claimed::Lost(theirs) => {
                let (owner, words) = (theirs.owner, record.words());
                let why = format!(
                    "it belongs to {owner}, by {words}. Migrate it from there, or stop it there (`whimbrel \
                     stop {vm}`). If {owner} is down for good, make sure that it stays off, then: whimbrel \
                     run FILE --i-have-fenced {owner}"
                );
                Err((RefusalKind::Conflict, why))
            }
        }
    }

    /// The VM has ended here.
    pub(super) fn end(&self, store: &Store, vm: &str) -> io::Result<()> {
        let Some(record) = &self.record else { return Ok(()) };
        let identity = record.identity()?;
        record.end(vm, store.host(), store.seen_shared(&identity, vm)?)?;
        self.others(vm, None);
        Ok(())
    }

    /// What the record says of a VM that is here.
    pub(super) fn look(&self, store: &Store, vm: &str) -> io::Result<Option<OwnershipRecord>> {
        let Some(record) = &self.record else { return Ok(None) };
        let known = store.seen_shared(&record.identity()?, vm)?;
        let found = record.look(vm)?;
        not_behind(&record.words(), vm, found.as_ref(), known)?;
        Ok(found)
    }

    /// Writes that down. Says whether it settles whose the VM is; otherwise the record is to be told, as when
    /// all hosts have only just begun to share one.
    pub(super) fn believe(&self, store: &Store, vm: &str, said: Option<OwnershipRecord>) -> io::Result<bool> {
        let Some(record) = &self.record else { return Ok(true) };
        let Some(said) = said.filter(|said| said.owner != NOBODY) else { return Ok(false) };
        if said.owner == store.host() {
            info!(vm, epoch = %said.epoch, "it is this host's, also by the shared record");
            self.others(vm, None);
            store.note_shared(&record.identity()?, vm, &said)?;
        } else {
            error!(vm, owner = said.owner, epoch = %said.epoch, "it is here, and by the shared record \
                                                                 another host's");
            self.others(vm, Some(said.owner));
        }
        Ok(true)
    }
}
