//! A pattern of locks on bytes that nobody else ever locks.

use super::Terms;
use crate::recipe::SeenFile;
use std::{collections::BTreeSet, fs::File, io};
use sys::lock::{Lock, of_others};

/// How many bytes are locked. Each place has 40 bits; who cannot lock the file cannot have even one of them
/// locked.
const LOCKS: usize = 4;

/// Where patterns lie: far beyond the end of any file, and far from the bytes 100 to 303 that QEMU locks in
/// images.
const FAR: u64 = 1 << 61;

/// Within how many bytes the pattern of one proof lies. Outside of it others may show the same file to
/// others.
const WINDOW: u64 = 1 << 40;

/// The places of the locks, and the window that they lie in.
fn places(terms: &Terms<'_>, file: &SeenFile) -> (BTreeSet<u64>, u64) {
    let mut bytes = [0; 8 * (LOCKS + 1)];
    terms.derive("locks", &file.path, file.role.word().as_bytes()).fill(&mut bytes);
    let (numbers, _) = bytes.as_chunks();
    let mut numbers = numbers.iter().map(|bytes| u64::from_le_bytes(*bytes));
    let begin = FAR + (numbers.next().unwrap_or_default() % FAR) / WINDOW * WINDOW;
    (numbers.map(|number| begin + number % WINDOW).collect(), begin)
}

/// Locks the pattern of this proof, for as long as the file is open.
pub(super) fn hold(terms: &Terms<'_>, seen: &SeenFile, file: &File, writes: bool) -> io::Result<()> {
    let lock = if writes { Lock::Write } else { Lock::Read };
    places(terms, seen).0.into_iter().try_for_each(|at| lock.take(file, at..at + 1))
}

/// Whether exactly this pattern is locked; says what was found instead.
pub(super) fn are_held(terms: &Terms<'_>, seen: &SeenFile, file: &File, writes: bool) -> Result<(), String> {
    let failed = |error: io::Error| format!("its locks cannot be seen: {error}");
    let (places, mut at) = places(terms, seen);
    let end = at + WINDOW;
    for place in places {
        match of_others(file, place..place + 1).map_err(failed)? {
            None => return Err("the locks of the source are not on it".to_owned()),
            Some(Lock::Read) if writes => {
                return Err("the source may read it, but not write to it".to_owned());
            }
            Some(_) => {}
        }
        free(file, at, place).map_err(failed)??;
        at = place + 1;
    }
    free(file, at, end).map_err(failed)?
}

/// A file system that calls everything locked proves nothing.
fn free(file: &File, begin: u64, end: u64) -> io::Result<Result<(), String>> {
    if begin == end || of_others(file, begin..end)?.is_none() {
        return Ok(Ok(()));
    }
    Ok(Err("more of it is locked than the source says".to_owned()))
}
