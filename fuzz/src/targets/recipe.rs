use crate::input::Input;
use qemu::{
    Accel, Limits, Recipe,
    recipe::{
        Argument, Backing, Chardev, ChardevKind, Console, FeatureWord, MemoryBlock, Net, Paths, Role, Screen,
        SeenFile, check, check_argument, options,
    },
    virtio::Features,
};
use std::path::PathBuf;

/// A byte says whether a recipe follows, or the value of one option.
pub(crate) fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    match input.u8() % 4 {
        0 | 1 => recipe(input.rest()),
        2 => {
            let option = input.one_of(&OPTIONS);
            let Ok(value) = std::str::from_utf8(input.rest()) else { return false };
            let argument = Argument::new(option, value);
            let good = check_argument(&argument, &files()).is_ok();
            if good {
                names_no_other_file(&argument, &files());
            }
            good
        }
        _ => std::str::from_utf8(input.rest()).is_ok_and(syntax),
    }
}

const OPTIONS: [&str; 12] = [
    "-device",
    "-blockdev",
    "-drive",
    "-object",
    "-chardev",
    "-global",
    "-smbios",
    "-kernel",
    "-serial",
    "-boot",
    "-overcommit",
    "-numa",
];

/// Options are read as they were written.
fn syntax(text: &str) -> bool {
    let parsed = options::parse(text, "driver");
    let plain = |key: &String| !key.is_empty() && !key.contains([',', '=']);
    if !parsed.iter().all(|(key, _)| plain(key)) {
        return false;
    }
    assert_eq!(options::parse(&options::join(&parsed, "driver"), "driver"), parsed, "{text:?}");
    true
}

fn recipe(json: &[u8]) -> bool {
    let Ok(recipe) = serde_json::from_slice::<Recipe>(json) else { return false };
    let wrong = check(&recipe);
    // They go back to the peer, and to terminals.
    assert!(
        wrong.len() <= 100 && wrong.iter().all(|why| why.len() < 3000 && !why.contains(char::is_control)),
        "{wrong:?}"
    );
    if !wrong.is_empty() {
        return false;
    }
    let again = serde_json::to_vec(&recipe).expect("it can be written");
    assert_eq!(serde_json::from_slice::<Recipe>(&again).expect("it can be read"), recipe);
    assert!((1..=1024).contains(&recipe.vcpus()) && recipe.memory_bytes() > 0);
    let nothing = Limits { options: Some(vec![]), devices: Some(vec![]), ..Limits::default() };
    assert!(recipe.arguments.is_empty() || !qemu::fuzz::granted(&recipe, &nothing).is_empty());
    for incoming in [false, true] {
        let argv = recipe.argv(&Paths::default(), incoming);
        assert!(argv.iter().all(|word| !word.contains('\0')), "{argv:?}");
    }
    for argument in &recipe.arguments {
        names_no_other_file(argument, &recipe.files);
    }
    true
}

/// Whatever an option says that was found good, QEMU is told of no file that the recipe does not name.
/// Written without a list of what is allowed: what looks like a path must be one of them.
fn names_no_other_file(argument: &Argument, files: &[SeenFile]) {
    let (option, value) = (argument.option.as_str(), argument.value.as_deref().unwrap_or_default());
    // The guest's own words, and numbers and words for it: QEMU opens nothing by them.
    if option == "-append" {
        return;
    }
    if matches!(option, "-kernel" | "-initrd") {
        assert!(files.iter().any(|file| file.path.to_str() == Some(value)), "{option} {value}");
        return;
    }
    // The value of a global property goes on to the end, commas and all.
    let parts = match value.split_once('=').filter(|_| option == "-global") {
        Some((key, value)) => vec![(key.to_owned(), value.to_owned())],
        None => options::parse(value, ""),
    };
    for (key, value) in parts {
        let key = key.rsplit('.').next().unwrap_or_default();
        // Options whose words all stand for numbers and modes have no files.
        let opens = !matches!(option, "-numa" | "-rtc" | "-uuid" | "-k" | "-boot")
            && matches!(
                key,
                "file"
                    | "filename"
                    | "path"
                    | "romfile"
                    | "mem-path"
                    | "logfile"
                    | "script"
                    | "downscript"
                    | "fd"
            );
        let looks_like_a_path = value.contains('/') && !matches!(option, "-device" | "-global" | "-smbios");
        if (opens && !value.is_empty()) || looks_like_a_path {
            let named = files.iter().any(|file| file.path.to_str() == Some(value.as_str()));
            let random = option == "-object" && matches!(value.as_str(), "/dev/urandom" | "/dev/random");
            // The id of another node.
            let node = option == "-blockdev" && key == "file" && !value.contains(['/', ':']);
            assert!(named || random || node, "{option} {key}={value}");
        }
    }
}

fn files() -> Vec<SeenFile> {
    let file = |path: &str, role, digest: Option<&str>| SeenFile {
        path: path.into(),
        role,
        bytes: 1 << 20,
        device: 3,
        inode: 7,
        digest: digest.map(str::to_owned),
    };
    vec![
        file("/shared/web1.img", Role::Disk, None),
        file("/shared/base.qcow2", Role::Backing, None),
        file("/boot/vmlinuz", Role::Boot, Some("00000000deadbeef")),
    ]
}

/// As `whimbrel run` makes them, and as `adopt` does.
fn recipes() -> Vec<Recipe> {
    let memory = |id: &str, backing| MemoryBlock { id: id.into(), bytes: 1 << 30, backing };
    let ours = Recipe {
        name: "web1".into(),
        cpu: "qemu64,+ssse3".into(),
        smp: "2".into(),
        memory: vec![memory("ram0", Backing::Memfd)],
        main_memory: Some("ram0".into()),
        nets: vec![Net::new("net0", "br0")],
        console: Console::File,
        files: files(),
        arguments: vec![
            Argument::new("-kernel", "/boot/vmlinuz"),
            Argument::new("-append", "console=ttyS0 root=/dev/vda"),
            Argument::new("-vga", "none"),
            Argument::new(
                "-blockdev",
                "driver=file,node-name=file0,filename=/shared/web1.img,locking=on,aio=threads",
            ),
            Argument::new("-blockdev", "driver=raw,node-name=disk0,file=file0"),
            Argument::new("-device", "virtio-blk-pci,id=blk0,drive=disk0"),
            Argument::new("-device", "virtio-net-pci,id=nic0,netdev=net0,mac=52:54:00:12:34:56,romfile="),
        ],
        cpu_features: vec![FeatureWord { eax: 7, ecx: Some(0), register: "EBX".into(), bits: 5 }],
        virtio: vec![Features { device: "nic0".into(), names: vec!["VIRTIO_NET_F_MAC".into()] }],
        chardevs: vec![
            Chardev::new("charchannel0", ChardevKind::Socket),
            Chardev { mux: true, logged: true, ..Chardev::new("c1", ChardevKind::Pty) },
        ],
        screen: Screen::Vnc,
        tpm: Some(qemu::Tpm { id: "tpm0".into(), version: qemu::TpmVersion::V2 }),
        ..Recipe::of("pc-q35-7.2,smm=off")
    };
    let theirs = Recipe {
        machine: "microvm,pic=off,pit=off".into(),
        accel: Accel::Kvm,
        cpu: "host".into(),
        smp: "cores=2,threads=2,sockets=1".into(),
        memory_options: Some("size=2G,slots=4,maxmem=8G".into()),
        memory: vec![memory("m0", Backing::File), memory("m1", Backing::Memfd)],
        main_memory: None,
        nets: vec![],
        console: Console::None,
        arguments: vec![
            Argument { option: "-no-reboot".into(), value: None },
            Argument::new("-numa", "node,memdev=m0"),
            Argument::new("-rtc", "base=utc"),
            Argument::new("-drive", "file=/shared/web1.img,format=qcow2,if=none,id=d,cache=writeback"),
            Argument::new("-object", "rng-random,id=rng0,filename=/dev/urandom"),
            Argument::new("-chardev", "null,id=c0"),
            Argument::new("-global", "kvm-pit.lost_tick_policy=delay"),
            Argument::new("-smbios", "type=1,serial=a/b"),
        ],
        ..ours.clone()
    };
    vec![ours, theirs]
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for recipe in recipes() {
        let json = serde_json::to_vec(&recipe).expect("it can be written");
        seeds.push([&[0], &*json].concat());
        for argument in recipe.arguments {
            let Some(value) = argument.value else { continue };
            if let Some(option) = OPTIONS.iter().position(|option| *option == argument.option) {
                seeds.push([&[2, option as u8], value.as_bytes()].concat());
            }
            if !value.starts_with('/') {
                seeds.push([&[3], value.as_bytes()].concat());
            }
        }
    }
    let escaped = options::escape(&PathBuf::from("/shared/a,b.img").to_string_lossy());
    seeds.push([&[3], format!("driver=file,filename={escaped}").as_bytes()].concat());
    seeds
}
