//! What an image lies on, told to QEMU: it follows the header of no image that was looked at.
//!
//! QEMU takes a chain that it is told for the one of the header only where the header has the full name of
//! each file: else it shows the image by another name (`json:{…}`), writes that into the overlays that are
//! made later, and is not what its source is. An image that names its backing file from its own directory is
//! opened by its header, and what QEMU has opened is looked at afterwards ([`crate::granted`]).

use super::{
    Argument,
    backing::behind,
    options::{self, get},
};
use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
};

/// See `backing`.
const LONGEST: usize = 64;

/// An image that others lie on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Level {
    path: PathBuf,
    format: &'static str,
}

/// What each image lies on, the nearest first; by the name of the image. Those that are opened by their
/// headers are not there.
pub(crate) type Chains = BTreeMap<String, Vec<Level>>;

/// The chains of these images. `open` opens one of their files.
pub(crate) fn of<'a>(images: impl Iterator<Item = &'a Path>, open: impl Fn(&Path) -> Option<File>) -> Chains {
    let chain = |image: &Path| {
        let (mut levels, mut at) = (Vec::new(), image.to_owned());
        while levels.len() < LONGEST {
            let Ok(Some(next)) = behind(&open(&at)?, &at) else { break };
            if !next.is_full {
                return None;
            }
            at.clone_from(&next.path);
            levels.push(Level { path: next.path, format: next.format });
        }
        Some(levels).filter(|levels| !levels.is_empty())
    };
    images.filter_map(|image| Some((image.to_string_lossy().into_owned(), chain(image)?))).collect()
}

/// What is added to an argument, for the image that it opens.
pub(super) fn told(argument: &Argument, all: &[Argument], chains: &Chains) -> String {
    let levels = image(argument, all).and_then(|image| chains.get(&image));
    let mut text = String::new();
    let mut key = String::new();
    for Level { path, format } in levels.into_iter().flatten() {
        key.push_str("backing.");
        let path = options::escape(&path.to_string_lossy());
        text.push_str(&format!(",{key}driver={format},{key}file.driver=file,{key}file.filename={path}"));
    }
    text
}

/// The file of the qcow2 image that an argument opens.
fn image(argument: &Argument, all: &[Argument]) -> Option<String> {
    let value = argument.value.as_deref()?;
    match argument.option.as_str() {
        "-drive" => {
            let parsed = options::parse(value, "");
            get(&parsed, "format").filter(|format| *format == "qcow2")?;
            get(&parsed, "file").map(str::to_owned)
        }
        "-blockdev" => {
            let parsed = options::parse(value, "driver");
            get(&parsed, "driver").filter(|driver| *driver == "qcow2")?;
            match (get(&parsed, "file.filename"), get(&parsed, "file")) {
                (Some(name), _) => Some(name.to_owned()),
                (None, Some(node)) => file_of(node, all),
                (None, None) => None,
            }
        }
        _ => None,
    }
}

/// The file that a node opens by itself.
fn file_of(node: &str, all: &[Argument]) -> Option<String> {
    let nodes = all.iter().filter(|argument| argument.option == "-blockdev");
    nodes.filter_map(|argument| argument.value.as_deref()).find_map(|value| {
        let parsed = options::parse(value, "driver");
        let is_it = get(&parsed, "node-name") == Some(node) && get(&parsed, "driver") == Some("file");
        is_it.then(|| get(&parsed, "filename").map(str::to_owned)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_chain_of_full_names_is_told_and_others_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let create = |name: &str, on: Option<(&str, &str)>| {
            let mut command = Command::new("qemu-img");
            command.args(["create", "-q", "-f", "qcow2"]);
            if let Some((file, format)) = on {
                command.args(["-b", file, "-F", format]);
            }
            assert!(command.arg(path(name)).arg("1M").status().unwrap().success());
        };
        std::fs::write(path("raw"), vec![0; 1 << 20]).unwrap();
        let full = |name: &str| path(name).display().to_string();
        create("base", Some((&full("raw"), "raw")));
        create("top,1", Some((&full("base"), "qcow2")));
        create("relative", Some(("base", "qcow2")));
        create("over", Some((&full("relative"), "qcow2")));
        let names = ["raw", "base", "top,1", "relative", "over"].map(path);
        let chains = of(names.iter().map(PathBuf::as_path), |path| File::open(path).ok());
        assert_eq!(chains.keys().map(String::as_str).collect::<Vec<_>>(), [full("base"), full("top,1")]);

        let (top, base, raw) = (full("top,,1"), full("base"), full("raw"));
        let all = [
            Argument::new("-drive", format!("if=none,format=qcow2,file={top}")),
            Argument::new("-drive", format!("if=none,format=raw,file={top}")),
            Argument::new("-blockdev", format!("driver=file,node-name=f,filename={top}")),
            Argument::new("-blockdev", "driver=qcow2,node-name=n,file=f"),
            Argument::new(
                "-blockdev",
                format!("driver=qcow2,node-name=m,file.driver=file,file.filename={base}"),
            ),
            Argument::new("-blockdev", "driver=qcow2,node-name=o,file=lost"),
            Argument::new("-device", "virtio-blk-pci,drive=n"),
        ];
        let below = |key: &str, format: &str, file: &str| {
            format!(",{key}driver={format},{key}file.driver=file,{key}file.filename={file}")
        };
        let both = below("backing.", "qcow2", &base) + &below("backing.backing.", "raw", &raw);
        let rows = [&*both, "", "", &both, &below("backing.", "raw", &raw), "", ""];
        for (argument, expected) in all.iter().zip(rows) {
            assert_eq!(told(argument, &all, &chains), expected, "{argument:?}");
        }
    }
}
