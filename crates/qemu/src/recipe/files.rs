//! Files that both hosts must see: how one host saw them, and whether another sees the same.

use super::{Role, SeenFile};
use std::hash::Hasher as _;
use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};
use twox_hash::XxHash3_64;

/// Looks at a file. Says what is wrong with it if it cannot be used.
pub fn look(path: &Path, role: Role) -> Result<SeenFile, String> {
    let failed = |error: io::Error| format!("{} {}: {error}", word(role), path.display());
    let metadata = fs::metadata(path).map_err(failed)?;
    let kind = metadata.file_type();
    if role == Role::Boot && !kind.is_file() {
        return Err(format!("{} {} is not a file", word(role), path.display()));
    }
    if role != Role::Boot && !kind.is_file() {
        // QEMU's locks on a device node hold within one host only (I6).
        let what = if kind.is_block_device() {
            "a raw device, which has no locks between hosts"
        } else {
            "not a file"
        };
        return Err(format!(
            "{} {} is {what}; use an image file on a shared file system",
            word(role),
            path.display()
        ));
    }
    let digest = match role {
        Role::Disk | Role::Backing => None,
        Role::Boot => Some(digest(path).map_err(failed)?),
    };
    Ok(SeenFile { path: path.to_owned(), role, bytes: metadata.len(), inode: metadata.ino(), digest })
}

/// Whether this host sees the same file as another did; says why not.
pub fn compare(there: &SeenFile) -> Result<(), String> {
    let here = look(&there.path, there.role)?;
    let differs = |what: String| {
        Err(format!("{} {} is not the same here: {what}", word(there.role), there.path.display()))
    };
    if here.digest != there.digest {
        return differs("its content differs".to_owned());
    }
    // A qcow2 image may grow while the guest runs; the inode is what says that it is the same.
    if there.role != Role::Boot && here.inode != there.inode {
        let (a, b) = (there.inode, here.inode);
        return differs(format!("inode {a} there, {b} here; put it on a file system that both hosts share"));
    }
    Ok(())
}

fn word(role: Role) -> &'static str {
    match role {
        Role::Disk => "disk",
        Role::Backing => "backing file",
        Role::Boot => "boot file",
    }
}

/// A digest of a file's content, in hexadecimal. It tells files apart, not enemies.
fn digest(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = XxHash3_64::new();
    let mut piece = vec![0; 256 << 10];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(format!("{:016x}", hasher.finish())),
            got => hasher.write(&piece[..got]),
        }
    }
}

pub(crate) fn digest_bytes(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}
