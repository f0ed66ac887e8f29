//! How much memory a VM can get here: what the host has left, and what the cgroups and limits leave in which its QEMU will run.

use rustix::process::{Resource, getrlimit};
use std::{
    fs,
    path::{Path, PathBuf},
};
use units::Bytes;

/// Address space that QEMU takes besides the guest's memory: its code, its threads' stacks and heaps. 1.5 GiB were seen with 8 vCPUs.
const QEMU_ADDRESSES: u64 = 4 << 30;

/// So much is left, and who says so.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Room {
    /// Bytes.
    pub left: u64,
    /// Of what, such as `within memory.max of the cgroup /x`.
    pub place: String,
}

impl Room {
    /// Where there is least for a process that this one starts.
    pub fn least() -> Self {
        let host = fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text));
        let host = host.map(|left| Self { left, place: "here".to_owned() });
        let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let all = hierarchies(&cgroups, &mounts).into_iter().flat_map(|hierarchy| hierarchy.rooms());
        all.chain(addresses())
            .chain(host)
            .min_by_key(|room| room.left)
            .unwrap_or(Self { left: u64::MAX, place: String::new() })
    }

    /// Why a VM that needs so much does not fit, if it does not. `reserved`: what others will still take that are arriving.
    /// `overcommit`: how many hundredths of what is left may be needed.
    pub fn refuses(&self, needed: u64, reserved: u64, overcommit: u32) -> Option<String> {
        let allowed = u128::from(self.left.saturating_sub(reserved)) * u128::from(overcommit) / 100;
        if u128::from(needed) <= allowed {
            return None;
        }
        let Self { left, place } = self;
        let (needed, left) = (Bytes(needed), Bytes(*left));
        let mut why =
            format!("the VM needs {needed} of memory, QEMU's own included, but only {left} are free {place}");
        if reserved > 0 {
            let reserved = Bytes(reserved);
            why.push_str(&format!(", and VMs that are arriving will take {reserved} of that"));
        }
        if overcommit > 100 {
            why.push_str(&format!(" (overcommit = {})", f64::from(overcommit) / 100.0));
        }
        Some(why)
    }
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1 << 10)
}

/// What `RLIMIT_AS` leaves for guest memory, if there is one: QEMU inherits it.
fn addresses() -> Option<Room> {
    let left = getrlimit(Resource::As).current?.saturating_sub(QEMU_ADDRESSES);
    Some(Room {
        left,
        place: "within the limit of address space (ulimit -v) under which the agent runs".to_owned(),
    })
}

/// A tree of cgroups that counts memory, and where in it we are.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Hierarchy {
    mount: PathBuf,
    /// From the mount on.
    path: PathBuf,
    unified: bool,
}

/// The trees of `/proc/self/cgroup` that count memory and are mounted.
fn hierarchies(cgroups: &str, mounts: &str) -> Vec<Hierarchy> {
    let mine = cgroups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let unified = controllers.is_empty();
        (unified || controllers.split(',').any(|name| name == "memory")).then_some((unified, path))
    });
    mine.filter_map(|(unified, path)| {
        let (root, mount) = mounts.lines().find_map(|line| mounted(line, unified))?;
        // A container sees a part of the tree: what is above that cannot be looked at.
        let path = Path::new(path).strip_prefix(&root).or_else(|_| Path::new(path).strip_prefix("/")).ok()?;
        Some(Hierarchy { mount, path: path.to_owned(), unified })
    })
    .collect()
}

/// Which part of the tree is mounted where, if this line of `mountinfo` is about it.
fn mounted(line: &str, unified: bool) -> Option<(PathBuf, PathBuf)> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ').skip(3);
    let (root, mount) = (fields.next()?, fields.next()?);
    let mut kind = after.split(' ');
    let (kind, options) = (kind.next()?, kind.nth(1)?);
    let right = match unified {
        true => kind == "cgroup2",
        false => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
    };
    right.then(|| (root.into(), mount.into()))
}

impl Hierarchy {
    /// What each cgroup from ours up to the top leaves.
    fn rooms(&self) -> Vec<Room> {
        let groups = self.path.ancestors();
        groups.filter_map(|group| Some(Room { left: self.left(group)?, place: self.words(group) })).collect()
    }

    fn words(&self, group: &Path) -> String {
        let limit = if self.unified { "memory.max" } else { "memory.limit_in_bytes" };
        format!("within {limit} of the cgroup /{}", group.display())
    }

    /// Nothing where nothing is limited, or it cannot be looked at.
    fn left(&self, group: &Path) -> Option<u64> {
        let at = self.mount.join(group);
        let (limit, used, cache) = match self.unified {
            true => ("memory.max", "memory.current", "inactive_file"),
            false => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        };
        let number = |name: &str| fs::read_to_string(at.join(name)).ok()?.trim().parse::<u64>().ok();
        let limit = number(limit)?;
        let stat = fs::read_to_string(at.join("memory.stat")).unwrap_or_default();
        let cache = stat.lines().find_map(|line| line.strip_prefix(cache)?.trim().parse::<u64>().ok());
        // Pages of files that nobody used lately give way.
        let used = number(used)?.saturating_sub(cache.unwrap_or(0));
        Some(limit.saturating_sub(used))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_read_in_bytes() {
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(available("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn a_vm_fits_into_what_is_left_and_not_reserved() {
        let room = Room { left: 1000, place: "here".to_owned() };
        let table = [
            (1000, 0, 100, true),
            (1001, 0, 100, false),
            (600, 400, 100, true),
            (601, 400, 100, false),
            (1500, 0, 150, true),
            (901, 400, 150, false),
            (1, 2000, 400, false),
            (u64::MAX, 0, u32::MAX, false),
        ];
        for (needed, reserved, overcommit, fits) in table {
            let why = room.refuses(needed, reserved, overcommit);
            assert_eq!(why.is_none(), fits, "{needed} {reserved} {overcommit}: {why:?}");
        }
    }

    #[test]
    fn the_trees_that_count_memory_are_found() {
        let mounts = "30 20 0:1 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      31 20 0:2 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n\
                      32 20 0:3 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        let found = hierarchies("4:memory:/a/b\n1:cpu:/x\n0::/c\n", mounts);
        let expected = [("memory", "a/b", false), ("unified", "c", true)].map(|(mount, path, unified)| {
            Hierarchy { mount: Path::new("/sys/fs/cgroup").join(mount), path: path.into(), unified }
        });
        assert_eq!(found, expected);
        let container = "30 20 0:1 /docker/7 /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        assert_eq!(hierarchies("0::/docker/7/x\n", container)[0].path, Path::new("x"));
        assert_eq!(hierarchies("0::/\n", container)[0].path, Path::new(""));
        assert_eq!(hierarchies("0::/\n", ""), []);
    }

    #[test]
    fn the_smallest_limit_above_counts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for (group, limit, used, stat) in [
            ("a/b", "max", "5", ""),
            ("a", "1000", "700", "anon 1\ninactive_file 200\n"),
            ("", "9000", "100", ""),
        ] {
            write(&format!("{group}/memory.max"), &format!("{limit}\n"));
            write(&format!("{group}/memory.current"), &format!("{used}\n"));
            write(&format!("{group}/memory.stat"), stat);
        }
        let here = Hierarchy { mount: dir.path().to_owned(), path: "a/b".into(), unified: true };
        let least = here.rooms().into_iter().min_by_key(|room| room.left).unwrap();
        assert_eq!((least.left, least.place.as_str()), (500, "within memory.max of the cgroup /a"));
    }
}
