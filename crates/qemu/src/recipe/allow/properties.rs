//! Properties of devices that open nothing on a host: those of QEMU 7.2 and 10.0 (`-device NAME,help`)
//! without those that name a file, a descriptor, a socket, a host's device or another object than the
//! recipe's.
//!
//! A property that is not here is refused. Left out on purpose, besides `romfile`, `pcap`, `host` and their
//! like: `share-rw=on`, with which an image has no lock (I6); `failover`, whose other card is the host's;
//! `scsi=on`, which hands the guest's SCSI commands to the host; `spdm_port`, a socket.

use super::forms::Form::{self, *};

/// A property's name and the form of its value.
pub(super) type Property = (&'static str, Form);

/// What `-device` itself takes, for every device.
pub(super) const EVERY: &[Property] = &[("driver", Id), ("id", Id), ("bus", Id), ("bootindex", Number)];

/// On PCI.
pub(super) const PCI: &[Property] = &[
    ("acpi-index", Number),
    ("addr", Place),
    ("busnr", Number),
    ("multifunction", Switch),
    ("rombar", Number),
    ("romfile", Empty),
    ("romsize", Number),
    ("x-max-bounce-buffer-size", Size),
    ("x-pcie-ari-nextfn-1", Switch),
    ("x-pcie-err-unc-mask", Switch),
    ("x-pcie-ext-tag", Switch),
    ("x-pcie-extcap-init", Switch),
    ("x-pcie-lnksta-dllla", Switch),
];

/// Where a vCPU is; all else about it says `-cpu`.
pub(super) const PLACE_OF_VCPU: &[Property] = &[
    ("cluster-id", Number),
    ("core-id", Number),
    ("die-id", Number),
    ("module-id", Number),
    ("node-id", Number),
    ("socket-id", Number),
    ("thread-id", Number),
];

/// Virtio, on whatever bus.
pub(super) const VIRTIO: &[Property] = &[
    ("any_layout", Switch),
    ("event_idx", Switch),
    ("in_order", Switch),
    ("indirect_desc", Switch),
    ("iommu_platform", Switch),
    ("notify_on_empty", Switch),
    ("packed", Switch),
    ("queue_reset", Switch),
    ("use-disabled-flag", Switch),
    ("use-started", Switch),
    ("x-disable-legacy-check", Switch),
];

/// Virtio on PCI.
pub(super) const VIRTIO_PCI: &[Property] = &[
    ("aer", Switch),
    ("ats", Switch),
    ("class", Number),
    ("disable-legacy", Auto),
    ("disable-modern", Switch),
    ("ioeventfd", Switch),
    ("migrate-extra", Switch),
    ("modern-pio-notify", Switch),
    ("page-per-vq", Switch),
    ("vectors", Number),
    ("virtio-pci-bus-master-bug-migration", Switch),
    ("x-ats-page-aligned", Switch),
    ("x-disable-pcie", Switch),
    ("x-ignore-backend-features", Switch),
    ("x-pcie-deverr-init", Switch),
    ("x-pcie-flr-init", Switch),
    ("x-pcie-lnkctl-init", Switch),
    ("x-pcie-pm-init", Switch),
    ("x-pcie-pm-no-soft-reset", Switch),
];

pub(super) const ON_ERROR: Form = Word(&["report", "ignore", "enospc", "stop", "auto"]);

/// Disks.
pub(super) const BLOCK: &[Property] = &[
    ("account-failed", Auto),
    ("account-invalid", Auto),
    ("backend_defaults", Auto),
    ("discard_granularity", Size),
    ("drive", Id),
    ("logical_block_size", Size),
    ("min_io_size", Size),
    ("opt_io_size", Size),
    ("physical_block_size", Size),
    ("rerror", ON_ERROR),
    ("serial", Text),
    ("share-rw", Off),
    ("werror", ON_ERROR),
    ("write-cache", Auto),
];

/// Disks with cylinders.
pub(super) const GEOMETRY: &[Property] = &[
    ("cyls", Number),
    ("heads", Number),
    ("lcyls", Number),
    ("lheads", Number),
    ("lsecs", Number),
    ("secs", Number),
];

pub(super) const SCSI: &[Property] = &[
    ("channel", Number),
    ("device_id", Text),
    ("dpofua", Switch),
    ("lun", Number),
    ("max_io_size", Number),
    ("max_unmap_size", Number),
    ("migrate-emulated-scsi-request", Switch),
    ("port_index", Number),
    ("port_wwn", Number),
    ("product", Text),
    ("quirk_mode_page_apple_vendor", Switch),
    ("quirk_mode_page_truncated", Switch),
    ("quirk_mode_page_vendor_specific_apple", Switch),
    ("quirk_mode_sense_rom_use_dbd", Switch),
    ("removable", Switch),
    ("rotation_rate", Number),
    ("scsi-id", Number),
    ("scsi_version", Number),
    ("vendor", Text),
    ("ver", Text),
    ("wwn", Number),
];

pub(super) const IDE: &[Property] = &[
    ("bios-chs-trans", Word(&["auto", "none", "lba", "large", "rechs"])),
    ("model", Text),
    ("rotation_rate", Number),
    ("unit", Number),
    ("ver", Text),
    ("win2k-install-hack", Switch),
    ("wwn", Number),
];

pub(super) const VIRTIO_BLK: &[Property] = &[
    ("config-wce", Switch),
    ("discard", Switch),
    ("iothread", Id),
    ("max-discard-sectors", Number),
    ("max-write-zeroes-sectors", Number),
    ("num-queues", Number),
    ("queue-size", Number),
    ("report-discard-granularity", Switch),
    ("request-merging", Switch),
    ("scsi", Off),
    ("seg-max-adjust", Switch),
    ("write-zeroes", Switch),
    ("x-enable-wce-if-config-wce", Switch),
];

pub(super) const VIRTIO_SCSI: &[Property] = &[
    ("cmd_per_lun", Number),
    ("hotplug", Switch),
    ("iothread", Id),
    ("max_sectors", Number),
    ("num_queues", Number),
    ("param_change", Switch),
    ("seg_max_adjust", Switch),
    ("virtqueue_size", Number),
];

pub(super) const NIC: &[Property] = &[("mac", Mac), ("netdev", Id)];

pub(super) const VIRTIO_NET: &[Property] = &[
    ("csum", Switch),
    ("ctrl_guest_offloads", Switch),
    ("ctrl_mac_addr", Switch),
    ("ctrl_rx", Switch),
    ("ctrl_rx_extra", Switch),
    ("ctrl_vlan", Switch),
    ("ctrl_vq", Switch),
    ("duplex", Word(&["half", "full"])),
    ("failover", Off),
    ("gso", Switch),
    ("guest_announce", Switch),
    ("guest_csum", Switch),
    ("guest_ecn", Switch),
    ("guest_rsc_ext", Switch),
    ("guest_tso4", Switch),
    ("guest_tso6", Switch),
    ("guest_ufo", Switch),
    ("guest_uso4", Switch),
    ("guest_uso6", Switch),
    ("hash", Switch),
    ("host_ecn", Switch),
    ("host_mtu", Number),
    ("host_tso4", Switch),
    ("host_tso6", Switch),
    ("host_ufo", Switch),
    ("host_uso", Switch),
    ("mq", Switch),
    ("mrg_rxbuf", Switch),
    ("rsc_interval", Number),
    ("rss", Switch),
    ("rx_queue_size", Number),
    ("speed", Number),
    ("status", Switch),
    ("tx", Word(&["bh", "timer"])),
    ("tx_queue_size", Number),
    ("x-mtu-bypass-backend", Switch),
    ("x-txburst", Number),
    ("x-txtimer", Number),
];

pub(super) const VIRTIO_RNG: &[Property] = &[("max-bytes", Number), ("period", Number), ("rng", Id)];
pub(super) const VIRTIO_SERIAL: &[Property] = &[("emergency-write", Switch), ("max_ports", Number)];
pub(super) const INPUT: &[Property] =
    &[("display", Id), ("head", Number), ("serial", Text), ("wheel-axis", Switch)];
pub(super) const PORT: &[Property] = &[("chardev", Id), ("name", Text), ("nr", Number)];

pub(super) const INTEL_NIC: &[Property] = &[
    ("autonegotiation", Switch),
    ("disable_vnet_hdr", Number),
    ("extra_mac_registers", Switch),
    ("init-vet", Switch),
    ("migrate-timadj", Switch),
    ("migrate_tso_props", Switch),
    ("mitigation", Switch),
    ("subsys", Number),
    ("subsys_ven", Number),
];

pub(super) const DISPLAY: &[Property] = &[
    ("big-endian-framebuffer", Switch),
    ("edid", Switch),
    ("global-vmstate", Switch),
    ("mmio", Switch),
    ("qemu-extended-regs", Switch),
    ("refresh_rate", Number),
    ("vgamem", Size),
    ("vgamem_mb", Number),
    ("xmax", Number),
    ("xres", Number),
    ("ymax", Number),
    ("yres", Number),
];

pub(super) const BRIDGE: &[Property] = &[
    ("aer_log_max", Number),
    ("bus-reserve", Number),
    ("chassis", Number),
    ("chassis_nr", Number),
    ("disable-acs", Switch),
    ("hotplug", Switch),
    ("io-reserve", Size),
    ("mem-reserve", Size),
    ("msi", Auto),
    ("port", Number),
    ("power_controller_present", Switch),
    ("pref32-reserve", Size),
    ("pref64-reserve", Size),
    ("shpc", Switch),
    ("slot", Number),
    ("x-do-not-expose-native-hotplug-cap", Switch),
    ("x-migrate-msix", Switch),
    ("x-native-hotplug", Switch),
    ("x-pci-express-writeable-slt-bug", Switch),
    ("x-speed", Word(&["2_5", "5", "8", "16", "32", "64"])),
    ("x-width", Word(&["1", "2", "4", "8", "12", "16", "32"])),
];

pub(super) const USB_CONTROLLER: &[Property] = &[
    ("bandwidth", Number),
    ("conditional-intr-mapping", Switch),
    ("firstport", Number),
    ("force-pcie-endcap", Switch),
    ("intrs", Number),
    ("masterbus", Id),
    ("maxframes", Number),
    ("msi", Auto),
    ("msix", Auto),
    ("p2", Number),
    ("p3", Number),
    ("slots", Number),
    ("streams", Switch),
    ("superspeed-ports-first", Switch),
];

pub(super) const USB: &[Property] = &[
    ("attached", Switch),
    ("display", Id),
    ("head", Number),
    ("msos-desc", Switch),
    ("port", Place),
    ("serial", Text),
    ("usb_version", Number),
];

pub(super) const ISA_SERIAL: &[Property] = &[
    ("baudbase", Number),
    ("chardev", Id),
    ("index", Number),
    ("iobase", Number),
    ("irq", Number),
    ("wakeup", Switch),
];

pub(super) const ISA_PARALLEL: &[Property] =
    &[("chardev", Id), ("index", Number), ("iobase", Number), ("irq", Number)];
pub(super) const DEBUG_CONSOLE: &[Property] = &[("chardev", Id), ("iobase", Number), ("readback", Number)];
pub(super) const PCI_SERIAL: &[Property] = &[("chardev", Id), ("prog_if", Number)];
pub(super) const USB_REDIR: &[Property] = &[
    ("chardev", Id),
    ("debug", Number),
    ("filter", Text),
    ("streams", Switch),
    ("suppress-remote-wake", Switch),
];

pub(super) const IOMMU: &[Property] = &[
    ("aw-bits", Number),
    ("caching-mode", Switch),
    ("device-iotlb", Switch),
    ("dma-drain", Switch),
    ("dma-translation", Switch),
    ("eim", Auto),
    ("fs1gp", Switch),
    ("intremap", Auto),
    ("pt", Switch),
    ("snoop-control", Switch),
    ("stale-tm", Switch),
    ("version", Number),
    ("x-buggy-eim", Switch),
    ("x-flts", Switch),
    ("x-pasid-mode", Switch),
    ("x-scalable-mode", Switch),
];

pub(super) const HDA: &[Property] = &[("debug", Number), ("msi", Auto), ("old_msi_addr", Switch)];
pub(super) const HDA_CODEC: &[Property] =
    &[("audiodev", Id), ("cad", Number), ("debug", Number), ("mixer", Switch), ("use-timer", Switch)];
pub(super) const DIMM: &[Property] = &[("addr", Number), ("memdev", Id), ("node", Number), ("slot", Number)];
/// `prealloc` is left out when a VM is read: on the target pages come as they are needed.
pub(super) const VIRTIO_MEM: &[Property] = &[
    ("block-size", Size),
    ("dynamic-memslots", Switch),
    ("memaddr", Number),
    ("memdev", Id),
    ("node", Number),
    ("prealloc", Off),
    ("requested-size", Size),
    ("unplugged-inaccessible", Auto),
    ("x-early-migration", Switch),
];
pub(super) const DEBUG_EXIT: &[Property] = &[("iobase", Number), ("iosize", Number)];
pub(super) const PANIC: &[Property] = &[("events", Number), ("ioport", Number)];
pub(super) const GENERATION: &[Property] = &[("guid", Uuid)];
