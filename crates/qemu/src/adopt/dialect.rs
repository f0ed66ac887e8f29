//! The other ways of saying the same on QEMU's command line: options in JSON, disks by a short option or by
//! none, drives without an id.

use crate::recipe::options::{self, get};
use serde_json::Value;
use std::collections::BTreeSet;

/// Options that may be written in JSON, with the key that leads in the other form.
const IN_JSON: &[(&str, &str)] = &[
    ("-audiodev", "driver"),
    ("-machine", "type"),
    ("-blockdev", "driver"),
    ("-chardev", "backend"),
    ("-device", "driver"),
    ("-netdev", "type"),
    ("-object", "qom-type"),
];

/// Objects within objects are followed so deep: a chain of images may be written in one.
const DEEPEST: usize = 64;

/// An option in JSON as `key=value`; `None`: it is not in JSON.
pub(super) fn from_json(option: &str, value: &str) -> Option<Result<String, String>> {
    let (_, implied) = IN_JSON.iter().find(|(name, _)| *name == option).filter(|_| value.starts_with('{'))?;
    let mut pairs = Vec::new();
    let read = serde_json::from_str::<Value>(value).map_err(|error| error.to_string());
    let flat = read.and_then(|value| flatten("", &value, 0, &mut pairs));
    if let Some(at) = pairs.iter().position(|(key, _)| key == implied) {
        pairs[..=at].rotate_right(1);
    }
    let flat = flat.map(|()| options::join(&pairs, implied));
    Some(flat.map_err(|why| format!("{option}: its JSON is not understood ({why})")))
}

fn flatten(key: &str, value: &Value, depth: usize, pairs: &mut Vec<(String, String)>) -> Result<(), String> {
    let below = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    if depth > DEEPEST {
        return Err("it is nested too deeply".to_owned());
    }
    let text = match value {
        Value::Object(fields) => {
            return fields
                .iter()
                .try_for_each(|(name, value)| flatten(&below(name), value, depth + 1, pairs));
        }
        Value::Array(list) => {
            return list
                .iter()
                .enumerate()
                .try_for_each(|(n, value)| flatten(&below(&n.to_string()), value, depth + 1, pairs));
        }
        // `"backing": null`: no image behind this one.
        Value::Null => String::new(),
        Value::Bool(set) => if *set { "on" } else { "off" }.to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
    };
    pairs.push((key.to_owned(), text));
    Ok(())
}

/// A disk by its short option as the `-drive` that QEMU takes it for; `None`: it is none.
pub(super) fn drive(option: &str, file: &str) -> Option<String> {
    let (index, media) = match option {
        "-hda" => (0, "disk"),
        "-hdb" => (1, "disk"),
        "-hdc" => (2, "disk"),
        "-hdd" => (3, "disk"),
        "-cdrom" => (2, "cdrom"),
        "-pflash" => return Some(format!("if=pflash,format=raw,file={}", options::escape(file))),
        _ => return None,
    };
    Some(format!("index={index},media={media},file={}", options::escape(file)))
}

/// A `-global` in its shorter form, where it can be said in that.
pub(super) fn global(value: &str) -> String {
    let parsed = options::parse(value, "");
    match ["driver", "property", "value"].map(|key| get(&parsed, key)) {
        [Some(driver), Some(property), Some(set)] if parsed.len() == 3 => {
            format!("{driver}.{property}={set}")
        }
        _ => value.to_owned(),
    }
}

/// Gives names to drives without an id, as QEMU does.
#[derive(Debug)]
pub(super) struct DriveNames {
    /// What a drive is on that does not say it, and how many there are on a bus.
    usual: Option<(&'static str, u32)>,
    taken: BTreeSet<(String, u32, u32)>,
}

impl DriveNames {
    /// For this machine.
    pub(super) fn on(machine: &str) -> Self {
        // Behind a plus stands whose QEMU it is (Proxmox).
        let name = machine.split([',', '+']).next().unwrap_or_default();
        let usual = match name {
            "pc" => Some(("ide", 2)),
            "q35" => Some(("ide", 1)),
            _ if name.starts_with("pc-i440fx-") => Some(("ide", 2)),
            _ if name.starts_with("pc-q35-") => Some(("ide", 1)),
            _ => None,
        };
        Self { usual, taken: BTreeSet::new() }
    }

    /// The name of the next drive of the command line; `None`: it cannot be told.
    pub(super) fn next(&mut self, drive: &[(String, String)]) -> Option<String> {
        let kind = get(drive, "if").or(self.usual.map(|(kind, _)| kind))?;
        let on_a_bus = match kind {
            "ide" => self.usual?.1,
            "scsi" => 7,
            _ => 0,
        };
        let number = |key: &str| get(drive, key).and_then(|text| text.parse::<u32>().ok());
        let (mut bus, mut unit) = (number("bus").unwrap_or(0), number("unit"));
        if let Some(index) = number("index") {
            (bus, unit) =
                index.checked_div(on_a_bus).map_or((0, Some(index)), |bus| (bus, Some(index % on_a_bus)));
        }
        let free = |at: &(u32, u32)| !self.taken.contains(&(kind.to_owned(), at.0, at.1));
        let (bus, unit) = match unit {
            Some(unit) => (bus, unit),
            None => (0..)
                .map(|n| match on_a_bus {
                    0 => (bus, n),
                    on_a_bus => (bus + n / on_a_bus, n % on_a_bus),
                })
                .find(free)?,
        };
        self.taken.insert((kind.to_owned(), bus, unit));
        if let Some(id) = get(drive, "id") {
            return Some(id.to_owned());
        }
        let medium = match (kind, get(drive, "media")) {
            ("ide" | "scsi", Some("cdrom")) => "-cd",
            ("ide" | "scsi", _) => "-hd",
            _ => "",
        };
        Some(match on_a_bus {
            0 => format!("{kind}{medium}{unit}"),
            _ => format!("{kind}{bus}{medium}{unit}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_says_the_same_in_pairs() {
        let rows = [
            (
                "-device",
                r#"{"id":"d","driver":"virtio-net-pci","mq":true,"vectors":6}"#,
                "virtio-net-pci,id=d,mq=on,vectors=6",
            ),
            (
                "-blockdev",
                r#"{"node-name":"n","driver":"qcow2",
                    "file":{"driver":"file","filename":"/a,b"},"backing":null}"#,
                "qcow2,backing=,file.driver=file,file.filename=/a,,b,node-name=n",
            ),
            ("-object", r#"{"qom-type":"iothread","id":"i"}"#, "iothread,id=i"),
            ("-blockdev", r#"{"a":[1,"x"]}"#, "a.0=1,a.1=x"),
            ("-device", "{}", ""),
        ];
        for (option, json, pairs) in rows {
            assert_eq!(from_json(option, json).unwrap().unwrap(), pairs, "{json}");
        }
        assert_eq!(from_json("-device", "virtio-rng-pci"), None);
        assert_eq!(from_json("-append", "{}"), None);
        assert!(from_json("-device", "{").unwrap().unwrap_err().contains("-device: its JSON"));
    }

    #[test]
    fn a_global_of_three_parts_is_one_of_two() {
        for (value, short) in [
            ("driver=cfi.pflash01,property=secure,value=on", "cfi.pflash01.secure=on"),
            ("property=secure,value=on,driver=cfi.pflash01", "cfi.pflash01.secure=on"),
            ("ICH9-LPC.disable_s3=1", "ICH9-LPC.disable_s3=1"),
            ("driver=VGA,property=romfile", "driver=VGA,property=romfile"),
        ] {
            assert_eq!(global(value), short);
        }
    }

    /// What QEMU 7.2 calls them (`query-block`).
    #[test]
    fn drives_without_an_id_are_called_as_qemu_calls_them() {
        let rows: [(&str, &[&str], &[&str]); 5] = [
            (
                "pc",
                &["index=0,media=disk", "index=2,media=cdrom", "media=disk"],
                &["ide0-hd0", "ide1-cd0", "ide0-hd1"],
            ),
            (
                "q35,smm=off",
                &["media=disk", "media=cdrom", "if=virtio", "if=virtio"],
                &["ide0-hd0", "ide1-cd0", "virtio0", "virtio1"],
            ),
            (
                "pc-i440fx-7.2",
                &["if=scsi", "if=scsi,bus=1,unit=3", "if=none", "if=floppy"],
                &["scsi0-hd0", "scsi1-hd3", "none0", "floppy0"],
            ),
            ("q35", &["if=pflash,unit=0", "if=pflash,unit=1"], &["pflash0", "pflash1"]),
            ("pc-q35-10.0", &["id=mine,media=disk", "media=disk"], &["mine", "ide1-hd0"]),
        ];
        for (machine, drives, names) in rows {
            let mut called = DriveNames::on(machine);
            let found: Vec<_> =
                drives.iter().map(|drive| called.next(&options::parse(drive, "")).unwrap()).collect();
            assert_eq!(found, names, "{machine}");
        }
        assert_eq!(DriveNames::on("microvm").next(&options::parse("file=a", "")), None);
    }
}
