//! Memory that no file has a name for, and whose content nobody can change any more.

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::{fs::File, io, io::Write, os::fd::OwnedFd};

/// Such memory with this content. `name` is what `/proc` calls it.
pub fn memory(name: &str, content: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.write_all(content)?;
    fcntl_add_seals(&file, SealFlags::SEAL | SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::{fd::AsRawFd, unix::fs::FileExt};

    #[test]
    fn what_is_sealed_can_be_read_and_not_written() {
        let sealed = File::from(memory("test", b"geheim").unwrap());
        let mut read = [0; 6];
        sealed.read_exact_at(&mut read, 0).unwrap();
        assert_eq!(&read, b"geheim");
        assert!(sealed.write_at(b"x", 0).is_err() && sealed.set_len(0).is_err());
        let by_name = std::fs::read(format!("/proc/self/fd/{}", sealed.as_raw_fd())).unwrap();
        assert_eq!(by_name, b"geheim");
    }
}
