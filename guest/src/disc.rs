//! What is in the CD drive.

use crate::setup;
use std::{
    fs::File,
    io::{self, Read},
    thread,
    time::{Duration, Instant},
};

/// The first drive.
const DRIVE: &str = "/dev/sr0";

/// How long its drivers may look for it.
const FOUND: Duration = Duration::from_secs(20);

/// `ENOMEDIUM`: a drive has nothing in it.
const EMPTY: i32 = 123;

/// `EIO`: a drive answers so once to whoever asks first for a medium that was put in.
const CHANGED: i32 = 5;
const TRIES: usize = 3;

/// How many bytes are on the disc and what they come to, all read anew; or that there is none.
pub(crate) fn read() -> Result<String, String> {
    setup::load("disc")?;
    let (end, mut tries) = (Instant::now() + FOUND, 0);
    loop {
        match File::open(DRIVE).and_then(sum) {
            Ok((bytes, sum)) => return Ok(format!("ok {bytes} {sum:016x}")),
            Err(error) if error.raw_os_error() == Some(EMPTY) => return Ok("empty".to_owned()),
            Err(error) if error.raw_os_error() == Some(CHANGED) && tries < TRIES => tries += 1,
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < end => {
                thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(format!("{DRIVE}: {error}")),
        }
    }
}

/// Who opens a drive alone finds nothing of it in the page cache.
fn sum(mut disc: impl Read) -> io::Result<(u64, u64)> {
    let (mut bytes, mut sum) = (0, FNV_OFFSET);
    let mut held = vec![0; 64 << 10];
    loop {
        let n = disc.read(&mut held)?;
        if n == 0 {
            return Ok((bytes, sum));
        }
        bytes += n as u64;
        sum = held[..n].iter().fold(sum, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(FNV_PRIME));
    }
}

/// Of FNV-1a with 64 bits.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0100_0000_01b3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_that_of_fnv_1a() {
        assert_eq!(sum(&b""[..]).unwrap(), (0, FNV_OFFSET));
        assert_eq!(sum(&b"foobar"[..]).unwrap(), (6, 0x8594_4171_f739_67e8));
    }
}
