//! Which files a VM only reads, by its command line: nobody's word is taken for it.

use super::{
    Argument,
    options::{self, is_on},
};
use std::collections::BTreeSet;

/// Files that neither an argument nor the machine has QEMU open for writing.
pub(super) fn files(machine: &str, arguments: &[Argument]) -> BTreeSet<String> {
    let (mut reads, mut writes) = (BTreeSet::new(), BTreeSet::new());
    for argument in arguments {
        let value = argument.value.as_deref().unwrap_or_default();
        let found = match argument.option.as_str() {
            "-drive" => drive(value),
            "-blockdev" => blockdev(value),
            _ => None,
        };
        let Some((file, only_read)) = found else { continue };
        if only_read || (argument.option == "-blockdev" && waits_for_writers(value, machine, arguments)) {
            reads.insert(file)
        } else {
            writes.insert(file)
        };
    }
    &reads - &writes
}

fn drive(value: &str) -> Option<(String, bool)> {
    let parsed = options::parse(value, "");
    let on = |key| options::get(&parsed, key).is_some_and(is_on);
    let cd = options::get(&parsed, "media") == Some("cdrom");
    Some((options::get(&parsed, "file")?.to_owned(), cd || on("readonly") || on("read-only")))
}

/// It counts what is said of the node that opens the file; one within another inherits from it.
fn blockdev(value: &str) -> Option<(String, bool)> {
    let parsed = options::parse(value, "driver");
    let get = |key| options::get(&parsed, key);
    let outer = get("read-only").is_some_and(is_on);
    if let Some(file) = get("file.filename") {
        return Some((file.to_owned(), get("file.read-only").map_or(outer, is_on)));
    }
    Some((get("filename")?.to_owned(), outer))
}

/// Whether a `-blockdev` opens its file for reading until somebody writes (`auto-read-only`), and nobody
/// does: all that names its node are nodes that are only read. libvirt has its media like that.
fn waits_for_writers(value: &str, machine: &str, arguments: &[Argument]) -> bool {
    let parsed = options::parse(value, "driver");
    let get = |key| options::get(&parsed, key);
    let Some(node) = get("node-name").filter(|_| get("driver") == Some("file")) else { return false };
    if !get("auto-read-only").is_some_and(is_on) || get("read-only").is_some() {
        return false;
    }
    let names = |pairs: &[(String, String)]| {
        pairs.iter().any(|(key, value)| value == node && !matches!(key.as_str(), "node-name" | "id"))
    };
    let only_reads = |argument: &Argument| {
        let pairs = options::parse(argument.value.as_deref().unwrap_or_default(), "");
        let reads = options::get(&pairs, "read-only").is_some_and(is_on);
        !names(&pairs) || (argument.option == "-blockdev" && reads)
    };
    !names(&options::parse(machine, "type")) && arguments.iter().all(only_reads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_only_read_is_what_no_node_opens_for_writing() {
        for (option, value, only_read) in [
            ("-drive", "file=/a,format=raw,if=none,id=d", false),
            ("-drive", "file=/a,format=raw,readonly=on", true),
            ("-drive", "file=/a,format=raw,media=cdrom", true),
            ("-drive", "file=/a,format=raw,readonly=off", false),
            ("-blockdev", "driver=file,node-name=f,filename=/a", false),
            ("-blockdev", "driver=file,node-name=f,filename=/a,read-only=on", true),
            ("-blockdev", "driver=raw,node-name=n,read-only=on,file.driver=file,file.filename=/a", true),
            (
                "-blockdev",
                "raw,node-name=n,read-only=on,file.driver=file,file.filename=/a,file.read-only=off",
                false,
            ),
            // The node above it is no reason for the file's own node not to write.
            ("-blockdev", "driver=raw,node-name=n,read-only=on,file=f", false),
        ] {
            let found = files("q35", &[Argument::new(option, value)]);
            assert_eq!(found.contains("/a"), only_read, "{option} {value}");
        }
        let both = ["file=/a,format=raw,readonly=on", "file=/a,format=raw"];
        assert!(files("q35", &both.map(|value| Argument::new("-drive", value))).is_empty());
    }

    #[test]
    fn who_waits_for_writers_reads_as_long_as_there_are_none() {
        let file = ("-blockdev", "driver=file,node-name=f,filename=/a,auto-read-only=on,discard=unmap");
        let reads = ("-blockdev", "driver=raw,node-name=n,read-only=on,file=f");
        type Row<'a> = (&'a str, &'a [(&'a str, &'a str)], bool);
        let rows: [Row<'_>; 6] = [
            ("q35,pflash0=n", &[file, reads], true),
            ("q35", &[file, ("-blockdev", "driver=raw,node-name=n,file=f")], false),
            ("q35", &[file, reads, ("-blockdev", "driver=raw,node-name=m,read-only=off,file=f")], false),
            ("q35", &[file, reads, ("-device", "virtio-blk-pci,drive=f")], false),
            ("q35,pflash1=f", &[file, reads], false),
            (
                "q35",
                &[
                    ("-blockdev", "driver=file,node-name=f,filename=/a,auto-read-only=on,read-only=off"),
                    reads,
                ],
                false,
            ),
        ];
        for (machine, arguments, only_read) in rows {
            let all: Vec<_> = arguments.iter().map(|(option, value)| Argument::new(option, *value)).collect();
            assert_eq!(files(machine, &all).contains("/a"), only_read, "{machine} {arguments:?}");
        }
    }
}
