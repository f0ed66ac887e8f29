//! Devices that have no back end of their own on the host, besides disks, TAPs and character devices that the
//! recipe names.

use super::{
    forms::Form::{self, *},
    peripherals::*,
    properties::*,
};

/// Virtio devices by what they are called before their bus.
const VIRTIO_DEVICES: &[(&str, &[&[Property]])] = &[
    ("virtio-blk", &[BLOCK, GEOMETRY, VIRTIO_BLK]),
    ("virtio-net", &[NIC, VIRTIO_NET]),
    ("virtio-rng", &[VIRTIO_RNG]),
    ("virtio-scsi", &[VIRTIO_SCSI]),
    ("virtio-serial", &[VIRTIO_SERIAL]),
    ("virtio-keyboard", &[INPUT]),
    ("virtio-mouse", &[INPUT]),
    ("virtio-tablet", &[INPUT]),
    ("virtio-balloon", &[BALLOON]),
    ("virtio-gpu", &[GPU]),
    ("virtio-iommu", &[VIRTIO_IOMMU]),
    ("virtio-mem", &[VIRTIO_MEM]),
];

/// How virtio devices are called on PCI; without an ending QEMU takes the first.
const ON_PCI: &[&str] = &["", "-pci", "-pci-transitional", "-pci-non-transitional"];

/// All others.
const DEVICES: &[(&[&str], &[&[Property]])] = &[
    (&["virtserialport", "virtconsole"], &[PORT]),
    (&["scsi-hd", "scsi-cd"], &[BLOCK, GEOMETRY, SCSI]),
    (&["ide-hd", "ide-cd"], &[BLOCK, GEOMETRY, IDE]),
    (&["ahci", "ich9-ahci", "piix3-ide", "piix4-ide"], &[PCI]),
    (
        &["lsi53c895a", "lsi53c810", "megasas", "megasas-gen2", "mptsas1068", "pvscsi", "am53c974", "dc390"],
        &[PCI, HBA],
    ),
    (&["floppy"], &[BLOCK, FLOPPY]),
    (&["isa-ide"], &[ISA_IDE]),
    (&["e1000", "e1000-82544gc", "e1000-82545em", "e1000e", "igb", "rtl8139"], &[PCI, NIC, INTEL_NIC]),
    (
        &[
            "pcnet", "ne2k_pci", "tulip", "vmxnet3", "i82550", "i82551", "i82557a", "i82557b", "i82557c",
            "i82558a", "i82558b", "i82559a", "i82559b", "i82559c", "i82559er", "i82562", "i82801",
        ],
        &[PCI, NIC, VMXNET],
    ),
    (&["ne2k_isa"], &[NIC, ISA_NIC]),
    (&["VGA", "secondary-vga", "bochs-display"], &[PCI, DISPLAY]),
    (&["cirrus-vga", "vmware-svga"], &[PCI, OLD_DISPLAY]),
    (&["qxl", "qxl-vga"], &[PCI, QXL]),
    (&["ramfb"], &[RAMFB]),
    (&["virtio-vga"], &[VIRTIO, VIRTIO_PCI, PCI, GPU]),
    (
        &[
            "pcie-root-port",
            "pcie-pci-bridge",
            "pci-bridge",
            "pci-bridge-seat",
            "i82801b11-bridge",
            "ioh3420",
            "x3130-upstream",
            "xio3130-downstream",
        ],
        &[PCI, BRIDGE],
    ),
    (&["pxb", "pxb-pcie"], &[PCI, EXPANDER]),
    (
        &[
            "qemu-xhci",
            "nec-usb-xhci",
            "usb-ehci",
            "ich9-usb-ehci1",
            "ich9-usb-ehci2",
            "ich9-usb-uhci1",
            "ich9-usb-uhci2",
            "ich9-usb-uhci3",
            "ich9-usb-uhci4",
            "ich9-usb-uhci5",
            "ich9-usb-uhci6",
            "pci-ohci",
            "piix3-usb-uhci",
            "piix4-usb-uhci",
        ],
        &[PCI, USB_CONTROLLER, OHCI],
    ),
    (&["usb-tablet", "usb-kbd", "usb-mouse"], &[USB]),
    (&["isa-serial"], &[ISA_SERIAL]),
    (&["tpm-tis", "tpm-crb"], &[TPM]),
    (&["isa-parallel"], &[ISA_PARALLEL]),
    (&["isa-debugcon"], &[DEBUG_CONSOLE]),
    (&["pci-serial"], &[PCI, PCI_SERIAL]),
    (&["usb-redir"], &[USB, USB_REDIR]),
    (&["usb-hub"], &[USB, USB_HUB]),
    (&["usb-storage", "usb-bot"], &[USB, BLOCK, USB_STORAGE]),
    (&["usb-ccid"], &[USB, USB_CCID]),
    (&["isa-debug-exit"], &[DEBUG_EXIT]),
    (&["pvpanic", "pvpanic-pci"], &[PCI, PANIC]),
    (&["vmcoreinfo", "ib700", "sga"], &[]),
    (&["isa-applesmc"], &[SMC]),
    (&["ipmi-bmc-sim"], &[BMC]),
    (&["isa-ipmi-bt", "isa-ipmi-kcs", "smbus-ipmi"], &[IPMI]),
    (&["pci-ipmi-bt", "pci-ipmi-kcs"], &[PCI, IPMI]),
    (&["vmgenid"], &[GENERATION]),
    (&["i6300esb"], &[PCI]),
    (&["pc-dimm"], &[DIMM]),
    (&["intel-iommu"], &[IOMMU]),
    (&["hda-duplex", "hda-output", "hda-micro"], &[HDA_CODEC]),
    (&["AC97", "ES1370"], &[PCI, SOUND]),
    (&["cs4231a", "gus", "sb16"], &[SOUND]),
    (&["intel-hda", "ich9-intel-hda"], &[PCI, HDA]),
];

const TICKS: Form = Word(&["discard", "delay", "merge", "slew"]);

/// What no `-device` makes, but `-global` may set: parts of the machine, and what several devices share.
const PARTS: &[(&str, &[&[Property]])] = &[
    (
        "ICH9-LPC",
        &[&[
            ("acpi-pci-hotplug-with-bridge-support", Switch),
            ("disable_s3", Number),
            ("disable_s4", Number),
            ("enable_tco", Switch),
            ("noreboot", Switch),
            ("s4_val", Number),
            ("smm-compat", Switch),
            ("x-keep-pci-slot-hpc", Switch),
            ("x-smi-broadcast", Switch),
            ("x-smi-cpu-hotplug", Switch),
            ("x-smi-cpu-hotunplug", Switch),
        ]],
    ),
    (
        "PIIX4_PM",
        &[&[
            ("acpi-pci-hotplug-with-bridge-support", Switch),
            ("acpi-root-pci-hotplug", Switch),
            ("disable_s3", Number),
            ("disable_s4", Number),
            ("s4_val", Number),
            ("smm-compat", Switch),
        ]],
    ),
    ("kvm-pit", &[&[("lost_tick_policy", TICKS)]]),
    ("mc146818rtc", &[&[("base_year", Number), ("lost_tick_policy", TICKS)]]),
    ("q35-pcihost", &[&[("pci-hole64-size", Size), ("x-pci-hole64-fix", Switch)]]),
    ("i440FX-pcihost", &[&[("pci-hole64-size", Size), ("x-pci-hole64-fix", Switch)]]),
    ("mch", &[&[("extended-tseg-mbytes", Number), ("smbase-smram", Switch)]]),
    ("virtio-mmio", &[&[("force-legacy", Switch), ("ioeventfd", Switch)]]),
    ("virtio-pci", &[PCI, VIRTIO_PCI]),
    ("virtio-device", &[VIRTIO]),
    ("isa-fdc", &[FDC]),
    ("cfi.pflash01", &[&[("secure", Switch)]]),
    ("fw_cfg_io", &[&[("dma_enabled", Switch), ("x-file-slots", Number)]]),
];

/// What the type of a PC's vCPU ends in, after its model.
const VCPU: &str = "-x86_64-cpu";

/// Whether it is a vCPU.
pub(crate) fn is_vcpu(driver: &str) -> bool {
    driver.strip_suffix(VCPU).is_some_and(|model| !model.is_empty())
}

/// A device's own properties and those that it shares; none if the device is not known.
fn groups(driver: &str) -> Option<Vec<&'static [Property]>> {
    if is_vcpu(driver) {
        return Some(vec![EVERY, PLACE_OF_VCPU]);
    }
    for (stem, own) in VIRTIO_DEVICES {
        let Some(ending) = driver.strip_prefix(stem) else { continue };
        if ending == "-device" {
            return Some([&[EVERY, VIRTIO], *own].concat());
        } else if ON_PCI.contains(&ending) {
            return Some([&[EVERY, VIRTIO, VIRTIO_PCI, PCI], *own].concat());
        }
    }
    let (_, own) = DEVICES.iter().find(|(names, _)| names.contains(&driver))?;
    Some([&[EVERY], *own].concat())
}

/// Whether `-device` may make this.
pub(super) fn is_known(driver: &str) -> bool {
    groups(driver).is_some()
}

/// The form of a device's property, if both are known.
pub(super) fn property(driver: &str, name: &str) -> Option<Form> {
    groups(driver)?.into_iter().find_map(|group| find(group, name))
}

/// The form of what `-global` may set.
pub(super) fn global(driver: &str, name: &str) -> Option<Form> {
    // None of these is a property of a kind: one makes the device, the others name one of many. Which memory
    // a device has is looked for where the device is made.
    if name == "memdev" || EVERY.iter().any(|(of_every, _)| *of_every == name) {
        return None;
    }
    let part = PARTS.iter().find(|(part, _)| *part == driver);
    match part {
        Some((_, own)) => own.iter().find_map(|group| find(group, name)),
        None => property(driver, name),
    }
}

fn find(group: &[Property], name: &str) -> Option<Form> {
    group.iter().find(|(property, _)| *property == name).map(|(_, form)| *form)
}
