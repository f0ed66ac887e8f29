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
//! ```

use crate::{
    host::Host,
    recipe::{
        self, Accel, Argument, Backing, Console, MemoryBlock, Net, Recipe, Role, files, options::escape,
    },
};
use serde::Deserialize;
use std::{
    fs, io,
    ops::Range,
    path::{Path, PathBuf},
};
use toml::Spanned;
use units::Bytes;

/// The smallest and the largest guest that may be asked for: below, no kernel boots; above, it is a slip of the pen.
const LEAST_MEMORY: u64 = 16 << 20;
const MOST_MEMORY: u64 = 16 << 40;

/// More vCPUs than QEMU's `q35` has without an IOMMU.
const MOST_VCPUS: u32 = 255;

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

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Raw {
    name: Spanned<String>,
    vcpus: Option<Spanned<i64>>,
    memory: Spanned<String>,
    machine: Option<Spanned<String>>,
    accel: Option<Spanned<String>>,
    cpu: Option<Spanned<String>>,
    memory_backend: Option<Spanned<String>>,
    kernel: Option<Spanned<PathBuf>>,
    initrd: Option<Spanned<PathBuf>>,
    cmdline: Option<Spanned<String>>,
    vga: Option<Spanned<String>>,
    console: Option<bool>,
    qemu: Option<Spanned<PathBuf>>,
    #[serde(default)]
    args: Vec<Spanned<String>>,
    #[serde(default)]
    disk: Vec<RawDisk>,
    #[serde(default)]
    net: Vec<RawCard>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDisk {
    path: Spanned<PathBuf>,
    format: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCard {
    bridge: Spanned<String>,
    mac: Option<Spanned<String>>,
}

/// A mistake at a place of the text.
type Mistake = (Range<usize>, String);

impl VmFile {
    /// Reads a VM file.
    pub fn read(path: &Path) -> Result<Self, VmFileError> {
        let text = fs::read_to_string(path)
            .map_err(|cause| VmFileError::Unreadable { path: path.to_owned(), cause })?;
        Self::parse(&text, path)
    }

    /// Understands the text of a VM file. `path` is where it came from, which messages name and where its relative
    /// paths begin.
    pub fn parse(text: &str, path: &Path) -> Result<Self, VmFileError> {
        let base = path.parent().filter(|base| base.is_absolute());
        let raw: Result<Raw, Mistake> = toml::from_str(text).map_err(|error: toml::de::Error| {
            (error.span().unwrap_or(0..0), error.message().trim().replace('\n', "; "))
        });
        raw.and_then(|raw| checked(raw, base)).map_err(|(at, why)| {
            let before = &text[..at.start.min(text.len())];
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
        if self.accel == Some(Accel::Kvm) && !host.kvm {
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
            qemu: Default::default(),
            machine,
            accel,
            cpu: self.cpu.clone().unwrap_or_else(|| default_cpu.to_owned()),
            smp: self.vcpus.to_string(),
            memory_options: None,
            memory: vec![MemoryBlock { id: "ram0".to_owned(), bytes: self.memory.0, backing: self.backing }],
            main_memory: Some("ram0".to_owned()),
            nets: (0..)
                .zip(&self.nets)
                .map(|(n, net)| Net { id: format!("net{n}"), bridge: net.bridge.clone() })
                .collect(),
            console: if self.console { Console::File } else { Console::None },
            files: seen,
            arguments: self.devices(),
            cpu_features: Vec::new(),
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
            // Buffered, by threads: a direct read would write guest memory behind the tracker's back. Locked: the image
            // has one writer, whatever goes wrong.
            add("-blockdev", format!("driver=file,node-name=file{n},filename={path},locking=on,aio=threads"));
            add("-blockdev", format!("driver={},node-name=disk{n},file=file{n}", disk.format));
            add("-device", format!("virtio-blk-{bus},id=blk{n},drive=disk{n}"));
        }
        for (n, net) in self.nets.iter().enumerate() {
            // No option ROM: it would be one more RAM block, for booting from the network only.
            let rom = if bus == "pci" { ",romfile=" } else { "" };
            add("-device", format!("virtio-net-{bus},id=nic{n},netdev=net{n},mac={}{rom}", net.mac));
        }
        arguments.extend(self.arguments.iter().cloned());
        arguments
    }
}

fn checked(raw: Raw, base: Option<&Path>) -> Result<VmFile, Mistake> {
    let name = raw.name.get_ref().clone();
    if !recipe::is_name(&name) {
        return wrong(&raw.name, format!("the name {name:?} is not usable: {}", recipe::NAME_RULE));
    }
    let vcpus = match &raw.vcpus {
        None => 1,
        Some(given) => match u32::try_from(*given.get_ref()) {
            Ok(vcpus) if (1..=MOST_VCPUS).contains(&vcpus) => vcpus,
            _ => return wrong(given, format!("vcpus must be between 1 and {MOST_VCPUS}")),
        },
    };
    let page = units::PAGE_SIZE as u64;
    let memory = match raw.memory.get_ref().parse::<Bytes>() {
        Err(_) => {
            return wrong(
                &raw.memory,
                "memory is a number with a unit, such as \"512MiB\" or \"4GiB\"".to_owned(),
            );
        }
        Ok(memory) if !(LEAST_MEMORY..=MOST_MEMORY).contains(&memory.0) => {
            let (least, most) = (Bytes(LEAST_MEMORY), Bytes(MOST_MEMORY));
            return wrong(&raw.memory, format!("memory must be between {least} and {most}"));
        }
        Ok(memory) if !memory.0.is_multiple_of(page) => {
            return wrong(&raw.memory, format!("memory must be a multiple of {}", Bytes(page)));
        }
        Ok(memory) => memory,
    };
    let machine = one_of(
        &raw.machine,
        "machine",
        "q35",
        |text| text == "q35" || text == "microvm" || text.starts_with("pc-q35-"),
        "\"q35\", \"microvm\" or a versioned name such as \"pc-q35-7.2\"",
    )?;
    let accel = one_of(
        &raw.accel,
        "accel",
        "auto",
        |text| matches!(text, "auto" | "kvm" | "tcg"),
        "\"auto\", \"kvm\" or \"tcg\"",
    )?;
    let backing = one_of(
        &raw.memory_backend,
        "memory-backend",
        "memfd",
        |text| matches!(text, "memfd" | "file"),
        "\"memfd\" or \"file\"",
    )?;
    let vga = one_of(&raw.vga, "vga", "none", |text| matches!(text, "none" | "std"), "\"none\" or \"std\"")?;
    if let (Some(vga_given), true) = (&raw.vga, vga == "std" && machine == "microvm") {
        return wrong(vga_given, "microvm has no VGA card; use machine = \"q35\"".to_owned());
    }
    if let (Some(given), None, "microvm") = (&raw.machine, &raw.kernel, machine.as_str()) {
        // Its firmware knows no disks.
        return wrong(given, "microvm boots a kernel only; name one, or use machine = \"q35\"".to_owned());
    }
    let placed = |path: &Option<Spanned<PathBuf>>| path.as_ref().map(|path| absolute(path, base)).transpose();
    let (kernel, initrd, qemu) = (placed(&raw.kernel)?, placed(&raw.initrd)?, placed(&raw.qemu)?);
    if raw.kernel.is_none() {
        if let Some(initrd) = &raw.initrd {
            return wrong(initrd, "initrd needs a kernel".to_owned());
        }
        if let Some(cmdline) = &raw.cmdline {
            return wrong(cmdline, "cmdline needs a kernel".to_owned());
        }
    }
    let mut disks = Vec::new();
    for disk in &raw.disk {
        let path = absolute(&disk.path, base)?;
        if disks.iter().any(|other: &Disk| other.path == path) {
            return wrong(&disk.path, "this disk is there twice".to_owned());
        }
        if !matches!(disk.format.get_ref().as_str(), "raw" | "qcow2") {
            return wrong(&disk.format, "format must be \"raw\" or \"qcow2\"".to_owned());
        }
        disks.push(Disk { path, format: disk.format.get_ref().clone() });
    }
    let mut nets = Vec::new();
    for (n, net) in raw.net.iter().enumerate() {
        if !recipe::is_interface(net.bridge.get_ref()) {
            return wrong(
                &net.bridge,
                "bridge is the name of a network interface, at most 15 characters".to_owned(),
            );
        }
        let mac = match &net.mac {
            None => mac_of(&name, n),
            Some(mac) if is_mac(mac.get_ref()) => mac.get_ref().to_ascii_lowercase(),
            Some(mac) => {
                return wrong(
                    mac,
                    "mac must be six bytes such as \"52:54:00:12:34:56\", the first one even".to_owned(),
                );
            }
        };
        nets.push(Card { bridge: net.bridge.get_ref().clone(), mac });
    }
    let file = VmFile {
        accel: match accel.as_str() {
            "kvm" => Some(Accel::Kvm),
            "tcg" => Some(Accel::Tcg),
            _ => None,
        },
        name,
        vcpus,
        memory,
        machine,
        cpu: raw.cpu.map(Spanned::into_inner),
        backing: if backing == "file" { Backing::File } else { Backing::Memfd },
        kernel,
        initrd,
        cmdline: raw.cmdline.map(Spanned::into_inner),
        vga: vga == "std",
        console: raw.console.unwrap_or(true),
        qemu,
        arguments: extra(&raw.args)?,
        disks,
        nets,
    };
    Ok(file)
}

/// `["-rtc", "base=utc", "-no-reboot"]`: what begins with a dash is an option, what follows its value.
fn extra(args: &[Spanned<String>]) -> Result<Vec<Argument>, Mistake> {
    let mut arguments: Vec<(Argument, &Spanned<String>)> = Vec::new();
    for arg in args {
        let text = arg.get_ref();
        match arguments.last_mut() {
            _ if text.starts_with('-') => {
                arguments.push((Argument { option: text.clone(), value: None }, arg));
            }
            Some((argument, _)) if argument.value.is_none() => argument.value = Some(text.clone()),
            _ => return wrong(arg, format!("{text:?} belongs to no option; an option begins with '-'")),
        }
    }
    for (argument, place) in &arguments {
        recipe::check_argument(argument, &[]).or_else(|why| wrong(place, why))?;
    }
    Ok(arguments.into_iter().map(|(argument, _)| argument).collect())
}

fn wrong<T, V>(place: &Spanned<T>, why: String) -> Result<V, Mistake> {
    Err((place.span(), why))
}

fn one_of(
    given: &Option<Spanned<String>>,
    key: &str,
    default: &str,
    accepts: impl Fn(&str) -> bool,
    choices: &str,
) -> Result<String, Mistake> {
    match given {
        None => Ok(default.to_owned()),
        Some(text) if accepts(text.get_ref()) => Ok(text.get_ref().clone()),
        Some(text) => wrong(text, format!("{key} must be {choices}")),
    }
}

/// A relative path begins where the VM file is.
fn absolute(path: &Spanned<PathBuf>, base: Option<&Path>) -> Result<PathBuf, Mistake> {
    match (path.get_ref().is_absolute(), base) {
        (true, _) => Ok(path.get_ref().clone()),
        (false, Some(base)) => Ok(base.join(path.get_ref())),
        (false, None) => wrong(path, "this path must be absolute".to_owned()),
    }
}

/// Six bytes, of which the first is even: an odd one would be a multicast address.
fn is_mac(text: &str) -> bool {
    let bytes: Vec<&str> = text.split(':').collect();
    let byte = |text: &&str| text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    bytes.len() == 6
        && bytes.iter().all(byte)
        && u8::from_str_radix(bytes[0], 16).is_ok_and(|first| first.is_multiple_of(2))
}

/// An address of QEMU's own range that depends on the VM's name and the card's number only.
fn mac_of(name: &str, card: usize) -> String {
    let hash = files::digest_bytes(format!("{name}/{card}").as_bytes());
    format!("52:54:00:{:02x}:{:02x}:{:02x}", hash as u8, (hash >> 8) as u8, (hash >> 16) as u8)
}
