//! How much memory a VM can get here: what the host has left, and what the cgroups and limits leave in which
//! its QEMU will run.

use rustix::process::{Resource, getrlimit};
use std::fs;
use sys::{
    cgroup::{self, Cgroup},
    proc,
};
use units::Bytes;

/// Address space that QEMU takes besides the guest's memory: its code, its threads' stacks and heaps. 1.5 GiB
/// were seen with 8 vCPUs.
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
        let host =
            fs::read_to_string("/proc/meminfo").ok().and_then(|text| proc::bytes(&text, "MemAvailable"));
        let host = host.map(|left| Self { left, place: "here".to_owned() });
        let groups = cgroup::of("self").unwrap_or_default();
        let counting = groups.iter().filter(|group| group.is_unified() || group.has("memory"));
        let all = counting.flat_map(within);
        all.chain(addresses())
            .chain(host)
            .min_by_key(|room| room.left)
            .unwrap_or(Self { left: u64::MAX, place: String::new() })
    }

    /// Why a VM that needs so much does not fit, if it does not. `reserved`: what others will still take that
    /// are arriving. `overcommit`: how many hundredths of what is left may be needed.
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
        Some(why + "; end or move others, or choose another host")
    }
}

/// What `RLIMIT_AS` leaves for guest memory, if there is one: QEMU inherits it.
fn addresses() -> Option<Room> {
    let left = getrlimit(Resource::As).current?.saturating_sub(QEMU_ADDRESSES);
    Some(Room {
        left,
        place: "within the limit of address space (ulimit -v) under which the agent runs".to_owned(),
    })
}

/// What each cgroup leaves that counts our memory, from ours up to the top.
fn within(group: &Cgroup) -> Vec<Room> {
    let words = |group: &Cgroup| {
        let limit = if group.is_unified() { "memory.max" } else { "memory.limit_in_bytes" };
        format!("within {limit} of the cgroup /{}", group.path.display())
    };
    group.and_above().filter_map(|group| Some(Room { left: left(&group)?, place: words(&group) })).collect()
}

/// Nothing where nothing is limited, or it cannot be looked at.
fn left(group: &Cgroup) -> Option<u64> {
    let at = group.directory();
    let (limit, used, cache) = match group.is_unified() {
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

#[cfg(test)]
mod tests {
    use super::*;

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
        let here = Cgroup { mount: dir.path().to_owned(), path: "a/b".into(), controllers: vec![] };
        let least = within(&here).into_iter().min_by_key(|room| room.left).unwrap();
        assert_eq!((least.left, least.place.as_str()), (500, "within memory.max of the cgroup /a"));
    }
}
