//! What only the agent's own user may read: the store (it holds keys of spools), consoles, logs, sockets.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::Path,
};
use tracing::info;

/// The ending of what guests print.
pub(crate) const CONSOLE: &str = "console";

/// Which files in a directory of the agent's are private, by their endings.
const ENDINGS: [&str; 10] = ["redb", "pid", CONSOLE, "old", "log", "belongings", "qmp", "new", "sock", "vnc"];

/// What others than the owner may do with a directory at most: go through it to what they know the name of,
/// and have a right to.
const GROUP_AND_OTHERS: u32 = 0o077;
const TO_GO_THROUGH: u32 = 0o011;

/// A directory for nobody but us: made, or put right where a version before this one has left it open to
/// others, with the private files in it.
pub(crate) fn directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let shared = path.parent().is_none_or(|parent| parent.parent().is_none());
    let found = fs::metadata(path)?;
    // Such as /run and /tmp: the system's, and others'.
    if shared || found.uid() != rustix::process::geteuid().as_raw() {
        info!(path = %path.display(), "is not the agent's alone, and stays as it is");
    } else {
        let mut others = false;
        for entry in fs::read_dir(path)?.flatten() {
            let ending = Path::new(&entry.file_name())
                .extension()
                .and_then(|ending| ending.to_str().map(str::to_owned));
            match entry.file_type() {
                // Directories in it, with disks for example, have rights of their own.
                Ok(kind) if kind.is_dir() => others = true,
                Ok(kind)
                    if !kind.is_symlink()
                        && ending.is_some_and(|ending| ENDINGS.contains(&ending.as_str())) =>
                {
                    tighten(&entry.path(), 0)?;
                }
                _ => {}
            }
        }
        tighten(path, if others { TO_GO_THROUGH } else { 0 })?;
    }
    Ok(())
}

/// A file that was just made in such a directory.
pub(crate) fn file(path: &Path) -> io::Result<()> {
    tighten(path, 0)
}

/// Takes from the group and others what they may do beyond that.
fn tighten(path: &Path, allowed: u32) -> io::Result<()> {
    let mode = fs::metadata(path)?.mode() & 0o7777;
    let right = mode & !(GROUP_AND_OTHERS & !allowed);
    if right == mode {
        return Ok(());
    }
    info!(path = %path.display(), mode = format!("{mode:o}"), right = format!("{right:o}"), "others could \
                                                                                             read it");
    fs::set_permissions(path, fs::Permissions::from_mode(right))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    fn set(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_was_left_open_to_others_is_put_right() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("a/state");
        directory(&at).unwrap();
        assert_eq!(mode(&at), 0o700);
        for (name, before, after) in [
            ("agent.redb", 0o644, 0o600),
            ("web.console", 0o664, 0o600),
            ("web-1.qmp", 0o755, 0o700),
            ("notes.txt", 0o644, 0o644),
        ] {
            fs::write(at.join(name), "").unwrap();
            set(&at.join(name), before);
            set(&at, 0o755);
            directory(&at).unwrap();
            assert_eq!((mode(&at.join(name)), mode(&at)), (after, 0o700), "{name}");
        }
        // Disks in it are reached by whoever may.
        fs::create_dir(at.join("disks")).unwrap();
        set(&at, 0o755);
        directory(&at).unwrap();
        assert_eq!(mode(&at), 0o711);
        assert_ne!(mode(&at.join("disks")), 0o711);
    }

    #[test]
    fn a_directory_of_the_system_stays_as_it_is() {
        let before = mode(Path::new("/tmp"));
        directory(Path::new("/tmp")).unwrap();
        assert_eq!(mode(Path::new("/tmp")), before);
    }
}
