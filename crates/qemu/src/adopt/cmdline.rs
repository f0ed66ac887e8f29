//! What a QEMU was, by its command line.

use super::{
    chardevs::{Found, Ports, Was},
    dialect,
    names::Names,
    netdevs::{self, Networks, Tap},
    words::{self, Word},
};
use crate::recipe::{
    Argument, Backing, MemoryBlock, Recipe, Role, Screen, SeenFile, Tpm, TpmVersion, aliases, bytes_of,
    files, is_server,
    options::{self, get, is_on},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// What the command line says.
#[derive(Debug)]
pub(crate) struct Read {
    pub(super) recipe: Recipe,
    /// TAPs by their netdev's id; how they are plugged in is learned from the running system.
    pub(super) taps: BTreeMap<String, Tap>,
    /// The TAPs of all networks, as far as the running system has told of them.
    pub(super) all_taps: BTreeMap<String, Tap>,
    pub(super) reasons: Vec<String>,
    pub(super) notes: Vec<String>,
    /// Disks whose name leads to no file that can be used, and why: that matters unless the medium was
    /// changed since.
    pub(super) lost: Vec<(String, String)>,
    /// Devices that were given in JSON, which QEMU makes after all others: what they have no place of their
    /// own in, depends on that.
    pub(super) late: Vec<String>,
    /// Files as they were when the VM was read before: another one by the same name is none of its.
    pub(super) known: Vec<SeenFile>,
    /// What character devices were.
    pub(super) was: Vec<Was>,
    /// The ids of all character devices of the command line.
    pub(super) chardevs: BTreeSet<String>,
    /// Whether there are networks to which QEMU has given names of its own.
    pub(super) nameless: bool,
}

impl Read {
    /// What a recipe says: of a VM that was started by it.
    pub(super) fn of(recipe: Recipe) -> Self {
        let nic = |argument: &Argument| argument.option == "-net";
        Self {
            known: recipe.files.clone(),
            nameless: recipe.arguments.iter().any(nic),
            recipe,
            was: Vec::new(),
            chardevs: BTreeSet::new(),
            taps: BTreeMap::new(),
            all_taps: BTreeMap::new(),
            reasons: Vec::new(),
            notes: Vec::new(),
            lost: Vec::new(),
            late: Vec::new(),
        }
    }
}

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
    "-add-fd",
    "-id",
    "-iscsi",
    "-loadvm",
    "-perfmap",
    "-jitdump",
    "-realtime",
    "-preconfig",
    "-singlestep",
    "-one-insn-per-tb",
    "-seed",
    "-alt-grab",
    "-ctrl-grab",
    "-win2k-hack",
    "-xen-attach",
    "-enable-sync-profile",
    "-qtest",
    "-qtest-log",
    "-plugin",
];

/// Where QEMU's firmware is installed.
const FIRMWARE: &[&str] = &["/usr/share/qemu", "/usr/share/seabios", "/usr/local/share/qemu"];

/// Reads a command line. `names` says what the file names in it lead to.
pub(super) fn read(argv: &[String], names: &Names<'_>) -> Read {
    read_knowing(argv, names, &[])
}

fn read_knowing(argv: &[String], names: &Names<'_>, loaded: &[SeenFile]) -> Read {
    let mut reader = Reader { loaded, ..Reader::new(names) };
    let (words, wrong) = words::of(argv, names);
    reader.read.reasons.extend(wrong);
    let places = words.iter().filter(|word| word.option == "-L").filter_map(|word| word.value.clone());
    reader.installed = places.collect();
    for Word { option, value, json } in words {
        match value {
            None => reader.flag(&option),
            Some(value) => {
                if json && option == "-device" {
                    let parsed = options::parse(&value, "driver");
                    reader.read.late.extend(get(&parsed, "id").map(str::to_owned));
                }
                reader.option(&option, &value);
            }
        }
    }
    reader.finish()
}

/// Only the TAPs that a command line names, by their netdev's id.
pub(crate) fn taps(argv: &[String]) -> BTreeMap<String, Tap> {
    let (words, _) = words::of(argv, &Names::In(Path::new("/")));
    netdevs::of(&words).taps
}

/// Reads the command line of a VM that was read before. What cannot change while QEMU runs is as it was: what
/// it has loaded, too.
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
    /// Where it was told to look for firmware (`-L`).
    installed: Vec<String>,
    read: Read,
    flags: Vec<String>,
    ports: Ports,
    networks: Networks,
}

impl<'a> Reader<'a> {
    fn new(names: &'a Names<'a>) -> Self {
        let read = Read { known: Vec::new(), ..Read::of(Recipe::of("pc")) };
        let (ports, networks) = (Ports::default(), Networks::default());
        Self { names, loaded: &[], installed: Vec::new(), read, flags: Vec::new(), ports, networks }
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
            "-nographic" => self.machine("graphics=off"),
            "-s" => self.note("the debugger's port (-s) stays behind"),
            _ if HOST_ONLY.contains(&option) => {}
            _ => self.read.recipe.arguments.push(Argument { option: option.to_owned(), value: None }),
        }
    }

    fn option(&mut self, option: &str, value: &str) {
        if let Some(drive) = dialect::drive(option, value) {
            return self.option("-drive", &drive);
        }
        if self.ports.take(option, value) || self.networks.take(option, value) {
            return;
        }
        match option {
            "-machine" | "-M" => self.machine(value),
            "-cpu" => self.read.recipe.cpu = value.to_owned(),
            "-smp" => self.read.recipe.smp = value.to_owned(),
            "-m" if value.contains("maxmem") => self.read.recipe.memory_options = Some(value.to_owned()),
            "-m" => {}
            "-object" => self.object(value),
            // No first key is implied here: QEMU wants `file=` spelled out.
            "-drive" => self.disk(option, value, "", "file"),
            "-blockdev" => self.disk(option, value, "driver", "filename"),
            "-kernel" | "-initrd" => {
                let path = self.file(value, Role::Boot);
                self.pass(option, path);
            }
            "-bios" => {
                let path = self.firmware(value);
                self.pass(option, path);
            }
            "-device" => self.pass(option, aliases::resolve(value)),
            "-display" | "-vnc" | "-spice" => self.screen(option, value),
            "-fw_cfg" => self.shown_file(option, value, "name"),
            "-acpitable" | "-smbios" => self.shown_file(option, value, ""),
            "-boot" => self.without(option, value, "order", &["splash"]),
            "-icount" => self.without(option, value, "shift", &["rr", "rrfile", "rrsnapshot"]),
            "-audiodev" => self.audio(value),
            "-overcommit" => self.without(option, value, "", &["mem-lock"]),
            "-mem-path" => self.note("-mem-path does not apply on the target: its memory is a memfd"),
            "-gdb" => self.note("the debugger's port (-gdb) stays behind"),
            "-global" => match dialect::global(value) {
                migration if migration.starts_with("migration.") => {}
                plain => self.pass(option, plain),
            },
            _ if HOST_ONLY.contains(&option) => {}
            "-tpmdev" => self.tpm(value),
            _ => self.pass(option, value),
        }
    }

    /// A TPM that is a program beside QEMU is that on the target, too.
    fn tpm(&mut self, value: &str) {
        let parsed = options::parse(value, "type");
        let id = get(&parsed, "id").unwrap_or_default().to_owned();
        match get(&parsed, "type") {
            Some("emulator") => {
                self.ports.used_elsewhere(value);
                self.note(format!(
                    "TPM {id} is a swtpm of the target's own there; the one here is left as it is, and its \
                     state of no use any more"
                ));
                // Of which kind it is, the running one says.
                self.read.recipe.tpm = Some(Tpm { id, version: TpmVersion::V2 });
            }
            kind => {
                let kind = kind.unwrap_or("?");
                self.refuse(format!("TPM {id} ({kind}) is this host's; use a swtpm (-tpmdev emulator)"));
            }
        }
    }

    /// What it shows ends on its host; what is carried over is that somebody can look at all.
    fn screen(&mut self, option: &str, value: &str) {
        let kind = value.split([',', '=']).next().unwrap_or_default();
        match (option, kind) {
            (_, "none") => {}
            ("-vnc", _) | ("-display", "vnc") => self.read.recipe.screen = Screen::Vnc,
            ("-spice", _) | ("-display", "spice-app") => {
                self.read.recipe.screen = Screen::Vnc;
                self.note(format!(
                    "SPICE ({option} {value}) stays behind, and with it what goes over its channels: sound, \
                     USB, the clipboard; the target shows the screen by VNC"
                ));
            }
            _ => self.note(format!("the display ({option} {value}) stays behind; the target has none")),
        }
    }

    /// An option that shows the guest what is in a file.
    fn shown_file(&mut self, option: &str, value: &str, implied: &str) {
        let mut parsed = options::parse(value, implied);
        for (key, name) in &mut parsed {
            if options::names_files(option, key) {
                let files: Vec<_> =
                    options::files_of(option, name).map(|name| self.file(name, Role::Boot)).collect();
                *name = files.join(":");
            }
        }
        self.pass(option, options::join(&parsed, implied));
    }

    /// Passes an option on without keys that concern this host.
    fn without(&mut self, option: &str, value: &str, implied: &str, keys: &[&str]) {
        let (left, kept): (Vec<_>, Vec<_>) =
            options::parse(value, implied).into_iter().partition(|(key, _)| keys.contains(&key.as_str()));
        for (key, value) in left.iter().filter(|(_, value)| !options::is_off(value)) {
            self.note(format!("{option} {key}={value} stays behind: it is this host's"));
        }
        if !kept.is_empty() {
            self.pass(option, options::join(&kept, implied));
        }
    }

    /// Sound is heard where the VM is; a target has nobody who listens.
    fn audio(&mut self, value: &str) {
        let parsed = options::parse(value, "driver");
        if get(&parsed, "driver") != Some("none") {
            self.note(format!("sound ({value}) stays behind: on the target nobody hears it"));
        }
        let id = get(&parsed, "id").unwrap_or_default();
        self.pass("-audiodev", format!("none,id={id}"));
    }

    fn machine(&mut self, value: &str) {
        let parsed = options::parse(value, "type");
        let recipe = &mut self.read.recipe;
        let mut kept = Vec::new();
        for (key, value) in parsed {
            match key.as_str() {
                "memory-backend" => recipe.main_memory = Some(value),
                // What it names is refused.
                "accel" | "confidential-guest-support" | "memory-encryption" => {}
                _ => kept.push((key, value)),
            }
        }
        // Several -machine options are one to QEMU, and the last of each key counts.
        let mut all = options::parse(&recipe.machine, "type");
        for (key, value) in kept {
            match all.iter_mut().find(|(known, _)| *known == key) {
                Some((_, known)) => *known = value,
                None => all.push((key, value)),
            }
        }
        recipe.machine = options::join(&all, "type");
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
            "sev-guest" | "sev-snp-guest" | "tdx-guest" => {
                return self.refuse(format!(
                    "its memory is encrypted for this host's processor ({kind}), and QEMU does not migrate \
                     it; start the VM without confidential-guest-support"
                ));
            }
            // Those that disks use are carried over.
            "secret" => return,
            "tls-creds-x509" => return self.note(format!("object {kind} stays behind")),
            _ => return self.pass("-object", value),
        };
        let id = get(&parsed, "id").unwrap_or_default().to_owned();
        for key in
            ["host-nodes", "policy", "prealloc", "merge", "dump", "reserve", "pmem", "readonly", "offset"]
        {
            if let Some(value) = get(&parsed, key) {
                self.note(format!("memory {id}: {key}={value} does not apply on the target"));
            }
        }
        match get(&parsed, "size").and_then(bytes_of) {
            Some(bytes) => self.read.recipe.memory.push(MemoryBlock { id, bytes, backing }),
            None => self.refuse(format!("memory {id} has no size that is understood")),
        }
    }

    fn disk(&mut self, option: &str, value: &str, implied: &str, key: &str) {
        let mut parsed = options::parse(value, implied);
        // What it lies on its header names, too: whether that is the same is looked at.
        parsed.retain(|(name, _)| !name.starts_with("backing."));
        for (name, value) in &mut parsed {
            if (name == key || name == "file.filename") && !is_server(value) {
                *value = self.file(value, Role::Disk);
            }
        }
        self.pass(option, options::join(&parsed, implied));
    }

    /// Firmware by a bare name: QEMU looks where its own is, if it does not find that where it is.
    fn firmware(&mut self, name: &str) -> String {
        let here = self.names.file(Role::Boot, name).is_ok_and(|path| path.is_file());
        if here || name.contains('/') {
            return self.file(name, Role::Boot);
        }
        let folders = self.installed.iter().map(String::as_str).chain(FIRMWARE.iter().copied());
        let found = folders.map(|folder| Path::new(folder).join(name)).find(|path| path.is_file());
        let found = found.map(|path| path.to_string_lossy().into_owned());
        self.file(found.as_deref().unwrap_or(name), Role::Boot)
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
        let has = |flag: &str| self.flags.iter().any(|said| said == flag);
        self.read.recipe.defaults = !has("-nodefaults");
        let Networks { taps, arguments, notes, reasons, nameless, .. } = self.networks.finish();
        let read = &mut self.read;
        (read.taps, read.nameless) = (taps, nameless);
        read.recipe.arguments.extend(arguments);
        read.notes.extend(notes);
        read.reasons.extend(reasons);
        let Found { notes, reasons, was, known } = self.ports.finish(&mut read.recipe, has("-nographic"));
        read.notes.extend(notes);
        read.reasons.extend(reasons);
        (read.was, read.chardevs) = (was, known);
        self.read
    }
}

#[cfg(test)]
mod tests;
