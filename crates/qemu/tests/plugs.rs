//! Devices of every kind that can be plugged in: on the target each is what it was, with all its properties.

mod common;

use common::{moved::there_plugged, qemu_10};
use serde_json::{Value, json};

/// What is plugged in, in the words of the command line; on a disk of its own where it has one.
type Row = (&'static str, &'static [&'static str]);

/// Machines that begin with a few places, and what is plugged in there.
const MACHINES: &[Row] = &[
    (
        "-machine pc -nodefaults -smp 1,maxcpus=4 -m 64M,slots=4,maxmem=1G \
         -device qemu-xhci,id=usb,p2=8,p3=8",
        &[
            "-object rng-builtin,id=dice",
            "-object iothread,id=thread,poll-max-ns=7",
            "-object memory-backend-ram,id=m1,size=64M",
            "-object memory-backend-memfd,id=m2,size=64M,share=on",
            "-object memory-backend-ram,id=m3,size=64M",
            "pc-dimm,id=dimm1,memdev=m1",
            "virtio-mem-pci,id=vmem,memdev=m3,requested-size=16777216",
            "pc-dimm,id=dimm2,memdev=m2,slot=3",
            "qemu64-x86_64-cpu,id=cpu2,socket-id=0,core-id=2,thread-id=0",
            "virtio-rng-pci,id=rng,rng=dice,max-bytes=64,period=1000",
            "virtio-scsi-pci,id=scsi,iothread=thread,num_queues=2",
            "scsi-hd,id=h1,bus=scsi.0,drive=DISK,serial=one,wwn=12345",
            "scsi-cd,id=h2,bus=scsi.0,drive=DISK,scsi-id=5,lun=1",
            "scsi-cd,id=empty,bus=scsi.0",
            "virtio-blk-pci,id=b1,drive=DISK,werror=stop,logical_block_size=4096,physical_block_size=4096",
            "virtio-blk-pci,id=b2,drive=DISK,addr=15.1,multifunction=on,num-queues=3,bootindex=3",
            "virtio-blk-pci,drive=DISK,addr=15.0,multifunction=on,config-wce=off",
            "virtio-net-pci,id=n1,mac=52:54:00:00:00:01,mq=on,vectors=6,romfile=,guest_tso4=off",
            "e1000,id=n2,mac=52:54:00:00:00:02",
            "rtl8139,id=n3,mac=52:54:00:00:00:03",
            "virtio-serial-pci,id=serial,max_ports=4",
            "virtserialport,id=p1,bus=serial.0,chardev=CHARDEV,name=org.one",
            "virtconsole,id=p2,bus=serial.0,chardev=CHARDEV,nr=3",
            "virtio-balloon-pci,id=balloon,free-page-reporting=on",
            "usb-hub,id=hub,bus=usb.0",
            "usb-tablet,id=tablet,bus=usb.0,port=1.2",
            "usb-kbd,id=keys,bus=usb.0",
            "usb-storage,id=stick,bus=usb.0,drive=DISK,removable=on",
            "i6300esb,id=watchdog",
            "pvscsi,id=other",
            "scsi-hd,id=h3,bus=other.0,drive=DISK",
            "virtio-keyboard-pci,id=vk",
            "nec-usb-xhci,id=usb2",
            "usb-mouse,id=mouse,bus=usb2.0",
        ],
    ),
    (
        "-machine q35 -nodefaults -device pcie-root-port,id=rp1,chassis=1 \
         -device pcie-root-port,id=rp2,chassis=2 -device pcie-root-port,id=rp3,chassis=3 \
         -device pcie-root-port,id=rp4,chassis=4 -device pcie-root-port,id=rp5,chassis=5",
        &[
            "virtio-net-pci,id=n1,bus=rp1,mac=52:54:00:00:00:01,host_mtu=1400,rx_queue_size=512",
            "e1000e,id=n2,bus=rp2,mac=52:54:00:00:00:02",
            "virtio-blk-pci,id=b1,bus=rp3,drive=DISK",
            "qemu-xhci,id=usb,bus=rp4",
            "usb-tablet,id=tablet,bus=usb.0",
            "virtio-balloon-pci,id=balloon,bus=rp5,deflate-on-oom=on",
        ],
    ),
];

/// The commands that plug it in.
fn commands(n: usize, words: &str) -> Vec<(&'static str, Value)> {
    let (command, kind, words) = match words.strip_prefix("-object ") {
        Some(words) => ("object-add", "qom-type", words),
        None => ("device_add", "driver", words),
    };
    let mut made = Vec::new();
    let mut arguments = json!({});
    for (at, part) in words.split(',').enumerate() {
        let (key, value) = if at == 0 { (kind, part) } else { part.split_once('=').unwrap() };
        arguments[key] = match value {
            "DISK" => {
                let name = format!("late{n}");
                made.push((
                    "blockdev-add",
                    json!({ "driver": "null-co", "node-name": name, "size": 1 << 20, "read-zeroes": true }),
                ));
                json!(name)
            }
            "CHARDEV" => {
                let name = format!("late{n}");
                let backend = json!({ "type": "null", "data": {} });
                made.push(("chardev-add", json!({ "id": name, "backend": backend })));
                json!(name)
            }
            // Objects take numbers, devices take words, too.
            "64M" => json!(64 << 20),
            "on" => json!(true),
            "off" => json!(false),
            number if number.parse::<u64>().is_ok() => json!(number.parse::<u64>().unwrap()),
            word => json!(word),
        };
    }
    made.push((command, arguments));
    made
}

#[test]
fn i9_every_device_that_was_plugged_in_is_what_it_was() {
    let mut wrong = Vec::new();
    for ((words, plugged), qemu) in MACHINES.iter().flat_map(|row| [(row, None), (row, qemu_10())]) {
        let words: Vec<&str> = words.split_whitespace().collect();
        let commands: Vec<_> = plugged.iter().enumerate().flat_map(|(n, words)| commands(n, words)).collect();
        if let Err(why) = there_plugged(&words, &commands, qemu.clone()) {
            wrong.push(format!("{qemu:?} {}: {why}", words[1]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
