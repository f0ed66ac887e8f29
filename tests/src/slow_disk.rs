//! A disk whose direct reads are finished only when the story says so.
//!
//! A direct read pins the guest's pages when it is submitted, and its data lands there later, through no page
//! table: no tracker sees it. With a real disk the moment is luck. Here a small FUSE file system holds the
//! answer back, so that a read can begin before one round of a migration and land after the next.

use crate::{
    Doing, Result,
    datastore::mount::{self, Mount, locked},
    wait_for,
};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

const FILE: &str = "disk.img";
const INODE: INodeNo = INodeNo(2);
/// Nothing changes behind the kernel's back, so what it has learned stays true.
const FOREVER: Duration = Duration::from_secs(86_400);
/// `O_DIRECT` of x86-64, as it comes in a read request.
const O_DIRECT: i32 = 0o40000;

/// A mounted directory with one file, `disk.img`.
pub struct SlowDisk {
    path: PathBuf,
    state: Arc<Mutex<State>>,
    _mount: Mount,
}

#[derive(Default)]
struct State {
    data: Vec<u8>,
    holding: bool,
    held: Vec<Held>,
    direct_reads: u64,
}

/// A direct read that waits.
struct Held {
    offset: u64,
    size: u32,
    reply: ReplyData,
}

impl State {
    fn answer(&self, Held { offset, size, reply }: Held) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(self.data.len());
        let end = start.saturating_add(size as usize).min(self.data.len());
        reply.data(&self.data[start..end]);
    }
}

impl SlowDisk {
    /// Mounts it at the new directory `at`, with this content.
    pub fn mount(at: &Path, content: Vec<u8>) -> Result<Self> {
        let state = Arc::new(Mutex::new(State { data: content, ..State::default() }));
        let _mount = Mount::new(Tree(state.clone()), at).doing("mount a slow disk")?;
        Ok(Self { path: at.join(FILE), state, _mount })
    }

    /// The file that a machine takes for its disk.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// From now on direct reads wait.
    pub fn hold(&self) {
        locked(&self.state).holding = true;
    }

    /// Waits until a direct read waits.
    pub fn wait_held(&self, within: Duration) -> Result<()> {
        wait_for("a direct read", within, || Ok((!locked(&self.state).held.is_empty()).then_some(())))
    }

    /// Lets the waiting reads land, with the data that the file has now, and those to come at once.
    pub fn release(&self) {
        let mut state = locked(&self.state);
        state.holding = false;
        for held in std::mem::take(&mut state.held) {
            state.answer(held);
        }
    }

    /// How many direct reads there have been.
    pub fn direct_reads(&self) -> u64 {
        locked(&self.state).direct_reads
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // A read that waits for ever would make its reader unkillable.
        self.release();
    }
}

/// What the kernel talks to.
struct Tree(Arc<Mutex<State>>);

impl Tree {
    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let size = locked(&self.0).data.len() as u64;
        let (kind, perm, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0o755, 0),
            INODE => (FileType::RegularFile, 0o666, size),
            _ => return None,
        };
        Some(mount::attributes(inode, kind, perm, size))
    }
}

impl Filesystem for Tree {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(INODE) {
            Some(file) if parent == INodeNo::ROOT && name == FILE => {
                reply.entry(&FOREVER, &file, Generation(0))
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&FOREVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut state = locked(&self.0);
        let direct = flags.0 & O_DIRECT != 0;
        state.direct_reads += u64::from(direct);
        let read = Held { offset, size, reply };
        if direct && state.holding { state.held.push(read) } else { state.answer(read) }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = locked(&self.0);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        match start.checked_add(data.len()).and_then(|end| state.data.get_mut(start..end)) {
            Some(place) => {
                place.copy_from_slice(data);
                reply.written(data.len() as u32);
            }
            // A disk does not grow.
            None => reply.error(Errno::ENOSPC),
        }
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if offset == 0 {
            let _ = reply.add(INODE, 1, FileType::RegularFile, FILE);
        }
        reply.ok();
    }
}
