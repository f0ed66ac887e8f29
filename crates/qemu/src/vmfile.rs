//! The VM file: what `whimbrel run` starts.
//!
//! ```toml
//! name = "web1"
//! vcpus = 2
//! memory = "1GiB"
//! machine = "q35"                 # or "microvm"
//! accel = "auto"                  # kvm where it is usable, else tcg
//! cpu = "host"                    # QEMU's -cpu; by default host with KVM, qemu64 without
//! memory-backend = "memfd"        # or "file": a file in the host's memory directory
//! kernel = "/boot/vmlinuz"        # none: boots from the first disk (q35)
//! initrd = "/boot/initrd.img"
//! cmdline = "console=ttyS0"
//! vga = "none"                    # or "std"
//! console = true                  # the first serial port goes to a file
//! qemu = "/opt/qemu/bin/qemu-system-x86_64"
//! args = ["-rtc", "base=utc"]     # further options of QEMU, from an allow-list
//!
//! [[disk]]
//! path = "/shared/web1.img"       # the same path on every host
//! format = "raw"                  # or "qcow2"
//!
//! [[net]]
//! bridge = "br0"
//! mac = "52:54:00:12:34:56"
//! queues = 2                      # pairs of queues; by default one
//! vhost = true                    # the kernel carries its packets, where that is proven to be safe
//! ```

mod text; // from its text, each mistake with its place

use crate::{
    host::Host,
    recipe::{
        self, Accel, Argument, Backing, Console, MemoryBlock, Net, NetOptions, Recipe, Role, files,
        options::escape,
    },
};
use std::{
    fs, io,
    path::{Path, PathBuf},
};
use units::Bytes;

/// A VM file, read and found good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmFile {
    /// The VM's name.
    pub name: String,
    /// Its vCPUs.
    pub vcpus: u32,
    /// Its memory.
    pub memory: Bytes,
    /// `q35` or `microvm`, or a versioned name of one of them.
    pub machine: String,
    /// How it is executed; none means: as the host does best.
    pub accel: Option<Accel>,
    /// QEMU's `-cpu`, if it is not left to us.
    pub cpu: Option<String>,
    /// What backs its memory.
    pub backing: Backing,
    /// The kernel, for direct boot.
    pub kernel: Option<PathBuf>,
    /// The kernel's initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: Option<String>,
    /// Whether it has a VGA card.
    pub vga: bool,
    /// Whether its first serial port goes to a file.
    pub console: bool,
    /// The QEMU program, if it is not the host's.
    pub qemu: Option<PathBuf>,
    /// Further options of QEMU.
    pub arguments: Vec<Argument>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Its network cards.
    pub nets: Vec<Card>,
}

/// A disk of a VM file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its image, the same path on every host.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
}

/// A network card of a VM file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// The bridge it is plugged into.
    pub bridge: String,
    /// Its address.
    pub mac: String,
    /// How many pairs of queues it has, if more than one.
    pub queues: Option<u16>,
    /// Whether the kernel carries its packets, on hosts where that is proven to be safe.
    pub vhost: bool,
}

/// What is wrong with a VM file, and where.
#[derive(Debug, thiserror::Error)]
pub enum VmFileError {
    /// It cannot be read.
    #[error("cannot read the VM file {path}: {cause}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's word.
        #[source]
        cause: io::Error,
    },
    /// It says something that it must not.
    #[error("{path}:{line}:{column}: {why}", path = path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// The line, from 1 on.
        line: usize,
        /// The column, in characters from 1 on.
        column: usize,
        /// What is wrong, and what would be right.
        why: String,
    },
}

impl VmFile {
    /// Reads a VM file.
    pub fn read(path: &Path) -> Result<Self, VmFileError> {
        let text = fs::read_to_string(path)
            .map_err(|cause| VmFileError::Unreadable { path: path.to_owned(), cause })?;
        Self::parse(&text, path)
    }

    /// Understands the text of a VM file. `path` is where it came from, which messages name and where its
    /// relative paths begin.
    pub fn parse(text: &str, path: &Path) -> Result<Self, VmFileError> {
        let base = path.parent().filter(|base| base.is_absolute());
        text::read(text, base).map_err(|(at, why)| {
            // The parser's places are bytes, perhaps within a character.
            let end = (0..=at.start.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
            let before = &text[..end.unwrap_or(0)];
            let line_start = before.rfind('\n').map_or(0, |end| end + 1);
            VmFileError::Wrong {
                path: path.to_owned(),
                line: before.matches('\n').count() + 1,
                column: before[line_start..].chars().count() + 1,
                why,
            }
        })
    }

    /// The recipe by which `host` starts this VM; else every reason why it cannot.
    pub fn recipe(&self, host: &Host) -> Result<Recipe, Vec<String>> {
        let mut reasons = Vec::new();
        let mut seen = Vec::new();
        let disks = self.disks.iter().map(|disk| (&disk.path, Role::Disk));
        let boot = self.kernel.iter().chain(&self.initrd).map(|path| (path, Role::Boot));
        for (path, role) in disks.chain(boot) {
            match files::look(path, role) {
                Ok(file) => seen.push(file),
                Err(why) => reasons.push(why),
            }
        }
        for disk in self.disks.iter().filter(|disk| disk.format == "qcow2" && disk.path.exists()) {
            match recipe::backing_files(&disk.path) {
                Ok(files) => seen.extend(files),
                Err(why) => reasons.push(why),
            }
        }
        if self.accel == Some(Accel::Kvm) && !host.uses_kvm() {
            reasons.push(
                "accel = \"kvm\", but KVM is not usable on this host; `whimbrel doctor` says why".to_owned(),
            );
        }
        let accel = self.accel.unwrap_or(host.accel());
        let default_cpu = if accel == Accel::Kvm { "host" } else { "qemu64" };
        let mut machine = self.machine.clone();
        // SMM needs KVM's help, and nothing that we boot uses it.
        if machine.contains("q35") && !machine.contains("smm=") {
            machine.push_str(",smm=off");
        }
        let recipe = Recipe {
            name: self.name.clone(),
            accel,
            cpu: self.cpu.clone().unwrap_or_else(|| default_cpu.to_owned()),
            smp: self.vcpus.to_string(),
            memory: vec![MemoryBlock { id: "ram0".to_owned(), bytes: self.memory.0, backing: self.backing }],
            main_memory: Some("ram0".to_owned()),
            nets: (0..)
                .zip(&self.nets)
                .map(|(n, net)| Net {
                    options: NetOptions { queues: net.queues, vhost: net.vhost, ..Default::default() },
                    ..Net::new(format!("net{n}"), &net.bridge)
                })
                .collect(),
            console: if self.console { Console::File } else { Console::None },
            files: seen,
            arguments: self.devices(),
            ..Recipe::of(machine)
        };
        if reasons.is_empty() {
            reasons = recipe::check(&recipe);
        }
        if reasons.is_empty() { Ok(recipe) } else { Err(reasons) }
    }

    /// The options that make its devices, in the order on which their addresses depend.
    fn devices(&self) -> Vec<Argument> {
        let bus = if self.machine.contains("microvm") { "device" } else { "pci" };
        let mut arguments = Vec::new();
        let mut add = |option: &str, value: String| arguments.push(Argument::new(option, value));
        if let Some(kernel) = &self.kernel {
            add("-kernel", kernel.to_string_lossy().into_owned());
        }
        if let Some(initrd) = &self.initrd {
            add("-initrd", initrd.to_string_lossy().into_owned());
        }
        if let Some(cmdline) = &self.cmdline {
            add("-append", cmdline.clone());
        }
        if bus == "pci" {
            add("-vga", if self.vga { "std" } else { "none" }.to_owned());
        }
        for (n, disk) in self.disks.iter().enumerate() {
            let path = escape(&disk.path.to_string_lossy());
            // Buffered, by threads: a direct read would write guest memory behind the tracker's back. Locked:
            // the image has one writer, whatever goes wrong.
            add("-blockdev", format!("driver=file,node-name=file{n},filename={path},locking=on,aio=threads"));
            add("-blockdev", format!("driver={},node-name=disk{n},file=file{n}", disk.format));
            add("-device", format!("virtio-blk-{bus},id=blk{n},drive=disk{n}"));
        }
        for (n, net) in self.nets.iter().enumerate() {
            // No option ROM: it would be one more RAM block, for booting from the network only.
            let rom = if bus == "pci" { ",romfile=" } else { "" };
            // A vector for each queue, one for the configuration, one for the control queue.
            let queues = match net.queues {
                Some(pairs) if bus == "pci" => format!(",mq=on,vectors={}", 2 * pairs + 2),
                Some(_) => ",mq=on".to_owned(),
                None => String::new(),
            };
            add("-device", format!("virtio-net-{bus},id=nic{n},netdev=net{n},mac={}{queues}{rom}", net.mac));
        }
        arguments.extend(self.arguments.iter().cloned().map(|mut argument| {
            if argument.option == "-device" {
                argument.value = argument.value.map(|value| recipe::aliases::resolve(&value));
            }
            argument
        }));
        arguments
    }
}
