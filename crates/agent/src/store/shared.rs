//! What this host knows of a record that all hosts share: the newest epoch of each VM that it has seen there,
//! so that a record from an old backup is noticed.

use super::{Store, StoreError, Trouble, decode, encode, ownership, records::epoch};
use ports::OwnershipRecord;
use redb::{TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};
use units::Epoch;

/// VM name → [`LastSeen`].
const SHARED: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("shared");

#[derive(Debug, Serialize, Deserialize)]
struct LastSeen {
    /// In which record.
    identity: String,
    #[serde(with = "epoch")]
    epoch: Epoch,
}

pub(super) fn prepare(change: &WriteTransaction) -> Result<(), Trouble> {
    change.open_table(SHARED)?;
    Ok(())
}

impl Store {
    /// The shared record of this identity says so.
    pub fn note_shared(&self, identity: &str, vm: &str, record: &OwnershipRecord) -> Result<(), StoreError> {
        self.change(&format!("record who owns {vm}"), |change| {
            ownership::note(change, vm, record)?;
            let seen = LastSeen { identity: identity.to_owned(), epoch: record.epoch };
            change.open_table(SHARED)?.insert(vm, encode(&seen)?.as_slice())?;
            Ok(())
        })
    }

    /// The newest epoch of the VM that was seen in the record of this identity.
    pub fn seen_shared(&self, identity: &str, vm: &str) -> Result<Option<Epoch>, StoreError> {
        self.look(&format!("look up the owner of {vm}"), |look| {
            let row =
                look.open_table(SHARED)?.get(vm)?.map(|row| decode::<LastSeen>(row.value())).transpose()?;
            Ok(row.filter(|seen| seen.identity == identity).map(|seen| seen.epoch))
        })
    }
}
