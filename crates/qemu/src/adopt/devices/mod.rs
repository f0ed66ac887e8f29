//! The devices that users added, against `-device`: what was plugged in becomes a part of the recipe, what
//! was unplugged leaves it.
//!
//! QEMU's device state does not tell whether a device was plugged in or there from the start. So the target's
//! QEMU is started with what there is now, each in the place where it is.

mod ask; // what QEMU says of each
mod describe; // one in the words of -device
mod matching; // which -device has made which
mod memory; // where memory that can be plugged is

use super::{cmdline::Read, live};
use crate::{
    qmp::{Qmp, QmpError},
    recipe::{
        Argument, is_vcpu,
        options::{self, get},
        why_refused,
    },
};
pub(super) use ask::Device;
use describe::Place;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Bridges, on whose buses others are plugged in.
const BRIDGES: &[&str] = &[
    "pci-bridge",
    "pcie-root-port",
    "pcie-pci-bridge",
    "ioh3420",
    "x3130-upstream",
    "xio3130-downstream",
    "i82801b11-bridge",
    "pxb",
];

/// What tells where a device is, by which buses have it: `-device` works it out where it is not said.
const PLACES: &[&str] = &["addr", "nr", "channel", "scsi-id", "lun", "unit"];

/// Devices of the running QEMU are what the recipe makes.
pub(super) fn follow(qmp: &mut Qmp, read: &mut Read, reasons: &mut Vec<String>) -> Result<(), QmpError> {
    let live = ask::devices(qmp)?;
    for device in &live {
        live::look_at(qmp, device, read, reasons);
    }
    let by_drive = live::has_drive(read, "virtio");
    let matched = matching::of(&read.recipe.arguments, &live, by_drive);
    for device in matched.strange.iter().map(|at| &live[*at]) {
        reasons.push(format!(
            "{} is not on the command line, and QEMU does not say that it was plugged in; unplug it \
             (device_del) or start the VM with it",
            device.words()
        ));
    }
    for (argument, at) in &matched.told {
        let note = memory::pin(qmp, &mut read.recipe.arguments[*argument], &live[*at])?;
        read.notes.extend(note);
    }
    let plugged: Vec<&Device> = live.iter().filter(|device| device.plugged).collect();
    if plugged.is_empty() && matched.gone.is_empty() {
        return Ok(());
    }
    let gone: BTreeSet<usize> = matched.gone.iter().copied().collect();
    reasons.extend(of_bridges(&plugged, gone.iter().map(|at| &read.recipe.arguments[*at])));
    let mut places = Places::ask(qmp, &live)?;
    if !gone.is_empty() {
        for (argument, at) in &matched.told {
            places.pin(qmp, &mut read.recipe.arguments[*argument], &live[*at])?;
        }
        if by_drive {
            reasons.push(
                "a device was unplugged, and the places of drives of -drive if=virtio depend on it; give \
                 them devices of their own (-drive if=none and -device virtio-blk-pci)"
                    .to_owned(),
            );
        }
    }
    let mut made = Vec::new();
    // Of one that is refused for what it is, that is enough.
    let can_follow = |device: &&Device| why_refused(&device.kind).is_none();
    for device in places.in_order(plugged).into_iter().filter(can_follow) {
        match describe(qmp, device, &mut places)? {
            Ok(mut argument) => {
                read.notes.extend(memory::pin(qmp, &mut argument, device)?);
                let parsed = options::parse(argument.value.as_deref().unwrap_or_default(), "driver");
                if get(&parsed, "drive").is_some() || device.kind.starts_with("usb-storage") {
                    read.notes.push(format!(
                        "{} was plugged in: QEMU cannot be asked for aio= and discard= of its disk, which \
                         are threads and ignore on the target",
                        device.words()
                    ));
                }
                made.push(argument);
            }
            Err(why) => reasons.push(format!(
                "{} was plugged in with what cannot be said again on the target: {why}; unplug it \
                 (device_del) or start the VM with it",
                device.words()
            )),
        }
    }
    reasons.extend(places.ambiguous());
    let mut at = 0;
    read.recipe.arguments.retain(|_| {
        at += 1;
        !gone.contains(&(at - 1))
    });
    read.recipe.arguments.extend(made);
    Ok(())
}

/// Of what makes the places into which others are plugged.
fn of_bridges<'a>(plugged: &[&Device], gone: impl Iterator<Item = &'a Argument>) -> Vec<String> {
    let is_bridge = |kind: &str| BRIDGES.iter().any(|bridge| kind.starts_with(bridge));
    let added = plugged.iter().filter(|device| is_bridge(&device.kind)).map(|device| {
        format!(
            "{} was plugged in: QEMU numbers the buses that its guest can plug devices into once, when it \
             starts, and on the target their numbers would be others; unplug it (device_del) or start the VM \
             with it",
            device.words()
        )
    });
    let gone = gone.filter_map(|argument| {
        let parsed = options::parse(argument.value.as_deref()?, "driver");
        let driver = get(&parsed, "driver").filter(|driver| is_bridge(driver))?;
        let id = get(&parsed, "id").unwrap_or("without an id");
        Some(format!(
            "device {id} ({driver}) of the command line was unplugged: QEMU numbers the buses that its guest \
             can plug devices into once, when it starts, and on the target their numbers would be others; \
             restart the VM without it"
        ))
    });
    added.chain(gone).collect()
}

/// One that was plugged in, as an argument; or why it cannot be one.
fn describe(
    qmp: &mut Qmp,
    device: &Device,
    places: &mut Places,
) -> Result<Result<Argument, String>, QmpError> {
    if is_vcpu(&device.kind) {
        return vcpu(qmp, device);
    }
    let place = match places.of(device) {
        Ok(place) => place,
        Err(why) => return Ok(Err(why)),
    };
    let properties = ask::properties(qmp, device)?;
    Ok(describe::argument(device, &place, &properties))
}

/// A vCPU. It has the features of all others: those of `-cpu`.
fn vcpu(qmp: &mut Qmp, device: &Device) -> Result<Result<Argument, String>, QmpError> {
    let slots = qmp.execute("query-hotpluggable-cpus", json!({}))?;
    let slot = slots.as_array().into_iter().flatten().find(|slot| slot["qom-path"] == device.path.as_str());
    let place = slot.map_or(Value::Null, |slot| slot["props"].clone());
    let cpus = qmp.execute("query-cpus-fast", json!({}))?;
    let first = cpus[0]["qom-path"].as_str().unwrap_or_default().to_owned();
    let words = ask::get(qmp, &[(first, "feature-words"), (device.path.clone(), "feature-words")])?;
    if words[0] != words[1] {
        return Ok(Err("it has other features than the first vCPU".to_owned()));
    }
    Ok(describe::vcpu(device, &place))
}

/// Where devices are.
struct Places {
    /// Their buses in QEMU's object tree, by their own places there.
    buses: BTreeMap<String, String>,
    /// How many devices on a USB bus have no id.
    nameless: usize,
    /// Ports of USB devices by their ids, and of those without one.
    ports: (BTreeMap<String, String>, Vec<String>),
    /// Buses that are named in arguments.
    named: BTreeSet<String>,
}

impl Places {
    fn ask(qmp: &mut Qmp, live: &[Device]) -> Result<Self, QmpError> {
        let asked: Vec<_> = live.iter().map(|device| (device.path.clone(), "parent_bus")).collect();
        let buses = ask::get(qmp, &asked)?;
        let bus = |answer: &Value| answer.as_str().unwrap_or_default().to_owned();
        let buses = live.iter().zip(&buses).map(|(device, answer)| (device.path.clone(), bus(answer)));
        let nameless = live.iter().filter(|device| !device.has_id && is_usb(&device.kind)).count();
        let has_usb = live.iter().any(|device| is_usb(&device.kind));
        let ports = if has_usb { ask::usb_ports(qmp)? } else { Default::default() };
        Ok(Self { buses: buses.collect(), nameless, ports, named: BTreeSet::new() })
    }

    fn bus(&self, device: &Device) -> &str {
        self.buses.get(&device.path).map_or("", String::as_str)
    }

    /// Where it is; or why that is not known.
    fn of(&mut self, device: &Device) -> Result<Place, String> {
        let bus = self.bus(device).to_owned();
        self.named.insert(bus.clone());
        if !is_usb(&device.kind) {
            return Ok(Place { bus, port: None });
        }
        match self.port(device) {
            Some(port) => Ok(Place { bus, port: Some(port.to_owned()) }),
            None => Err("QEMU does not tell its port; plug it in with an id".to_owned()),
        }
    }

    /// The port of a USB device: `1.2` is the second one of a hub at the first.
    fn port(&self, device: &Device) -> Option<&str> {
        let (named, others) = &self.ports;
        let port = match device.id() {
            Some(id) => named.get(id),
            // Of several, nobody tells which is which.
            None => others.first().filter(|_| self.nameless == 1 && others.len() == 1),
        };
        port.map(String::as_str).filter(|port| !port.is_empty())
    }

    /// Says in an argument where its device is, as far as it does not: the places of those after one that was
    /// unplugged are others when they are worked out anew.
    fn pin(&mut self, qmp: &mut Qmp, argument: &mut Argument, device: &Device) -> Result<(), QmpError> {
        let mut parsed = options::parse(argument.value.as_deref().unwrap_or_default(), "driver");
        let before = parsed.len();
        let bus = self.bus(device).to_owned();
        let keys: Vec<_> =
            PLACES.iter().copied().filter(|key| !bus.is_empty() && get(&parsed, key).is_none()).collect();
        let asked: Vec<_> = keys.iter().map(|key| (device.path.clone(), *key)).collect();
        for (key, answer) in keys.iter().zip(ask::get(qmp, &asked)?) {
            let Some(number) = answer.as_u64() else { continue };
            let value = if *key == "addr" { describe::pci_place(number) } else { number.to_string() };
            parsed.push(((*key).to_owned(), value));
        }
        if is_usb(&device.kind)
            && get(&parsed, "port").is_none()
            && let Some(port) = self.port(device)
        {
            parsed.push(("port".to_owned(), port.to_owned()));
        }
        if parsed.len() > before {
            let place = Place { bus, port: None };
            if let (None, Some(bus)) = (get(&parsed, "bus"), place.bus_name()) {
                parsed.push(("bus".to_owned(), bus.to_owned()));
                self.named.insert(place.bus.clone());
            }
            argument.value = Some(options::join(&parsed, "driver"));
        }
        Ok(())
    }

    /// Those that others are plugged into come first.
    fn in_order<'a>(&self, plugged: Vec<&'a Device>) -> Vec<&'a Device> {
        let (mut rest, mut ordered) = (plugged, Vec::new());
        let is_below = |whole: &str, part: &str, between: char| {
            whole.strip_prefix(part).is_some_and(|rest| rest.starts_with(between))
        };
        let is_in = |device: &Device, other: &Device| {
            let hub = self.bus(device) == self.bus(other)
                && self
                    .port(device)
                    .zip(self.port(other))
                    .is_some_and(|(port, hub)| is_below(port, hub, '.'));
            hub || is_below(self.bus(device), &other.path, '/')
        };
        while let Some(at) = rest.iter().position(|one| !rest.iter().any(|other| is_in(one, other))) {
            ordered.push(rest.remove(at));
        }
        ordered.extend(rest);
        ordered
    }

    /// Buses by whose names QEMU could take others.
    fn ambiguous(&self) -> Vec<String> {
        let name = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
        let all: BTreeSet<&String> = self.buses.values().filter(|path| !path.is_empty()).collect();
        let twice = |path: &&String| {
            !path.is_empty() && all.iter().filter(|other| name(other) == name(path)).count() > 1
        };
        let told = |path: &String| {
            format!(
                "a device was plugged in or unplugged, and two buses are called {}: give their controllers \
                 other ids",
                name(path)
            )
        };
        self.named.iter().filter(twice).map(told).collect()
    }
}

fn is_usb(kind: &str) -> bool {
    kind.starts_with("usb-") && !matches!(kind, "usb-ehci")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(rows: &[(&str, &str)]) -> Places {
        let path = |id: &str| format!("/machine/peripheral/{id}");
        let buses = rows.iter().map(|(id, bus)| (path(id), (*bus).to_owned())).collect();
        Places {
            buses,
            nameless: 0,
            ports: Default::default(),
            named: rows.iter().map(|(_, bus)| (*bus).to_owned()).collect(),
        }
    }

    fn device(id: &str, kind: &str) -> Device {
        let (path, name) = (format!("/machine/peripheral/{id}"), id.to_owned());
        Device { path, name, has_id: true, kind: kind.to_owned(), plugged: true }
    }

    #[test]
    fn a_controller_comes_before_what_is_plugged_into_it() {
        let places = places(&[
            ("a-disk", "/machine/peripheral/z/virtio-backend/z.0"),
            ("z", "/machine/q35/pcie.0/rp1"),
            ("other", "/machine/peripheral/zz/zz.0"),
        ]);
        let devices =
            [device("a-disk", "scsi-hd"), device("other", "scsi-hd"), device("z", "virtio-scsi-pci")];
        let ordered: Vec<_> =
            places.in_order(devices.iter().collect()).iter().map(|it| it.name.clone()).collect();
        assert_eq!(ordered, ["other", "z", "a-disk"]);
        let usb = "/machine/peripheral/usb/usb.0";
        let mut places = self::places(&[("a", usb), ("hub", usb), ("inner", usb)]);
        let ports = [("a", "1.2.1"), ("hub", "1"), ("inner", "1.2")];
        places.ports.0 = ports.map(|(id, port)| (id.to_owned(), port.to_owned())).into();
        let devices = [device("a", "usb-kbd"), device("hub", "usb-hub"), device("inner", "usb-hub")];
        let ordered: Vec<_> =
            places.in_order(devices.iter().collect()).iter().map(|it| it.name.clone()).collect();
        assert_eq!(ordered, ["hub", "inner", "a"]);
        assert_eq!(places.ambiguous(), Vec::<String>::new());
    }

    #[test]
    fn two_buses_of_one_name_are_told() {
        let places = places(&[
            ("a", "/machine/peripheral/scsi/scsi.0"),
            ("b", "/machine/peripheral-anon/device[1]/scsi.0"),
        ]);
        assert!(places.ambiguous()[0].contains("two buses are called scsi.0"), "{:?}", places.ambiguous());
    }

    #[test]
    fn bridges_are_neither_plugged_in_nor_unplugged() {
        let bridge = device("br1", "pci-bridge");
        let gone = [Argument::new("-device", "pcie-root-port,id=rp1"), Argument::new("-device", "VGA")];
        let told = of_bridges(&[&bridge, &device("it", "usb-tablet")], gone.iter());
        assert!(told.len() == 2 && told[0].contains("br1 (pci-bridge) was plugged in"), "{told:?}");
        assert!(
            told[1].contains("device rp1 (pcie-root-port) of the command line was unplugged"),
            "{told:?}"
        );
    }
}
