//! The files that a QEMU process has open: what its disks are, whatever their names lead to by now.
//!
//! A name is looked up as QEMU would, in its mount namespace, under its root and in its working directory,
//! and as we would; it counts only if it leads to a file that QEMU has open.

use crate::{
    qmp::{Qmp, QmpError},
    recipe::files::Identity,
};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Component, Path, PathBuf},
};
use sys::process::PidFd;

/// How the kernel marks the name of a file that was removed.
const REMOVED: &str = " (deleted)";

/// What a process has open: plain files only.
#[derive(Debug)]
pub(crate) struct Held {
    /// `/proc/PID`.
    process: PathBuf,
    files: BTreeMap<Identity, HeldFile>,
    /// The descriptors that a launcher has given it (`-add-fd`), by what QEMU calls them.
    sets: BTreeMap<String, PathBuf>,
}

#[derive(Debug)]
struct HeldFile {
    /// A descriptor's number.
    number: String,
    /// What it is called now, as far as we can see that.
    name: PathBuf,
    removed: bool,
}

impl Held {
    /// Looks through its descriptors.
    pub(crate) fn by(process: &PidFd) -> io::Result<Self> {
        let mut held = Self { process: process.proc_path(""), files: BTreeMap::new(), sets: BTreeMap::new() };
        for entry in fs::read_dir(held.process.join("fd"))? {
            let path = entry?.path();
            // It may have been closed meanwhile.
            let (Ok(metadata), Ok(name)) = (fs::metadata(&path), fs::read_link(&path)) else { continue };
            if metadata.is_file() {
                let number = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let removed = metadata.nlink() == 0;
                held.files.insert(Identity::of(&metadata), HeldFile { number, name, removed });
            }
        }
        Ok(held)
    }

    /// And asks which of them are called `/dev/fdset/N`: QEMU has duplicated what it was given.
    pub(crate) fn with_sets(mut self, qmp: &mut Qmp) -> Result<Self, QmpError> {
        let answer = qmp.execute("query-fdsets", json!({}))?;
        for set in answer.as_array().into_iter().flatten() {
            let Some(number) = set["fdset-id"].as_i64() else { continue };
            let fds = set["fds"].as_array().into_iter().flatten().filter_map(|fd| fd["fd"].as_i64());
            let leads = fds.filter_map(|fd| fs::read_link(self.process.join("fd").join(fd.to_string())).ok());
            if let Some(file) = leads.into_iter().find(|file| file.is_absolute()) {
                self.sets.insert(format!("/dev/fdset/{number}"), file);
            }
        }
        Ok(self)
    }

    /// Its directory in `/proc`.
    pub(crate) fn process(&self) -> &Path {
        &self.process
    }

    /// What the process sees by an absolute name, under its own root directory.
    pub(crate) fn sees(&self, name: &Path) -> Option<Identity> {
        self.below("root", name, ResolveFlags::IN_ROOT)
    }

    /// Whether it has this file open.
    pub(crate) fn has(&self, identity: Identity) -> bool {
        self.files.contains_key(&identity)
    }

    /// The name by which this host reaches the file that QEMU calls `name`, which is what `word` says of it.
    pub(crate) fn find(&self, word: &str, name: &Path) -> Result<PathBuf, String> {
        if let Some(file) = name.to_str().and_then(|name| self.sets.get(name)) {
            return self.find(word, file);
        }
        let what = format!("{word} {}", name.display());
        let mut ids: BTreeSet<Identity> = self.views(name).into_iter().filter(|id| self.has(*id)).collect();
        if name.is_relative() {
            ids.extend(self.called(name));
        }
        let mut ids = ids.into_iter();
        let (id, file) = match (ids.next(), ids.next()) {
            (Some(id), None) => (id, &self.files[&id]),
            (Some(_), Some(_)) => {
                return Err(format!(
                    "{what}: several files that QEMU has open could be meant; start it with an absolute path"
                ));
            }
            (None, _) => return Err(self.lost(&what, name)),
        };
        let names = [name, &file.name].into_iter().filter(|name| name.is_absolute());
        match names.into_iter().find(|name| Identity::at(name).is_ok_and(|there| there == id)) {
            Some(name) => Ok(name.to_owned()),
            None if file.removed => Err(format!(
                "{what} was deleted while QEMU has it open; copy it from the guest, or restart the VM"
            )),
            None => Err(format!(
                "{what}: QEMU sees it in a mount namespace or root directory of its own, and this host does \
                 not have it by that name; mount it at the same path on the host"
            )),
        }
    }

    /// Opens the file that is called `path` here, by QEMU's own descriptor. `known` is which file that was
    /// before.
    pub(crate) fn open(
        &self,
        word: &str,
        path: &Path,
        known: Option<Identity>,
        write: bool,
    ) -> Result<File, String> {
        let what = format!("{word} {}", path.display());
        let id = Identity::at(path).ok().filter(|id| self.has(*id)).ok_or_else(|| self.lost(&what, path))?;
        // Two images of one VM that have changed names: each name leads to a file that QEMU has open, the
        // other one.
        if let Some(other) = known.filter(|known| *known != id).and_then(|known| self.files.get(&known)) {
            let now = other.name.display();
            return Err(format!(
                "{what} was renamed while QEMU has it open (it is {now} now); rename it back"
            ));
        }
        let file = &self.files[&id];
        let failed = |error: io::Error| {
            format!(
                "{what}: the agent cannot open it as QEMU has it: {error} (on NFS, export it with \
                 no_root_squash)"
            )
        };
        let mut options = File::options();
        options.read(true).write(write).custom_flags(OFlags::NONBLOCK.bits() as i32);
        let opened = options.open(self.process.join("fd").join(&file.number)).map_err(failed)?;
        if Identity::of(&opened.metadata().map_err(failed)?) != id {
            return Err(format!("{what}: QEMU has just closed it; try again"));
        }
        Ok(opened)
    }

    /// What a name leads to: for QEMU, and for us.
    fn views(&self, name: &Path) -> Vec<Identity> {
        let mut views = Vec::new();
        if name.is_absolute() {
            views.extend(Identity::at(name).ok());
            // Not /proc/PID/root/NAME: links in it would lead from our root directory.
            views.extend(self.sees(name));
        } else {
            views.extend(self.below("cwd", name, ResolveFlags::empty()));
            views.extend(self.began_in().and_then(|folder| Identity::at(&folder.join(name)).ok()));
        }
        views
    }

    fn below(&self, folder: &str, name: &Path, how: ResolveFlags) -> Option<Identity> {
        let folder = File::options()
            .read(true)
            .custom_flags((OFlags::PATH | OFlags::DIRECTORY).bits() as i32)
            .open(self.process.join(folder));
        let found = openat2(folder.ok()?, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), how).ok()?;
        File::from(found).metadata().ok().map(|metadata| Identity::of(&metadata))
    }

    /// Where a shell started it. Only a hint: what it leads to must be open.
    fn began_in(&self) -> Option<PathBuf> {
        let environment = fs::read(self.process.join("environ")).ok()?;
        let value = environment.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(b"PWD="))?;
        Some(PathBuf::from(OsStr::from_bytes(value))).filter(|folder| folder.is_absolute())
    }

    /// Open files whose name ends like this relative one.
    fn called(&self, name: &Path) -> Vec<Identity> {
        let dots = |part: &Component| matches!(part, Component::CurDir | Component::ParentDir);
        let end: PathBuf = name.components().skip_while(dots).collect();
        if end.as_os_str().is_empty() || end.components().any(|part| dots(&part)) {
            return Vec::new();
        }
        let files = self.files.iter().filter(|(_, file)| !file.removed && file.name.ends_with(&end));
        files.map(|(id, _)| *id).collect()
    }

    /// Why the file that QEMU called so is not what the name leads to.
    fn lost(&self, what: &str, name: &Path) -> String {
        let removed = |file: &&HeldFile| {
            let now = file.name.to_string_lossy();
            file.removed && now.strip_suffix(REMOVED).is_some_and(|was| Path::new(was).ends_with(name))
        };
        if self.files.values().any(|file| removed(&file)) {
            return format!(
                "{what}: the file that QEMU has open was deleted or replaced there; what has this name now \
                 is another one. Restart the VM with the one that is right"
            );
        }
        match fs::metadata(name) {
            Ok(_) => format!(
                "{what} is not the file that QEMU has open: that was renamed or replaced, or QEMU sees \
                 another file by this name (mount namespace); give it its name back"
            ),
            Err(error) => format!("{what}: {error}; give the file that QEMU has open this name again"),
        }
    }
}

pub(crate) mod mixed;
#[cfg(test)]
mod tests;
