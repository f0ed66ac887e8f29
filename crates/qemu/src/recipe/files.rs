//! Files of a VM: how this host sees them, and the descriptors by which it uses them.

use super::{Role, SeenFile};
use rustix::fs::{Mode, OFlags};
use std::{
    fs::{self, File, Metadata},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

/// Which file it is, on this host and until it is rebooted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Identity {
    /// The file system.
    pub device: u64,
    /// The file there.
    pub inode: u64,
}

impl Identity {
    /// That of a file that was looked at.
    pub fn of(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }

    /// That of whatever `path` leads to.
    pub fn at(path: &Path) -> io::Result<Self> {
        fs::metadata(path).map(|metadata| Self::of(&metadata))
    }
}

/// A file that this host has open for a VM. Whatever is said of the file is said of this descriptor, and this
/// is the one that QEMU is given: what the name leads to later does not matter.
#[derive(Debug)]
pub struct Opened {
    /// Its name in the recipe.
    pub path: PathBuf,
    /// What it is for.
    pub role: Role,
    /// Whether the VM only reads it; the descriptor allows no more then.
    pub read_only: bool,
    /// The file.
    pub file: File,
    /// Which file that is.
    pub identity: Identity,
    /// Where the name led to: no part of it is a link.
    pub real: PathBuf,
}

impl Opened {
    /// Opens a file for a VM. Whatever is no plain file is not opened but refused, without a trace on it.
    pub fn open(path: &Path, role: Role, read_only: bool) -> Result<Self, String> {
        let failed = |error: io::Error| format!("{} {}: {error}", role.word(), path.display());
        // A device or a pipe may do something when it is opened.
        let looked = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let looked = File::from(looked.map_err(|error| failed(error.into()))?);
        usable(&looked.metadata().map_err(failed)?, path, role)?;
        let name = format!("/proc/self/fd/{}", looked.as_raw_fd());
        let real = fs::read_link(&name).map_err(failed)?;
        let file = File::options().read(true).write(!read_only).open(&name).map_err(failed)?;
        let identity = Identity::of(&file.metadata().map_err(failed)?);
        Ok(Self { path: path.to_owned(), role, read_only, file, identity, real })
    }
}

/// Looks at a file. Says what is wrong with it if it cannot be used.
pub fn look(path: &Path, role: Role) -> Result<SeenFile, String> {
    let failed = |error: io::Error| format!("{} {}: {error}", role.word(), path.display());
    let metadata = fs::metadata(path).map_err(failed)?;
    usable(&metadata, path, role)?;
    let digest = match role {
        Role::Disk | Role::Backing => None,
        // What it is when the guest starts: later there may be another one.
        Role::Boot => Some(crate::sharing::content_of(&File::open(path).map_err(failed)?).map_err(failed)?),
    };
    let Identity { device, inode } = Identity::of(&metadata);
    Ok(SeenFile { path: path.to_owned(), role, bytes: metadata.len(), device, inode, digest })
}

/// Whether a file is of a kind that can follow a VM; says why not.
fn usable(metadata: &Metadata, path: &Path, role: Role) -> Result<(), String> {
    let (word, path, kind) = (role.word(), path.display(), metadata.file_type());
    if kind.is_file() {
        return Ok(());
    }
    if role == Role::Boot {
        return Err(format!("{word} {path} is not a file"));
    }
    // QEMU's locks on a device node hold within one host only (I6).
    let what =
        if kind.is_block_device() { "a raw device, which has no locks between hosts" } else { "not a file" };
    Err(format!("{word} {path} is {what}; use an image file on a shared file system"))
}
