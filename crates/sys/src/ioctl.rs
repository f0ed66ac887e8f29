//! Numbers of ioctls, worked out as `<asm-generic/ioctl.h>` does it, so that a wrong argument type does not
//! compile.

use linux_raw_sys::general as raw;
use linux_raw_sys::ioctl as known;
use std::{io, os::fd::RawFd};

pub(crate) const NONE: u32 = 0;
pub(crate) const WRITE: u32 = 1;
const READ: u32 = 2;

pub(crate) const fn number(direction: u32, kind: u32, nr: u32, bytes: usize) -> u32 {
    direction << 30 | (bytes as u32) << 16 | kind << 8 | nr
}

const fn both<T>(kind: u32, nr: u32) -> u32 {
    number(READ | WRITE, kind, nr, size_of::<T>())
}

/// `PAGEMAP_SCAN`, Linux 6.7.
pub(crate) const PAGEMAP_SCAN: u32 = both::<raw::pm_scan_arg>(b'f' as u32, 16);

/// `USERFAULTFD_IOC_NEW` on `/dev/userfaultfd`, Linux 6.1.
pub(crate) const USERFAULTFD_IOC_NEW: u32 = number(NONE, raw::USERFAULTFD_IOC, 0, 0);

/// `TUNGETSNDBUF` of `<linux/if_tun.h>`.
pub(crate) const TUNGETSNDBUF: u32 = number(READ, b'T' as u32, 211, size_of::<i32>());

/// `<linux/sockios.h>`; numbers of before the scheme.
pub(crate) const SIOCOUTQ: u32 = nix::libc::TIOCOUTQ as u32;
pub(crate) const SIOCOUTQNSD: u32 = 0x894b;

const _: () = {
    assert!(both::<raw::uffdio_api>(raw::UFFDIO, raw::_UFFDIO_API) == known::UFFDIO_API);
    assert!(both::<raw::uffdio_register>(raw::UFFDIO, raw::_UFFDIO_REGISTER) == known::UFFDIO_REGISTER);
    assert!(
        both::<raw::uffdio_writeprotect>(raw::UFFDIO, raw::_UFFDIO_WRITEPROTECT)
            == known::UFFDIO_WRITEPROTECT
    );
    assert!(both::<raw::uffdio_copy>(raw::UFFDIO, raw::_UFFDIO_COPY) == known::UFFDIO_COPY);
    assert!(both::<raw::uffdio_zeropage>(raw::UFFDIO, raw::_UFFDIO_ZEROPAGE) == known::UFFDIO_ZEROPAGE);
    let range = size_of::<raw::uffdio_range>();
    assert!(number(READ, raw::UFFDIO, raw::_UFFDIO_UNREGISTER, range) == known::UFFDIO_UNREGISTER);
    assert!(number(READ, raw::UFFDIO, raw::_UFFDIO_WAKE, range) == known::UFFDIO_WAKE);
    assert!(PAGEMAP_SCAN == 0xc060_6610 && USERFAULTFD_IOC_NEW == 0xaa00);
};

/// Runs an ioctl whose argument the kernel may read and write.
///
/// # Safety
/// `request` must be one that takes a `T`, and whatever addresses `argument` holds must be good for what the
/// request does with them.
pub(crate) unsafe fn run<T>(fd: RawFd, request: u32, argument: &mut T) -> io::Result<i32> {
    // SAFETY: the caller promises that the request takes a `T`; `argument` is one, exclusively borrowed.
    let result = unsafe { nix::libc::ioctl(fd, request.into(), argument as *mut T) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
