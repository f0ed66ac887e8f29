//! Which files a VM only reads, by its command line: nobody's word is taken for it.

use super::{
    Argument,
    options::{self, is_on},
};
use std::collections::BTreeSet;

/// Files that no argument has QEMU open for writing.
pub(super) fn files(arguments: &[Argument]) -> BTreeSet<String> {
    let (mut reads, mut writes) = (BTreeSet::new(), BTreeSet::new());
    for argument in arguments {
        let value = argument.value.as_deref().unwrap_or_default();
        let found = match argument.option.as_str() {
            "-drive" => drive(value),
            "-blockdev" => blockdev(value),
            _ => None,
        };
        let Some((file, only_read)) = found else { continue };
        if only_read {
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
            let found = files(&[Argument::new(option, value)]);
            assert_eq!(found.contains("/a"), only_read, "{option} {value}");
        }
        let both = ["file=/a,format=raw,readonly=on", "file=/a,format=raw"];
        assert!(files(&both.map(|value| Argument::new("-drive", value))).is_empty());
    }
}
