//! A guest without an operating system that works its memory in every way a processor can write it, and
//! checks what it wrote before. It runs under KVM where Linux would take too long.

mod screen; // what it draws

use crate::{Doing, Host, Process, QEMU, Qmp, Result, ensure, wait_for};
use std::{
    fs,
    fs::OpenOptions,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// An interpreting KVM boots it in eight seconds.
const BOOT: Duration = Duration::from_secs(120);

/// How many vCPUs it uses.
pub const MOST_VCPUS: usize = 4;

/// Where its words begin, and how many each vCPU has (`guest.s`).
const WORDS: u64 = 0x6000;
const A_LINE: usize = 8;
/// Where it counts its starts.
const STARTS: u64 = 0x6200;
const WORKS: u64 = 0x62_6172_6521;

/// What of its disk it reads, again and again.
const CONTENT: u64 = 1 << 20;
const BLOCK: usize = 4096;
const BLOCKS: u64 = 64;

/// What its RAM is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ram {
    /// QEMU's own.
    Private,
    /// A shared memfd.
    Memfd,
    /// A shared memfd of huge pages, which must be there ([`crate::HugePages`]).
    Huge,
}

/// How to start one.
#[derive(Clone, Debug)]
pub struct Bare {
    /// `kvm` or `tcg`.
    pub accel: &'static str,
    /// Up to four.
    pub vcpus: usize,
    /// What its RAM is.
    pub ram: Ram,
    /// The machine.
    pub machine: &'static str,
}

/// The guest, asked through a monitor of whatever QEMU runs it.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    /// How many of its vCPUs work: at most [`MOST_VCPUS`].
    pub vcpus: usize,
}

/// What a vCPU says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Words {
    /// Passes through its memory.
    pub passes: u64,
    /// What it has found that it had not written.
    pub errors: u64,
    /// Where that was first, what should have been there, and what was.
    pub first: [u64; 3],
    /// Its kvmclock in ns; 0 without one.
    pub clock: u64,
    /// Blocks that it has read from its disk.
    pub blocks: u64,
}

/// Whether KVM can be opened here.
pub fn kvm_answers() -> bool {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

/// Makes the disk that it boots from.
pub fn make_disk(dir: &Path) -> Result<PathBuf> {
    let at = |name: &str| dir.join(name).display().to_string();
    fs::write(dir.join("guest.s"), include_str!("guest.s")).doing("write the guest")?;
    crate::run(Command::new("as").args(["--64", &at("guest.s"), "-o", &at("guest.o")]))?;
    let link = ["-m", "elf_x86_64", "-Ttext", "0x7c00", "--oformat", "binary"];
    crate::run(Command::new("ld").args(link).args([&at("guest.o"), "-o", &at("guest.bin")]))?;
    let mut disk = fs::read(dir.join("guest.bin")).doing("read the guest")?;
    disk.resize(CONTENT as usize, 0);
    for block in 0..BLOCKS {
        let word: u64 = 0xb10c << 48 | block;
        disk.extend(word.to_le_bytes().repeat(BLOCK / 8));
    }
    let path = dir.join("bare.img");
    fs::write(&path, disk).doing("make a disk")?;
    Ok(path)
}

impl Bare {
    /// Starts it on a host, and waits until all its vCPUs work. Gives the process and its QMP socket.
    pub fn start(&self, host: &Host, name: &str, disk: &Path) -> Result<(Process, PathBuf)> {
        let socket = host.dir.join(format!("{name}.sock"));
        let (ram, backend) = match self.ram {
            Ram::Private => ("-mem-prealloc", ""),
            Ram::Memfd => ("-object memory-backend-memfd,id=ram0,size=64M,share=on", ",memory-backend=ram0"),
            Ram::Huge => (
                "-object memory-backend-memfd,id=ram0,size=64M,share=on,hugetlb=on,hugetlbsize=2M",
                ",memory-backend=ram0",
            ),
        };
        let words = format!(
            "-name {name} -nodefaults -no-user-config -display none -accel {} -cpu qemu64 -smp {} -m 64M \
             {ram} -machine {}{backend} -drive file={},format=raw,if=none,id=d \
             -device virtio-blk-pci,drive=d,bootindex=0 -qmp unix:{},server=on,wait=off",
            self.accel,
            self.vcpus,
            self.machine,
            disk.display(),
            socket.display(),
        );
        let mut command = host.namespace.command(QEMU);
        command.args(words.split_whitespace());
        let mut process = host.spawn(name, &mut command)?;
        let mut qmp = wait_for("a monitor", BOOT, || {
            process.must_live()?;
            Ok(socket.exists().then(|| Qmp::connect(&socket).ok()).flatten())
        })?;
        self.guest().works(&mut qmp, 1)?;
        Ok((process, socket))
    }

    /// What runs in it.
    pub fn guest(&self) -> Guest {
        Guest { vcpus: self.vcpus }
    }
}

impl Guest {
    /// Waits until it has started so often, and all its vCPUs have made two passes since.
    pub fn works(&self, qmp: &mut Qmp, starts: u64) -> Result<()> {
        wait_for("a bare guest at work", BOOT, || {
            let [counted] = numbers(qmp, STARTS, 1)?[..] else { return Ok(None) };
            let words = self.words(qmp)?;
            let at_work = counted & 0xffff_ffff == starts && words.iter().flatten().all(|cpu| cpu.passes > 1);
            Ok((at_work && words.iter().all(Option::is_some)).then_some(()))
        })
    }

    /// Waits until each vCPU has made two passes more, and checks that none has seen an error.
    pub fn goes_on(&self, qmp: &mut Qmp) -> Result<()> {
        let before = self.words(qmp)?;
        wait_for("a bare guest to go on", BOOT, || {
            let now = self.words(qmp)?;
            for cpu in now.iter().flatten() {
                ensure!(cpu.errors == 0, "it found what it had not written: {cpu:x?}");
            }
            let further = |(was, is): (&Option<Words>, &Option<Words>)| match (was, is) {
                (Some(was), Some(is)) => {
                    is.passes >= was.passes + 2 && (was.blocks == 0 || is.blocks > was.blocks)
                }
                _ => false,
            };
            Ok(before.iter().zip(&now).all(further).then_some(()))
        })
    }

    /// Whether it has a screen. If so, that shows what the guest has drawn by now, pixel by pixel.
    pub fn shows_what_it_draws(&self, qmp: &mut Qmp) -> Result<bool> {
        screen::shows_what_is_drawn(qmp)
    }

    /// What its vCPUs say; none of one that does not work yet.
    pub fn words(&self, qmp: &mut Qmp) -> Result<Vec<Option<Words>>> {
        let all = numbers(qmp, WORDS, self.vcpus * A_LINE)?;
        let line = |line: &[u64]| match *line {
            [WORKS, passes, errors, a, b, c, clock, blocks] => {
                Some(Words { passes, errors, first: [a, b, c], clock, blocks })
            }
            _ => None,
        };
        Ok(all.chunks(A_LINE).map(line).collect())
    }
}

/// Words of the guest's memory.
fn numbers(qmp: &mut Qmp, at: u64, count: usize) -> Result<Vec<u64>> {
    let said = qmp.human(&format!("xp /{count}gx {at:#x}"))?;
    let words = said.lines().flat_map(|line| line.split_whitespace().skip(1));
    Ok(words.filter_map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()).collect())
}
