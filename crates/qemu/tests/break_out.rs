//! A host of the workgroup that is hostile sends a VM: whatever it asks for, this host gives it what its own
//! configuration grants, and tells it nothing of the rest.

mod common;

use common::{ends::Folder, hand::has, host, preflight, recipe};
use qemu::{
    Host, Limits, Recipe,
    recipe::{Argument, FeatureWord, Net, Role, files},
};
use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

/// A host with something to protect, and a VM that is all right.
struct Bed {
    folder: Folder,
    host: Host,
    recipe: Recipe,
}

impl Bed {
    fn new() -> Self {
        let folder = Folder::new();
        let dir = |name: &str| folder.path().join(name);
        for name in ["disks", "boot", "secret", "disks-of-others"] {
            fs::create_dir(dir(name)).unwrap();
        }
        let (disk, kernel) = (dir("disks/web.img"), dir("boot/vmlinuz"));
        fs::write(&disk, vec![0; 1 << 20]).unwrap();
        fs::write(&kernel, "a kernel").unwrap();
        fs::write(dir("secret/key"), "a secret").unwrap();
        fs::write(dir("disks-of-others/web.img"), "another's").unwrap();
        let mut host = host(folder.path(), "run", None);
        let text = format!(
            "name = \"web\"\nmemory = \"64MiB\"\nkernel = {kernel:?}\n[[disk]]\npath = {disk:?}\nformat = \
             \"raw\"\n"
        );
        let recipe = recipe(&text, &host);
        host.limits = Limits { disks: vec![dir("disks")], boot: vec![dir("boot")], ..Limits::default() };
        Self { folder, host, recipe }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What this host says to the VM after `change`.
    fn reasons(&self, change: impl FnOnce(&mut Recipe)) -> Vec<String> {
        let mut recipe = self.recipe.clone();
        change(&mut recipe);
        preflight(&recipe, &self.host)
    }

    /// The same VM with one file more, as a hostile host would describe it: nothing that it says of it is
    /// wrong.
    fn with_file(&self, path: &Path, role: Role) -> Vec<String> {
        self.reasons(|recipe| {
            let mut file = files::look(path, role).unwrap();
            file.path = path.to_owned();
            recipe.files.push(file);
        })
    }

    fn with(&self, option: &str, value: &str) -> Vec<String> {
        self.reasons(|recipe| recipe.arguments.push(Argument::new(option, value)))
    }
}

#[test]
fn a_vm_that_stays_within_what_is_granted_is_taken() {
    let bed = Bed::new();
    assert_eq!(bed.reasons(|_| ()), Vec::<String>::new());
    let inner = bed.path("disks/inner");
    symlink(bed.path("disks"), &inner).unwrap();
    assert_eq!(
        bed.with_file(&inner.join("web.img"), Role::Disk),
        Vec::<String>::new(),
        "links within are fine"
    );
}

#[test]
fn files_elsewhere_are_neither_opened_nor_told_of() {
    let bed = Bed::new();
    let secret = bed.path("secret/key");
    for (path, role) in [
        (secret.clone(), Role::Boot),
        (secret.clone(), Role::Disk),
        (secret.clone(), Role::Backing),
        // Each directory is for its own kind.
        (bed.path("boot/vmlinuz"), Role::Disk),
        (bed.path("disks/web.img"), Role::Boot),
        // It begins like an allowed one.
        (bed.path("disks-of-others/web.img"), Role::Disk),
        ("/etc/passwd".into(), Role::Boot),
        ("//etc/passwd".into(), Role::Boot),
        ("/etc/./passwd".into(), Role::Boot),
    ] {
        let reasons = bed.with_file(&path, role);
        assert_eq!(reasons.len(), 1, "{path:?}: {reasons:#?}");
        has(&reasons, "is not among what this host grants");
    }
    // Whether there is such a file, and what is in it, makes no difference to the answer.
    let guess = |path: &Path, digest: &str| {
        let reasons = bed.reasons(|recipe| {
            let mut file = files::look(&secret, Role::Boot).unwrap();
            (file.path, file.digest) = (path.to_owned(), Some(digest.to_owned()));
            recipe.files.push(file);
        });
        reasons[0].replace(&path.display().to_string(), "FILE")
    };
    let digest = files::look(&secret, Role::Boot).unwrap().digest.unwrap();
    assert_eq!(guess(&secret, &digest), guess(&secret, "0"));
    assert_eq!(guess(&secret, &digest), guess(&bed.path("secret/no such file"), "0"));
}

#[test]
fn shown_text_is_short_and_no_order_to_a_terminal() {
    let bed = Bed::new();
    let word =
        |register: &str| FeatureWord { eax: 1, ecx: None, register: register.to_owned(), bits: u32::MAX };
    assert_eq!(bed.reasons(|recipe| recipe.cpu_features.push(word("EDX"))), Vec::<String>::new());
    for bad in [&"E".repeat(1 << 20), "E\u{1b}[2J", ""] {
        let reasons = bed.reasons(|recipe| recipe.cpu_features.push(word(bad)));
        has(&reasons, "is no CPU register");
        assert!(reasons.iter().all(|why| why.len() < 300 && !why.contains(char::is_control)), "{reasons:?}");
    }
    let disk = bed.path("disks/web.img");
    let reasons = bed.reasons(|recipe| {
        let mut file = files::look(&disk, Role::Disk).unwrap();
        file.path = bed.path("disks/\u{1b}[2J");
        recipe.files.push(file);
    });
    has(&reasons, "is no plain absolute path");
    // However much is wrong, a person is told what a person can read.
    let reasons = bed.reasons(|recipe| recipe.machine = format!("q35{}", ",x=y".repeat(100_000)));
    assert!(reasons.len() <= 100, "{}", reasons.len());
}

#[test]
fn paths_that_climb_or_lead_out_are_refused() {
    let bed = Bed::new();
    let climbing = bed.path("disks/../secret/key");
    has(&bed.with_file(&climbing, Role::Disk), "no plain absolute path");
    symlink(bed.path("secret/key"), bed.path("disks/link.img")).unwrap();
    symlink(bed.path("secret"), bed.path("disks/dir")).unwrap();
    symlink("disks/dir/key", bed.path("hop")).unwrap();
    symlink(bed.path("hop"), bed.path("disks/twice")).unwrap();
    for link in ["disks/link.img", "disks/dir/key", "disks/twice"] {
        has(&bed.with_file(&bed.path(link), Role::Disk), "is not shown to be the file that the source uses");
    }
    let outside =
        ["/proc/self/environ", "//proc/self/environ", "/dev/fd/0", "/dev/fdset/3", "//dev//fdset/3"];
    for path in outside.into_iter().chain(["/sys/kernel/notes", "relative"]) {
        let reasons = bed.reasons(|recipe| recipe.files[0].path = path.into());
        has(&reasons, "no plain absolute path");
    }
}

#[test]
fn files_behind_an_image_are_granted_or_it_is_refused() {
    let bed = Bed::new();
    let image = |name: &str, backing: &str| {
        let path = bed.path(name);
        let mut make = Command::new("qemu-img");
        make.args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing]).arg(&path).arg("1M");
        assert!(make.status().unwrap().success());
        path
    };
    let within = image("disks/within.qcow2", "web.img");
    has(&bed.with_file(&within, Role::Disk), "web.img behind it here, and not at the source");
    let both = bed.reasons(|recipe| {
        recipe.files.push(files::look(&within, Role::Disk).unwrap());
        recipe.files.push(files::look(&bed.path("disks/web.img"), Role::Backing).unwrap());
    });
    assert_eq!(both, Vec::<String>::new());
    let secret = bed.path("secret/key").display().to_string();
    // The sender does not mention what is behind them.
    for backing in [&secret[..], "../secret/key"] {
        let reasons = bed.with_file(&image("disks/out.qcow2", backing), Role::Disk);
        has(&reasons, "the backing file");
        has(&reasons, "is not among what this host grants");
    }
    image("disks/chain.qcow2", "out.qcow2");
    let chain = bed.path("disks/chain.qcow2");
    has(&bed.with_file(&chain, Role::Disk), "behind it here, and not at the source");
    let mentioned = bed.reasons(|recipe| {
        recipe.files.push(files::look(&chain, Role::Disk).unwrap());
        recipe.files.push(files::look(&bed.path("disks/out.qcow2"), Role::Backing).unwrap());
    });
    has(&mentioned, "is not among what this host grants");
    for backing in
        ["nbd://127.0.0.1/x", "file:/etc/passwd", "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}"]
    {
        has(&bed.with_file(&image("disks/out.qcow2", backing), Role::Disk), "no plain file");
    }
}

#[test]
fn an_image_says_what_is_behind_it_or_is_refused() {
    let bed = Bed::new();
    // A text whose format QEMU finds out by its content, and in which it reads names of files that it opens.
    let lists = bed.path("disks/lists.vmdk");
    let secret = bed.path("secret/key");
    fs::write(&lists, format!("# Disk DescriptorFile\nversion=1\nRW 8 FLAT {secret:?} 0\n")).unwrap();
    let image = |name: &str| bed.path("disks").join(name);
    let make = |name: &str| {
        let mut make = Command::new("qemu-img");
        make.args(["create", "-q", "-u", "-f", "qcow2", "-F", "vmdk", "-b", "lists.vmdk"])
            .arg(image(name))
            .arg("1M");
        assert!(make.status().unwrap().success());
        fs::read(image(name)).unwrap()
    };
    has(
        &bed.with_file(&image_of(make("said.qcow2"), &image("said.qcow2")), Role::Disk),
        "is of the format vmdk",
    );
    // Nothing said: the extension is made one that nobody knows.
    let mut bytes = make("unsaid.qcow2");
    let at = bytes.windows(4).position(|word| word == 0xe279_2aca_u32.to_be_bytes()).unwrap();
    bytes[at..at + 4].copy_from_slice(&0x7777_7777_u32.to_be_bytes());
    has(
        &bed.with_file(&image_of(bytes, &image("unsaid.qcow2")), Role::Disk),
        "is of a format that the image does not say",
    );
}

/// Writes an image, and says where.
fn image_of(bytes: Vec<u8>, path: &Path) -> PathBuf {
    fs::write(path, bytes).unwrap();
    path.to_owned()
}

#[test]
fn options_that_open_or_execute_are_refused_in_any_spelling() {
    let bed = Bed::new();
    let (disk, secret) = (bed.path("disks/web.img"), bed.path("secret/key"));
    let (disk, secret) = (disk.display(), secret.display());
    let refused = [
        // Another file than the VM's, in an option that names one.
        ("-kernel", format!("{secret}")),
        ("-initrd", format!("{disk}")),
        ("-drive", format!("file={secret},format=raw,if=none,id=x")),
        ("-drive", format!("file={disk},format=raw,if=none,id=x,file={secret}")),
        ("-drive", format!("file={disk},,{secret},format=raw,if=none,id=x")),
        ("-drive", format!("file={disk},format=raw,if=none,id=x,file.filename={secret}")),
        ("-drive", format!("file={disk},format=raw,if=none,id=x,backing.file.filename={secret}")),
        ("-drive", format!("file={disk},if=none,id=x")),
        ("-drive", format!("file={disk},format=vmdk,if=none,id=x")),
        ("-blockdev", format!("driver=file,node-name=x,filename={secret}")),
        ("-blockdev", format!("driver=file,node-name=x,filename={disk},filename={secret}")),
        (
            "-blockdev",
            format!("driver=qcow2,node-name=x,file=file0,backing.driver=file,backing.filename={secret}"),
        ),
        ("-blockdev", format!("driver=qcow2,node-name=x,file=file0,data-file.filename={secret}")),
        ("-blockdev", "driver=host_device,node-name=x,filename=/dev/sda".to_owned()),
        ("-blockdev", format!("{{\"driver\":\"file\",\"node-name\":\"x\",\"filename\":\"{secret}\"}}")),
        // Protocols.
        ("-drive", format!("file=file:{secret},format=raw")),
        ("-drive", "file=nbd://127.0.0.1/x,format=raw".to_owned()),
        ("-drive", "file=json:{\"driver\":\"file\"},format=raw".to_owned()),
        ("-drive", "file=fat:rw:/etc,format=raw".to_owned()),
        ("-blockdev", "driver=nbd,node-name=x,server.type=inet,server.host=a,server.port=1".to_owned()),
        ("-blockdev", "driver=ssh,node-name=x,server.host=a,path=/".to_owned()),
        // A device's own files, wherever the driver's name stands.
        ("-device", format!("virtio-net-pci,romfile={secret}")),
        ("-device", format!("romfile={secret},driver=virtio-net-pci")),
        ("-device", format!("driver=virtio-net-pci,romfile={secret},romfile=")),
        ("-device", "vfio-pci,host=01:00.0".to_owned()),
        ("-device", "virtio-9p-pci,fsdev=f,mount_tag=x".to_owned()),
        ("-device", "loader,file=/etc/passwd".to_owned()),
        ("-device", "virtio-net-pcix,vhostfd=3".to_owned()),
        ("-device", "usb-host,hostdevice=/dev/bus/usb/001/001".to_owned()),
        ("-device", "{\"driver\":\"VGA\",\"romfile\":\"/etc/passwd\"}".to_owned()),
        ("-device", "virtio-net-pci,file=/etc/passwd".to_owned()),
        ("-device", format!("usb-tablet,pcap={secret}")),
        ("-device", "isa-serial,chardev=whimbrel-qmp".to_owned()),
        ("-audiodev", format!("wav,id=a,path={secret}")),
        ("-initrd", format!("{},{secret}", bed.path("boot/vmlinuz").display())),
        ("-global", "VGA.romfile=passwd".to_owned()),
        ("-global", "driver=VGA,property=romfile,value=passwd".to_owned()),
        ("-global", "driver=migration,property=send-configuration,value=on".to_owned()),
        ("-boot", "splash=passwd".to_owned()),
        ("-smbios", "file=/etc/passwd".to_owned()),
        ("-smbios", "type=11,path=/etc/passwd".to_owned()),
        ("-object", "rng-random,id=r,filename=/etc/passwd".to_owned()),
        ("-object", "rng-random,filename=/dev/urandom,id=r,filename=/etc/passwd".to_owned()),
        ("-object", "iothread,id=i,qom-type=memory-backend-file,mem-path=/etc/passwd".to_owned()),
        ("-object", "iothread,id=i,mem-path=/etc/passwd".to_owned()),
        ("-object", "rng-builtin,id=r,filename=/dev/urandom".to_owned()),
        ("-object", "secret,id=s,file=/etc/passwd".to_owned()),
        ("-overcommit", "mem-lock=on".to_owned()),
        ("-overcommit", "cpu-pm=on,mem-lock".to_owned()),
        ("-overcommit", "x=/etc/passwd".to_owned()),
        // Character devices.
        ("-chardev", "null,id=/etc/passwd".to_owned()),
        ("-chardev", "file,id=c,path=/tmp/x".to_owned()),
        ("-chardev", "null,id=c,logfile=/tmp/x".to_owned()),
        ("-chardev", "null,id=c,backend=pipe,path=/tmp/x".to_owned()),
        ("-chardev", "socket,id=c,host=1.2.3.4,port=1".to_owned()),
        ("-serial", "file:/tmp/x".to_owned()),
        ("-serial", "tcp:1.2.3.4:1".to_owned()),
        ("-monitor", "unix:/tmp/x,server".to_owned()),
        // Options that are not for the sender to give, and some that look like those that are.
        ("-incoming", "exec:sh".to_owned()),
        ("-netdev", "tap,id=t,script=/tmp/x".to_owned()),
        ("-nic", "user,smb=/etc".to_owned()),
        ("-fsdev", "local,id=f,path=/,security_model=none".to_owned()),
        ("-virtfs", "local,path=/,mount_tag=x,security_model=none".to_owned()),
        ("-bios", "/etc/passwd".to_owned()),
        ("-pflash", "/etc/passwd".to_owned()),
        ("-dtb", "/etc/passwd".to_owned()),
        ("-L", "/tmp".to_owned()),
        ("-D", "/tmp/x".to_owned()),
        ("-pidfile", "/tmp/x".to_owned()),
        ("-readconfig", "/tmp/x".to_owned()),
        ("-plugin", "/tmp/x.so".to_owned()),
        ("-gdb", "tcp::1234".to_owned()),
        ("-qmp", "tcp:0.0.0.0:1".to_owned()),
        ("-runas", "root".to_owned()),
        ("-chroot", "/tmp".to_owned()),
        ("-tpmdev", "passthrough,id=t,path=/dev/tpm0".to_owned()),
        ("--kernel", format!("{}", bed.path("boot/vmlinuz").display())),
        ("-kernel ", format!("{}", bed.path("boot/vmlinuz").display())),
        ("-Device", "VGA".to_owned()),
        ("-device\n-bios", "/etc/passwd".to_owned()),
        ("", "x".to_owned()),
    ];
    for (option, value) in refused {
        let reasons = bed.with(option, &value);
        assert_eq!(reasons.len(), 1, "{option} {value}: {reasons:#?}");
    }
    // The same list lets what is harmless pass.
    for (option, value) in [
        ("-device", "virtio-rng-pci,id=r".to_owned()),
        ("-boot", "order=c,strict=on".to_owned()),
        ("-global", "virtio-net-pci.mq=on".to_owned()),
        ("-object", "rng-random,id=r,filename=/dev/urandom".to_owned()),
        ("-drive", format!("file={disk},format=raw,if=none,id=x")),
    ] {
        assert_eq!(bed.with(option, &value), Vec::<String>::new(), "{option} {value}");
    }
}

#[test]
fn what_else_a_recipe_names_cannot_become_an_option_or_a_path() {
    let bed = Bed::new();
    for name in ["../web", "a/b", "web\n-bios", "web,process=x", "", "-S", "web\0", "..", &"x".repeat(64)] {
        has(&bed.reasons(|recipe| recipe.name = name.to_owned()), "the VM's name");
    }
    type Change = fn(&mut Recipe);
    let changes: [(Change, &str); 9] = [
        (|r| r.machine = "pc-q35-7.2,firmware=/etc/passwd".to_owned(), "firmware"),
        (|r| r.machine = "kernel=/etc/passwd,type=q35".to_owned(), "machine \"\" is not allowed"),
        (|r| r.machine.push_str(",memory-backend=x"), "memory-backend"),
        (|r| r.cpu = "qemu64 -bios /etc/passwd".to_owned(), "-cpu"),
        (|r| r.smp = "1\n".to_owned(), "-smp"),
        (|r| r.memory[0].id = "ram0,mem-path=/etc/passwd".to_owned(), "memory block id"),
        (|r| r.memory[0].id = "../ram0".to_owned(), "memory block id"),
        (|r| r.nets.push(Net::new("n0,script=/tmp/x", "br0")), "network id"),
        (|r| r.nets.push(Net::new("n0", "br0 master x")), "no name of a bridge"),
    ];
    for (change, says) in changes {
        has(&bed.reasons(change), says);
    }
}

#[test]
fn the_sender_cannot_choose_the_program() {
    let recipe = Bed::new().recipe;
    let mut value = serde_json::to_value(&recipe).unwrap();
    for field in ["qemu_path", "program", "emulator", "env"] {
        value[field] = "/tmp/evil".into();
        serde_json::from_value::<Recipe>(value.clone()).unwrap_err();
        value.as_object_mut().unwrap().remove(field);
    }
    assert_eq!(serde_json::from_value::<Recipe>(value).unwrap(), recipe);
}

#[test]
fn a_host_can_grant_less_than_what_is_harmless() {
    let mut bed = Bed::new();
    bed.host.limits.devices = Some(vec!["virtio-blk-*".to_owned(), "virtio-net-pci".to_owned()]);
    assert_eq!(bed.reasons(|_| ()), Vec::<String>::new());
    has(&bed.with("-device", "VGA"), "the device VGA is not among what this host grants");
    has(&bed.with("-device", "id=x,driver=VGA"), "the device VGA is not among what this host grants");
    bed.host.limits.options = Some(["-kernel", "-vga", "-blockdev", "-device"].map(str::to_owned).to_vec());
    assert_eq!(bed.reasons(|_| ()), Vec::<String>::new());
    has(&bed.with("-append", "quiet"), "-append is not among what this host grants");
    bed.host.limits.bridges = Some(vec!["guests".to_owned()]);
    let plugged = |r: &mut Recipe| r.nets.push(Net::new("n0", "mgmt"));
    has(&bed.reasons(plugged), "the bridge mgmt is not among what this host grants");
    bed.host.limits = Limits::default();
    has(&bed.reasons(|_| ()), "the disk");
    has(&bed.reasons(|_| ()), "the boot file");
}
