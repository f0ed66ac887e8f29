//! RAM that only its process can reach.
//!
//! It is gone when its process is; no read then gives what a later process of the same number holds.

use crate::{huge::HugePages, pagemap::Pagemap, process::PidFd, ram::place};
use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex},
};
use units::{Locked, PAGE_SIZE, PageIndex, PageRange, PageSet};

/// From so many bytes on `process_vm_readv` is the faster way: 3.1 GB/s against 2.5 of `/proc/PID/mem`, but
/// 1.4 against 1.5 in single pages (`crates/sys/tests/private.rs`, `figures`).
const BULK: usize = 4 * PAGE_SIZE;

/// Addresses of another process, which holds its RAM there.
#[derive(Debug)]
pub struct ProcessRam {
    process: Arc<PidFd>,
    memory: File,
    pagemap: Mutex<Pagemap>,
    addresses: Range<u64>,
    kind: Backing,
}

#[derive(Debug)]
enum Backing {
    Anonymous,
    /// A file lies under it, so that a page that is not there is not zeros.
    OfFile,
    /// Huge pages, of which none is to come into being because we look at it.
    Huge(HugePages),
}

impl ProcessRam {
    /// What `process` holds at `addresses`, whole pages. `of_file`: it is a private mapping of a file.
    pub fn new(process: &Arc<PidFd>, addresses: Range<u64>, of_file: bool) -> io::Result<Self> {
        Self::of(process, addresses, if of_file { Backing::OfFile } else { Backing::Anonymous })
    }

    /// Huge pages of `page` bytes, whose file holds nothing of its own.
    pub fn huge(process: &Arc<PidFd>, addresses: Range<u64>, page: u64) -> io::Result<Self> {
        let huge = HugePages::new(process, addresses.clone(), page)?;
        Self::of(process, addresses, Backing::Huge(huge))
    }

    fn of(process: &Arc<PidFd>, addresses: Range<u64>, kind: Backing) -> io::Result<Self> {
        let page = PAGE_SIZE as u64;
        if !addresses.start.is_multiple_of(page) || !addresses.end.is_multiple_of(page) {
            let text = format!("{addresses:#x?} are no whole pages");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let memory = File::open(process.proc_path("mem"))?;
        let pagemap = Mutex::new(Pagemap::open(process)?);
        Ok(Self { process: Arc::clone(process), memory, pagemap, addresses, kind })
    }

    /// Whether a file lies under it.
    pub fn is_of_file(&self) -> bool {
        matches!(self.kind, Backing::OfFile)
    }

    /// Its size in pages.
    pub fn pages(&self) -> u64 {
        (self.addresses.end - self.addresses.start) / PAGE_SIZE as u64
    }

    /// The pages that may hold something else than zeros.
    pub fn present(&self) -> io::Result<PageSet> {
        let mut present = PageSet::empty(self.pages());
        match &self.kind {
            Backing::Anonymous => {}
            Backing::OfFile => {
                present.insert_range(PageRange::new(PageIndex(0), self.pages()));
                return Ok(present);
            }
            Backing::Huge(huge) => {
                for run in huge.private()? {
                    present.insert_range(self.pages_at(run));
                }
                return Ok(present);
            }
        }
        let mut pagemap = self.pagemap.locked();
        pagemap.present(self.addresses.clone(), |run| present.insert_range(self.pages_at(run)))?;
        Ok(present)
    }

    /// Copies `range` out. Whoever writes to it meanwhile may leave the copy torn.
    pub fn read(&self, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        let at = self.addresses.start + place(range, self.pages(), into.len())?;
        match &self.kind {
            Backing::Huge(huge) => self.read_huge(huge, at, into),
            Backing::Anonymous | Backing::OfFile => self.copy(at, into),
        }
    }

    /// Huge pages that are not there are zeros.
    fn read_huge(&self, huge: &HugePages, at: u64, into: &mut [u8]) -> io::Result<()> {
        let all = at..at + into.len() as u64;
        let covers =
            |runs: &[Range<u64>]| runs.iter().any(|run| run.start <= all.start && all.end <= run.end);
        let mapped = huge.mapped_within(all.clone())?;
        if covers(&mapped) {
            return self.copy(at, into);
        }
        // One that is only being moved has its content.
        into.fill(0);
        for run in huge.private()? {
            let (start, end) = (run.start.max(all.start), run.end.min(all.end));
            if start < end {
                self.copy(start, &mut into[(start - at) as usize..(end - at) as usize])?;
            }
        }
        Ok(())
    }

    /// The pages at these addresses, of those that are this block's.
    fn pages_at(&self, run: Range<u64>) -> PageRange {
        let first = PageIndex::at_offset(run.start - self.addresses.start);
        PageRange::new(first, (run.end.min(self.addresses.end) - run.start) / PAGE_SIZE as u64)
    }

    fn copy(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        if into.len() < BULK {
            // This file belongs to the address space, not to the number of its process.
            return self.memory.read_exact_at(into, at);
        }
        self.process.read_memory(at, into)?;
        match self.process.is_alive()? {
            true => Ok(()),
            // Another process may have its number by now.
            false => Err(io::Error::from(io::ErrorKind::NotConnected)),
        }
    }
}
