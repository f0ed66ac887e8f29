use std::{io, path::PathBuf};

/// What became of a spool file. Once its writer has had one, the file is never called durable again.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SpoolError {
    /// The file system refused.
    #[error("cannot {what} {}: {why}", path.display())]
    Io {
        /// What was tried, such as `write to`.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Of which kind the refusal is.
        kind: io::ErrorKind,
        /// In the kernel's words.
        why: String,
    },
    /// The file system did not answer.
    #[error("the datastore did not {what} {} within {waited_ms} ms", path.display())]
    Stalled {
        /// What was waited for, such as `make`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// How long.
        waited_ms: u64,
    },
    /// Under the file's name there is something else now, or nothing: nobody would find what was written.
    #[error("{} is no longer the file that was written", path.display())]
    Vanished {
        /// The file.
        path: PathBuf,
    },
    /// It is no spool file, or not one that can be read.
    #[error("{} cannot be used: {why}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Its content is not what was written.
    #[error("{} is damaged at byte {offset}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
    },
}

impl SpoolError {
    pub(crate) fn io(what: &'static str, path: &std::path::Path, e: impl Into<io::Error>) -> Self {
        let e = e.into();
        Self::Io { what, path: path.to_owned(), kind: e.kind(), why: e.to_string() }
    }

    /// Whether there is no room left.
    pub fn is_full(&self) -> bool {
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded, io::ErrorKind::FileTooLarge];
        matches!(self, Self::Io { kind, .. } if full.contains(kind))
    }
}

impl From<SpoolError> for io::Error {
    fn from(e: SpoolError) -> Self {
        let kind = match &e {
            SpoolError::Io { kind, .. } => *kind,
            SpoolError::Stalled { .. } => io::ErrorKind::TimedOut,
            SpoolError::Vanished { .. } => io::ErrorKind::NotFound,
            SpoolError::Unusable { .. } | SpoolError::Damaged { .. } => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, e)
    }
}
