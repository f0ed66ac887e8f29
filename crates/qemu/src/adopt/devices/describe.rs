//! A device that was plugged in, in the words of `-device`: what it is like now is what the target's is made
//! with.
//!
//! A property that is as QEMU makes it by itself is left out. What is said beyond that need not have been
//! said when the device was plugged in: QEMU may have worked it out (a disk's geometry, a number of queues),
//! and the target's must not be worked out anew.

use super::{
    ask::{Device, Property},
    memory,
};
use crate::recipe::{
    Argument, check_argument,
    options::{self},
};
use serde_json::Value;

type Pairs = Vec<(String, String)>;

/// What users can set by name, but is no part of what a device is: QEMU works it out of other things, or
/// counts there.
const WORKED_OUT: &[&str] = &["busnr", "guest-stats", "guest-stats-polling-interval"];

/// What memory devices have by themselves: the size of their memory. And on the target pages come as they are
/// needed.
const OF_MEMORY: &[&str] = &["size", "prealloc"];

/// Where a device is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Place {
    /// Its bus in QEMU's object tree; empty: it is on none.
    pub(super) bus: String,
    /// Its port, if that is a USB bus.
    pub(super) port: Option<String>,
}

impl Place {
    /// What `-device` calls the bus.
    pub(super) fn bus_name(&self) -> Option<&str> {
        self.bus.rsplit('/').next().filter(|name| !name.is_empty())
    }
}

/// The `-device` that makes this device; or what of it cannot be said, and why.
pub(super) fn argument(device: &Device, place: &Place, properties: &[Property]) -> Result<Argument, String> {
    if properties.is_empty() {
        return Err("QEMU does not say what it is like".to_owned());
    }
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let mut pairs = vec![pair("driver", &device.kind)];
    pairs.extend(device.id().map(|id| pair("id", id)));
    pairs.extend(place.bus_name().map(|bus| pair("bus", bus)));
    pairs.extend(place.port.as_ref().map(|port| pair("port", port)));
    let is_pci = properties.iter().any(|property| property.name == "multifunction");
    let said = properties.iter().filter(|property| place.port.is_none() || property.name != "port");
    pairs.extend(said.filter_map(|property| Some((property.name.clone(), value(device, property, is_pci)?))));
    checked(pairs)
}

/// The same of a vCPU: all that tells it from others is its place.
pub(super) fn vcpu(device: &Device, place: &Value) -> Result<Argument, String> {
    let mut pairs: Pairs = vec![("driver".to_owned(), device.kind.clone())];
    pairs.extend(device.id().map(|id| ("id".to_owned(), id.to_owned())));
    let place = place.as_object().filter(|place| !place.is_empty());
    let place = place.ok_or("QEMU does not say where it is")?;
    pairs.extend(place.iter().map(|(key, value)| (key.clone(), value.to_string())));
    checked(pairs)
}

fn checked(pairs: Pairs) -> Result<Argument, String> {
    let argument = Argument::new("-device", options::join(&pairs, "driver"));
    check_argument(&argument, &[]).map(|()| argument)
}

/// Where a PCI device is on its bus.
pub(super) fn pci_place(number: u64) -> String {
    format!("{:02x}.{}", number >> 3, number & 7)
}

/// What is to be said of a property; `None`: nothing.
fn value(device: &Device, property: &Property, is_pci: bool) -> Option<String> {
    let Property { name, kind, usual, value } = property;
    let is_memory = memory::is_device(&device.kind) && OF_MEMORY.contains(&name.as_str());
    if kind.starts_with("child<")
        || is_memory
        || WORKED_OUT.contains(&name.as_str())
        || usual.as_ref() == Some(value)
    {
        return None;
    }
    match (name.as_str(), value) {
        ("addr", Value::Number(number)) if is_pci => number.as_u64().map(pci_place),
        // No ROM at all, where QEMU would have one.
        ("romfile", Value::String(file)) if file.is_empty() => Some(String::new()),
        ("romfile", Value::String(file)) if is_usual_rom(file) => None,
        // It is attached as soon as it is there, unless it is told otherwise.
        ("attached", Value::Bool(true)) => None,
        ("bootindex", value) if value == -1 => None,
        (_, Value::Null) => None,
        (_, Value::Bool(set)) => Some(if *set { "on" } else { "off" }.to_owned()),
        (_, Value::String(text)) if text.is_empty() => None,
        (_, Value::String(text)) if kind.starts_with("link<") => {
            let leads = text.rsplit('/').next().unwrap_or_default();
            // Some lead to themselves.
            (*text != device.path).then(|| leads.to_owned())
        }
        (_, Value::String(text)) => Some(text.clone()),
        (_, Value::Array(list)) if list.is_empty() => None,
        (_, value) => Some(value.to_string()),
    }
}

/// Whether QEMU gives such a ROM to a card by itself.
fn is_usual_rom(file: &str) -> bool {
    let between = |from: &str, to: &str| file.starts_with(from) && file.ends_with(to);
    !file.contains('/') && (between("efi-", ".rom") || between("vgabios", ".bin"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn device(kind: &str) -> Device {
        Device {
            path: "/machine/peripheral/it".to_owned(),
            name: "it".to_owned(),
            has_id: true,
            kind: kind.to_owned(),
            plugged: true,
        }
    }

    /// What is said of a device of this kind, on this bus, with these properties: name, type, usual value,
    /// value.
    fn said(kind: &str, bus: &str, rows: &[(&str, &str, Value, Value)]) -> Result<String, String> {
        let property = |(name, kind, usual, value): &(&str, &str, Value, Value)| Property {
            name: (*name).to_owned(),
            kind: (*kind).to_owned(),
            usual: Some(usual.clone()).filter(|usual| !usual.is_null()),
            value: value.clone(),
        };
        let properties: Vec<_> = rows.iter().map(property).collect();
        let port = kind.starts_with("usb-").then(|| "1.2".to_owned());
        let place = Place { bus: bus.to_owned(), port };
        argument(&device(kind), &place, &properties).map(|argument| argument.value.unwrap_or_default())
    }

    #[test]
    fn a_device_is_said_again_as_it_is_now() {
        let none = Value::Null;
        let pci = ("multifunction", "bool", json!(false), json!(false));
        let rows = [
            (
                said(
                    "virtio-net-pci",
                    "/machine/q35/pcie.0/rp1",
                    &[
                        pci.clone(),
                        ("addr", "int32", json!(-1), json!(0)),
                        ("mac", "str", none.clone(), json!("52:54:00:00:00:09")),
                        ("netdev", "str", none.clone(), json!("n")),
                        ("romfile", "str", none.clone(), json!("efi-virtio.rom")),
                        ("romsize", "uint32", json!(4_294_967_295_u32), json!(262_144)),
                        ("failover_pair_id", "str", none.clone(), json!("")),
                        ("bootindex", "int32", none.clone(), json!(-1)),
                        ("guest_tso4", "bool", json!(true), json!(false)),
                        ("virtio-backend", "child<virtio-net-device>", none.clone(), json!("/machine/x")),
                    ],
                ),
                "virtio-net-pci,id=it,bus=rp1,addr=00.0,mac=52:54:00:00:00:09,netdev=n,romsize=262144,\
                 guest_tso4=off",
            ),
            (
                said(
                    "virtio-rng-pci",
                    "/machine/i440fx/pci.0",
                    &[
                        pci,
                        ("addr", "str", json!(-1), json!(57)),
                        ("rng", "link<rng-backend>", none.clone(), json!("/objects/r1")),
                        ("romfile", "str", none.clone(), json!("")),
                        ("busnr", "busnr", none.clone(), json!(0)),
                        ("iothread-vq-mapping", "List", none.clone(), json!([])),
                    ],
                ),
                "virtio-rng-pci,id=it,bus=pci.0,addr=07.1,rng=r1,romfile=",
            ),
            (
                said(
                    "pc-dimm",
                    "",
                    &[
                        ("addr", "uint64", json!(0), json!(4_294_967_296_u64)),
                        ("memdev", "link<memory-backend>", none.clone(), json!("/objects/m1")),
                        ("size", "uint64", none.clone(), json!(134_217_728)),
                        ("slot", "int32", json!(-1), json!(0)),
                    ],
                ),
                "pc-dimm,id=it,addr=4294967296,memdev=m1,slot=0",
            ),
            (
                said(
                    "usb-tablet",
                    "/machine/peripheral/usb/usb.0",
                    &[
                        ("attached", "bool", none.clone(), json!(true)),
                        ("port", "str", none.clone(), json!("")),
                        ("serial", "str", none.clone(), json!("a,b")),
                    ],
                ),
                "usb-tablet,id=it,bus=usb.0,port=1.2,serial=a,,b",
            ),
        ];
        for (got, wanted) in rows {
            assert_eq!(got.as_deref(), Ok(wanted));
        }
    }

    #[test]
    fn what_cannot_be_said_is_refused_by_name() {
        let rows = [
            (("share-rw", "bool", json!(false), json!(true)), "share-rw=on is not allowed: it must be off"),
            (("pcap", "str", Value::Null, json!("/tmp/x")), "property pcap=/tmp/x is not allowed"),
            (("x-new", "uint32", json!(1), json!(2)), "property x-new=2 is not allowed"),
            (("serial", "str", Value::Null, json!("a\nb")), "serial=a?b is not allowed"),
        ];
        for (row, why) in rows {
            let error = said("usb-storage", "/machine/peripheral/usb/usb.0", &[row]).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        assert!(said("edu", "/machine/q35/pcie.0", &[]).is_err());
    }

    #[test]
    fn a_vcpu_is_said_by_its_place() {
        let place = json!({ "socket-id": 0, "core-id": 1, "thread-id": 0 });
        let said = vcpu(&device("qemu64-x86_64-cpu"), &place).unwrap().value.unwrap();
        assert_eq!(said, "qemu64-x86_64-cpu,id=it,core-id=1,socket-id=0,thread-id=0");
        assert!(vcpu(&device("qemu64-x86_64-cpu"), &json!({})).is_err());
    }
}
