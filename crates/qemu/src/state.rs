//! The device state, out of one QEMU and into another.
//!
//! Out: `xen-save-devices-state` with `live=true`, which has nothing to do with Xen. It writes all but RAM,
//! whatever kind of RAM it is, and inactivates the disks, which gives up their locks.
//!
//! In: `migrate-incoming` from a socket. Not `xen-load-devices-state`: outside of Xen that one aborts QEMU
//! (seen on 7.2 and 10.0: it ends an incoming migration that was never begun). The stream lacks two sections
//! of an ordinary one: the configuration at its beginning, which `migration.send-configuration=off` makes
//! QEMU not expect, and a description at its end, which we append. Between its head and its first section go
//! the RAM blocks that QEMU keeps private (see [`crate::private`]), most of them long before the rest.

use crate::qmp::{Qmp, QmpError};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};
use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, Write},
    net::Shutdown,
    os::fd::{AsFd, AsRawFd},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

/// How long QEMU may take to load it. It reads guest memory, which in a post-copy may have to come first.
const LOAD: Duration = Duration::from_secs(60);

/// The largest device state that is taken: two hundred times that of a `q35` with everything on it.
const LARGEST: u64 = 256 << 20;

/// Saves the device state, with [`Exit::arguments`].
pub(crate) const SAVE: &str = "xen-save-devices-state";

/// The name of an export that never comes to be.
const EXPORT: &str = "whimbrel-activate";

/// `QEMU_VM_VMDESCRIPTION`, its length, and an empty description: without it QEMU complains on its standard
/// error.
const DESCRIPTION: &[u8] = b"\x06\0\0\0\x02{}";

/// What a stream begins with: `QEVM`, version 3.
const HEAD: &[u8] = b"QEVM\0\0\0\x03";

/// How long a QEMU that waits may take to read what is sent ahead of the pause.
const AHEAD: Duration = Duration::from_secs(20);

/// How often we look whether it has.
const LOOK: Duration = Duration::from_millis(1);

/// Why a device state did not get out or in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("{what}: {cause}")]
    System { what: &'static str, cause: io::Error },
    #[error(
        "this QEMU does not offer xen-save-devices-state, by which the device state is saved without memory; \
         use a QEMU that was built with it (Debian's and upstream's are)"
    )]
    Unsupported,
    #[error("QEMU could not load the state: {0}")]
    Failed(String),
    #[error("the device state does not begin as QEMU's do")]
    NoState,
    #[error("QEMU does not read what is sent to it ahead of its device state")]
    Deaf,
    #[error("QEMU wrote {0} bytes of device state, more than any VM has")]
    TooLarge(u64),
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> StateError {
    move |cause| StateError::System { what, cause }
}

/// Where a QEMU writes its device state to.
#[derive(Debug)]
pub(crate) struct Exit {
    file: File,
    set: i64,
}

/// Gives a QEMU a place for its device state, while its guest still runs.
pub(crate) fn open_exit(qmp: &mut Qmp) -> Result<Exit, StateError> {
    let memfd = memfd_create("whimbrel-state", MemfdFlags::CLOEXEC);
    let file = File::from(memfd.map_err(|error| system("make a memfd")(error.into()))?);
    // QEMU compares access modes: it opens for writing only, and takes no descriptor that can do more.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let write_only = OpenOptions::new().write(true).open(path).map_err(system("reopen a memfd"))?;
    let set = qmp.add_fd(write_only.as_fd())?;
    Ok(Exit { file, set })
}

/// Takes the place back from a QEMU that goes on.
pub(crate) fn close_exit(qmp: &mut Qmp, exit: Exit) -> Result<(), QmpError> {
    qmp.remove_fd_set(exit.set)
}

impl Exit {
    /// What to say with [`SAVE`]: the device state of a stopped guest, there. Its disks are inactive
    /// afterwards.
    pub(crate) fn arguments(&self) -> Value {
        json!({ "filename": format!("/dev/fdset/{}", self.set) })
    }

    /// Empties it, before it is saved there.
    pub(crate) fn clear(&mut self) -> Result<(), StateError> {
        self.file.set_len(0).and_then(|()| self.file.rewind()).map_err(system("empty a memfd"))
    }
}

/// What QEMU has written there.
pub(crate) fn take_saved(exit: &mut Exit) -> Result<Vec<u8>, StateError> {
    let bytes = exit.file.metadata().map_err(system("look at a memfd"))?.len();
    if bytes > LARGEST {
        return Err(StateError::TooLarge(bytes));
    }
    let mut stream = Vec::with_capacity(bytes as usize);
    // No more than it has just been found to be: a QEMU that goes on writing is none that waits for us.
    Read::by_ref(&mut exit.file).take(bytes).read_to_end(&mut stream).map_err(system("read a memfd"))?;
    Ok(stream)
}

/// Has the disks of a guest that stands still be its own again, as `cont` does for one that goes on: `save`
/// has inactivated them, and QEMU aborts if somebody writes to an inactive one, with a block job for example.
/// Harmless where they are active.
pub(crate) fn activate_disks(qmp: &mut Qmp) -> Result<(), QmpError> {
    match qmp.execute("blockdev-set-active", json!({ "active": true })) {
        Err(error) if error.is_unknown_command() => {}
        answer => return answer.map(drop),
    }
    // Before QEMU 10 there is no word for it, but an export over NBD activates the node that it is asked for,
    // and is refused only then, because there is no NBD server.
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true }))?;
    for node in nodes.as_array().into_iter().flatten().filter_map(|node| node["node-name"].as_str()) {
        let export = json!({ "type": "nbd", "id": EXPORT, "node-name": node });
        match qmp.execute("block-export-add", export) {
            Ok(_) => drop(qmp.execute("block-export-del", json!({ "id": EXPORT, "mode": "hard" }))?),
            Err(QmpError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Where a waiting QEMU reads its device state from.
#[derive(Debug)]
pub(crate) struct Door {
    ours: UnixStream,
    /// Whether the stream has begun.
    begun: bool,
}

/// Lets a QEMU in state `inmigrate` wait for its device state, so that nothing but the state itself has to be
/// said while the guest stands still.
pub(crate) fn open_door(qmp: &mut Qmp) -> Result<Door, StateError> {
    let (ours, theirs) = UnixStream::pair().map_err(system("make a socket pair"))?;
    qmp.get_fd("whimbrel-state", theirs.as_fd())?;
    qmp.execute("migrate-incoming", json!({ "uri": "fd:whimbrel-state" }))?;
    Ok(Door { ours, begun: false })
}

/// Makes a waiting QEMU's heap as large as loading a device state needs it, about 2.5 MiB. Fresh memory costs
/// a page fault for each of 640 pages, 5 to 25 µs each, which would come while the guest stands still. The
/// answer to this question is built of some 19 MiB of small objects, which glibc keeps: loading then takes 6
/// faults (`./dev bench`, `downtime`).
pub(crate) fn widen_heap(qmp: &mut Qmp) -> Result<(), QmpError> {
    qmp.execute("query-qmp-schema", json!({})).map(drop)
}

/// Sends sections of the stream that need not wait for the device state. Returns once QEMU has taken them, or
/// says why it does not.
pub(crate) fn feed_ahead(qmp: &mut Qmp, door: &mut Door, sections: &[u8]) -> Result<(), StateError> {
    let failed = system("write to QEMU");
    let mut write = || -> io::Result<()> {
        door.ours.set_write_timeout(Some(AHEAD))?;
        if !door.begun {
            door.ours.write_all(HEAD)?;
        }
        door.ours.write_all(sections)?;
        door.ours.set_write_timeout(None)
    };
    let written = write();
    door.begun = true;
    let end = Instant::now() + AHEAD;
    while written.is_ok() && sys::socket::unread(&door.ours).map_err(system("look at a socket"))? > 0 {
        if Instant::now() > end {
            return Err(StateError::Deaf);
        }
        thread::sleep(LOOK);
    }
    // Its main loop reads the stream and answers us in turns: what it has read it has also looked at by then.
    let answer = qmp.execute("query-migrate", json!({}))?;
    if answer["status"] == "failed" {
        return Err(StateError::Failed(why_failed(&answer)));
    }
    written.map_err(failed)
}

/// Loads a device state into a QEMU that waits for it, with more sections before it. It is `paused`
/// afterwards.
pub(crate) fn load(qmp: &mut Qmp, door: Door, sections: &[u8], stream: &[u8]) -> Result<(), StateError> {
    let state = stream.strip_prefix(HEAD).ok_or(StateError::NoState)?;
    let head = if door.begun { &[] } else { HEAD };
    let stopper = door.ours.try_clone().map_err(system("duplicate a socket"))?;
    thread::scope(|scope| {
        let feeder = scope.spawn(move || feed(door.ours, &[head, sections, state]));
        let loaded = wait_loaded(qmp);
        if loaded.is_err() {
            // Unblocks the feeder. It fails when QEMU has ended, which unblocks it as well.
            let _ = stopper.shutdown(Shutdown::Both);
        }
        let fed = feeder.join().unwrap_or_else(|_| Err(io::Error::other("the feeding thread panicked")));
        loaded?;
        fed.map_err(system("write the device state to QEMU"))
    })
}

fn feed(mut socket: UnixStream, parts: &[&[u8]]) -> io::Result<()> {
    for part in parts {
        socket.write_all(part)?;
    }
    // QEMU closes its end as soon as it has what it needs, perhaps before it read the description.
    match socket.write_all(DESCRIPTION).and_then(|()| socket.shutdown(Shutdown::Write)) {
        Err(error)
            if error.kind() == io::ErrorKind::BrokenPipe || error.kind() == io::ErrorKind::NotConnected =>
        {
            Ok(())
        }
        other => other,
    }
}

pub(crate) fn wait_loaded(qmp: &mut Qmp) -> Result<(), StateError> {
    let ended = |event: &crate::qmp::Event| {
        event.name == "MIGRATION" && matches!(event.data["status"].as_str(), Some("completed" | "failed"))
    };
    let Some(event) = qmp.wait_event(LOAD, ended)? else {
        return Err(StateError::Failed(format!("it took more than {LOAD:?}")));
    };
    if event.data["status"] != "completed" {
        let answer = qmp.execute("query-migrate", json!({}))?;
        return Err(StateError::Failed(why_failed(&answer)));
    }
    Ok(())
}

fn why_failed(answer: &serde_json::Value) -> String {
    answer["error-desc"].as_str().unwrap_or("it does not say why").to_owned()
}
