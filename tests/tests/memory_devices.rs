//! Memory that is plugged and unplugged, whole modules and bit by bit (virtio-mem), around and during moves.

use lab::{Doing, HandStart, Lab, Qmp, Ram, Result, Spec, Stage, ensure, story, wait_for};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::PathBuf, time::Duration};

/// How long a guest under emulation may take on a busy machine.
const ANSWER: Duration = Duration::from_secs(60);

const MIB: u64 = 1 << 20;

/// Memory that was plugged in is used as soon as it is there, in a way in which it can be given back.
const WORK: &str = "whimbrel.check=24M,rate=4M whimbrel.dirty=16M,rate=4M,pattern=hot-cold \
                    memhp_default_state=online_movable";

/// The monitor of the VM that whimbrel has started on this host.
fn monitor(lab: &Lab, host: &str) -> Result<Qmp> {
    let dir = lab.host(host).dir.join("run");
    let files = std::fs::read_dir(&dir).doing(format!("list {}", dir.display()))?;
    let is_one = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "qmp");
    let mut sockets: Vec<_> = files.flatten().map(|file| file.path()).filter(is_one).collect();
    sockets.sort();
    Qmp::connect(sockets.last().doing(format!("find the monitor of the VM on {host}"))?)
}

/// The memory devices by their ids.
fn devices(qmp: &mut Qmp) -> Result<BTreeMap<String, Value>> {
    let answer = qmp.execute("query-memory-devices", json!({}))?;
    let all = answer.as_array().into_iter().flatten().map(|one| one["data"].clone());
    Ok(all.map(|data| (data["id"].as_str().unwrap_or("?").to_owned(), data)).collect())
}

/// Where each is, and what is asked of it.
fn places(qmp: &mut Qmp) -> Result<BTreeMap<String, String>> {
    let place = |data: Value| {
        let asked = ["addr", "slot", "memaddr", "block-size", "requested-size", "node", "max-size"];
        asked.iter().map(|key| format!("{key} {} ", data[key])).collect::<String>()
    };
    Ok(devices(qmp)?.into_iter().map(|(id, data)| (id, place(data))).collect())
}

fn ask_for(qmp: &mut Qmp, id: &str, mib: u64) -> Result<()> {
    let path = format!("/machine/peripheral/{id}");
    let asked = json!({ "path": path, "property": "requested-size", "value": mib * MIB });
    qmp.execute("qom-set", asked).map(drop)
}

/// Waits until the guest has as much of it as was asked for.
fn until(qmp: &mut Qmp, id: &str, mib: u64) -> Result<()> {
    wait_for(&format!("{mib} MiB of {id}"), ANSWER, || {
        let now = devices(qmp)?;
        Ok((now.get(id).and_then(|data| data["size"].as_u64()) == Some(mib * MIB)).then_some(()))
    })
}

#[test]
fn i2_virtio_mem_that_grows_and_shrinks_loses_nothing() {
    story("virtio-mem in every mode", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let second = lab.dir().join("q2");
        let extra = format!(
            "-qmp unix:{},server=on,wait=off -m size=268435456B,slots=4,maxmem=4G \
             -device pcie-root-port,id=rp1,chassis=1 -object memory-backend-ram,id=d0,size=128M \
             -device pc-dimm,id=dimm0,memdev=d0 -object memory-backend-ram,id=d1,size=128M \
             -device pc-dimm,id=dimm1,memdev=d1 -object memory-backend-ram,id=m0,size=512M \
             -device virtio-mem-pci,id=vmem0,memdev=m0,requested-size=64M,prealloc=on",
            second.display()
        );
        let extra = extra.split_whitespace().map(str::to_owned).collect();
        let start = HandStart { extra, ram: Ram::Private, ..HandStart::new(Spec::new(98, WORK)) };
        let (guest, _machine) = stage.adopt("a", "vm", start)?;
        let mut q2 = Qmp::connect(&second)?;
        until(&mut q2, "vmem0", 64)?;
        // The second module stays where it is when the first one goes.
        q2.execute("device_del", json!({ "id": "dimm0" }))?;
        let later =
            json!({ "qom-type": "memory-backend-memfd", "id": "m1", "size": 256 * MIB, "share": true });
        q2.execute("object-add", later)?;
        let device = json!({ "driver": "virtio-mem-pci", "id": "vmem1", "memdev": "m1", "bus": "rp1",
            "requested-size": 32 * MIB });
        q2.execute("device_add", device)?;
        until(&mut q2, "vmem1", 32)?;
        wait_for("the end of a module", ANSWER, || {
            Ok((!devices(&mut q2)?.contains_key("dimm0")).then_some(()))
        })?;

        // It grows, and is filled, while it is moved.
        let options = ["--verify", "--mode", "pre-copy", "--bandwidth", "400Mbit"];
        let mut migration = stage.start_migration("vm", "a", "b", &options)?;
        migration.until_moving("pre-copy")?;
        ask_for(&mut q2, "vmem0", 192)?;
        ask_for(&mut q2, "vmem1", 0)?;
        guest.order("claim 160")?;
        let before = places(&mut q2)?;
        let report = migration.completed()?;
        stage.check_moved("vm", &guest, "a", "b")?;
        ensure!(report.verified() == Some(true), "memory was compared: {}", report.0);
        let mut qmp = monitor(lab, "b")?;
        let after = places(&mut qmp)?;
        ensure!(before == after, "{before:?}, on the target {after:?}");
        until(&mut qmp, "vmem0", 192)?;
        until(&mut qmp, "vmem1", 0)?;
        // It shrinks, and another one grows, when it goes back by post-copy.
        for (id, mib) in [("vmem0", 160), ("vmem1", 64)] {
            ask_for(&mut qmp, id, mib)?;
        }
        drop(qmp);
        stage.migrate("vm", &guest, "b", "a", &["--mode", "post-copy"])?;
        let mut qmp = monitor(lab, "a")?;
        until(&mut qmp, "vmem0", 160)?;
        until(&mut qmp, "vmem1", 64)?;
        drop(qmp);
        guest.verify().map(drop)
    });
}
