//! Who else has a file: open, or mapped.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

/// Which of the files another process has open or mapped. What is on its way between two processes
/// (`SCM_RIGHTS`) is not seen. The files have no names. All processes are looked at once, for all files.
pub fn have_others(files: &[&File]) -> io::Result<Vec<bool>> {
    let wanted = files.iter().map(|file| file.metadata()).collect::<io::Result<Vec<_>>>()?;
    let mut found = vec![false; wanted.len()];
    let own = std::process::id();
    for process in fs::read_dir("/proc")? {
        let process = process?;
        let pid = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        if pid.is_some_and(|pid| pid != own) {
            look_at(&process.path(), &wanted, &mut found);
        }
    }
    Ok(found)
}

/// A process that ends meanwhile has nothing; one that may not be looked at may have anything.
fn look_at(process: &Path, wanted: &[Metadata], found: &mut [bool]) {
    match open_files(process) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return found.fill(true),
        open => {
            for file in open.into_iter().flatten() {
                let same = |wanted: &Metadata| (wanted.dev(), wanted.ino()) == (file.dev(), file.ino());
                mark(wanted, found, same);
            }
        }
    }
    // ADDRESSES RIGHTS OFFSET DEVICE INODE PATH
    let maps = fs::read(process.join("maps")).unwrap_or_default();
    for line in String::from_utf8_lossy(&maps).lines() {
        let mut words = line.split_ascii_whitespace().skip(3);
        if let (Some(device), Some(inode)) = (words.next(), words.next()) {
            mark(wanted, found, |wanted| is_mapped_as(wanted, device, inode));
        }
    }
}

fn mark(wanted: &[Metadata], found: &mut [bool], is_there: impl Fn(&Metadata) -> bool) {
    wanted.iter().zip(found).for_each(|(wanted, found)| *found |= is_there(wanted));
}

/// Only files without a name are looked at: one with a name may be on a server that does not answer.
fn open_files(process: &Path) -> io::Result<Vec<Metadata>> {
    let nameless = |path: &Path| {
        fs::read_link(path).is_ok_and(|to| to.as_os_str().as_encoded_bytes().ends_with(b" (deleted)"))
    };
    let paths = fs::read_dir(process.join("fd"))?.filter_map(|entry| Some(entry.ok()?.path()));
    Ok(paths.filter(|path| nameless(path)).filter_map(|path| fs::metadata(path).ok()).collect())
}

/// Whether a line of `maps` that says this is about the file.
fn is_mapped_as(wanted: &Metadata, device: &str, inode: &str) -> bool {
    let (major, minor) = (rustix::fs::major(wanted.dev()), rustix::fs::minor(wanted.dev()));
    inode.parse() == Ok(wanted.ino()) && device == format!("{major:02x}:{minor:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::{
        io::Read,
        process::{Command, Stdio},
    };

    fn memfd() -> File {
        let file = File::from(memfd_create("users", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 4096).unwrap();
        file
    }

    #[test]
    fn a_file_of_this_process_alone_has_no_others() {
        let file = memfd();
        let _again = file.try_clone().unwrap();
        assert_eq!(have_others(&[&file]).unwrap(), [false]);
        assert_eq!(have_others(&[]).unwrap(), []);
    }

    #[test]
    fn whoever_else_has_a_file_open_is_found_until_it_ends() {
        let (file, unused) = (memfd(), memfd());
        let mut other = Command::new("sh")
            .args(["-c", "echo ready; read end"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(file.try_clone().unwrap())
            .spawn()
            .unwrap();
        other.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        assert_eq!(have_others(&[&unused, &file]).unwrap(), [false, true]);
        drop(other.stdin.take());
        other.wait().unwrap();
        assert_eq!(have_others(&[&unused, &file]).unwrap(), [false, false]);
    }

    #[test]
    fn a_mapped_file_is_found_by_the_maps() {
        let program = fs::metadata("/proc/self/exe").unwrap();
        let wanted = [memfd().metadata().unwrap(), program];
        let mut found = [false; 2];
        look_at(Path::new("/proc/self"), &wanted, &mut found);
        assert_eq!(found, [false, true]);
    }
}
