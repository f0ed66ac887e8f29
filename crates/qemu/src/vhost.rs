//! Networks whose packets a worker of the kernel's carries (`vhost=on`).
//!
//! The worker reads and writes the guest's memory through QEMU's page tables, from when QEMU's guest has set
//! its card up until QEMU's `stop`, which waits until it is done. So trackers see what it writes, missing
//! pages make it wait, and the last scan of a pause finds all of it; its own dirty log is not needed. All of
//! this is tried on the kernel at hand before a VM with such a network is moved from here, and before one is
//! started here: without that, its QEMU carries the packets itself. Guests see the same card either way.

use crate::recipe::{Net, Recipe};
use rustix::fs::{AtFlags, CWD, StatxFlags};
use std::{fs, io, path::Path, sync::Mutex};
use sys::{process::PidFd, vhost};
use units::Locked;

/// The device by which QEMU starts workers (`admin-guide/devices.txt`).
pub(crate) const DEVICE: (u32, u32) = (10, 238);

/// Its name below `/dev`, by which QEMU opens it.
pub(crate) const NODE: &str = "vhost-net";

/// Whether it is proven that a worker's writes are seen here, and that it waits for missing memory; else why
/// not. What is proven holds as long as this kernel runs.
pub(crate) fn proven() -> Result<(), String> {
    static PROVEN: Mutex<bool> = Mutex::new(false);
    let mut proven = PROVEN.locked();
    if !*proven {
        vhost::prove().map_err(|why| why.to_string())?;
        *proven = true;
    }
    Ok(())
}

/// Finds that out ahead of time where VMs have had workers: what has loaded the kernel's module needs it.
pub(crate) fn learn() {
    if Path::new("/sys/module/vhost_net").exists()
        && let Err(why) = proven()
    {
        tracing::warn!(why, "VMs with vhost=on cannot be moved from here");
    }
}

/// Whether a VM's networks get workers when it is started here.
pub(crate) fn gives(recipe: &Recipe) -> bool {
    if !wanted(&recipe.nets) {
        return false;
    }
    let proven = proven();
    if let Err(why) = &proven {
        tracing::warn!(vm = recipe.name, why, "its networks run without vhost here");
    }
    proven.is_ok()
}

/// Whether any of these has one, where that may be.
pub(crate) fn wanted(nets: &[Net]) -> bool {
    nets.iter().any(|net| net.options.vhost)
}

/// How many workers a process has: one for each pair of queues.
pub(crate) fn workers(process: &PidFd) -> io::Result<usize> {
    let mut workers = 0;
    for entry in fs::read_dir(process.proc_path("fd"))? {
        // As it was last seen: the server of another file may not answer.
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        // A descriptor may be closed between two looks.
        let Ok(found) = rustix::fs::statx(CWD, entry?.path(), flags, StatxFlags::TYPE) else { continue };
        let device = (found.stx_rdev_major, found.stx_rdev_minor);
        workers += usize::from(found.stx_mode & 0o170_000 == 0o020_000 && device == DEVICE);
    }
    Ok(workers)
}

/// Why a VM cannot be moved from here whose process this is, if workers of the kernel's write its memory.
pub(crate) fn hindrance(process: &PidFd) -> Option<String> {
    judge(workers(process), proven)
}

fn judge(workers: io::Result<usize>, proven: impl FnOnce() -> Result<(), String>) -> Option<String> {
    match workers {
        Ok(0) => None,
        Ok(_) => proven().err().map(|why| {
            format!(
                "its network has vhost=on, and it is not proven on this host that what the kernel writes \
                 into the guest's memory is seen: {why}; see `whimbrel doctor`, or start the VM with \
                 vhost=off"
            )
        }),
        Err(error) => Some(format!("cannot look whether its network has vhost=on: {error}")),
    }
}

/// Of networks that were added, with so many pairs of queues each, those that have workers, if `left` are
/// there for them; none if that cannot be told.
pub(crate) fn shared_out(left: usize, added: &[(String, u16)]) -> Result<Vec<String>, ()> {
    let all: usize = added.iter().map(|(_, queues)| usize::from(*queues)).sum();
    match added {
        _ if left == 0 => Ok(vec![]),
        _ if left >= all => Ok(added.iter().map(|(id, _)| id.clone()).collect()),
        _ => Err(()),
    }
}

/// What to say of a VM that was started here without workers that it had.
pub(crate) fn left_out(nets: &[Net], process: &PidFd) -> Option<String> {
    let without = wanted(nets) && workers(process).is_ok_and(|workers| workers == 0);
    let why = || proven().err().unwrap_or_else(|| "QEMU could not open /dev/vhost-net".to_owned());
    without.then(|| format!("its networks run without vhost: {}", why()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_with_vhost_moves_only_where_it_is_proven() {
        let proven = || Ok(());
        let not = || Err("a page was lost".to_owned());
        assert_eq!(judge(Ok(0), not), None, "no worker writes");
        assert_eq!(judge(Ok(2), proven), None);
        let why = judge(Ok(1), not).unwrap();
        assert!(why.contains("a page was lost") && why.contains("vhost=off"), "{why}");
        assert!(judge(Err(io::ErrorKind::PermissionDenied.into()), proven).is_some());
    }

    #[test]
    fn workers_belong_to_whom_they_must() {
        let added = |all: &[(&str, u16)]| -> Vec<_> {
            all.iter().map(|(id, queues)| ((*id).to_owned(), *queues)).collect()
        };
        for (left, networks, shares) in [
            (0, added(&[("a", 1)]), Ok(vec![])),
            (1, added(&[("a", 1)]), Ok(vec!["a".to_owned()])),
            (3, added(&[("a", 1), ("b", 2)]), Ok(vec!["a".to_owned(), "b".to_owned()])),
            (1, added(&[("a", 1), ("b", 1)]), Err(())),
            (1, added(&[("a", 2)]), Err(())),
        ] {
            assert_eq!(shared_out(left, &networks), shares, "{left} {networks:?}");
        }
    }

    #[test]
    fn what_this_process_has_open_are_no_workers() {
        let me = PidFd::open(std::process::id().cast_signed()).unwrap();
        let null = fs::File::open("/dev/null").unwrap();
        assert_eq!(workers(&me).unwrap(), 0);
        drop(null);
    }
}
