//! A VM's files, as QEMU's user is shown them: by the descriptor that the agent has opened. One that the user
//! may not open itself shows as its own (an id-mapped mount); nothing about the file is changed.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};
use sys::mounts::{Ids, Shift, Tree, with_rights_of};

/// A file of the VM.
#[derive(Debug)]
pub(crate) struct Pin<'a> {
    /// What it is, for people: `disk`.
    pub(crate) word: &'static str,
    /// The name by which QEMU opens it.
    pub(crate) path: PathBuf,
    /// Where that led when it was opened: no part of it is a link.
    pub(crate) real: PathBuf,
    /// It.
    pub(crate) file: &'a File,
    /// What QEMU does with it.
    pub(crate) how: Use,
}

/// What QEMU does with a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Use {
    /// It only ever reads it, and cannot write it.
    Read,
    /// It reads it, and writes it when a person has it commit an overlay.
    Commit,
    /// It writes it from the start.
    Write,
}

impl Pin<'_> {
    /// Opens it as QEMU will, by any of the names that it has.
    pub(super) fn open_at(&self, path: &Path, user: Ids) -> io::Result<File> {
        open(path, self.how == Use::Write, user)
    }

    /// Whether the user has the rights to the file itself that it may come to need.
    fn is_users(&self, user: Ids) -> bool {
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        open(Path::new(&own), self.how > Use::Read, user).is_ok()
    }

    /// What is told if that does not go.
    pub(super) fn refused(&self, name: &str, error: &io::Error) -> String {
        let (word, path) = (self.word, self.path.display());
        format!(
            "{word} {path}: the user {name}, as whom QEMU runs, cannot open it: {error}; give it the right \
             to (chown {name} {path}), or say user = \"root\" in [qemu]"
        )
    }

    /// Whether this is it.
    pub(super) fn is(&self, found: &fs::Metadata) -> bool {
        is_same(found, self.file)
    }
}

/// Why this user cannot be given these files, whatever directories they are in; each with a remedy.
pub(super) fn refusals(pins: &[Pin<'_>], user: Ids, name: &str) -> Vec<String> {
    let mut shifts = Shifts::new(user);
    let refusal = |pin| {
        let tree = match shifts.tree(pin) {
            Ok(tree) => tree,
            Err(error) => return Some(super::no_view("take a file", &error)),
        };
        let path = format!("/proc/self/fd/{}", tree.as_raw_fd());
        pin.open_at(Path::new(&path), user).err().map(|error| pin.refused(name, &error))
    };
    pins.iter().filter_map(refusal).collect()
}

/// Files as their user is shown them. Each owner needs a user namespace, once.
#[derive(Debug)]
pub(super) struct Shifts {
    user: Ids,
    known: Vec<(Ids, Option<Shift>)>,
}

impl Shifts {
    pub(super) fn new(user: Ids) -> Self {
        Self { user, known: Vec::new() }
    }

    /// A file, ready for its place.
    pub(super) fn tree(&mut self, pin: &Pin<'_>) -> io::Result<Tree> {
        let mut tree = Tree::of(pin.file)?;
        if !pin.is_users(self.user)
            && let Some(shift) = self.of(pin)?
            && let Err(error) = tree.show_as(shift)
        {
            tracing::info!(path = %pin.path.display(), %error, "its file system has no id-mapped mounts");
            tree = Tree::of(pin.file)?;
        }
        tree.restrict(pin.how == Use::Read)?;
        Ok(tree)
    }

    /// What shows the file's owner as the user.
    fn of(&mut self, pin: &Pin<'_>) -> io::Result<Option<&Shift>> {
        let metadata = pin.file.metadata()?;
        let owner = Ids { user: metadata.uid(), group: metadata.gid() };
        let at = self.known.iter().position(|(ids, _)| *ids == owner).unwrap_or_else(|| {
            let shift = Shift::new(owner, self.user).inspect_err(
                |error| tracing::info!(path = %pin.path.display(), %error, "no user namespace can be made"),
            );
            self.known.push((owner, shift.ok()));
            self.known.len() - 1
        });
        Ok(self.known[at].1.as_ref())
    }
}

fn open(path: &Path, write: bool, user: Ids) -> io::Result<File> {
    with_rights_of(user, || File::options().read(true).write(write).open(path))?
}

pub(super) fn is_same(found: &fs::Metadata, file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == (found.dev(), found.ino()))
}
