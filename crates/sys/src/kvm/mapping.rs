//! Memory that is shared with the kernel or a guest: only ever read and written through pointers.

use rustix::{
    fs::MemfdFlags,
    mm::{MapFlags, ProtFlags, mmap, munmap},
};
use std::{
    ffi::c_void,
    io,
    os::fd::{BorrowedFd, OwnedFd},
    ptr::{NonNull, null_mut},
};
use units::Bytes;

/// A shared mapping of the beginning of a file, unmapped when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and `Mapping` gives no reference into it.
unsafe impl Send for Mapping {}

impl Mapping {
    pub(super) fn shared(fd: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        // SAFETY: the kernel chooses a free place; nothing of ours is there.
        let start =
            unsafe { mmap(null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0)? };
        let start = NonNull::new(start).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { start, len })
    }

    pub(super) fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    pub(super) fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at.checked_add(bytes.len()).is_some_and(|end| end <= self.len), "beyond the mapping");
        // SAFETY: within the mapping, as just asserted; `bytes` is elsewhere, since nobody has a reference
        // into it.
        unsafe {
            self.start.as_ptr().cast::<u8>().add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
        }
    }

    #[cfg(test)]
    pub(super) fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        assert!(at.checked_add(N).is_some_and(|end| end <= self.len), "beyond the mapping");
        // SAFETY: within the mapping, as just asserted; any bytes are a valid array of bytes.
        unsafe { self.start.as_ptr().cast::<u8>().add(at).cast::<[u8; N]>().read_volatile() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `shared` mapped, and nobody has a reference into it. It cannot fail for such a
        // range.
        let _ = unsafe { munmap(self.start.as_ptr(), self.len) };
    }
}

/// A file in memory of `size`, all holes.
pub(super) fn memfd(name: &str, size: Bytes) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, size.0)?;
    Ok(fd)
}
