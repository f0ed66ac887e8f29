//! What passes and what does not, option by option.

use super::*;
use std::path::PathBuf;

type Check = fn(&str) -> Result<(), String>;

fn verdict(option: &str, value: &str) -> Result<(), String> {
    let file = |path: &str, role| SeenFile {
        path: PathBuf::from(path),
        role,
        bytes: 1,
        device: 1,
        inode: 1,
        digest: None,
    };
    let files = [file("/d/a.img", Role::Disk), file("/b/k", Role::Boot), file("/b/a,/b/k", Role::Boot)];
    check_argument(&Argument::new(option, value), &files)
}

#[test]
fn what_ordinary_vms_say_is_allowed() {
    for (option, value) in [
        ("-device", "virtio-net,netdev=net0,mac=52:54:00:12:34:56,romfile="),
        ("-device", "virtio-net-pci-non-transitional,netdev=n,mq=on,vectors=6,bus=pci.1,addr=0x0,rombar=0"),
        ("-device", "virtio-blk-pci,drive=disk0,id=blk0,serial=WD 1,write-cache=on,werror=stop,iothread=i0"),
        ("-device", "virtio-blk-device,drive=disk0"),
        ("-device", "pcie-root-port,port=16,chassis=1,id=pci.1,bus=pcie.0,multifunction=on,addr=0x2"),
        (
            "-device",
            "scsi-hd,bus=scsi0.0,channel=0,scsi-id=0,lun=1,drive=d,wwn=0x5000c50015ea71ac,product=A B",
        ),
        ("-device", "qemu-xhci,p2=15,p3=15,id=usb"),
        ("-device", "usb-tablet,id=input0,bus=usb.0,port=1"),
        ("-device", "isa-serial,chardev=charserial0,id=serial0,index=0"),
        ("-device", "vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"),
        ("-device", "pc-dimm,memdev=mem1,id=dimm1,node=0"),
        ("-device", "hda-duplex,bus=sound0.0,cad=0,audiodev=audio1"),
        ("-device", "VGA,vgamem_mb=16,edid=on"),
        ("-audiodev", "none,id=audio1"),
        ("-global", "kvm-pit.lost_tick_policy=delay"),
        ("-global", "ICH9-LPC.disable_s3=1"),
        ("-global", "cfi.pflash01.secure=on"),
        ("-global", "virtio-mmio.force-legacy=false"),
        ("-global", "VGA.edid=off"),
        ("-object", "iothread,id=i0,poll-max-ns=0"),
        ("-object", "rng-random,id=r,filename=/dev/urandom"),
        ("-object", "throttle-group,id=g,x-iops-total=100,x-bps-read-max-length=7,x-iops-size=4096"),
        ("-blockdev", "driver=throttle,node-name=t,throttle-group=g,file=n"),
        ("-bios", "/b/k"),
        ("-boot", "menu=on,strict=on"),
        ("-boot", "cdn"),
        ("-rtc", "base=utc,driftfix=slew"),
        ("-numa", "node,nodeid=0,cpus=0-1,cpus=4,memdev=ram0"),
        ("-numa", "dist,src=0,dst=1,val=20"),
        ("-smbios", "type=1,manufacturer=Acme,product=A/B,uuid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"),
        ("-smbios", "type=11,value=a=b,value=c,,d"),
        ("-overcommit", "cpu-pm=on"),
        ("-chardev", "ringbuf,id=c,size=64K"),
        ("-serial", "chardev:serial1"),
        ("-parallel", "chardev:p"),
        ("-net", "nic,netdev=n,model=virtio,macaddr=52:54:00:12:34:56"),
        ("-icount", "shift=7,align=off"),
        ("-action", "panic=exit-failure,watchdog=inject-nmi"),
        ("-fw_cfg", "name=opt/x,string=hello"),
        ("-fw_cfg", "opt/x,file=/b/k"),
        ("-acpitable", "sig=SLIC,file=/b/k"),
        ("-acpitable", "sig=SLIC,data=/b/k"),
        ("-acpitable", "data=/b/k:/b/k"),
        ("-smbios", "file=/b/k"),
        ("-device", "isa-debugcon,iobase=0xe9,chardev=c"),
        ("-device", "pci-serial,chardev=c"),
        ("-uuid", "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"),
        ("-k", "en-us"),
        ("-vga", "std"),
        ("-append", "root=/dev/vda1 quiet,x"),
        ("-append", "{a}"),
        ("-kernel", "/b/k"),
        ("-drive", "file=/d/a.img,format=qcow2,if=none,id=d,cache=writeback,throttling.iops-total=100"),
        ("-drive", "if=none,id=cd,media=cdrom,readonly"),
        ("-blockdev", "file,node-name=f,filename=/d/a.img,locking=on,aio=threads"),
        ("-blockdev", "driver=qcow2,node-name=q,file.driver=file,file.filename=/d/a.img,discard=unmap"),
    ] {
        assert_eq!(verdict(option, value), Ok(()), "{option} {value}");
    }
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    for (option, value, says) in [
        // Properties that open something, and others that nobody has looked at.
        ("-device", "usb-tablet,pcap=/any/file", "property pcap=/any/file is not allowed"),
        ("-device", "usb-kbd,pcap=x", "pcap=x"),
        (
            "-device",
            "virtio-net-pci,romfile=/etc/shadow",
            "romfile=/etc/shadow is not allowed: it must be empty",
        ),
        ("-device", "virtio-net-pci,romfile=,romfile=x", "romfile=x"),
        ("-device", "virtio-net-pci,ebpf-rss-fds=3", "ebpf-rss-fds"),
        ("-device", "virtio-net-pci,vhostfd=3", "vhostfd"),
        ("-device", "virtio-net-pci,failover=on", "failover=on is not allowed: it must be off"),
        ("-device", "nvme,drive=d,serial=x", "QEMU does not migrate it"),
        ("-device", "ipmi-bmc-sim,sdrfile=/x", "sdrfile=/x"),
        ("-device", "virtio-vga,blob=on", "blob=on is not allowed: it must be off"),
        ("-device", "scsi-hd,drive=d,share-rw=on", "share-rw=on is not allowed: it must be off"),
        ("-device", "virtio-blk-pci,drive=d,scsi=on", "scsi=on"),
        ("-device", "qemu-xhci,host=/machine", "host"),
        ("-device", "virtio-blk-pci,x-data-plane=on", "x-data-plane"),
        ("-device", "virtio-blk-pci,iothread-vq-mapping.0.iothread=i", "iothread-vq-mapping.0.iothread"),
        ("-device", "ich9-ahci,ahci[0]=x", "ahci[0]"),
        ("-device", "virtio-rng-pci,virtio-backend=/machine", "virtio-backend"),
        // Known ones of another device.
        ("-device", "virtio-rng-pci,netdev=n", "netdev=n"),
        ("-device", "virtio-blk-device,drive=d,addr=1", "addr=1"),
        // Values of another form.
        ("-device", "virtio-blk-pci,drive=/dev/sda", "drive=/dev/sda is not allowed: it must be an id"),
        ("-device", "isa-serial,chardev=whimbrel-qmp", "whimbrel-qmp"),
        ("-device", "virtio-net-pci,netdev=n,mac=/etc", "it must be a MAC address"),
        ("-device", "VGA,addr=../x", "it must be an address"),
        ("-device", "VGA,xres=/etc", "it must be a number"),
        ("-device", "virtio-blk-pci,drive=d,serial=a\nb", "control characters"),
        // Ways of writing.
        ("-device", "VGA,id=a,id=b", "it is there twice"),
        ("-device", "VGA,driver=virtio-rng-pci", "it is there twice"),
        ("-device", "VGA,,romfile=x", "device  is not allowed"),
        ("-device", "VGA,=x", "=x is not allowed"),
        ("-device", "VGA,romfile =x", "romfile =x"),
        ("-device", "VGA,noedid", "noedid"),
        ("-device", "virtio-net-pcix", "device virtio-net-pcix"),
        ("-device", "virtio-net-pci-", "device virtio-net-pci-"),
        ("-global", "usb-tablet.pcap=/any/file", "usb-tablet.pcap is not allowed"),
        ("-global", "VGA.romfile=x", "VGA.romfile must be empty"),
        ("-global", "virtio-pci.romfile=x", "virtio-pci.romfile must be empty"),
        ("-global", "vfio-pci.host=1", "vfio-pci.host is not allowed"),
        ("-global", "VGA.id=x", "VGA.id is not allowed"),
        ("-global", "migration.send-configuration=on", "migration.send-configuration is not allowed"),
        ("-global", "scsi-hd.share-rw=on", "must be off"),
        ("-global", "driver=VGA,property=romfile,value=x", "driver.property=value"),
        ("-object", "rng-random,id=r,filename=/dev/hwrng", "filename=/dev/hwrng"),
        ("-object", "rng-egd,id=r,chardev=c", "rng-egd"),
        ("-object", "filter-dump,id=f,netdev=n,file=/x", "filter-dump"),
        ("-object", "iothread,id=i,poll-max-ns=/x", "it must be a number"),
        ("-audiodev", "wav,id=a,path=/x", "it must be one of none"),
        ("-audiodev", "none,id=a,out.try-poll=on", "out.try-poll"),
        ("-boot", "splash=/x", "splash"),
        ("-rtc", "base=/x", "base=/x"),
        ("-numa", "node,memdev=/x", "memdev=/x"),
        ("-numa", "evil,memdev=x", "type evil"),
        ("-smbios", "type=11,path=/x", "path=/x is not allowed"),
        ("-smbios", "file=/x", "not among the recipe's boot files"),
        ("-bios", "/d/a.img", "not among the recipe's boot files"),
        ("-global", "virtio-mem-pci.memdev=m0", "is not allowed"),
        ("-object", "throttle-group,id=g,x-path=7", "x-path=7 is not allowed"),
        ("-object", "throttle-group,id=g,x-iops-total=/x", "it must be a number"),
        ("-blockdev", "driver=throttle,node-name=t,throttle-group=/g,file=n", "it must be an id"),
        ("-smbios", "type=99,value=x", "table \"99\" is not known"),
        ("-smbios", "type=1,type=11,path=/x", "path=/x"),
        ("-overcommit", "mem-lock=on", "mem-lock=on"),
        ("-chardev", "null,id=c,logfile=/x", "logfile=/x"),
        ("-chardev", "socket,id=c,path=/x,server=on", "null and ringbuf"),
        ("-chardev", "socket,id=c,host=h,port=1", "null and ringbuf"),
        ("-chardev", "pty,id=c,path=/x", "null and ringbuf"),
        ("-chardev", "file,id=c,path=/x", "null and ringbuf"),
        ("-device", "pci-serial-2x,chardev1=c", "device pci-serial-2x"),
        ("-serial", "unix:/x,server", "it must be one of none, null"),
        ("-serial", "tcp:h:1", "it must be one of none, null"),
        ("-serial", "chardev:whimbrel-qmp", "whimbrel-"),
        ("-serial", "chardev:a,path=/x", "it must be an id"),
        ("-parallel", "/dev/parport0", "it must be one of none, null"),
        ("-vnc", ":0", "this option is not allowed"),
        ("-spice", "port=1", "this option is not allowed"),
        ("-nic", "tap,ifname=x,script=/x", "it must be one of none"),
        ("-net", "tap,script=/x", "script=/x"),
        ("-net", "nic,model=vfio-pci", "model=vfio-pci"),
        ("-net", "socket,connect=h:1", "connect=h:1"),
        ("-add-fd", "fd=0,set=1", "this option is not allowed"),
        ("-readconfig", "/x", "this option is not allowed"),
        ("-icount", "shift=1,rr=record,rrfile=/x", "rr=record"),
        ("-fw_cfg", "name=opt/x,file=/etc/shadow", "not among the recipe's boot files"),
        ("-fw_cfg", "name=opt/x,file=/b/k,file=/etc/shadow", "several files"),
        ("-acpitable", "data=/etc/shadow", "not among the recipe's boot files"),
        ("-acpitable", "sig=X,data=/b/k:/etc/shadow", "not among the recipe's boot files"),
        ("-acpitable", "sig=X,file=/b/k:/etc/shadow", "not among the recipe's boot files"),
        ("-acpitable", "file=/b/k,data=/x", "several files"),
        ("-smbios", "type=1,file=/b/k", "type=1 is not allowed"),
        ("-chardev", "null,id=whimbrel-qmp", "whimbrel-qmp"),
        ("-uuid", "/x", "no UUID"),
        ("-k", "passwd", "it must be one of ar"),
        ("-vga", "cg3", "it must be one of none, std"),
        ("-initrd", "/b/a,/b/k", "a list; rename the file"),
        ("-initrd", "/b/k x", "a list; rename the file"),
        ("-kernel", "/b/k,x", "not among the recipe's boot files"),
        ("-drive", "file=/d/a.img,format=raw,file.filename=/d/a.img", "file.filename"),
        ("-drive", "file=/d/a.img,format=raw,snapshot=on", "snapshot=on"),
        ("-drive", "file=/d/a.img,format=raw,throttling.file=/x", "throttling.file"),
        ("-drive", "file=/d/a.img,file=/d/a.img,format=raw", "two files"),
        ("-blockdev", "driver=file,filename=/d/a.img,file.filename=/d/a.img,node-name=f", "two files"),
        ("-blockdev", "driver=file,filename=/d/a.img,pr-manager=p", "pr-manager"),
        ("-blockdev", "driver=qcow2,file=f,backing=b", "backing=b"),
        ("-blockdev", "driver=qcow2,file=f,data-file=b", "data-file=b"),
        ("-blockdev", "driver=qcow2,file=f,encrypt.format=aes", "encrypt.format"),
        ("-blockdev", "driver=qcow2,file.file.driver=file", "file.file.driver"),
        ("-blockdev", "driver=file,filename=/d/a.img,locking=off", "locking=off"),
        ("-blockdev", "driver=file,filename=/d/a.img,force-share=on", "force-share"),
        ("-set", "device.a.romfile=x", "this option is not allowed"),
        ("-netdev", "tap,id=n", "it must be one of user"),
        ("-netdev", "user,id=n,hostfwd=tcp::22-:22", "hostfwd=tcp::22-:22"),
        ("-netdev", "user,id=n,smb=/etc", "smb=/etc"),
        ("-netdev", "user,id=n,tftp=/etc", "tftp=/etc"),
        ("-netdev", "user,id=n,guestfwd=tcp:10.0.2.1:1-cmd:sh", "guestfwd="),
    ] {
        let why = verdict(option, value).expect_err(&format!("{option} {value}"));
        assert!(why.contains(says), "{option} {value}\n  got  {why}\n  want {says}");
    }
}

#[test]
fn machines_and_processors_are_words() {
    let taken: &[(Check, &[&str])] = &[
        (
            machine,
            &["q35", "pc-q35-7.2,smm=off", "microvm,pcie=on,rtc=off", "pc,usb=off,hpet=off,vmport=auto"],
        ),
        (
            cpu,
            &[
                "qemu64",
                "host,-vmx,+avx2,migratable=on",
                "max,model-id=A (R) CPU @ 2.4GHz,hv-spinlocks=0x1fff",
            ],
        ),
        (smp, &["2", "cpus=2,sockets=1,cores=2,threads=1,maxcpus=4"]),
        (memory, &["1G", "size=1048576k,slots=4,maxmem=4G"]),
    ];
    for (check, values) in taken {
        for value in *values {
            assert_eq!(check(value), Ok(()), "{value}");
        }
    }
    let refused: &[(Check, &[&str])] = &[
        (
            machine,
            &[
                "xenfv",
                "x-remote",
                "none",
                "isapc",
                "",
                "kernel=/x,type=q35",
                "q35,firmware=/x",
                "q35,dumpdtb=/x",
                "q35,memory-backend=x",
                "q35,accel=kvm",
                "q35,,smm=off",
                "q35,type=xenfv",
                "q35,smm=/x",
                "pc-q35-/x",
                "q35,boot.order=c",
            ],
        ),
        (cpu, &["", "qemu64 -bios x", "qemu64,,x", "qemu64,x=/etc", "/x", "a,b c"]),
        (smp, &["", "1\n", "cpus=a", "1,x=2", "1,,2"]),
        (memory, &["/x", "1G,mem-path=/x", "size=1G,size=2G"]),
    ];
    for (check, values) in refused {
        for value in *values {
            assert!(check(value).is_err(), "{value}");
        }
    }
}

#[test]
fn qemu_is_given_what_was_understood() {
    for (option, value, given) in [
        ("-device", "VGA,edid", "driver=VGA,edid=on"),
        ("-drive", "readonly,id=a,if=none", "readonly=on,id=a,if=none"),
        ("-smbios", "type=11,value=a=b,,c", "type=11,value=a=b,,c"),
        ("-object", "iothread,id=i", "qom-type=iothread,id=i"),
        ("-boot", "cdn", "order=cdn"),
        ("-append", "a,,b=c", "a,,b=c"),
        ("-global", "VGA.edid=on", "VGA.edid=on"),
        ("-global", "cfi.pflash01.secure=on", "driver=cfi.pflash01,property=secure,value=on"),
        ("-uuid", "x", "x"),
    ] {
        assert_eq!(written(&Argument::new(option, value)).as_deref(), Some(given), "{option} {value}");
    }
    assert_eq!(written(&Argument { option: "-usb".to_owned(), value: None }), None);
}
