//! Backing files: images that a qcow2 image names in its header, and reads where it holds nothing itself.
//!
//! QEMU opens them without being told, so both hosts must see them as they see the disk. The format:
//! <https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.txt>.

use super::{Role, SeenFile, extensions, files};
use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Component, Path, PathBuf},
};

/// The longest chain that is followed: far above what anybody reads a disk through, and a chain that bites
/// its own tail ends.
const LONGEST_CHAIN: usize = 64;

/// What a header may give its backing file's name, by the format.
const LONGEST_NAME: usize = 1023;

const MAGIC: &[u8; 4] = b"QFI\xfb";

/// Incompatible feature: the guest's data is in another file than this one.
const DATA_FILE: u64 = 1 << 2;

/// Every file behind the qcow2 image `image`, the nearest first; says what is wrong with one that cannot be
/// used.
pub fn backing_files(image: &Path) -> Result<Vec<SeenFile>, String> {
    let open = |path: &Path| File::open(path).map_err(|error| format!("disk {}: {error}", path.display()));
    let mut found = Vec::new();
    let mut at = image.to_owned();
    while let Some(next) = backing_of(&open(&at)?, &at)? {
        if found.len() == LONGEST_CHAIN {
            return Err(format!("disk {}: more than {LONGEST_CHAIN} backing files", image.display()));
        }
        found.push(files::look(&next, Role::Backing)?);
        at = next;
    }
    Ok(found)
}

/// What an image lies on.
pub(super) struct Behind {
    /// Its name.
    pub(super) path: PathBuf,
    /// Its format, which the image says.
    pub(super) format: &'static str,
    /// Whether the image has just this name for it.
    pub(super) is_full: bool,
}

/// The backing file that the open image `file`, called `image`, names; none where it names none, or is no
/// qcow2 image.
pub fn backing_of(file: &File, image: &Path) -> Result<Option<PathBuf>, String> {
    Ok(behind(file, image)?.map(|behind| behind.path))
}

/// The same with what else the image says of it.
pub(super) fn behind(file: &File, image: &Path) -> Result<Option<Behind>, String> {
    let failed = |error: io::Error| format!("disk {}: {error}", image.display());
    let mut header = [0; 80];
    match file.read_exact_at(&mut header, 0) {
        Ok(()) if header.starts_with(MAGIC) => {}
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(failed(error)),
        _ => return Ok(None),
    }
    let word = |at: usize| u64::from_be_bytes(*header[at..].first_chunk().expect("within the header"));
    let half = |at: usize| u32::from_be_bytes(*header[at..].first_chunk().expect("within the header"));
    if half(4) >= 3 && word(72) & DATA_FILE != 0 {
        return Err(format!(
            "disk {} keeps its data in another file, which is not supported; convert it with qemu-img \
             convert",
            image.display()
        ));
    }
    let (offset, length) = (word(8), half(16) as usize);
    if offset == 0 {
        return Ok(None);
    }
    if length > LONGEST_NAME {
        return Err(format!("disk {}: the name of its backing file is too long", image.display()));
    }
    let mut name = vec![0; length];
    file.read_exact_at(&mut name, offset).map_err(failed)?;
    let name = String::from_utf8(name)
        .map_err(|_| format!("disk {}: the name of its backing file is not UTF-8", image.display()))?;
    // Not a path for QEMU but a protocol: nbd://…, json:{…}
    let protocol = name.split_once(':').is_some_and(|(before, _)| !before.contains('/'));
    if protocol {
        return Err(format!(
            "disk {}: its backing file {name} is no plain file; flatten it with qemu-img rebase -b ''",
            image.display()
        ));
    }
    let format = extensions::said_format(file).map_err(failed)?.map_err(|why| {
        format!(
            "disk {}: its backing file {name} {why}; say its format with qemu-img rebase -u -F FORMAT \
             -b {name}, or flatten it with qemu-img rebase -b ''",
            image.display()
        )
    })?;
    let path = image.parent().unwrap_or(Path::new("/")).join(&name);
    let climbs = path.components().any(|part| part == Component::ParentDir);
    let plain = if climbs { std::fs::canonicalize(&path) } else { Ok(path.clone()) };
    let path = plain.map_err(|error| format!("backing file {}: {error}", path.display()))?;
    let is_full = path.to_str() == Some(&*name);
    Ok(Some(Behind { path, format, is_full }))
}
