//! What a QEMU that waits for a VM may have open, and whether it has anything else.
//!
//! A command line is checked before QEMU is started, and so are the headers of its images. But QEMU reads
//! those headers itself: one that is rewritten in between can name other files. So its descriptors are looked
//! at from outside, once it has started and once it has loaded the VM's state. What was not granted ends the
//! arrival, before the guest is this host's.

mod look; // at a process

use crate::{
    launch::Belongings,
    recipe::{Accel, ChardevKind, Recipe, files::Identity},
    vhost,
};
use look::Found;
use rustix::fs::makedev;
use std::{
    collections::BTreeSet,
    fs, io,
    net::{SocketAddr, ToSocketAddrs},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};
use sys::{process::PidFd, socket::Ends};

/// What QEMU opens for a moment only (a file of `/proc`, a socket by which it names a TAP) is gone when it is
/// looked at again. Three looks: each finds all that stays.
const LOOKS: usize = 3;

/// Between two looks.
const BETWEEN: Duration = Duration::from_millis(5);

/// Devices that hold nothing of anybody's: null, zero, full, random, urandom (`admin-guide/devices.txt`).
const HARMLESS: [(u32, u32); 5] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];
const KVM: (u32, u32) = (10, 232);
const TUN: (u32, u32) = (10, 200);
const TERMINAL_MAKER: (u32, u32) = (5, 2);

/// Pseudo-terminals: a major number for each 256 of them.
const TERMINALS: std::ops::RangeInclusive<u32> = 136..=143;

/// The kernel's own files without a name, as it calls them.
const NAMELESS: &[&str] =
    &["[eventfd]", "[eventpoll]", "[signalfd]", "[timerfd]", "[userfaultfd]", "[io_uring]"];

/// What a QEMU may have open.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Grants {
    /// Files: the VM's, and those that this host has made for it.
    files: BTreeSet<Identity>,
    /// The sockets that it listens at.
    sockets: BTreeSet<PathBuf>,
    /// A directory in which it may make others.
    folder: Option<PathBuf>,
    /// Servers that it connects to.
    servers: BTreeSet<SocketAddr>,
    /// Devices, by their numbers.
    devices: BTreeSet<u64>,
    /// Whether it makes pseudo-terminals.
    terminals: bool,
    /// Whether each of its files is mounted for it under its name: whatever becomes of that name outside, it
    /// opens no other.
    pub(crate) pinned: bool,
}

impl Grants {
    /// What this VM needs on this host. `files` are those that were opened for it; with `workers`, the kernel
    /// carries the packets of its networks.
    pub(crate) fn of(recipe: &Recipe, belongings: &Belongings, files: Vec<Identity>, workers: bool) -> Self {
        let mut grants = Self { files: files.into_iter().collect(), ..Self::default() };
        grants.sockets.insert(belongings.qmp.clone());
        let sockets = belongings.ports.iter().filter(|port| port.is_socket());
        grants.sockets.extend(sockets.map(|port| port.path.clone()));
        grants.folder.clone_from(&belongings.sockets);
        let servers =
            recipe.exports.iter().filter_map(|export| (&*export.host, export.port).to_socket_addrs().ok());
        grants.servers.extend(servers.flatten());
        let mut device = |(major, minor)| grants.devices.extend([makedev(major, minor)]);
        HARMLESS.into_iter().for_each(&mut device);
        if recipe.accel == Accel::Kvm {
            device(KVM);
        }
        if !recipe.nets.is_empty() {
            device(TUN);
        }
        if workers {
            device(vhost::DEVICE);
        }
        // Lent by us where QEMU's user may not make one itself. Its number is another on each host.
        grants.devices.extend(fs::metadata("/dev/userfaultfd").map(|found| found.rdev()));
        grants.terminals = recipe.all_chardevs().any(|device| device.kind == ChardevKind::Pty);
        if grants.terminals {
            grants.devices.insert(makedev(TERMINAL_MAKER.0, TERMINAL_MAKER.1));
        }
        grants
    }

    /// Whether the process has nothing open but what was granted to it; else every reason why it is not used.
    pub(crate) fn check(&self, process: &PidFd) -> Result<(), Vec<String>> {
        let beyond = self
            .beyond(process)
            .map_err(|error| vec![format!("cannot look what its QEMU has open: {error}")])?;
        let reason = |what: String| {
            format!(
                "its QEMU has {what} open here, which was not granted to it: an image that names it was \
                 written while QEMU started; look at the VM's images (qemu-img info --backing-chain), and \
                 try again"
            )
        };
        if beyond.is_empty() { Ok(()) } else { Err(beyond.into_iter().map(reason).collect()) }
    }

    /// Everything that the process has open, or has started, and was not granted.
    pub(crate) fn beyond(&self, process: &PidFd) -> io::Result<Vec<String>> {
        let mut beyond = self.beyond_now(process)?;
        for _ in 1..LOOKS {
            if beyond.is_empty() {
                break;
            }
            thread::sleep(BETWEEN);
            let still = self.beyond_now(process)?;
            beyond.retain(|what| still.contains(what));
        }
        Ok(beyond.into_iter().collect())
    }

    fn beyond_now(&self, process: &PidFd) -> io::Result<BTreeSet<String>> {
        Ok(look::at(process)?
            .into_iter()
            .filter(|found| !self.has(found))
            .map(|found| found.to_string())
            .collect())
    }

    fn has(&self, found: &Found) -> bool {
        match found {
            Found::Memory => true,
            Found::File(id, _) => self.files.contains(id),
            Found::Device(number, _) => {
                let is_terminal = TERMINALS.contains(&rustix::fs::major(*number));
                self.devices.contains(number) || (self.terminals && is_terminal)
            }
            Found::Nameless(kind) => NAMELESS.contains(&kind.as_str()) || kind.starts_with("kvm-"),
            Found::Socket(Ends::Unix { own, peer: None, .. }) => {
                own.as_ref().is_none_or(|own| self.listens_at(own))
            }
            Found::Socket(Ends::Internet { peer: Some(peer) }) => self.servers.contains(peer),
            Found::Socket(_) | Found::Other(_) | Found::Program(_) => false,
        }
    }

    fn listens_at(&self, own: &Path) -> bool {
        let climbs = own.components().any(|part| part == std::path::Component::ParentDir);
        let inside = self.folder.as_ref().is_some_and(|folder| !climbs && own.starts_with(folder));
        self.sockets.contains(own) || inside
    }
}

#[cfg(test)]
mod tests;
