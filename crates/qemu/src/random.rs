//! Random numbers for names that must not clash.

use std::io;

/// 64 random bits.
pub(crate) fn number() -> io::Result<u64> {
    let mut bytes = [0; 8];
    getrandom::getrandom(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}
