//! The device state, out of one QEMU and into another.
//!
//! Out: `xen-save-devices-state` with `live=true`, which has nothing to do with Xen. It writes all but RAM, whatever kind
//! of RAM it is, and inactivates the disks, which gives up their locks.
//!
//! In: `migrate-incoming` from a socket. Not `xen-load-devices-state`: outside of Xen that one aborts QEMU (seen on 7.2
//! and 10.0: it ends an incoming migration that was never begun). The stream lacks two sections of an ordinary one: the
//! configuration at its beginning, which `migration.send-configuration=off` makes QEMU not expect, and a
//! description at its end, which we append.

use crate::qmp::{Qmp, QmpError};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;
use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, Write},
    net::Shutdown,
    os::fd::{AsFd, AsRawFd},
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

/// How long QEMU may take to write it: milliseconds, unless its disks are slow to inactivate.
const SAVE: Duration = Duration::from_secs(60);

/// How long QEMU may take to load it. It reads guest memory, which in a post-copy may have to come first.
const LOAD: Duration = Duration::from_secs(60);

/// The largest device state that is taken: two hundred times that of a `q35` with everything on it.
const LARGEST: u64 = 256 << 20;

/// `QEMU_VM_VMDESCRIPTION`, its length, and an empty description: without it QEMU complains on its standard error.
const DESCRIPTION: &[u8] = b"\x06\0\0\0\x02{}";

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

/// The device state of a stopped guest. Its disks are inactive afterwards.
pub(crate) fn save(qmp: &mut Qmp, exit: &mut Exit) -> Result<Vec<u8>, StateError> {
    exit.file.set_len(0).and_then(|()| exit.file.rewind()).map_err(system("empty a memfd"))?;
    let arguments = json!({ "filename": format!("/dev/fdset/{}", exit.set), "live": true });
    let saved = qmp.execute_within("xen-save-devices-state", arguments, SAVE);
    saved.map_err(|error| if error.is_unknown_command() { StateError::Unsupported } else { error.into() })?;
    let bytes = exit.file.metadata().map_err(system("look at a memfd"))?.len();
    if bytes > LARGEST {
        return Err(StateError::TooLarge(bytes));
    }
    let mut stream = Vec::with_capacity(bytes as usize);
    // No more than it has just been found to be: a QEMU that goes on writing is none that waits for us.
    Read::by_ref(&mut exit.file).take(bytes).read_to_end(&mut stream).map_err(system("read a memfd"))?;
    Ok(stream)
}

/// Where a waiting QEMU reads its device state from.
#[derive(Debug)]
pub(crate) struct Door(UnixStream);

/// Lets a QEMU in state `inmigrate` wait for its device state, so that nothing but the state itself has to be said while
/// the guest stands still.
pub(crate) fn open_door(qmp: &mut Qmp) -> Result<Door, StateError> {
    let (ours, theirs) = UnixStream::pair().map_err(system("make a socket pair"))?;
    qmp.get_fd("whimbrel-state", theirs.as_fd())?;
    qmp.execute("migrate-incoming", json!({ "uri": "fd:whimbrel-state" }))?;
    Ok(Door(ours))
}

/// Makes a waiting QEMU's heap as large as loading a device state needs it, about 2.5 MiB. Fresh memory costs a page fault for
/// each of 640 pages, 5 to 25 µs each, which would come while the guest stands still. The answer to this question is built
/// of some 19 MiB of small objects, which glibc keeps: loading then takes 6 faults (`./dev bench`, `downtime`).
pub(crate) fn widen_heap(qmp: &mut Qmp) -> Result<(), QmpError> {
    qmp.execute("query-qmp-schema", json!({})).map(drop)
}

/// Loads a device state into a QEMU that waits for it. It is `paused` afterwards.
pub(crate) fn load(qmp: &mut Qmp, Door(ours): Door, stream: &[u8]) -> Result<(), StateError> {
    let stopper = ours.try_clone().map_err(system("duplicate a socket"))?;
    thread::scope(|scope| {
        let feeder = scope.spawn(move || feed(ours, stream));
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

fn feed(mut socket: UnixStream, stream: &[u8]) -> io::Result<()> {
    socket.write_all(stream)?;
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
        return Err(StateError::Failed(
            answer["error-desc"].as_str().unwrap_or("it does not say why").to_owned(),
        ));
    }
    Ok(())
}
