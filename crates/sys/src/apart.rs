//! Files whose descriptors nobody inherits.
//!
//! A process that is started inherits all descriptors and closes most of them when it begins its own program.
//! Closing a file asks its file system, whoever opened it; where that does not answer, the new process hangs
//! before it has begun, and with it whoever started it. So a file on a store that may hang is held by a
//! thread with a table of descriptors of its own (`CLOSE_RANGE_UNSHARE`, Linux 5.9). Nothing but paths and
//! bytes goes to that thread and comes back, so that no descriptor is ever used in the wrong table.

use nix::libc;
use rustix::fs::{FallocateFlags, SeekFrom};
use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::mpsc::{Sender, channel},
    thread,
};

type Job = Box<dyn FnOnce(&fs::File) + Send>;

/// An open file. Every method waits for as long as its store takes; dropping it does not.
#[derive(Debug)]
pub struct File(Sender<Job>);

/// How to open one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    /// It must not be there yet; for its owner only.
    New,
    /// For reading, if it is a regular file.
    Read,
}

impl File {
    /// Opens a file.
    pub fn open(path: &Path, how: How) -> io::Result<Self> {
        let (tell, told) = channel();
        let (jobs, todo) = channel::<Job>();
        let path = path.to_owned();
        let work = move || {
            let opened = unshare().and_then(|()| open(&path, how));
            let file = match opened {
                Ok(file) => file,
                Err(e) => return drop(tell.send(Err(e))),
            };
            if tell.send(Ok(())).is_ok() {
                todo.into_iter().for_each(|job| job(&file));
            }
        };
        thread::Builder::new().name("store".into()).spawn(work)?;
        told.recv().unwrap_or_else(|_| Err(gone()))?;
        Ok(Self(jobs))
    }

    fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&fs::File) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (tell, told) = channel();
        let job = move |file: &fs::File| drop(tell.send(work(file)));
        self.0.send(Box::new(job)).map_err(|_| gone())?;
        told.recv().unwrap_or_else(|_| Err(gone()))
    }

    /// Up to so many bytes from this place on; fewer at the file's end only.
    pub fn read_at(&self, length: usize, at: u64) -> io::Result<Vec<u8>> {
        self.ask(move |file| {
            let mut bytes = vec![0; length];
            let mut filled = 0;
            while filled < length {
                match file.read_at(&mut bytes[filled..], at + filled as u64) {
                    Ok(0) => break,
                    Ok(n) => filled += n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            }
            bytes.truncate(filled);
            Ok(bytes)
        })
    }

    /// Writes all of it; gives the buffer back.
    pub fn write_all_at(&self, bytes: Vec<u8>, at: u64) -> io::Result<Vec<u8>> {
        self.ask(move |file| file.write_all_at(&bytes, at).map(|()| bytes))
    }

    /// `fdatasync`.
    pub fn sync_data(&self) -> io::Result<()> {
        self.ask(fs::File::sync_data)
    }

    /// `fsync` of a directory.
    pub fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        let directory: PathBuf = directory.to_owned();
        self.ask(move |_| fs::File::open(directory)?.sync_all())
    }

    /// Its length in bytes.
    pub fn length(&self) -> io::Result<u64> {
        self.ask(|file| Ok(file.metadata()?.len()))
    }

    /// Whether this path leads to it.
    pub fn is_at(&self, path: &Path) -> io::Result<bool> {
        let path = path.to_owned();
        self.ask(move |file| {
            let ours = file.metadata()?;
            let there = fs::symlink_metadata(path);
            Ok(there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())))
        })
    }

    /// Makes a hole.
    pub fn punch(&self, at: u64, length: u64) -> io::Result<()> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.ask(move |file| Ok(rustix::fs::fallocate(file, how, at, length)?))
    }

    /// Where, from here on, it is no hole; none: nowhere. A file system that does not know holes has none.
    pub fn data_after(&self, at: u64) -> io::Result<Option<u64>> {
        self.ask(move |file| match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(next) => Ok(Some(next)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(_) => Ok(Some(at)),
        })
    }
}

fn gone() -> io::Error {
    io::Error::other("the thread that holds the file has ended")
}

/// From now on this thread has a table of descriptors of its own, with standard input, output and error in
/// it. Only where nothing else is open that is used here: at the very beginning of a thread that was given
/// none.
fn unshare() -> io::Result<()> {
    // SAFETY: the call copies the table for this thread before it closes anything: no descriptor of another
    // thread is touched, and this thread has none.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A directory that others may write to can hold anything under any name: whatever is no regular file is not
/// read.
fn open(path: &Path, how: How) -> io::Result<fs::File> {
    let mut options = OpenOptions::new();
    let file = match how {
        How::New => options.read(true).write(true).create_new(true).mode(0o600).open(path)?,
        How::Read => {
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
            options.read(true).custom_flags(flags).open(path)?
        }
    };
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_no_other_thread_has_the_file() {
        let directory = std::env::temp_dir().join(format!("apart-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join("file");
        let file = File::open(&path, How::New).unwrap();
        file.write_all_at(b"some bytes".to_vec(), 5).unwrap();
        file.sync_data().unwrap();
        file.sync_directory(&directory).unwrap();
        assert_eq!(File::open(&path, How::Read).unwrap().read_at(100, 5).unwrap(), b"some bytes");
        assert_eq!(file.length().unwrap(), 15);
        assert!(file.is_at(&path).unwrap() && !file.is_at(&directory).unwrap());
        assert!(File::open(&path, How::New).is_err());
        assert!(File::open(&directory, How::Read).is_err());
        let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let found = open.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|link| link == path);
        fs::remove_dir_all(&directory).unwrap();
        assert!(!found, "a process that is started would inherit it");
    }
}
