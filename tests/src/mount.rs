//! What the file systems of tests have in common (FUSE): they are mounted, and gone when that is over.

use fuser::{BackgroundSession, Config, FileAttr, FileType, Filesystem, INodeNo, SessionACL};
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::UNIX_EPOCH,
};

/// A file system, mounted as long as this lives. Mount it before the hosts' processes start: they may not see
/// a mount that is made later. Before this is dropped, let everybody go who waits for an answer: they could
/// not be killed.
pub(crate) struct Mount {
    path: PathBuf,
    session: Option<BackgroundSession>,
}

impl Mount {
    /// Mounts it at the new directory `at`.
    pub(crate) fn new(system: impl Filesystem, at: &Path) -> io::Result<Self> {
        fs::create_dir_all(at)?;
        let mut config = Config::default();
        // The agents and QEMUs of all hosts, whoever they are.
        config.acl = SessionACL::All;
        let session = fuser::spawn_mount(system, at, &config).map_err(|e| {
            io::Error::new(e.kind(), format!("a file system cannot be mounted at {}: {e}", at.display()))
        })?;
        Ok(Self { path: at.to_owned(), session: Some(session) })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Somebody may still have a file open: detached, the session ends when it is closed.
        let mut umount = Command::new("umount");
        let _ = umount.arg("-l").arg(&self.path).stderr(Stdio::null()).status();
        drop(self.session.take());
    }
}

/// Whoever panicked meanwhile has failed its test; the others' file system still answers.
pub(crate) fn locked<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The attributes of root's own file, as old as can be.
pub(crate) fn attributes(inode: INodeNo, kind: FileType, perm: u16, size: u64) -> FileAttr {
    FileAttr {
        ino: inode,
        size,
        blocks: size.div_ceil(512),
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}
