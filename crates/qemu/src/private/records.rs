//! Where QEMU's private RAM blocks lie, by the record that QEMU itself keeps of each of them.
//!
//! QEMU before version 8 does not tell. It keeps a record of each block on its heap (`struct RAMBlock`): the
//! block's address, and a little further its offset, used and largest size, one after the other, and its
//! name. The three numbers and the name are what `info ramblock` says, which finds the record; how far from
//! them the address stands is seen in the record of a block whose address is known. No layout of any version
//! is assumed.
//!
//! A guest can have QEMU keep bytes of its choice on the heap, and so forge a record. The true one is still
//! there: two that contradict each other are no answer.

use crate::ram::Listed;
use std::{collections::BTreeMap, io};
use sys::{maps, process::PidFd};

/// The numbers by which a record is recognised: offset, used, largest size.
const NUMBERS: usize = 3 * WORD;

const WORD: usize = size_of::<u64>();

/// How far before the numbers the address may stand, and how far behind them the name: a few words in every
/// version so far (16 and 12 bytes in 7.2).
const BEFORE: usize = 128;
const BEHIND: usize = 128;

/// A block's name has at most 255 bytes and a NUL.
const NAME: usize = 256;

/// Larger heaps are not searched: QEMU's has some 20 MiB.
const LARGEST_HEAP: u64 = 1 << 30;

/// Read at a time.
const PIECE: usize = 1 << 20;

/// How often the heap is read anew because it became smaller meanwhile, as it does soon after QEMU's start.
const ATTEMPTS: usize = 5;

/// The address of each of `blocks` whose record is found. `known` is a block whose address is known.
pub(crate) fn find(process: &PidFd, blocks: &[Listed], known: &Listed) -> io::Result<BTreeMap<String, u64>> {
    let mut attempts = 1;
    let (heap, mappings) = loop {
        let mappings = maps::read(process)?;
        match read_heap(process, &mappings) {
            Ok(heap) => break (heap, mappings),
            Err(_) if attempts < ATTEMPTS && process.is_alive()? => attempts += 1,
            Err(error) => return Err(error),
        }
    };
    let mut found = addresses(&heap, blocks, known);
    // Whatever the records say, memory must be there that QEMU can write.
    found.retain(|name, hva| {
        let size = blocks.iter().find(|block| block.name == *name).map_or(0, |block| block.total);
        is_mapped(&mappings, *hva, size)
    });
    Ok(found)
}

/// All of the heap; nothing if there is none, or one that is no QEMU's.
fn read_heap(process: &PidFd, mappings: &[maps::Mapping]) -> io::Result<Vec<u8>> {
    // A block that lies in it (a TPM's) splits the mapping.
    let mut addresses = 0..0;
    for heap in mappings.iter().filter(|mapping| mapping.path == "[heap]") {
        match addresses.end {
            0 => addresses = heap.addresses.clone(),
            end if end == heap.addresses.start => addresses.end = heap.addresses.end,
            _ => break,
        }
    }
    let size = addresses.end - addresses.start;
    if size > LARGEST_HEAP {
        return Ok(Vec::new());
    }
    let mut bytes = vec![0; size as usize];
    let mut at = addresses.start;
    for piece in bytes.chunks_mut(PIECE) {
        process.read_memory(at, piece)?;
        at += piece.len() as u64;
    }
    Ok(bytes)
}

/// The same, in a heap.
fn addresses(heap: &[u8], blocks: &[Listed], known: &Listed) -> BTreeMap<String, u64> {
    let Some(hva) = known.hva else { return BTreeMap::new() };
    let records = records(heap, blocks, known);
    let mut places = records.iter().filter(|(name, _)| *name == known.name).flat_map(|(_, at)| {
        let here = *at;
        (WORD..=BEFORE).step_by(WORD).filter(move |back| word(heap, here, *back) == Some(hva))
    });
    let (Some(back), None) = (places.next(), places.next()) else { return BTreeMap::new() };
    let mut found = BTreeMap::new();
    for block in blocks {
        let mut said = records
            .iter()
            .filter(|(name, _)| *name == block.name)
            .filter_map(|(_, at)| word(heap, *at, back))
            // A record that was freed may have lost its address, not its numbers.
            .filter(|hva| *hva != 0);
        if let Some(hva) = said.next()
            && said.all(|other| other == hva)
        {
            found.insert(block.name.clone(), hva);
        }
    }
    found
}

/// Every place in the heap where the numbers of one of the blocks stand, with its name behind them.
fn records<'a>(heap: &[u8], blocks: &'a [Listed], known: &'a Listed) -> Vec<(&'a str, usize)> {
    let all: Vec<&Listed> = blocks.iter().chain([known]).collect();
    let mut found = Vec::new();
    let words = heap.chunks_exact(WORD).map(|word| u64::from_le_bytes(word.try_into().expect("a word")));
    for (index, offset) in words.enumerate() {
        let at = index * WORD;
        let same = |block: &&&Listed| {
            block.offset == offset
                && word(heap, at + 2 * WORD, WORD) == Some(block.used)
                && word(heap, at + 3 * WORD, WORD) == Some(block.total)
        };
        for block in all.iter().filter(same).filter(|block| has_name(&heap[at + NUMBERS..], &block.name)) {
            found.push((block.name.as_str(), at));
        }
    }
    found.dedup();
    found
}

fn has_name(behind: &[u8], name: &str) -> bool {
    let within = &behind[..behind.len().min(BEHIND + NAME)];
    let wanted = [name.as_bytes(), b"\0"].concat();
    within.windows(wanted.len()).take(BEHIND).any(|here| here == wanted)
}

/// The word that stands `back` bytes before `at`.
fn word(heap: &[u8], at: usize, back: usize) -> Option<u64> {
    let start = at.checked_sub(back)?;
    Some(u64::from_le_bytes(heap.get(start..start + WORD)?.try_into().ok()?))
}

/// Whether all of it is memory that the process can read and write.
fn is_mapped(mappings: &[maps::Mapping], hva: u64, size: u64) -> bool {
    let Some(end) = hva.checked_add(size) else { return false };
    let mut at = hva;
    for mapping in mappings.iter().filter(|mapping| mapping.read && mapping.write) {
        if mapping.addresses.contains(&at) {
            at = mapping.addresses.end;
        }
        if at >= end {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(name: &str, offset: u64, used: u64, total: u64, hva: Option<u64>) -> Listed {
        Listed { name: name.to_owned(), page_bytes: 4096, offset, used, total, hva, read_only: None }
    }

    /// As QEMU 7.2 has it: address, another pointer, the three numbers, 12 bytes, the name.
    fn record(block: &Listed, hva: u64) -> Vec<u8> {
        let numbers = [hva, 0, block.offset, block.used, block.total].map(u64::to_le_bytes).concat();
        let mut record = [numbers, vec![0; 12], block.name.clone().into_bytes()].concat();
        record.resize(512, 0);
        record
    }

    #[test]
    fn the_address_stands_where_that_of_a_known_block_does() {
        let known = listed("pc.ram", 0, 64 << 20, 64 << 20, Some(0x7f00_0000_0000));
        let bios = listed("pc.bios", 64 << 20, 0x4_0000, 0x4_0000, None);
        let roms = ["0000:00:02.0/nic.rom", "0000:00:03.0/nic.rom"]
            .map(|name| listed(name, 0x500_0000, 0x4_0000, 0x4_0000, None));
        let wanted = [bios.clone(), roms[0].clone(), roms[1].clone()];
        let junk = vec![0xa5; 256];
        let heap = |more: &[Vec<u8>]| {
            let records = [record(&known, 0x7f00_0000_0000), junk.clone(), record(&bios, 0x1000)];
            let both = [record(&roms[0], 0x2000), record(&roms[1], 0x3000)];
            [&records[..], &both, more].concat().concat()
        };
        let found = addresses(&heap(&[]), &wanted, &known);
        assert_eq!(found.into_values().collect::<Vec<_>>(), [0x2000, 0x3000, 0x1000], "by name");

        // What a guest forges makes no answer another one; a copy of the truth does no harm.
        let forged = addresses(&heap(&[record(&bios, 0x6000)]), &wanted, &known);
        assert_eq!(forged.get("pc.bios"), None);
        assert_eq!(forged.len(), 2);
        let copied = addresses(&heap(&[record(&bios, 0x1000), record(&bios, 0)]), &wanted, &known);
        assert_eq!(copied["pc.bios"], 0x1000);
        let two = addresses(&heap(&[record(&known, 0x7f00_0000_0000)]), &wanted, &known);
        assert!(two.is_empty(), "two records of the known block");
        let elsewhere = listed("pc.ram", 0, 64 << 20, 64 << 20, Some(0x7f00_1000_0000));
        assert!(
            addresses(&heap(&[]), &wanted, &elsewhere).is_empty(),
            "its record does not hold its address"
        );
    }

    #[test]
    fn a_heap_that_ends_anywhere_is_read_to_its_end() {
        let known = listed("pc.ram", 0, 1 << 20, 1 << 20, Some(0x1000));
        let whole = [record(&known, 0x1000), record(&known, 0x1000)].concat();
        for cut in 0..whole.len() {
            addresses(&whole[..cut], std::slice::from_ref(&known), &known);
        }
    }

    #[test]
    fn memory_is_mapped_if_all_of_it_is() {
        let map = |start, end, write| maps::Mapping {
            addresses: start..end,
            read: true,
            write,
            execute: false,
            shared: false,
            offset: 0,
            device: "00:00".to_owned(),
            inode: 0,
            path: String::new(),
        };
        let mappings = [map(0x1000, 0x3000, true), map(0x3000, 0x5000, true), map(0x5000, 0x6000, false)];
        let cases =
            [(0x1000, 0x4000, true), (0x2000, 0x3000, true), (0x4000, 0x1001, false), (0, 0x1000, false)];
        for (hva, size, mapped) in cases {
            assert_eq!(is_mapped(&mappings, hva, size), mapped, "{hva:#x}, {size:#x}");
        }
        assert!(!is_mapped(&mappings, u64::MAX, 2));
    }
}
