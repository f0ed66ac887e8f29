//! The VMs of this host.

use super::{Store, StoreError, Trouble, VmRecord, decode, encode, ownership};
use redb::{ReadableTable, TableDefinition, WriteTransaction};

/// VM name → [`VmRecord`].
pub(super) const VMS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("vms");

pub(super) fn prepare(change: &WriteTransaction) -> Result<(), Trouble> {
    change.open_table(VMS)?;
    Ok(())
}

impl Store {
    /// All VMs, by name.
    pub fn vms(&self) -> Result<Vec<VmRecord>, StoreError> {
        self.look("list the VMs", |look| {
            look.open_table(VMS)?.iter()?.map(|row| decode(row?.1.value())).collect()
        })
    }

    /// One VM.
    pub fn vm(&self, name: &str) -> Result<Option<VmRecord>, StoreError> {
        self.look(&format!("look up the VM {name}"), |look| {
            look.open_table(VMS)?.get(name)?.map(|row| decode(row.value())).transpose()
        })
    }

    /// Records a VM unless its name is taken; says whether it was recorded. A VM that belongs here
    /// (`Standing::Here`) becomes this host's in the same transaction, at an epoch that no earlier VM of this
    /// name had here.
    pub fn add_vm(&self, vm: &VmRecord) -> Result<bool, StoreError> {
        self.change(&format!("record the VM {}", vm.name), |change| {
            let mut vms = change.open_table(VMS)?;
            if vms.get(vm.name.as_str())?.is_some() {
                return Ok(false);
            }
            vms.insert(vm.name.as_str(), encode(vm)?.as_slice())?;
            if vm.standing == super::Standing::Here {
                ownership::start_here(change, &vm.name, self.host())?;
            }
            Ok(true)
        })
    }

    /// Records what has become of a VM; says whether it was there to be changed.
    pub fn update_vm(&self, name: &str, update: impl FnOnce(&mut VmRecord)) -> Result<bool, StoreError> {
        self.change(&format!("record the VM {name}"), |change| edit(change, name, update))
    }

    /// Forgets a VM that is no more, and its journals. Who owned it last stays known.
    pub fn remove_vm(&self, name: &str) -> Result<(), StoreError> {
        self.change(&format!("forget the VM {name}"), |change| {
            change.open_table(VMS)?.remove(name)?;
            super::history::forget(change, name)?;
            super::second::forget(change, name)?;
            super::source::forget(change, name)?;
            super::target::forget(change, name)
        })
    }
}

pub(super) fn edit(
    change: &WriteTransaction,
    name: &str,
    update: impl FnOnce(&mut VmRecord),
) -> Result<bool, Trouble> {
    let mut vms = change.open_table(VMS)?;
    let Some(mut vm) = vms.get(name)?.map(|row| decode::<VmRecord>(row.value())).transpose()? else {
        return Ok(false);
    };
    update(&mut vm);
    vms.insert(name, encode(&vm)?.as_slice())?;
    Ok(true)
}
