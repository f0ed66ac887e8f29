//! VM files with mistakes: where, what, and what would be right.

use qemu::{Host, VmFile, recipe::Argument};
use std::path::Path;

fn error(text: &str) -> String {
    VmFile::parse(text, Path::new("web1.toml")).unwrap_err().to_string()
}

const GOOD: &str = "name = \"web1\"\nmemory = \"1GiB\"\n";

#[test]
fn a_short_file_gets_sensible_defaults() {
    let file = VmFile::parse(GOOD, Path::new("web1.toml")).unwrap();
    assert_eq!((file.vcpus, file.memory.0, file.machine.as_str()), (1, 1 << 30, "q35"));
    let recipe = file.recipe(&Host::new("/run/none")).unwrap();
    assert_eq!(qemu::recipe::check(&recipe), Vec::<String>::new());
}

#[test]
fn each_mistake_is_told_with_its_place() {
    let table = [
        ("name = \"web1\"\n", "1:1: missing field `memory`"),
        ("name = \"web1\"\nmemory = 5\n", "2:10: invalid type: integer `5`, expected a string"),
        ("name = web1\n", "1:8: string values must be quoted"),
        (
            "name = \"-x\"\nmemory = \"1GiB\"",
            "1:8: the name \"-x\" is not usable: 1 to 63 letters, digits, '-', '_' or '.', \
          beginning with a letter or digit",
        ),
        (
            "name = \"a\"\nmemory = \"lots\"",
            "2:10: memory is a number with a unit, such as \"512MiB\" or \"4GiB\"",
        ),
        ("name = \"a\"\nmemory = \"1MiB\"", "2:10: memory must be between 16.0 MiB and 16.0 TiB"),
        ("name = \"a\"\nmemory = \"100000001\"", "2:10: memory must be a multiple of 4.0 KiB"),
        ("name = \"a\"\nmemory = \"1GiB\"\nvcpus = 0", "3:9: vcpus must be between 1 and 255"),
        (
            "name = \"a\"\nmemory = \"1GiB\"\n\n  machine = \"pc\"",
            "4:13: machine must be \"q35\", \"microvm\" or a versioned name such as \"pc-q35-7.2\"",
        ),
        ("name = \"a\"\nmemory = \"1GiB\"\nkernel = \"vmlinuz\"", "3:10: this path must be absolute"),
        ("name = \"a\"\nmemory = \"1GiB\"\ncmdline = \"x\"", "3:11: cmdline needs a kernel"),
        (
            "name = \"a\"\nmemory = \"1GiB\"\nmachine = \"microvm\"\nvga = \"std\"",
            "4:7: microvm has no VGA card; use machine = \"q35\"",
        ),
        (
            "name = \"a\"\nmemory = \"1GiB\"\nmachine = \"microvm\"",
            "3:11: microvm boots a kernel only; name one, or use machine = \"q35\"",
        ),
        (
            "name = \"a\"\nmemory = \"1GiB\"\nargs = [\"-device\", \"vfio-pci,host=1\"]",
            "3:9: -device vfio-pci,host=1: it is a device of this host, which cannot follow the VM; use a \
             virtio device",
        ),
        (
            "name = \"a\"\nmemory = \"1GiB\"\nargs = [\"x\"]",
            "3:9: \"x\" belongs to no option; an option begins with '-'",
        ),
        (
            "name = \"a\"\nmemory = \"1GiB\"\n[[net]]\nbridge = \"br0\"\nmac = \"53:54:00:00:00:01\"",
            "5:7: mac must be six bytes such as \"52:54:00:12:34:56\", the first one even",
        ),
        (
            "name = \"a\"\nmemory = \"1GiB\"\n[[disk]]\npath = \"/x\"\nformat = \"vmdk\"",
            "5:10: format must be \"raw\" or \"qcow2\"",
        ),
    ];
    for (text, told) in table {
        let got = error(text);
        assert!(
            got.starts_with(&format!("web1.toml:{told}")),
            "{text:?}\n  got  {got}\n  want web1.toml:{told}"
        );
    }
    let got = error("name = \"a\"\nmemory = \"1GiB\"\nmemroy = 1");
    assert!(got.starts_with("web1.toml:3:1: unknown field `memroy`, expected one of"), "{got}");
}

#[test]
fn files_that_are_not_there_are_all_named() {
    let text = format!(
        "{GOOD}kernel = \"/no/kernel\"\ninitrd = \"/no/initrd\"\n[[disk]]\npath = \"/no/disk\"\nformat = \
         \"raw\""
    );
    let file = VmFile::parse(&text, Path::new("web1.toml")).unwrap();
    let reasons = file.recipe(&Host::new("/run/none")).unwrap_err();
    assert_eq!(
        reasons,
        [
            "disk /no/disk: No such file or directory (os error 2)",
            "boot file /no/kernel: No such file or directory (os error 2)",
            "boot file /no/initrd: No such file or directory (os error 2)",
        ]
    );
}

#[test]
fn a_hostile_recipe_is_refused_in_full() {
    let file = VmFile::parse(GOOD, Path::new("web1.toml")).unwrap();
    let mut recipe = file.recipe(&Host::new("/run/none")).unwrap();
    let bad = [
        ("-device", "vfio-pci,host=01:00.0"),
        ("-device", "virtio-net-pci,netdev=net0,romfile=/etc/shadow"),
        ("-blockdev", "driver=file,node-name=a,filename=/etc/shadow"),
        ("-blockdev", "driver=nbd,node-name=a,host=evil"),
        ("-drive", "file=/etc/shadow,format=raw"),
        ("-chardev", "socket,id=a,path=/tmp/x"),
        ("-chardev", "null,id=a,logfile=/etc/passwd"),
        ("-object", "rng-random,id=a,filename=/etc/shadow"),
        ("-object", "secret,id=a,file=/etc/shadow"),
        ("-kernel", "/etc/shadow"),
        ("-netdev", "tap,id=x,script=/bin/evil"),
        ("-monitor", "stdio"),
        ("-serial", "file:/etc/passwd"),
        ("-readconfig", "/etc/evil"),
        ("-D", "/etc/passwd"),
        ("-global", "migration.send-configuration=on"),
        ("-device", "{\"driver\":\"vfio-pci\"}"),
        ("-smbios", "file=/etc/shadow"),
        ("-boot", "splash=/etc/shadow"),
    ];
    recipe.arguments = bad.iter().map(|(option, value)| Argument::new(option, *value)).collect();
    recipe.machine = "q35,firmware=/evil".to_owned();
    recipe.name = "../x".to_owned();
    recipe.smp = "4000".to_owned();
    recipe.memory[0].bytes = u64::MAX;
    let reasons = qemu::recipe::check(&recipe);
    assert_eq!(reasons.len(), bad.len() + 4, "{reasons:#?}");
}
