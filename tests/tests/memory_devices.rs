//! Memory that is plugged and unplugged, whole modules and bit by bit (virtio-mem), around and during moves.

use lab::{
    Datastore, Doing, HandStart, Lab, Oddity, QEMU, Qmp, Ram, Result, Spec, Stage, Tools, ensure, story,
    wait_for,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

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
        // What is plugged into it travels as all memory does, and not in the pause.
        ensure!(report.0["guest_bytes"] == (256 + 128 + 512 + 256) * MIB, "{}", report.0);
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

/// How much of its host's memory a virtio-mem device of this QEMU process takes. Its backend is a file or a
/// memfd.
fn taken(process: &Path, qmp: &mut Qmp, id: &str) -> Result<u64> {
    let data = devices(qmp)?.remove(id).doing("find the device")?;
    let backend = data["memdev"].as_str().unwrap_or_default().replace("/objects", "");
    let blocks = qmp.human("info ramblock")?;
    let words = blocks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let listed = words.filter(|words| words.first().is_some_and(|name| name.ends_with(&backend)));
    // QEMU 7.2 does not list where a block lies, but it maps all of them.
    let at = match listed.map(|words| words[words.len() - 2].to_owned()).next() {
        Some(address) if address.starts_with("0x00007") => address,
        _ => qmp.human(&format!("gpa2hva {}", data["memaddr"]))?,
    };
    let number = at.split_whitespace().next_back().and_then(|word| word.strip_prefix("0x"));
    let at = number.and_then(|word| u64::from_str_radix(word, 16).ok()).doing(format!("read {at}"))?;
    let maps = fs::read_to_string(process.join("maps")).doing("read the mappings")?;
    let holds = |range: &&str| {
        let ends =
            range.split_once('-').map(|(start, end)| [start, end].map(|at| u64::from_str_radix(at, 16)));
        matches!(ends, Some([Ok(start), Ok(end)]) if (start..end).contains(&at))
    };
    let range =
        maps.lines().filter_map(|line| line.split(' ').next()).find(holds).doing("find its memory")?;
    let file = fs::metadata(process.join("map_files").join(range)).doing("look at its memory")?;
    Ok(file.blocks() * 512)
}

/// A VM with three virtio-mem devices, each of another backend: one has a name that another block's ends
/// with, one is plugged in below a bridge, one wants its pages at once. It is moved in every mode, between
/// these QEMUs.
fn every_backend(lab: &Lab, tools: &Tools, number: u8, qemus: [&Path; 2], first: &str) -> Result<()> {
    let store = Datastore::mount(&lab.dir().join("store"), &lab.dir().join("disk"));
    let store = store.doing("mount a datastore")?;
    let stage = Stage::with(lab, tools, |host| {
        let lines = format!("qemu = {:?}", qemus[usize::from(host.name == "b")]);
        Oddity { lines, ..Oddity::default() }
    })?;
    let (second, file) = (lab.dir().join("q2"), tempfile::tempdir_in("/dev/shm").doing("make a directory")?);
    let extra = format!(
        "-qmp unix:{},server=on,wait=off -m size=268435456B,slots=4,maxmem=4G \
         -device pcie-root-port,id=rp1,chassis=1 -object memory-backend-ram,id=vga.vram,size=128M \
         -device virtio-mem-pci,id=vmem0,memdev=vga.vram,requested-size=64M{first} \
         -object memory-backend-file,id=f0,size=128M,share=on,mem-path={} \
         -device virtio-mem-pci,id=vmem2,memdev=f0,requested-size=64M,block-size=4M,prealloc=on",
        second.display(),
        file.path().join("f0").display()
    );
    let extra = extra.split_whitespace().map(str::to_owned).collect();
    let (qemu, spec) = (qemus[0].to_owned(), Spec::new(number, WORK));
    let start = HandStart { extra, qemu, vga: true, ..HandStart::new(spec) };
    let (guest, _machine) = stage.adopt("a", "vm", start)?;
    let mut qmp = Qmp::connect(&second)?;
    let backend = json!({ "qom-type": "memory-backend-memfd", "id": "m1", "size": 128 * MIB, "share": true });
    qmp.execute("object-add", backend)?;
    let device = json!({ "driver": "virtio-mem-pci", "id": "vmem1", "memdev": "m1", "bus": "rp1",
        "requested-size": 64 * MIB });
    qmp.execute("device_add", device)?;
    for id in ["vmem0", "vmem1", "vmem2"] {
        until(&mut qmp, id, 64)?;
    }
    guest.order("claim 150")?;
    let spool = store.path().to_string_lossy().into_owned();
    let moves: [(&[&str], [u64; 3]); 4] = [
        (&["--mode", "pre-copy"], [96, 0, 96]),
        (&["--mode", "hybrid"], [64, 64, 64]),
        (&["--mode", "post-copy"], [32, 96, 64]),
        (&["--mode", "pre-copy", "--spool", &spool], [64, 64, 64]),
    ];
    for (n, (options, sizes)) in moves.into_iter().enumerate() {
        let (from, to) = if n % 2 == 0 { ("a", "b") } else { ("b", "a") };
        // What grows first: what shrinks needs room for what it held.
        let mut changes: Vec<_> = ["vmem0", "vmem1", "vmem2"].into_iter().zip(sizes).collect();
        changes.sort_by_key(|(_, mib)| std::cmp::Reverse(*mib));
        for (id, mib) in &changes {
            ask_for(&mut qmp, id, *mib)?;
            until(&mut qmp, id, *mib)?;
        }
        drop(qmp);
        let options: Vec<_> = options.iter().copied().chain(["--allow-older-qemu"]).collect();
        let report = stage.migrate("vm", &guest, from, to, &options)?;
        ensure!(report.0["guest_bytes"] == (256 + 3 * 128) * MIB, "{}", report.0);
        // The agent asks the same monitor.
        let shown = stage.show(to, "vm")?.doing("find the VM")?;
        let process = PathBuf::from(format!("/proc/{}", shown["pid"]));
        qmp = monitor(lab, to)?;
        for (id, mib) in changes {
            until(&mut qmp, id, mib)?;
            let taken = taken(&process, &mut qmp, id)?;
            eprintln!("{options:?}: {id} has {mib} MiB and takes {} KiB of {to}", taken >> 10);
            ensure!(taken <= mib * MIB, "{id}: what is unplugged takes memory, {taken} bytes in all");
        }
    }
    drop(qmp);
    // To another QEMU of this host it travels, too; all else is handed over.
    let report = stage.start_migration("vm", "a", "self", &["--verify"])?.completed()?;
    ensure!(report.0["guest_bytes"] == (256 + 3 * 128) * MIB, "{}", report.0);
    ensure!(report.0["handed_over"] == 256 * MIB, "{}", report.0);
    stage.runs_only_on("vm", "a")?;
    guest.verify().map(drop)
}

#[test]
fn i2_virtio_mem_of_every_backend_moves_in_every_mode() {
    story("virtio-mem of every backend", &["a", "b"], |lab, tools| {
        let newer = tools.qemu_10.as_deref().unwrap_or(Path::new(QEMU));
        every_backend(lab, tools, 99, [Path::new(QEMU), newer], "")
    });
}

/// QEMU 10 with a machine of its own loads what is plugged ahead of all devices, and maps nothing else.
#[test]
fn i2_virtio_mem_of_a_new_machine_moves_in_every_mode() {
    story("virtio-mem of a new machine", &["a", "b"], |lab, tools| {
        let Some(newer) = &tools.qemu_10 else {
            lab::skip(
                "a new machine",
                &"WHIMBREL_QEMU_10 must name a QEMU 10 (tests/qemu-10.sh unpacks one)",
            );
            return Ok(());
        };
        every_backend(lab, tools, 100, [newer, newer], ",dynamic-memslots=on")
    });
}

/// The pause does not grow with what is plugged in.
#[test]
#[ignore = "measures; on a quiet machine: cargo test --release -p lab --test memory_devices -- --ignored"]
fn figures_of_the_pause_with_virtio_mem() {
    const MOVES: usize = 7;
    story("figures of virtio-mem", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        for (number, claimed) in [(103, 16), (104, 96), (105, 256)] {
            let (second, name) = (lab.dir().join(format!("q{number}")), format!("vm{number}"));
            let extra = format!(
                "-qmp unix:{},server=on,wait=off -m size=268435456B,slots=4,maxmem=4G \
                 -object memory-backend-ram,id=m0,size=512M \
                 -device virtio-mem-pci,id=vmem0,memdev=m0,requested-size=320M",
                second.display()
            );
            let extra = extra.split_whitespace().map(str::to_owned).collect();
            let spec = Spec::new(number, "whimbrel.check=24M,rate=1M memhp_default_state=online_movable");
            let start = HandStart { extra, ram: Ram::Private, ..HandStart::new(spec) };
            let (guest, _machine) = stage.adopt("a", &name, start)?;
            until(&mut Qmp::connect(&second)?, "vmem0", 320)?;
            guest.order(&format!("claim {claimed}"))?;
            let mut pauses = Vec::new();
            for n in 0..MOVES {
                let (from, to) = if n % 2 == 0 { ("a", "b") } else { ("b", "a") };
                let options = ["--mode", "pre-copy"];
                let report = stage.start_migration(&name, from, to, &options)?.completed()?;
                stage.check_moved(&name, &guest, from, to)?;
                pauses.push(report.number("downtime_ms")?);
            }
            pauses.sort_by(f64::total_cmp);
            eprintln!("{claimed} MiB of it in use: {:.1} ms, of {pauses:.1?}", pauses[MOVES / 2]);
            stage.agent("b").cli().json(&["stop", &name])?;
        }
        Ok(())
    });
}
