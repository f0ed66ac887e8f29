//! Who else has a file: open, or mapped.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

/// Whether another process has the file open or mapped. What is on its way between two processes
/// (`SCM_RIGHTS`) is not seen. The file has no name.
pub fn has_others(file: &File) -> io::Result<bool> {
    let wanted = file.metadata()?;
    let own = std::process::id();
    for process in fs::read_dir("/proc")? {
        let process = process?;
        let pid = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        if pid.is_some_and(|pid| pid != own)
            && (is_open(&process.path(), &wanted) || is_mapped(&process.path(), &wanted))
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A process that ends meanwhile has nothing; one that may not be looked at may have anything. Only files
/// without a name are looked at: one with a name may be on a server that does not answer.
fn is_open(process: &Path, wanted: &Metadata) -> bool {
    let files = match fs::read_dir(process.join("fd")) {
        Ok(files) => files,
        Err(error) => return error.kind() == io::ErrorKind::PermissionDenied,
    };
    let nameless = |path: &Path| {
        fs::read_link(path).is_ok_and(|to| to.as_os_str().as_encoded_bytes().ends_with(b" (deleted)"))
    };
    let paths = files.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| nameless(path));
    paths
        .filter_map(|path| fs::metadata(path).ok())
        .any(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
}

fn is_mapped(process: &Path, wanted: &Metadata) -> bool {
    let (major, minor) = (rustix::fs::major(wanted.dev()), rustix::fs::minor(wanted.dev()));
    let (device, inode) = (format!("{major:02x}:{minor:02x}"), wanted.ino().to_string());
    // ADDRESSES RIGHTS OFFSET DEVICE INODE PATH
    let is_wanted = |line: &str| {
        let mut words = line.split_ascii_whitespace().skip(3);
        words.next() == Some(&*device) && words.next() == Some(&*inode)
    };
    let maps = fs::read(process.join("maps")).unwrap_or_default();
    String::from_utf8_lossy(&maps).lines().any(is_wanted)
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
        assert!(!has_others(&file).unwrap());
    }

    #[test]
    fn whoever_else_has_a_file_open_is_found_until_it_ends() {
        let file = memfd();
        let mut other = Command::new("sh")
            .args(["-c", "echo ready; read end"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(file.try_clone().unwrap())
            .spawn()
            .unwrap();
        other.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        assert!(has_others(&file).unwrap());
        drop(other.stdin.take());
        other.wait().unwrap();
        assert!(!has_others(&file).unwrap());
    }

    #[test]
    fn a_mapped_file_is_found_by_the_maps() {
        let own = Path::new("/proc/self");
        let program = fs::metadata("/proc/self/exe").unwrap();
        assert!(is_mapped(own, &program) && !is_mapped(own, &memfd().metadata().unwrap()));
    }
}
