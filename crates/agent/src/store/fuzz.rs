//! A store whose rows somebody has damaged: for the crate `fuzz`, and for nothing else.
//!
//! Not behind a feature: cargo builds the workspace with all features that anybody asks for, and what is
//! tested would not be what is shipped.

use super::{
    ArrivalRecord, CACHE_BYTES, DepartureRecord, Known, Opened, Store, StoreError, VmRecord, decode, missing,
    ownership,
};
use api::{PastMigration, Report};
use redb::{Builder, TableDefinition, backends::InMemoryBackend};
use units::{MemorySet, MigrationId};

/// The key of all rows but offers.
pub const NAME: &str = "vm";

/// The key of offers.
pub const MIGRATION: MigrationId = MigrationId(1);

/// The tables, by their names.
pub const TABLES: [&str; 9] =
    ["vms", "owners", "offers", "departures", "arrivals", "missing", "reports", "history", "links"];

/// A store in memory in which these tables have these rows, as they are.
pub fn store(host: &str, rows: &[(&str, &[u8])]) -> Result<Store, StoreError> {
    let memory = || Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(InMemoryBackend::new());
    let database = Opened::by(memory);
    let refused = |why: String| StoreError::Open { dir: "memory".into(), why };
    let store = Store::over(database.map_err(|e| refused(e.to_string()))?, host)?;
    store.change("damage the rows", |change| {
        for (table, row) in rows {
            if *table == "offers" {
                let table: TableDefinition<'_, u128, &[u8]> = TableDefinition::new(table);
                change.open_table(table)?.insert(MIGRATION.0, *row)?;
            } else {
                let table: TableDefinition<'_, &str, &[u8]> = TableDefinition::new(table);
                change.open_table(table)?.insert(NAME, *row)?;
            }
        }
        Ok(())
    })?;
    Ok(store)
}

/// Whether a row of this table can be read, without a store around it.
pub fn read_row(table: &str, row: &[u8]) -> bool {
    match table {
        "vms" => decode::<VmRecord>(row).is_ok(),
        "owners" => ownership::read_owner(row),
        "offers" => ownership::read_offer(row),
        "departures" => decode::<DepartureRecord>(row).is_ok(),
        "arrivals" => decode::<ArrivalRecord>(row).is_ok(),
        "reports" => decode::<Report>(row).is_ok(),
        "history" => decode::<Vec<PastMigration>>(row).is_ok(),
        "links" => decode::<Known>(row).is_ok(),
        _ => false,
    }
}

/// A missing set from its row, if it is of no more pages.
pub fn read_missing(row: &[u8], most_pages: u64) -> Option<MemorySet> {
    missing::decode_within(row, most_pages)
}

/// A missing set as a row.
pub fn write_missing(set: &MemorySet) -> Vec<u8> {
    missing::encode(set)
}
