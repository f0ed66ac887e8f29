//! Properties of what else a machine has: pictures, sound, USB devices, controllers of disks, management.
//!
//! As in [`properties`](super::properties), what names a file, a descriptor or a device of the host is not
//! here: `frudatafile`, `sdrfile`, `hidraw`, `rootdir`.

use super::{forms::Form::*, properties::Property};

pub(super) const BALLOON: &[Property] = &[
    ("deflate-on-oom", Switch),
    ("free-page-hint", Switch),
    ("free-page-reporting", Switch),
    ("iothread", Id),
    ("page-poison", Switch),
    ("qemu-4-0-config-size", Switch),
];

pub(super) const TPM: &[Property] = &[("irq", Number), ("ppi", Switch), ("tpmdev", Id)];

/// In two dimensions. A blob would be memory that the host's graphics share.
pub(super) const GPU: &[Property] = &[
    ("big-endian-framebuffer", Switch),
    ("blob", Off),
    ("edid", Switch),
    ("hostmem", Size),
    ("max_hostmem", Size),
    ("max_outputs", Number),
    ("x-scanout-vmstate-version", Number),
    ("xres", Number),
    ("yres", Number),
];

pub(super) const OLD_DISPLAY: &[Property] =
    &[("blitter", Switch), ("global-vmstate", Switch), ("vgamem_mb", Number)];

pub(super) const QXL: &[Property] = &[
    ("cmdlog", Number),
    ("debug", Number),
    ("global-vmstate", Switch),
    ("guestdebug", Number),
    ("max_outputs", Number),
    ("ram_size", Number),
    ("ram_size_mb", Number),
    ("revision", Number),
    ("surfaces", Number),
    ("vgamem_mb", Number),
    ("vram64_size_mb", Number),
    ("vram_size", Number),
    ("vram_size_mb", Number),
    ("xres", Number),
    ("yres", Number),
];

pub(super) const RAMFB: &[Property] = &[("x-migrate", Switch)];

/// Sound of any kind: the target's goes nowhere.
pub(super) const SOUND: &[Property] = &[
    ("audiodev", Id),
    ("dma", Number),
    ("dma16", Number),
    ("freq", Number),
    ("iobase", Number),
    ("irq", Number),
    ("version", Number),
];

pub(super) const USB_HUB: &[Property] = &[("port-power", Switch), ("ports", Number)];
pub(super) const USB_STORAGE: &[Property] = &[("commandlog", Switch), ("removable", Switch)];
pub(super) const USB_CCID: &[Property] = &[("debug", Number)];
pub(super) const OHCI: &[Property] = &[("num-ports", Number)];

pub(super) const BMC: &[Property] = &[
    ("device_id", Number),
    ("device_rev", Number),
    ("fruareasize", Number),
    ("fwrev1", Number),
    ("fwrev2", Number),
    ("guid", Uuid),
    ("ipmi_version", Number),
    ("mfg_id", Number),
    ("product_id", Number),
    ("slave_addr", Number),
];
pub(super) const IPMI: &[Property] = &[("address", Number), ("bmc", Id), ("ioport", Number), ("irq", Number)];

pub(super) const VIRTIO_IOMMU: &[Property] = &[
    ("aw-bits", Number),
    ("boot-bypass", Switch),
    ("granule", Word(&["4k", "8k", "16k", "64k", "host"])),
    ("len-reserved-regions", Number),
    ("primary-bus", Id),
];

/// Bridges that begin a hierarchy of their own.
pub(super) const EXPANDER: &[Property] =
    &[("bus_nr", Number), ("bypass_iommu", Switch), ("numa_node", Number)];

/// Controllers of SCSI disks.
pub(super) const HBA: &[Property] = &[
    ("hba_serial", Text),
    ("max_cmds", Number),
    ("max_sge", Number),
    ("msi", Auto),
    ("msix", Auto),
    ("sas_address", Number),
    ("use_jbod", Switch),
    ("use_msg", Number),
    ("x-old-pci-configuration", Switch),
];

const FLOPPY_KIND: super::forms::Form = Word(&["144", "288", "120", "none", "auto"]);
pub(super) const FLOPPY: &[Property] = &[("drive-type", FLOPPY_KIND), ("unit", Number)];
pub(super) const FDC: &[Property] = &[
    ("bootindexA", Number),
    ("bootindexB", Number),
    ("dma", Number),
    ("fallback", FLOPPY_KIND),
    ("fdtypeA", FLOPPY_KIND),
    ("fdtypeB", FLOPPY_KIND),
    ("iobase", Number),
    ("irq", Number),
];
pub(super) const ISA_IDE: &[Property] = &[("iobase", Number), ("iobase2", Number), ("irq", Number)];

pub(super) const ISA_NIC: &[Property] = &[("iobase", Number), ("irq", Number)];
pub(super) const VMXNET: &[Property] = &[("x-old-msi-offsets", Switch)];
pub(super) const SMC: &[Property] = &[("iobase", Number), ("osk", Text)];
