//! A VM as it is shown.

use super::Registry;
use crate::{
    api::{VmInfo, VmState},
    hypervisor::Condition,
    refusal::Refusal,
    store::{DepartureState, Standing, StoreError, VmRecord},
};
use ports::RunState;

impl Registry {
    /// All VMs of this host, by name.
    pub fn list(&self) -> Result<Vec<VmInfo>, Refusal> {
        let all = self.store.vms().map_err(|e| self.store_failed(e))?;
        all.iter().map(|vm| self.view(vm, false).map_err(|e| self.store_failed(e))).collect()
    }

    /// One VM.
    pub fn show(&self, name: &str) -> Result<VmInfo, Refusal> {
        self.view(&self.find(name)?, false).map_err(|e| self.store_failed(e))
    }

    /// One VM whose lease the caller holds.
    pub(super) fn show_leased(&self, name: &str) -> Result<VmInfo, Refusal> {
        self.view(&self.find(name)?, true).map_err(|e| self.store_failed(e))
    }

    fn view(&self, vm: &VmRecord, leased: bool) -> Result<VmInfo, StoreError> {
        let owner = self.store.owner(&vm.name)?;
        let (state, note) = match self.bound(vm)? {
            Some(bound) => bound,
            None => {
                // Whoever holds it asks for us.
                let lease = if leased { None } else { self.leases.look(&vm.name) };
                let alive = vm.process.is_some_and(|process| process.is_alive());
                if lease.is_none() && !leased && alive {
                    // Somebody talks to its QEMU; what it does meanwhile is theirs to say.
                    (VmState::Busy, None)
                } else {
                    match self.condition(vm) {
                        Condition::Running => (VmState::Running, None),
                        Condition::Paused(status) => (VmState::Paused, Some(format!("QEMU says: {status}"))),
                        Condition::Gone(why) => {
                            let hint = format!("{why}; `whimbrel stop {}` forgets it", vm.name);
                            (VmState::Gone, Some(hint))
                        }
                        Condition::Unknown(why) => (VmState::Unknown, Some(why)),
                    }
                }
            }
        };
        let note = match self.shared.owned_by_other(&vm.name) {
            Some(owner) => {
                Some(format!("the ownership record says that it belongs to {owner}: stop it here or there"))
            }
            None => note,
        };
        Ok(VmInfo {
            name: vm.name.clone(),
            state,
            note,
            pid: vm.process.map(|process| process.pid),
            qmp: vm.qmp.clone(),
            origin: vm.origin,
            owner: owner.as_ref().map(|record| record.owner.clone()),
            epoch: owner.map(|record| record.epoch.0),
            migration: None,
            different: vec![],
            recipe: vm.recipe.clone(),
            ports: vm.belongings["ports"].as_array().cloned().unwrap_or_default(),
        })
    }

    /// What a journal says of the VM, if it is on its way.
    fn bound(&self, vm: &VmRecord) -> Result<Option<(VmState, Option<String>)>, StoreError> {
        if let Standing::Arriving { from, .. } = &vm.standing {
            return Ok(Some((VmState::Arriving, Some(format!("{from} owns it until the switchover")))));
        }
        if let Some((_, entry)) = self.store.arrival(&vm.name)? {
            let note = format!("came from {}, which still has memory of it", entry.from);
            let state = if entry.goes_on == RunState::Running { VmState::Running } else { VmState::Paused };
            return Ok(Some((state, Some(note).filter(|_| entry.incomplete))));
        }
        Ok(self.store.departure_of(&vm.name)?.map(|entry| match entry.state {
            DepartureState::Pausing => (VmState::Busy, None),
            DepartureState::Fenced { .. } => {
                let note = match entry.record.as_str() {
                    "" => format!("{} has not said yet whether it owns it", entry.to),
                    shared => format!(
                        "the ownership record ({shared}) has not said yet whether {} owns it",
                        entry.to
                    ),
                };
                (VmState::InDoubt, Some(note))
            }
            DepartureState::Gone { .. } => {
                let note = format!("runs on {}; its memory is kept here until all of it is there", entry.to);
                (VmState::Left, Some(note))
            }
        }))
    }
}
