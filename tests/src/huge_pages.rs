//! Explicit huge pages of this machine, for as long as a story needs them.

use crate::{Doing, Result, run};
use rustix::fs::{FlockOperation, flock};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

/// Where the kernel says how many huge pages of a size there are to be.
const SIZES: &str = "/sys/kernel/mm/hugepages";

/// Held while somebody changes that number.
const LOCK: &str = "/run/lock/whimbrel-lab-huge-pages";

/// The sizes of one, in KiB: the usual one and the largest.
const USUAL: u64 = 2 << 10;
const LARGEST: u64 = 1 << 20;

/// Huge pages of one size, given back in the end.
#[derive(Debug)]
pub struct HugePages {
    /// Of one, in KiB.
    size: u64,
    pages: u64,
    mounted: Option<PathBuf>,
}

impl HugePages {
    /// Has the kernel set so much aside in pages of 2 MiB, beyond what others have. None, and that is said
    /// loudly: it has not got it.
    pub fn reserve(bytes: u64) -> Result<Option<Self>> {
        Self::of(USUAL, bytes)
    }

    /// The same in pages of 1 GiB.
    pub fn reserve_largest(bytes: u64) -> Result<Option<Self>> {
        Self::of(LARGEST, bytes)
    }

    fn of(size: u64, bytes: u64) -> Result<Option<Self>> {
        let pages = bytes.div_ceil(size << 10);
        let change = |by: i64| if count(size).exists() { change(size, by) } else { Ok(0) };
        let got = change(pages as i64)?;
        if got >= pages as i64 {
            return Ok(Some(Self { size, pages, mounted: None }));
        }
        change(-got)?;
        // Not by a macro: what those print is shown of failing tests only.
        let _ = writeln!(
            std::io::stderr(),
            "\n*** SKIPPED: this machine has no {pages} huge pages of {size} KiB to set aside ***"
        );
        Ok(None)
    }

    /// Mounts a hugetlbfs at the new directory `at`, before the hosts' processes start.
    pub fn mount(&mut self, at: &Path) -> Result<()> {
        fs::create_dir_all(at).doing(format!("make {}", at.display()))?;
        let options = format!("pagesize={}K,mode=1777", self.size);
        run(Command::new("mount").args(["-t", "hugetlbfs", "-o", &options, "none"]).arg(at))?;
        self.mounted = Some(at.to_owned());
        Ok(())
    }

    /// How many huge pages of 2 MiB of this machine somebody has.
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

/// Where the number of those of this size is.
fn count(size: u64) -> PathBuf {
    Path::new(SIZES).join(format!("hugepages-{size}kB/nr_hugepages"))
}

/// Changes how many there are, by so many; says by how many it did.
fn change(size: u64, by: i64) -> Result<i64> {
    let what = "change how many huge pages there are";
    let lock = File::create(LOCK).doing(what)?;
    flock(&lock, FlockOperation::LockExclusive).doing(what)?;
    let place = count(size);
    let count =
        || -> Result<i64> { fs::read_to_string(&place).doing(what)?.trim().parse::<i64>().doing(what) };
    let before = count()?;
    fs::write(&place, (before + by).max(0).to_string()).doing(what)?;
    Ok(count()? - before)
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(at) = &self.mounted {
            // Somebody may still have a file there.
            let _ = Command::new("umount").arg("-l").arg(at).status();
        }
        let _ = change(self.size, -(self.pages as i64));
    }
}
