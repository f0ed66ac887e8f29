//! Keeps what guests print from filling `/run`: a guest may print without end.
//!
//! QEMU appends to a console. One that has grown too long is emptied; its end is kept beside it. What a guest
//! prints in between, within microseconds, is lost.

use crate::private;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// A console of more bytes is emptied.
const MOST: u64 = 8 << 20;

/// So many bytes of its end are kept.
const KEPT: u64 = 1 << 20;

/// How often they are looked at. An emulated serial port prints about a megabyte a second.
const EVERY: Duration = Duration::from_secs(5);

/// Looks after all consoles in this directory, for as long as this process lives.
pub(crate) fn look_after(directory: PathBuf) -> io::Result<()> {
    let work = move || {
        loop {
            for path in consoles(&directory) {
                if let Err(error) = shorten(&path, MOST, KEPT) {
                    tracing::warn!(path = %path.display(), %error, "a console cannot be shortened");
                }
            }
            thread::sleep(EVERY);
        }
    };
    thread::Builder::new().name("consoles".into()).spawn(work).map(drop)
}

fn consoles(directory: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| path.extension().is_some_and(|ending| ending == private::CONSOLE))
}

/// Empties it if it is longer than `most`, and keeps that much of its end.
fn shorten(path: &Path, most: u64, kept: u64) -> io::Result<()> {
    let nofollow = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let mut file = OpenOptions::new().read(true).write(true).custom_flags(nofollow).open(path)?;
    let length = file.metadata()?.len();
    if length <= most {
        return Ok(());
    }
    let mut end = vec![];
    file.seek(SeekFrom::Start(length.saturating_sub(kept)))?;
    (&file).take(kept * 2).read_to_end(&mut end)?;
    file.set_len(0)?;
    // Under another name first: whoever reads it finds all of it.
    let (old, new) = (path.with_extension("console.old"), path.with_extension("console.new"));
    let mut into: File = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(nofollow)
        .open(&new)?;
    into.write_all(&end)?;
    fs::rename(new, old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_that_is_too_long_is_emptied_and_its_end_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.console");
        // As QEMU does.
        let mut guest = OpenOptions::new().create(true).append(true).open(&path).unwrap();
        guest.write_all(b"0123456789").unwrap();
        shorten(&path, 10, 4).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"0123456789", "it is not too long");
        guest.write_all(b"abc").unwrap();
        assert_eq!(consoles(dir.path()).collect::<Vec<_>>(), [path.as_path()]);
        shorten(&path, 10, 4).unwrap();
        let old = dir.path().join("web.console.old");
        assert_eq!((fs::read(&path).unwrap(), fs::read(&old).unwrap()), (vec![], b"9abc".to_vec()));
        guest.write_all(b"more").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"more", "the guest goes on at its beginning");
        assert_eq!(consoles(dir.path()).count(), 1);
        std::os::unix::fs::symlink(&old, dir.path().join("x.console")).unwrap();
        assert!(shorten(&dir.path().join("x.console"), 1, 1).is_err(), "a link leads elsewhere");
    }
}
