//! A QEMU that stands still as a whole, so that nobody can have its guest run: `Vm::freeze` does that before
//! another host may run the guest. Its monitor answers nobody; what is done with it here asks no monitor.

use crate::{
    launch,
    vm::{Handle, lives},
};
use std::{io, time::Duration};
use sys::process::PidFd;

/// How long a killed process may take to be gone.
const KILL: Duration = Duration::from_secs(3);

/// Whether this VM's QEMU is frozen. One that has ended is not.
pub fn is_frozen(handle: &Handle) -> io::Result<bool> {
    match process(handle)? {
        Some(process) => Ok(launch::while_it_is_there(process.is_frozen())?.unwrap_or(false)),
        None => Ok(false),
    }
}

/// Lets it go: only where the ownership record says that the guest is this host's. Harmless where it is not
/// frozen, or has ended.
pub fn thaw(handle: &Handle) -> io::Result<()> {
    match process(handle)? {
        Some(process) => launch::while_it_is_there(process.thaw()).map(drop),
        None => Ok(()),
    }
}

/// Ends it as it is, and takes away what belonged to it: nothing of it is of use any more.
pub fn end(handle: &Handle) -> io::Result<()> {
    if let Some(process) = process(handle)? {
        launch::kill(&process);
        if !process.wait(KILL)? {
            let why = format!("process {} does not end even when it is killed", process.pid());
            return Err(io::Error::other(why));
        }
    }
    handle.belongings.remove();
    Ok(())
}

fn process(handle: &Handle) -> io::Result<Option<PidFd>> {
    if !lives(handle)? {
        return Ok(None);
    }
    let process = launch::while_it_is_there(PidFd::open(handle.pid))?;
    // Held first, then looked at again: its number may have come to mean another one in between.
    Ok(process.filter(|_| lives(handle).unwrap_or(false)))
}
