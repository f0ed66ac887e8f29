//! RAM of explicit huge pages (hugetlbfs) in another process: which of them are there.
//!
//! The page tables tell it, with two things to know, both seen on Linux 6.18. A page that is protected from
//! writes before it is there has a mark which looks like that of a page that the kernel is moving to another
//! place just then; such a page has content. And whoever reads an absent page in the address space of its
//! process makes it present: a huge page out of few.

use crate::{maps, pagemap::Pagemap, process::PidFd};
use std::{
    io,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::Duration,
};
use units::{Locked, PAGE_SIZE};

/// How often two counts that must agree are taken. They do not only while the guest touches new pages in that
/// instant.
const TRIES: u32 = 8;

/// What lies between two tries: the kernel moves a page of 2 MiB in less.
const BETWEEN: Duration = Duration::from_millis(1);

/// Explicit huge pages that a process has mapped.
#[derive(Debug)]
pub struct HugePages {
    process: Arc<PidFd>,
    pagemap: Mutex<Pagemap>,
    addresses: Range<u64>,
    page: u64,
}

impl HugePages {
    /// Those of `page` bytes that `process` has at `addresses`; the last one may reach beyond their end.
    pub fn new(process: &Arc<PidFd>, addresses: Range<u64>, page: u64) -> io::Result<Self> {
        if !page.is_power_of_two() || page < PAGE_SIZE as u64 || !addresses.start.is_multiple_of(page) {
            let text = format!("no huge page of {page} bytes begins at {:#x}", addresses.start);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let addresses = addresses.start..addresses.end.next_multiple_of(page);
        let pagemap = Mutex::new(Pagemap::open(process)?);
        Ok(Self { process: Arc::clone(process), pagemap, addresses, page })
    }

    /// The size of each.
    pub fn page(&self) -> u64 {
        self.page
    }

    /// All of them.
    pub fn addresses(&self) -> Range<u64> {
        self.addresses.clone()
    }

    /// The runs of addresses that are mapped just now. What is being moved, or is only in the file, is not
    /// among them.
    pub fn mapped(&self) -> io::Result<Vec<Range<u64>>> {
        self.mapped_within(self.addresses())
    }

    /// The same of the huge pages in which these addresses lie.
    pub fn mapped_within(&self, addresses: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let start = addresses.start / self.page * self.page;
        let end = addresses.end.next_multiple_of(self.page);
        let mut runs = Vec::new();
        self.pagemap().mapped(start..end, |run| runs.push(run))?;
        Ok(runs)
    }

    /// The runs of addresses that hold something, of memory that others share by a file: `allocated` says how
    /// much that holds. Where it holds more than is mapped, all of it may be there.
    pub fn shared(&self, allocated: impl Fn() -> u64) -> io::Result<Vec<Range<u64>>> {
        for _ in 0..TRIES {
            let before = allocated();
            let runs = self.mapped()?;
            if before == bytes(&runs) && allocated() == before {
                return Ok(runs);
            }
            thread::sleep(BETWEEN);
        }
        Ok(vec![self.addresses()])
    }

    /// The same of memory that is the process' own.
    pub fn private(&self) -> io::Result<Vec<Range<u64>>> {
        for _ in 0..TRIES {
            let runs = self.mapped()?;
            if bytes(&runs) == maps::huge_bytes(&self.process, &self.addresses)? {
                return Ok(runs);
            }
            thread::sleep(BETWEEN);
        }
        let mut runs = Vec::new();
        self.pagemap().maybe_mapped(self.addresses(), |run| runs.push(run))?;
        Ok(runs)
    }

    fn pagemap(&self) -> MutexGuard<'_, Pagemap> {
        self.pagemap.locked()
    }
}

fn bytes(runs: &[Range<u64>]) -> u64 {
    runs.iter().map(|run| run.end - run.start).sum()
}
