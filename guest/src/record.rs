//! Pages that know whether they are right.
//!
//! A record fills its page: a magic number, its index, its version, a checksum of these, and a body of which
//! every word follows from the checksum and its place. So a page that is torn, moved, zeroed, or half old and
//! half new betrays itself. A page that is *wholly* old does not: for that the reader keeps the versions that
//! it wrote elsewhere and says which one it expects.

use crate::content::{Page, mix};
use std::fmt;
use units::PAGE_SIZE;

const MAGIC: u64 = u64::from_le_bytes(*b"whimbrel");
const WORDS: usize = PAGE_SIZE / 8;
/// Odd, so that no two words of a body are equal.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const HEAD: usize = 4;

/// Makes `page` version `version` of record `index`.
pub(crate) fn write(page: &mut Page, index: u64, version: u64) {
    let sum = checksum(index, version);
    let head = [MAGIC, index, version, sum];
    for (place, word) in page.0.chunks_exact_mut(8).enumerate() {
        let value = if place < HEAD { head[place] } else { body(sum, place) };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Whether `page` is version `version` of record `index`, every bit of it.
pub(crate) fn verify(page: &Page, index: u64, version: u64) -> Result<(), Corrupt> {
    let sum = checksum(index, version);
    let head = [MAGIC, index, version, sum];
    let wrong = |(place, word): (usize, &[u8])| {
        let want = if place < HEAD { head[place] } else { body(sum, place) };
        word != want.to_le_bytes()
    };
    if !page.0.chunks_exact(8).enumerate().any(wrong) {
        return Ok(());
    }
    let words: Vec<u64> =
        page.0.chunks_exact(8).map(|w| w.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))).collect();
    Err(Corrupt { index, version, what: diagnose(&words, index, version) })
}

fn checksum(index: u64, version: u64) -> u64 {
    mix(index.wrapping_mul(STEP) ^ mix(version))
}

fn body(sum: u64, place: usize) -> u64 {
    sum.wrapping_add((place as u64).wrapping_mul(STEP))
}

fn diagnose(words: &[u64], index: u64, version: u64) -> What {
    if words.iter().all(|&w| w == 0) {
        return What::Zero;
    }
    let (there, has) = (words[1], words[2]);
    let sum = checksum(there, has);
    let sound = |place: usize| words[place] == body(sum, place);
    let whole = words[0] == MAGIC && words[3] == sum && (HEAD..WORDS).all(sound);
    match (there == index, has.cmp(&version)) {
        (true, std::cmp::Ordering::Less) if whole => What::Stale { has },
        (true, std::cmp::Ordering::Greater) if whole => What::Newer { has },
        (false, _) if whole => What::Moved { from: there, has },
        _ => {
            let sum = checksum(index, version);
            let head = [MAGIC, index, version, sum];
            let bad =
                |&place: &usize| words[place] != head.get(place).copied().unwrap_or_else(|| body(sum, place));
            let wrong: Vec<usize> = (0..WORDS).filter(bad).collect();
            What::Torn { first_byte: wrong.first().map_or(0, |w| w * 8), words: wrong.len() }
        }
    }
}

/// A record that is not what was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Corrupt {
    pub(crate) index: u64,
    /// The version that was expected.
    pub(crate) version: u64,
    pub(crate) what: What,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum What {
    Zero,
    /// An older version, whole: a write was lost.
    Stale {
        has: u64,
    },
    /// A newer version, whole: the reader's own memory is older.
    Newer {
        has: u64,
    },
    /// Another record, whole.
    Moved {
        from: u64,
        has: u64,
    },
    /// Neither one nor the other.
    Torn {
        first_byte: usize,
        words: usize,
    },
}

impl fmt::Display for Corrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {} version {}: ", self.index, self.version)?;
        match &self.what {
            What::Zero => write!(f, "all zeros"),
            What::Stale { has } => write!(f, "stale, has version {has}"),
            What::Newer { has } => write!(f, "has version {has}, from the future"),
            What::Moved { from, has } => write!(f, "is page {from} version {has}"),
            What::Torn { first_byte, words } => {
                write!(f, "{words} words differ, the first at byte {first_byte}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(index: u64, version: u64) -> Page {
        let mut page = Page::ZERO;
        write(&mut page, index, version);
        page
    }

    fn what(page: &Page) -> What {
        verify(page, 7, 3).unwrap_err().what
    }

    #[test]
    fn what_was_written_is_right() {
        assert_eq!(verify(&record(7, 3), 7, 3), Ok(()));
        assert_eq!(verify(&record(0, 0), 0, 0), Ok(()));
    }

    #[test]
    fn each_way_of_being_wrong_is_told_apart() {
        assert_eq!(what(&Page::ZERO), What::Zero);
        assert_eq!(what(&record(7, 2)), What::Stale { has: 2 });
        assert_eq!(what(&record(7, 4)), What::Newer { has: 4 });
        assert_eq!(what(&record(9, 3)), What::Moved { from: 9, has: 3 });
        let mut half = record(7, 3);
        half.0[PAGE_SIZE / 2..].copy_from_slice(&record(7, 2).0[PAGE_SIZE / 2..]);
        assert_eq!(what(&half), What::Torn { first_byte: PAGE_SIZE / 2, words: WORDS / 2 });
    }

    #[test]
    fn no_flipped_bit_goes_unseen() {
        for byte in 0..PAGE_SIZE {
            let mut page = record(7, 3);
            page.0[byte] ^= 1 << (byte % 8);
            assert_eq!(what(&page), What::Torn { first_byte: byte / 8 * 8, words: 1 }, "byte {byte}");
        }
    }
}
