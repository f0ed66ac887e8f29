//! Digests of files that a guest only reads.

use super::Terms;
use crate::recipe::files::Identity;
use std::{
    collections::HashMap,
    fs::{File, Metadata},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    sync::{LazyLock, Mutex},
    time::{Duration, Instant},
};
use units::Locked;

/// Makes digests of ours differ from what people publish of files (`b3sum`): who knows such a sum does not
/// know the file.
const CONTEXT: &str = "whimbrel 2026-11-29 content of a file that a guest only reads";

/// How long a file may be read. An ISO of 8 GB takes 80 s over a network of 1 Gbit/s.
const LONGEST: Duration = Duration::from_secs(180);

/// So much is read at a time.
const PIECE: usize = 1 << 20;

/// So many digests are remembered; more files than a host has media at a time.
const MOST: usize = 4096;

/// What a file has to be like before and after it was read, and later on, for its digest to count.
type State = (Identity, u64, (i64, i64), (i64, i64));

fn state(metadata: &Metadata) -> State {
    let written = (metadata.mtime(), metadata.mtime_nsec());
    (Identity::of(metadata), metadata.len(), written, (metadata.ctime(), metadata.ctime_nsec()))
}

/// A digest of a file's content, in hexadecimal. It is secret: whoever knows it can say that he knows the
/// file.
pub(crate) fn digest(file: &File) -> io::Result<String> {
    static KNOWN: LazyLock<Mutex<HashMap<State, String>>> = LazyLock::new(Mutex::default);
    let known = || KNOWN.locked();
    let before = state(&file.metadata()?);
    if let Some(digest) = known().get(&before) {
        return Ok(digest.clone());
    }
    let digest = read(file)?;
    if state(&file.metadata()?) != before {
        return Err(io::Error::other("somebody writes to it while it is read"));
    }
    let mut known = known();
    if known.len() >= MOST {
        known.clear();
    }
    known.insert(before, digest.clone());
    Ok(digest)
}

fn read(file: &File) -> io::Result<String> {
    let (begin, mut at, mut told) = (Instant::now(), 0, Duration::ZERO);
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    let mut piece = vec![0; PIECE];
    loop {
        let got = match file.read_at(&mut piece, at) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            got => got?,
        };
        if got == 0 {
            return Ok(hasher.finalize().to_hex().to_string());
        }
        hasher.update(&piece[..got]);
        at += got as u64;
        let took = begin.elapsed();
        if took > LONGEST {
            let why =
                format!("to compare its content takes more than {LONGEST:?}; put it on a shared file system");
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        if took - told > Duration::from_secs(5) {
            told = took;
            tracing::info!(bytes = at, "reading a file in order to compare its content");
        }
    }
}

/// Whether this is a digest of ours.
pub(super) fn is_digest(text: &str) -> bool {
    blake3::Hash::from_hex(text).is_ok()
}

/// What is told of a digest: enough to compare it with one's own, and of no use to others or later.
pub(super) fn sealed(terms: &Terms<'_>, path: &Path, digest: &str) -> String {
    terms.word("content", path, digest.as_bytes())
}
