//! What the VMs of other hosts may use here. The host that sends a VM says what it needs; this host's own
//! configuration says whether it gets that.

use crate::recipe::{Export, Net, Recipe, Role, device_driver, files::Opened, matches};
use std::{
    net::Ipv4Addr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

/// What a host grants to VMs that other hosts send. Beyond it, only what [`crate::recipe::check()`] finds
/// harmless is taken at all.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// Directories with disks, at whatever depth.
    pub disks: Vec<PathBuf>,
    /// Directories with kernels, initial RAM disks and firmware: with what is only read.
    pub boot: Vec<PathBuf>,
    /// Bridges, each with the VLANs on it that a VM may be in (`br0:20`, `br0:20-29`); on one that filters
    /// VLANs, without them only the first. `None`: whichever there are.
    pub bridges: Option<Vec<String>>,
    /// Servers on the network that have disks: `storage:10809`, `10.0.0.5`, `10.0.0.0/24:10809`.
    pub servers: Vec<String>,
    /// Options of QEMU such as `-device`; `None`: all of the allow-list.
    pub options: Option<Vec<String>>,
    /// Devices such as `virtio-*`; `None`: all of the allow-list.
    pub devices: Option<Vec<String>>,
}

impl Limits {
    /// What of a recipe is not granted, files and bridges apart.
    pub(crate) fn check(&self, recipe: &Recipe) -> Vec<String> {
        let mut reasons = Vec::new();
        for argument in &recipe.arguments {
            let option = &argument.option;
            if self.options.as_ref().is_some_and(|options| !options.contains(option)) {
                reasons.push(not_granted(&format!("QEMU's option {option}"), "options"));
            }
            let device = argument.value.as_deref().filter(|_| option == "-device").map(device_driver);
            let Some((device, devices)) = device.zip(self.devices.as_ref()) else { continue };
            if !devices.iter().any(|pattern| matches(pattern, &device)) {
                reasons.push(not_granted(&format!("the device {device}"), "devices"));
            }
        }
        reasons
    }

    /// Whether a VM may be plugged in like this.
    pub(crate) fn check_net(&self, net: &Net) -> Result<(), String> {
        let Some(bridges) = &self.bridges else { return Ok(()) };
        let bridge = net.bridge.as_str();
        let granted: Vec<_> = bridges.iter().filter_map(|entry| vlans_granted(entry, bridge)).collect();
        if granted.is_empty() {
            return Err(not_granted(&format!("the bridge {bridge}"), "bridges"));
        }
        match net.port.vlans_beyond(&granted).first() {
            Some(vlan) => Err(not_granted(&format!("VLAN {vlan} of the bridge {bridge}"), "bridges")),
            None => Ok(()),
        }
    }

    /// Whether a VM may have its host connect to this server.
    pub(crate) fn check_server(&self, export: &Export) -> Result<(), String> {
        if self.servers.iter().any(|entry| grants_server(entry, &export.host, export.port)) {
            return Ok(());
        }
        Err(not_granted(&format!("the server {}:{}", export.host, export.port), "servers"))
    }

    /// Whether a VM may use a file of this name. By the name alone: what is there is not looked at, and so
    /// not told.
    pub(crate) fn check_name(&self, path: &Path, role: Role, read_only: bool) -> Result<(), String> {
        let (setting, mut dirs) = self.dirs(role, read_only);
        if dirs.any(|dir| path.starts_with(dir)) {
            return Ok(());
        }
        Err(not_granted(&format!("the {} {}", role.word(), path.display()), setting))
    }

    /// Whether a VM may use a file that was opened, by where its name led.
    pub(crate) fn check_opened(&self, opened: &Opened, read_only: bool) -> Result<(), String> {
        let (setting, mut dirs) = self.dirs(opened.role, read_only);
        let inside = |dir: &PathBuf| dir.canonicalize().is_ok_and(|dir| opened.real.starts_with(dir));
        if dirs.any(inside) {
            return Ok(());
        }
        let (word, path) = (opened.role.word(), opened.path.display());
        Err(not_granted(&format!("the {word} {path}, by where it leads,"), setting))
    }

    /// Firmware is a disk that is only read, and lies where boot files are.
    fn dirs(&self, role: Role, read_only: bool) -> (&'static str, impl Iterator<Item = &PathBuf>) {
        let (setting, first, second): (_, &[PathBuf], &[PathBuf]) = match role {
            Role::Disk if read_only => ("disks or boot", &self.disks, &self.boot),
            Role::Disk | Role::Backing => ("disks", &self.disks, &[]),
            Role::Boot => ("boot", &self.boot, &[]),
        };
        (setting, first.iter().chain(second))
    }
}

/// Whether an entry is this server, by its name or address, or a network that it is in; on this port if it
/// says one.
fn grants_server(entry: &str, host: &str, port: u16) -> bool {
    let (place, only) = entry.split_once(':').map_or((entry, None), |(place, port)| (place, Some(port)));
    if only.is_some_and(|only| only.parse() != Ok(port)) {
        return false;
    }
    let Some((network, bits)) = place.split_once('/') else { return place == host };
    let parsed = (network.parse::<Ipv4Addr>(), host.parse::<Ipv4Addr>(), bits.parse::<u32>());
    let (Ok(network), Ok(host), Ok(bits @ 0..=32)) = parsed else { return false };
    let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
    network.to_bits() & mask == host.to_bits() & mask
}

/// The VLANs that an entry such as `br0`, `br0:20` or `br0:20-29` grants on this bridge.
fn vlans_granted(entry: &str, bridge: &str) -> Option<RangeInclusive<u16>> {
    let Some((name, vlans)) = entry.split_once(':') else {
        // The one that every port begins with.
        return (entry == bridge).then_some(1..=1);
    };
    let (first, last) = vlans.split_once('-').unwrap_or((vlans, vlans));
    let range = first.parse().ok()?..=last.parse().ok()?;
    (name == bridge).then_some(range)
}

fn not_granted(what: &str, setting: &str) -> String {
    format!("{what} is not among what this host grants to VMs of other hosts ({setting} in its [allow])")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_granted_by_name_by_address_or_by_network() {
        for (entry, host, port, granted) in [
            ("storage", "storage", 10809, true),
            ("storage:10809", "storage", 10809, true),
            ("storage:10809", "storage", 22, false),
            ("storage", "storage2", 10809, false),
            ("10.0.0.5", "10.0.0.5", 7, true),
            ("10.0.0.0/24", "10.0.0.255", 7, true),
            ("10.0.0.0/24", "10.0.1.0", 7, false),
            ("10.0.0.0/24:7", "10.0.0.1", 8, false),
            ("0.0.0.0/0", "192.0.2.1", 8, true),
            ("10.0.0.0/33", "10.0.0.0", 8, false),
            // What it leads to is not looked up for that.
            ("0.0.0.0/0", "storage", 8, false),
            ("", "storage", 8, false),
            ("storage:", "storage", 8, false),
        ] {
            assert_eq!(grants_server(entry, host, port), granted, "{entry} {host}:{port}");
        }
    }
}
