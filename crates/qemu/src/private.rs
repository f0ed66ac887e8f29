//! RAM blocks that QEMU keeps to itself: they are in no shared file, and not in the device state either.
//!
//! Video memory, firmware, option ROMs, tables of the firmware's configuration interface. A QEMU that waits
//! for a guest leaves firmware as zeros, because its own migration carries all of these blocks, read-only
//! ones too: whoever does not has a guest that is dead at its next reboot. So all are carried, zeros left
//! out: copied while the guest runs, and what has changed since once it stands still.

mod pack;
mod records;
mod section;

use crate::{
    qmp::{Qmp, QmpError},
    ram::{self, Layout, Listed, RamError},
};
pub(crate) use pack::{is_zero, pack, unpack};
pub(crate) use section::Given;
use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};
use sys::{maps, process::PidFd};
use units::PAGE_SIZE;

/// The largest private block that is carried: QEMU's VGA has at most 512 MiB.
const LARGEST: u64 = 1 << 30;

/// As much of them as is copied ahead of the pause: more than a `q35` with four network cards and a VGA of
/// the usual size has. A copy is kept, and goes into one message.
const AHEAD: u64 = 48 << 20;

/// Why private memory did not get out or in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrivateError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("{0}; the VM cannot be migrated while that is so")]
    Nowhere(#[from] RamError),
    #[error("where QEMU's private RAM blocks lie: {0}")]
    Maps(io::Error),
    #[error("private RAM block {block}: {cause}")]
    Access { block: String, cause: io::Error },
    #[error("private RAM block {block} of the source is not the same here: {why}")]
    Differs { block: String, why: String },
}

/// The private blocks of a QEMU, and where they lie as far as that is known.
#[derive(Debug)]
pub(crate) struct Places {
    places: Vec<Place>,
    /// A block of main memory, whose address is known.
    known: Option<Listed>,
    located: bool,
}

#[derive(Debug)]
struct Place {
    block: Listed,
    hva: Option<u64>,
    /// Whether only what the kernel says to be present exists of it. Memory that has a file may exist without
    /// being mapped.
    anonymous: bool,
    /// What was copied of it while the guest ran.
    ahead: Option<Copied>,
}

/// A block's content at some time.
#[derive(Debug)]
struct Copied {
    bytes: Vec<u8>,
    /// Which pages exist; the others are zeros.
    present: Vec<bool>,
}

impl Copied {
    fn page(&self, number: usize) -> &[u8] {
        let end = self.bytes.len().min((number + 1) * PAGE_SIZE);
        &self.bytes[number * PAGE_SIZE..end]
    }

    /// All of it.
    fn whole(&self) -> Vec<u8> {
        pack(&self.bytes, |page| self.present[page] && !is_zero(self.page(page)))
    }

    /// What differs from an earlier copy; nothing if nothing does.
    fn since(&self, before: &Copied) -> Option<Vec<u8>> {
        if before.bytes.len() != self.bytes.len() {
            return Some(self.whole());
        }
        let exists = |page: usize| self.present[page] || before.present[page];
        let changed: Vec<bool> = (0..self.present.len())
            .map(|page| exists(page) && self.page(page) != before.page(page))
            .collect();
        changed.contains(&true).then(|| pack(&self.bytes, |page| changed[page]))
    }
}

impl Places {
    pub(crate) fn new(layout: &Layout) -> Self {
        let place =
            |block: &Listed| Place { block: block.clone(), hva: block.hva, anonymous: false, ahead: None };
        let places = layout.private.iter().map(place).collect();
        Self { places, known: layout.known.clone(), located: false }
    }

    /// The blocks, as QEMU listed them.
    pub(crate) fn blocks(&self) -> Vec<Listed> {
        self.places.iter().map(|place| place.block.clone()).collect()
    }

    /// Copies them while the guest runs; [`Self::save`] then tells only what has changed since.
    pub(crate) fn copy_ahead(
        &mut self,
        qmp: &mut Qmp,
        process: &PidFd,
    ) -> Result<Vec<(String, Vec<u8>)>, PrivateError> {
        self.locate(qmp, process)?;
        if !self.places.is_empty() {
            self.resize(&ram::listed(qmp)?)?;
        }
        let (mut copied, mut room) = (Vec::new(), AHEAD);
        for place in &mut self.places {
            let Some(left) = room.checked_sub(place.block.used) else { continue };
            room = left;
            let copy = place.read(process)?;
            copied.push((place.block.name.clone(), copy.whole()));
            place.ahead = Some(copy);
        }
        Ok(copied)
    }

    /// Copies them out of a stopped guest: all of those that were not copied ahead, and what has changed of
    /// the others. `blocks`: as QEMU has listed them since. It is asked nothing: it may stand still as a
    /// whole.
    pub(crate) fn save(
        &mut self,
        blocks: &[Listed],
        process: &PidFd,
    ) -> Result<Vec<(String, Vec<u8>)>, PrivateError> {
        self.resize(blocks)?;
        let mut saved = Vec::new();
        for place in &self.places {
            let now = place.read(process)?;
            let told = place.ahead.as_ref().map_or_else(|| Some(now.whole()), |before| now.since(before));
            saved.extend(told.map(|packed| (place.block.name.clone(), packed)));
        }
        Ok(saved)
    }

    /// Whether its firmware is all zeros: a Whimbrel that did not carry it brought the VM here.
    pub(crate) fn lost_firmware(&mut self, qmp: &mut Qmp, process: &PidFd) -> Result<bool, PrivateError> {
        self.locate(qmp, process)?;
        let firmware = |place: &&Place| matches!(place.block.name.as_str(), "pc.bios" | "system.flash0");
        let Some(place) = self.places.iter().find(firmware) else { return Ok(false) };
        Ok(is_zero(&place.read(process)?.bytes))
    }

    /// Finds those whose address is not known yet. Where a block lies never changes.
    pub(crate) fn locate(&mut self, qmp: &mut Qmp, process: &PidFd) -> Result<(), PrivateError> {
        if self.located {
            return Ok(());
        }
        let unknown: Vec<Listed> =
            self.places.iter().filter(|place| place.hva.is_none()).map(|place| place.block.clone()).collect();
        if let Some(known) = self.known.as_ref().filter(|_| !unknown.is_empty()) {
            let found = records::find(process, &unknown, known).map_err(PrivateError::Maps)?;
            for place in &mut self.places {
                place.hva = place.hva.or_else(|| found.get(&place.block.name).copied());
            }
        }
        self.ask(qmp)?;
        let mappings = maps::read(process).map_err(PrivateError::Maps)?;
        for place in &mut self.places {
            let at = |mapping: &&maps::Mapping| place.hva.is_some_and(|hva| mapping.addresses.contains(&hva));
            place.anonymous = mappings.iter().find(at).is_some_and(|found| found.inode == 0 && !found.shared);
        }
        self.located = true;
        Ok(())
    }

    /// Asks QEMU for the addresses that are not known yet: it tells those of blocks that the guest has mapped
    /// just now.
    pub(crate) fn ask(&mut self, qmp: &mut Qmp) -> Result<(), PrivateError> {
        if self.places.iter().all(|place| place.hva.is_some()) {
            return Ok(());
        }
        let tree = ram::read_tree(qmp)?;
        let regions: Vec<String> = self.places.iter().map(|place| region(&place.block).to_owned()).collect();
        for place in self.places.iter_mut().filter(|place| place.hva.is_none()) {
            let region = region(&place.block);
            if regions.iter().filter(|other| *other == region).count() > 1 {
                let why = format!(
                    "several blocks are called {region}, and the records that QEMU keeps of them are not \
                     understood"
                );
                return Err(RamError::Nowhere { name: place.block.name.clone(), why }.into());
            }
            place.hva = Some(ram::translate(qmp, &tree, region)?);
        }
        Ok(())
    }

    /// Tables change their size when the guest's firmware asks for them.
    fn resize(&mut self, now: &[Listed]) -> Result<(), PrivateError> {
        for place in &mut self.places {
            let name = &place.block.name;
            let Some(listed) = now.iter().find(|listed| listed.name == *name) else {
                let why = "it is not there any more".to_owned();
                return Err(RamError::Nowhere { name: name.clone(), why }.into());
            };
            place.block.used = listed.used.min(place.block.total);
        }
        Ok(())
    }
}

impl Place {
    fn read(&self, process: &PidFd) -> Result<Copied, PrivateError> {
        let block = &self.block;
        let hva = self.hva.ok_or_else(|| access(block, io::ErrorKind::NotFound.into()))?;
        if block.used > LARGEST {
            let why = format!("it has {} bytes; at most {LARGEST} are carried", block.used);
            return Err(access(block, io::Error::other(why)));
        }
        let mut bytes = vec![0; block.used as usize];
        let present = if self.anonymous {
            present(process, hva, bytes.len()).map_err(|cause| access(block, cause))?
        } else {
            vec![true; bytes.len().div_ceil(PAGE_SIZE)]
        };
        for run in runs(bytes.len(), |page| present[page]) {
            read(process, hva + run.start as u64, &mut bytes[run]).map_err(|cause| access(block, cause))?;
        }
        Ok(Copied { bytes, present })
    }
}

/// The region's name lacks the device's address in front.
fn region(block: &Listed) -> &str {
    block.name.rsplit('/').next().unwrap_or(&block.name)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contiguous_pages_are_moved_at_once() {
        let wanted = [true, true, false, true];
        let page = PAGE_SIZE;
        assert_eq!(runs(3 * page + 5, |at| wanted[at]), [0..2 * page, 3 * page..3 * page + 5]);
    }
}
