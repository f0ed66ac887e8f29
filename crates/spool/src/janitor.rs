use crate::{FileName, Header, SpoolError, reader};
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// A spool file that somebody left behind, or that is in use.
#[derive(Clone, Debug)]
pub struct Found {
    /// What its name says.
    pub name: FileName,
    /// What its header says; none where that cannot be read.
    pub header: Option<Header>,
    /// Since when nobody has written to it.
    pub untouched: Duration,
}

/// What is to become of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It is of no use to anybody.
    Remove,
    /// It may be of use, or is not ours to judge.
    Keep,
}

/// Looks at each spool file in a directory, and removes those of which `judge` says that nobody needs them.
/// Returns these.
///
/// Only files that were not written to for as long as `age` are judged; all others are somebody's work.
/// `judge` knows whose they are: it must keep what another host made unless it knows that migration to be
/// over. What is no regular file, or has another name than a spool file, is not touched.
pub fn sweep(
    directory: &Path,
    age: Duration,
    now: SystemTime,
    judge: impl Fn(&Found) -> Verdict,
) -> Result<Vec<PathBuf>, SpoolError> {
    let mut removed = Vec::new();
    let entries = fs::read_dir(directory).map_err(|e| SpoolError::io("look through", directory, e))?;
    for entry in entries {
        let entry = entry.map_err(|e| SpoolError::io("look through", directory, e))?;
        let Some(name) = entry.file_name().to_str().and_then(|name| name.parse::<FileName>().ok()) else {
            continue;
        };
        let path = entry.path();
        let Some(found) = look(&path, name, now) else { continue };
        if found.untouched < age || judge(&found) == Verdict::Keep {
            continue;
        }
        match fs::remove_file(&path) {
            Ok(()) => removed.push(path),
            // Somebody was quicker, or it is not ours to remove: the next time.
            Err(e) => tracing::debug!(path = %path.display(), %e, "a spool file stays"),
        }
    }
    Ok(removed)
}

fn look(path: &Path, name: FileName, now: SystemTime) -> Option<Found> {
    let meta = fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file)?;
    // A clock that is behind makes a file young: it stays.
    let untouched = meta.modified().ok().and_then(|at| now.duration_since(at).ok()).unwrap_or_default();
    let header =
        reader::open(path).ok().and_then(|(_, bytes)| Header::parse(&bytes).ok()).map(|(header, _)| header);
    // A header that contradicts the name is not believed.
    let header = header.filter(|header| header.migration == name.migration && header.side == name.side);
    Some(Found { name, header, untouched })
}
