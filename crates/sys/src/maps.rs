//! The mappings of a process: `/proc/PID/maps`.

use crate::{proc, process::PidFd};
use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader},
    ops::Range,
};

/// One mapping.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// Its addresses.
    pub addresses: Range<u64>,
    /// Whether it may be read.
    pub read: bool,
    /// Whether it may be written.
    pub write: bool,
    /// Whether it may be executed.
    pub execute: bool,
    /// Whether its writes reach the file and other processes.
    pub shared: bool,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// The file's device, as `major:minor` in hexadecimal.
    pub device: String,
    /// The file's inode number; 0 where there is no file.
    pub inode: u64,
    /// The file's path or the mapping's kind (`[stack]`); empty for plain anonymous memory.
    pub path: String,
}

impl Mapping {
    /// Whether `other` begins in memory and in the same file where this one ends.
    pub fn continues_in(&self, other: &Mapping) -> bool {
        self.addresses.end == other.addresses.start
            && self.device == other.device
            && self.inode == other.inode
            && self.offset + (self.addresses.end - self.addresses.start) == other.offset
    }
}

/// All mappings of a process, by address.
pub fn read(process: &PidFd) -> io::Result<Vec<Mapping>> {
    let path = process.proc_path("maps");
    BufReader::new(File::open(path)?).lines().map(|line| parse(&line?)).collect()
}

fn parse(line: &str) -> io::Result<Mapping> {
    parse_line(line)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("not a mapping: {line}")))
}

fn parse_line(line: &str) -> Option<Mapping> {
    let mut rest = line;
    let mut word = || {
        let (word, tail) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = tail;
        word
    };
    let (start, end) = word().split_once('-')?;
    let rights = word().as_bytes();
    let offset = u64::from_str_radix(word(), 16).ok()?;
    let device = word().to_owned();
    let inode = word().parse().ok()?;
    let has = |place: usize, letter| rights.get(place) == Some(&letter);
    Some(Mapping {
        addresses: u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?,
        read: has(0, b'r'),
        write: has(1, b'w'),
        execute: has(2, b'x'),
        shared: has(3, b's'),
        offset,
        device,
        inode,
        path: rest.trim_start().to_owned(),
    })
}

/// Opens the file behind `mapping` for reading and writing, even where it has no name any more.
///
/// Only works while the process has exactly this mapping: registering a userfaultfd may split or join
/// mappings, so open first. Needs `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN`.
pub fn open_file(process: &PidFd, mapping: &Mapping) -> io::Result<File> {
    let name = format!("map_files/{:x}-{:x}", mapping.addresses.start, mapping.addresses.end);
    OpenOptions::new().read(true).write(true).open(process.proc_path(name))
}

/// The two-letter flags of the mapping that holds `address` (`VmFlags` of `/proc/PID/smaps`, such as `hg` for
/// `MADV_HUGEPAGE`).
pub fn flags_at(process: &PidFd, address: u64) -> io::Result<Vec<String>> {
    let mut found = None;
    details(process, |mapping, key, value| {
        if key == "VmFlags" && mapping.addresses.contains(&address) {
            found = Some(value.split_whitespace().map(str::to_owned).collect());
        }
        Ok(found.is_none())
    })?;
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("nothing is mapped at {address:#x}")))
}

/// How many bytes of explicit huge pages the mappings hold that begin within `addresses`: also those of pages
/// that are being moved to another place in memory.
pub fn huge_bytes(process: &PidFd, addresses: &Range<u64>) -> io::Result<u64> {
    let mut bytes = 0;
    details(process, |mapping, key, value| {
        if matches!(key, "Shared_Hugetlb" | "Private_Hugetlb") && addresses.contains(&mapping.addresses.start)
        {
            let strange = || io::Error::new(io::ErrorKind::InvalidData, format!("{key} is no size: {value}"));
            bytes += proc::amount(value).ok_or_else(strange)?;
        }
        Ok(true)
    })?;
    Ok(bytes)
}

/// Shows `look` all lines of `/proc/PID/smaps`, a key with its value each, and the mapping that it is of;
/// until it has seen enough.
fn details(
    process: &PidFd,
    mut look: impl FnMut(&Mapping, &str, &str) -> io::Result<bool>,
) -> io::Result<()> {
    let mut mapping = None;
    for line in BufReader::new(File::open(process.proc_path("smaps"))?).lines() {
        let line = line?;
        if let Some(next) = parse_line(&line) {
            mapping = Some(next);
        } else if let (Some(mapping), Some((key, value))) = (&mapping, line.split_once(':'))
            && !look(mapping, key, value.trim())?
        {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_a_path_that_has_blanks_is_understood() {
        let line =
            "7f0000000000-7f0010000000 rw-s 00001000 00:01 1027                       /memfd:a b (deleted)";
        let mapping = parse(line).unwrap();
        assert_eq!(mapping.addresses, 0x7f00_0000_0000..0x7f00_1000_0000);
        assert!(mapping.read && mapping.write && !mapping.execute && mapping.shared);
        assert_eq!((mapping.offset, mapping.inode), (0x1000, 1027));
        assert_eq!(mapping.path, "/memfd:a b (deleted)");
        assert!(parse("Size: 12 kB").is_err());
    }

    #[test]
    fn our_own_mappings_can_be_read() {
        let me = PidFd::open(std::process::id() as i32).unwrap();
        let all = read(&me).unwrap();
        let here = &all as *const _ as u64;
        let stack = all.iter().find(|m| m.addresses.contains(&here)).unwrap();
        assert!(stack.write && !stack.shared);
        assert!(flags_at(&me, here).unwrap().contains(&"wr".to_owned()));
    }
}
