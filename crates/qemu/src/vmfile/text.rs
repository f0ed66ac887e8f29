//! A VM file from its text: each mistake is told with its place, and what would be right.

use super::{Card, Disk, VmFile};
use crate::recipe::{self, Accel, Argument, Backing, MOST_QUEUES};
use serde::Deserialize;
use std::{
    ops::Range,
    path::{Path, PathBuf},
};
use toml::Spanned;
use units::Bytes;

/// The smallest and the largest guest that may be asked for: below, no kernel boots; above, it is a slip of
/// the pen.
const LEAST_MEMORY: u64 = 16 << 20;
const MOST_MEMORY: u64 = 16 << 40;

/// More vCPUs than QEMU's `q35` has without an IOMMU.
const MOST_VCPUS: u32 = 255;

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
    queues: Option<Spanned<i64>>,
    #[serde(default)]
    vhost: bool,
}

/// A mistake at a place of the text.
pub(super) type Mistake = (Range<usize>, String);

/// Reads it; relative paths begin at `base`.
pub(super) fn read(text: &str, base: Option<&Path>) -> Result<VmFile, Mistake> {
    let raw: Result<Raw, Mistake> = toml::from_str(text).map_err(|error: toml::de::Error| {
        (error.span().unwrap_or(0..0), error.message().trim().replace('\n', "; "))
    });
    raw.and_then(|raw| checked(raw, base))
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
        let queues = match &net.queues {
            None => None,
            Some(given) => match u16::try_from(*given.get_ref()) {
                Ok(1) => None,
                Ok(queues) if (2..=MOST_QUEUES).contains(&queues) => Some(queues),
                _ => return wrong(given, format!("queues must be between 1 and {MOST_QUEUES}")),
            },
        };
        nets.push(Card { bridge: net.bridge.get_ref().clone(), mac, queues, vhost: net.vhost });
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
    let hash = twox_hash::XxHash3_64::oneshot(format!("{name}/{card}").as_bytes());
    format!("52:54:00:{:02x}:{:02x}:{:02x}", hash as u8, (hash >> 8) as u8, (hash >> 16) as u8)
}
