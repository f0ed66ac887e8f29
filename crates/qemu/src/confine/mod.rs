//! What a QEMU that we start is denied from its first instruction on: a guest that breaks out of it must not
//! find a way on.
//!
//! It runs as a user of its own ([`crate::account`]) without any capability, sees of the file system what
//! [`view`] says, and cannot trace, signal or change the view of anybody else ([`sys::rights`]). QEMU's own
//! filter (`-sandbox`) lets it execute nothing and change neither its user nor its share of the host. As
//! root, which it is only on request, it keeps what its files need and loses the rest.

pub(crate) mod pin;
pub(crate) mod program;
pub(crate) mod view;

use crate::{
    account::Account,
    host::Host,
    preflight,
    recipe::{Recipe, Role, files::Opened},
};
use pin::{Pin, Use};
use std::{fs, io, path::Path, process::Command};
use sys::{mounts::Ids, proc, rights::Rights};

/// QEMU's filter, as libvirt sets it.
pub(crate) const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// What root may do and QEMU need not, by the numbers of `capability.h`. It keeps reading and writing
/// whatever its user names, locking memory, and its network cards.
const NEEDLESS: &[u32] = &[
    6,  // CAP_SETGID
    7,  // CAP_SETUID
    8,  // CAP_SETPCAP
    9,  // CAP_LINUX_IMMUTABLE
    13, // CAP_NET_RAW
    16, // CAP_SYS_MODULE
    17, // CAP_SYS_RAWIO
    18, // CAP_SYS_CHROOT
    20, // CAP_SYS_PACCT
    21, // CAP_SYS_ADMIN
    22, // CAP_SYS_BOOT
    25, // CAP_SYS_TIME
    26, // CAP_SYS_TTY_CONFIG
    27, // CAP_MKNOD
    30, // CAP_AUDIT_CONTROL
    31, // CAP_SETFCAP
    32, // CAP_MAC_OVERRIDE
    33, // CAP_MAC_ADMIN
    34, // CAP_SYSLOG
];

/// Taking rights away is a right itself (`capabilities(7)`).
const CAP_SETPCAP: u32 = 8;

/// By it a process may make a userfaultfd; else it is lent the device that makes one.
const CAP_SYS_PTRACE: u32 = 19;

/// What QEMU is started without, and what it is told besides the recipe.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Confinement {
    user: Option<Ids>,
    without: u64,
    io_uring: bool,
    after: Vec<String>,
}

/// Why this host cannot run a VM like this for its QEMU's user; each reason with a remedy.
pub(crate) fn refusals(recipe: &Recipe, host: &Host, opened: &[Opened]) -> Vec<String> {
    let account = match Account::choose(host.user.as_deref()) {
        Ok(account) => account,
        Err(why) => return vec![why],
    };
    let mut reasons = hindrances(recipe, &account);
    if let Account::User { name, ids } = &account {
        reasons.extend(pin::refusals(&pins(opened), *ids, name));
    }
    reasons
}

/// What can be told without the files.
pub(crate) fn hindrances(recipe: &Recipe, account: &Account) -> Vec<String> {
    let io_uring = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let uses = account.ids().is_some() && recipe.uses_io_uring();
    let io_uring = uses.then(|| no_io_uring(account.name(), io_uring.trim())).flatten();
    account.hindrance().into_iter().chain(io_uring).collect()
}

fn no_io_uring(user: &str, disabled: &str) -> Option<String> {
    let refused = || {
        format!(
            "it has a drive with aio=io_uring, which the user {user}, as whom QEMU runs, may not use \
             (kernel.io_uring_disabled={disabled}): set that to 0, use aio=native, or say user = \"root\" in \
             [qemu]"
        )
    };
    matches!(disabled, "1" | "2").then(refused)
}

/// The VM's files, for what its QEMU sees.
pub(crate) fn pins(opened: &[Opened]) -> Vec<Pin<'_>> {
    fn pin(opened: &Opened) -> Pin<'_> {
        Pin {
            word: opened.role.word(),
            path: opened.path.clone(),
            real: opened.real.clone(),
            file: &opened.file,
            how: match opened.role {
                Role::Backing => Use::Commit,
                _ if opened.read_only => Use::Read,
                _ => Use::Write,
            },
        }
    }
    opened.iter().map(pin).collect()
}

/// Why QEMU cannot see what it is to see.
fn no_view(what: &str, error: &io::Error) -> String {
    format!(
        "cannot give QEMU a view of the file system of its own: {what}: {error}; let the agent have \
         CAP_SYS_ADMIN, or say user = \"root\" in [qemu]"
    )
}

impl Confinement {
    /// How this program is confined when we start it for this account and VM.
    pub(crate) fn of(program: &Path, account: &Account, recipe: &Recipe) -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let sandbox = *account != Account::Agent && preflight::has_sandbox(program);
        let lends = Path::new("/dev/userfaultfd").exists();
        let rest = decide(account, sandbox, number(&status, "CapEff").unwrap_or(0), lends);
        Self { io_uring: recipe.uses_io_uring(), ..rest }
    }

    /// Has the command start like that; it inherits these descriptors.
    pub(crate) fn give(self, command: &mut Command, inherits: Vec<std::os::fd::OwnedFd>) {
        command.args(self.after);
        let Self { user, without, io_uring, .. } = self;
        let rights = Rights { user, without, apart: user.is_some(), io_uring, modes: false, inherits };
        sys::rights::give(command, rights);
    }
}

/// An agent that is not root leaves the filter out: it could not read it, and so not be sure that QEMU
/// survives a call that is made in its place.
fn decide(account: &Account, sandbox: bool, rights: u64, lends: bool) -> Confinement {
    let user = account.ids();
    let without = if user.is_some() {
        u64::MAX
    } else if rights & (1 << CAP_SETPCAP) != 0 {
        let ptrace = lends.then_some(&CAP_SYS_PTRACE);
        NEEDLESS.iter().chain(ptrace).fold(0, |bits, number| bits | 1 << number)
    } else {
        0
    };
    let after = if sandbox { ["-sandbox", SANDBOX].map(str::to_owned).to_vec() } else { Vec::new() };
    Confinement { user, without, io_uring: false, after }
}

/// A hexadecimal number of `/proc/PID/status`.
fn number(status: &str, field: &str) -> Option<u64> {
    u64::from_str_radix(proc::value(status, field)?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_uring_kept_to_root_is_refused_with_a_remedy() {
        for (disabled, refused) in [("0", false), ("", false), ("1", true), ("2", true)] {
            let why = no_io_uring("q", disabled);
            assert_eq!(why.is_some(), refused, "{why:?}");
            assert!(
                why.is_none_or(|why| why.contains("kernel.io_uring_disabled") && why.contains("aio=native"))
            );
        }
    }

    #[test]
    fn qemu_gives_up_what_it_need_not_have() {
        let all = number("Name:\tx\nCapEff:\t000001ffffffffff\n", "CapEff").unwrap();
        let ids = Ids { user: 7, group: 7 };
        let user = decide(&Account::User { name: "q".to_owned(), ids }, true, all, true);
        assert_eq!((user.user, user.without), (Some(ids), u64::MAX));
        assert_eq!(user.after, ["-sandbox", SANDBOX]);
        let root = decide(&Account::Root, true, all, true);
        assert_ne!(root.without & (1 << 21), 0, "CAP_SYS_ADMIN");
        assert_ne!(root.without & (1 << CAP_SYS_PTRACE), 0);
        assert_eq!(root.without & (1 << 1), 0, "CAP_DAC_OVERRIDE: it opens its files");
        assert_eq!(decide(&Account::Root, true, all, false).without & (1 << CAP_SYS_PTRACE), 0);
        // Who may not take rights away, or has none, takes none away.
        for rights in [0, all & !(1 << CAP_SETPCAP)] {
            let agent = decide(&Account::Agent, false, rights, true);
            assert_eq!(agent, Confinement::default());
        }
    }
}
