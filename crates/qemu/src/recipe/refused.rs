//! Devices that cannot follow a VM, and why.
//!
//! Most of them are those that QEMU itself does not migrate: `-only-migratable` refuses them, or they have
//! state that they do not describe. `xen-save-devices-state` would say nothing of that.

/// What a device's type begins with, why it cannot follow, and what to do instead. The first that fits
/// counts.
const REFUSED: &[(&[&str], &str)] = &[
    (&["vfio-"], "it is a device of this host, which cannot follow the VM; use a virtio device"),
    (&["ivshmem"], "its memory is shared with other VMs of this host; leave it out"),
    (&["usb-host"], "it is a USB device of this host, which cannot follow the VM; unplug it (device_del)"),
    (&["u2f-passthru"], "it is a key in this host, which cannot follow the VM; unplug it (device_del)"),
    (
        &["virtio-input-host"],
        "it is a device of this host, which cannot follow the VM; use virtio-keyboard and its like",
    ),
    (
        &["usb-redir"],
        "it ends in a client of this host; have the client disconnect, or unplug it (device_del)",
    ),
    (&["ccid-card-"], "the card is in this host; unplug it (device_del)"),
    (
        &["scsi-block", "scsi-generic"],
        "it hands the guest's commands to a device of this host; use scsi-hd with an image",
    ),
    (
        &["vhost-"],
        "another process or the kernel writes the guest's memory unseen; use the virtio device without vhost",
    ),
    (
        &["virtio-pmem", "nvdimm", "cxl-", "pxb-cxl", "acpi-erst"],
        "its memory is a file of this host; use a disk",
    ),
    (&["virtio-9p", "virtio-fs"], "its files are this host's; use a network file system"),
    (&["usb-mtp"], "its files are this host's, and QEMU does not migrate it; use a network file system"),
    (
        &["virtio-gpu-gl", "virtio-vga-gl", "virtio-gpu-rutabaga", "virtio-vga-rutabaga"],
        "its pictures are in this host's graphics (virgl, venus), and QEMU does not migrate it; use \
         virtio-gpu-pci or virtio-vga",
    ),
    (&["nvme"], "QEMU does not migrate it; use virtio-blk or virtio-scsi"),
    (&["virtio-crypto"], "QEMU does not migrate it; leave it out"),
    (&["virtio-sound"], "QEMU does not migrate it; use ich9-intel-hda with hda-duplex"),
    (&["usb-audio"], "QEMU does not migrate it; use ich9-intel-hda with hda-duplex"),
    (&["usb-uas"], "QEMU does not migrate it; use usb-storage"),
    (&["usb-net"], "QEMU does not migrate it; use virtio-net"),
    (&["usb-serial", "usb-braille"], "QEMU does not migrate it; use isa-serial or virtio-serial"),
    (&["usb-wacom-tablet"], "QEMU does not migrate it; use usb-tablet"),
    (&["amd-iommu"], "QEMU does not migrate it; use intel-iommu or virtio-iommu"),
    (
        &["sdhci", "sd-card"],
        "QEMU does not migrate all of its controller's state (sdhci-pci); use usb-storage",
    ),
    (&["isa-vga", "isa-cirrus-vga"], "QEMU 7 does not survive its migration; use -vga std"),
    (
        &["pci-serial-2x", "pci-serial-4x"],
        "QEMU dies when it saves the state of a serial card with several ports; use several pci-serial",
    ),
    (&["ati-vga"], "QEMU does not migrate its state; use -vga std"),
    (&["adlib"], "QEMU does not migrate its state; use AC97"),
    (&["rocker"], "QEMU does not migrate it; use a network card on a bridge"),
    (&["ipmi-bmc-extern"], "its state is in another process; use ipmi-bmc-sim"),
    (&["xen-", "vmbus-", "hv-", "hyperv-", "x-pci-proxy", "pvrdma"], "it is not supported; leave it out"),
    (
        &[
            "edu",
            "pci-testdev",
            "pc-testdev",
            "guest-loader",
            "loader",
            "ctucan",
            "kvaser",
            "mioe3680",
            "pcm3680",
            "tpci200",
            "ipoctal",
        ],
        "it is for tests and QEMU's developers; leave it out",
    ),
];

/// Why a device of this type cannot follow a VM; `None`: nothing is against it for what it is.
pub(crate) fn why(kind: &str) -> Option<&'static str> {
    let found = REFUSED.iter().find(|(stems, _)| stems.iter().any(|stem| kind.starts_with(stem)));
    found.map(|(_, why)| *why)
}

/// Devices of the machine itself, which no `-device` need make.
const PARTS: &[&str] = &["AMDVI-PCI", "i2c-ddc", "i8042", "isa-fdc", "mc146818rtc", "vmmouse"];

/// Why no `-device` of this kind is taken; `None`: nothing is against it for what it is.
pub(super) fn why_not_made(driver: &str) -> Option<&'static str> {
    let part =
        PARTS.contains(&driver).then_some("it is a part of the machine, which has it already; leave it out");
    // An empty place for a client's device is taken: whether it is, the running QEMU says.
    part.or_else(|| why(driver).filter(|_| driver != "usb-redir"))
}
