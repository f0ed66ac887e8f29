//! What the file names of a command line lead to, on this host.

use crate::{
    held::Held,
    recipe::{Role, files::Identity},
};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// By what names are understood.
pub(crate) enum Names<'a> {
    /// A directory that relative names begin in; nothing else is known.
    In(&'a Path),
    /// What the process has open, and sees.
    Of(&'a Held),
}

impl Names<'_> {
    /// The absolute name by which this host has the file that QEMU calls `name`.
    pub(crate) fn file(&self, role: Role, name: &str) -> Result<PathBuf, String> {
        // QEMU's word for what is a plain file anyway.
        let name = name.strip_prefix("file:").unwrap_or(name);
        match self {
            Self::In(folder) => Ok(folder.join(name)),
            Self::Of(held) if role == Role::Boot => loaded(held, Path::new(name)),
            Self::Of(held) => held.find(role.word(), Path::new(name)),
        }
    }
}

/// A file that QEMU has read and closed.
fn loaded(held: &Held, name: &Path) -> Result<PathBuf, String> {
    let what = format!("{} {}", Role::Boot.word(), name.display());
    if name.is_absolute() {
        return match (Identity::at(name), held.sees(name)) {
            (Ok(here), Some(there)) if here != there => Err(format!(
                "{what}: QEMU sees another file by this name (mount namespace, -chroot); give both the same"
            )),
            _ => Ok(name.to_owned()),
        };
    }
    // Where QEMU was started; -daemonize has it leave that.
    let folder = fs::read_link(held.process().join("cwd")).unwrap_or_default();
    match folder.join(name) {
        path if path.is_absolute() && path.exists() => Ok(path),
        _ => Err(format!(
            "{what}: QEMU is no longer in the directory where its name begins; start it with an absolute path"
        )),
    }
}
