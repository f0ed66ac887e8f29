//! QEMU's program and what is installed with it, for a user that may not get there.

use super::pin::{Pin, Use};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};
use sys::mounts::{Ids, with_rights_of};

/// What everybody sees.
const EVERYBODYS: &str = "/usr";

/// What a program that is installed in `bin` finds beside that: firmware, modules, libraries.
const BESIDE: &[&str] = &["share", "lib", "lib64", "libexec", "usr"];

/// A program that is about to be started.
#[derive(Debug)]
pub(crate) struct Program {
    path: PathBuf,
    file: File,
}

impl Program {
    /// What this path leads to.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        Ok(Self { file: File::open(&path)?, path })
    }

    /// It, if not everybody can see it.
    pub(crate) fn pin(&self) -> Option<Pin<'_>> {
        let (path, real) = (self.path.clone(), self.path.clone());
        let pin = Pin { word: "program", path, real, file: &self.file, how: Use::Read };
        (!self.path.starts_with(EVERYBODYS)).then_some(pin)
    }

    /// Directories with what belongs to it. Of one that the user may not enter, only what is known to be
    /// that.
    pub(crate) fn beside(&self, user: Ids) -> io::Result<Vec<PathBuf>> {
        let Some(folder) = self.path.parent().filter(|_| !self.path.starts_with(EVERYBODYS)) else {
            return Ok(vec![]);
        };
        let whole = if folder.ends_with("bin") { folder.parent().unwrap_or(folder) } else { folder };
        // Nobody installs it alone in one of these.
        let is_common = whole.components().count() <= 2;
        if !is_common && is_open(whole, user)? {
            return Ok(vec![whole.to_owned()]);
        }
        let parts = BESIDE.iter().map(|part| whole.join(part));
        Ok(parts.filter(|part| folder.ends_with("bin") && !is_common && part.is_dir()).collect())
    }
}

/// Whether a user may go through a directory, wherever that is.
fn is_open(folder: &Path, user: Ids) -> io::Result<bool> {
    use std::os::fd::AsRawFd;
    let held = File::open(folder)?;
    let within = format!("/proc/self/fd/{}/.", held.as_raw_fd());
    with_rights_of(user, || fs::metadata(within).is_ok())
}
