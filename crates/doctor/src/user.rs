//! As whom QEMU will run, and whether it can be given a view of the file system of its own.

use crate::Check;
use qemu::Account;
use std::{io, thread};
use sys::mounts;

const NAME: &str = "qemu-user";

/// Unless `[qemu] user` names another one.
pub(crate) fn check() -> Check {
    judge(Account::choose(None), own_mounts())
}

/// In a thread that has nothing else to do, as the agent does.
fn own_mounts() -> io::Result<()> {
    let tried = thread::Builder::new().spawn(|| mounts::leave().and_then(|()| mounts::read_only()))?;
    tried.join().unwrap_or_else(|_| Err(io::Error::other("it panicked")))
}

fn judge(account: Result<Account, String>, mounts: io::Result<()>) -> Check {
    let create = "useradd --system --no-create-home --shell /usr/sbin/nologin whimbrel-qemu";
    let account = match account {
        Ok(account) => account,
        Err(why) => return Check::fail(NAME, &[], why, create),
    };
    let name = account.name();
    match (&account, mounts) {
        (Account::Agent, _) => Check::warn(
            NAME,
            &[],
            "an agent of this user runs QEMU as itself: who breaks out of QEMU has the agent's rights",
            "run the agent as root: it gives QEMU another user, and a view of the host of its own",
        ),
        (Account::Root, _) => Check::warn(NAME, &[], "QEMU runs as root", "name another user in [qemu]"),
        (Account::User { .. }, Err(error)) => Check::fail(
            NAME,
            &[],
            format!("QEMU cannot be given a view of the file system of its own: {error}"),
            "let the agent have CAP_SYS_ADMIN, on Linux 5.12 or newer; or say user = \"root\" in [qemu]",
        ),
        (Account::User { .. }, Ok(())) if account.is_shared() => Check::warn(
            NAME,
            &[],
            format!("QEMU runs as {name}, which other services of this host may do, too"),
            format!("give it a user of its own: {create}"),
        ),
        (Account::User { .. }, Ok(())) => {
            Check::ok(NAME, &[], format!("QEMU runs as {name}, without capabilities, in a view of its own"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use sys::mounts::Ids;

    #[test]
    fn a_user_that_is_shared_is_warned_of() {
        let user = |name: &str| Ok(Account::User { name: name.to_owned(), ids: Ids { user: 7, group: 7 } });
        let table = [
            (user("whimbrel-qemu"), true, Status::Ok),
            (user("nobody"), true, Status::Warn),
            (user("whimbrel-qemu"), false, Status::Fail),
            (Ok(Account::Agent), true, Status::Warn),
            (Ok(Account::Root), true, Status::Warn),
            (Err("there is none".to_owned()), true, Status::Fail),
        ];
        for (account, mounts, status) in table {
            let mounts = if mounts { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) };
            let told = format!("{account:?}");
            assert_eq!(judge(account, mounts).status, status, "{told}");
        }
    }
}
