//! Which pages of a process are there and which were written: `PAGEMAP_SCAN` (Linux 6.7,
//! `admin-guide/mm/pagemap.rst`).

use crate::{ioctl, process::PidFd};
use linux_raw_sys::general as raw;
use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
};
use units::PAGE_SIZE;

/// How many runs one call may return. 24 bytes each: fewer mean more calls for a scattered dirty set, more
/// mean a buffer that falls out of the cache; above 1,000 the calls no longer show.
const RUNS: usize = 4096;

/// How many entries of a page table are read at once, of 8 bytes each.
const ENTRIES: usize = 4096;

/// The page tables of a process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    runs: Vec<raw::page_region>,
}

impl Pagemap {
    /// Opens the page tables of `process`. Needs the right to ptrace it.
    pub fn open(process: &PidFd) -> io::Result<Self> {
        let none = raw::page_region { start: 0, end: 0, categories: 0 };
        Ok(Self { file: File::open(process.proc_path("pagemap"))?, runs: vec![none; RUNS] })
    }

    /// Reports the runs of addresses within `addresses` that were written since they were last protected, and
    /// protects them again in the same instant. `addresses` must be registered for write protection with a
    /// userfaultfd in asynchronous mode, or the error is `EPERM`.
    pub fn take_written(&mut self, addresses: Range<u64>, report: impl FnMut(Range<u64>)) -> io::Result<()> {
        let flags = raw::PM_SCAN_WP_MATCHING | raw::PM_SCAN_CHECK_WPASYNC;
        // The kernel has a fast path for just this.
        let wanted = Wanted { all: raw::PAGE_IS_WRITTEN, flags, ..Wanted::default() };
        self.scan(addresses, &wanted, report)
    }

    /// Reports the runs of addresses that hold something and are not protected from writes; changes nothing.
    /// Such is a page that was thrown away (`MADV_DONTNEED`), which loses its protection, and then written.
    pub fn unprotected(&mut self, addresses: Range<u64>, report: impl FnMut(Range<u64>)) -> io::Result<()> {
        let any = raw::PAGE_IS_PRESENT | raw::PAGE_IS_SWAPPED;
        let wanted = Wanted { all: raw::PAGE_IS_WRITTEN, any, ..Wanted::default() };
        self.scan(addresses, &wanted, report)
    }

    /// Reports the runs of addresses at which the process has pages mapped just now. Of huge pages
    /// (hugetlbfs) `addresses` must hold whole ones. A page that is being moved to another place in memory is
    /// not among them.
    pub fn mapped(&mut self, addresses: Range<u64>, report: impl FnMut(Range<u64>)) -> io::Result<()> {
        self.scan(addresses, &Wanted { any: raw::PAGE_IS_PRESENT, ..Wanted::default() }, report)
    }

    /// The same, and what is being moved. A page that is protected before it is there counts, too.
    pub fn maybe_mapped(&mut self, addresses: Range<u64>, report: impl FnMut(Range<u64>)) -> io::Result<()> {
        let any = raw::PAGE_IS_PRESENT | raw::PAGE_IS_SWAPPED;
        self.scan(addresses, &Wanted { any, ..Wanted::default() }, report)
    }

    /// Reports the runs of addresses that hold something, in memory or in swap. A page that was only read,
    /// and that the kernel backs by its page of zeros, holds nothing.
    pub fn present(&mut self, addresses: Range<u64>, mut report: impl FnMut(Range<u64>)) -> io::Result<()> {
        let there = Wanted { any: raw::PAGE_IS_PRESENT, none: raw::PAGE_IS_PFNZERO, ..Wanted::default() };
        self.scan(addresses.clone(), &there, &mut report)?;
        // A page that is protected before it is there counts as swapped too.
        let mut swapped = Vec::new();
        let elsewhere = Wanted { any: raw::PAGE_IS_SWAPPED, ..Wanted::default() };
        self.scan(addresses, &elsewhere, |run| swapped.push(run))?;
        swapped.into_iter().try_for_each(|run| self.not_markers(run, &mut report))
    }

    /// Reports which of these addresses' entries hold something. That of a page that is protected and not
    /// there is a marker: the last type of swap entry (`SWP_PTE_MARKER`, from Linux 5.19 on).
    fn not_markers(&self, addresses: Range<u64>, report: &mut impl FnMut(Range<u64>)) -> io::Result<()> {
        const SWAPPED: u64 = 1 << 62;
        const TYPE: u64 = 0x1f;
        const PAGE: u64 = PAGE_SIZE as u64;
        let mut bytes = [0; 8 * ENTRIES];
        let mut at = addresses.start;
        while at < addresses.end {
            let count = ((addresses.end - at) / PAGE).min(ENTRIES as u64);
            let bytes = &mut bytes[..8 * count as usize];
            self.file.read_exact_at(bytes, at / PAGE * 8)?;
            for (page, entry) in (at..).step_by(PAGE_SIZE).zip(bytes.as_chunks::<8>().0) {
                let entry = u64::from_ne_bytes(*entry);
                if entry != 0 && (entry & SWAPPED == 0 || entry & TYPE != TYPE) {
                    report(page..page + PAGE);
                }
            }
            at += count * PAGE;
        }
        Ok(())
    }

    fn scan(
        &mut self,
        addresses: Range<u64>,
        wanted: &Wanted,
        mut report: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let mut at = addresses.start;
        while at < addresses.end {
            let mut scan = raw::pm_scan_arg {
                size: size_of::<raw::pm_scan_arg>() as u64,
                flags: wanted.flags.into(),
                start: at,
                end: addresses.end,
                walk_end: 0,
                vec: self.runs.as_mut_ptr() as u64,
                vec_len: self.runs.len() as u64,
                max_pages: 0,
                category_inverted: wanted.none.into(),
                category_mask: (wanted.all | wanted.none).into(),
                category_anyof_mask: wanted.any.into(),
                // A run ends where what is returned of it changes: nothing else does.
                return_mask: wanted.all.into(),
            };
            // SAFETY: the request takes a `pm_scan_arg`, and the kernel writes at most `vec_len` runs to
            // `vec`, which is a buffer of that many that we own and borrow exclusively here.
            let result = unsafe { ioctl::run(self.file.as_raw_fd(), ioctl::PAGEMAP_SCAN, &mut scan) };
            let found = match result {
                Ok(found) => found as usize,
                // A signal may end a scan before it found anything; what it had found it would have returned.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for run in self.runs.iter().take(found) {
                report(run.start..run.end);
            }
            if scan.walk_end <= at {
                return Err(io::Error::other(format!("the scan of page tables made no progress at {at:#x}")));
            }
            at = scan.walk_end;
        }
        Ok(())
    }
}

/// Which pages a scan is about: those of all these categories, of any of those (if there are any), of none of
/// the last.
#[derive(Default)]
struct Wanted {
    all: u32,
    any: u32,
    none: u32,
    flags: u32,
}
