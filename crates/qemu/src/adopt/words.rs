//! A command line as options with their values: one dash, JSON as pairs, files of options read, later changes
//! made.

use super::{dialect, names::Names};
use crate::recipe::{
    Role,
    options::{self, get},
};
use std::fs::File;
use std::io::Read;

/// The most that is read of a file of options; Proxmox's and Incus' have a few KiB.
const LONGEST_FILE: u64 = 1 << 20;

/// One option.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Word {
    pub(super) option: String,
    pub(super) value: Option<String>,
    /// Whether it was in JSON: QEMU makes such devices after all others.
    pub(super) json: bool,
}

/// Options without a value.
const FLAGS: &[&str] = &[
    "-nodefaults",
    "-no-user-config",
    "-nographic",
    "-daemonize",
    "-S",
    "-enable-kvm",
    "-no-reboot",
    "-no-shutdown",
    "-no-hpet",
    "-no-acpi",
    "-usb",
    "-full-screen",
    "-no-fd-bootchk",
    "-snapshot",
    "-mem-prealloc",
    "-no-quit",
    "-s",
    "-enable-sync-profile",
    "-only-migratable",
    "-xen-attach",
    "-preconfig",
    "-singlestep",
    "-one-insn-per-tb",
    "-alt-grab",
    "-ctrl-grab",
    "-win2k-hack",
];

/// Groups in a file of options (`-readconfig`) that are not called like their option.
const GROUPS: &[(&str, &str)] = &[("memory", "-m"), ("smp-opts", "-smp"), ("boot-opts", "-boot")];

/// All options in the order in which they stand, and what is not understood of them.
pub(super) fn of(argv: &[String], names: &Names<'_>) -> (Vec<Word>, Vec<String>) {
    let (mut words, mut wrong) = (Vec::new(), Vec::new());
    let mut rest = argv.iter().skip(1);
    while let Some(word) = rest.next() {
        // QEMU takes two dashes for one.
        let option = match word.strip_prefix("--") {
            Some(bare) => format!("-{bare}"),
            None => word.clone(),
        };
        if !option.starts_with('-') {
            words.push(Word { value: Some(option), option: "-hda".to_owned(), json: false });
        } else if FLAGS.contains(&option.as_str()) {
            words.push(Word { option, value: None, json: false });
        } else {
            let Some(value) = rest.next() else {
                wrong.push(format!("{option} has no value"));
                break;
            };
            match option.as_str() {
                "-readconfig" => match read_file(value, names) {
                    Ok(read) => words.extend(read),
                    Err(why) => wrong.push(format!("-readconfig {value}: {why}")),
                },
                "-set" => wrong.extend(set(value, &mut words).err()),
                _ => match plain(option, value) {
                    Ok(word) => words.push(word),
                    Err(why) => wrong.push(why),
                },
            }
        }
    }
    (words, wrong)
}

fn plain(option: String, value: &str) -> Result<Word, String> {
    match dialect::from_json(&option, value) {
        Some(pairs) => Ok(Word { value: Some(pairs?), option, json: true }),
        None => Ok(Word { value: Some(value.to_owned()), option, json: false }),
    }
}

/// `-set GROUP.ID.KEY=VALUE`: changes an option that stands before it.
fn set(value: &str, words: &mut [Word]) -> Result<(), String> {
    let strange =
        || format!("-set {value}: it changes nothing that is understood; write it where it belongs");
    let (place, set) = value.split_once('=').ok_or_else(strange)?;
    let mut parts = place.splitn(3, '.');
    let (group, id, key) = match (parts.next(), parts.next(), parts.next()) {
        (Some(group), Some(id), Some(key)) => (group, id, key),
        _ => return Err(strange()),
    };
    let option = format!("-{group}");
    let is_meant = |word: &&mut Word| {
        let parsed = options::parse(word.value.as_deref().unwrap_or_default(), "driver");
        word.option == option && !word.json && get(&parsed, "id") == Some(id)
    };
    let word = words.iter_mut().rfind(is_meant).ok_or_else(strange)?;
    if let Some(value) = &mut word.value {
        // What it was before does not count: said twice, it would be refused.
        let mut parsed = options::parse(value, "driver");
        if get(&parsed, key).is_some() {
            parsed.retain(|(name, _)| name != key);
            *value = options::join(&parsed, "driver");
        }
        value.push_str(&format!(",{key}={}", options::escape(set)));
    }
    Ok(())
}

/// The options in a file as it is now: QEMU has read and closed it.
fn read_file(name: &str, names: &Names<'_>) -> Result<Vec<Word>, String> {
    let path = names.file(Role::Boot, name)?;
    let mut text = String::new();
    let file = File::open(&path).map_err(|error| error.to_string())?;
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Err("it is no plain file".to_owned());
    }
    file.take(LONGEST_FILE).read_to_string(&mut text).map_err(|error| error.to_string())?;
    sections(&text)
}

/// The syntax is that of QEMU's `qemu_config_parse`.
fn sections(text: &str) -> Result<Vec<Word>, String> {
    let mut found: Vec<(String, Vec<(String, String)>)> = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(head) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            let (group, id) = head.split_once(' ').unwrap_or((head, ""));
            let id = id.trim().trim_matches('"');
            let pairs = if id.is_empty() { vec![] } else { vec![("id".to_owned(), id.to_owned())] };
            found.push((group.to_owned(), pairs));
            continue;
        }
        let pair = line.split_once('=').map(|(key, value)| (key.trim(), value.trim()));
        match (pair, found.last_mut()) {
            (Some((key, value)), Some((_, pairs))) => {
                pairs.push((key.to_owned(), value.trim_matches('"').to_owned()));
            }
            _ => {
                return Err(format!(
                    "the line {:?} is not understood",
                    line.chars().take(60).collect::<String>()
                ));
            }
        }
    }
    Ok(found.into_iter().map(|(group, pairs)| section(&group, pairs)).collect())
}

fn section(group: &str, mut pairs: Vec<(String, String)>) -> Word {
    let named = GROUPS.iter().find(|(name, _)| *name == group);
    let option = named.map_or_else(|| format!("-{group}"), |(_, option)| (*option).to_owned());
    let first = ["driver", "qom-type", "type", "backend", "size", "cpus"];
    if let Some(at) = pairs.iter().position(|(key, _)| first.contains(&key.as_str())) {
        pairs[..=at].rotate_right(1);
    }
    let field = |key: &str| get(&pairs, key).unwrap_or_default().to_owned();
    let value = match group {
        "global" => format!("{}.{}={}", field("driver"), field("property"), field("value")),
        _ => options::join(&pairs, ""),
    };
    Word { option, value: Some(value), json: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn said(argv: &[&str], folder: &Path) -> (Vec<String>, Vec<String>) {
        let argv: Vec<String> = ["qemu"].iter().chain(argv).map(|word| (*word).to_owned()).collect();
        let (words, wrong) = of(&argv, &Names::In(folder));
        let text = |word: Word| format!("{} {}", word.option, word.value.unwrap_or_default());
        (words.into_iter().map(text).collect(), wrong)
    }

    #[test]
    fn files_of_options_and_later_changes_are_read_in_place() {
        let folder = tempfile::tempdir().unwrap();
        // As Proxmox and Incus write them.
        let text = "# q35\n[device \"ehci\"]\n  driver = \"ich9-usb-ehci1\"\n  bus = \
                    \"pcie.0\"\n\n[machine]\n\
                    type = \"q35\"\n[memory]\nsize = \"64M\"\n[global]\ndriver = \"ICH9-LPC\"\n\
                    property = \"disable_s3\"\nvalue = \"1\"\n[chardev \"c\"]\nbackend = \"pty\"\n";
        std::fs::write(folder.path().join("a.cfg"), text).unwrap();
        let line = ["--readconfig", "a.cfg", "-device", "VGA,xres=640,id=v"];
        let changes = ["-set", "device.v.xres=800", "-set", "chardev.c.logfile=/a", "-S"];
        let (words, wrong) = said(&[&line[..], &changes].concat(), folder.path());
        assert_eq!(wrong, Vec::<String>::new());
        assert_eq!(
            words,
            [
                "-device driver=ich9-usb-ehci1,id=ehci,bus=pcie.0",
                "-machine type=q35",
                "-m size=64M",
                "-global ICH9-LPC.disable_s3=1",
                "-chardev backend=pty,id=c,logfile=/a",
                "-device VGA,id=v,xres=800",
                "-S "
            ]
        );
        for (line, says) in [
            (["-set", "device.none.x=1"], "changes nothing that is understood"),
            (["-set", "x"], "changes nothing"),
            (["-readconfig", "none.cfg"], "-readconfig none.cfg: "),
        ] {
            let wrong = said(&line, folder.path()).1;
            assert!(wrong.len() == 1 && wrong[0].contains(says), "{wrong:?}");
        }
        assert!(sections("driver = x").is_err() && sections("[device]\nx").is_err());
    }
}
