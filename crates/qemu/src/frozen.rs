//! A QEMU that stands still as a whole, so that nobody can have its guest run: from `save` on, until its
//! guest is given back or is gone for good. Its monitor answers nobody; what is done with it here asks no
//! monitor.

use crate::{
    launch,
    vm::{Handle, lives},
};
use std::{
    io,
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};
use sys::{
    hold::{self, Hold},
    process::PidFd,
};

/// How long a QEMU that nobody asks for any more may take to stand still.
const FREEZE: Duration = Duration::from_secs(10);

/// A frozen process that somebody has held until just now stands still by itself within this.
const LET_GO: Duration = Duration::from_millis(200);

/// How often it is looked whether it does.
const LOOK: Duration = Duration::from_millis(5);

/// How long a killed process may take to be gone.
const KILL: Duration = Duration::from_secs(3);

/// Whether this VM's QEMU is frozen. One that has ended is not.
pub fn is_frozen(handle: &Handle) -> io::Result<bool> {
    match process(handle)? {
        Some(process) => Ok(launch::while_it_is_there(process.is_frozen())?.unwrap_or(false)),
        None => Ok(false),
    }
}

/// Has it stand still as a whole, whatever signals come, for as long as what it returns lives; and without it
/// until one does.
pub fn hold(process: &PidFd) -> io::Result<Hold> {
    process.freeze(FREEZE)?;
    Hold::begin(process, FREEZE)
}

/// The same of one that is frozen; one that runs is left alone.
pub fn hold_if_frozen(handle: &Handle) -> io::Result<Option<Hold>> {
    let Some(process) = process(handle)? else { return Ok(None) };
    let end = Instant::now() + LET_GO;
    while !process.is_frozen()? {
        if Instant::now() > end {
            return Ok(None);
        }
        sleep(LOOK);
    }
    hold(&process).map(Some)
}

/// Whether it can still do anything, frozen or not: not once it has ended, nor once it was killed, gone or
/// not. It is left as it was.
pub fn can_run(handle: &Handle) -> io::Result<bool> {
    match process(handle)? {
        Some(process) => hold::can_run(&Arc::new(process), KILL),
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

/// Kills it, also where it is held, and waits for at most so long until it is gone. A frozen one has nothing
/// done any more once this returns, gone or not.
pub fn kill(handle: &Handle, wait: Duration) -> io::Result<()> {
    let Some(process) = process(handle)? else { return Ok(()) };
    launch::while_it_is_there(process.kill())?;
    process.wait(wait).map(drop)
}

/// Ends it as it is, and takes away what belonged to it: nothing of it is of use any more.
pub fn end(handle: &Handle, hold: Option<Hold>) -> io::Result<()> {
    if let Some(process) = process(handle)? {
        launch::kill(&process);
        // A killed process that is held does nothing more, and has not ended before it is let go.
        drop(hold);
        if !process.wait(KILL)? {
            let why = format!("process {} does not end even when it is killed", process.pid());
            return Err(io::Error::other(why));
        }
    }
    handle.belongings.remove_all();
    Ok(())
}

fn process(handle: &Handle) -> io::Result<Option<PidFd>> {
    if !lives(handle)? {
        return Ok(None);
    }
    let process = launch::while_it_is_there(PidFd::open(handle.pid))?;
    // Held first, then looked at again: its number may have come to mean another one in between.
    Ok(if lives(handle)? { process } else { None })
}
