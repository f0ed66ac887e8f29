//! After a start: the shared record knows of the VMs that are here, and the agent whether they are its own by
//! that record.

use crate::registry::Registry;
use std::{io, sync::Arc, thread, time::Duration};
use tracing::warn;

/// When a record that does not answer is asked again.
const AGAIN: Duration = Duration::from_secs(10);

/// Asks on a thread of its own, which ends with the process, until the record has answered for every VM.
pub(crate) fn begin(registry: Arc<Registry>) -> io::Result<()> {
    if registry.record().is_none() {
        return Ok(());
    }
    let work = move || {
        let mut told = false;
        while let Err(error) = publish(&registry) {
            if !std::mem::replace(&mut told, true) {
                warn!(%error, "the shared ownership record cannot be asked about all VMs; trying again");
            }
            thread::sleep(AGAIN);
        }
    };
    thread::Builder::new().name("publish".into()).spawn(work).map(drop)
}

fn publish(registry: &Registry) -> io::Result<()> {
    let mut all = Ok(());
    for vm in registry.store().vms()? {
        // One that cannot be asked about does not keep the others waiting.
        if let Err(error) = registry.publish(&vm.name) {
            all = Err(error);
        }
    }
    all
}
