//! A file that the source leaves beside an image, for the target to find.

use super::{Terms, mounts};
use crate::recipe::{
    Role, SeenFile,
    files::{Identity, Opened},
};
use rustix::fs::{AtFlags, Mode, OFlags, openat, unlinkat};
use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read, Write},
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// How their names begin.
const PREFIX: &str = ".whimbrel-";

/// A token that is older has been forgotten: it is there until the target has looked, which takes seconds.
const OLD: Duration = Duration::from_secs(3600);

/// What a token holds, at most: a word of 64 characters.
const LONGEST: u64 = 64;

/// A directory, and the name of an image in it.
struct Place {
    folder: File,
    name: OsString,
}

impl Place {
    /// Where a file is, by no link: the directory that is opened is the one that has it.
    fn of(file: &File, real: &Path) -> io::Result<Self> {
        let odd = |why: &str| io::Error::other(why.to_owned());
        let (Some(above), Some(name)) = (real.parent(), real.file_name()) else {
            return Err(odd("it is in no directory"));
        };
        let folder = File::open(above)?;
        let found = File::from(openat(
            &folder,
            name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )?);
        if Identity::of(&found.metadata()?) != Identity::of(&file.metadata()?) {
            return Err(odd("its directory has another file by its name"));
        }
        // One that was mounted over that of the directory.
        if mounts::number(&found) != mounts::number(&folder) {
            return Err(odd("it is mounted by itself, without its directory"));
        }
        Ok(Self { folder, name: name.to_owned() })
    }

    /// The token's name and content: the latter says which file of this directory is meant.
    fn token(&self, terms: &Terms<'_>, path: &Path, role: Role) -> (String, String) {
        let name = terms.word("token's name", path, role.word().as_bytes());
        (format!("{PREFIX}{}", &name[..32]), terms.word("token", path, self.name.as_bytes()))
    }
}

/// One that was left; taken away when this is dropped.
#[derive(Debug)]
pub(super) struct Token {
    folder: File,
    name: String,
}

impl Token {
    /// Leaves one beside an open file, which has the same name on both hosts.
    pub(super) fn leave(terms: &Terms<'_>, seen: &SeenFile, file: &File) -> io::Result<Self> {
        let real = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let place = Place::of(file, &real)?;
        if let Some(folder) = real.parent() {
            sweep(folder);
        }
        let (name, content) = place.token(terms, &seen.path, seen.role);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut made = File::from(openat(&place.folder, &name, flags, Mode::RUSR | Mode::WUSR)?);
        let token = Self { folder: place.folder, name };
        made.write_all(content.as_bytes())?;
        made.sync_all()?;
        Ok(token)
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        if let Err(error) = unlinkat(&self.folder, &self.name, AtFlags::empty()) {
            tracing::warn!(name = self.name, %error, "a token could not be taken away");
        }
    }
}

/// Whether the source has left a token beside this file; says why not.
pub(super) fn is_left(terms: &Terms<'_>, here: &Opened) -> Result<(), String> {
    let failed = |error: io::Error| format!("no token of the source is beside it: {error}");
    let place = Place::of(&here.file, &here.real).map_err(failed)?;
    let (name, content) = place.token(terms, &here.path, here.role);
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let found = openat(&place.folder, &name, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
    let mut told = Vec::new();
    File::from(found).take(LONGEST + 1).read_to_end(&mut told).map_err(failed)?;
    if told == content.as_bytes() {
        return Ok(());
    }
    Err("the token of the source that is beside it is for another file".to_owned())
}

/// Takes away what sources have left here that were killed.
pub fn sweep(folder: &Path) {
    let old = |path: &PathBuf| {
        let written = fs::symlink_metadata(path).and_then(|metadata| metadata.modified());
        written.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > OLD))
    };
    let ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.strip_prefix(PREFIX)
            .is_some_and(|rest| rest.len() == 32 && rest.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    for path in entries.filter(ours).filter(old) {
        match fs::remove_file(&path) {
            Ok(()) => {
                tracing::info!(path = %path.display(), "took away what a migration had left that was \
                                                        interrupted")
            }
            Err(error) => tracing::debug!(path = %path.display(), %error, "cannot be taken away"),
        }
    }
}
