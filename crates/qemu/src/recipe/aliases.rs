//! Other names of devices that QEMU takes on its command line, on x86. A running QEMU and its state know the
//! first names only.
//!
//! The list is `qdev_alias_table` of QEMU's `system/qdev-monitor.c`; `info qdm` prints it.

use super::options;

/// Devices on PCI whose name may be given without the bus.
const ON_PCI: &[&str] = &[
    "virtio-9p",
    "virtio-balloon",
    "virtio-blk",
    "virtio-gpu",
    "virtio-gpu-gl",
    "virtio-input-host",
    "virtio-iommu",
    "virtio-keyboard",
    "virtio-mouse",
    "virtio-net",
    "virtio-rng",
    "virtio-scsi",
    "virtio-serial",
    "virtio-sound",
    "virtio-tablet",
];

/// The others.
const OTHERS: &[(&str, &str)] = &[
    ("ac97", "AC97"),
    ("ahci", "ich9-ahci"),
    ("e1000-82540em", "e1000"),
    ("es1370", "ES1370"),
    ("lsi", "lsi53c895a"),
];

/// The name by which QEMU itself knows a device.
fn driver(name: &str) -> String {
    match OTHERS.iter().find(|(alias, _)| *alias == name) {
        Some((_, own)) => (*own).to_owned(),
        None if ON_PCI.contains(&name) => format!("{name}-pci"),
        None => name.to_owned(),
    }
}

/// A `-device` value with QEMU's own name for the device.
pub(crate) fn resolve(value: &str) -> String {
    if value.starts_with('{') {
        return value.to_owned();
    }
    let mut parsed = options::parse(value, "driver");
    let mut changed = false;
    for (key, name) in &mut parsed {
        if key == "driver" {
            let own = driver(name);
            changed |= own != *name;
            *name = own;
        }
    }
    if changed { options::join(&parsed, "driver") } else { value.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_are_resolved_and_all_else_is_left_as_it_is() {
        for (value, resolved) in [
            ("virtio-net,netdev=n", "virtio-net-pci,netdev=n"),
            ("virtio-rng", "virtio-rng-pci"),
            ("virtio-blk,drive=d,serial=a,,b", "virtio-blk-pci,drive=d,serial=a,,b"),
            ("id=x,driver=virtio-scsi", "id=x,driver=virtio-scsi-pci"),
            ("e1000-82540em,netdev=n", "e1000,netdev=n"),
            ("virtio-net-device,netdev=n", "virtio-net-device,netdev=n"),
            ("e1000", "e1000"),
            ("{\"driver\":\"virtio-net\"}", "{\"driver\":\"virtio-net\"}"),
        ] {
            assert_eq!(resolve(value), resolved);
        }
    }
}
