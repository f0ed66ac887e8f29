//! A disk full of this machine's own files, each from a page's beginning on, as a page cache has them.

use lab::{Doing, Result};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};
use units::{Bytes, PAGE_SIZE};

/// Larger ones would be the whole disk.
const LARGEST: u64 = 32 << 20;

/// Writes `size` of files below `from`: a sample of all, the same each time.
pub(crate) fn write(from: &Path, size: Bytes, disk: &Path) -> Result<()> {
    let mut found = BTreeMap::new();
    collect(from, &mut found);
    let what = || format!("write {}", disk.display());
    let mut out = BufWriter::new(File::create(disk).doing(what())?);
    let mut at = 0;
    for path in found.into_values() {
        if at >= size.0 {
            break;
        }
        // Some files of a running system cannot be read.
        let Ok(file) = File::open(&path) else { continue };
        at += io::copy(&mut file.take(size.0 - at), &mut out).doing(what())?;
        at = at.next_multiple_of(PAGE_SIZE as u64);
        out.seek(SeekFrom::Start(at)).doing(what())?;
    }
    out.flush().doing(what())?;
    out.get_ref().set_len(size.0).doing(what())
}

/// All files, in an order that has nothing to do with their names.
fn collect(dir: &Path, found: &mut BTreeMap<(u64, PathBuf), PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            collect(&path, found);
        } else if kind.is_file() && entry.metadata().is_ok_and(|file| (1..=LARGEST).contains(&file.len())) {
            let mut hasher = DefaultHasher::new();
            path.hash(&mut hasher);
            found.insert((hasher.finish(), path.clone()), path);
        }
    }
}
