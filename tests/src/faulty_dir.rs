//! A directory on a shared datastore in which everything goes wrong that can: a small FUSE file system over
//! another directory.
//!
//! Answers are lost after the work was done, also in the way in which NFS loses them (what comes back is what
//! a second attempt gets); look-ups and listings show what was there before; calls are not done, late, or
//! done while somebody is being killed. Each mount is one host's view; several views of one directory see
//! each other's changes, as hosts do.

use crate::{
    Doing, Result,
    datastore::mount::{self, Mount, locked},
};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
    Request, WriteFlags,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fs::{self, File, Metadata, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

/// Others change the directory behind the kernel's back, so it may believe nothing.
const NEVER: Duration = Duration::ZERO;

/// What is asked of the directory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Call {
    /// Is there such a name?
    LookUp,
    /// Which names are there?
    List,
    /// A new file, exclusively.
    Create,
    /// A new directory.
    MakeDir,
    /// Content of a file.
    Read,
    /// Content for a file.
    Write,
    /// Make a file or directory durable.
    Sync,
    /// A second name for a file, exclusively.
    Link,
    /// A name goes.
    Remove,
}

/// What becomes of a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// It is done and answered.
    None,
    /// It is done, and the answer is lost (`EIO`).
    LostReply,
    /// It is done twice: the first answer was lost.
    Repeated,
    /// It is not done (`EIO`).
    NotDone,
    /// Only what was there at [`FaultyDir::remember`] is seen.
    Blind,
    /// It is done after this time.
    Late(Duration),
}

type Choose = Box<dyn FnMut(u64, Call) -> Trouble + Send>;

struct State {
    root: PathBuf,
    /// Inode → the names that it was seen by.
    names: BTreeMap<u64, BTreeSet<PathBuf>>,
    calls: u64,
    choose: Choose,
    remembered: BTreeMap<PathBuf, Vec<(u64, FileType, OsString)>>,
}

/// A mounted view.
pub struct FaultyDir {
    state: Arc<Mutex<State>>,
    mount: Mount,
}

impl FaultyDir {
    /// Mounts a view of `over` at the new directory `at`. All is well with it at first.
    pub fn mount(at: &Path, over: &Path) -> Result<Self> {
        fs::create_dir_all(over).doing(format!("make {}", over.display()))?;
        let state = State {
            root: over.to_owned(),
            names: BTreeMap::new(),
            calls: 0,
            choose: Box::new(|_, _| Trouble::None),
            remembered: BTreeMap::new(),
        };
        let state = Arc::new(Mutex::new(state));
        let mount = Mount::new(View(state.clone()), at).doing("mount a view of a directory")?;
        Ok(Self { state, mount })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.mount.path()
    }

    /// From now on `choose` says what becomes of each call, of which it is told the number, from 0 on.
    pub fn trouble(&self, choose: impl FnMut(u64, Call) -> Trouble + Send + 'static) {
        let mut state = locked(&self.state);
        state.calls = 0;
        state.choose = Box::new(choose);
    }

    /// From now on all is well.
    pub fn well(&self) {
        self.trouble(|_, _| Trouble::None);
    }

    /// What is there now is what a blind look sees.
    pub fn remember(&self) {
        let mut state = locked(&self.state);
        let mut found = BTreeMap::new();
        let mut todo = vec![state.root.clone()];
        while let Some(dir) = todo.pop() {
            let names = names_in(&dir).unwrap_or_default();
            let dirs = names.iter().filter(|(_, kind, _)| *kind == FileType::Directory);
            todo.extend(dirs.map(|(.., name)| dir.join(name)));
            found.insert(dir, names);
        }
        state.remembered = found;
    }

    /// How many calls there were since the last change of mind.
    pub fn calls(&self) -> u64 {
        locked(&self.state).calls
    }
}

impl Drop for FaultyDir {
    fn drop(&mut self) {
        self.well();
    }
}

fn names_in(dir: &Path) -> io::Result<Vec<(u64, FileType, OsString)>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = if entry.file_type()?.is_dir() { FileType::Directory } else { FileType::RegularFile };
        names.push((entry.metadata()?.ino(), kind, entry.file_name()));
    }
    Ok(names)
}

/// What the kernel talks to.
struct View(Arc<Mutex<State>>);

impl State {
    fn path(&self, inode: INodeNo) -> io::Result<PathBuf> {
        if inode == INodeNo::ROOT {
            return Ok(self.root.clone());
        }
        let name = self.names.get(&inode.0).and_then(|names| names.iter().find(|name| name.exists()));
        name.cloned().ok_or_else(|| io::Error::from_raw_os_error(rustix::io::Errno::STALE.raw_os_error()))
    }

    fn met(&mut self, path: PathBuf) -> io::Result<FileAttr> {
        let meta = fs::symlink_metadata(&path)?;
        self.names.entry(meta.ino()).or_default().insert(path);
        Ok(attributes(&meta, meta.ino()))
    }

    /// Whether the name was there when that was remembered.
    fn remembers(&self, path: &Path) -> bool {
        let dir = path.parent().and_then(|dir| self.remembered.get(dir));
        dir.is_some_and(|names| names.iter().any(|(.., name)| Some(name.as_os_str()) == path.file_name()))
    }
}

fn attributes(meta: &Metadata, inode: u64) -> FileAttr {
    let (kind, perm) =
        if meta.is_dir() { (FileType::Directory, 0o755) } else { (FileType::RegularFile, 0o644) };
    FileAttr {
        blocks: meta.blocks(),
        nlink: meta.nlink() as u32,
        ..mount::attributes(INodeNo(inode), kind, perm, meta.size())
    }
}

impl View {
    /// Does one call, with what goes wrong with it.
    fn act<T>(
        &self,
        call: Call,
        mut work: impl FnMut(&mut State, bool) -> io::Result<T>,
    ) -> std::result::Result<T, Errno> {
        let (mut trouble, late) = {
            let mut state = locked(&self.0);
            let number = state.calls;
            state.calls += 1;
            match (state.choose)(number, call) {
                Trouble::Late(time) => (Trouble::None, time),
                trouble => (trouble, Duration::ZERO),
            }
        };
        thread::sleep(late);
        if trouble == Trouble::Blind && !matches!(call, Call::LookUp | Call::List) {
            trouble = Trouble::None;
        }
        let mut state = locked(&self.0);
        let done = match trouble {
            Trouble::NotDone => return Err(Errno::EIO),
            Trouble::LostReply => {
                let _ = work(&mut state, false);
                return Err(Errno::EIO);
            }
            Trouble::Repeated => {
                let _ = work(&mut state, false);
                work(&mut state, false)
            }
            Trouble::Blind => work(&mut state, true),
            Trouble::None | Trouble::Late(_) => work(&mut state, false),
        };
        done.map_err(Errno::from)
    }
}

impl Filesystem for View {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.act(Call::LookUp, |state, blind| {
            let path = state.path(parent)?.join(name);
            if blind && !state.remembers(&path) {
                return Err(io::Error::from_raw_os_error(rustix::io::Errno::NOENT.raw_os_error()));
            }
            state.met(path)
        });
        match found {
            Ok(attributes) => reply.entry(&NEVER, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let state = locked(&self.0);
        match state.path(inode).and_then(fs::symlink_metadata) {
            Ok(meta) => reply.attr(&NEVER, &attributes(&meta, inode.0)),
            Err(error) => reply.error(error.into()),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        let made = self.act(Call::MakeDir, |state, _| {
            let path = state.path(parent)?.join(name);
            fs::create_dir(&path)?;
            state.met(path)
        });
        match made {
            Ok(attributes) => reply.entry(&NEVER, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.act(Call::Remove, |state, _| fs::remove_file(state.path(parent)?.join(name)));
        match removed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn link(&self, _: &Request, inode: INodeNo, to: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let linked = self.act(Call::Link, |state, _| {
            let path = state.path(to)?.join(name);
            fs::hard_link(state.path(inode)?, &path)?;
            state.met(path)
        });
        match linked {
            Ok(attributes) => reply.entry(&NEVER, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        let made = self.act(Call::Create, |state, _| {
            let path = state.path(parent)?.join(name);
            OpenOptions::new().write(true).create_new(true).open(&path)?;
            state.met(path)
        });
        match made {
            Ok(attributes) => {
                reply.created(&NEVER, &attributes, Generation(0), FileHandle(0), FopenFlags::FOPEN_DIRECT_IO)
            }
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = self.act(Call::Read, |state, _| {
            let mut content = vec![0; size as usize];
            let n = File::open(state.path(inode)?)?.read_at(&mut content, offset)?;
            content.truncate(n);
            Ok(content)
        });
        match read {
            Ok(content) => reply.data(&content),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = self.act(Call::Write, |state, _| {
            OpenOptions::new().write(true).open(state.path(inode)?)?.write_all_at(data, offset)
        });
        match written {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(error),
        }
    }

    fn fsync(&self, _: &Request, inode: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.act(Call::Sync, |state, _| File::open(state.path(inode)?)?.sync_all()) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn fsyncdir(&self, request: &Request, inode: INodeNo, handle: FileHandle, data: bool, reply: ReplyEmpty) {
        self.fsync(request, inode, handle, data, reply);
    }

    fn readdir(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = self.act(Call::List, |state, blind| {
            let path = state.path(inode)?;
            if blind { Ok(state.remembered.get(&path).cloned().unwrap_or_default()) } else { names_in(&path) }
        });
        match listed {
            Ok(names) => {
                for (i, (inode, kind, name)) in names.into_iter().enumerate().skip(offset as usize) {
                    if reply.add(INodeNo(inode), i as u64 + 1, kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(error) => reply.error(error),
        }
    }
}
