//! What a QEMU that we start is denied from its first instruction on: a guest that breaks out of it must not
//! find a way on.
//!
//! QEMU's own filter (`-sandbox`) lets it execute nothing and change neither its user nor its share of the
//! host; the kernel gives it no rights that it was not started with (`no_new_privs`), nor those of root that
//! no QEMU of ours needs. It opens its files as the agent's user.

use crate::preflight;
use std::{
    fs,
    io::ErrorKind,
    path::Path,
    process::{Command, Stdio},
};

/// QEMU's filter, as libvirt sets it.
pub(crate) const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// What root may do and QEMU need not. It keeps reading and writing whatever its user names, locking memory,
/// and its network cards.
const NEEDLESS: &[&str] = &[
    "audit_control",
    "linux_immutable",
    "mac_admin",
    "mac_override",
    "mknod",
    "net_raw",
    "setfcap",
    "setgid",
    "setpcap",
    "setuid",
    "sys_admin",
    "sys_boot",
    "sys_chroot",
    "sys_module",
    "sys_pacct",
    "sys_rawio",
    "sys_time",
    "sys_tty_config",
    "syslog",
];

/// Taking rights away is a right itself (`capabilities(7)`).
const CAP_SETPCAP: u32 = 8;

/// What is run before QEMU, and what QEMU is told besides the recipe.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Confinement {
    pub(crate) before: Vec<String>,
    pub(crate) after: Vec<String>,
}

/// How this program is confined when we start it.
pub(crate) fn of(program: &Path) -> Confinement {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let sandbox = rustix::process::geteuid().is_root() && preflight::has_sandbox(program);
    let lends = Path::new("/dev/userfaultfd").exists();
    let mut confinement = decide(sandbox, number(&status, "CapEff:").unwrap_or(0), lends);
    if !works(&confinement.before) {
        let command = confinement.before.join(" ");
        tracing::warn!(
            command,
            "QEMU keeps its user's rights: setpriv (package util-linux) does not work here"
        );
        confinement.before.clear();
    }
    confinement
}

/// Whether a program can be run like that here: it may not be installed, and other implementations of it know
/// less. If it cannot be tried for want of something else, it is used: QEMU must not keep its rights because
/// the host is short of descriptors.
fn works(before: &[String]) -> bool {
    let (Some(program), arguments) = (before.first(), before.get(1..).unwrap_or_default()) else {
        return true;
    };
    let tried = Command::new(program)
        .args(arguments)
        .arg("true")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match tried {
        Ok(status) => status.success(),
        Err(error) => error.kind() != ErrorKind::NotFound,
    }
}

/// An agent that is not root leaves it out: it could not read the filter, and so not be sure that QEMU
/// survives a call that is made in its place.
fn decide(sandbox: bool, rights: u64, lends: bool) -> Confinement {
    let mut before = ["setpriv", "--no-new-privs"].map(str::to_owned).to_vec();
    if rights & (1 << CAP_SETPCAP) != 0 {
        // By it a process may make a userfaultfd; else it is lent the device that makes one.
        let ptrace = lends.then_some(&"sys_ptrace");
        let without: Vec<_> = NEEDLESS.iter().chain(ptrace).map(|right| format!("-{right}")).collect();
        before.push(format!("--bounding-set={}", without.join(",")));
        before.push("--inh-caps=-all".to_owned());
    }
    let after = if sandbox { ["-sandbox", SANDBOX].map(str::to_owned).to_vec() } else { Vec::new() };
    Confinement { before, after }
}

/// A hexadecimal number of `/proc/PID/status`.
fn number(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_gives_up_what_qemu_need_not_have() {
        let all = number("Name:\tx\nCapEff:\t000001ffffffffff\n", "CapEff:").unwrap();
        let root = decide(true, all, true);
        assert_eq!(root.before[..2], ["setpriv", "--no-new-privs"]);
        let rights = &root.before[2];
        assert!(rights.contains("-sys_admin,") && rights.ends_with(",-sys_ptrace"), "{root:?}");
        assert_eq!(root.after, ["-sandbox", SANDBOX]);
        assert!(!decide(true, all, false).before[2].contains("sys_ptrace"));
        // Who may not take rights away, or has none, takes none away.
        for rights in [0, all & !(1 << CAP_SETPCAP)] {
            assert_eq!(decide(false, rights, true).before, ["setpriv", "--no-new-privs"]);
            assert!(decide(false, rights, true).after.is_empty());
        }
    }
}
