//! VMs as people start them: each is adopted, and is on a host of its own what it was.

mod common;

use common::{ends::Folder, hand::ByHand, moved::there, qemu_10};
use qemu::Vm;
use std::{fs::File, path::Path, process::Command};

fn image(path: &Path, format: &str) {
    let made = Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(path).arg("16M").status();
    assert!(made.unwrap().success());
}

#[test]
fn i9_vms_as_people_start_them_are_what_they_were() {
    let folder = Folder::new();
    let (raw, qcow2, iso) =
        (folder.path().join("a.img"), folder.path().join("a.qcow2"), folder.path().join("a.iso"));
    image(&raw, "raw");
    image(&qcow2, "qcow2");
    File::create(&iso).unwrap().set_len(1 << 20).unwrap();
    let [raw, qcow2, iso] = [&raw, &qcow2, &iso].map(|path| path.to_str().unwrap());
    let (virtio, none) =
        (format!("file={raw},format=raw,if=virtio"), format!("file={qcow2},if=virtio,cache=none,aio=native"));
    let cd = format!("file={iso},media=cdrom,cache=none");
    let file = format!(
        r#"{{"driver":"file","filename":"{qcow2}","node-name":"f",
            "cache":{{"direct":true,"no-flush":false}}}}"#
    );
    let node = r#"{"driver":"qcow2","node-name":"n","file":"f","backing":null}"#;
    let card = r#"{"driver":"virtio-net-pci","netdev":"u","id":"nic0","mac":"52:54:00:12:34:57"}"#;
    let disk = r#"{"driver":"virtio-blk-pci","drive":"n","id":"disk0","write-cache":"on"}"#;
    let rows: &[&[&str]] = &[
        &["-hda", raw],
        &[raw],
        &["-machine", "q35", "-hda", qcow2, "-cdrom", iso, "-boot", "d"],
        &["-drive", &virtio, "-nographic"],
        &[
            "-machine",
            "q35",
            "-drive",
            &none,
            "-drive",
            &cd,
            "-netdev",
            "user,id=u,hostfwd=tcp:127.0.0.1:0-:22",
            "-device",
            card,
        ],
        &[
            "-machine",
            "q35",
            "-blockdev",
            &file,
            "-blockdev",
            node,
            "-device",
            disk,
            "-netdev",
            r#"{"type":"user","id":"u"}"#,
            "-device",
            card,
        ],
        &["-machine", "q35,usb=off", "-nodefaults", "-m", "64M", "-hdb", raw],
    ];
    all_there(rows);
}

/// Each on a QEMU of each version.
fn all_there(rows: &[&[&str]]) {
    let mut wrong = Vec::new();
    for (words, newer) in rows.iter().flat_map(|words| [(words, None), (words, qemu_10())]) {
        if let Err(why) = there(words, newer.clone()) {
            wrong.push(format!("{words:?}, {newer:?}: {why}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn i9_ports_and_networks_of_every_dialect_are_what_they_were() {
    let folder = Folder::new();
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(
        at("config"),
        "[device \"tablet\"]\n  driver = \"usb-tablet\"\n[boot-opts]\n menu = \"off\"\n",
    )
    .unwrap();
    std::fs::write(at("ign"), "{}").unwrap();
    let (serial, agent) = (
        format!("unix:{},server,nowait", at("s")),
        format!("socket,id=g,path={},server=on,wait=off", at("g")),
    );
    let (file, second, vnc) = (
        format!("file:{}", at("f")),
        format!("mon:unix:{},server=on,wait=off", at("t")),
        format!("unix:{}", at("v")),
    );
    let (ign, config) = (format!("name=opt/x,file={}", at("ign")), at("config"));
    let rows: &[&[&str]] = &[
        &["-serial", &serial, "-serial", "pty", "-serial", &second, "-parallel", &file, "-debugcon", &file],
        &[
            "-nodefaults",
            "-machine",
            "q35",
            "-chardev",
            &agent,
            "-chardev",
            "pty,id=p,mux=on",
            "-chardev",
            "null,id=n",
            "-device",
            "virtio-serial-pci,id=vs",
            "-device",
            "virtserialport,bus=vs.0,chardev=g,name=org.qemu.guest_agent.0,id=port0",
            "-device",
            "virtconsole,chardev=p,id=port1",
            "-device",
            r#"{"driver":"isa-serial","chardev":"p","id":"serial0","index":0}"#,
            "-device",
            "pci-serial,chardev=n",
            "-mon",
            "p",
            "-vnc",
            &vnc,
        ],
        &["-nic", "user,model=virtio-net-pci", "-nic", "user,model=e1000,mac=52:54:00:00:00:07,id=mine"],
        &["-net", "nic,model=rtl8139", "-net", "user"],
        &["-nic", "none", "-serial", "none", "-usb", "-usbdevice", "tablet"],
        &[
            "-readconfig",
            &config,
            "-usb",
            "-set",
            "device.tablet.serial=7",
            "-fw_cfg",
            &ign,
            "-action",
            "panic=none",
        ],
        &["-icount", "shift=7", "-global", "PIIX4_PM.disable_s3=1", "-rtc", "base=utc,clock=vm"],
    ];
    all_there(rows);
}

/// As they start VMs, without the devices that other rows are about.
#[test]
fn i9_the_lines_of_libvirt_and_proxmox_are_what_they_were() {
    let folder = Folder::new();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let disk = at("a.qcow2");
    image(Path::new(&disk), "qcow2");
    let text = "[device \"ehci\"]\n  driver = \"ich9-usb-ehci1\"\n  multifunction = \"on\"\n  bus = \
                \"pcie.0\"\n  addr = \"1d.7\"\n\n\
                [device \"uhci-1\"]\n  driver = \"ich9-usb-uhci1\"\n  multifunction = \"on\"\n  bus = \
                \"pcie.0\"\n  addr = \"1d.0\"\n  masterbus = \"ehci.0\"\n  firstport = \"0\"\n";
    std::fs::write(at("pve.cfg"), text).unwrap();
    let libvirt = format!(
        r#"-name guest=vm,debug-threads=on
        -object {{"qom-type":"secret","id":"masterKey0","format":"raw","data":"x"}}
        -machine q35,usb=off,vmport=off,smm=off,dump-guest-core=off,memory-backend=pc.ram,acpi=on
        -object {{"qom-type":"memory-backend-ram","id":"pc.ram","size":67108864}}
        -overcommit mem-lock=off -smp 1,sockets=1,dies=1,cores=1,threads=1
        -uuid 324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87 -no-user-config -nodefaults
        -rtc base=utc,driftfix=slew -global kvm-pit.lost_tick_policy=delay -no-shutdown
        -global ICH9-LPC.disable_s3=1 -global ICH9-LPC.disable_s4=1 -boot strict=on
        -device {{"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x2"}}
        -device {{"driver":"pcie-root-port","port":17,"chassis":2,"id":"pci.2","bus":"pcie.0","addr":"0x2.0x1"}}
        -device {{"driver":"pcie-root-port","port":18,"chassis":3,"id":"pci.3","bus":"pcie.0","addr":"0x2.0x2"}}
        -device {{"driver":"qemu-xhci","p2":15,"p3":15,"id":"usb","bus":"pci.2","addr":"0x0"}}
        -device {{"driver":"virtio-serial-pci","id":"virtio-serial0","bus":"pci.3","addr":"0x0"}}
        -blockdev {{"driver":"file","filename":"{disk}","node-name":"libvirt-1-storage","auto-read-only":true,"discard":"unmap"}}
        -blockdev {{"node-name":"libvirt-1-format","read-only":false,"discard":"unmap","driver":"qcow2","file":"libvirt-1-storage","backing":null}}
        -device {{"driver":"virtio-blk-pci","bus":"pci.1","addr":"0x0","drive":"libvirt-1-format","id":"virtio-disk0","bootindex":1}}
        -chardev pty,id=charserial0
        -device {{"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}}
        -chardev socket,id=charchannel0,path={channel},server=on,wait=off
        -device {{"driver":"virtserialport","bus":"virtio-serial0.0","nr":1,"chardev":"charchannel0","id":"channel0","name":"org.qemu.guest_agent.0"}}
        -chardev null,id=charchannel1
        -device {{"driver":"virtserialport","bus":"virtio-serial0.0","nr":2,"chardev":"charchannel1","id":"channel1","name":"com.redhat.spice.0"}}
        -device {{"driver":"usb-tablet","id":"input0","bus":"usb.0","port":"1"}}
        -chardev null,id=charredir0
        -device {{"driver":"usb-redir","chardev":"charredir0","id":"redir0","bus":"usb.0","port":"2"}}
        -audiodev {{"id":"audio1","driver":"none"}} -vnc unix:{vnc},audiodev=audio1
        -device {{"driver":"VGA","id":"video0","vgamem_mb":16,"bus":"pcie.0","addr":"0x1"}}
        -global ICH9-LPC.noreboot=off -watchdog-action reset
        -object {{"qom-type":"rng-random","id":"objrng0","filename":"/dev/urandom"}}
        -device {{"driver":"virtio-rng-pci","rng":"objrng0","id":"rng0","bus":"pcie.0","addr":"0x3"}}
        -msg timestamp=on"#,
        channel = at("channel"),
        vnc = at("vnc"),
    );
    let proxmox = format!(
        "-name vm,debug-threads=on -no-shutdown -chardev socket,id=event,path={event},server=on,wait=off \
         -mon chardev=event,mode=control -pidfile {pid} \
         -smbios type=1,uuid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87 -smp 1,sockets=1,cores=1,maxcpus=1 \
         -nodefaults -boot menu=on,strict=on,reboot-timeout=1000 -vnc unix:{vnc},password=on -cpu qemu64 \
         -readconfig {config} -device vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb88 \
         -device usb-tablet,id=tablet,bus=ehci.0,port=1 \
         -chardev socket,id=serial0,path={serial},server=on,wait=off -device isa-serial,chardev=serial0 \
         -device VGA,id=vga,bus=pcie.0,addr=0x1 -chardev socket,path={agent},server=on,wait=off,id=qga0 \
         -device virtio-serial,id=qga0,bus=pcie.0,addr=0x8 \
         -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0 \
         -iscsi initiator-name=iqn.1993-08.org.debian:01:x \
         -device virtio-scsi-pci,id=scsihw0,bus=pcie.0,addr=0x5 \
         -drive file={disk},if=none,id=drive-scsi0,discard=on,format=qcow2,cache=none,\
         aio=io_uring,detect-zeroes=unmap \
         -device scsi-hd,bus=scsihw0.0,scsi-id=0,drive=drive-scsi0,id=scsi0,rotation_rate=1,bootindex=100 \
         -netdev type=user,id=net0 \
         -device virtio-net-pci,mac=BC:24:11:00:00:01,netdev=net0,bus=pcie.0,addr=0x12,id=net0,\
         rx_queue_size=1024,tx_queue_size=256,host_mtu=1500 \
         -rtc driftfix=slew,base=localtime -machine smm=off,type=q35",
        event = at("event"),
        pid = at("pid"),
        vnc = at("vnc2"),
        config = at("pve.cfg"),
        serial = at("serial"),
        agent = at("agent"),
    );
    let lines = [libvirt, proxmox];
    let rows: Vec<Vec<&str>> = lines.iter().map(|line| line.split_whitespace().collect()).collect();
    all_there(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

/// A launcher opens the disks, and QEMU knows their descriptors only (libvirt).
#[test]
fn i6_a_disk_by_descriptor_is_found_by_what_it_leads_to() {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::new();
    let disk = folder.path().join("a.img");
    image(&disk, "raw");
    let launcher = folder.path().join("launcher");
    let text = format!("#!/bin/sh\nexec qemu-system-x86_64 \"$@\" 9<>{}\n", disk.display());
    std::fs::write(&launcher, text).unwrap();
    std::fs::set_permissions(&launcher, std::fs::Permissions::from_mode(0o755)).unwrap();
    let words = [
        "-m",
        "64M",
        "-add-fd",
        "set=3,fd=9,opaque=disk",
        "-blockdev",
        r#"{"driver":"file","filename":"/dev/fdset/3","node-name":"f"}"#,
        "-blockdev",
        "driver=raw,node-name=d,file=f",
        "-device",
        "virtio-blk-pci,drive=d,id=disk0",
    ];
    let hand = ByHand::start_with(launcher, &words);
    let vm = Vm::adopt("hand", &hand.qmp).unwrap().vm;
    let files: Vec<_> = vm.recipe().files.iter().map(|file| &file.path).collect();
    assert_eq!(files, [&disk]);
    let said: Vec<_> =
        vm.recipe().arguments.iter().filter_map(|argument| argument.value.as_deref()).collect();
    assert!(said.iter().any(|value| value.contains(disk.to_str().unwrap())), "{said:?}");
    assert!(!said.iter().any(|value| value.contains("fdset")), "{said:?}");
}
