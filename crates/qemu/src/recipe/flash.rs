//! Variable stores of firmware: flash memory that a file keeps.
//!
//! QEMU has all of it in a RAM block and writes the file when the guest changes it, and once more as a whole
//! when a guest that was moved begins to run. So a target needs no more than a file of the same size, which
//! may be its own.

use super::{
    Argument, Recipe,
    options::{self, get, is_on},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// The largest store that a host makes a file for: QEMU bears 8 MiB of flash in all unless it is told
/// otherwise.
pub(crate) const LARGEST: u64 = 64 << 20;

/// The files of a recipe's variable stores that nothing else uses, and that hold what the guest wrote as it
/// is (raw).
pub(crate) fn stores(recipe: &Recipe) -> BTreeSet<String> {
    let machine = options::parse(&recipe.machine, "type");
    let wired: Vec<&str> = ["pflash0", "pflash1"].iter().filter_map(|unit| get(&machine, unit)).collect();
    let nodes = nodes(&recipe.arguments);
    let (mut stores, mut others) = (BTreeSet::new(), BTreeSet::new());
    for argument in &recipe.arguments {
        let Some((file, node)) = names(argument) else { continue };
        let is_store = match node {
            None => is_store_drive(argument),
            Some(node) => wired.iter().any(|top| lies_on(&nodes, top, &node)),
        };
        if is_store {
            stores.insert(file)
        } else {
            others.insert(file)
        };
    }
    &stores - &others
}

/// The recipe with another file of this host in the place of one that it names.
pub(crate) fn rename(recipe: &mut Recipe, from: &Path, to: &Path) {
    for file in recipe.files.iter_mut().filter(|file| file.path == from) {
        file.path = to.to_owned();
    }
    for argument in &mut recipe.arguments {
        let (implied, keys): (_, &[&str]) = match argument.option.as_str() {
            "-drive" => ("", &["file"]),
            "-blockdev" => ("driver", &["filename", "file.filename"]),
            _ => continue,
        };
        let mut parsed = options::parse(argument.value.as_deref().unwrap_or_default(), implied);
        let mut changed = false;
        for (_, path) in
            parsed.iter_mut().filter(|(key, path)| keys.contains(&key.as_str()) && Path::new(path) == from)
        {
            *path = to.to_string_lossy().into_owned();
            changed = true;
        }
        if changed {
            argument.value = Some(options::join(&parsed, implied));
        }
    }
}

/// The file that an argument names, and the node that it makes if it is a `-blockdev`.
fn names(argument: &Argument) -> Option<(String, Option<String>)> {
    let value = argument.value.as_deref()?;
    match argument.option.as_str() {
        "-drive" => Some((get(&options::parse(value, ""), "file")?.to_owned(), None)),
        "-blockdev" => {
            let parsed = options::parse(value, "driver");
            let file = get(&parsed, "filename").or_else(|| get(&parsed, "file.filename"))?;
            Some((file.to_owned(), Some(get(&parsed, "node-name").unwrap_or_default().to_owned())))
        }
        _ => None,
    }
}

fn is_store_drive(argument: &Argument) -> bool {
    let parsed = options::parse(argument.value.as_deref().unwrap_or_default(), "");
    let reads = ["readonly", "read-only"].iter().any(|key| get(&parsed, key).is_some_and(is_on));
    get(&parsed, "if") == Some("pflash") && get(&parsed, "format") == Some("raw") && !reads
}

type Nodes = BTreeMap<String, Vec<(String, String)>>;

fn nodes(arguments: &[Argument]) -> Nodes {
    let nodes = arguments.iter().filter(|argument| argument.option == "-blockdev");
    nodes
        .filter_map(|argument| {
            let parsed = options::parse(argument.value.as_deref()?, "driver");
            Some((get(&parsed, "node-name")?.to_owned(), parsed))
        })
        .collect()
}

/// Whether a writable node is `node`, or lies on it, with nothing in between that is not raw.
fn lies_on(nodes: &Nodes, top: &str, node: &str) -> bool {
    let Some(parsed) = nodes.get(top) else { return false };
    let plain = matches!(get(parsed, "driver"), Some("raw" | "file")) && get(parsed, "offset").is_none();
    let reads = get(parsed, "read-only").is_some_and(is_on);
    // A format lies on a file at once: deeper chains are none of a store's.
    plain && !reads && (top == node || get(parsed, "file") == Some(node))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(machine: &str, arguments: &[(&str, &str)]) -> Recipe {
        let arguments = arguments.iter().map(|(option, value)| Argument::new(option, *value)).collect();
        Recipe { arguments, ..Recipe::of(machine) }
    }

    #[test]
    fn a_store_is_flash_that_is_written_and_raw_and_nothing_else() {
        type Row<'a> = (&'a str, &'a [(&'a str, &'a str)], bool);
        let rows: &[Row<'_>] = &[
            ("q35", &[("-drive", "if=pflash,unit=1,format=raw,file=/v")], true),
            ("q35", &[("-drive", "if=pflash,unit=0,format=raw,readonly=on,file=/v")], false),
            ("q35", &[("-drive", "if=pflash,unit=1,format=qcow2,file=/v")], false),
            ("q35", &[("-drive", "if=virtio,format=raw,file=/v")], false),
            (
                "q35",
                &[("-drive", "if=pflash,format=raw,file=/v"), ("-drive", "if=virtio,format=raw,file=/v")],
                false,
            ),
            ("q35,pflash1=n", &[("-blockdev", "driver=file,node-name=n,filename=/v")], true),
            (
                "q35,pflash0=c,pflash1=n",
                &[
                    ("-blockdev", "driver=file,node-name=f,filename=/v"),
                    ("-blockdev", "driver=raw,node-name=n,file=f"),
                ],
                true,
            ),
            (
                "q35,pflash1=n",
                &[("-blockdev", "raw,node-name=n,read-only=off,file.driver=file,file.filename=/v")],
                true,
            ),
            (
                "q35,pflash0=n",
                &[("-blockdev", "driver=raw,node-name=n,read-only=on,file.filename=/v")],
                false,
            ),
            ("q35,pflash1=n", &[("-blockdev", "driver=qcow2,node-name=n,file.filename=/v")], false),
            ("q35", &[("-blockdev", "driver=file,node-name=n,filename=/v")], false),
        ];
        for (machine, arguments, is_store) in rows {
            assert_eq!(
                stores(&recipe(machine, arguments)).contains("/v"),
                *is_store,
                "{machine} {arguments:?}"
            );
        }
    }

    #[test]
    fn a_file_is_renamed_wherever_it_is_named_and_nowhere_else() {
        let mut renamed = recipe(
            "q35",
            &[
                ("-drive", "if=pflash,file=/v"),
                ("-blockdev", "driver=file,filename=/v"),
                ("-append", "/v"),
                ("-drive", "file=/vv"),
            ],
        );
        rename(&mut renamed, Path::new("/v"), Path::new("/new,1"));
        let values: Vec<_> =
            renamed.arguments.iter().filter_map(|argument| argument.value.as_deref()).collect();
        assert_eq!(values, ["if=pflash,file=/new,,1", "file,filename=/new,,1", "/v", "file=/vv"]);
    }
}
