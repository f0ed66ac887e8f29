//! What the kernel knows of its clock.

use nix::libc;
use std::{io, mem::zeroed};

/// Whether something keeps `CLOCK_REALTIME` synchronised, by `adjtimex(2)`.
pub fn synchronised() -> io::Result<bool> {
    // SAFETY: all zeros is a valid `timex` that asks for no change (`modes` is 0); the kernel fills it in.
    let state = unsafe {
        let mut now: libc::timex = zeroed();
        libc::adjtimex(&mut now)
    };
    match state {
        -1 => Err(io::Error::last_os_error()),
        libc::TIME_ERROR => Ok(false),
        _ => Ok(true),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_kernel_answers_everybody() {
        super::synchronised().unwrap();
    }
}
