//! The last word on each VM's last migration, so that it can be asked for after the agent was started again.

use super::{Store, StoreError, Trouble, decode, encode};
use api::Report;
use redb::{TableDefinition, WriteTransaction};

/// VM name → [`Report`].
const REPORTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("reports");

pub(super) fn prepare(change: &WriteTransaction) -> Result<(), Trouble> {
    change.open_table(REPORTS)?;
    Ok(())
}

impl Store {
    /// Keeps `report` in the place of the VM's last one.
    pub fn keep_report(&self, report: &Report) -> Result<(), StoreError> {
        self.change(&format!("keep the report on {}", report.vm), |change| {
            change.open_table(REPORTS)?.insert(report.vm.as_str(), encode(report)?.as_slice())?;
            Ok(())
        })
    }

    /// How the VM's last migration away from this host ended.
    pub fn last_report(&self, vm: &str) -> Result<Option<Report>, StoreError> {
        self.look(&format!("look up the report on {vm}"), |look| {
            look.open_table(REPORTS)?.get(vm)?.map(|row| decode(row.value())).transpose()
        })
    }
}
