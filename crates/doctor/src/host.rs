//! Kernel, memory, clock, limits.

use crate::{
    Check,
    diagnosis::{BOTH, PRE_COPY},
};
use rustix::process::{Resource, getrlimit};
use std::fs;
use sys::proc;
use units::Bytes;

/// The first kernel with the asynchronous write tracker (`UFFD_FEATURE_WP_ASYNC`, `PAGEMAP_SCAN`).
const ASYNC_TRACKING: (u32, u32) = (6, 7);
/// The first with the synchronous one (`UFFD_FEATURE_WP_HUGETLBFS_SHMEM`).
const TRACKING: (u32, u32) = (5, 19);
/// Less than this free, and hardly any VM finds room.
const LITTLE_MEMORY: Bytes = Bytes(1 << 30);
/// What Linux gives by default. A migration needs a few descriptors for each stream and RAM block, an agent
/// some for each VM.
const OPEN_FILES: u64 = 1024;

/// The kernel's version.
pub(crate) fn kernel() -> Check {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    judge_kernel(release.trim())
}

fn judge_kernel(release: &str) -> Check {
    let found = format!("Linux {release} on {}", std::env::consts::ARCH);
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= ASYNC_TRACKING {
        return Check::ok("kernel", PRE_COPY, found);
    }
    // Only a warning: distributions port features back, and the checks that follow try them.
    let (major, minor) = ASYNC_TRACKING;
    let remedy = if version >= TRACKING {
        format!("pre-copy slows guests less with Linux {major}.{minor} or newer: boot a newer kernel")
    } else {
        let (least, of_it) = TRACKING;
        format!("pre-copy wants Linux {least}.{of_it}, better {major}.{minor} or newer: boot a newer kernel")
    };
    Check::warn("kernel", PRE_COPY, found, remedy)
}

/// Memory, huge pages, clock, open files.
pub(crate) fn resources() -> Vec<Check> {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    vec![
        judge_memory(&meminfo),
        judge_hugepages(&meminfo),
        clock(),
        judge_open_files(getrlimit(Resource::Nofile).current),
    ]
}

fn judge_memory(meminfo: &str) -> Check {
    let Some(free) = proc::bytes(meminfo, "MemAvailable").map(Bytes) else {
        let remedy = "mount /proc";
        return Check::warn("memory", BOTH, "/proc/meminfo does not say what is available", remedy);
    };
    let total = Bytes(proc::bytes(meminfo, "MemTotal").unwrap_or(0));
    let found = format!("{free} available of {total}");
    if free >= LITTLE_MEMORY {
        Check::ok("memory", BOTH, found)
    } else {
        Check::warn(
            "memory",
            BOTH,
            found,
            "a target needs as much as the VM has: free some, or choose another target",
        )
    }
}

fn judge_hugepages(meminfo: &str) -> Check {
    let of = |name| count(meminfo, name).unwrap_or(0);
    let size = Bytes(of("Hugepagesize") << 10);
    let found = match of("HugePages_Total") {
        0 => "none reserved; none needed".to_owned(),
        total => format!(
            "{} free of {total} reserved, {size} each; guest RAM uses ordinary pages",
            of("HugePages_Free")
        ),
    };
    Check::ok("hugepages", &[], found)
}

/// The number after `name` at the beginning of a line.
fn count(meminfo: &str, name: &str) -> Option<u64> {
    proc::value(meminfo, name)?.split_whitespace().next()?.parse().ok()
}

fn clock() -> Check {
    let remedy = "run chrony or systemd-timesyncd: the times in the logs of two hosts then compare";
    match sys::clock::synchronised() {
        Ok(true) => Check::ok("clock", &[], "synchronised"),
        // Downtime is measured with the hosts' clocks related by round trips: migrations do without.
        Ok(false) => Check::warn("clock", &[], "not synchronised (adjtimex)", remedy),
        Err(e) => Check::warn("clock", &[], format!("adjtimex: {e}"), remedy),
    }
}

fn judge_open_files(limit: Option<u64>) -> Check {
    match limit {
        None => Check::ok("open-files", BOTH, "unlimited"),
        Some(n) if n >= OPEN_FILES => Check::ok("open-files", BOTH, format!("{n} may be open")),
        Some(n) => {
            let remedy =
                format!("raise it: ulimit -n {OPEN_FILES}, or LimitNOFILE={OPEN_FILES} in the agent's unit");
            Check::warn("open-files", BOTH, format!("only {n} may be open"), remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status::{self, Ok, Warn};

    #[test]
    fn kernels_are_judged_by_their_number() {
        let table: [(&str, Status); 8] = [
            ("6.18.44-fc", Ok),
            ("6.7.0", Ok),
            ("6.7-rc1", Ok),
            ("7.0.1", Ok),
            ("6.1.0-13-cloud-amd64", Warn),
            ("5.19.17", Warn),
            ("", Warn),
            ("99999999999.1", Warn),
        ];
        for (release, status) in table {
            assert_eq!(judge_kernel(release).status, status, "{release}");
        }
    }

    #[test]
    fn memory_is_what_is_available_not_what_is_free() {
        let text = "MemTotal:  4194304 kB\nMemFree:  10 kB\nMemAvailable:  2097152 kB\n";
        let check = judge_memory(text);
        assert_eq!((check.status, check.found.as_str()), (Ok, "2.0 GiB available of 4.0 GiB"));
        assert_eq!(judge_memory("MemTotal: 4194304 kB\nMemAvailable: 1000 kB\n").status, Warn);
        assert_eq!(judge_memory("MemTotal: much\n").status, Warn);
    }

    #[test]
    fn huge_pages_are_told_but_not_asked_for() {
        assert!(judge_hugepages("HugePages_Total:  0\n").found.starts_with("none"));
        let check = judge_hugepages("HugePages_Total: 8\nHugePages_Free: 5\nHugepagesize: 2048 kB\n");
        assert_eq!(check.status, Ok);
        assert!(check.found.starts_with("5 free of 8 reserved, 2.0 MiB each"), "{}", check.found);
    }

    #[test]
    fn few_open_files_are_a_warning_with_the_command() {
        assert_eq!(judge_open_files(Some(1024)).status, Ok);
        assert_eq!(judge_open_files(None).status, Ok);
        assert!(judge_open_files(Some(64)).remedy.unwrap().contains("ulimit -n 1024"));
    }
}
