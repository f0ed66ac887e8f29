//! RAM blocks that QEMU keeps to itself: they are in no shared file, and not in the device state either.
//!
//! Those that the guest can write (video memory; microvm's firmware) are carried, page by page, zeros left out. Those
//! that it cannot (firmware, option ROMs, tables of the firmware's configuration interface) are each QEMU's own: the guest copied what
//! it needed from them when it booted, and after a reboot uses its new host's.

use crate::{
    qmp::{Qmp, QmpError},
    ram::{self, Layout, Listed, RamError},
};
use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};
use sys::process::PidFd;
use units::PAGE_SIZE;

/// The largest private block that is carried: QEMU's VGA has at most 512 MiB.
const LARGEST: u64 = 1 << 30;

/// Before the pages: the block's size.
const HEADER: usize = 8;

/// Before each page: its number.
const NUMBER: usize = 8;

/// Why private memory did not get out or in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrivateError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("{0}; the VM cannot be migrated while that is so")]
    Nowhere(#[from] RamError),
    #[error("private RAM block {block}: {cause}")]
    Access { block: String, cause: io::Error },
    #[error("private RAM block {block} of the source is not the same here: {why}")]
    Differs { block: String, why: String },
}

/// The private blocks that the guest can write, and where they lie as far as that is known.
#[derive(Debug)]
pub(crate) struct Places(Vec<(Listed, Option<u64>)>);

impl Places {
    pub(crate) fn new(layout: &Layout) -> Self {
        let writable = layout.private.iter().filter(|block| !is_rom(block));
        Self(writable.map(|block| (block.clone(), block.hva)).collect())
    }

    /// Copies them out of a stopped guest.
    pub(crate) fn save(
        &mut self,
        qmp: &mut Qmp,
        process: &PidFd,
    ) -> Result<Vec<(String, Vec<u8>)>, PrivateError> {
        self.locate(qmp)?;
        let mut saved = Vec::new();
        for (block, hva) in &self.0 {
            let Some(hva) = hva else { continue };
            let mut bytes = vec![0; block.used.min(LARGEST) as usize];
            let present = present(process, *hva, bytes.len()).map_err(|cause| access(block, cause))?;
            for run in runs(bytes.len(), |page| present[page]) {
                read(process, *hva + run.start as u64, &mut bytes[run])
                    .map_err(|cause| access(block, cause))?;
            }
            saved.push((block.name.clone(), pack(&bytes, |page| present[page])));
        }
        Ok(saved)
    }

    /// Puts them into a QEMU that has loaded its device state and does not run yet.
    pub(crate) fn load(
        &mut self,
        qmp: &mut Qmp,
        process: &PidFd,
        saved: &[(String, Vec<u8>)],
    ) -> Result<(), PrivateError> {
        self.locate(qmp)?;
        let differs = |block: &str, why: String| PrivateError::Differs { block: block.to_owned(), why };
        for (block, _) in &self.0 {
            if !saved.iter().any(|(name, _)| *name == block.name) {
                return Err(differs(&block.name, "the source has none of this name".to_owned()));
            }
        }
        for (name, packed) in saved {
            let found = self.0.iter().find(|(block, _)| block.name == *name);
            let Some((block, Some(hva))) = found else {
                return Err(differs(name, "there is none of this name".to_owned()));
            };
            let own = block.used.min(LARGEST);
            // Firmware ends at a fixed address of the guest, so the end of a larger one is where a smaller one was.
            let size =
                if name.ends_with(".bios") { packed_size(packed).unwrap_or(own).min(own) } else { own };
            let (mut bytes, hva) = (vec![0; size as usize], *hva + (own - size));
            let carried = unpack(packed, &mut bytes).map_err(|why| differs(name, why))?;
            let present = present(process, hva, bytes.len()).map_err(|cause| access(block, cause))?;
            // What neither side ever touched is zeros on both.
            for run in runs(bytes.len(), |page| carried[page] || present[page]) {
                write(process, hva + run.start as u64, &bytes[run]).map_err(|cause| access(block, cause))?;
            }
        }
        Ok(())
    }

    /// Asks QEMU for the addresses that are not known yet. Video memory is known to old QEMUs only where the guest has
    /// it mapped; where it lies in QEMU never changes.
    pub(crate) fn locate(&mut self, qmp: &mut Qmp) -> Result<(), PrivateError> {
        if self.0.iter().all(|(_, hva)| hva.is_some()) {
            return Ok(());
        }
        let tree = ram::read_tree(qmp)?;
        // Where QEMU does not tell (7), its memory tree does: firmware is writable on microvm, but not on q35.
        self.0.retain(|(block, hva)| {
            hva.is_some() || !block.name.ends_with(".bios") || tree.contains_key(&block.name)
        });
        for (block, hva) in self.0.iter_mut().filter(|(_, hva)| hva.is_none()) {
            // The region's name lacks the device's address in front.
            let region = block.name.rsplit('/').next().unwrap_or(&block.name);
            *hva = Some(ram::translate(qmp, &tree, region)?);
        }
        Ok(())
    }
}

/// What the guest surely cannot write.
fn is_rom(block: &Listed) -> bool {
    if let Some(read_only) = block.read_only {
        return read_only;
    }
    let name = block.name.as_str();
    name.starts_with("/rom@") || name.ends_with(".rom") || name == "pc.rom"
}

fn access(block: &Listed, cause: io::Error) -> PrivateError {
    PrivateError::Access { block: block.name.clone(), cause }
}

/// Which pages of private memory exist: the others are zeros, and reading them would make them. Asked of
/// `/proc/PID/pagemap`, where bit 63 says that a page is in memory and bit 62 that it is swapped out.
fn present(process: &PidFd, hva: u64, bytes: usize) -> io::Result<Vec<bool>> {
    const ENTRY: usize = size_of::<u64>();
    let mut entries = vec![0; bytes.div_ceil(PAGE_SIZE) * ENTRY];
    let pagemap = File::open(process.proc_path("pagemap"))?;
    pagemap.read_exact_at(&mut entries, hva / PAGE_SIZE as u64 * ENTRY as u64)?;
    Ok(entries.chunks_exact(ENTRY).map(|entry| entry[ENTRY - 1] & 0b1100_0000 != 0).collect())
}

/// The bytes of contiguous pages that `wanted` accepts, of a block of `bytes`.
fn runs(bytes: usize, wanted: impl Fn(usize) -> bool) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for page in (0..bytes.div_ceil(PAGE_SIZE)).filter(|page| wanted(*page)) {
        let (start, end) = (page * PAGE_SIZE, bytes.min((page + 1) * PAGE_SIZE));
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

/// One call moves at most 2 GiB, and pages of other processes are best taken in pieces that fit a cache.
const PIECE: usize = 4 << 20;

fn read(process: &PidFd, hva: u64, into: &mut [u8]) -> io::Result<()> {
    let mut at = hva;
    for piece in into.chunks_mut(PIECE) {
        process.read_memory(at, piece)?;
        at += piece.len() as u64;
    }
    Ok(())
}

fn write(process: &PidFd, hva: u64, from: &[u8]) -> io::Result<()> {
    let mut at = hva;
    for piece in from.chunks(PIECE) {
        process.write_memory(at, piece)?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// The size, then each page of `present` ones that is not zero, with its number before it.
pub(crate) fn pack(bytes: &[u8], present: impl Fn(usize) -> bool) -> Vec<u8> {
    let mut packed = (bytes.len() as u64).to_le_bytes().to_vec();
    for (number, page) in bytes.chunks(PAGE_SIZE).enumerate() {
        if present(number) && page.iter().any(|byte| *byte != 0) {
            packed.extend((number as u64).to_le_bytes());
            packed.extend(page);
        }
    }
    packed
}

/// The size of a packed block.
fn packed_size(packed: &[u8]) -> Option<u64> {
    packed.get(..HEADER)?.try_into().map(u64::from_le_bytes).ok()
}

/// Undoes [`pack`] into zeros and says which pages there were. Foreign input: every number is checked.
pub(crate) fn unpack(packed: &[u8], into: &mut [u8]) -> Result<Vec<bool>, String> {
    let number = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).ok();
    let size = packed_size(packed).ok_or("it has no size")?;
    if size != into.len() as u64 {
        return Err(format!("it has {size} bytes there and {} here", into.len()));
    }
    let mut carried = vec![false; into.len().div_ceil(PAGE_SIZE)];
    let mut rest = &packed[HEADER..];
    while !rest.is_empty() {
        let page = rest.get(..NUMBER).and_then(number).ok_or("it is cut off")?;
        rest = &rest[NUMBER..];
        let start = usize::try_from(page).ok().and_then(|page| page.checked_mul(PAGE_SIZE));
        let start = start.filter(|start| *start < into.len()).ok_or("a page lies beyond its end")?;
        let length = PAGE_SIZE.min(into.len() - start);
        into[start..start + length].copy_from_slice(rest.get(..length).ok_or("it is cut off")?);
        carried[start / PAGE_SIZE] = true;
        rest = &rest[length..];
    }
    Ok(carried)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contiguous_pages_are_moved_at_once() {
        let wanted = [true, true, false, true];
        let page = PAGE_SIZE;
        assert_eq!(runs(3 * page + 5, |at| wanted[at]), [0..2 * page, 3 * page..3 * page + 5]);
    }

    #[test]
    fn a_block_survives_being_packed_without_its_zeros() {
        let mut bytes = vec![0; 5 * PAGE_SIZE + 7];
        bytes[PAGE_SIZE] = 1;
        *bytes.last_mut().unwrap() = 2;
        let packed = pack(&bytes, |_| true);
        assert_eq!(packed.len(), HEADER + NUMBER + PAGE_SIZE + NUMBER + 7);
        let mut again = vec![0; bytes.len()];
        unpack(&packed, &mut again).unwrap();
        assert_eq!(bytes, again);
        for cut in 0..packed.len() {
            // Only a cut between two pages leaves something whole.
            let whole = cut == HEADER || cut == HEADER + NUMBER + PAGE_SIZE;
            assert_eq!(unpack(&packed[..cut], &mut again).is_ok(), whole, "cut at {cut}");
        }
        assert!(unpack(&packed, &mut vec![0; PAGE_SIZE]).is_err());
        let mut beyond = packed.clone();
        beyond[HEADER] = 200;
        assert!(unpack(&beyond, &mut again).is_err());
    }
}
