//! By which ways a file on a file system of some kind can be shown to another host.

use std::{fs, fs::File, os::fd::AsRawFd};

/// Ways besides locks, which are always tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Ways {
    /// By a token: locks may hold on one host only.
    pub(super) token: bool,
    /// By the content, if it is only read: the other host may have a copy.
    pub(super) content: bool,
}

/// File systems of one host. A token there would be read by nobody.
const LOCAL: &[&str] = &[
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "ramfs", "overlay",
    "squashfs", "iso9660", "vfat", "exfat", "rootfs",
];

/// Those whose locks all hosts see.
const CLUSTER: &[&str] = &["ceph", "ocfs2", "gfs2", "gpfs"];

/// The mount that a file was opened through.
pub(super) fn number(file: &File) -> Option<String> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    Some(info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().to_owned())
}

/// What the kernel says of that mount.
pub(super) fn ways(file: &File, writes: bool) -> Option<Ways> {
    let mount = number(file)?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let line = mounts.lines().find(|line| line.split(' ').next() == Some(&*mount))?;
    // ID PARENT DEV ROOT POINT OPTIONS … - KIND SOURCE SUPER-OPTIONS
    let mut words = line.split_once(" - ")?.1.split(' ');
    let (kind, options) = (words.next()?, words.nth(1).unwrap_or_default());
    Some(decide(kind, options, writes))
}

fn decide(kind: &str, options: &str, writes: bool) -> Ways {
    let has = |option: &str| options.split(',').any(|one| one == option);
    let nfs = matches!(kind, "nfs" | "nfs4");
    let alone = has("nolock") || has("local_lock=all") || has("local_lock=posix");
    let shared = CLUSTER.contains(&kind) || (nfs && !alone);
    // Under a delegation for reading, which two hosts may have at once, a host keeps its locks to itself (RFC
    // 8881, 10.4). That for writing is given back as soon as another host opens the file.
    let delegated = kind == "nfs4" && !writes;
    Ways { token: delegated || (!shared && !LOCAL.contains(&kind)), content: !shared }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_for_file_systems_with_unknown_locks() {
        for (kind, options, token, content) in [
            ("ext4", "rw,relatime", false, true),
            ("tmpfs", "rw", false, true),
            ("nfs4", "rw,vers=4.2,local_lock=none,addr=10.0.0.1", false, false),
            ("nfs", "rw,vers=3,local_lock=none", false, false),
            ("nfs", "rw,vers=3,nolock,local_lock=all", true, true),
            ("nfs", "rw,vers=3,local_lock=posix", true, true),
            ("ceph", "rw", false, false),
            ("fuse.glusterfs", "rw", true, true),
            ("fuse", "rw,user_id=0", true, true),
            ("cifs", "rw", true, true),
            ("something new", "", true, true),
        ] {
            assert_eq!(decide(kind, options, true), Ways { token, content }, "{kind} {options}");
        }
        assert_eq!(decide("nfs4", "rw,local_lock=none", false), Ways { token: true, content: false });
    }
}
