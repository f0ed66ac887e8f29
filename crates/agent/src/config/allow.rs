//! `[allow]`: what the VMs of other hosts may use here.

use serde::Deserialize;
use std::path::PathBuf;

/// What the VMs of other hosts may use here. Another host of the workgroup says what a VM that it sends
/// needs; whether it gets that is decided here.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Allow {
    /// Directories with disks, at whatever depth.
    pub disks: Vec<PathBuf>,
    /// Directories with kernels, initial RAM disks and firmware.
    pub boot: Vec<PathBuf>,
    /// Directories that memory may also come by, at whatever depth.
    pub spool: Vec<PathBuf>,
    /// Bridges; `None`: whichever there are.
    pub bridges: Option<Vec<String>>,
    /// Servers on the network that have disks (NBD): `storage:10809`, `10.0.0.5`, `10.0.0.0/24:10809`. Who
    /// grants an address says that it means the same server on all hosts.
    pub servers: Vec<String>,
    /// Options of QEMU, such as `-device`; `None`: all that are known to be harmless. No others can be
    /// allowed.
    pub options: Option<Vec<String>>,
    /// Devices, such as `virtio-*`; `None`: all that are known to be harmless. No others can be allowed.
    pub devices: Option<Vec<String>>,
}

impl Default for Allow {
    fn default() -> Self {
        let all = |dirs: &[&str]| dirs.iter().map(PathBuf::from).collect();
        Self {
            disks: all(&["/shared", "/var/lib/whimbrel/disks", "/var/lib/libvirt/images"]),
            boot: all(&[
                "/boot",
                "/shared",
                "/usr/share/OVMF",
                "/usr/share/edk2",
                "/usr/share/qemu",
                "/usr/share/seabios",
                "/var/lib/whimbrel/boot",
            ]),
            spool: all(&["/shared", "/var/lib/whimbrel/spool"]),
            bridges: None,
            servers: Vec::new(),
            options: None,
            devices: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, tests::load};

    #[test]
    fn directories_for_foreign_vms_are_absolute() {
        let allow = load("[allow]\ndisks = [\"/srv\"]\n", Flags::default()).unwrap().allow;
        assert_eq!(allow, Allow { disks: vec!["/srv".into()], ..Allow::default() });
        let error = load("[allow]\nboot = [\"images\"]\n", Flags::default()).unwrap_err().to_string();
        assert!(error.contains("images") && error.contains("absolute"), "{error}");
    }
}
