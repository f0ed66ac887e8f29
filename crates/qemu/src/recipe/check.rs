//! What may stand in a recipe. A peer's recipe is hostile until it passed: it must not make our QEMU read, write,
//! connect to or execute anything but the VM's own files.

use super::{Argument, Recipe, Role, SeenFile, options};

/// The most vCPUs, memory blocks, arguments and bytes of text that a recipe may have: each far above what QEMU itself
/// bears, each low enough that no recipe exhausts us.
const MOST_VCPUS: u32 = 1024;
const MOST_BLOCKS: usize = 64;
const MOST_ARGUMENTS: usize = 1024;
const LONGEST_VALUE: usize = 16 << 10;
/// Reasons that are told: each takes more memory than what it is about, and nobody reads more.
const MOST_REASONS: usize = 100;
const MOST_MEMORY: u64 = 64 << 40;
const LARGEST_NAME: usize = 63;

/// Devices that have no back end of their own on the host, besides disks, TAPs and character devices that the recipe
/// names. A trailing `*` stands for any ending.
const DEVICES: &[&str] = &[
    "virtio-blk-*",
    "virtio-net-*",
    "virtio-rng-*",
    "virtio-scsi-*",
    "virtio-serial-*",
    "virtio-keyboard-*",
    "virtio-mouse-*",
    "virtio-tablet-*",
    "virtserialport",
    "virtconsole",
    "scsi-hd",
    "scsi-cd",
    "ide-hd",
    "ide-cd",
    "ahci",
    "ich9-ahci",
    "nvme",
    "nvme-ns",
    "e1000",
    "e1000e",
    "rtl8139",
    "VGA",
    "bochs-display",
    "pcie-root-port",
    "pcie-pci-bridge",
    "pci-bridge",
    "i82801b11-bridge",
    "ioh3420",
    "x3130-upstream",
    "xio3130-downstream",
    "qemu-xhci",
    "nec-usb-xhci",
    "usb-tablet",
    "usb-kbd",
    "usb-mouse",
    "usb-ehci",
    "ich9-usb-ehci1",
    "ich9-usb-uhci1",
    "ich9-usb-uhci2",
    "ich9-usb-uhci3",
    "piix3-usb-uhci",
    "isa-serial",
    "isa-debug-exit",
    "pvpanic",
    "pvpanic-pci",
    "vmcoreinfo",
    "vmgenid",
    "i6300esb",
    "ib700",
    "pc-dimm",
    "intel-iommu",
    "hda-duplex",
    "hda-output",
    "intel-hda",
    "ich9-intel-hda",
];

/// Machine options that neither open anything nor change what memory is.
const MACHINE_OPTIONS: &[&str] = &[
    "usb",
    "vmport",
    "smm",
    "hpet",
    "kernel-irqchip",
    "dump-guest-core",
    "mem-merge",
    "pic",
    "pit",
    "rtc",
    "isa-serial",
    "acpi",
    "pcie",
    "auto-kernel-cmdline",
    "graphics",
    "sata",
    "smbus",
    "i8042",
    "default-bus-bypass-iommu",
    "x-option-roms",
    "ioapic2",
    "max-ram-below-4g",
    "nvdimm",
    "hmat",
    "fd-bootchk",
    "smbios-entry-point-type",
];

/// Everything that is wrong with a recipe; empty when it may be used.
pub fn check(recipe: &Recipe) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut must = |holds: bool, why: String| {
        if !holds && wrong.len() < MOST_REASONS {
            wrong.push(why);
        }
    };
    must(
        is_name(&recipe.name),
        format!("the VM's name {:?} is not usable: {NAME_RULE}", shown(&recipe.name)),
    );

    must(recipe.machine.len() < LONGEST_VALUE, "the machine's options are too long".to_owned());
    let machine = options::parse(&recipe.machine, "type");
    must(
        is_word(recipe.machine_name()),
        format!("machine {:?} is no machine's name", shown(recipe.machine_name())),
    );
    for (key, value) in machine.iter().skip(1) {
        let allowed = MACHINE_OPTIONS.contains(&key.as_str()) && is_plain(value);
        must(allowed, format!("machine option {}={} is not allowed", shown(key), shown(value)));
    }
    let vcpus = recipe.vcpus();
    must((1..=MOST_VCPUS).contains(&vcpus), format!("{vcpus} vCPUs are not between 1 and {MOST_VCPUS}"));
    for (what, text) in [("-smp", &recipe.smp), ("-cpu", &recipe.cpu)] {
        must(is_plain(text), format!("{what} {:?} has characters that are not allowed", shown(text)));
    }
    let memory_options = recipe.memory_options.as_deref().unwrap_or_default();
    must(
        is_plain(memory_options),
        format!("-m {:?} has characters that are not allowed", shown(memory_options)),
    );

    let count = recipe.memory.len();
    must(
        (1..=MOST_BLOCKS).contains(&count),
        format!("{count} memory blocks are not between 1 and {MOST_BLOCKS}"),
    );
    let page = units::PAGE_SIZE as u64;
    for block in recipe.memory.iter().take(MOST_BLOCKS) {
        must(is_id(&block.id), format!("memory block id {:?} is not usable", shown(&block.id)));
        let whole = block.bytes > 0 && block.bytes <= MOST_MEMORY && block.bytes.is_multiple_of(page);
        must(whole, format!("memory block {} cannot be {} bytes", shown(&block.id), block.bytes));
    }
    let main = recipe.main_memory.as_ref();
    must(
        main.is_none_or(|main| recipe.memory.iter().any(|block| block.id == *main)),
        format!("the main memory {:?} is not among the memory blocks", shown(main.map_or("", |main| main))),
    );
    let ids = recipe.memory.iter().map(|block| &block.id).chain(recipe.nets.iter().map(|net| &net.id));
    let unique: std::collections::BTreeSet<_> = ids.clone().collect();
    must(unique.len() == ids.count(), "two back ends have the same id".to_owned());

    must(recipe.nets.len() <= MOST_BLOCKS, format!("{} network cards are too many", recipe.nets.len()));
    for net in recipe.nets.iter().take(MOST_BLOCKS) {
        net.check().into_iter().for_each(|why| must(false, why));
    }
    must(recipe.files.len() <= MOST_ARGUMENTS, format!("{} files are too many", recipe.files.len()));
    for file in recipe.files.iter().take(MOST_ARGUMENTS) {
        let path = file.path.to_string_lossy();
        // It is shown as it is: no terminal may find an order in it.
        let plain = file.path.is_absolute() && path.len() < LONGEST_VALUE && !path.contains(char::is_control);
        // By its components, so that `//proc` is /proc; and whatever begins like /dev/fd: QEMU opens /dev/fdset in its own way.
        let parts: std::path::PathBuf = file.path.components().collect();
        let forbidden = ["/proc", "/sys"].iter().any(|dir| parts.starts_with(dir))
            || parts.to_string_lossy().starts_with("/dev/fd");
        let climbs = file.path.components().any(|part| part == std::path::Component::ParentDir);
        must(plain && !forbidden && !climbs, format!("file {:?} is no plain absolute path", shown(&path)));
    }
    must(recipe.cpu_features.len() <= MOST_ARGUMENTS, "too many CPU feature words".to_owned());
    for word in recipe.cpu_features.iter().take(MOST_ARGUMENTS) {
        must(is_word(&word.register), format!("{:?} is no CPU register", shown(&word.register)));
    }
    must(
        recipe.arguments.len() <= MOST_ARGUMENTS,
        format!("{} arguments are too many", recipe.arguments.len()),
    );
    if recipe.files.len() > MOST_ARGUMENTS {
        // Each argument is looked for among them.
        return wrong;
    }
    for argument in recipe.arguments.iter().take(MOST_ARGUMENTS) {
        if let Err(why) = check_argument(argument, &recipe.files)
            && wrong.len() < MOST_REASONS
        {
            wrong.push(why);
        }
    }
    wrong
}

/// What names may look like.
pub(crate) const NAME_RULE: &str =
    "1 to 63 letters, digits, '-', '_' or '.', beginning with a letter or digit";

/// Whether a VM may be called so: the name becomes part of file names and of QEMU's command line.
pub(crate) fn is_name(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=LARGEST_NAME).contains(&name.len())
        && name.bytes().all(inner)
        && name.as_bytes()[0].is_ascii_alphanumeric()
}

/// Whether one option of the command line may be passed on; says why not.
pub fn check_argument(argument: &Argument, files: &[SeenFile]) -> Result<(), String> {
    let option = argument.option.as_str();
    let refuse = |why: String| -> Result<(), String> {
        Err(format!("{} {}: {why}", shown(option), shown(argument.value.as_deref().unwrap_or(""))))
    };
    let Some(value) = argument.value.as_deref() else {
        let flags =
            ["-no-reboot", "-no-shutdown", "-no-hpet", "-no-acpi", "-usb", "-enable-fips", "-no-fd-bootchk"];
        return if flags.contains(&option) {
            Ok(())
        } else {
            refuse("this option is not allowed".to_owned())
        };
    };
    if value.len() > LONGEST_VALUE || value.contains('\0') {
        return refuse("its value is too long or has a NUL in it".to_owned());
    }
    if value.starts_with('{') {
        return refuse("options in JSON are not understood; write key=value".to_owned());
    }
    let file_of = |role: Role, path: &str| {
        files.iter().any(|file| file.role == role && file.path.to_str() == Some(path))
    };
    let parsed = options::parse(value, "");
    match option {
        "-uuid" | "-k" | "-rtc" | "-numa" if is_plain(value) => Ok(()),
        "-boot" if is_plain(value) && options::parse(value, "order").iter().all(|(key, _)| boots(key)) => {
            Ok(())
        }
        "-vga" if matches!(value, "none" | "std") => Ok(()),
        "-display" | "-monitor" | "-serial" | "-parallel" | "-nic" | "-net" if value == "none" => Ok(()),
        "-serial" if value == "null" => Ok(()),
        "-append" => Ok(()),
        "-kernel" | "-initrd" if file_of(Role::Boot, value) => Ok(()),
        "-kernel" | "-initrd" => refuse("the file is not among the recipe's boot files".to_owned()),
        "-smbios" => match parsed.iter().find(|(key, value)| opens(key, value)) {
            Some((key, value)) => refuse(format!("{}={} is not allowed", shown(key), shown(value))),
            None => Ok(()),
        },
        "-global" => global(value).or_else(refuse),
        "-overcommit" if is_plain(value) && parsed.iter().all(|(key, _)| key == "cpu-pm") => Ok(()),
        "-object" => object(value).or_else(refuse),
        "-chardev" => match options::get(&options::parse(value, "backend"), "backend") {
            Some("null" | "ringbuf") if is_plain(value) && parsed.iter().all(|(key, _)| speaks(key)) => {
                Ok(())
            }
            _ => refuse("only chardevs of the kinds null and ringbuf are allowed".to_owned()),
        },
        "-device" => device(value).or_else(refuse),
        "-blockdev" => blockdev(value, &file_of).or_else(refuse),
        "-drive" => drive(value, &file_of).or_else(refuse),
        _ => refuse("this option is not allowed".to_owned()),
    }
}

/// Properties of an object that open nothing.
const OBJECT_OPTIONS: &[&str] = &[
    "qom-type",
    "id",
    "poll-max-ns",
    "poll-grow",
    "poll-shrink",
    "aio-max-batch",
    "thread-pool-min",
    "thread-pool-max",
    "max-bytes",
    "period",
];

fn object(value: &str) -> Result<(), String> {
    let parsed = options::parse(value, "qom-type");
    let kind = options::get(&parsed, "qom-type").unwrap_or_default();
    if !matches!(kind, "iothread" | "rng-builtin" | "rng-random") {
        return Err("objects of this kind are not allowed".to_owned());
    }
    for (key, value) in &parsed {
        let allowed = match key.as_str() {
            "filename" => kind == "rng-random" && matches!(value.as_str(), "/dev/urandom" | "/dev/random"),
            key => OBJECT_OPTIONS.contains(&key) && is_plain(value),
        };
        if !allowed {
            return Err(format!("{}={} is not allowed", shown(key), shown(value)));
        }
    }
    Ok(())
}

/// Whether a pattern of an allow-list is meant: a trailing `*` stands for any ending.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(stem) => name.starts_with(stem),
        None => name == pattern,
    }
}

/// Which device a `-device` makes.
pub(crate) fn device_driver(value: &str) -> String {
    options::get(&options::parse(value, "driver"), "driver").unwrap_or_default().to_owned()
}

fn device(value: &str) -> Result<(), String> {
    let driver = device_driver(value);
    if !DEVICES.iter().any(|pattern| matches(pattern, &driver)) {
        return Err(format!("device {} is not allowed", shown(&driver)));
    }
    // All of them: QEMU finds the driver wherever it stands.
    for (key, value) in options::parse(value, "driver") {
        if opens(&key, &value) {
            return Err(format!("property {}={} is not allowed", shown(&key), shown(&value)));
        }
    }
    Ok(())
}

/// Whether a device's property makes QEMU open something, or cannot be one.
fn opens(property: &str, value: &str) -> bool {
    match property.rsplit('.').next().unwrap_or_default() {
        "romfile" => !value.is_empty(),
        "host" | "hostdev" | "path" | "file" | "filename" | "logfile" | "mem-path" | "script"
        | "downscript" | "fd" | "vhostfd" | "sysfsdev" => true,
        _ => !is_word_or_empty(property) || value.contains('\0'),
    }
}

/// `driver.property=value` only: the longer form would say the same in words that are not looked at here.
fn global(value: &str) -> Result<(), String> {
    let parts = value.split_once('=').and_then(|(name, value)| Some((name.split_once('.')?, value)));
    let Some(((driver, property), set)) = parts.filter(|_| is_plain(value)) else {
        return Err("only driver.property=value is allowed".to_owned());
    };
    // How it migrates is ours to say.
    if !is_word(driver) || driver == "migration" || opens(property, set) {
        return Err(format!("{}.{} is not allowed", shown(driver), shown(property)));
    }
    Ok(())
}

/// What `-boot` may say: nothing that names a file.
fn boots(key: &str) -> bool {
    matches!(key, "order" | "once" | "menu" | "strict" | "splash-time" | "reboot-timeout")
}

/// What `-chardev` may say: nothing that names a file. Its first word is the back end's.
fn speaks(key: &str) -> bool {
    matches!(key, "null" | "ringbuf" | "backend" | "id" | "size" | "mux")
}

/// `off` and its synonyms.
fn is_off(value: &str) -> bool {
    matches!(value, "off" | "no" | "false" | "n")
}

/// Properties of a block node that open nothing.
const BLOCK_OPTIONS: &[&str] = &[
    "driver",
    "node-name",
    "read-only",
    "auto-read-only",
    "locking",
    "discard",
    "detect-zeroes",
    "cache.no-flush",
    "lazy-refcounts",
    "cache-size",
    "l2-cache-size",
    "refcount-cache-size",
    "overlap-check",
    "size",
    "offset",
];

fn blockdev(value: &str, file_of: &dyn Fn(Role, &str) -> bool) -> Result<(), String> {
    let parsed = options::parse(value, "driver");
    let driver = options::get(&parsed, "driver").unwrap_or_default();
    if !matches!(driver, "file" | "raw" | "qcow2" | "null-co") {
        return Err(format!("block driver {} is not allowed", shown(driver)));
    }
    for (key, value) in &parsed {
        let inner = key.strip_prefix("file.").unwrap_or(key);
        let allowed = match inner {
            "filename" => file_of(Role::Disk, value),
            "driver" => matches!(value.as_str(), "file" | "raw" | "qcow2" | "null-co"),
            // Direct reads write guest memory behind the tracker's back.
            "cache.direct" => is_off(value),
            "aio" => value == "threads",
            "locking" => matches!(value.as_str(), "on" | "auto"),
            "file" => is_id(value),
            _ => BLOCK_OPTIONS.contains(&inner) && is_plain(value),
        };
        if !allowed {
            return Err(format!("{}={} is not allowed", shown(key), shown(value)));
        }
    }
    Ok(())
}

fn drive(value: &str, file_of: &dyn Fn(Role, &str) -> bool) -> Result<(), String> {
    let parsed = options::parse(value, "");
    for (key, value) in &parsed {
        let allowed = match key.as_str() {
            "file" => file_of(Role::Disk, value),
            "format" => matches!(value.as_str(), "raw" | "qcow2"),
            "if" => matches!(value.as_str(), "none" | "virtio" | "ide" | "scsi"),
            "media" => matches!(value.as_str(), "disk" | "cdrom"),
            "cache" => matches!(value.as_str(), "writeback" | "writethrough" | "unsafe"),
            "cache.direct" => is_off(value),
            "aio" => value == "threads",
            "file.locking" => matches!(value.as_str(), "on" | "auto"),
            "id" | "index" | "bus" | "unit" | "readonly" | "snapshot" | "discard" | "detect-zeroes"
            | "werror" | "rerror" | "cache.writeback" | "cache.no-flush" | "serial" | "copy-on-read"
            | "node-name" => is_plain(value),
            _ => false,
        };
        // A snapshot's own writes would stay behind in a temporary file.
        if !allowed || (key == "snapshot" && options::is_on(value)) {
            return Err(format!("{}={} is not allowed", shown(key), shown(value)));
        }
    }
    let named = |key: &str| options::get(&parsed, key).is_some();
    // Without a format QEMU guesses it from what the guest wrote there.
    if named("file") && !named("format") {
        return Err("it names no format (format=raw or format=qcow2)".to_owned());
    }
    Ok(())
}

/// Text that QEMU takes as it is: no quotes, no control characters, no path.
fn is_plain(text: &str) -> bool {
    text.len() < LONGEST_VALUE
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.,=+:@ ".contains(&byte))
}

fn is_word(text: &str) -> bool {
    (1..=LARGEST_NAME).contains(&text.len()) && is_word_or_empty(text)
}

fn is_word_or_empty(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// What QEMU accepts as an id, and what cannot be taken for another option.
pub(crate) fn is_id(text: &str) -> bool {
    is_word(text) && text.as_bytes()[0].is_ascii_alphabetic()
}

/// What the kernel accepts as an interface's name, and `ip` does not take for an option.
pub(crate) fn is_interface(text: &str) -> bool {
    is_word(text) && text.len() < 16 && text.as_bytes()[0].is_ascii_alphanumeric()
}

/// Foreign text for an error message: bounded, and without what a terminal would obey.
pub(crate) fn shown(text: &str) -> String {
    let clean = |character: char| if character.is_control() { '?' } else { character };
    text.chars().take(100).map(clean).collect()
}
