//! A file that is somebody's RAM.
//!
//! It is reached by `pread` and `pwrite`, not through a mapping of our own: a hole that is read stays a hole,
//! nothing counts as our memory, and no fault or truncation can reach us.

use linux_raw_sys::general::{HUGETLBFS_MAGIC, TMPFS_MAGIC};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fstatfs, seek};
use std::{
    fs::File,
    io,
    ops::Range,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt},
    },
};
use units::{PAGE_SIZE, PageIndex, PageRange, PageSet};

/// A window of a memfd or of a file on tmpfs that a process maps as its RAM. Holes are pages that nobody ever
/// wrote.
#[derive(Debug)]
pub struct RamFile {
    file: File,
    /// The window, in bytes of the file.
    window: Range<u64>,
}

impl RamFile {
    /// The `bytes` bytes of `file` from `offset` on. Both must be whole pages and lie within the file.
    pub fn new(file: File, offset: u64, bytes: u64) -> io::Result<Self> {
        let page = PAGE_SIZE as u64;
        let size = file.metadata()?.len();
        let end = offset
            .checked_add(bytes)
            .filter(|end| *end <= size && offset.is_multiple_of(page) && bytes.is_multiple_of(page));
        let Some(end) = end else {
            let text =
                format!("{bytes} bytes from {offset} on are not whole pages of a file of {size} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        };
        Ok(Self { file, window: offset..end })
    }

    /// The size of the explicit huge pages that the file is made of (hugetlbfs); none for any other file.
    /// Such a file cannot be written by `pwrite`, a hole is a huge page, and where holes are the file does
    /// not tell.
    pub fn huge_page(&self) -> io::Result<Option<u64>> {
        huge_page(&self.file)
    }

    /// Whether it is memory of the kernel's own (a memfd, tmpfs): only there can a writer be made to wait by
    /// somebody else, and a missing page be waited for.
    pub fn is_shmem(&self) -> io::Result<bool> {
        Ok(fstatfs(&self.file)?.f_type as u64 == u64::from(TMPFS_MAGIC))
    }

    /// Whether no directory names the file: it goes with those who have it open.
    pub fn is_nameless(&self) -> io::Result<bool> {
        Ok(self.file.metadata()?.nlink() == 0)
    }

    /// The size of the window.
    pub fn bytes(&self) -> u64 {
        self.window.end - self.window.start
    }

    /// Whether the window is all of the file.
    pub fn is_whole(&self) -> io::Result<bool> {
        Ok(self.window == (0..self.file.metadata()?.len()))
    }

    /// The same file, opened once more: its locks are not those of the first.
    pub fn reopen(&self) -> io::Result<File> {
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        File::options().read(true).write(true).open(own)
    }

    /// The size of the window in pages.
    pub fn pages(&self) -> u64 {
        (self.window.end - self.window.start) / PAGE_SIZE as u64
    }

    /// How many bytes of the file are there; 0 where that cannot be asked.
    pub fn allocated(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The pages that are not holes.
    pub fn present(&self) -> io::Result<PageSet> {
        let mut present = PageSet::empty(self.pages());
        let mut at = PageIndex(0);
        while let Some(run) = self.next_present(at)? {
            present.insert_range(run);
            at = run.end();
        }
        Ok(present)
    }

    /// The first run of pages at or after `from` that are not holes.
    fn next_present(&self, from: PageIndex) -> io::Result<Option<PageRange>> {
        let Some(first) = self.first_present(from)? else {
            return Ok(None);
        };
        let start = self.window.start + first.offset();
        let end = seek(&self.file, SeekFrom::Hole(start))?.min(self.window.end);
        let last = (end - self.window.start).div_ceil(PAGE_SIZE as u64);
        Ok(Some(PageRange::new(first, last - first.0)))
    }

    /// The first page at or after `from` that is not a hole. Unlike the end of a run, which may be gigabytes
    /// away, it is found at once.
    pub fn first_present(&self, from: PageIndex) -> io::Result<Option<PageIndex>> {
        let from = self.window.start + from.offset();
        if from >= self.window.end {
            return Ok(None);
        }
        match seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) if start < self.window.end => Ok(Some(PageIndex::at_offset(start - self.window.start))),
            Ok(_) | Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Copies `range` out. Whoever writes to it meanwhile may leave the copy torn. A hole reads as zeros and
    /// stays one.
    pub fn read(&self, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        let at = self.check(range, into.len())?;
        self.file.read_exact_at(into, at)
    }

    /// Overwrites `range`.
    pub fn write(&self, range: PageRange, from: &[u8]) -> io::Result<()> {
        let at = self.check(range, from.len())?;
        self.file.write_all_at(from, at)
    }

    /// Makes holes of `range`, and makes sure that they are: a page that somebody pinned, or a piece of a
    /// huge page, may survive a punch that was reported as done. The error is `ResourceBusy` then.
    pub fn punch(&self, range: PageRange) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let at = self.check(range, range.count as usize * PAGE_SIZE)?;
        fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, range.bytes().0)?;
        match self.first_present(range.start)? {
            Some(left) if left < range.end() => {
                let text = format!("page {} is still there after a hole was punched for it", left.0);
                Err(io::Error::new(io::ErrorKind::ResourceBusy, text))
            }
            _ => Ok(()),
        }
    }

    /// Where `range` begins in the file, if it lies within the window and `bytes` is its length.
    fn check(&self, range: PageRange, bytes: usize) -> io::Result<u64> {
        place(range, self.pages(), bytes).map(|at| self.window.start + at)
    }
}

/// The size of the explicit huge pages that a file is made of.
pub(crate) fn huge_page(file: &File) -> io::Result<Option<u64>> {
    let system = fstatfs(file)?;
    let huge = system.f_type as u64 == u64::from(HUGETLBFS_MAGIC);
    let bytes = system.f_bsize as u64;
    if huge && (!bytes.is_power_of_two() || bytes < PAGE_SIZE as u64) {
        return Err(io::Error::other(format!("a hugetlbfs with pages of {bytes} bytes")));
    }
    Ok(huge.then_some(bytes))
}

/// Where `range` begins in a block of `pages`, in bytes, if it lies within it and `bytes` is its length.
pub(crate) fn place(range: PageRange, pages: u64, bytes: usize) -> io::Result<u64> {
    if range.fits(pages) && range.bytes().0 == bytes as u64 {
        return Ok(range.start.offset());
    }
    let text = format!("{bytes} bytes for {range} of a block of {pages} pages");
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}
