//! What is said of a command line.

use super::*;

#[test]
fn disks_are_handed_on_as_qemu_wants_them_written() {
    let folder = std::env::temp_dir().join(format!("whimbrel-disks-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let image = folder.join("a,b.img");
    std::fs::write(&image, [0; 512]).unwrap();
    let drive = "file=a,,b.img,format=raw,if=none,id=d,readonly=off";
    let node = "file,node-name=n,filename=a,,b.img";
    let argv = ["qemu", "-nodefaults", "-drive", drive, "-blockdev", node].map(str::to_owned);
    let Read { recipe, reasons, .. } = read(&argv, &Names::In(&folder));
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(reasons, Vec::<String>::new());
    let path = options::escape(&image.to_string_lossy());
    let values: Vec<_> = recipe.arguments.iter().filter_map(|a| a.value.as_deref()).collect();
    assert_eq!(
        values,
        [
            format!("file={path},format=raw,if=none,id=d,readonly=off"),
            format!("file,node-name=n,filename={path}")
        ]
    );
    for argument in &recipe.arguments {
        assert_eq!(crate::recipe::check_argument(argument, &recipe.files), Ok(()));
    }
}

/// What is refused of a QEMU started with these words.
fn refused(words: &[&str]) -> Vec<String> {
    let argv: Vec<String> =
        ["qemu", "-nodefaults"].iter().chain(words).map(|word| (*word).to_owned()).collect();
    let Read { reasons, lost, .. } = read(&argv, &Names::In(Path::new("/")));
    reasons.into_iter().chain(lost.into_iter().map(|(_, why)| why)).collect()
}

#[test]
fn each_refusal_says_why_and_what_would_mend_it() {
    let table: &[(&[&str], &str, &str)] = &[
        (&["-netdev", "vhost-user,id=n,chardev=c"], "another process writes", "use -netdev tap on a bridge"),
        (&["-netdev", "vhost-vdpa,id=n"], "another process writes", "use -netdev tap on a bridge"),
        (&["-object", "memory-backend-epc,id=m,size=64M"], "memory-backend-epc", "use memory-backend-memfd"),
        (
            &[
                "-machine",
                "q35,confidential-guest-support=sev0",
                "-object",
                "sev-guest,id=sev0,cbitpos=47,reduced-phys-bits=1",
            ],
            "encrypted for this host's processor (sev-guest)",
            "without confidential-guest-support",
        ),
        (&["-object", "tdx-guest,id=tdx0"], "(tdx-guest)", "without confidential-guest-support"),
        (&["-tpmdev", "passthrough,id=t"], "TPM t (passthrough) is this host's", "use a swtpm"),
        (&["-snapshot"], "a file of this host", "leave it out"),
    ];
    for (words, why, mend) in table {
        let reasons = refused(words);
        assert_eq!(reasons.len(), 1, "{words:?}: {reasons:#?}");
        assert!(reasons[0].contains(why) && reasons[0].contains(mend), "{words:?}: {reasons:#?}");
    }
    for vhost in ["off", "on"] {
        let netdev = format!("tap,id=n,ifname=t0,vhost={vhost}");
        assert_eq!(refused(&["-netdev", &netdev]), Vec::<String>::new());
    }
}

#[test]
fn what_a_machine_usually_has_and_other_dialects_are_understood() {
    let words = |words: &[&str]| -> Vec<String> { words.iter().map(|word| (*word).to_owned()).collect() };
    let all = [
        "qemu",
        "/disk.img",
        "-cdrom",
        "/a,b.iso",
        "-netdev",
        "user,id=u,net=10.1.0.0/24,hostfwd=tcp::22-:22",
        "-nographic",
    ];
    let read = read(&words(&all), &Names::In(Path::new("/")));
    assert_eq!(read.reasons, Vec::<String>::new());
    assert!(read.recipe.defaults && read.recipe.console == crate::recipe::Console::File);
    assert_eq!(read.recipe.machine, "pc,graphics=off");
    let said: Vec<_> =
        read.recipe.arguments.iter().filter_map(|argument| argument.value.as_deref()).collect();
    assert_eq!(
        said,
        [
            "index=0,media=disk,file=/disk.img",
            "index=2,media=cdrom,file=/a,,b.iso",
            "user,net=10.1.0.0/24,id=u"
        ]
    );
    assert!(
        read.notes.iter().any(|note| note.contains("hostfwd=tcp::22-:22 stays behind")),
        "{:#?}",
        read.notes
    );
}

/// As each of them starts VMs, without what is refused of itself.
#[test]
fn what_is_said_around_a_machine_is_passed_on_or_told() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("ign"), "{}").unwrap();
    let argv = [
        "qemu",
        "-nodefaults",
        // Proxmox
        "-id",
        "100",
        "-pidfile",
        "/p",
        "-boot",
        "menu=on,splash=/s.jpg,strict=on",
        "-iscsi",
        "initiator-name=x",
        // libvirt
        "-name",
        "guest=a,debug-threads=on",
        "-overcommit",
        "mem-lock=off",
        "-object",
        r#"{"qom-type":"secret","id":"s","format":"raw","file":"/x"}"#,
        "-audiodev",
        r#"{"id":"audio1","driver":"spice"}"#,
        "-add-fd",
        "set=0,fd=3,opaque=x",
        "-sandbox",
        "on,spawn=deny",
        "-msg",
        "timestamp=on",
        "-spice",
        "port=5900,addr=127.0.0.1",
        // people
        "-fw_cfg",
        "name=opt/com.coreos/config,file=ign",
        "-action",
        "panic=none,reboot=shutdown",
        "-watchdog-action",
        "none",
        "-icount",
        "shift=auto,sleep=off,rr=record,rrfile=/r",
        "-usbdevice",
        "tablet",
        "-display",
        "gtk,gl=on",
    ]
    .map(str::to_owned);
    let Read { recipe, reasons, notes, .. } = read(&argv, &Names::In(folder.path()));
    assert_eq!(reasons, Vec::<String>::new());
    assert_eq!(recipe.screen, Screen::Vnc);
    let said: Vec<_> = recipe.arguments.iter().filter_map(|argument| argument.value.clone()).collect();
    let file = folder.path().join("ign").display().to_string();
    assert_eq!(
        said,
        [
            "menu=on,strict=on".to_owned(),
            "none,id=audio1".to_owned(),
            format!("opt/com.coreos/config,file={file}"),
            "panic=none,reboot=shutdown".to_owned(),
            "none".to_owned(),
            "auto,sleep=off".to_owned(),
            "tablet".to_owned(),
        ]
    );
    for argument in &recipe.arguments {
        assert_eq!(crate::recipe::check_argument(argument, &recipe.files), Ok(()), "{argument:?}");
    }
    for says in ["splash=/s.jpg", "sound (", "SPICE (", "rrfile=/r", "the display (-display gtk"] {
        assert!(notes.iter().any(|note| note.contains(says)), "{says}: {notes:#?}");
    }
}

#[test]
fn several_machine_options_are_one() {
    for (words, machine) in [
        (&["-machine", "smm=off,type=q35"][..], "q35,smm=off"),
        (&["-nographic", "-M", "q35,usb=off"], "q35,graphics=off,usb=off"),
        (&["-M", "q35,usb=on", "-machine", "usb=off,accel=tcg"], "q35,usb=off"),
        (&["-M", "pc", "-M", "type=pc+pve0"], "pc+pve0"),
    ] {
        let argv: Vec<String> = ["qemu"].iter().chain(words).map(|word| (*word).to_owned()).collect();
        assert_eq!(read(&argv, &Names::In(Path::new("/"))).recipe.machine, machine);
    }
}
