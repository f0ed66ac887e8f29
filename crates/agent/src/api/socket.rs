//! The API's socket.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

/// The socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error("another agent answers at {0}; end it, or give this one a socket of its own with --socket")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0} is there and is no socket; it was left alone")]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("cannot listen at {path}: {cause}")]
    Refused {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

/// Listens at `path`, for its owner only (mode 0600). A socket that a dead agent left is replaced.
pub fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let refused = |cause| SocketError::Refused { path: path.to_owned(), cause };
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(refused)?;
    }
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => return Err(SocketError::InUse(path.to_owned())),
            // Nobody listens there; or it went in this very moment.
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => {}
            // Whether anybody does is not known.
            Err(error) => return Err(refused(error)),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(refused(error)),
    }
    // Made under another name and then moved there, so that nobody can connect before the mode is right.
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".{}", std::process::id()));
    let fresh = PathBuf::from(fresh);
    let _ = fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).map_err(refused)?;
    let placed = fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))
        .and_then(|()| listener.set_nonblocking(true))
        .and_then(|()| fs::rename(&fresh, path));
    if let Err(cause) = placed {
        let _ = fs::remove_file(&fresh);
        return Err(refused(cause));
    }
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_its_owners_and_replaces_only_a_dead_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/agent.sock");
        let first = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(bind(&path), Err(SocketError::InUse(_))));
        drop(first);
        bind(&path).unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "mine").unwrap();
        assert!(matches!(bind(&file), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(&file).unwrap(), b"mine");
    }
}
