use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// A key or a certificate is a few kilobytes; what is larger is something else.
const LARGEST: u64 = 1 << 20;

/// Where a host's three files are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Files {
    /// The workgroup's CA certificate.
    pub ca: PathBuf,
    /// This host's certificate, with intermediates if there are any.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Files {
    /// By their usual names in a directory.
    pub fn within(dir: &Path) -> Self {
        Self { ca: dir.join("ca.crt"), cert: dir.join("host.crt"), key: dir.join("host.key") }
    }
}

/// Where the files are by which a server that is none of the workgroup's is asked over TLS: etcd.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClientFiles {
    /// Who vouches for the server.
    pub ca: PathBuf,
    /// Our certificate and its key, for a server that asks for one.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// What is wrong with keys and certificates.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file cannot be read or written.
    #[error("cannot {what} {path}: {cause}", path = path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's word.
        #[source]
        cause: io::Error,
    },
    /// Nothing is overwritten.
    #[error("{path} exists already; nothing is overwritten. Move it away, or choose another \
             directory", path = path.display())]
    Exists {
        /// Which file.
        path: PathBuf,
    },
    /// Others than its owner may read or write a key.
    #[error("the key {path} is open to others (mode {mode:04o}); mend it: chmod 600 \
             {path}", path = path.display())]
    Open {
        /// Which key.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A file is not what it should be.
    #[error("{path}: {why}", path = path.display())]
    Wrong {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// What was asked for cannot be made.
    #[error("{0}")]
    Unfit(String),
}

pub(crate) fn wrong(path: &Path, why: impl Into<String>) -> PkiError {
    PkiError::Wrong { path: path.to_owned(), why: why.into() }
}

/// Reads a certificate file (PEM), which is nobody's secret.
pub fn read(path: &Path) -> Result<String, PkiError> {
    open(path).and_then(|(file, _)| text(file, path))
}

/// Reads a key (PEM), unless others may read it too.
pub fn read_key(path: &Path) -> Result<String, PkiError> {
    let (file, mode) = open(path)?;
    if mode & 0o077 != 0 {
        return Err(PkiError::Open { path: path.to_owned(), mode });
    }
    text(file, path)
}

fn open(path: &Path) -> Result<(File, u32), PkiError> {
    let failed = |cause| PkiError::File { what: "read", path: path.to_owned(), cause };
    let file = File::open(path).map_err(failed)?;
    // Of the file that is open, not of whatever has that name a moment later.
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.len() > LARGEST {
        return Err(wrong(path, "this is no file with a key or a certificate"));
    }
    Ok((file, metadata.permissions().mode() & 0o7777))
}

fn text(file: File, path: &Path) -> Result<String, PkiError> {
    let mut text = String::new();
    let read = file.take(LARGEST).read_to_string(&mut text);
    read.map_err(|cause| PkiError::File { what: "read", path: path.to_owned(), cause })?;
    Ok(text)
}

/// A new directory, its owner's alone; one that is there stays as it is.
pub(crate) fn make_dir(dir: &Path) -> Result<(), PkiError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|cause| PkiError::File { what: "make", path: dir.to_owned(), cause })
}

/// Writes new files, each with its mode from its first instant on: all of them, or none.
pub(crate) fn write_new(files: &[(&Path, u32, &str)]) -> Result<(), PkiError> {
    for (n, (path, mode, text)) in files.iter().enumerate() {
        if let Err(error) = write_one(path, *mode, text) {
            // Those before were made by us just now.
            files[..n].iter().for_each(|(path, ..)| drop(fs::remove_file(path)));
            return Err(error);
        }
    }
    Ok(())
}

fn write_one(path: &Path, mode: u32, text: &str) -> Result<(), PkiError> {
    let failed = |cause: io::Error| match cause.kind() {
        io::ErrorKind::AlreadyExists => PkiError::Exists { path: path.to_owned() },
        _ => PkiError::File { what: "write", path: path.to_owned(), cause },
    };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.map_err(|cause| {
        let _ = fs::remove_file(path);
        failed(cause)
    })
}
