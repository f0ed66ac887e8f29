//! What QEMU says of the devices that users added: which there are, and what each of them is like.

use crate::qmp::{Qmp, QmpError};
use serde_json::{Value, json};
use std::{collections::BTreeMap, time::Duration};

/// Questions that are written before their answers are read: QEMU's queue for them is short.
const AT_ONCE: usize = 64;

/// How long QEMU may take for these.
const WITHIN: Duration = Duration::from_secs(5);

/// More properties than any device has; whoever says more is not QEMU.
const MOST_PROPERTIES: usize = 512;

/// A device that a user added.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in super::super) struct Device {
    /// Where it is in QEMU's object tree.
    pub(in super::super) path: String,
    /// What it is called there: its id, or `device[3]`.
    pub(in super::super) name: String,
    /// Whether it has an id.
    pub(in super::super) has_id: bool,
    /// Its type.
    pub(in super::super) kind: String,
    /// Whether it was plugged in after the start.
    pub(in super::super) plugged: bool,
}

impl Device {
    /// Its id, if it has one.
    pub(super) fn id(&self) -> Option<&str> {
        self.has_id.then_some(&*self.name)
    }

    /// Its number among those without an id.
    pub(super) fn number(&self) -> Option<usize> {
        self.name.strip_prefix("device[")?.strip_suffix(']')?.parse().ok()
    }

    /// It, for people.
    pub(super) fn words(&self) -> String {
        format!("device {} ({})", self.name, self.kind)
    }
}

/// A property that a user can set.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Property {
    pub(super) name: String,
    /// Its type: `bool`, `link<iothread>`.
    pub(super) kind: String,
    /// What it is if nobody sets it, where QEMU says that.
    pub(super) usual: Option<Value>,
    /// What it is.
    pub(super) value: Value,
}

/// The devices that users added; those without an id in the order of their numbers.
pub(super) fn devices(qmp: &mut Qmp) -> Result<Vec<Device>, QmpError> {
    let mut found = Vec::new();
    for (folder, has_id) in [("/machine/peripheral", true), ("/machine/peripheral-anon", false)] {
        for (name, kind) in super::super::live::children(qmp, folder)? {
            found.push(Device { path: format!("{folder}/{name}"), name, has_id, kind, plugged: false });
        }
    }
    found.sort_by_key(|device| (!device.has_id, device.number()));
    let asked: Vec<_> = found.iter().map(|device| (device.path.clone(), "hotplugged")).collect();
    for (device, answer) in found.iter_mut().zip(get(qmp, &asked)?) {
        device.plugged = answer == Value::Bool(true);
    }
    Ok(found)
}

/// Properties of objects; null where there is none of this name.
pub(super) fn get(qmp: &mut Qmp, asked: &[(String, &str)]) -> Result<Vec<Value>, QmpError> {
    let mut answers = Vec::new();
    for some in asked.chunks(AT_ONCE) {
        let lines: Vec<_> = some
            .iter()
            .map(|(path, property)| ("qom-get", json!({ "path": path, "property": property })))
            .collect();
        answers.extend(qmp.execute_all(&lines, WITHIN)?.into_iter().map(Result::unwrap_or_default));
    }
    Ok(answers)
}

/// All that a user can set of a device.
pub(super) fn properties(qmp: &mut Qmp, device: &Device) -> Result<Vec<Property>, QmpError> {
    let answer = qmp.execute("device-list-properties", json!({ "typename": device.kind }));
    let answer = match answer {
        Err(error) if error.is_refusal() => return Ok(vec![]),
        answer => answer?,
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let property = |one: &Value| Property {
        name: text(&one["name"]),
        kind: text(&one["type"]),
        usual: one.get("default-value").cloned(),
        value: Value::Null,
    };
    let list = answer.as_array().into_iter().flatten().take(MOST_PROPERTIES);
    let mut properties: Vec<_> = list.map(property).collect();
    let asked: Vec<_> =
        properties.iter().map(|property| (device.path.clone(), property.name.as_str())).collect();
    let values = get(qmp, &asked)?;
    properties.iter_mut().zip(values).for_each(|(property, value)| property.value = value);
    Ok(properties)
}

/// Where USB devices are plugged in, by their ids; and where those without one are.
pub(super) fn usb_ports(qmp: &mut Qmp) -> Result<(BTreeMap<String, String>, Vec<String>), QmpError> {
    // A machine without USB has an error for an answer, or words.
    Ok(ports_in(&qmp.human("info usb")?))
}

/// Lines like `  Device 0.1, Port 1.2, Speed 480 Mb/s, Product QEMU USB Tablet, ID: tablet0`.
fn ports_in(text: &str) -> (BTreeMap<String, String>, Vec<String>) {
    let (mut named, mut nameless) = (BTreeMap::new(), Vec::new());
    for line in text.lines().map(str::trim).filter(|line| line.starts_with("Device ")) {
        let rest = line.split_once(", Port ").map_or("", |(_, rest)| rest);
        let port = rest.split(',').next().unwrap_or_default().trim().to_owned();
        match line.rsplit_once(", ID: ") {
            Some((_, id)) => drop(named.insert(id.to_owned(), port)),
            None => nameless.push(port),
        }
    }
    (named, nameless)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 7.2 and 10.0 print it.
    #[test]
    fn ports_of_usb_devices_are_read() {
        let text = "  Device 0.1, Port 1, Speed 480 Mb/s, Product QEMU USB Tablet, ID: tab\r\n\
                    \x20 Device 0.0, Port 2.1, Speed 480 Mb/s, Product QEMU USB Keyboard\r\n";
        let (named, nameless) = ports_in(text);
        assert_eq!(named, BTreeMap::from([("tab".to_owned(), "1".to_owned())]));
        assert_eq!(nameless, ["2.1"]);
        assert_eq!(ports_in("USB support not enabled\r\n"), (BTreeMap::new(), vec![]));
    }
}
