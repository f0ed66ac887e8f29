//! A directory as a file system of its own (FUSE), over a real one: a story decides when each call is done,
//! when it is answered, and whether at all. Each mount is one host's view; several views of one directory see
//! each other's changes, as hosts do.

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, SessionACL, TimeOrNow, WriteFlags,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// `O_DIRECT` of x86-64, as it comes in a read request.
const O_DIRECT: i32 = 0o40000;

/// What is asked of the directory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Call {
    /// Is there such a name?
    LookUp,
    /// Which names are there?
    List,
    /// What is known of a file?
    Attributes,
    /// Another size for a file.
    Resize,
    /// A new file, exclusively.
    Create,
    /// A new directory.
    MakeDir,
    /// A file that is there.
    Open,
    /// Content of a file.
    Read,
    /// … by a read that pins its reader's pages.
    DirectRead,
    /// Content for a file.
    Write,
    /// Make a file durable.
    Sync,
    /// Make a directory durable.
    SyncDir,
    /// A second name for a file, exclusively.
    Link,
    /// A name goes.
    Remove,
}

/// Who decides what becomes of each call.
pub(crate) trait Fate: Send + Sync + 'static {
    /// It moves so many bytes.
    fn meet(&self, call: Call, bytes: usize, job: Box<dyn Job>);
}

/// A call that waits for its answer. One that is dropped is never answered.
pub(crate) trait Job: Send {
    /// Does it, by what is there or what is remembered, and keeps what came of it for the answer.
    fn work(&mut self, blind: bool);

    /// Answers with what came of it.
    fn answer(self: Box<Self>);

    /// Answers with this error, whatever came of it.
    fn fail(self: Box<Self>, error: Errno);

    /// Does it and answers.
    fn go(mut self: Box<Self>) {
        self.work(false);
        self.answer();
    }
}

struct Pending<T, W, A> {
    work: W,
    done: io::Result<T>,
    answer: A,
}

impl<T: Send, W, A> Job for Pending<T, W, A>
where
    W: FnMut(bool) -> io::Result<T> + Send,
    A: FnOnce(Result<T, Errno>) + Send,
{
    fn work(&mut self, blind: bool) {
        self.done = (self.work)(blind);
    }

    fn answer(self: Box<Self>) {
        (self.answer)(self.done.map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_i32)));
    }

    fn fail(self: Box<Self>, error: Errno) {
        (self.answer)(Err(error));
    }
}

fn raw(error: Errno) -> io::Error {
    io::Error::from_raw_os_error(error.into())
}

/// What a directory has: inodes and names.
type Names = Vec<(u64, FileType, OsString)>;

/// The real directory.
#[derive(Default)]
pub(crate) struct Tree {
    root: PathBuf,
    /// Inode → the names that it was seen by.
    names: Mutex<HashMap<u64, BTreeSet<PathBuf>>>,
    files: Mutex<HashMap<u64, Arc<File>>>,
    next: AtomicU64,
    remembered: Mutex<BTreeMap<PathBuf, Names>>,
    written: AtomicU64,
    read: AtomicU64,
}

impl Tree {
    fn path(&self, inode: INodeNo) -> io::Result<PathBuf> {
        if inode == INodeNo::ROOT {
            return Ok(self.root.clone());
        }
        let names = locked(&self.names);
        let name = names.get(&inode.0).and_then(|names| names.iter().find(|name| name.exists()));
        name.cloned().ok_or_else(|| raw(Errno::ESTALE))
    }

    fn met(&self, path: PathBuf) -> io::Result<FileAttr> {
        let attributes = attributes(&path)?;
        locked(&self.names).entry(attributes.ino.0).or_default().insert(path);
        Ok(attributes)
    }

    fn attributes(&self, inode: INodeNo) -> io::Result<FileAttr> {
        Ok(FileAttr { ino: inode, ..attributes(&self.path(inode)?)? })
    }

    fn keep(&self, file: File) -> FileHandle {
        let handle = self.next.fetch_add(1, Relaxed);
        locked(&self.files).insert(handle, Arc::new(file));
        FileHandle(handle)
    }

    fn file(&self, handle: FileHandle) -> io::Result<Arc<File>> {
        let file = locked(&self.files).get(&handle.0).cloned();
        file.ok_or_else(|| raw(Errno::EBADF))
    }

    /// What is there now is what a blind look sees.
    pub(crate) fn remember(&self) {
        let mut found = BTreeMap::new();
        let mut todo = vec![self.root.clone()];
        while let Some(dir) = todo.pop() {
            let names = names_in(&dir).unwrap_or_default();
            let dirs = names.iter().filter(|(_, kind, _)| *kind == FileType::Directory);
            todo.extend(dirs.map(|(.., name)| dir.join(name)));
            found.insert(dir, names);
        }
        *locked(&self.remembered) = found;
    }

    /// Whether the name was there when that was remembered.
    fn remembers(&self, path: &Path) -> bool {
        let remembered = locked(&self.remembered);
        let dir = path.parent().and_then(|dir| remembered.get(dir));
        dir.is_some_and(|names| names.iter().any(|(.., name)| Some(name.as_os_str()) == path.file_name()))
    }

    /// Bytes that were written, and that were read.
    pub(crate) fn traffic(&self) -> (u64, u64) {
        (self.written.load(Relaxed), self.read.load(Relaxed))
    }
}

fn names_in(dir: &Path) -> io::Result<Names> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        // One that goes meanwhile is not there.
        let Ok(meta) = entry.metadata() else { continue };
        let kind = if meta.is_dir() { FileType::Directory } else { FileType::RegularFile };
        names.push((meta.ino(), kind, entry.file_name()));
    }
    Ok(names)
}

fn attributes(path: &Path) -> io::Result<FileAttr> {
    let meta = fs::symlink_metadata(path)?;
    let modified = meta.modified().unwrap_or(UNIX_EPOCH);
    Ok(FileAttr {
        ino: INodeNo(meta.ino()),
        size: meta.len(),
        blocks: meta.blocks(),
        atime: modified,
        mtime: modified,
        ctime: modified,
        crtime: modified,
        kind: if meta.is_dir() { FileType::Directory } else { FileType::RegularFile },
        perm: (meta.mode() & 0o7777) as u16,
        nlink: meta.nlink() as u32,
        uid: meta.uid(),
        gid: meta.gid(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    })
}

/// What the kernel may believe of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Belief {
    /// Nothing: others change the directory behind its back.
    Nothing,
    /// Everything that it has learned, and content that it has read.
    Everything,
}

/// A view of a directory, mounted as long as this lives. Mount it before the hosts' processes start: they may
/// not see a mount that is made later. Before this is dropped, let everybody go who waits for an answer: they
/// could not be killed.
pub(crate) struct View {
    path: PathBuf,
    tree: Arc<Tree>,
    session: Option<BackgroundSession>,
}

impl View {
    /// Mounts a view of the directory `over`, which is made if need be, at the new directory `at`.
    pub(crate) fn mount(at: &Path, over: &Path, belief: Belief, fate: impl Fate) -> io::Result<Self> {
        fs::create_dir_all(over)?;
        fs::create_dir_all(at)?;
        let tree = Arc::new(Tree { root: over.to_owned(), ..Tree::default() });
        let (stays, open) = match belief {
            Belief::Nothing => (Duration::ZERO, FopenFlags::FOPEN_DIRECT_IO),
            Belief::Everything => (Duration::from_secs(86_400), FopenFlags::empty()),
        };
        let mut config = Config::default();
        // The agents and QEMUs of all hosts, whoever they are.
        config.acl = SessionACL::All;
        let system = Kernel { tree: tree.clone(), stays, open, fate };
        let session = fuser::spawn_mount(system, at, &config).map_err(|e| {
            io::Error::new(e.kind(), format!("a file system cannot be mounted at {}: {e}", at.display()))
        })?;
        Ok(Self { path: at.to_owned(), tree, session: Some(session) })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What is below it.
    pub(crate) fn tree(&self) -> &Tree {
        &self.tree
    }
}

impl Drop for View {
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

/// What the kernel talks to.
struct Kernel<F> {
    tree: Arc<Tree>,
    /// How long it may believe what it has learned.
    stays: Duration,
    open: FopenFlags,
    fate: F,
}

impl<F: Fate> Kernel<F> {
    fn meet<T: Send + 'static>(
        &self,
        (call, bytes): (Call, usize),
        mut work: impl FnMut(&Tree, bool) -> io::Result<T> + Send + 'static,
        answer: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) {
        let tree = self.tree.clone();
        let work = move |blind| work(&tree, blind);
        let done = Err(io::ErrorKind::Other.into());
        self.fate.meet(call, bytes, Box::new(Pending { work, done, answer }));
    }

    /// A call that is answered with a file, by its name.
    fn entry(
        &self,
        call: Call,
        (parent, name): (INodeNo, &OsStr),
        make: impl Fn(&Tree, &Path) -> io::Result<()> + Send + 'static,
        reply: ReplyEntry,
    ) {
        let (stays, name) = (self.stays, name.to_owned());
        let work = move |tree: &Tree, blind| {
            let path = tree.path(parent)?.join(&name);
            if blind && !tree.remembers(&path) {
                return Err(raw(Errno::ENOENT));
            }
            make(tree, &path)?;
            tree.met(path)
        };
        self.meet((call, 0), work, move |found| match found {
            Ok(attributes) => reply.entry(&stays, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        });
    }

    fn attributes(&self, call: Call, inode: INodeNo, size: Option<u64>, reply: ReplyAttr) {
        let stays = self.stays;
        let work = move |tree: &Tree, _| {
            if let Some(size) = size {
                OpenOptions::new().write(true).open(tree.path(inode)?)?.set_len(size)?;
            }
            tree.attributes(inode)
        };
        self.meet((call, 0), work, move |found| match found {
            Ok(attributes) => reply.attr(&stays, &attributes),
            Err(error) => reply.error(error),
        });
    }

    fn empty(&self, call: Call, work: impl Fn(&Tree) -> io::Result<()> + Send + 'static, reply: ReplyEmpty) {
        self.meet(
            (call, 0),
            move |tree, _| work(tree),
            |done| match done {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(error),
            },
        );
    }
}

impl<F: Fate> Filesystem for Kernel<F> {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.entry(Call::LookUp, (parent, name), |_, _| Ok(()), reply);
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.attributes(Call::Attributes, inode, None, reply);
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
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.attributes(Call::Resize, inode, size, reply);
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        self.entry(Call::MakeDir, (parent, name), |_, path| fs::create_dir(path), reply);
    }

    fn link(&self, _: &Request, inode: INodeNo, to: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let link = move |tree: &Tree, path: &Path| fs::hard_link(tree.path(inode)?, path);
        self.entry(Call::Link, (to, name), link, reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.empty(Call::Remove, move |tree| fs::remove_file(tree.path(parent)?.join(&name)), reply);
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        let (stays, open, name) = (self.stays, self.open, name.to_owned());
        let work = move |tree: &Tree, _| {
            let path = tree.path(parent)?.join(&name);
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
            Ok((tree.met(path)?, tree.keep(file)))
        };
        self.meet((Call::Create, 0), work, move |made| match made {
            Ok((attributes, file)) => reply.created(&stays, &attributes, Generation(0), file, open),
            Err(error) => reply.error(error),
        });
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (open, write) = (self.open, flags.0 & 0o3 != 0);
        let work = move |tree: &Tree, _| {
            let file = OpenOptions::new().read(true).write(write).open(tree.path(inode)?)?;
            Ok(tree.keep(file))
        };
        self.meet((Call::Open, 0), work, move |opened| match opened {
            Ok(file) => reply.opened(file, open),
            Err(error) => reply.error(error),
        });
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
        locked(&self.tree.files).remove(&handle.0);
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let call = if flags.0 & O_DIRECT != 0 { Call::DirectRead } else { Call::Read };
        let work = move |tree: &Tree, _| {
            let mut content = vec![0; size as usize];
            let n = tree.file(handle)?.read_at(&mut content, offset)?;
            tree.read.fetch_add(n as u64, Relaxed);
            content.truncate(n);
            Ok(content)
        };
        self.meet((call, size as usize), work, |read| match read {
            Ok(content) => reply.data(&content),
            Err(error) => reply.error(error),
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
        let (data, len) = (data.to_vec(), data.len());
        let work = move |tree: &Tree, _| {
            tree.file(handle)?.write_all_at(&data, offset)?;
            tree.written.fetch_add(len as u64, Relaxed);
            Ok(())
        };
        self.meet((Call::Write, len), work, move |written| match written {
            Ok(()) => reply.written(len as u32),
            Err(error) => reply.error(error),
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // No story ends this machine.
        self.empty(Call::Sync, |_| Ok(()), reply);
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.empty(Call::SyncDir, |_| Ok(()), reply);
    }

    fn readdir(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let work = move |tree: &Tree, blind| {
            let path = tree.path(inode)?;
            if blind {
                return Ok(locked(&tree.remembered).get(&path).cloned().unwrap_or_default());
            }
            names_in(&path)
        };
        self.meet((Call::List, 0), work, move |listed| match listed {
            Ok(names) => {
                for (i, (inode, kind, name)) in names.into_iter().enumerate().skip(offset as usize) {
                    if reply.add(INodeNo(inode), i as u64 + 1, kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(error) => reply.error(error),
        });
    }
}
