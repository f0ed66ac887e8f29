//! Whether VMs can be moved whose packets the kernel carries (`vhost=on`): one of its workers writes, and is
//! watched.

use crate::Check;
use sys::vhost::{Proven, VhostError, prove};

const NAME: &str = "vhost-net";

/// Tries it.
pub(crate) fn check() -> Check {
    judge(prove())
}

/// A host without it migrates all other VMs.
fn judge(proven: Result<Proven, VhostError>) -> Check {
    let both = |asynchronous: bool| if asynchronous { "both trackers see" } else { "the tracker sees" };
    match proven {
        Ok(Proven { asynchronous }) => {
            let found =
                format!("{} what a worker writes, and it waits for missing pages", both(asynchronous));
            Check::ok(NAME, &[], found)
        }
        Err(VhostError::Absent) => Check::warn(
            NAME,
            &[],
            "there is no /dev/vhost-net: not tried; VMs with vhost=on arrive here without it",
            "if there are such VMs: modprobe vhost_net",
        ),
        Err(e @ VhostError::Refused(_)) => {
            Check::warn(NAME, &[], format!("not tried: {e}"), "if there are VMs with vhost=on: run as root")
        }
        Err(e) => Check::fail(
            NAME,
            &[],
            format!("VMs with vhost=on cannot be moved from here: {e}"),
            "try again when the machine is less busy, or start such VMs with vhost=off; a network card of \
             theirs is as before, only slower",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use std::io;

    #[test]
    fn a_host_is_fit_for_vhost_only_where_that_was_proven() {
        let late = || VhostError::Broken { what: "receive a packet", why: io::ErrorKind::TimedOut.into() };
        let table = [
            (Ok(Proven { asynchronous: true }), Status::Ok, "both trackers see"),
            (Ok(Proven { asynchronous: false }), Status::Ok, "the tracker sees"),
            (Err(VhostError::Absent), Status::Warn, "not tried"),
            (Err(VhostError::Refused(io::ErrorKind::PermissionDenied.into())), Status::Warn, "not tried"),
            (Err(late()), Status::Fail, "cannot be moved"),
            (Err(VhostError::Unsafe("a page was lost".into())), Status::Fail, "a page was lost"),
        ];
        for (proven, status, found) in table {
            let said = format!("{proven:?}");
            let check = judge(proven);
            assert_eq!(check.status, status, "{said}");
            assert!(check.found.contains(found), "{check:?}");
            assert_eq!(check.needed_for, [], "all other VMs move without it");
        }
    }
}
