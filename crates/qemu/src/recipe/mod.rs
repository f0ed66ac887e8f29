//! What a host must know to start a QEMU that can take a VM over.
//!
//! One recipe serves both ends: `run` makes it from a VM file, `adopt` from a running QEMU, and the target of
//! a migration builds its own command line from it. It holds no path that a QEMU would write to except disks,
//! and no name that belongs to one host except bridges and shared files: TAPs, sockets, logs and memory files
//! are each host's own.

pub(crate) mod aliases;
mod allow;
mod argv;
mod backing;
pub(crate) mod chain;
mod chardev;
mod check;
mod export;
mod extensions;
/// Files that both hosts must see.
pub mod files;
pub(crate) mod flash;
/// The syntax of option values.
pub mod options;
mod read_only;
mod refused;
mod secrets;
mod settings;
mod tpm;

pub use allow::check_argument;
pub(crate) use allow::device_driver;
pub(crate) use allow::{is_id, is_nic_model, is_of_user_network, is_vcpu};
pub use argv::Paths;
pub(crate) use argv::{CONSOLE_ID, Place};
pub use backing::{backing_files, backing_of};
pub use chardev::{Chardev, ChardevKind};
pub use check::check;
pub(crate) use check::{NAME_RULE, is_interface, is_name, matches};
pub use export::{Export, Protocol};
pub(crate) use export::{is_driver as is_server_driver, is_old as is_old_server, is_server};
pub(crate) use refused::why as why_refused;
pub use secrets::DiskSecret;
pub(crate) use secrets::{Hidden, LONGEST as LONGEST_SECRET};
pub(crate) use settings::LIMITS;
pub use settings::Setting;
pub use tpm::{Tpm, TpmVersion};

use crate::{qmp::Version, sharing::Secret, tap::Port, virtio};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, path::PathBuf};

/// All that a target needs. From a peer it is hostile until [`check()`] found nothing wrong with it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The VM's name.
    pub name: String,
    /// The QEMU that runs it; the target's must not be older, unless that is allowed. Zeros before it was
    /// ever started.
    #[serde(default)]
    pub qemu: Version,
    /// The machine, by its versioned name, with its options: `pc-q35-7.2,smm=off`.
    pub machine: String,
    /// How the guest's instructions are executed: both ends do it the same way.
    pub accel: Accel,
    /// `-cpu`.
    pub cpu: String,
    /// `-smp`.
    pub smp: String,
    /// `-m`, when it says more than the memory blocks do (`slots`, `maxmem`).
    #[serde(default)]
    pub memory_options: Option<String>,
    /// The shared memory backends.
    pub memory: Vec<MemoryBlock>,
    /// Which backend is the machine's main memory; none when NUMA nodes name theirs.
    #[serde(default)]
    pub main_memory: Option<String>,
    /// Network cards' host side.
    #[serde(default)]
    pub nets: Vec<Net>,
    /// Where the first serial port goes on its host.
    #[serde(default)]
    pub console: Console,
    /// Disks, kernel, initrd: everything that both hosts must see.
    #[serde(default)]
    pub files: Vec<SeenFile>,
    /// Everything else in QEMU's own order, from the allow-list of [`check_argument`].
    pub arguments: Vec<Argument>,
    /// CPU features that the guest was shown; empty before it was ever started.
    #[serde(default)]
    pub cpu_features: Vec<FeatureWord>,
    /// What the guest has accepted of its virtio devices; read when a migration begins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub virtio: Vec<virtio::Features>,
    /// Whether the user allows a QEMU that is older than the one that runs the VM; never but on its way.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_older_qemu: bool,
    /// By what the source of a migration shows that it has these files; none but on its way. See
    /// [`crate::sharing`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<Secret>,
    /// What the source's KVM makes of a loop ([`crate::Kvm`]); none without KVM, and none but on its way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kvm_speed: Option<u64>,
    /// What monitors have set since it was started, and the command line does not say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub settings: Vec<Setting>,
    /// Whether QEMU adds the devices that a machine usually has (no `-nodefaults`): a card of its own for
    /// video and network, drives without media, ports.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub defaults: bool,
    /// Character devices besides the console.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chardevs: Vec<Chardev>,
    /// Disks that servers on the network have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exports: Vec<Export>,
    /// Secrets by which QEMU opens its disks. What they are stands here only on its way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<DiskSecret>,
    /// Who can look at the guest's screen.
    #[serde(default, skip_serializing_if = "Screen::is_none")]
    pub screen: Screen,
    /// Its TPM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<Tpm>,
}

/// Who can look at the guest's screen, and use its keyboard.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Screen {
    /// Nobody.
    #[default]
    None,
    /// VNC clients that can reach a socket in the host's runtime directory.
    Vnc,
}

impl Screen {
    fn is_none(&self) -> bool {
        *self == Self::None
    }
}

/// How the guest's instructions are executed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// By the CPU.
    Kvm,
    /// By translation.
    Tcg,
}

impl Accel {
    /// QEMU's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// One shared memory backend.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBlock {
    /// Its object id, the same on both hosts.
    pub id: String,
    /// Its size.
    pub bytes: u64,
    /// What backs it.
    pub backing: Backing,
}

/// What backs a block of guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// An anonymous file.
    #[default]
    Memfd,
    /// A file with a name, in a place of the host's choice.
    File,
}

/// A network card's host side: a TAP on a bridge.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// The netdev's id, which a `-device` refers to.
    pub id: String,
    /// The bridge, by the name that it has on every host.
    pub bridge: String,
    /// What the netdev itself was told.
    #[serde(default)]
    pub options: NetOptions,
    /// How its TAP is plugged in.
    #[serde(default)]
    pub port: Port,
}

/// What `-netdev tap` was told that goes with the VM.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetOptions {
    /// How many pairs of queues there are, where there is more than one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Whether QEMU and the TAP agree on offloads, where that was said: the guest was shown what follows from
    /// it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vnet_hdr: Option<bool>,
    /// How many bytes may wait in the TAP, where that was said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sndbuf: Option<u64>,
    /// Whether a worker of the kernel's carries its packets, on hosts that have proven that to be safe
    /// (`qemu::vhost`).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub vhost: bool,
}

/// Pairs of queues that a TAP may have (`MAX_TAP_QUEUES`).
pub(crate) const MOST_QUEUES: u16 = 256;

impl Net {
    /// A card on this bridge, plugged in as usual.
    pub fn new(id: impl Into<String>, bridge: impl Into<String>) -> Self {
        Self { id: id.into(), bridge: bridge.into(), ..Self::default() }
    }

    /// How many pairs of queues it has.
    pub fn queues(&self) -> u16 {
        self.options.queues.unwrap_or(1)
    }

    /// Its netdev on this TAP, of a host that gives networks workers or does not.
    fn netdev(&self, tap: &str, workers: bool) -> String {
        let Self { id, options, .. } = self;
        let vhost = if options.vhost && workers { "on" } else { "off" };
        let mut text = format!("tap,id={id},ifname={tap},script=no,downscript=no,vhost={vhost}");
        if let Some(queues) = options.queues {
            text.push_str(&format!(",queues={queues}"));
        }
        if let Some(vnet_hdr) = options.vnet_hdr {
            text.push_str(if vnet_hdr { ",vnet_hdr=on" } else { ",vnet_hdr=off" });
        }
        if let Some(sndbuf) = options.sndbuf {
            text.push_str(&format!(",sndbuf={sndbuf}"));
        }
        text
    }

    /// Everything that is wrong with it; empty when it may be used.
    fn check(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        if !allow::is_id(&self.id) {
            wrong.push(format!("network id {:?} is not usable", check::shown(&self.id)));
        }
        if !is_interface(&self.bridge) {
            wrong.push(format!("{:?} is no name of a bridge", check::shown(&self.bridge)));
        }
        if !(1..=MOST_QUEUES).contains(&self.queues()) {
            wrong.push(format!("a network card of {} queues is none of 1 to {MOST_QUEUES}", self.queues()));
        }
        wrong.extend(self.port.check());
        wrong
    }
}

/// Where the first serial port goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Console {
    /// A file in the host's runtime directory.
    #[default]
    File,
    /// A Unix socket there, and such a file.
    Socket,
    /// A pseudo-terminal, and such a file.
    Pty,
    /// There is none.
    None,
}

/// One option of QEMU's command line.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Argument {
    /// Such as `-device`.
    pub option: String,
    /// Its value; none for a flag such as `-nodefaults`.
    #[serde(default)]
    pub value: Option<String>,
}

impl Argument {
    /// An option with a value.
    pub fn new(option: &str, value: impl Into<String>) -> Self {
        Self { option: option.to_owned(), value: Some(value.into()) }
    }
}

/// What a file is to the VM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Written by the guest: must be the same file on both hosts.
    Disk,
    /// Named inside a disk's qcow2 image, and read where the disk was never written: must be the same file
    /// too.
    Backing,
    /// Only read: must have the same content.
    Boot,
}

impl Role {
    /// What a person is told that such a file is.
    pub fn word(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Backing => "backing file",
            Self::Boot => "boot file",
        }
    }
}

/// A file as its host saw it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SeenFile {
    /// Its path, the same on both hosts.
    pub path: PathBuf,
    /// What it is for.
    pub role: Role,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its file system on this host, as long as that is up; 0: not known. Never told to another host.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub device: u64,
    /// Its inode there.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub inode: u64,
    /// For what the guest only reads: a digest of its content, sealed for the host that it is sent to.
    #[serde(default)]
    pub digest: Option<String>,
}

impl SeenFile {
    /// Which file it was on this host, where that is known.
    pub fn identity(&self) -> Option<files::Identity> {
        let Self { device, inode, .. } = *self;
        (device != 0).then_some(files::Identity { device, inode })
    }
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// A size as QEMU reads it: a bare number counts bytes.
pub(crate) fn bytes_of(text: &str) -> Option<u64> {
    text.parse::<units::Bytes>().ok().map(|bytes| bytes.0)
}

/// One register of CPUID as the guest sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureWord {
    /// EAX that it is asked with.
    pub eax: u32,
    /// ECX that it is asked with, where it matters.
    #[serde(default)]
    pub ecx: Option<u32>,
    /// Which register answers.
    pub register: String,
    /// Its bits.
    pub bits: u32,
}

impl Recipe {
    /// A VM of nothing but this machine, without memory.
    pub fn of(machine: impl Into<String>) -> Self {
        Self {
            name: String::new(),
            qemu: Version::default(),
            machine: machine.into(),
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
            virtio: Vec::new(),
            allow_older_qemu: false,
            proof: None,
            kvm_speed: None,
            settings: Vec::new(),
            defaults: false,
            chardevs: Vec::new(),
            exports: Vec::new(),
            secrets: Vec::new(),
            screen: Screen::None,
            tpm: None,
        }
    }

    /// The guest's memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.iter().fold(0, |sum, block| sum.saturating_add(block.bytes))
    }

    /// All character devices, the console first.
    pub fn all_chardevs(&self) -> impl Iterator<Item = Chardev> {
        chardev::of_console(self.console).into_iter().chain(self.chardevs.iter().cloned())
    }

    /// The names of files that the VM only reads, whatever anybody says of them.
    pub fn only_read(&self) -> BTreeSet<String> {
        read_only::files(&self.machine, &self.arguments)
    }

    /// Whether a drive of it asks the kernel by io_uring.
    pub fn uses_io_uring(&self) -> bool {
        let is_it =
            |(key, value): &(String, String)| (key == "aio" || key.ends_with(".aio")) && value == "io_uring";
        let drives = self.arguments.iter().filter(|a| matches!(&*a.option, "-drive" | "-blockdev"));
        drives.filter_map(|a| a.value.as_deref()).any(|value| options::parse(value, "").iter().any(is_it))
    }

    /// The values of `-device`.
    fn devices(&self) -> impl Iterator<Item = &str> {
        let devices = self.arguments.iter().filter(|argument| argument.option == "-device");
        devices.filter_map(|device| device.value.as_deref())
    }

    /// Whether it has a device that throws memory away while the guest runs.
    pub fn throws_memory_away(&self) -> bool {
        self.what_throws_memory_away().is_some()
    }

    /// What that device is called: a balloon (or the report of free pages), or memory that is unplugged bit
    /// by bit.
    pub(crate) fn what_throws_memory_away(&self) -> Option<&'static str> {
        let has = |stem: &str| self.devices().any(|value| device_driver(value).starts_with(stem));
        let kinds = [("virtio-balloon", "a balloon"), ("virtio-mem", "virtio-mem")];
        kinds.into_iter().find_map(|(stem, name)| has(stem).then_some(name))
    }

    /// Whether this memory is a virtio-mem device's. QEMU up to 8.1 throws all of it away when it makes one,
    /// also where that waits for a migration.
    pub fn is_of_virtio_mem(&self, block: &str) -> bool {
        self.devices().any(|value| {
            device_driver(value).starts_with("virtio-mem")
                && options::get(&options::parse(value, "driver"), "memdev") == Some(block)
        })
    }

    /// How much memory its guest may use: of a virtio-mem device that is what was asked of it, however large
    /// it may become.
    pub fn used_bytes(&self, counts: impl Fn(&MemoryBlock) -> bool) -> u64 {
        let asked = |block: &MemoryBlock| {
            let of_block = |value: &str| {
                let parsed = options::parse(value, "driver");
                let is_it = device_driver(value).starts_with("virtio-mem")
                    && options::get(&parsed, "memdev") == Some(&block.id);
                is_it.then(|| options::get(&parsed, "requested-size").map_or(Some(0), bytes_of))?
            };
            self.devices().find_map(of_block).unwrap_or(block.bytes).min(block.bytes)
        };
        self.memory.iter().filter(|block| counts(block)).map(asked).fold(0, u64::saturating_add)
    }

    /// The machine's name without its options.
    pub fn machine_name(&self) -> &str {
        self.machine.split(',').next().unwrap_or_default()
    }

    /// How many vCPUs it has: those of `-smp`, and those that are devices.
    pub fn vcpus(&self) -> u32 {
        let devices = self.arguments.iter().filter(|argument| argument.option == "-device");
        let plugged = devices.filter_map(|argument| argument.value.as_deref());
        let plugged = plugged.filter(|value| is_vcpu(&device_driver(value))).count();
        self.first_vcpus().saturating_add(u32::try_from(plugged).unwrap_or(u32::MAX))
    }

    /// How many vCPUs the machine makes itself.
    pub(crate) fn first_vcpus(&self) -> u32 {
        let parsed = options::parse(&self.smp, "cpus");
        let number = |key: &str| options::get(&parsed, key).and_then(|text| text.parse::<u32>().ok());
        let levels = ["drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads"];
        number("cpus")
            .unwrap_or_else(|| levels.iter().filter_map(|level| number(level)).fold(1, u32::saturating_mul))
    }
}
