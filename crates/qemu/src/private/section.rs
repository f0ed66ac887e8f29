//! Private RAM into a waiting QEMU: as a section of its own migration stream, which names the block and lets
//! QEMU find it.
//!
//! It is the `ram` section of an ordinary stream (version 4; `migration/ram.c`), with those blocks only that
//! are to be filled, read-only ones included. It comes before the device state, and may come several times. A
//! listed block that can change its size (ACPI tables) gets that of the source. All numbers are big-endian.

use super::{
    PrivateError,
    pack::{is_zero, packed_size, unpack},
};
use crate::ram::Listed;
use std::collections::BTreeMap;
use units::PAGE_SIZE;

/// `QEMU_VM_SECTION_START` and `QEMU_VM_SECTION_FOOTER`.
const START: u8 = 1;
const FOOTER: u8 = 0x7e;

/// The section's number: QEMU counts its own from 0.
const NUMBER: u32 = 0x7fff_fff0;

/// The `ram` section's version in every QEMU since 0.14.
const VERSION: u32 = 4;

/// Flags in the low bits of an offset: `RAM_SAVE_FLAG_ZERO`, `…_MEM_SIZE`, `…_PAGE`, `…_EOS`, `…_CONTINUE`.
const ZERO: u64 = 0x02;
const SIZES: u64 = 0x04;
const PAGE: u64 = 0x08;
const END: u64 = 0x10;
const SAME_BLOCK: u64 = 0x20;

/// What a waiting QEMU has been given so far of its private blocks.
#[derive(Debug, Default)]
pub(crate) struct Given(BTreeMap<String, u64>);

impl Given {
    /// The section that makes the blocks `here` what the source says. A block that was given before in this
    /// size is changed only where pages come for it; any other consists of the pages that come, and of zeros.
    pub(crate) fn section(
        &mut self,
        here: &[Listed],
        carried: &[(String, Vec<u8>)],
    ) -> Result<Vec<u8>, PrivateError> {
        let (mut sizes, mut pages, mut all) = (Vec::new(), Vec::new(), 0);
        for (name, packed) in carried {
            let Some(block) = here.iter().find(|block| block.name == *name) else {
                return Err(differs(name, "there is none of this name".to_owned()));
            };
            let Some(fit) = fit(block, packed)? else { continue };
            let mut bytes = vec![0; fit.theirs as usize];
            let came = unpack(packed, &mut bytes).map_err(|why| differs(name, why))?;
            let again = self.0.insert(name.clone(), fit.theirs) == Some(fit.theirs);
            all += fit.ours;
            put_name(&mut sizes, name)?;
            sizes.extend(fit.ours.to_be_bytes());
            let mut first = true;
            for (number, page) in bytes.chunks(PAGE_SIZE).enumerate() {
                if again && !came[number] {
                    continue;
                }
                let zero = is_zero(page);
                let offset = fit.shift + (number * PAGE_SIZE) as u64;
                let flags = if zero { ZERO } else { PAGE } | if first { 0 } else { SAME_BLOCK };
                pages.extend((offset | flags).to_be_bytes());
                if std::mem::take(&mut first) {
                    put_name(&mut pages, name)?;
                }
                if zero {
                    pages.push(0);
                } else {
                    pages.extend(page);
                    pages.resize(pages.len() + PAGE_SIZE - page.len(), 0);
                }
            }
        }
        if sizes.is_empty() {
            return Ok(sizes);
        }
        let mut section = vec![START];
        section.extend(NUMBER.to_be_bytes());
        put_name(&mut section, "ram")?;
        section.extend([0, VERSION].map(u32::to_be_bytes).concat());
        section.extend((all | SIZES).to_be_bytes());
        section.extend(sizes);
        section.extend(pages);
        section.extend(END.to_be_bytes());
        section.push(FOOTER);
        section.extend(NUMBER.to_be_bytes());
        Ok(section)
    }
}

/// How a block of the source goes into that of the same name here, in bytes.
struct Fit {
    theirs: u64,
    ours: u64,
    /// Where in ours theirs begins.
    shift: u64,
}

fn fit(block: &Listed, packed: &[u8]) -> Result<Option<Fit>, PrivateError> {
    let name = &block.name;
    let theirs = packed_size(packed).ok_or_else(|| differs(name, "it has no size".to_owned()))?;
    let same = Fit { theirs, ours: theirs, shift: 0 };
    if theirs == block.used && theirs <= super::LARGEST {
        return Ok(Some(same));
    }
    let sizes = format!("it has {theirs} bytes there and {} here", block.used);
    if name.ends_with(".bios") && theirs < block.used {
        // Firmware ends at a fixed address of the guest, so the end of a larger one is where a smaller one
        // was.
        return Ok(Some(Fit { theirs, ours: block.used, shift: block.used - theirs }));
    }
    // Blocks that never change their size have all they may have.
    if block.used != block.total && theirs <= block.total {
        return Ok(Some(same));
    }
    if is_option_rom(name) {
        // Its file is another one here. The guest runs it when it boots, and only then.
        tracing::info!(block = name, sizes, "the guest gets this host's option ROM at its next reboot");
        return Ok(None);
    }
    Err(differs(name, format!("{sizes}; both hosts need the same firmware files")))
}

/// A PCI device's ROM, from a file: `0000:00:02.0/virtio-net-pci.rom`.
fn is_option_rom(name: &str) -> bool {
    name.contains('/') && name.ends_with(".rom")
}

fn put_name(into: &mut Vec<u8>, name: &str) -> Result<(), PrivateError> {
    let length = u8::try_from(name.len()).map_err(|_| differs(name, "its name is too long".to_owned()))?;
    into.push(length);
    into.extend(name.as_bytes());
    Ok(())
}

fn differs(block: &str, why: String) -> PrivateError {
    PrivateError::Differs { block: block.to_owned(), why }
}

#[cfg(test)]
mod tests {
    use super::{super::pack::pack, *};

    fn here(name: &str, used: u64, total: u64) -> Listed {
        Listed { name: name.to_owned(), page_bytes: 4096, offset: 0, used, total, hva: None, read_only: None }
    }

    fn has(section: &[u8], number: u64) -> bool {
        section.windows(8).any(|word| word == number.to_be_bytes())
    }

    #[test]
    fn the_first_section_has_the_block_later_ones_the_changes() {
        const P: u64 = PAGE_SIZE as u64;
        let blocks = [here("pc.bios", 4 * P, 4 * P)];
        let mut bytes = vec![0; 4 * PAGE_SIZE];
        bytes[PAGE_SIZE] = 7;
        let mut given = Given::default();
        let first = given.section(&blocks, &[("pc.bios".into(), pack(&bytes, |page| page == 1))]).unwrap();
        let mut expected =
            [&[1][..], &NUMBER.to_be_bytes(), b"\x03ram", &[0; 4], &4u32.to_be_bytes()].concat();
        expected.extend(((4 * P) | 4).to_be_bytes());
        expected.extend([b"\x07pc.bios", &(4 * P).to_be_bytes()[..]].concat());
        expected.extend([&2u64.to_be_bytes()[..], b"\x07pc.bios\0"].concat());
        expected.extend((P | 8 | 0x20).to_be_bytes());
        expected.extend(&bytes[PAGE_SIZE..2 * PAGE_SIZE]);
        expected.extend(
            [&((2 * P) | 0x22).to_be_bytes()[..], b"\0", &((3 * P) | 0x22).to_be_bytes(), b"\0"].concat(),
        );
        expected.extend([&16u64.to_be_bytes()[..], &[0x7e], &NUMBER.to_be_bytes()].concat());
        assert_eq!(first, expected);
        let later = given.section(&blocks, &[("pc.bios".into(), pack(&vec![0; 4 * PAGE_SIZE], |p| p == 1))]);
        let later = later.unwrap();
        assert!(later.len() < 100, "one page of zeros");
        assert!(has(&later, P | 2) && !has(&later, (2 * P) | 0x22), "it is page 1: {later:?}");
        assert!(given.section(&blocks, &[]).unwrap().is_empty());
    }

    #[test]
    fn sizes_are_agreed_or_named() {
        const P: u64 = PAGE_SIZE as u64;
        let packed = |pages: usize| pack(&vec![1; pages * PAGE_SIZE], |_| true);
        let section = |block: Listed, theirs| {
            let carried = [(block.name.clone(), packed(theirs))];
            Given::default().section(&[block], &carried).map_err(|e| e.to_string())
        };
        // Tables grow and shrink with the source's.
        for theirs in [1, 3, 8] {
            let grown = section(here("/rom@etc/acpi/tables", 2 * P, 8 * P), theirs).unwrap();
            assert!(grown.len() > theirs * PAGE_SIZE);
        }
        assert!(section(here("/rom@etc/acpi/tables", 2 * P, 8 * P), 9).is_err());
        // Firmware ends where it did.
        let larger = section(here("pc.bios", 4 * P, 4 * P), 1).unwrap();
        assert!(has(&larger, (3 * P) | 8) && has(&larger, 4 * P));
        let refused = section(here("pc.bios", P, P), 2).unwrap_err();
        assert!(
            refused.contains("8192 bytes there and 4096 here; both hosts need the same firmware"),
            "{refused}"
        );
        assert!(section(here("0000:00:02.0/virtio-net-pci.rom", P, P), 2).unwrap().is_empty());
        assert!(section(here("0000:00:02.0/vga.vram", P, P), 2).is_err());
    }
}
