//! Which pages of a process were written: `PAGEMAP_SCAN` (Linux 6.7, `admin-guide/mm/pagemap.rst`).

use crate::{ioctl, process::PidFd};
use linux_raw_sys::general as raw;
use std::{fs::File, io, ops::Range, os::fd::AsRawFd};

/// How many runs one call may return. 24 bytes each: fewer mean more calls for a scattered dirty set, more mean
/// a buffer that falls out of the cache; above 1,000 the calls no longer show.
const RUNS: usize = 4096;

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

    /// Reports the runs of addresses within `addresses` that were written since they were last protected, and protects
    /// them again in the same instant. `addresses` must be registered for write protection with a userfaultfd in
    /// asynchronous mode, or the error is `EPERM`.
    pub fn take_written(
        &mut self,
        addresses: Range<u64>,
        mut report: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let mut at = addresses.start;
        while at < addresses.end {
            let mut scan = raw::pm_scan_arg {
                size: size_of::<raw::pm_scan_arg>() as u64,
                flags: (raw::PM_SCAN_WP_MATCHING | raw::PM_SCAN_CHECK_WPASYNC).into(),
                start: at,
                end: addresses.end,
                walk_end: 0,
                vec: self.runs.as_mut_ptr() as u64,
                vec_len: self.runs.len() as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: raw::PAGE_IS_WRITTEN.into(),
                category_anyof_mask: 0,
                return_mask: raw::PAGE_IS_WRITTEN.into(),
            };
            // SAFETY: the request takes a `pm_scan_arg`, and the kernel writes at most `vec_len` runs to `vec`, which
            // is a buffer of that many that we own and borrow exclusively here.
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
