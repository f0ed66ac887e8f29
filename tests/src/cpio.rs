//! Archives that a kernel unpacks as its first file system (the `newc` format of cpio).

use crate::{Doing, Result};
use std::{collections::BTreeSet, fs, path::Path};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;

/// An archive in the making. Parent directories appear by themselves.
#[derive(Debug, Default)]
pub(crate) struct Cpio {
    bytes: Vec<u8>,
    there: BTreeSet<String>,
}

impl Cpio {
    /// An executable file with this content.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) {
        self.parents(path);
        self.entry(path, PROGRAM, content);
    }

    /// A copy of a file, at the same path.
    pub(crate) fn copy(&mut self, path: &Path) -> Result<()> {
        let content = fs::read(path).doing(format!("read {}", path.display()))?;
        self.file(&path.to_string_lossy(), &content);
        Ok(())
    }

    /// An empty directory.
    pub(crate) fn directory(&mut self, path: &str) {
        self.parents(path);
        self.entry(path, DIRECTORY, &[]);
    }

    /// A symbolic link.
    pub(crate) fn link(&mut self, path: &str, to: &str) {
        self.parents(path);
        self.entry(path, SYMLINK, to.as_bytes());
    }

    /// The whole archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        let path = path.trim_start_matches('/');
        for (end, _) in path.match_indices('/') {
            self.entry(&path[..end], DIRECTORY, &[]);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        let name = path.trim_start_matches('/');
        if !self.there.insert(name.to_owned()) {
            return;
        }
        let number = self.there.len();
        let (size, length) = (content.len(), name.len() + 1);
        let mut header = format!("070701{number:08X}{mode:08X}{0:08X}{0:08X}{1:08X}{0:08X}{size:08X}", 0, 1);
        header += &format!("{0:08X}{0:08X}{0:08X}{0:08X}{length:08X}{0:08X}{name}\0", 0);
        self.bytes.extend_from_slice(header.as_bytes());
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
