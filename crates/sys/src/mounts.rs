//! What one thread, and the programs that it starts, see of the file system: mounts of their own.
//!
//! A `Tree` is a copy of what is mounted somewhere, taken by a descriptor, that is not yet attached
//! anywhere. It outlives `leave`, after which the calling thread has mounts that nobody else sees. Mounts:
//! `mount_setattr(2)`, Linux 5.12.

use linux_raw_sys::general as raw;
use nix::libc;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_change, move_mount,
    open_tree,
};
use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
};

/// A user and a group, by their numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ids {
    /// The user.
    pub user: u32,
    /// Its group.
    pub group: u32,
}

/// A copy of a mount: of one file, or of a directory with all below it.
#[derive(Debug)]
pub struct Tree(OwnedFd);

impl AsRawFd for Tree {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Tree {
    /// Of an open file or directory. What is mounted or unmounted in the original later is here, too, but
    /// never the other way round: an empty directory that is put into the copy must not hide the host's own.
    pub fn of(file: impl AsFd) -> io::Result<Self> {
        let how = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | OpenTreeFlags::AT_RECURSIVE;
        let tree = open_tree(file, c"", how)?;
        let slave = raw::mount_attr { propagation: u64::from(raw::MS_SLAVE), ..NOTHING };
        set(tree.as_fd(), c"", &slave)?;
        Ok(Self(tree))
    }

    /// Forbids programs with more rights than their user's, and to write if `read_only`.
    pub fn restrict(&self, read_only: bool) -> io::Result<()> {
        let write = if read_only { raw::MOUNT_ATTR_RDONLY } else { 0 };
        let wanted = raw::mount_attr { attr_set: u64::from(raw::MOUNT_ATTR_NOSUID | write), ..NOTHING };
        set(self.0.as_fd(), c"", &wanted)
    }

    /// From now on what belongs to one user and group shows as that of another, as `shift` says. An error
    /// where its file system does not know that (`MOUNT_ATTR_IDMAP`).
    pub fn show_as(&self, shift: &Shift) -> io::Result<()> {
        let (attr_set, userns_fd) = (u64::from(raw::MOUNT_ATTR_IDMAP), shift.0.as_raw_fd() as u64);
        set(self.0.as_fd(), c"", &raw::mount_attr { attr_set, userns_fd, ..NOTHING })
    }

    /// Attaches it to what is at `path`, for this thread's mounts.
    pub fn attach(self, path: &Path) -> io::Result<()> {
        let how = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(self.0, c"", rustix::fs::CWD, path, how)?)
    }
}

/// Gives the calling thread mounts of its own, as they are now. What is unmounted elsewhere later is
/// unmounted here, too, so that nothing is kept busy. For a thread that ends afterwards: there is no way
/// back.
pub fn leave() -> io::Result<()> {
    // SAFETY: the call changes what paths mean to this thread from now on, and nothing in memory.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    Ok(mount_change("/", slave)?)
}

/// Makes everything read-only that is mounted, for this thread's mounts.
pub fn read_only() -> io::Result<()> {
    let root = File::open("/")?;
    let attr_set = u64::from(raw::MOUNT_ATTR_RDONLY | raw::MOUNT_ATTR_NOSUID);
    set(root.as_fd(), c"", &raw::mount_attr { attr_set, ..NOTHING })
}

/// Puts an empty directory in the place of what is at `path`. With `devices`, device nodes in it are devices.
pub fn empty(path: &Path, devices: bool) -> io::Result<()> {
    let mut flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    if !devices {
        flags |= MountFlags::NODEV;
    }
    // For names of directories and mount points only.
    Ok(mount(c"tmpfs", path, c"tmpfs", flags, Some(c"mode=755,size=1m"))?)
}

/// No change of a mount.
const NOTHING: raw::mount_attr = raw::mount_attr { attr_set: 0, attr_clr: 0, propagation: 0, userns_fd: 0 };

/// Changes a mount and those below it (`mount_setattr(2)`).
fn set(at: BorrowedFd<'_>, path: &CStr, attributes: &raw::mount_attr) -> io::Result<()> {
    let flags = (libc::AT_EMPTY_PATH | libc::AT_RECURSIVE) as libc::c_uint;
    let bytes = size_of_val(attributes);
    // SAFETY: the kernel reads the path and so many bytes of the structure, which both live until it returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            at.as_raw_fd(),
            path.as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            bytes,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whose files show as whose.
#[derive(Debug)]
pub struct Shift(OwnedFd);

impl Shift {
    /// What belongs to `from` shows as that of `to`; what belongs to anybody else as nobody's.
    pub fn new(from: Ids, to: Ids) -> io::Result<Self> {
        let child = Sleeper::start()?;
        let map = |name: &str, from: u32, to: u32| {
            std::fs::write(format!("/proc/{}/{name}", child.0), format!("{from} {to} 1"))
        };
        map("uid_map", from.user, to.user)?;
        map("gid_map", from.group, to.group)?;
        Ok(Self(File::open(format!("/proc/{}/ns/user", child.0))?.into()))
    }
}

/// A child in a user namespace of its own: there is none without a process in it. It ends with this.
struct Sleeper(libc::pid_t);

impl Sleeper {
    fn start() -> io::Result<Self> {
        let flags = (libc::CLONE_NEWUSER | libc::SIGCHLD) as libc::c_ulong;
        let parent = std::process::id() as libc::pid_t;
        // SAFETY: without CLONE_VM the child has memory of its own, and it only makes system calls until it
        // is killed.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        match pid {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                // SAFETY: none of these touches memory that another thread may have left in between.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    if libc::getppid() == parent {
                        libc::pause();
                    }
                    libc::_exit(0)
                }
            }
            pid => Ok(Self(pid as libc::pid_t)),
        }
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // SAFETY: it is our child and nobody else waits for it, so that its number still means it.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}

/// Does `what` with the rights that another user has to files. Only the calling thread has them meanwhile.
pub fn with_rights_of<T>(ids: Ids, what: impl FnOnce() -> T) -> io::Result<T> {
    let groups = nix::unistd::getgroups()?;
    let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let back = Back {
        groups: groups.iter().map(|group| group.as_raw()).collect(),
        user: user.as_raw(),
        group: group.as_raw(),
    };
    set_groups(&[])?;
    set_rights(Ids { user: user.as_raw(), group: ids.group });
    set_rights(ids);
    let done = what();
    drop(back);
    Ok(done)
}

/// Gives this thread its own rights back, also where `what` panics.
struct Back {
    groups: Vec<u32>,
    user: u32,
    group: u32,
}

impl Drop for Back {
    fn drop(&mut self) {
        // SAFETY: the calls change the rights of this thread and nothing in memory.
        unsafe {
            libc::syscall(libc::SYS_setfsuid, self.user);
        }
        set_rights(Ids { user: self.user, group: self.group });
        if let Err(error) = set_groups(&self.groups) {
            // It had that right before.
            debug_assert!(false, "{error}");
        }
    }
}

/// By the system call itself: the C library would set them for all threads.
fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the kernel reads so many numbers from there.
    let result = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn set_rights(ids: Ids) {
    // SAFETY: the calls change the rights of this thread and nothing in memory.
    unsafe {
        libc::syscall(libc::SYS_setfsgid, ids.group);
        libc::syscall(libc::SYS_setfsuid, ids.user);
    }
}

/// The user of this name; none: there is none.
pub fn user_of_name(name: &str) -> io::Result<Option<Ids>> {
    let user = nix::unistd::User::from_name(name)?;
    Ok(user.map(|user| Ids { user: user.uid.as_raw(), group: user.gid.as_raw() }))
}

/// A character device's node for one user alone, or for all.
pub fn make_device(path: &Path, device: u64, user: Option<Ids>) -> io::Result<()> {
    use nix::sys::stat::{Mode, SFlag, mknod};
    mknod(path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), device)?;
    match user {
        Some(ids) => std::os::unix::fs::chown(path, Some(ids.user), Some(ids.group)),
        None => {
            let all = std::os::unix::fs::PermissionsExt::from_mode(0o666);
            std::fs::set_permissions(path, all)
        }
    }
}

/// A unix socket with a name, which nobody listens to yet.
pub fn named_socket(path: &Path) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(socket)
}

/// A descriptor that the kernel has just made.
pub(crate) fn owned(descriptor: libc::c_long) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the caller got it from a call that makes one, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
}
