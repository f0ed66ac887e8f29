//! Explicit huge pages of this machine, for as long as a story needs them.

use crate::{Doing, Result, run};
use rustix::fs::{FlockOperation, flock};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

/// How many huge pages of the usual size there are to be.
const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// Held while somebody changes that number.
const LOCK: &str = "/run/lock/whimbrel-lab-huge-pages";

/// The size of one.
const PAGE: u64 = 2 << 20;

/// Huge pages of 2 MiB, given back in the end.
#[derive(Debug)]
pub struct HugePages {
    pages: u64,
    mounted: Option<PathBuf>,
}

impl HugePages {
    /// Has the kernel set so much aside, beyond what others have. None, and that is said loudly: it has not got it.
    pub fn reserve(bytes: u64) -> Result<Option<Self>> {
        let pages = bytes.div_ceil(PAGE);
        if change(pages as i64)? >= pages as i64 {
            return Ok(Some(Self { pages, mounted: None }));
        }
        change(-(pages as i64))?;
        // Not by a macro: what those print is shown of failing tests only.
        let _ = writeln!(
            std::io::stderr(),
            "\n*** SKIPPED: this machine has no {pages} huge pages of 2 MiB to set aside ***"
        );
        Ok(None)
    }

    /// Mounts a hugetlbfs at the new directory `at`, before the hosts' processes start.
    pub fn mount(&mut self, at: &Path) -> Result<()> {
        fs::create_dir_all(at).doing(format!("make {}", at.display()))?;
        run(Command::new("mount").args(["-t", "hugetlbfs", "-o", "pagesize=2M,mode=1777", "none"]).arg(at))?;
        self.mounted = Some(at.to_owned());
        Ok(())
    }

    /// How many huge pages of this machine somebody has.
    pub fn used() -> Result<u64> {
        let text = fs::read_to_string("/proc/meminfo").doing("count huge pages")?;
        let of = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key))?;
            line.trim().parse::<u64>().ok()
        };
        let (total, free) = (of("HugePages_Total:"), of("HugePages_Free:"));
        total.zip(free).map(|(total, free)| total - free).doing("count huge pages")
    }
}

/// Changes how many there are, by so many; says by how many it did.
fn change(by: i64) -> Result<i64> {
    let what = "change how many huge pages there are";
    let lock = File::create(LOCK).doing(what)?;
    flock(&lock, FlockOperation::LockExclusive).doing(what)?;
    let count =
        || -> Result<i64> { fs::read_to_string(COUNT).doing(what)?.trim().parse::<i64>().doing(what) };
    let before = count()?;
    fs::write(COUNT, (before + by).max(0).to_string()).doing(what)?;
    Ok(count()? - before)
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(at) = &self.mounted {
            // Somebody may still have a file there.
            let _ = Command::new("umount").arg("-l").arg(at).status();
        }
        let _ = change(-(self.pages as i64));
    }
}
