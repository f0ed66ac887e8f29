//! A shared datastore that is as fast as a story wants, or does not answer at all.
//!
//! A small FUSE file system over a directory of the real one. Both ways have a rate of their own, as the ways
//! over a network have. Knows nothing of the rest of the laboratory: tests of single crates include this file
//! as it is.

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
    Request, TimeOrNow, WriteFlags,
};
use mount::{Mount, locked};
use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// By its path, so that whoever includes this file has it, too.
#[path = "mount.rs"]
pub(crate) mod mount;

/// Another host may have changed everything since it was asked last.
const NEVER: Duration = Duration::ZERO;

/// What a bucket passes at once: 20 ms of its rate.
const BURST: Duration = Duration::from_millis(20);

/// A mounted directory.
pub struct Datastore {
    shared: Arc<DatastoreState>,
    mount: Mount,
}

#[derive(Default)]
struct DatastoreState {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    stalled: bool,
    /// Bytes a second that each way carries.
    rate: Option<u64>,
    /// What `fsync` answers.
    fsync: Option<i32>,
    /// What `read` answers, and how often it has.
    reads: Option<i32>,
    failed_reads: u64,
    /// Bytes that were written and read.
    written: u64,
    read: u64,
    fsyncs: u64,
}

impl DatastoreState {
    fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Waits while the store is made to stall.
    fn pass(&self) -> MutexGuard<'_, State> {
        let state = self.lock();
        self.changed.wait_while(state, |state| state.stalled).unwrap_or_else(PoisonError::into_inner)
    }
}

impl Datastore {
    /// Mounts the directory `of` at the new directory `at`.
    pub fn mount(at: &Path, of: &Path) -> io::Result<Self> {
        fs::create_dir_all(of)?;
        let shared = Arc::new(DatastoreState::default());
        let mount = Mount::new(Tree::new(of.to_owned(), shared.clone()), at)?;
        Ok(Self { shared, mount })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.mount.path()
    }

    /// From now on each way carries so many bytes a second; none: as many as it can.
    pub fn limit(&self, bytes_per_s: Option<u64>) {
        self.shared.lock().rate = bytes_per_s;
    }

    /// From now on nothing is answered, or everything again.
    pub fn stall(&self, stalled: bool) {
        self.shared.lock().stalled = stalled;
        self.shared.changed.notify_all();
    }

    /// From now on `fsync` fails with this error, or works again.
    pub fn fail_fsync(&self, errno: Option<i32>) {
        self.shared.lock().fsync = errno;
    }

    /// From now on `read` fails with this error, or works again.
    pub fn fail_reads(&self, errno: Option<i32>) {
        self.shared.lock().reads = errno;
    }

    /// How often `read` has failed because it was to.
    pub fn failed_reads(&self) -> u64 {
        self.shared.lock().failed_reads
    }

    /// Bytes that were written, and that were read.
    pub fn traffic(&self) -> (u64, u64) {
        let state = self.shared.lock();
        (state.written, state.read)
    }

    /// How often it was asked to make something durable.
    pub fn fsyncs(&self) -> u64 {
        self.shared.lock().fsyncs
    }
}

impl Drop for Datastore {
    fn drop(&mut self) {
        // Whoever waits for it could not be killed.
        self.stall(false);
        self.limit(None);
    }
}

/// What one way carries: answers come as late as its rate demands.
struct Way {
    jobs: mpsc::Sender<(usize, Box<dyn FnOnce() + Send>)>,
}

impl Way {
    fn new(shared: Arc<DatastoreState>) -> Self {
        let (jobs, todo) = mpsc::channel::<(usize, Box<dyn FnOnce() + Send>)>();
        thread::spawn(move || {
            let mut free_at = Instant::now();
            for (bytes, job) in todo {
                let rate = shared.pass().rate;
                if let Some(rate) = rate {
                    free_at = free_at.max(Instant::now() - BURST);
                    free_at += Duration::from_secs_f64(bytes as f64 / rate as f64);
                    thread::sleep(free_at.saturating_duration_since(Instant::now()));
                }
                job();
            }
        });
        Self { jobs }
    }

    fn carry(&self, bytes: usize, job: impl FnOnce() + Send + 'static) {
        let _ = self.jobs.send((bytes, Box::new(job)));
    }
}

/// What the kernel talks to: one directory without any below it.
struct Tree {
    of: PathBuf,
    shared: Arc<DatastoreState>,
    names: Mutex<HashMap<INodeNo, OsString>>,
    files: Mutex<HashMap<u64, Arc<File>>>,
    next: Mutex<u64>,
    out: Way,
    back: Way,
}

fn errno(e: &io::Error) -> Errno {
    e.raw_os_error().map_or(Errno::EIO, Errno::from_i32)
}

impl Tree {
    fn new(of: PathBuf, shared: Arc<DatastoreState>) -> Self {
        let (out, back) = (Way::new(shared.clone()), Way::new(shared.clone()));
        let (names, files, next) = Default::default();
        Self { of, shared, names, files, next, out, back }
    }

    fn path(&self, inode: INodeNo) -> Option<PathBuf> {
        if inode == INodeNo::ROOT {
            return Some(self.of.clone());
        }
        locked(&self.names).get(&inode).map(|name| self.of.join(name))
    }

    fn look(&self, name: &OsStr) -> io::Result<FileAttr> {
        let attributes = attributes(&self.of.join(name), false)?;
        locked(&self.names).insert(attributes.ino, name.to_owned());
        Ok(attributes)
    }

    fn keep(&self, file: File) -> FileHandle {
        let mut next = locked(&self.next);
        *next += 1;
        locked(&self.files).insert(*next, Arc::new(file));
        FileHandle(*next)
    }

    fn file(&self, handle: FileHandle) -> Option<Arc<File>> {
        locked(&self.files).get(&handle.0).cloned()
    }
}

fn attributes(path: &Path, root: bool) -> io::Result<FileAttr> {
    let meta = fs::symlink_metadata(path)?;
    let modified = meta.modified().unwrap_or(UNIX_EPOCH);
    let inode = if root { INodeNo::ROOT } else { INodeNo(meta.ino()) };
    let kind = if meta.is_dir() { FileType::Directory } else { FileType::RegularFile };
    Ok(FileAttr {
        blocks: meta.blocks(),
        atime: modified,
        mtime: modified,
        ctime: modified,
        crtime: modified,
        nlink: meta.nlink() as u32,
        uid: meta.uid(),
        gid: meta.gid(),
        ..mount::attributes(inode, kind, (meta.mode() & 0o7777) as u16, meta.len())
    })
}

impl Filesystem for Tree {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        drop(self.shared.pass());
        match self.look(name) {
            Ok(file) => reply.entry(&NEVER, &file, Generation(0)),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        drop(self.shared.pass());
        let path = self.path(inode);
        match path.ok_or(io::ErrorKind::NotFound.into()).and_then(|p| attributes(&p, inode == INodeNo::ROOT))
        {
            Ok(attributes) => reply.attr(&NEVER, &attributes),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changed = self.path(inode).ok_or(io::ErrorKind::NotFound.into()).and_then(|path| {
            if let Some(size) = size {
                OpenOptions::new().write(true).open(&path)?.set_len(size)?;
            }
            attributes(&path, inode == INodeNo::ROOT)
        });
        match changed {
            Ok(attributes) => reply.attr(&NEVER, &attributes),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        drop(self.shared.pass());
        let made = OpenOptions::new().read(true).write(true).create_new(true).open(self.of.join(name));
        match made.and_then(|file| Ok((file, self.look(name)?))) {
            Ok((file, attributes)) => {
                reply.created(
                    &NEVER,
                    &attributes,
                    Generation(0),
                    self.keep(file),
                    FopenFlags::FOPEN_DIRECT_IO,
                );
            }
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        drop(self.shared.pass());
        let write = flags.0 & 0o3 != 0;
        let path = self.path(inode).ok_or(io::ErrorKind::NotFound.into());
        match path.and_then(|path| OpenOptions::new().read(true).write(write).open(path)) {
            Ok(file) => reply.opened(self.keep(file), FopenFlags::FOPEN_DIRECT_IO),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        locked(&self.files).remove(&handle.0);
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(file) = self.file(handle) else { return reply.error(Errno::EBADF) };
        let shared = self.shared.clone();
        self.back.carry(size as usize, move || {
            let mut state = shared.lock();
            if let Some(e) = state.reads {
                state.failed_reads += 1;
                return reply.error(Errno::from_i32(e));
            }
            drop(state);
            let mut bytes = vec![0; size as usize];
            match file.read_at(&mut bytes, offset) {
                Ok(n) => {
                    shared.lock().read += n as u64;
                    reply.data(&bytes[..n]);
                }
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some(file) = self.file(handle) else { return reply.error(Errno::EBADF) };
        let (shared, data) = (self.shared.clone(), data.to_vec());
        self.out.carry(data.len(), move || match file.write_all_at(&data, offset) {
            Ok(()) => {
                shared.lock().written += data.len() as u64;
                reply.written(data.len() as u32);
            }
            Err(e) => reply.error(errno(&e)),
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let shared = self.shared.clone();
        // Behind the writes before it.
        self.out.carry(0, move || {
            let mut state = shared.lock();
            state.fsyncs += 1;
            match state.fsync {
                Some(e) => reply.error(Errno::from_i32(e)),
                None => reply.ok(),
            }
        });
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        drop(self.shared.pass());
        reply.ok();
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        drop(self.shared.pass());
        match fs::remove_file(self.of.join(name)) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        drop(self.shared.pass());
        let entries = match fs::read_dir(&self.of) {
            Ok(entries) => entries,
            Err(e) => return reply.error(errno(&e)),
        };
        for (entry, number) in entries.flatten().zip(1u64..).skip(offset as usize) {
            let Ok(meta) = entry.metadata() else { continue };
            if reply.add(INodeNo(meta.ino()), number, FileType::RegularFile, entry.file_name()) {
                break;
            }
        }
        reply.ok();
    }
}
