//! What a QEMU was, by its command line.

use super::{dialect, names::Names};
use crate::recipe::{
    Accel, Argument, Backing, Console, MemoryBlock, NetOptions, Recipe, Role, SeenFile, aliases, files,
    is_of_user_network,
    options::{self, get, is_on},
};
use std::{collections::BTreeMap, path::Path};
use units::Bytes;

/// What the command line says.
#[derive(Debug)]
pub(crate) struct Read {
    pub(super) recipe: Recipe,
    /// TAPs by their netdev's id; how they are plugged in is learned from the running system.
    pub(super) taps: BTreeMap<String, Tap>,
    pub(super) reasons: Vec<String>,
    pub(super) notes: Vec<String>,
    /// Disks whose name leads to no file that can be used, and why: that matters unless the medium was changed since.
    pub(super) lost: Vec<(String, String)>,
    /// Devices that were given in JSON, which QEMU makes after all others: what they have no place of their own in, depends on that.
    pub(super) late: Vec<String>,
    /// Files as they were when the VM was read before: another one by the same name is none of its.
    pub(super) known: Vec<SeenFile>,
}

/// A TAP as the command line names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Tap {
    pub(super) ifname: String,
    pub(super) options: NetOptions,
}

/// What `-netdev tap` may say besides what goes with the VM: it concerns how this host's TAP was made.
const TAP_OPTIONS: &[&str] =
    &["type", "id", "ifname", "script", "downscript", "br", "helper", "vhost", "vhostforce", "poll-us"];

impl Read {
    /// What a recipe says: of a VM that was started by it.
    pub(super) fn of(recipe: Recipe) -> Self {
        Self {
            known: recipe.files.clone(),
            recipe,
            taps: BTreeMap::new(),
            reasons: Vec::new(),
            notes: Vec::new(),
            lost: Vec::new(),
            late: Vec::new(),
        }
    }
}

/// Options without a value.
const FLAGS: &[&str] = &[
    "-nodefaults",
    "-no-user-config",
    "-nographic",
    "-daemonize",
    "-S",
    "-enable-kvm",
    "-no-reboot",
    "-no-shutdown",
    "-no-hpet",
    "-no-acpi",
    "-usb",
    "-full-screen",
    "-no-fd-bootchk",
    "-snapshot",
    "-mem-prealloc",
    "-no-quit",
    "-s",
    "-enable-sync-profile",
    "-only-migratable",
    "-xen-attach",
];

/// Options that concern the source host only: the target has its own, or needs none.
const HOST_ONLY: &[&str] = &[
    "-name",
    "-L",
    "-pidfile",
    "-D",
    "-d",
    "-msg",
    "-trace",
    "-runas",
    "-chroot",
    "-sandbox",
    "-run-with",
    "-incoming",
    "-qmp",
    "-qmp-pretty",
    "-mon",
    "-nodefaults",
    "-no-user-config",
    "-daemonize",
    "-S",
    "-only-migratable",
    "-full-screen",
    "-no-quit",
    "-enable-kvm",
    "-accel",
    "-async-teardown",
];

/// Reads a command line. `names` says what the file names in it lead to.
pub(super) fn read(argv: &[String], names: &Names<'_>) -> Read {
    read_knowing(argv, names, &[])
}

fn read_knowing(argv: &[String], names: &Names<'_>, loaded: &[SeenFile]) -> Read {
    let mut reader = Reader { loaded, ..Reader::new(names) };
    let mut rest = argv.iter().skip(1);
    while let Some(word) = rest.next() {
        // QEMU takes two dashes for one.
        let option = match word.strip_prefix("--") {
            Some(bare) => format!("-{bare}"),
            None => word.clone(),
        };
        if !option.starts_with('-') {
            reader.option("-hda", &option);
        } else if FLAGS.contains(&option.as_str()) {
            reader.flag(&option);
        } else {
            let Some(value) = rest.next() else {
                reader.refuse(format!("{option} has no value"));
                break;
            };
            reader.option(&option, value);
        }
    }
    reader.finish()
}

/// Only the TAPs that a command line names, by their netdev's id.
pub(crate) fn taps(argv: &[String]) -> BTreeMap<String, Tap> {
    let names = Names::In(Path::new("/"));
    let mut reader = Reader::new(&names);
    for words in argv.windows(2).filter(|words| matches!(words[0].as_str(), "-netdev" | "--netdev")) {
        reader.netdev(&words[1]);
    }
    reader.read.taps
}

/// Reads the command line of a VM that was read before. What cannot change while QEMU runs is as it was: what it has loaded, too.
pub(super) fn read_again(argv: &[String], names: &Names<'_>, known: &Recipe) -> Read {
    let loaded: Vec<SeenFile> = known.files.iter().filter(|file| file.role == Role::Boot).cloned().collect();
    let mut read = read_knowing(argv, names, &loaded);
    read.known.clone_from(&known.files);
    let recipe = &mut read.recipe;
    recipe.name.clone_from(&known.name);
    recipe.machine.clone_from(&known.machine);
    recipe.cpu_features.clone_from(&known.cpu_features);
    (recipe.qemu, recipe.accel) = (known.qemu, known.accel);
    read
}

struct Reader<'a> {
    names: &'a Names<'a>,
    /// Files that QEMU has loaded, as they were then.
    loaded: &'a [SeenFile],
    read: Read,
    flags: Vec<String>,
    /// Character devices, by id: what becomes of one depends on who uses it.
    chardevs: Vec<(String, String, Argument)>,
    serial: Vec<String>,
    monitors: Vec<String>,
}

impl<'a> Reader<'a> {
    fn new(names: &'a Names<'a>) -> Self {
        let recipe = Recipe {
            name: String::new(),
            qemu: Default::default(),
            machine: "pc".to_owned(),
            accel: Accel::Tcg,
            cpu: "qemu64".to_owned(),
            smp: "1".to_owned(),
            memory_options: None,
            memory: Vec::new(),
            main_memory: None,
            nets: Vec::new(),
            console: Console::None,
            files: Vec::new(),
            arguments: Vec::new(),
            cpu_features: Vec::new(),
            proof: None,
            kvm_speed: None,
            settings: Vec::new(),
            defaults: false,
        };
        let read = Read {
            recipe,
            taps: BTreeMap::new(),
            reasons: Vec::new(),
            notes: Vec::new(),
            lost: Vec::new(),
            late: Vec::new(),
            known: Vec::new(),
        };
        Self {
            names,
            loaded: &[],
            read,
            flags: Vec::new(),
            chardevs: Vec::new(),
            serial: Vec::new(),
            monitors: Vec::new(),
        }
    }

    fn refuse(&mut self, why: impl Into<String>) {
        self.read.reasons.push(why.into());
    }

    fn note(&mut self, what: impl Into<String>) {
        self.read.notes.push(what.into());
    }

    fn pass(&mut self, option: &str, value: impl Into<String>) {
        self.read.recipe.arguments.push(Argument::new(option, value));
    }

    fn flag(&mut self, option: &str) {
        self.flags.push(option.to_owned());
        match option {
            "-snapshot" => {
                self.refuse("-snapshot keeps what the guest writes in a file of this host; leave it out")
            }
            "-mem-prealloc" => {
                self.note("-mem-prealloc does not apply on the target: pages come as they are needed")
            }
            "-nographic" => {
                self.serial.push("stdio".to_owned());
                self.machine("graphics=off");
            }
            "-s" => self.note("the debugger's port (-s) stays behind"),
            _ if HOST_ONLY.contains(&option) => {}
            _ => self.read.recipe.arguments.push(Argument { option: option.to_owned(), value: None }),
        }
    }

    fn option(&mut self, option: &str, value: &str) {
        match dialect::from_json(option, value) {
            Some(Ok(pairs)) => {
                if option == "-device" {
                    let parsed = options::parse(&pairs, "driver");
                    self.read.late.extend(get(&parsed, "id").map(str::to_owned));
                }
                return self.option(option, &pairs);
            }
            Some(Err(why)) => return self.refuse(why),
            None => {}
        }
        if let Some(drive) = dialect::drive(option, value) {
            return self.option("-drive", &drive);
        }
        match option {
            "-machine" | "-M" => self.machine(value),
            "-cpu" => self.read.recipe.cpu = value.to_owned(),
            "-smp" => self.read.recipe.smp = value.to_owned(),
            "-m" if value.contains("maxmem") => self.read.recipe.memory_options = Some(value.to_owned()),
            "-m" => {}
            "-object" => self.object(value),
            "-netdev" => self.netdev(value),
            "-chardev" => {
                let parsed = options::parse(value, "backend");
                let field = |key: &str| get(&parsed, key).unwrap_or_default().to_owned();
                self.chardevs.push((field("id"), field("backend"), Argument::new(option, value)));
            }
            "-serial" => self.serial.push(value.to_owned()),
            "-mon" | "-monitor" | "-qmp" | "-qmp-pretty" => {
                let parsed = options::parse(value, "chardev");
                let used = get(&parsed, "chardev").unwrap_or_default();
                self.monitors.push(used.strip_prefix("chardev:").unwrap_or(used).to_owned());
            }
            // No first key is implied here: QEMU wants `file=` spelled out.
            "-drive" => self.disk(option, value, "", "file"),
            "-blockdev" => self.disk(option, value, "driver", "filename"),
            "-kernel" | "-initrd" => {
                let path = self.file(value, Role::Boot);
                self.pass(option, path);
            }
            "-device" => self.pass(option, aliases::resolve(value)),
            "-display" | "-vnc" | "-spice" if value != "none" => {
                self.note(format!("the display ({option} {value}) stays behind; the target has none"));
            }
            "-display" => {}
            "-add-fd" => {
                self.refuse("-add-fd: the target cannot be given this descriptor; name a file instead")
            }
            "-overcommit" | "-realtime" if value.contains("mem-lock=on") || value.contains("mlock=on") => {
                self.refuse(
                    "locked memory (mem-lock=on) would make every page of the target present; leave it out",
                );
            }
            "-mem-path" => self.note("-mem-path does not apply on the target: its memory is a memfd"),
            "-gdb" => self.note("the debugger's port (-gdb) stays behind"),
            "-global" if value.starts_with("migration.") => {}
            _ if HOST_ONLY.contains(&option) => {}
            _ => self.pass(option, value),
        }
    }

    fn machine(&mut self, value: &str) {
        let parsed = options::parse(value, "type");
        let recipe = &mut self.read.recipe;
        let mut kept = Vec::new();
        for (key, value) in parsed {
            match key.as_str() {
                "memory-backend" => recipe.main_memory = Some(value),
                "accel" => {}
                _ => kept.push((key, value)),
            }
        }
        // Several -machine options are one to QEMU; only the name of the last counts.
        if kept.first().is_some_and(|(key, _)| key == "type") {
            recipe.machine = options::join(&kept, "type");
        } else if !kept.is_empty() {
            recipe.machine = format!("{},{}", recipe.machine, options::join(&kept, "type"));
        }
    }

    fn object(&mut self, value: &str) {
        let parsed = options::parse(value, "qom-type");
        let kind = get(&parsed, "qom-type").unwrap_or_default();
        let backing = match kind {
            "memory-backend-memfd" => Backing::Memfd,
            // The same to a guest: memory that no file has a name for.
            "memory-backend-ram" => Backing::Memfd,
            "memory-backend-file" if get(&parsed, "share").is_some_and(is_on) => Backing::File,
            "memory-backend-file" => Backing::Memfd,
            _ if kind.starts_with("memory-backend-") => {
                return self
                    .refuse(format!("memory of kind {kind} cannot follow the VM; use memory-backend-memfd"));
            }
            "secret" | "tls-creds-x509" => return self.note(format!("object {kind} stays behind")),
            _ => return self.pass("-object", value),
        };
        let id = get(&parsed, "id").unwrap_or_default().to_owned();
        if get(&parsed, "hugetlb").is_some_and(is_on) {
            self.refuse(format!(
                "memory {id} consists of huge pages (hugetlb=on), which are not supported; leave it out"
            ));
        }
        for key in
            ["host-nodes", "policy", "prealloc", "merge", "dump", "reserve", "pmem", "readonly", "offset"]
        {
            if let Some(value) = get(&parsed, key) {
                self.note(format!("memory {id}: {key}={value} does not apply on the target"));
            }
        }
        match get(&parsed, "size").and_then(size) {
            Some(bytes) => self.read.recipe.memory.push(MemoryBlock { id, bytes, backing }),
            None => self.refuse(format!("memory {id} has no size that is understood")),
        }
    }

    fn netdev(&mut self, value: &str) {
        let parsed = options::parse(value, "type");
        let id = get(&parsed, "id").unwrap_or_default().to_owned();
        let kind = get(&parsed, "type").unwrap_or_default();
        if kind == "user" {
            return self.user_network(&id, parsed);
        }
        if kind != "tap" {
            let why = match kind {
                "vhost-user" | "vhost-vdpa" => "another process writes the guest's memory unseen",
                _ => "only TAPs on a bridge can follow the VM",
            };
            return self
                .refuse(format!("network {id} is of kind {kind}: {why}; use -netdev tap on a bridge"));
        }
        if ["fd", "fds", "vhostfd", "vhostfds"].iter().any(|key| get(&parsed, key).is_some()) {
            return self.refuse(format!("network {id} was given as a descriptor; name its TAP with ifname="));
        }
        if get(&parsed, "vhost").is_some_and(is_on) || get(&parsed, "vhostforce").is_some_and(is_on) {
            self.refuse(format!(
                "network {id} has vhost=on: the kernel writes the guest's memory; use vhost=off"
            ));
        }
        let Some(ifname) = get(&parsed, "ifname").map(str::to_owned) else {
            return self.refuse(format!("network {id} does not name its TAP; use ifname="));
        };
        let mut options = NetOptions::default();
        for (key, value) in &parsed {
            let understood = match key.as_str() {
                "queues" => value.parse().map(|queues| options.queues = Some(queues)).is_ok(),
                "vnet_hdr" => {
                    options.vnet_hdr = Some(is_on(value));
                    true
                }
                "sndbuf" => size(value).map(|bytes| options.sndbuf = Some(bytes)).is_some(),
                key => TAP_OPTIONS.contains(&key),
            };
            if !understood {
                self.refuse(format!(
                    "network {id} has {key}={value}, which is not carried over; leave it out"
                ));
            }
        }
        self.read.taps.insert(id, Tap { ifname, options });
    }

    /// QEMU's own network: it moves, what goes through it does not.
    fn user_network(&mut self, id: &str, parsed: Vec<(String, String)>) {
        self.note(format!("network {id} is QEMU's own (user): its connections end when the VM moves"));
        let (kept, left): (Vec<_>, Vec<_>) = parsed.into_iter().partition(|(key, _)| is_of_user_network(key));
        for (key, value) in left {
            self.note(format!(
                "network {id}: {key}={value} stays behind: it is a port or a file of this host"
            ));
        }
        self.pass("-netdev", options::join(&kept, "type"));
    }

    fn disk(&mut self, option: &str, value: &str, implied: &str, key: &str) {
        let mut parsed = options::parse(value, implied);
        for (name, value) in &mut parsed {
            if name == key || name == "file.filename" {
                *value = self.file(value, Role::Disk);
            }
        }
        self.pass(option, options::join(&parsed, implied));
    }

    /// Notes a file down; says what it is called here.
    fn file(&mut self, name: &str, role: Role) -> String {
        let found = self.names.file(role, name).and_then(|path| {
            let loaded = self.loaded.iter().find(|file| file.path == path && file.role == role);
            loaded.map_or_else(|| files::look(&path, role), |file| Ok(file.clone()))
        });
        match found {
            Ok(seen) => {
                let path = seen.path.to_string_lossy().into_owned();
                self.read.recipe.files.push(seen);
                path
            }
            Err(why) => {
                match role {
                    Role::Boot => self.refuse(why),
                    _ => self.read.lost.push((name.to_owned(), why)),
                }
                name.to_owned()
            }
        }
    }

    fn finish(mut self) -> Read {
        self.read.recipe.defaults = !self.flags.iter().any(|flag| flag == "-nodefaults");
        self.serial_ports();
        for (id, kind, argument) in std::mem::take(&mut self.chardevs) {
            if self.monitors.contains(&id) {
                continue;
            }
            let passed = argument.value.as_deref().is_some_and(|value| value.contains(",fd="));
            match kind.as_str() {
                _ if passed => self.refuse(format!("character device {id} was given as a descriptor; name a path")),
                "null" | "ringbuf" => self.read.recipe.arguments.insert(0, argument),
                _ => self.refuse(format!(
                    "character device {id} ({kind}) is used by a device and ends on this host; use one of kind null or \
                     ringbuf"
                )),
            }
        }
        self.read
    }

    fn serial_ports(&mut self) {
        let mut ports = std::mem::take(&mut self.serial);
        // A PC has one unless it is told to have none.
        if ports.is_empty() && self.read.recipe.defaults {
            ports.push("vc".to_owned());
        }
        let ports: Vec<_> = ports.into_iter().filter(|port| port != "none").collect();
        if ports.len() > 1 {
            self.refuse("it has more than one serial port; only the first can follow the VM");
        }
        let Some(port) = ports.first() else { return };
        if let Some(id) = port.strip_prefix("chardev:") {
            self.chardevs.retain(|(other, _, _)| other != id);
        }
        self.read.recipe.console = Console::File;
        self.note(format!("the serial port ({port}) goes to a file on the target"));
    }
}

/// A size as QEMU reads it: a bare number counts bytes.
fn size(text: &str) -> Option<u64> {
    text.parse::<Bytes>().ok().map(|bytes| bytes.0)
}

#[cfg(test)]
mod tests;
