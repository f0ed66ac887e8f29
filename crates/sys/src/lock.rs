//! Locks on bytes of a file. They belong to an open file and go with it, whoever closes it (`F_OFD_SETLK`,
//! `fcntl(2)`).
//!
//! Hosts that share a file system with locks see each other's.

use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
};
use std::{fs::File, io, ops::Range};

/// What a lock lets others do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lock {
    /// Others may lock the same bytes for reading. The file must be open for reading.
    Read,
    /// Nobody else may lock them. The file must be open for writing.
    Write,
}

impl Lock {
    fn word(self) -> i16 {
        match self {
            Self::Read => libc::F_RDLCK as i16,
            Self::Write => libc::F_WRLCK as i16,
        }
    }

    /// Locks `bytes`, which may lie beyond the file's end; does not wait for who has them.
    pub fn take(self, file: &File, bytes: Range<u64>) -> io::Result<()> {
        fcntl(file, FcntlArg::F_OFD_SETLK(&on(self.word(), bytes)?))?;
        Ok(())
    }
}

/// A lock of another open file on any of these bytes, by whichever process or host.
pub fn of_others(file: &File, bytes: Range<u64>) -> io::Result<Option<Lock>> {
    let mut asked = on(libc::F_WRLCK as i16, bytes)?;
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut asked))?;
    match i32::from(asked.l_type) {
        libc::F_UNLCK => Ok(None),
        libc::F_RDLCK => Ok(Some(Lock::Read)),
        libc::F_WRLCK => Ok(Some(Lock::Write)),
        other => Err(io::Error::other(format!("the file system knows of a lock of kind {other}"))),
    }
}

/// Where among these bytes another open file has a lock. Of several, the kernel tells of one.
pub fn place_of_others(file: &File, bytes: Range<u64>) -> io::Result<Option<Range<u64>>> {
    let mut asked = on(libc::F_WRLCK as i16, bytes)?;
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut asked))?;
    if i32::from(asked.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    let odd = |_| io::Error::other(format!("the file system knows of a lock at {}", asked.l_start));
    let (start, length) =
        (u64::try_from(asked.l_start).map_err(odd)?, u64::try_from(asked.l_len).map_err(odd)?);
    // A length of zero means all that follows.
    Ok(Some(start..if length == 0 { u64::MAX } else { start.saturating_add(length) }))
}

fn on(kind: i16, bytes: Range<u64>) -> io::Result<libc::flock> {
    let odd = || io::Error::new(io::ErrorKind::InvalidInput, format!("{bytes:?} cannot be locked"));
    // A length of zero would mean all that follows.
    let length = bytes.end.checked_sub(bytes.start).filter(|length| *length > 0).ok_or_else(odd)?;
    i64::try_from(bytes.end).map_err(|_| odd())?;
    Ok(libc::flock {
        l_type: kind,
        l_whence: libc::SEEK_SET as i16,
        l_start: bytes.start as i64,
        l_len: length as i64,
        l_pid: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_seen_by_another_open_file_and_go_with_theirs() {
        let path = std::env::temp_dir().join(format!("lock-{}", std::process::id()));
        let open =
            || File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        let (ours, theirs) = (open(), open());
        let far = 1u64 << 61;
        Lock::Write.take(&ours, far..far + 1).unwrap();
        Lock::Read.take(&ours, far + 2..far + 3).unwrap();
        let seen = |file: &File| [0, 1, 2, 3].map(|n| of_others(file, far + n..far + n + 1).unwrap());
        assert_eq!(seen(&theirs), [Some(Lock::Write), None, Some(Lock::Read), None]);
        assert_eq!(seen(&ours), [None; 4]);
        let place = |file: &File, from: u64| place_of_others(file, from..far + 9).unwrap();
        assert_eq!(place(&theirs, far), Some(far..far + 1));
        assert_eq!(place(&theirs, far + 1), Some(far + 2..far + 3));
        assert_eq!(place(&ours, far), None);
        assert!(Lock::Read.take(&theirs, far..far + 1).is_err());
        drop(ours);
        assert_eq!(seen(&theirs), [None; 4]);
        for bad in [5..5, u64::MAX - 1..u64::MAX] {
            assert!(of_others(&theirs, bad).is_err());
        }
        std::fs::remove_file(&path).unwrap();
    }
}
