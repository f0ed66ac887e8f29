//! Devices that were plugged in after the start are in the same places on the target, and those that were
//! unplugged are nowhere.

use lab::{Doing, Guest, HandStart, Lab, Qmp, Result, Spec, Stage, VmFile, ensure, story, wait_for};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long a guest under emulation may take on a busy machine.
const ANSWER: Duration = Duration::from_secs(60);

/// Memory that was plugged in is used as soon as it is there, in a way in which it can be given back.
const WORK: &str = "whimbrel.check=24M,rate=4M memhp_default_state=online_movable";

const DIMM: u64 = 128 << 20;

/// A VM that others plug devices into.
struct Scene<'a> {
    stage: &'a Stage<'a>,
    lab: &'a Lab,
    guest: Guest,
    at: usize,
    began: Instant,
}

const HOSTS: [&str; 2] = ["a", "b"];

impl Scene<'_> {
    fn host(&self) -> &'static str {
        HOSTS[self.at]
    }

    /// A monitor of the VM where it is.
    fn monitor(&self) -> Result<Qmp> {
        monitor(self.lab, self.host())
    }

    /// Moves it to the other host; its devices with all their properties are there what they were here.
    fn migrate(&mut self, mut qmp: Qmp, mode: &str) -> Result<Qmp> {
        let (from, to) = (self.host(), HOSTS[1 - self.at]);
        let before = tree(&mut qmp)?;
        drop(qmp);
        self.stage.migrate("vm", &self.guest, from, to, &["--mode", mode])?;
        self.at = 1 - self.at;
        eprintln!("{:?}: moved to {to} by {mode}", self.began.elapsed());
        let mut qmp = self.monitor()?;
        let after = tree(&mut qmp)?;
        for (path, is) in &after {
            let was = before.get(path);
            ensure!(was == Some(is), "{mode} to {to}: {path} is {is}, and was {was:?}");
        }
        let lost: Vec<_> = before.keys().filter(|path| !after.contains_key(*path)).collect();
        ensure!(lost.is_empty(), "{mode} to {to}: lost {lost:?}");
        Ok(qmp)
    }

    /// What the guest sees.
    fn hardware(&self) -> Result<Value> {
        let answer = self.guest.ask("hardware")?;
        serde_json::from_str(&answer).doing(format!("understand {answer}"))
    }

    /// Has the guest use what was plugged in, as soon as it knows of it, until it sees this.
    fn sees(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Result<()> {
        let mut last = Value::Null;
        let found = wait_for(&format!("a guest that sees {what}"), ANSWER, || {
            self.guest.ask("online")?;
            last = self.hardware()?;
            Ok(is_it(&last).then_some(()))
        });
        found.map_err(|error| lab::Error::new(error.what, format!("{}: {last}", error.why)))
    }

    /// Unplugs, and waits until the guest has let it go.
    fn unplug(&self, qmp: &mut Qmp, id: &str) -> Result<()> {
        qmp.execute("device_del", json!({ "id": id }))?;
        // Of a device in two parts QEMU's event comes when something else wakes it.
        wait_for(&format!("the end of {id}"), ANSWER, || {
            let devices = qmp.execute("qom-list", json!({ "path": "/machine/peripheral" }))?;
            let there = devices.as_array().is_some_and(|all| all.iter().any(|one| one["name"] == id));
            Ok((!there).then_some(()))
        })?;
        eprintln!("{:?}: unplugged {id}", self.began.elapsed());
        Ok(())
    }
}

/// The monitor of a VM that whimbrel has started on this host.
fn monitor(lab: &Lab, host: &str) -> Result<Qmp> {
    let dir = lab.host(host).dir.join("run");
    let files = std::fs::read_dir(&dir).doing(format!("list {}", dir.display()))?;
    let is_one = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("vm-") && name.ends_with(".qmp")
    };
    let mut sockets: Vec<_> = files.flatten().map(|file| file.path()).filter(is_one).collect();
    sockets.sort();
    Qmp::connect(sockets.last().doing(format!("find the monitor of the VM on {host}"))?)
}

/// What a user can set of a device, and where it is: of all that were added, of memory and vCPUs.
fn tree(qmp: &mut Qmp) -> Result<BTreeMap<String, String>> {
    /// What QEMU chooses where it is not said, and does not tell afterwards; and what a guest says.
    const LEFT_OUT: [&str; 2] = ["port", "guest-stats"];
    let mut found = BTreeMap::new();
    for folder in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let devices = qmp.execute("qom-list", json!({ "path": folder }))?;
        for device in devices.as_array().into_iter().flatten() {
            let kind = device["type"].as_str().unwrap_or_default();
            let Some(kind) = kind.strip_prefix("child<").and_then(|kind| kind.strip_suffix('>')) else {
                continue;
            };
            let path = format!("{folder}/{}", device["name"].as_str().unwrap_or_default());
            let mut add = |property: &str| -> Result<()> {
                let asked = json!({ "path": path, "property": property });
                let value = qmp.execute("qom-get", asked).unwrap_or_default();
                found.insert(format!("{path} {property}"), value.to_string());
                Ok(())
            };
            add("type")?;
            add("parent_bus")?;
            if kind.ends_with("-cpu") {
                continue;
            }
            let properties = qmp.execute("device-list-properties", json!({ "typename": kind }))?;
            for property in properties.as_array().into_iter().flatten() {
                let name = property["name"].as_str().unwrap_or_default();
                if !LEFT_OUT.contains(&name) {
                    let asked = json!({ "path": path, "property": name });
                    let value = qmp.execute("qom-get", asked).unwrap_or_default();
                    found.insert(format!("{path} {name}"), value.to_string());
                }
            }
        }
    }
    let slots = qmp.execute("query-hotpluggable-cpus", json!({}))?;
    for slot in slots.as_array().into_iter().flatten() {
        found.insert(format!("vCPU {}", slot["props"]), slot["qom-path"].to_string());
    }
    let dimms = qmp.execute("query-memory-devices", json!({}))?;
    for dimm in dimms.as_array().into_iter().flatten().map(|dimm| &dimm["data"]) {
        found.insert(
            format!("memory {}", dimm["id"]),
            format!("{} {} {}", dimm["addr"], dimm["slot"], dimm["size"]),
        );
    }
    let usb = qmp.human("info usb")?;
    for line in usb.lines().filter_map(|line| line.split_once(", ID: ")) {
        let port = line.0.split_once(", Port ").map_or("", |(_, rest)| rest.split(',').next().unwrap_or(""));
        found.insert(format!("USB {}", line.1.trim()), port.to_owned());
    }
    Ok(found)
}

/// What was unplugged is in use until QEMU has cleared it away.
fn all(qmp: &mut Qmp, commands: &[(&str, Value)]) -> Result<()> {
    for (command, arguments) in commands {
        wait_for(&format!("{command} {arguments}"), ANSWER, || {
            match qmp.execute(command, arguments.clone()) {
                Ok(_) => Ok(Some(())),
                Err(error) if ["in use", "Duplicate"].iter().any(|word| error.why.contains(word)) => Ok(None),
                Err(error) => Err(error),
            }
        })?;
    }
    Ok(())
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn image(path: &Path) -> Result<String> {
    std::fs::write(path, vec![0; 8 << 20]).doing("make a disk")?;
    Ok(path.display().to_string())
}

fn has(list: &Value, name: &str) -> bool {
    list.as_array().is_some_and(|list| list.iter().any(|one| one == name))
}

/// A QEMU that somebody else has started, with room for devices.
fn by_hand<'a>(
    stage: &'a Stage<'a>,
    lab: &'a Lab,
    number: u8,
    machine: &str,
    extra: &str,
) -> Result<(Scene<'a>, lab::HandStarted, Qmp)> {
    let second = lab.dir().join("q2");
    let extra = format!(
        "-qmp unix:{},server=on,wait=off -smp 1,maxcpus=4 -m size=268435456B,slots=4,maxmem=2G {extra}",
        second.display()
    );
    let spec = Spec::new(number, WORK);
    let start = HandStart { machine: machine.to_owned(), extra: words(&extra), ..HandStart::new(spec) };
    let (guest, machine) = stage.adopt("a", "vm", start)?;
    Ok((Scene { stage, lab, guest, at: 0, began: Instant::now() }, machine, Qmp::connect(&second)?))
}

#[test]
fn i9_what_was_plugged_into_a_q35_is_plugged_in_there() {
    story("devices plugged into a q35", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let disk = image(&lab.dir().join("late.img"))?;
        let extra = "-device pcie-root-port,id=rp1,chassis=1,bus=pcie.0,addr=10.0 \
             -device pcie-root-port,id=rp2,chassis=2,bus=pcie.0,addr=11.0 \
             -device pcie-root-port,id=rp3,chassis=3,bus=pcie.0,addr=12.0 \
             -device virtio-serial-pci,id=serial -device qemu-xhci,id=usb -device usb-kbd,id=keys \
             -device virtio-rng-pci,id=first,bus=rp3";
        let (mut scene, _machine, mut qmp) = by_hand(&stage, lab, 95, "q35", extra)?;
        lab.host("a").add_tap("t-late")?;
        let memory = |now: &Value| now["memory_mib"].as_u64().unwrap_or(0);
        let first = memory(&scene.hardware()?);
        let chardev = json!({ "type": "null", "data": {} });
        all(
            &mut qmp,
            &[
                (
                    "netdev_add",
                    json!({ "type": "tap", "id": "late-net", "ifname": "t-late", "script": "no",
                        "downscript": "no" }),
                ),
                (
                    "device_add",
                    json!({ "driver": "virtio-net-pci", "id": "card", "bus": "rp1", "netdev": "late-net",
                        "mac": "52:54:00:77:00:01", "guest_tso4": false }),
                ),
                (
                    "blockdev-add",
                    json!({ "driver": "file", "node-name": "late-file", "filename": disk,
                        "cache": { "direct": true } }),
                ),
                (
                    "blockdev-add",
                    json!({ "driver": "raw", "node-name": "late-disk", "file": "late-file",
                        "detect-zeroes": "on" }),
                ),
                ("object-add", json!({ "qom-type": "iothread", "id": "thread", "poll-max-ns": 1000 })),
                (
                    "device_add",
                    json!({ "driver": "virtio-blk-pci", "id": "disk", "bus": "rp2", "drive": "late-disk",
                        "serial": "LATE", "iothread": "thread" }),
                ),
                ("chardev-add", json!({ "id": "late-port", "backend": chardev })),
                (
                    "device_add",
                    json!({ "driver": "virtserialport", "id": "port", "chardev": "late-port",
                        "name": "org.late.0" }),
                ),
                ("device_add", json!({ "driver": "usb-tablet", "id": "tablet" })),
                (
                    "object-add",
                    json!({ "qom-type": "memory-backend-ram", "id": "late-memory", "size": DIMM }),
                ),
                ("device_add", json!({ "driver": "pc-dimm", "id": "dimm", "memdev": "late-memory" })),
                (
                    "device_add",
                    json!({ "driver": "qemu64-x86_64-cpu", "id": "cpu", "socket-id": 0, "core-id": 1,
                        "thread-id": 0 }),
                ),
            ],
        )?;
        // The other way: one of the command line is unplugged, and its id is another's then.
        scene.unplug(&mut qmp, "first")?;
        all(
            &mut qmp,
            &[
                ("object-add", json!({ "qom-type": "rng-random", "id": "dice", "filename": "/dev/urandom" })),
                (
                    "device_add",
                    json!({ "driver": "virtio-rng-pci", "id": "first", "bus": "rp3", "rng": "dice",
                        "max-bytes": 1234, "period": 1000 }),
                ),
            ],
        )?;
        scene.sees("a card, a disk, a port and memory", |now| {
            memory(now) >= first + 100
                && has(&now["disks"], "vda")
                && has(&now["cards"], "eth1")
                && has(&now["ports"], "org.late.0")
        })?;
        scene.sees("two vCPUs", |now| now["cpus"] == 2)?;
        // More than there was without it.
        scene.guest.order(&format!("claim {first}"))?;

        let mut qmp = scene.migrate(qmp, "pre-copy")?;
        scene.sees("what it saw", |now| {
            now["cpus"] == 2 && has(&now["disks"], "vda") && has(&now["cards"], "eth1")
        })?;
        // There it is unplugged, and more is plugged in.
        scene.unplug(&mut qmp, "card")?;
        all(&mut qmp, &[("netdev_del", json!({ "id": "late-net" }))])?;
        scene.sees("no second card", |now| !has(&now["cards"], "eth1"))?;
        scene.unplug(&mut qmp, "disk")?;
        all(
            &mut qmp,
            &[
                ("blockdev-del", json!({ "node-name": "late-disk" })),
                ("blockdev-del", json!({ "node-name": "late-file" })),
            ],
        )?;
        scene.unplug(&mut qmp, "keys")?;
        scene.unplug(&mut qmp, "port")?;
        all(
            &mut qmp,
            &[
                (
                    "object-add",
                    json!({ "qom-type": "memory-backend-memfd", "id": "more-memory", "size": DIMM }),
                ),
                ("device_add", json!({ "driver": "pc-dimm", "id": "dimm2", "memdev": "more-memory" })),
                ("device_add", json!({ "driver": "virtio-balloon-pci", "id": "balloon", "bus": "rp2" })),
                (
                    "device_add",
                    json!({ "driver": "qemu64-x86_64-cpu", "id": "cpu2", "socket-id": 0, "core-id": 2,
                        "thread-id": 0 }),
                ),
            ],
        )?;
        scene.sees("more memory", |now| !has(&now["disks"], "vda") && memory(now) >= first + 200)?;
        let mut qmp = scene.migrate(qmp, "post-copy")?;
        scene.sees("three vCPUs", |now| now["cpus"] == 3)?;
        // Memory can be unplugged where it was never plugged in.
        scene.unplug(&mut qmp, "dimm2")?;
        scene.migrate(qmp, "hybrid").map(drop)
    });
}

#[test]
fn i9_what_was_plugged_into_a_pc_is_plugged_in_there() {
    story("devices plugged into a pc", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let disks = ["one", "two"].map(|name| image(&lab.dir().join(format!("{name}.img"))));
        let [one, two] = disks;
        let (one, two) = (one?, two?);
        // The first has no place of its own, and those after it depend on that.
        let extra = "-device virtio-rng-pci,id=first -device virtio-scsi-pci,id=scsi \
                     -device virtio-balloon-pci -device qemu-xhci,id=usb";
        let (mut scene, _machine, mut qmp) = by_hand(&stage, lab, 96, "pc", extra)?;
        let refused = |said: &str| -> Result<()> {
            let report = stage.start_migration("vm", "a", "b", &[])?.ended("failed", 1)?;
            ensure!(report.error().contains(said), "{said}: {}", report.error());
            Ok(())
        };
        // As Proxmox does it.
        let added = qmp
            .human(&format!("drive_add auto \"file={one},if=none,id=drive-scsi1,format=raw,cache=none\""))?;
        ensure!(added.contains("OK"), "{added}");
        all(
            &mut qmp,
            &[
                (
                    "device_add",
                    json!({ "driver": "scsi-hd", "id": "scsi1", "bus": "scsi.0", "scsi-id": 1,
                        "drive": "drive-scsi1" }),
                ),
                (
                    "blockdev-add",
                    json!({ "driver": "raw", "node-name": "d2",
                        "file": { "driver": "file", "filename": two } }),
                ),
                (
                    "device_add",
                    json!({ "driver": "virtio-blk-pci", "id": "virtio2", "drive": "d2", "bus": "pci.0",
                        "addr": "0x15" }),
                ),
            ],
        )?;
        scene.sees("a disk", |now| has(&now["disks"], "vda"))?;
        scene.unplug(&mut qmp, "first")?;
        // What cannot be the same there is refused, and then it can be mended.
        all(
            &mut qmp,
            &[
                ("netdev_add", json!({ "type": "user", "id": "u" })),
                ("device_add", json!({ "driver": "pci-bridge", "id": "bridge", "chassis_nr": 7 })),
            ],
        )?;
        refused("device bridge (pci-bridge) was plugged in: QEMU numbers the buses")?;
        refused("network u (user) was added after the start, and QEMU cannot be asked for its options")?;
        scene.unplug(&mut qmp, "bridge")?;
        all(&mut qmp, &[("netdev_del", json!({ "id": "u" }))])?;
        let mut qmp = scene.migrate(qmp, "post-copy")?;
        scene.unplug(&mut qmp, "virtio2")?;
        scene.sees("no disk", |now| !has(&now["disks"], "vda"))?;
        scene.unplug(&mut qmp, "scsi1")?;
        scene.migrate(qmp, "pre-copy").map(drop)
    });
}

#[test]
fn i9_a_vm_of_run_takes_what_was_plugged_in_along() {
    story("devices plugged into a VM of run", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let disk = image(&lab.dir().join("vm.img"))?;
        let extra =
            "args = [\"-device\", \"pcie-root-port,id=rp1,chassis=1\", \"-device\", \"qemu-xhci,id=usb\", \
                     \"-device\", \"virtio-rng-pci,id=dice\"]"
                .to_owned();
        let file = VmFile {
            extra,
            disks: vec![(disk.clone().into(), "raw".to_owned())],
            ..VmFile::new("vm", Spec::new(97, WORK))
        };
        let guest = stage.run("a", &file)?;
        let mut scene = Scene { stage: &stage, lab, guest, at: 0, began: Instant::now() };
        let mut qmp = scene.monitor()?;
        all(
            &mut qmp,
            &[
                ("device_add", json!({ "driver": "virtio-balloon-pci", "id": "balloon", "bus": "rp1" })),
                ("device_add", json!({ "driver": "usb-tablet", "id": "tablet", "bus": "usb.0" })),
                ("device_add", json!({ "driver": "usb-kbd", "id": "keys", "bus": "usb.0" })),
            ],
        )?;
        scene.unplug(&mut qmp, "tablet")?;
        let mut qmp = scene.migrate(qmp, "hybrid")?;
        // One that came as an option is unplugged as one that came later.
        scene.unplug(&mut qmp, "balloon")?;
        let scsi = json!({ "driver": "virtio-scsi-pci", "id": "scsi", "bus": "rp1" });
        all(&mut qmp, &[("device_add", scsi)])?;
        scene.migrate(qmp, "pre-copy").map(drop)
    });
}
