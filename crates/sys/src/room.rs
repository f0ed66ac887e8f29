//! How much memory is left: what the host has, and what the cgroups leave that count it.

use crate::{
    cgroup::{self, Cgroup},
    proc,
};
use std::fs;

/// So much is left of so much, and who says so.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Room {
    /// Bytes.
    pub left: u64,
    /// Of so many.
    pub of: u64,
    /// Where, such as `within memory.max of the cgroup /x`.
    pub place: String,
}

impl Room {
    /// Everything that bounds the memory of processes in these cgroups, from theirs up to the top, and of
    /// this host. What is not limited, or cannot be looked at, is left out.
    pub fn all(groups: &[Cgroup]) -> Vec<Self> {
        groups.iter().filter(|group| counts(group)).flat_map(within).chain(host()).collect()
    }

    /// The same for processes that this one starts.
    pub fn here() -> Vec<Self> {
        Self::all(&cgroup::of("self").unwrap_or_default())
    }
}

/// Whether a cgroup counts memory.
fn counts(group: &Cgroup) -> bool {
    group.is_unified() || group.has("memory")
}

fn host() -> Option<Room> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let (left, of) = (proc::bytes(&text, "MemAvailable")?, proc::bytes(&text, "MemTotal")?);
    Some(Room { left, of, place: "here".to_owned() })
}

/// What each cgroup leaves, from this one up to the top.
fn within(group: &Cgroup) -> Vec<Room> {
    let words = |group: &Cgroup| {
        let limit = if group.is_unified() { "memory.max" } else { "memory.limit_in_bytes" };
        format!("within {limit} of the cgroup /{}", group.path.display())
    };
    let room = |group: Cgroup| left(&group).map(|(left, of)| Room { left, of, place: words(&group) });
    group.and_above().filter_map(room).collect()
}

/// What is left, and of how much. Nothing where nothing is limited, or it cannot be looked at.
fn left(group: &Cgroup) -> Option<(u64, u64)> {
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
    Some((limit.saturating_sub(used), limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_above_counts() {
        let dir = std::env::temp_dir().join(format!("room-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            // One that began with a slash would leave the directory.
            let path = dir.join(path.trim_start_matches('/'));
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
        let here = Cgroup { mount: dir.clone(), path: "a/b".into(), controllers: vec![] };
        let found = within(&here);
        fs::remove_dir_all(&dir).unwrap();
        let found: Vec<_> = found.iter().map(|room| (room.left, room.of, room.place.as_str())).collect();
        let place = "within memory.max of the cgroup /";
        let expected = [(500, 1000, format!("{place}a")), (8900, 9000, place.to_owned())];
        assert_eq!(found, expected.each_ref().map(|(left, of, place)| (*left, *of, place.as_str())));
    }

    #[test]
    fn this_host_has_some_memory_and_not_all_of_it_is_left() {
        let rooms = Room::here();
        assert!(rooms.iter().any(|room| room.place == "here" && room.left < room.of), "{rooms:?}");
    }
}
