//! Files on datastores: what an arriving guest can live on if its source is lost, and where files of ours may
//! have been left.

use super::{Store, StoreError, Trouble, decode, encode, missing};
use ports::SpoolRecord;
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// VM name → [`Row`].
const SPOOLS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("spools");
/// VM name → missing pages of which only later extents count.
const OUTDATED: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("spools_outdated");
/// Directories that files were made in.
const DIRECTORIES: TableDefinition<'_, &str, ()> = TableDefinition::new("spool_directories");

/// Directories that are remembered, at most: more than a host has datastores.
const MOST_DIRECTORIES: usize = 64;

#[derive(Serialize, Deserialize)]
struct Row {
    directory: PathBuf,
    secret: [u8; 32],
    floor: u64,
    end: u64,
}

pub(super) fn prepare(change: &WriteTransaction) -> Result<(), Trouble> {
    change.open_table(SPOOLS)?;
    change.open_table(OUTDATED)?;
    change.open_table(DIRECTORIES)?;
    Ok(())
}

pub(super) fn put(change: &WriteTransaction, vm: &str, record: &SpoolRecord) -> Result<(), Trouble> {
    let SpoolRecord { directory, secret, floor, end, outdated } = record;
    let row = Row { directory: directory.clone(), secret: *secret, floor: *floor, end: *end };
    change.open_table(SPOOLS)?.insert(vm, encode(&row)?.as_slice())?;
    change.open_table(OUTDATED)?.insert(vm, missing::encode(outdated).as_slice())?;
    Ok(())
}

pub(super) fn forget(change: &WriteTransaction, vm: &str) -> Result<(), Trouble> {
    change.open_table(SPOOLS)?.remove(vm)?;
    change.open_table(OUTDATED)?.remove(vm)?;
    Ok(())
}

impl Store {
    /// Where a VM that lacks memory can find it if its source is lost.
    pub fn spool(&self, vm: &str) -> Result<Option<SpoolRecord>, StoreError> {
        self.look(&format!("read where the spool of {vm} is"), |look| {
            let (spools, outdated) = (look.open_table(SPOOLS)?, look.open_table(OUTDATED)?);
            let (Some(row), Some(outdated)) = (spools.get(vm)?, outdated.get(vm)?) else { return Ok(None) };
            let Row { directory, secret, floor, end } = decode(row.value())?;
            let outdated = missing::decode(outdated.value())
                .ok_or_else(|| Trouble::Unreadable("a damaged set of pages".to_owned()))?;
            Ok(Some(SpoolRecord { directory, secret, floor, end, outdated }))
        })
    }

    /// A file is about to be made in this directory: should it be left behind, it is looked for there.
    pub fn spools_in(&self, directory: &Path) -> Result<(), StoreError> {
        let Some(name) = directory.to_str() else { return Ok(()) };
        let known = self.spool_directories()?;
        if known.len() >= MOST_DIRECTORIES || known.iter().any(|known| known == directory) {
            return Ok(());
        }
        self.change("remember a spool's directory", |change| {
            change.open_table(DIRECTORIES)?.insert(name, ())?;
            Ok(())
        })
    }

    /// All of which that was said.
    pub fn spool_directories(&self) -> Result<Vec<PathBuf>, StoreError> {
        self.look("read the spools' directories", |look| {
            let table = look.open_table(DIRECTORIES)?;
            table.iter()?.map(|row| Ok(PathBuf::from(row?.0.value()))).collect()
        })
    }
}
