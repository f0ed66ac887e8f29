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
        (
            &["-netdev", "tap,id=n,ifname=t0,vhost=on"],
            "the kernel writes the guest's memory",
            "use vhost=off",
        ),
        (&["-netdev", "tap,id=n,ifname=t0,vhostforce=on"], "the kernel writes", "use vhost=off"),
        (&["-netdev", "vhost-user,id=n,chardev=c"], "another process writes", "use -netdev tap on a bridge"),
        (&["-netdev", "vhost-vdpa,id=n"], "another process writes", "use -netdev tap on a bridge"),
        (&["-netdev", "tap,id=n,fd=7"], "given as a descriptor", "name its TAP with ifname="),
        (&["-netdev", "tap,id=n,vhostfds=7:8"], "given as a descriptor", "name its TAP with ifname="),
        (&["-netdev", "tap,id=n"], "does not name its TAP", "use ifname="),
        (&["-chardev", "socket,id=c,fd=7"], "given as a descriptor", "name a path"),
        (&["-chardev", "socket,id=c,path=/run/c"], "ends on this host", "use one of kind null or ringbuf"),
        (&["-add-fd", "fd=7,set=1"], "cannot be given this descriptor", "name a file instead"),
        (&["-overcommit", "mem-lock=on"], "every page of the target present", "leave it out"),
        (&["-realtime", "mlock=on"], "every page of the target present", "leave it out"),
        (&["-object", "memory-backend-epc,id=m,size=64M"], "memory-backend-epc", "use memory-backend-memfd"),
        (
            &["-object", "memory-backend-memfd,id=m,size=64M,share=on,hugetlb=on"],
            "huge pages (hugetlb=on)",
            "leave it out",
        ),
        (&["-snapshot"], "a file of this host", "leave it out"),
        (&["-serial", "stdio", "-serial", "pty"], "more than one serial port", "only the first"),
    ];
    for (words, why, mend) in table {
        let reasons = refused(words);
        assert_eq!(reasons.len(), 1, "{words:?}: {reasons:#?}");
        assert!(reasons[0].contains(why) && reasons[0].contains(mend), "{words:?}: {reasons:#?}");
    }
    assert_eq!(refused(&["-netdev", "tap,id=n,ifname=t0,vhost=off"]), Vec::<String>::new());
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
    assert!(read.recipe.defaults && read.recipe.console == Console::File);
    assert_eq!(read.recipe.machine, "pc,graphics=off");
    let said: Vec<_> =
        read.recipe.arguments.iter().filter_map(|argument| argument.value.as_deref()).collect();
    assert_eq!(
        said,
        [
            "index=0,media=disk,file=/disk.img",
            "index=2,media=cdrom,file=/a,,b.iso",
            "user,id=u,net=10.1.0.0/24"
        ]
    );
    assert!(
        read.notes.iter().any(|note| note.contains("hostfwd=tcp::22-:22 stays behind")),
        "{:#?}",
        read.notes
    );
}
