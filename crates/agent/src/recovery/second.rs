//! The same for a VM that has two QEMUs of this host: which of them has the guest, and the end of the other.

use super::{ASK_AGAIN, Recovery, alive};
use crate::{
    hypervisor::Reasons,
    store::{DepartureRecord, SecondRecord, Side, VmRecord},
};
use ports::{Claim, Claimed, OwnershipRecord, SourceJournal};
use std::io;
use tracing::{error, warn};
use units::{Locked, MigrationId};

impl Recovery {
    /// The guest belongs to the second QEMU, which the VM's record names by now: it goes on there.
    pub(super) fn go_on_in_second(&self, name: &str, entry: &DepartureRecord) {
        let store = self.registry.store();
        let mut tries = 0;
        loop {
            let (vm, second) = match (store.vm(name), store.second(name)) {
                (Ok(Some(vm)), Ok(Some(second))) => (vm, second),
                (Ok(_), Ok(_)) => return error!(vm = name, "nothing is recorded of its second QEMU"),
                (Err(error), _) | (_, Err(error)) => return error!(vm = name, %error, "it cannot be read"),
            };
            // First of all nobody can have the first run any more: both map the same memory (I1).
            let hypervisor = self.registry.hypervisor();
            let ended = hypervisor.discard(&second.other_of(&vm));
            match ended.and_then(|()| hypervisor.restore(&vm, second.goes_on)) {
                Ok(()) => break,
                // Nobody can bring it back.
                Err(_) if !alive(&vm) => break,
                Err(why) => {
                    warn!(vm = name, why = why.0.join("; "), "it does not run yet in its second QEMU")
                }
            }
            if self.stop.wait(ASK_AGAIN[tries.min(ASK_AGAIN.len() - 1)]) {
                return;
            }
            tries += 1;
        }
        let vm = store.vm(name);
        let settled = vm.map_err(io::Error::from).and_then(|vm| match vm {
            Some(vm) => self.journal(&vm, entry).settled(),
            None => Ok(()),
        });
        if let Err(error) = settled {
            error!(vm = name, %error, "its move to another QEMU is not settled");
        }
    }

    /// Ends the QEMU in which the guest does not run, of a VM that has two by this migration, once its
    /// journal is settled. Where nobody has decided between them, that is the second: whoever could have
    /// claimed for it has ended.
    pub fn end_second(&self, name: &str, migration: MigrationId) {
        let store = self.registry.store();
        let ended = || -> Result<(), String> {
            let text = |error: &dyn std::fmt::Display| error.to_string();
            if store.departure_of(name).map_err(|e| text(&e))?.is_some() {
                return Ok(());
            }
            let of = |second: SecondRecord| (second.migration == migration).then_some(second);
            if store.second(name).map_err(|e| text(&e))?.and_then(of).is_none() {
                return Ok(());
            }
            store.decide_second(name, migration, Side::First).map_err(|e| text(&e))?;
            // What that has decided, or was decided before: the record and the VM's fit together.
            let second = store.second(name).map_err(|e| text(&e))?.and_then(of);
            let vm = store.vm(name).map_err(|e| text(&e))?;
            let (Some(second), Some(vm)) = (second, vm) else { return Ok(()) };
            let other = second.other_of(&vm);
            self.registry.hypervisor().discard(&other).map_err(|why| why.0.join("; "))?;
            store.end_second(name, migration).map_err(|e| text(&e))
        };
        if let Err(why) = ended() {
            warn!(vm = name, why, "the QEMU that it has left, or that waited for it, is not ended yet");
        }
    }

    /// Between two QEMUs of its own a host decides by itself. Whoever could have claimed for the second has
    /// ended with the agent or the migration before.
    ///
    /// The second is told that it has won when the first was killed, and not before. So where an agent ended
    /// between these two, the first has the guest, whoever has let it go on since (I1).
    pub(super) fn claim_for_first(&self, claim: &Claim) -> io::Result<Claimed> {
        let (store, hypervisor) = (self.registry.store(), self.registry.hypervisor());
        let epoch = claim.expected.next();
        let (migration, owner) = (claim.migration, self.registry.host().to_owned());
        let lost = Claimed::Lost(OwnershipRecord { owner, epoch, migration: Some(migration) });
        let other = || -> io::Result<Option<VmRecord>> {
            let (second, vm) = (store.second(&claim.vm)?, store.vm(&claim.vm)?);
            Ok(second.zip(vm).map(|(second, vm)| second.other_of(&vm)))
        };
        let text = |why: Reasons| io::Error::other(why.0.join("; "));
        if store.decide_second(&claim.vm, migration, Side::First)? == Side::Second {
            let first = other()?.filter(|_| self.decided_before.locked().contains(&migration));
            let can_run = first.map(|first| hypervisor.can_run(&first)).transpose().map_err(text)?;
            if can_run != Some(true) {
                return Ok(lost);
            }
            warn!(vm = claim.vm, "its first QEMU lives, so the guest never ran in the second: it stays");
            store.take_back_second(&claim.vm, migration)?;
        }
        // Both map the same memory: the second can run no more when the first is let go.
        if let Some(second) = other()? {
            hypervisor.kill(&second).map_err(text)?;
        }
        Ok(Claimed::Yours(epoch))
    }
}
