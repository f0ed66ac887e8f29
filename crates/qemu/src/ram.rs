//! The RAM blocks of a QEMU process: their names and sizes, and where they lie in its address space.
//!
//! By QEMU's own word only: `info ramblock` (which tells addresses from QEMU 8 on), else the memory tree and
//! `gpa2hva`. Sizes and order say nothing: two blocks can be alike.

mod devices; // memory that devices have

use crate::qmp::{Qmp, QmpError};
use devices::MemoryDevice;
use serde_json::{Value, json};
use std::collections::BTreeMap;

pub use attach::RamBlock;

/// A line of `info ramblock`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    /// QEMU's name for the block.
    pub name: String,
    /// The size of the pages that it consists of.
    pub page_bytes: u64,
    /// Where it begins in QEMU's count of all RAM.
    pub offset: u64,
    /// Bytes in use.
    pub used: u64,
    /// Bytes reserved: more than `used` for blocks that may grow.
    pub total: u64,
    /// Where it lies, where QEMU tells.
    pub hva: Option<u64>,
    /// Whether QEMU marks it as not writable by the guest; `None` where QEMU does not tell.
    pub read_only: Option<bool>,
}

impl Listed {
    /// The object id of the backend that it is named after, if it is.
    fn backend(&self) -> &str {
        devices::without_folder(&self.name)
    }
}

/// A memory backend, as `query-memdev` tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backend {
    /// Its object id.
    pub id: String,
    /// Its size in bytes.
    pub bytes: u64,
}

/// What the memory of a QEMU consists of.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Layout {
    /// The guest's main memory, that of memory devices too: its backends, in the order of their names.
    pub main: Vec<RamBlock>,
    /// Video memory, ROMs and tables, which QEMU keeps to itself.
    pub private: Vec<Listed>,
    /// A block of main memory as QEMU lists it, with its address.
    pub known: Option<Listed>,
}

/// Why the RAM blocks are not known, or not usable.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// QEMU did not say.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// QEMU does not say where the block lies.
    #[error("QEMU does not tell where RAM block {name} lies: {why}")]
    Nowhere {
        /// The block.
        name: String,
        /// What it said.
        why: String,
    },
}

/// Why the memory of a QEMU process cannot be reached, and which options of QEMU help.
#[derive(Debug, thiserror::Error)]
#[error("{}{}", .0, advice(.0))]
pub struct MemoryError(#[from] pub attach::Error);

/// What to do about it, where that is in QEMU's options.
fn advice(error: &attach::Error) -> &'static str {
    use attach::{Ability, Error};
    match error {
        Error::NotShared { .. } => {
            ": start the VM with -object memory-backend-memfd,share=on,… or memory-backend-file,share=on,… \
             as its memory"
        }
        Error::HugePages { .. } => ": let the agent use that tracker, or start the VM without huge pages",
        Error::HugeFile { .. } => ": let its mem-path be a directory or a new file, or say share=on",
        Error::OnDisk { .. } => {
            ": let the agent use that tracker, put its mem-path on a tmpfs such as /dev/shm, or use \
             memory-backend-memfd"
        }
        Error::Discards => ": leave it out, or let the agent use that tracker",
        Error::Kernel { ability: Ability::Private, .. } => {
            "; shared memory (-object memory-backend-memfd,share=on,…) does with 5.19"
        }
        Error::Kernel { ability: Ability::HugePages, .. } => "; start the VM without them",
        Error::Kernel { ability: Ability::Discards, .. } => "; leave it out",
        _ => "",
    }
}

/// Learns the memory layout of a running QEMU.
pub fn layout(qmp: &mut Qmp) -> Result<Layout, RamError> {
    let backends = backends(qmp)?;
    let blocks = listed(qmp)?;
    // One alone is what the machine begins with.
    let devices = if backends.len() < 2 { Vec::new() } else { devices::ask(qmp)? };
    let mut found = Layout::default();
    let mut tree = None;
    for block in &blocks {
        let Some((id, device)) = owner(block, &blocks, &backends, &devices) else {
            found.private.push(block.clone());
            continue;
        };
        let hva = match (block.hva, device) {
            (Some(hva), _) => hva,
            (None, Some(device)) => device.locate(qmp, block)?,
            (None, None) => locate(qmp, &mut tree, &block.name)?,
        };
        found.known.get_or_insert_with(|| Listed { hva: Some(hva), ..block.clone() });
        found.main.push(RamBlock { name: id.to_owned(), bytes: block.total, hva });
    }
    found.main.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// The backend whose memory this block is, and the device that has it, if it is one's.
fn owner<'a>(
    block: &Listed,
    blocks: &[Listed],
    backends: &'a [Backend],
    devices: &'a [MemoryDevice],
) -> Option<(&'a str, Option<&'a MemoryDevice>)> {
    if let Some(device) = devices::of(block, blocks, backends, devices) {
        return Some((&device.backend, Some(device)));
    }
    let backend = backends.iter().find(|backend| backend.id == block.backend())?;
    // Firmware can be called what a virtio-mem device's backend is.
    let elsewhere = devices.iter().any(|device| device.names_block_of(backend));
    (!elsewhere).then_some((&backend.id, None))
}

/// The memory backends, by `query-memdev`.
pub fn backends(qmp: &mut Qmp) -> Result<Vec<Backend>, QmpError> {
    let answer = qmp.execute("query-memdev", json!({}))?;
    let list = answer.as_array().ok_or_else(|| qmp.strange("query-memdev", &answer))?;
    let backend = |value: &serde_json::Value| {
        Some(Backend { id: value["id"].as_str()?.to_owned(), bytes: value["size"].as_u64()? })
    };
    Ok(list.iter().filter_map(backend).collect())
}

/// The blocks that `info ramblock` lists.
pub fn listed(qmp: &mut Qmp) -> Result<Vec<Listed>, QmpError> {
    let answer = qmp.execute("human-monitor-command", json!({ "command-line": "info ramblock" }))?;
    parse_listing(qmp, &answer)
}

/// Asks QEMU for all its blocks in half as many bytes, which QEMU has known since 6.2.
pub(crate) const LISTING: &str = "x-query-ramblock";

/// What either answers.
pub(crate) fn parse_listing(qmp: &Qmp, answer: &Value) -> Result<Vec<Listed>, QmpError> {
    let text = answer.as_str().or(answer["human-readable-text"].as_str()).unwrap_or_default();
    let blocks: Vec<_> = text.lines().filter_map(parse_listed).collect();
    if blocks.is_empty() { Err(qmp.strange("info ramblock", answer)) } else { Ok(blocks) }
}

/// `NAME  4 KiB  OFFSET USED TOTAL [HVA RO]`; the name may hold spaces, so it is read from the right.
fn parse_listed(line: &str) -> Option<Listed> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let unit = words.iter().rposition(|word| matches!(*word, "KiB" | "MiB" | "GiB" | "B"))?;
    let name = words.get(..unit.checked_sub(1)?)?.join(" ");
    let number = |at: usize| hex(words.get(unit + at)?);
    let size: u64 = words[unit - 1].parse().ok()?;
    let page_bytes =
        size << (10 * ["B", "KiB", "MiB", "GiB"].iter().position(|word| *word == words[unit])?);
    let read_only = words.get(unit + 5).map(|word| *word == "ro");
    (!name.is_empty()).then_some(Listed {
        name,
        page_bytes,
        offset: number(1)?,
        used: number(2)?,
        total: number(3)?,
        hva: number(4),
        read_only,
    })
}

/// Where a memory region lies in the guest's address space.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Mapped {
    /// Guest physical address of the piece.
    gpa: u64,
    /// The piece's place in its block.
    offset: u64,
}

/// Pieces of RAM and ROM by the name of their region, from `info mtree -f`.
pub(crate) type Tree = BTreeMap<String, Mapped>;

/// Reads the memory tree once; later calls use what `tree` holds.
fn locate(qmp: &mut Qmp, tree: &mut Option<Tree>, region: &str) -> Result<u64, RamError> {
    let tree = match tree {
        Some(tree) => tree,
        None => tree.insert(read_tree(qmp)?),
    };
    translate(qmp, tree, region)
}

/// The RAM and ROM that the guest's system memory shows just now.
pub(crate) fn read_tree(qmp: &mut Qmp) -> Result<Tree, QmpError> {
    Ok(parse_tree(&qmp.human("info mtree -f")?))
}

/// Where the block behind `region` begins in QEMU's address space.
pub(crate) fn translate(qmp: &mut Qmp, tree: &Tree, region: &str) -> Result<u64, RamError> {
    let mapped = tree.get(region).ok_or_else(|| nowhere(region, "the guest has it mapped nowhere"))?;
    translate_at(qmp, region, mapped)
}

/// The same, by one of its pieces.
fn translate_at(qmp: &mut Qmp, region: &str, mapped: &Mapped) -> Result<u64, RamError> {
    let said = qmp.human(&format!("gpa2hva {:#x}", mapped.gpa))?;
    // Host virtual address for 0x1000 (ram0) is 0x7f1990000000
    let name = said.split_once('(').and_then(|(_, rest)| rest.split_once(')')).map(|(name, _)| name);
    let address = said.split_whitespace().next_back().and_then(hex);
    match (name, address.and_then(|address| address.checked_sub(mapped.offset))) {
        (Some(name), Some(hva)) if name == region => Ok(hva),
        _ => Err(nowhere(region, said.trim())),
    }
}

fn nowhere(region: &str, why: &str) -> RamError {
    RamError::Nowhere { name: region.to_owned(), why: why.to_owned() }
}

/// Lines like `  0000000000100000-0000000003ffffff (prio 0, ram): ram0 @0000000000100000 KVM`, in views of
/// the system's memory. ROM counts too, as long as nothing shows the region as RAM: firmware can show RAM as
/// ROM.
fn parse_tree(text: &str) -> Tree {
    let (mut tree, mut roms) = (Tree::new(), Tree::new());
    let mut system = false;
    for line in text.lines() {
        if let Some(root) = line.trim().strip_prefix("Root memory region: ") {
            system = root == "system" || root == "memory";
        }
        let Some((range, rest)) = line.trim().split_once(" (prio ") else { continue };
        let Some((kind, region)) = rest.split_once("): ") else { continue };
        let place = match kind.rsplit_once(", ").map(|(_, kind)| kind) {
            // The second is RAM of a device's own: a TPM's.
            Some("ram" | "ramd") => &mut tree,
            Some("rom" | "romd") => &mut roms,
            _ => continue,
        };
        let gpa = range.split_once('-').and_then(|(start, _)| u64::from_str_radix(start, 16).ok());
        let Some(gpa) = gpa.filter(|_| system) else { continue };
        // The accelerator that has the region mapped, once for each address space that it is in.
        let region = region.trim_end_matches(" KVM").trim_end();
        let (name, offset) = match region.rsplit_once(" @") {
            Some((name, offset)) => (name, u64::from_str_radix(offset, 16).ok()),
            None => (region, Some(0)),
        };
        if let Some(offset) = offset {
            place.entry(name.to_owned()).or_insert(Mapped { gpa, offset });
        }
    }
    for (name, mapped) in roms {
        tree.entry(name).or_insert(mapped);
    }
    tree
}

fn hex(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_from_old_and_new_qemu() {
        let old =
            "    /rom@etc/acpi/tables    4 KiB  0x00000000040c0000 0x0000000000020000 0x0000000000200000";
        let new = "  0000:00:01.0/vga.vram    4 KiB  0x04080000 0x1000000 0x1000000 0x00007f8846c00000  rw";
        let got = parse_listed(old).unwrap();
        assert_eq!((got.name.as_str(), got.used, got.total), ("/rom@etc/acpi/tables", 0x2_0000, 0x20_0000));
        assert_eq!((got.hva, got.read_only), (None, None));
        let got = parse_listed(new).unwrap();
        assert_eq!((got.hva, got.read_only), (Some(0x7f88_46c0_0000), Some(false)));
        assert_eq!(parse_listed("              Block Name    PSize              Offset"), None);
    }

    /// Lines of `info mtree -f` as QEMU 7.2 and 10.0 print them.
    #[test]
    fn the_tree_tells_where_the_systems_ram_and_rom_is() {
        let under_kvm = "FlatView #1\n AS \"memory\", root: system\n AS \"cpu-memory-0\", root: system\n\
            \x20Root memory region: system\n\
            \x20 0000000000000000-00000000000effff (prio 0, ram): ram0 KVM KVM\n\
            \x20 00000000000f0000-00000000000fffff (prio 0, ram): pc.bios KVM KVM\n\
            \x20 0000000000100000-0000000003ffffff (prio 0, ram): ram0 @0000000000100000 KVM KVM\n\
            \x20 00000000feb00000-00000000feb01fff (prio 0, i/o): virtio-mmio\n\
            \x20 00000000ffff0000-00000000ffffffff (prio 0, ram): pc.bios KVM KVM\n\n";
        let emulated = "FlatView #0\n Root memory region: memory\n\
            \x20 00000000000c0000-00000000000cafff (prio 0, rom): ram0 @00000000000c0000\n\
            \x20 0000000000100000-0000000003ffffff (prio 0, ram): ram0 @0000000000100000\n\
            \x20 00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram\n\
            \x20 00000000ffc00000-00000000ffc83fff (prio 0, romd): system.flash1\n\
            \x20 00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios\n\
            FlatView #1\n Root memory region: bus\n  0000000000000000-0fff (prio 0, ram): other\n";
        let once = "FlatView #0\n Root memory region: system\n\
            \x20 0000000000100000-0000000003ffffff (prio 0, ram): a @b @0000000000100000 KVM\n";
        type Row<'a> = (&'a str, &'a [(&'a str, u64, u64)]);
        let rows: [Row<'_>; 3] = [
            (under_kvm, &[("pc.bios", 0xf_0000, 0), ("ram0", 0, 0)]),
            (
                emulated,
                &[
                    ("pc.bios", 0xfffc_0000, 0),
                    ("ram0", 0x10_0000, 0x10_0000),
                    ("system.flash1", 0xffc0_0000, 0),
                    ("vga.vram", 0xfd00_0000, 0),
                ],
            ),
            (once, &[("a @b", 0x10_0000, 0x10_0000)]),
        ];
        for (text, expected) in rows {
            let tree = parse_tree(text);
            let found: Vec<_> = tree.iter().map(|(name, at)| (name.as_str(), at.gpa, at.offset)).collect();
            assert_eq!(found, expected, "{text}");
        }
    }
}
