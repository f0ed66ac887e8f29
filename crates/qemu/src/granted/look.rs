//! What a process has open and has started, as its host sees that.

use crate::recipe::files::Identity;
use std::{
    fmt, fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
};
use sys::{
    process::PidFd,
    socket::{self, Ends},
};

/// One thing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Found {
    /// Memory that no file has a name for, or a pipe: nobody else gets at it.
    Memory,
    /// A plain file, by whatever it is called now.
    File(Identity, String),
    /// A character device, by its number.
    Device(u64, String),
    /// A file of the kernel's without a name, by what that calls it.
    Nameless(String),
    /// A socket.
    Socket(Ends),
    /// A directory, a block device, a named pipe.
    Other(String),
    /// A program that it has started, by its process.
    Program(String),
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory"),
            Self::File(_, name) => write!(f, "the file {name}"),
            Self::Device(_, name) => write!(f, "the device {name}"),
            Self::Nameless(kind) => write!(f, "a descriptor of the kind {kind}"),
            Self::Socket(Ends::Unix { peer: Some(peer), .. }) => {
                write!(f, "a connection to the socket {}", peer.display())
            }
            Self::Socket(Ends::Unix { own, .. }) => match own {
                Some(own) => write!(f, "the socket {}", own.display()),
                None => f.write_str("a socket"),
            },
            Self::Socket(Ends::Internet { peer: Some(peer) }) => write!(f, "a connection to {peer}"),
            Self::Socket(Ends::Internet { peer: None }) => f.write_str("a socket for other hosts"),
            Self::Socket(Ends::Other(family)) => write!(f, "a socket of the address family {family}"),
            Self::Other(name) => f.write_str(name),
            Self::Program(pid) => write!(f, "a program (process {pid})"),
        }
    }
}

/// All of it.
pub(super) fn at(process: &PidFd) -> io::Result<Vec<Found>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(process.proc_path("fd"))? {
        all.extend(descriptor(process, &entry?.file_name().to_string_lossy())?);
    }
    for thread in process.threads()? {
        // A thread may have ended meanwhile; a kernel may not tell of children at all.
        let children = fs::read_to_string(process.proc_path(format!("task/{thread}/children")));
        let children = children.unwrap_or_default();
        all.extend(children.split_whitespace().map(|pid| Found::Program(pid.to_owned())));
    }
    Ok(all)
}

/// `None`: it was closed meanwhile.
fn descriptor(process: &PidFd, number: &str) -> io::Result<Option<Found>> {
    let path = process.proc_path("fd").join(number);
    let (Ok(metadata), Ok(name)) = (fs::metadata(&path), fs::read_link(&path)) else { return Ok(None) };
    // A name of the file system begins with a slash, and no other does.
    let name = name.to_string_lossy().into_owned();
    if let Some(kind) = name.strip_prefix("anon_inode:") {
        return Ok(Some(Found::Nameless(kind.to_owned())));
    }
    let kind = metadata.file_type();
    Ok(Some(if kind.is_socket() {
        let Ok(number) = number.parse() else { return Ok(None) };
        let taken = match process.take_fd(number) {
            Ok(taken) => taken,
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BADF.raw_os_error()) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        match socket::ends(&taken) {
            Ok(ends) => Found::Socket(ends),
            // Another has its number by now.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOTSOCK.raw_os_error()) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
    } else if kind.is_file() {
        // A file of that name in the root directory would have one still.
        let memory = metadata.nlink() == 0 && name.starts_with("/memfd:");
        if memory { Found::Memory } else { Found::File(Identity::of(&metadata), name) }
    } else if kind.is_char_device() {
        Found::Device(metadata.rdev(), name)
    } else if kind.is_fifo() && name.starts_with("pipe:[") {
        Found::Memory
    } else {
        let what = match kind {
            _ if kind.is_dir() => "the directory",
            _ if kind.is_block_device() => "the block device",
            _ if kind.is_fifo() => "the pipe",
            _ => "",
        };
        Found::Other(format!("{what} {name}"))
    }))
}
