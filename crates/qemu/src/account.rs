//! As whom QEMU runs on this host.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::Path,
};
use sys::mounts::{Ids, user_of_name};

/// Who is taken where nobody is named, the first that exists.
const USUAL: [&str; 3] = ["whimbrel-qemu", "libvirt-qemu", LAST];

/// A user that others share.
const LAST: &str = "nobody";

/// As whom QEMU runs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Account {
    /// As the agent's user, which is not root and cannot choose.
    Agent,
    /// As root, on request.
    Root,
    /// As a user of its own, without capabilities, in a view of the file system of its own.
    User {
        /// Its name.
        name: String,
        /// Its numbers.
        ids: Ids,
    },
}

impl Account {
    /// The one that is wanted by name, or the usual one. Says what to do if it is not there.
    pub fn choose(wanted: Option<&str>) -> Result<Self, String> {
        let root = rustix::process::geteuid().is_root();
        let find = |name: &str| {
            user_of_name(name).map_err(|error| format!("cannot look for the user {name}: {error}"))
        };
        decide(wanted, root, find)
    }

    /// Its name; the agent's own where it cannot choose.
    pub fn name(&self) -> &str {
        match self {
            Self::Agent => "the agent's",
            Self::Root => "root",
            Self::User { name, .. } => name,
        }
    }

    /// Whether other programs may run as this user, too.
    pub fn is_shared(&self) -> bool {
        self.name() == LAST
    }

    /// Its numbers, where QEMU runs as a user of its own.
    pub fn ids(&self) -> Option<Ids> {
        match self {
            Self::User { ids, .. } => Some(*ids),
            _ => None,
        }
    }

    /// Whether it may open this file of somebody for writing, by its owner and mode.
    pub fn may_write(&self, file: &Metadata) -> bool {
        let Some(ids) = self.ids() else { return true };
        let wanted = if file.uid() == ids.user {
            0o600
        } else if file.gid() == ids.group {
            0o060
        } else {
            0o006
        };
        file.mode() & wanted == wanted
    }

    /// Why a QEMU of this user could not be migrated on this kernel, if it could not.
    pub fn hindrance(&self) -> Option<String> {
        let unprivileged = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
        let can = Path::new("/dev/userfaultfd").exists() || unprivileged.trim() == "1";
        (self.ids().is_some() && !can).then(|| {
            format!(
                "QEMU runs as the user {}, and this host lets only root watch memory: boot Linux 6.1 or \
                 later (it has /dev/userfaultfd), set vm.unprivileged_userfaultfd=1, or say user = \"root\" \
                 in [qemu]",
                self.name()
            )
        })
    }
}

fn decide(
    wanted: Option<&str>,
    root: bool,
    find: impl Fn(&str) -> Result<Option<Ids>, String>,
) -> Result<Account, String> {
    if !root {
        return Ok(Account::Agent);
    }
    let Some(name) = wanted else {
        for name in USUAL {
            if let Some(ids) = find(name)?.filter(|ids| ids.user != 0) {
                return Ok(Account::User { name: name.to_owned(), ids });
            }
        }
        return Err("there is no user for QEMU: useradd --system whimbrel-qemu".to_owned());
    };
    match find(name)? {
        Some(Ids { user: 0, .. }) => Ok(Account::Root),
        Some(ids) => Ok(Account::User { name: name.to_owned(), ids }),
        None => {
            Err(format!("there is no user {name} ([qemu] user): useradd --system {name}, or name another"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_open_to_its_owner_its_group_and_others_by_its_mode() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let (own, of_group, other) = ((user, group), (user + 1, group), (user + 1, group + 1));
        let table = [
            (0o600, own, true),
            (0o400, own, false),
            (0o606, of_group, false),
            (0o660, of_group, true),
            (0o660, other, false),
            (0o777, other, true),
            (0o604, other, false),
        ];
        for (mode, (user, group), may) in table {
            fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
            let account = Account::User { name: "qemu".to_owned(), ids: Ids { user, group } };
            let metadata = file.path().metadata().unwrap();
            assert_eq!(account.may_write(&metadata), may, "{mode:o} by {user}:{group}");
            assert!(Account::Root.may_write(&metadata));
        }
    }

    #[test]
    fn root_is_taken_only_on_request() {
        let all = [("root", 0), ("whimbrel-qemu", 7), ("libvirt-qemu", 8), ("nobody", 9), ("alice", 10)];
        let table = [
            (None, true, &all[..], Ok("whimbrel-qemu")),
            (None, true, &all[2..], Ok("libvirt-qemu")),
            (None, true, &all[3..], Ok("nobody")),
            (None, true, &[("nobody", 0)], Err("useradd --system whimbrel-qemu")),
            (Some("alice"), true, &all, Ok("alice")),
            (Some("root"), true, &all, Ok("root")),
            (Some("bob"), true, &all, Err("no user bob ([qemu] user)")),
            (None, false, &all, Ok("the agent's")),
            (Some("alice"), false, &all, Ok("the agent's")),
        ];
        for (wanted, root, users, right) in table {
            let find = |name: &str| {
                let found = users.iter().find(|(user, _)| *user == name);
                Ok(found.map(|(_, id)| Ids { user: *id, group: *id }))
            };
            match (decide(wanted, root, find), right) {
                (Ok(account), Ok(name)) => assert_eq!(account.name(), name, "{wanted:?}"),
                (Err(why), Err(says)) => assert!(why.contains(says), "{why}"),
                (got, _) => panic!("{wanted:?} {root}: {got:?}"),
            }
        }
    }
}
