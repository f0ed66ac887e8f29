//! Every device that QEMU has: it moves, or is refused for what it is.

mod common;

use common::{
    moved::{there, there_drawn},
    qemu_10,
};
use qemu::recipe::{Argument, check_argument};
use std::{collections::BTreeSet, process::Command};

/// Which QEMUs have all of a machine's devices.
#[derive(Clone, Copy, PartialEq)]
enum Of {
    Both,
    /// Version 7.2.
    Old,
    /// Version 10.
    New,
}

/// Of video cards.
const PICTURES: &[&str] = &[
    "-vga std",
    "-vga cirrus",
    "-vga virtio",
    "-vga vmware",
    "-vga qxl",
    "-vga none",
    "-vga none -device bochs-display",
    "-vga none -device ramfb",
    "-vga none -device cirrus-vga,id=c",
    "-device secondary-vga -device virtio-gpu-pci -device qxl",
    "-machine q35 -vga none -device virtio-vga,xres=1024,yres=768",
];

const BLANK: &str = "driver=null-co,read-zeroes=on,size=1048576,node-name=";

/// Machines, each with many devices, and devices that only QEMU 10 has.
fn machines() -> Vec<(Vec<String>, Of)> {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let blank = |n: u32| format!("-blockdev {BLANK}d{n}");
    let usb = "-machine q35 -nodefaults -device qemu-xhci,id=x,p2=15,p3=15 -device nec-usb-xhci,id=n \
               -device ich9-usb-ehci1,id=e,addr=1d.7,multifunction=on \
               -device ich9-usb-uhci1,masterbus=e.0,firstport=0,addr=1d.0,multifunction=on \
               -device ich9-usb-uhci2,masterbus=e.0,firstport=2,addr=1d.1,multifunction=on \
               -device ich9-usb-uhci3,masterbus=e.0,firstport=4,addr=1d.2,multifunction=on \
               -device usb-hub,id=hub,bus=x.0,port=1 -device usb-kbd,bus=x.0,port=1.1 \
               -device usb-mouse,bus=x.0,port=1.2 -device usb-tablet,bus=n.0 -device usb-ccid,bus=x.0,port=2 \
               -device usb-storage,drive=d1,id=stick,bus=x.0,port=3,removable=on \
               -device usb-bot,id=bot,bus=x.0,port=4 -device ipmi-bmc-sim,id=bmc -device pci-ipmi-bt,bmc=bmc";
    let old = "-machine pc -nodefaults -device piix3-usb-uhci,id=a -device piix4-usb-uhci \
               -device pci-ohci,num-ports=4 -device usb-ehci -device ich9-usb-ehci2 -device ich9-usb-uhci4 \
               -device ich9-usb-uhci5 -device ich9-usb-uhci6 -device usb-tablet,bus=a.0 -audiodev none,id=s \
               -device AC97,audiodev=s -device ES1370,audiodev=s -device sb16,audiodev=s \
               -device gus,audiodev=s,iobase=0x260 -device cs4231a,audiodev=s,iobase=0x538,dma=0 \
               -device intel-hda -device hda-duplex,audiodev=s -device hda-output,audiodev=s \
               -device hda-micro,audiodev=s";
    let managed = "-machine q35 -nodefaults -device i6300esb,id=w -device ib700 -watchdog-action pause \
                   -device pvpanic,events=1 -device pvpanic-pci \
                   -device ipmi-bmc-sim,id=bmc,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87 \
                   -device isa-ipmi-kcs,bmc=bmc -device vmcoreinfo -device vmgenid,guid=auto \
                   -object rng-builtin,id=r0 -device virtio-rng-pci,rng=r0,max-bytes=64,period=1000 \
                   -object rng-random,id=r1,filename=/dev/urandom -device virtio-rng-pci,rng=r1 \
                   -device isa-debug-exit \
                   -device isa-applesmc,osk=0123456789012345678901234567890123456789012345678901234567890123 \
                   -chardev null,id=c0 -device isa-debugcon,chardev=c0,iobase=0x402 -chardev null,id=c1 \
                   -device isa-parallel,chardev=c1 -chardev null,id=c2 -device isa-serial,chardev=c2,index=1 \
                   -chardev null,id=c3 -device pci-serial,chardev=c3 -device ich9-intel-hda \
                   -device virtio-keyboard-pci -device virtio-mouse-pci -device virtio-tablet-pci \
                   -device ich9-ahci,id=more";
    let bridges = "-machine q35,kernel-irqchip=split -nodefaults -device \
                   intel-iommu,intremap=on,caching-mode=on,device-iotlb=on \
                   -device pcie-root-port,id=p1,chassis=1,slot=1 -device ioh3420,id=p2,chassis=2,slot=2 \
                   -device x3130-upstream,id=up,bus=p1 \
                   -device xio3130-downstream,id=down,bus=up,chassis=3,slot=3 -device i82801b11-bridge,id=b1 \
                   -device pci-bridge,id=b2,bus=b1,chassis_nr=9,addr=1 -device pcie-pci-bridge,id=b3,bus=p2 \
                   -device pxb-pcie,id=px,bus_nr=0x40 -device pcie-root-port,id=p3,bus=px,chassis=4,slot=4 \
                   -device virtio-rng-pci,bus=down \
                   -device virtio-balloon-pci,bus=p3,deflate-on-oom=on,free-page-reporting=on \
                   -device ipmi-bmc-sim,id=bmc -device smbus-ipmi,bmc=bmc";
    let guarded = "-machine q35 -nodefaults -device virtio-iommu-pci,boot-bypass=on \
                   -device virtio-net-pci,iommu_platform=on,disable-legacy=on -object iothread,id=i \
                   -device virtio-serial-pci,id=v -chardev null,id=c \
                   -device virtserialport,chardev=c,name=org.qemu.guest_agent.0 -chardev null,id=cc \
                   -device virtconsole,chardev=cc -device virtio-blk-pci,drive=d1,id=blk,iothread=i";
    let scsi = "-machine pc -nodefaults -device pci-bridge-seat,id=b,chassis_nr=3 \
                -device pci-bridge,id=b4,chassis_nr=4 -device lsi53c895a,id=lsi,bus=pci.0 -device lsi53c810 \
                -device megasas,id=mega,hba_serial=1 -device megasas-gen2,bus=b4,addr=1 \
                -device mptsas1068,id=mpt -device pvscsi,id=pv -device am53c974 -device dc390 \
                -device virtio-scsi-pci,id=vs,num_queues=2 -device scsi-hd,drive=d1,bus=vs.0,id=h1 \
                -device scsi-hd,drive=d2,bus=lsi.0,id=h2 -device scsi-cd,drive=d3,bus=mega.0,id=h3 \
                -device scsi-hd,drive=d4,bus=mpt.0,id=h4 -device scsi-hd,drive=d5,bus=pv.0,id=h5 \
                -device ipmi-bmc-sim,id=bmc -device pci-ipmi-kcs,bmc=bmc";
    let storage = "-machine pc -nodefaults -device floppy,drive=d2,id=fd -device ich9-ahci,id=ah \
                   -device ide-hd,drive=d3,bus=ah.0,id=i3 -device ide-cd,drive=d4,bus=ide.0,id=i4 \
                   -device isa-ide,iobase=0x1e8,iobase2=0x3ee,irq=11 -device piix3-ide -device piix4-ide \
                   -device ipmi-bmc-sim,id=bmc -device isa-ipmi-bt,bmc=bmc";
    let cards = "-machine pc -nodefaults -device pci-bridge,id=b,chassis_nr=2 -device pcnet -device ne2k_pci \
                 -device vmxnet3 -device tulip -device i82550 -device i82551 -device i82557a -device i82557b \
                 -device i82557c -device i82558a -device i82558b -device i82559a -device i82559b \
                 -device i82559c -device i82559er -device i82562 -device i82801 -device e1000,bus=b,addr=1 \
                 -device e1000-82544gc,bus=b,addr=2 -device e1000-82545em,bus=b,addr=3 \
                 -device e1000e,bus=b,addr=4 -device rtl8139,bus=b,addr=5";
    let disks = |count: u32| (1..=count).map(blank).collect::<Vec<_>>().join(" ");
    let fixed = "-machine pc -device pxb,id=px,bus_nr=0x40 -m 64M,slots=2,maxmem=1G \
                 -object memory-backend-memfd,id=d,size=64M -device pc-dimm,memdev=d,id=dimm0 \
                 -object memory-backend-ram,id=e,size=64M \
                 -device virtio-mem-pci,bus=pci.0,memdev=e,id=m0,requested-size=32M,block-size=4M \
                 -nodefaults -device ne2k_isa -device virtio-net-pci-transitional,bus=pci.0";
    // Which of two blocks is whose cannot be told by their names: both travel with the device state.
    let alike = "-machine q35 -m 64M,slots=2,maxmem=1G -nodefaults -device VGA \
                 -object memory-backend-memfd,id=vga.vram,size=16M \
                 -device virtio-mem-pci,memdev=vga.vram,requested-size=4M";
    vec![
        (words(alike), Of::Both),
        (words(&format!("{usb} {}", disks(1))), Of::Both),
        (words(old), Of::Both),
        (words(managed), Of::Both),
        (words(bridges), Of::Both),
        (words(&format!("{guarded} {}", disks(1))), Of::Both),
        (words(&format!("{scsi} {}", disks(5))), Of::Both),
        (words(&format!("{storage} {}", disks(4))), Of::Both),
        (words(cards), Of::Both),
        (words(fixed), Of::Both),
        (words("-machine q35 -nodefaults -device igb"), Of::New),
        (words("-machine q35 -nodefaults -device sga"), Of::Old),
    ]
}

#[test]
fn i9_every_device_is_there_what_it_was() {
    let mut wrong = Vec::new();
    for ((words, of), qemu) in machines().into_iter().flat_map(|row| [(row.clone(), None), (row, qemu_10())])
    {
        let newer = qemu.is_some();
        if newer && of == Of::Old || !newer && of == Of::New {
            continue;
        }
        // QEMU itself does not start with what it would not migrate.
        let words: Vec<&str> = words.iter().map(String::as_str).chain(["-only-migratable"]).collect();
        if let Err(why) = there(&words, qemu) {
            wrong.push(format!("newer: {newer}, {words:?}: {why}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn i9_every_picture_is_there_what_it_was() {
    let mut wrong = Vec::new();
    for (row, qemu) in PICTURES.iter().flat_map(|row| [(row, None), (row, qemu_10())]) {
        // The one comes in another package there, the other's picture is carried from version 8.2 on.
        if qemu.is_some() && row.contains("qxl") || qemu.is_none() && row.contains("ramfb") {
            continue;
        }
        let words: Vec<&str> = row.split_whitespace().chain(["-only-migratable"]).collect();
        let moved = if *row == "-vga none" { there } else { there_drawn };
        if let Err(why) = moved(&words, qemu.clone()) {
            wrong.push(format!("{qemu:?} {row}: {why}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The devices of `-device help`. A QEMU that is only unpacked cannot list all: it looks for modules of the
/// installed one.
fn listed() -> BTreeSet<String> {
    let output = Command::new("qemu-system-x86_64").args(["-device", "help"]).output().unwrap();
    let list = String::from_utf8_lossy(&output.stdout).into_owned();
    list.lines()
        .filter_map(|line| line.strip_prefix("name \"")?.split('"').next())
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_device_moves_or_is_refused_for_what_it_is() {
    let verdict =
        |device: &str| check_argument(&Argument::new("-device", device), &[]).err().unwrap_or_default();
    let moved: BTreeSet<String> = machines()
        .into_iter()
        .flat_map(|(words, _)| words)
        .chain(PICTURES.iter().flat_map(|row| row.split_whitespace().map(str::to_owned)))
        // What -vga makes, and a place for a client's device.
        .chain(["usb-redir", "VGA", "cirrus-vga", "qxl-vga", "vmware-svga"].map(str::to_owned))
        .map(|word| word.split(',').next().unwrap_or_default().to_owned())
        .collect();
    let mut wrong = Vec::new();
    for device in listed() {
        // Virtio has the same devices on several buses.
        let stem = device.strip_suffix("-non-transitional").or(device.strip_suffix("-transitional"));
        let stem = stem.or(device.strip_suffix("-device").map(|_| device.as_str())).unwrap_or(&device);
        let on_pci = format!("{}-pci", stem.trim_end_matches("-device").trim_end_matches("-pci"));
        let why = verdict(&device);
        let is_vcpu = device.ends_with("-x86_64-cpu");
        // Moved by a story: `i9_a_tpm_goes_with_its_vm_and_is_at_one_place_only`.
        let is_tpm = device.starts_with("tpm-");
        if why.is_empty() {
            if !is_vcpu && !is_tpm && !moved.contains(&device) && !moved.contains(&on_pci) {
                wrong.push(format!("{device} is allowed, and no machine here has it"));
            }
        } else if why.contains("is not allowed") && !is_vcpu {
            wrong.push(format!("{device} is not known: {why}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
