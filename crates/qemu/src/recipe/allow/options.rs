//! What the other options may say: each with its keys and the forms of their values.

use super::{
    forms::{
        Form::{self, *},
        is_word,
    },
    properties::{PLACE_OF_VCPU, Property},
};
use crate::recipe::{check::shown, options};

/// Machines whose parts are known. Others have back ends of their own: `xenfv`, `x-remote`.
const MACHINES: &[&str] = &["pc", "q35", "microvm"];

/// The same by version: `pc-q35-7.2`.
const VERSIONED: &[&str] = &["pc-q35-", "pc-i440fx-"];

const MACHINE: &[Property] = &[
    ("acpi", Auto),
    ("auto-kernel-cmdline", Switch),
    ("default-bus-bypass-iommu", Switch),
    ("dump-guest-core", Switch),
    ("fd-bootchk", Switch),
    ("graphics", Switch),
    ("hmat", Switch),
    ("hpet", Switch),
    ("i8042", Switch),
    ("ioapic2", Auto),
    ("isa-serial", Switch),
    ("kernel-irqchip", Word(&["on", "off", "split"])),
    ("max-ram-below-4g", Size),
    ("mem-merge", Switch),
    ("nvdimm", Switch),
    ("pcie", Auto),
    ("pcspk-audiodev", Id),
    ("pflash0", Id),
    ("pflash1", Id),
    ("pic", Auto),
    ("pit", Auto),
    ("rtc", Auto),
    ("sata", Switch),
    ("smbios-entry-point-type", Word(&["32", "64", "auto"])),
    ("smbus", Switch),
    ("smm", Auto),
    ("usb", Switch),
    ("vmport", Auto),
    ("x-option-roms", Switch),
];

/// `-machine`.
pub(in super::super) fn machine(value: &str) -> Result<(), String> {
    let parsed = options::parse(value, "type");
    let name = parsed.first().filter(|(key, _)| key == "type").map_or("", |(_, name)| name);
    // `pc-q35-9.2+pve1`: behind a plus stands whose QEMU it is.
    let (plain, whose) = name.split_once('+').unwrap_or((name, "ours"));
    let known =
        MACHINES.contains(&plain) || is_word(plain) && VERSIONED.iter().any(|stem| plain.starts_with(stem));
    let known = known && is_word(whose);
    if !known {
        return Err(format!(
            "machine {:?} is not allowed; use one of {} or a version of them",
            shown(name),
            MACHINES.join(", ")
        ));
    }
    fit("machine option", &parsed[1..], |key| find(&[MACHINE], key))
}

const SMP: &[&str] =
    &["cpus", "maxcpus", "drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads"];

/// `-smp`.
pub(in super::super) fn smp(value: &str) -> Result<(), String> {
    fit("-smp", &options::parse(value, "cpus"), |key| SMP.contains(&key).then_some(Number))
}

/// `-m`.
pub(in super::super) fn memory(value: &str) -> Result<(), String> {
    const MEMORY: &[Property] = &[("maxmem", Size), ("size", Size), ("slots", Number)];
    fit("-m", &options::parse(value, "size"), |key| find(&[MEMORY], key))
}

/// `-cpu`: a model and its features, which QEMU separates by commas without a way to escape one.
pub(in super::super) fn cpu(value: &str) -> Result<(), String> {
    let mut parts = value.split(',');
    let model = parts.next().unwrap_or_default();
    if !is_word(model) {
        return Err(format!("-cpu {:?} has no usable model", shown(value)));
    }
    for part in parts {
        let (name, set) = part.split_once('=').unwrap_or((part.trim_start_matches(['+', '-']), "on"));
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:+@() ".contains(&byte);
        if !is_word(name) || !Text.fits(set) || !set.bytes().all(plain) {
            return Err(format!(
                "-cpu feature {:?} is not allowed: it must be a word or word=value",
                shown(part)
            ));
        }
    }
    Ok(())
}

const BOOT: &[Property] = &[
    ("menu", Switch),
    ("once", Id),
    ("order", Id),
    ("reboot-timeout", Number),
    ("splash-time", Number),
    ("strict", Switch),
];

const RTC: &[Property] =
    &[("base", Moment), ("clock", Word(&["host", "rt", "vm"])), ("driftfix", Word(&["none", "slew"]))];

const NUMA_NODE: &[Property] =
    &[("cpus", Range), ("initiator", Number), ("mem", Size), ("memdev", Id), ("nodeid", Number)];
const NUMA_DISTANCE: &[Property] = &[("dst", Number), ("src", Number), ("val", Number)];
const NUMA_LATENCY: &[Property] = &[
    ("bandwidth", Size),
    (
        "data-type",
        Word(&[
            "access-latency",
            "read-latency",
            "write-latency",
            "access-bandwidth",
            "read-bandwidth",
            "write-bandwidth",
        ]),
    ),
    ("hierarchy", Word(&["memory", "first-level", "second-level", "third-level"])),
    ("initiator", Number),
    ("latency", Number),
    ("target", Number),
];
const NUMA_CACHE: &[Property] = &[
    ("associativity", Word(&["none", "direct", "complex"])),
    ("level", Number),
    ("line", Number),
    ("node-id", Number),
    ("policy", Word(&["none", "write-back", "write-through"])),
    ("size", Size),
];

/// What SMBIOS tells the guest, by the type of the table.
const SMBIOS: &[(&str, &[&str])] = &[
    ("0", &["vendor", "version", "date", "release", "uefi"]),
    ("1", &["manufacturer", "product", "version", "serial", "uuid", "sku", "family"]),
    ("2", &["manufacturer", "product", "version", "serial", "asset", "location"]),
    ("3", &["manufacturer", "version", "serial", "asset", "sku"]),
    (
        "4",
        &[
            "sock_pfx",
            "manufacturer",
            "version",
            "serial",
            "asset",
            "part",
            "max-speed",
            "current-speed",
            "processor-family",
            "processor-id",
        ],
    ),
    ("8", &["internal_reference", "external_reference", "connector_type", "port_type"]),
    // `path` would be a file whose text the guest is shown.
    ("11", &["value"]),
    ("17", &["loc_pfx", "bank", "manufacturer", "serial", "asset", "part", "speed"]),
    ("41", &["designation", "kind", "instance", "pcidev"]),
];

/// Keyboards that QEMU knows; another name would be looked for as a file.
const KEYBOARDS: &[&str] = &[
    "ar", "bepo", "cz", "da", "de", "de-ch", "en-gb", "en-us", "es", "et", "fi", "fo", "fr", "fr-be",
    "fr-ca", "fr-ch", "hr", "hu", "is", "it", "ja", "lt", "lv", "mk", "nl", "no", "pl", "pt", "pt-br", "ru",
    "sl", "sv", "th", "tr",
];

const IOTHREAD: &[Property] = &[
    ("aio-max-batch", Number),
    ("poll-grow", Number),
    ("poll-max-ns", Number),
    ("poll-shrink", Number),
    ("thread-pool-max", Number),
    ("thread-pool-min", Number),
];
const RANDOM: &[Property] = &[("filename", Word(&["/dev/urandom", "/dev/random"]))];

/// Cards that `-net nic` may make.
const NIC_MODELS: &[&str] = &[
    "virtio",
    "virtio-net-pci",
    "e1000",
    "e1000e",
    "rtl8139",
    "pcnet",
    "ne2k_pci",
    "vmxnet3",
    "i82551",
    "i82557b",
    "i82559er",
];

/// `-net nic`: a card that the machine makes itself.
const NIC: &[Property] = &[
    ("addr", Place),
    ("macaddr", Mac),
    ("model", Word(NIC_MODELS)),
    ("name", Id),
    ("netdev", Id),
    ("type", Word(&["nic"])),
    ("vectors", Number),
];

/// Whether `-net nic` may make a card of this model.
pub(crate) fn is_nic_model(model: &str) -> bool {
    NIC_MODELS.contains(&model)
}

/// What is done when something happens to the guest.
const ACTION: &[Property] = &[
    ("panic", Word(&["pause", "shutdown", "exit-failure", "none"])),
    ("reboot", Word(&["reset", "shutdown"])),
    ("shutdown", Word(&["poweroff", "pause"])),
    ("watchdog", Word(WATCHDOG_ACTIONS)),
];

const WATCHDOG_ACTIONS: &[&str] = &["reset", "shutdown", "poweroff", "pause", "debug", "none", "inject-nmi"];

/// The guest's time by its instructions. A recording (`rr`) would be a file.
const ICOUNT: &[Property] = &[("align", Switch), ("shift", Shift), ("sleep", Switch)];

/// QEMU's own network, as far as it is the guest's view of it. Ports of the host and files are not.
const USER_NETWORK: &[Property] = &[
    ("dhcpstart", Address),
    ("dns", Address),
    ("host", Address),
    ("hostname", Id),
    ("id", Id),
    ("ipv4", Switch),
    ("ipv6", Switch),
    ("ipv6-dns", Address),
    ("ipv6-host", Address),
    ("ipv6-prefix", Address),
    ("ipv6-prefixlen", Number),
    ("net", Address),
    ("restrict", Switch),
    ("type", Word(&["user"])),
];

/// Whether a network of the kind `user` is given this key on another host, too.
pub(crate) fn is_of_user_network(key: &str) -> bool {
    find(&[USER_NETWORK], key).is_some()
}

/// Options that show the guest the content of a file: it must be among the VM's boot files.
pub(super) fn with_file(option: &str, value: &str, is_ours: &dyn Fn(&str) -> bool) -> Result<(), String> {
    const FIRMWARE: &[Property] = &[("name", Text)];
    const TABLE: &[Property] = &[
        ("asl_compiler_id", Text),
        ("asl_compiler_rev", Number),
        ("oem_id", Text),
        ("oem_rev", Number),
        ("oem_table_id", Text),
        ("rev", Number),
        ("sig", Text),
    ];
    let (implied, own) = match option {
        "-fw_cfg" => ("name", FIRMWARE),
        "-acpitable" => ("", TABLE),
        _ => ("", [].as_slice()),
    };
    let (files, rest): (Vec<_>, Vec<_>) =
        options::parse(value, implied).into_iter().partition(|(key, _)| options::names_files(option, key));
    match files.as_slice() {
        [(key, paths)] if options::files_of(option, paths).all(is_ours) => {
            fit("", &rest, |key| find(&[own], key))
        }
        [(key, paths)] => Err(format!("{key}={} is not among the recipe's boot files", shown(paths))),
        _ => Err("it names several files".to_owned()),
    }
}

/// The options that name no file of the VM's. `None`: there is no such option, or it must not be used.
pub(super) fn check(option: &str, value: &str) -> Option<Result<(), String>> {
    let pairs = |implied: &str| options::parse(value, implied);
    let table = |implied: &str, table: &[Property]| fit("", &pairs(implied), |key| find(&[table], key));
    let one_of = |words: &'static [&str]| match words.contains(&value) {
        true => Ok(()),
        false => Err(format!("it must be {}", Word(words).wants())),
    };
    Some(match option {
        "-uuid" if value != "auto" && Uuid.fits(value) => Ok(()),
        "-uuid" => Err("it is no UUID".to_owned()),
        "-k" => one_of(KEYBOARDS),
        "-vga" => one_of(&["none", "std", "cirrus", "qxl", "virtio", "vmware"]),
        "-display" | "-monitor" | "-nic" => one_of(&["none"]),
        "-net" if value == "none" => Ok(()),
        "-net" => table("type", NIC),
        "-serial" | "-parallel" => match value.strip_prefix("chardev:") {
            Some(id) if Id.fits(id) => Ok(()),
            Some(_) => Err(format!("it must be {}", Id.wants())),
            None => one_of(&["none", "null"]),
        },
        "-usbdevice" => one_of(&["tablet", "mouse", "keyboard"]),
        "-action" => table("", ACTION),
        "-watchdog-action" => one_of(WATCHDOG_ACTIONS),
        "-icount" => table("shift", ICOUNT),
        "-fw_cfg" => table("name", &[("name", Text), ("string", Text)]),
        // Handed to the guest as it is.
        "-append" => Ok(()),
        "-rtc" => table("", RTC),
        "-boot" => table("order", BOOT),
        "-overcommit" => table("", &[("cpu-pm", Switch)]),
        "-numa" => numa(&pairs("type")),
        "-smbios" => smbios(&pairs("")),
        "-netdev" => table("type", USER_NETWORK),
        "-object" => object(&pairs("qom-type")),
        "-chardev" => chardev(&pairs("backend")),
        // Without one a sound device looks for the host's.
        "-audiodev" => table("driver", &[("driver", Word(&["none"])), ("id", Id)]),
        _ => return None,
    })
}

fn numa(parsed: &[(String, String)]) -> Result<(), String> {
    let own = match options::get(parsed, "type").unwrap_or_default() {
        "node" => NUMA_NODE,
        "dist" => NUMA_DISTANCE,
        "cpu" => PLACE_OF_VCPU,
        "hmat-lb" => NUMA_LATENCY,
        "hmat-cache" => NUMA_CACHE,
        other => return Err(format!("type {} is not known", shown(other))),
    };
    fit_repeated("", parsed, &["cpus"], |key| if key == "type" { Some(Id) } else { find(&[own], key) })
}

fn smbios(parsed: &[(String, String)]) -> Result<(), String> {
    let kind = options::get(parsed, "type").unwrap_or_default();
    let Some((_, fields)) = SMBIOS.iter().find(|(number, _)| *number == kind) else {
        return Err(match parsed.iter().find(|(key, _)| key != "type") {
            Some((key, value)) if kind.is_empty() => {
                format!("{}={} is not allowed", shown(key), shown(value))
            }
            _ => format!("table {:?} is not known", shown(kind)),
        });
    };
    fit_repeated("", parsed, &["value"], |key| match key {
        "type" => Some(Number),
        key => fields.contains(&key).then_some(Text),
    })
}

fn object(parsed: &[(String, String)]) -> Result<(), String> {
    let own = match options::get(parsed, "qom-type").unwrap_or_default() {
        "iothread" => IOTHREAD,
        "rng-random" => RANDOM,
        "rng-builtin" => &[],
        "throttle-group" => {
            return fit("", parsed, |key| match key {
                "qom-type" | "id" => Some(Id),
                key => super::block::group_limit(key),
            });
        }
        other => return Err(format!("objects of the kind {:?} are not allowed", shown(other))),
    };
    fit("", parsed, |key| match key {
        "qom-type" | "id" => Some(Id),
        key => find(&[own], key),
    })
}

fn chardev(parsed: &[(String, String)]) -> Result<(), String> {
    let own: &[Property] = match options::get(parsed, "backend").unwrap_or_default() {
        "null" => &[],
        "ringbuf" => &[("size", Size)],
        _ => return Err("only chardevs of the kinds null and ringbuf are allowed".to_owned()),
    };
    fit("", parsed, |key| match key {
        "backend" | "id" => Some(Id),
        "mux" => Some(Switch),
        key => find(&[own], key),
    })
}

fn find(groups: &[&[Property]], name: &str) -> Option<Form> {
    let mut all = groups.iter().flat_map(|group| group.iter());
    all.find(|(property, _)| *property == name).map(|(_, form)| *form)
}

/// Whether every key is known, stands there once, and its value has the form that it must have.
pub(super) fn fit(
    what: &str,
    parsed: &[(String, String)],
    form: impl Fn(&str) -> Option<Form>,
) -> Result<(), String> {
    fit_repeated(what, parsed, &[], form)
}

fn fit_repeated(
    what: &str,
    parsed: &[(String, String)],
    repeated: &[&str],
    form: impl Fn(&str) -> Option<Form>,
) -> Result<(), String> {
    let space = if what.is_empty() { "" } else { " " };
    for (n, (key, value)) in parsed.iter().enumerate() {
        let wrong =
            |why: String| Err(format!("{what}{space}{}={} is not allowed: {why}", shown(key), shown(value)));
        match form(key) {
            None => return wrong("it is not among what is known to open nothing; leave it out".to_owned()),
            Some(form) if !form.fits(value) => return wrong(format!("it must be {}", form.wants())),
            // Which of them counts is not the same for all options of QEMU.
            _ if !repeated.contains(&key.as_str()) && parsed[..n].iter().any(|(other, _)| other == key) => {
                return wrong("it is there twice".to_owned());
            }
            _ => {}
        }
    }
    Ok(())
}
