//! The memory of devices: which RAM block is whose, and where the guest has it.
//!
//! QEMU names the block of a virtio-mem device after the device's place (`0000:00:03.0/m0`; below a bridge
//! `0000:00:01.0:00.0/m0`), that of a `pc-dimm` after its backend alone.

use super::{Listed, Mapped, RamError, translate_at};
use crate::{
    qmp::{Qmp, QmpError},
    ram::Backend,
};
use serde_json::{Value, json};

/// A device whose memory is a backend's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct MemoryDevice {
    /// The backend's object id.
    pub(super) backend: String,
    /// Where the guest has it.
    gpa: u64,
    /// It is a virtio-mem device.
    is_virtio_mem: bool,
}

/// All of them, as `query-memory-devices` tells.
pub(super) fn ask(qmp: &mut Qmp) -> Result<Vec<MemoryDevice>, QmpError> {
    let answer = match qmp.execute("query-memory-devices", json!({})) {
        Err(error) if error.is_unknown_command() => return Ok(Vec::new()),
        answer => answer?,
    };
    Ok(answer.as_array().into_iter().flatten().filter_map(read).collect())
}

fn read(one: &Value) -> Option<MemoryDevice> {
    let data = &one["data"];
    let is_virtio_mem = one["type"] == "virtio-mem";
    Some(MemoryDevice {
        backend: data["memdev"].as_str()?.strip_prefix("/objects/")?.to_owned(),
        gpa: data[if is_virtio_mem { "memaddr" } else { "addr" }].as_u64()?,
        is_virtio_mem,
    })
}

/// The device whose memory this block of `blocks` is. A name that fits several blocks is no answer: these
/// stay what QEMU keeps to itself, and both hosts see the same names.
pub(super) fn of<'a>(
    block: &Listed,
    blocks: &[Listed],
    backends: &[Backend],
    devices: &'a [MemoryDevice],
) -> Option<&'a MemoryDevice> {
    devices.iter().find(|device| {
        if !device.is_virtio_mem {
            return device.backend == block.backend();
        }
        let bytes = backends.iter().find(|backend| backend.id == device.backend).map(|backend| backend.bytes);
        let fits = |block: &Listed| {
            let region = region_of_device(&block.name);
            region.is_some_and(|region| without_folder(region) == device.backend)
                && Some(block.total) == bytes
        };
        fits(block) && blocks.iter().filter(|block| fits(block)).count() == 1
    })
}

/// What follows the place of a PCI device, if a name begins with one.
fn region_of_device(name: &str) -> Option<&str> {
    let (place, region) = name.split_once('/')?;
    let is_place = place.contains(':') && place.chars().all(|c| c.is_ascii_hexdigit() || ":.".contains(c));
    is_place.then_some(region)
}

/// An object by its id, without where QEMU keeps objects (as machines before version 4.0 have it).
pub(super) fn without_folder(region: &str) -> &str {
    region.strip_prefix("/objects/").unwrap_or(region)
}

impl MemoryDevice {
    /// Whether the block of this backend is named after the device's place.
    pub(super) fn names_block_of(&self, backend: &Backend) -> bool {
        self.is_virtio_mem && self.backend == backend.id
    }

    /// Where its memory, this block, begins in QEMU's address space. All of it is mapped in every QEMU that
    /// has to be asked.
    pub(super) fn locate(&self, qmp: &mut Qmp, block: &Listed) -> Result<u64, RamError> {
        let region = region_of_device(&block.name).filter(|_| self.is_virtio_mem).unwrap_or(&block.name);
        translate_at(qmp, region, &Mapped { gpa: self.gpa, offset: 0 })
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        qmp::Qmp,
        ram::{RamError, layout},
    };
    use serde_json::{Value, json};
    use std::{
        io::{BufRead, BufReader, Write},
        os::unix::net::UnixStream,
        path::Path,
        thread,
        time::Duration,
    };

    const MIB: u64 = 1 << 20;

    /// Backends: id and size in MiB. The first is the machine's main memory.
    type Backends = &'static [(&'static str, u64)];

    /// Memory devices: type, backend, where the guest has it.
    type Devices = &'static [(&'static str, &'static str, u64)];

    /// Blocks: name, size in MiB, where it lies.
    type Blocks = &'static [(&'static str, u64, u64)];

    /// What is found: the main blocks with where they lie, and the names of the private ones.
    type Found = (Vec<(String, u64)>, Vec<String>);

    /// A QEMU that has these, and tells where blocks lie in its list or only where it is asked.
    fn look(backends: Backends, devices: Devices, blocks: Blocks, lists: bool) -> Result<Found, RamError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut stream = theirs.try_clone().unwrap();
            let version = json!({ "qemu": { "major": 7, "minor": 2, "micro": 0 }, "package": "" });
            writeln!(stream, "{}", json!({ "QMP": { "version": version, "capabilities": [] } })).unwrap();
            for line in BufReader::new(theirs).lines().map_while(Result::ok) {
                let asked: Value = serde_json::from_str(&line).unwrap();
                let said = answer(&asked, backends, devices, blocks, lists);
                writeln!(stream, "{}", json!({ "return": said, "id": asked["id"] })).unwrap();
            }
        });
        let mut qmp = Qmp::greet(Path::new("/test"), ours, Duration::from_secs(5)).unwrap();
        let layout = layout(&mut qmp)?;
        let main = layout.main.into_iter().map(|block| (block.name, block.hva)).collect();
        Ok((main, layout.private.into_iter().map(|block| block.name).collect()))
    }

    /// The region's name, without the place in front.
    fn region(name: &str) -> &str {
        if name.starts_with("0000:") { name.split_once('/').unwrap().1 } else { name }
    }

    fn answer(asked: &Value, backends: Backends, devices: Devices, blocks: Blocks, lists: bool) -> Value {
        let block = |(n, (name, mib, hva)): (u64, &(&str, u64, u64))| {
            let end = if lists { format!("{hva:#018x}  rw") } else { String::new() };
            let size = format!("{:#018x}", mib * MIB);
            format!("{name:>24}    4 KiB  {:#018x} {size} {size} {end}\r\n", n << 32)
        };
        let device = |(kind, backend, gpa): &(&str, &str, u64)| {
            let at = if *kind == "virtio-mem" { "memaddr" } else { "addr" };
            json!({ "type": kind, "data": { "memdev": format!("/objects/{backend}"), at: gpa } })
        };
        match asked["execute"].as_str().unwrap() {
            "query-memdev" => {
                backends.iter().map(|(id, mib)| json!({ "id": id, "size": mib * MIB })).collect()
            }
            "query-memory-devices" => devices.iter().map(device).collect(),
            "human-monitor-command" => match asked["arguments"]["command-line"].as_str().unwrap() {
                "info ramblock" => (0..).zip(blocks).map(block).collect::<String>().into(),
                // The card's memory lies below what is plugged in.
                "info mtree -f" => {
                    let first = blocks.iter().find(|(name, ..)| name.ends_with("ram0")).unwrap().0;
                    json!(format!(
                        "FlatView #1\r\n Root memory region: system\r\n  0000000000000000-0000000003ffffff \
                         (prio 0, ram): {first}\r\n  00000000fd000000-00000000fdffffff (prio 1, ram): \
                         vga.vram\r\n  0000000200000000-0000000200ffffff (prio 0, ram): vga.vram\r\n"
                    ))
                }
                said => {
                    let at = u64::from_str_radix(&said["gpa2hva 0x".len()..], 16).unwrap();
                    let of_device = devices.iter().find(|(_, _, gpa)| *gpa == at).map(|(_, id, _)| *id);
                    let name = of_device.unwrap_or(if at == 0 { "ram0" } else { "vga.vram" });
                    // What is a device's comes last.
                    let called = |block: &str| block.rsplit('/').next() == Some(name);
                    let found = blocks.iter().rev().find(|(block, ..)| called(block)).unwrap();
                    let (name, hva) = (region(found.0), found.2);
                    json!(format!("Host virtual address for {at:#x} ({name}) is {hva:#x}\r\n"))
                }
            },
            _ => json!({}),
        }
    }

    #[test]
    fn i2_virtio_mem_is_main_memory_and_what_resembles_it_is_not() {
        const GPA: u64 = 0x2_0000_0000;
        type Row = (&'static str, Backends, Devices, Blocks, &'static [(&'static str, u64)]);
        let rows: [Row; 9] = [
            (
                "a device, and one below a bridge",
                &[("ram0", 64), ("m0", 16), ("m1", 16)],
                &[("virtio-mem", "m0", GPA), ("virtio-mem", "m1", 2 * GPA)],
                &[
                    ("0000:00:03.0/m0", 16, 3),
                    ("ram0", 64, 1),
                    ("0000:00:01.0:00.0/m1", 16, 4),
                    ("pc.bios", 1, 2),
                ],
                &[("m0", 3), ("m1", 4), ("ram0", 1)],
            ),
            (
                "an old machine, which says where objects are",
                &[("ram0", 64), ("m0", 16)],
                &[("virtio-mem", "m0", GPA)],
                &[("/objects/ram0", 64, 1), ("0000:00:03.0//objects/m0", 16, 3)],
                &[("m0", 3), ("ram0", 1)],
            ),
            (
                "a module beside it",
                &[("ram0", 64), ("d0", 16), ("m0", 16)],
                &[("virtio-mem", "m0", GPA), ("dimm", "d0", 2 * GPA)],
                &[("ram0", 64, 1), ("d0", 16, 2), ("0000:00:03.0/m0", 16, 3)],
                &[("d0", 2), ("m0", 3), ("ram0", 1)],
            ),
            (
                "a module that is called as a card's memory is",
                &[("ram0", 64), ("vga.vram", 16)],
                &[("dimm", "vga.vram", GPA)],
                &[("ram0", 64, 1), ("0000:00:02.0/vga.vram", 16, 2), ("vga.vram", 16, 3)],
                &[("ram0", 1), ("vga.vram", 3)],
            ),
            (
                "virtio-mem that is called as a card's memory of another size is",
                &[("ram0", 64), ("vga.vram", 32)],
                &[("virtio-mem", "vga.vram", GPA)],
                &[("ram0", 64, 1), ("0000:00:02.0/vga.vram", 16, 2), ("0000:00:03.0/vga.vram", 32, 3)],
                &[("ram0", 1), ("vga.vram", 3)],
            ),
            (
                "… and of the same",
                &[("ram0", 64), ("vga.vram", 16)],
                &[("virtio-mem", "vga.vram", GPA)],
                &[("ram0", 64, 1), ("0000:00:02.0/vga.vram", 16, 2), ("0000:00:03.0/vga.vram", 16, 3)],
                &[("ram0", 1)],
            ),
            (
                "… as firmware is",
                &[("ram0", 64), ("pc.bios", 2)],
                &[("virtio-mem", "pc.bios", GPA)],
                &[("ram0", 64, 1), ("pc.bios", 2, 2), ("0000:00:03.0/pc.bios", 2, 3)],
                &[("pc.bios", 3), ("ram0", 1)],
            ),
            (
                "… as a ROM is that a user named",
                &[("ram0", 64), ("m0", 2)],
                &[("virtio-mem", "m0", GPA)],
                &[("ram0", 64, 1), ("/rom@genroms/m0", 2, 2), ("0000:00:03.0/m0", 2, 3)],
                &[("m0", 3), ("ram0", 1)],
            ),
            (
                "a backend that no device has",
                &[("ram0", 64), ("vga.vram", 16)],
                &[],
                &[("ram0", 64, 1), ("0000:00:02.0/vga.vram", 16, 2)],
                &[("ram0", 1)],
            ),
        ];
        for (what, backends, devices, blocks, main) in rows {
            let main: Vec<_> = main.iter().map(|(name, hva)| ((*name).to_owned(), *hva)).collect();
            let rest = blocks.iter().filter(|(.., hva)| !main.iter().any(|(_, is)| is == hva));
            let rest: Vec<_> = rest.map(|(name, ..)| (*name).to_owned()).collect();
            for lists in [true, false] {
                let found = look(backends, devices, blocks, lists).unwrap();
                assert_eq!(found, (main.clone(), rest.clone()), "{what}, lists: {lists}");
            }
        }
    }
}
