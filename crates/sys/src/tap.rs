//! What a TAP says to who has it open.

use crate::ioctl::{self, TUNGETSNDBUF};
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// How many bytes may wait in the TAP behind this descriptor; `i32::MAX`: there is no bound.
pub fn send_buffer(fd: BorrowedFd<'_>) -> io::Result<i32> {
    let mut bytes = 0_i32;
    // SAFETY: TUNGETSNDBUF writes an `int`, and reads nothing.
    unsafe { ioctl::run(fd.as_raw_fd(), TUNGETSNDBUF, &mut bytes) }?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, os::fd::AsFd};

    #[test]
    fn what_is_no_tap_has_none() {
        assert!(send_buffer(File::open("/dev/null").unwrap().as_fd()).is_err());
    }
}
