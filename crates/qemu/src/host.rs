//! The host that a VM is started on.

use crate::{limits::Limits, recipe::Accel};
use std::{
    collections::BTreeMap,
    env, fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

/// How KVM runs a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kvm {
    /// Turns of a small loop that a guest makes in a second.
    pub speed: u64,
    /// Whether that is worth using: without the hardware's help QEMU's own translation is faster.
    pub usable: bool,
}

/// Two measurements of one KVM differ by less than this factor.
const ALIKE: u64 = 2;

impl Kvm {
    /// Whether a guest that is run by one KVM, which makes `there` turns a second, is run no slower by this
    /// one.
    pub fn does_for(self, there: Option<u64>) -> bool {
        self.usable || there.is_some_and(|there| self.speed.saturating_mul(ALIKE) >= there)
    }
}

/// What a host gives to the VMs that are started on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Host {
    /// The QEMU program; none means `qemu-system-x86_64` from `PATH`.
    pub qemu: Option<PathBuf>,
    /// As whom QEMU runs, by name; none means the usual one (see [`crate::account`]).
    pub user: Option<String>,
    /// Where QMP sockets, consoles and QEMU's logs live. Made with mode 0700 when it is missing.
    pub runtime: PathBuf,
    /// Whose processes those are that are started: told apart from those of others who use the same
    /// directory.
    pub owner: PathBuf,
    /// Where memory files are made: a tmpfs, or a memory pool that other hosts reach.
    pub memory: PathBuf,
    /// Memory that exists already and is to be used as it is, by block id: then it is not copied but handed
    /// over. What has no name is inherited: `/proc/self/fd/N`.
    pub shared_memory: BTreeMap<String, PathBuf>,
    /// Another QEMU of this host runs the same VM: the names of its ports lead there until
    /// [`crate::launch::Belongings::take_names`].
    pub second: bool,
    /// What KVM does here, if there is any. The caller finds out by timing a guest; a device file proves
    /// nothing.
    pub kvm: Option<Kvm>,
    /// What the VMs of other hosts may use here: at first nothing.
    pub limits: Limits,
    /// How many hundredths of the memory that is free VMs of other hosts may need.
    pub overcommit: u32,
}

impl Host {
    /// A host with the usual places.
    pub fn new(runtime: impl Into<PathBuf>) -> Self {
        Self {
            qemu: None,
            user: None,
            runtime: runtime.into(),
            owner: PathBuf::new(),
            memory: PathBuf::from("/dev/shm"),
            shared_memory: BTreeMap::new(),
            second: false,
            kvm: None,
            limits: Limits::default(),
            overcommit: 100,
        }
    }

    /// The QEMU program, or where it was looked for.
    pub fn program(&self) -> Result<PathBuf, String> {
        if let Some(path) = &self.qemu {
            return match fs::metadata(path) {
                Ok(found) if found.is_file() => Ok(path.clone()),
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    Err(format!("cannot look whether there is a QEMU at {}: {error}", path.display()))
                }
                _ => Err(format!("there is no QEMU at {}", path.display())),
            };
        }
        let name = "qemu-system-x86_64";
        in_path(name).ok_or_else(|| format!("{name} is not in PATH; install the package qemu-system-x86"))
    }

    /// How guests are executed here by default.
    pub fn accel(&self) -> Accel {
        if self.uses_kvm() { Accel::Kvm } else { Accel::Tcg }
    }

    /// Whether KVM is worth using here.
    pub fn uses_kvm(&self) -> bool {
        self.kvm.is_some_and(|kvm| kvm.usable)
    }

    /// Where the QEMU of this tag makes sockets.
    pub(crate) fn sockets(&self, tagged: &str) -> PathBuf {
        self.in_runtime(tagged, "sockets")
    }

    /// Where the variable stores of VMs lie that share none with the host that they come from.
    pub(crate) fn stores(&self) -> PathBuf {
        let folder = if self.owner.as_os_str().is_empty() { &self.runtime } else { &self.owner };
        folder.join("flash")
    }

    pub(crate) fn in_runtime(&self, name: &str, ending: &str) -> PathBuf {
        self.runtime.join(format!("{name}.{ending}"))
    }
}

/// The longest path that a unix socket may have on Linux, without its NUL.
const LONGEST_SOCKET: usize = 107;

/// Whether a unix socket can have this path.
pub(crate) fn fits_socket(path: &Path) -> bool {
    path.as_os_str().len() <= LONGEST_SOCKET
}
/// A program of this name, as a shell would find it.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|folder| folder.join(name)).find(|path| path.is_file())
}
