//! VMs that others change: with a second monitor, before they are moved and while they are.

use lab::{
    Doing, Guest, HandStart, Lab, Migration, Qmp, Result, Spec, Stage, Tools, VmFile, ensure, story, wait_for,
};
use serde_json::{Value, json};
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const WORK: &str = "whimbrel.check=32M,rate=4M whimbrel.disk=vda,set=8M";
const SOON: Duration = Duration::from_secs(20);

/// A guest with a disk, two CD drives, and a monitor that is not whimbrel's.
struct Scene<'a> {
    stage: &'a Stage<'a>,
    guest: Guest,
    machine: lab::HandStarted,
    q2: Qmp,
    media: [PathBuf; 2],
}

impl<'a> Scene<'a> {
    fn new(stage: &'a Stage<'a>, lab: &Lab, tools: &Tools, number: u8) -> Result<Self> {
        let at = |name: &str| lab.dir().join(name);
        let media = [at("a.iso"), at("b.iso")];
        for path in &media {
            std::fs::write(path, vec![1; 1 << 20]).doing("make a medium")?;
        }
        std::fs::write(at("d.img"), vec![0; 32 << 20]).doing("make a disk")?;
        let (disk, iso, q2) = (at("d.img"), &media[0], at("q2"));
        let words = [
            "-qmp".to_owned(),
            format!("unix:{},server=on,wait=off", q2.display()),
            // Room for memory and devices that come later.
            "-m".to_owned(),
            "size=268435456B,slots=2,maxmem=1G".to_owned(),
            "-blockdev".to_owned(),
            format!("driver=file,node-name=f0,filename={}", disk.display()),
            "-blockdev".to_owned(),
            "driver=raw,node-name=d0,file=f0".to_owned(),
            "-device".to_owned(),
            "virtio-blk-pci,id=blk0,drive=d0".to_owned(),
            "-object".to_owned(),
            "throttle-group,id=lim,x-iops-total=5000".to_owned(),
            "-drive".to_owned(),
            format!("if=none,id=cd0,media=cdrom,readonly=on,format=raw,file={}", iso.display()),
            "-device".to_owned(),
            "ide-cd,id=cd,drive=cd0".to_owned(),
            "-device".to_owned(),
            "virtio-scsi-pci,id=scsi".to_owned(),
            "-device".to_owned(),
            "scsi-cd,id=ecd".to_owned(),
            "-device".to_owned(),
            "qemu-xhci,id=usb".to_owned(),
        ];
        let spec = Spec::new(number, WORK);
        let start = HandStart { extra: words.to_vec(), ..HandStart::new(spec.clone()) };
        let machine = start.start(lab.host("a"), tools)?;
        let guest = Guest::reach(&stage.client, &spec)?;
        Ok(Self { stage, guest, machine, q2: Qmp::connect(&q2)?, media })
    }

    fn adopt(&self) -> Result<()> {
        let socket = self.machine.qmp_socket();
        self.stage.agent("a").cli().json(&["adopt", "vm", "--qmp", &socket.to_string_lossy()]).map(drop)
    }

    fn all(&mut self, commands: &[(&str, Value)]) -> Result<()> {
        for (command, arguments) in commands {
            self.q2.execute(command, arguments.clone())?;
        }
        Ok(())
    }

    /// A migration that takes long.
    fn slow(&self, more: &[&str]) -> Result<Migration> {
        let options = [&["--mode", "pre-copy", "--bandwidth", "8Mbit"], more].concat();
        let mut migration = self.stage.start_migration("vm", "a", "b", &options)?;
        migration.until_moving("pre-copy")?;
        Ok(migration)
    }

    fn status(&mut self) -> Result<String> {
        let answer = self.q2.execute("query-status", json!({}))?;
        Ok(answer["status"].as_str().unwrap_or("?").to_owned())
    }

    /// QEMU's own migration has this status.
    fn own(&mut self, status: &str) -> Result<()> {
        wait_for(&format!("QEMU's own migration to be {status}"), SOON, || {
            let now = self.q2.execute("query-migrate", json!({}))?;
            Ok((now["status"] == status).then_some(()))
        })
    }
}

/// What is done, how it is told, and how it is undone.
type Change = (&'static str, Vec<(&'static str, Value)>, &'static str, Vec<(&'static str, Value)>);

fn changes(dir: &Path, media: &[PathBuf; 2]) -> Vec<Change> {
    let nbd = dir.join("nbd").display().to_string();
    let address = json!({ "type": "unix", "data": { "path": nbd } });
    let backup = json!({ "job-id": "b0", "device": "d0", "target": "nul", "sync": "full", "speed": 1 });
    let null = json!({ "driver": "null-co", "node-name": "nul", "size": 32 << 20, "read-zeroes": true });
    let medium =
        |path: &PathBuf| json!({ "id": "cd", "filename": path.display().to_string(), "format": "raw" });
    let limits = |iops: u32| {
        let limits = json!({ "iops-total": iops });
        ("qom-set", json!({ "path": "/objects/lim", "property": "limits", "value": limits }))
    };
    vec![
        (
            "a backup",
            vec![("blockdev-add", null), ("blockdev-backup", backup)],
            "job b0 (backup)",
            vec![("block-job-cancel", json!({ "device": "b0", "force": true }))],
        ),
        (
            "an NBD export",
            vec![
                ("nbd-server-start", json!({ "addr": address })),
                ("block-export-add", json!({ "type": "nbd", "id": "e0", "node-name": "d0" })),
            ],
            "export e0 (nbd of node d0)",
            vec![("block-export-del", json!({ "id": "e0" })), ("nbd-server-stop", json!({}))],
        ),
        (
            "another medium",
            vec![("blockdev-change-medium", medium(&media[1]))],
            "drive cd is node",
            vec![("blockdev-change-medium", medium(&media[0]))],
        ),
        (
            "a device",
            vec![("device_add", json!({ "driver": "usb-tablet", "id": "late", "bus": "usb.0" }))],
            "device late (usb-tablet)",
            vec![("device_del", json!({ "id": "late" }))],
        ),
        (
            "the limits of a group",
            vec![limits(7000)],
            "throttle group lim is iops-total=7000, and was iops-total=5000",
            vec![limits(5000)],
        ),
        (
            "QEMU's own migration",
            vec![
                ("migrate-set-parameters", json!({ "max-bandwidth": 65536 })),
                ("migrate", json!({ "uri": "exec:cat >/dev/null" })),
            ],
            "QEMU's own migration",
            vec![("migrate_cancel", json!({}))],
        ),
    ]
}

#[test]
fn i1_i3_a_vm_that_is_changed_is_not_moved() {
    story("a second monitor", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let mut scene = Scene::new(&stage, lab, tools, 91)?;
        scene.adopt()?;
        for (what, act, told, undo) in changes(lab.dir(), &scene.media.clone()) {
            // While it is moved: it ends when the change happens, and not in the pause.
            let migration = scene.slow(&[])?;
            scene.all(&act)?;
            let report = migration.ended("failed", 1)?;
            eprintln!("{what}: {}", report.error());
            ensure!(report.error().contains(told), "{what}: says {told}: {}", report.error());
            ensure!(report.vm_runs_on() == Some("a"), "{what}: {}", report.0);
            ensure!(
                report.0["downtime_ms"].is_null() && report.number("aborted_pauses_ms")? == 0.0,
                "{what}"
            );
            stage.runs_only_on("vm", "a")?;
            // Before it is moved: jobs, exports and a migration are refused; the others are carried.
            if !matches!(what, "another medium" | "a device" | "the limits of a group") {
                let before = stage.start_migration("vm", "a", "b", &[])?.ended("failed", 1)?;
                let error = before.error();
                ensure!(error.contains(told.split(" (").next().unwrap_or(told)), "{what}: {error}");
                ensure!(before.number("total_ms")? < 5e3 && error.contains("preflight"), "{what}: {error}");
            }
            scene.all(&undo)?;
            if what == "QEMU's own migration" {
                scene.own("cancelled")?;
            }
        }
        wait_for("the device and the job to be gone", SOON, || {
            let jobs = scene.q2.execute("query-jobs", json!({}))?;
            let devices = scene.q2.execute("qom-list", json!({ "path": "/machine/peripheral" }))?;
            Ok((jobs == json!([]) && !devices.to_string().contains("late")).then_some(()))
        })?;
        scene.q2.execute("blockdev-del", json!({ "node-name": "nul" }))?;

        // QEMU's own migration ends first: the guest is elsewhere, and nobody sets it running here.
        let migration = scene.slow(&[])?;
        scene.all(&[
            ("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 40, "downtime-limit": 2000 })),
            ("migrate", json!({ "uri": "exec:cat >/dev/null" })),
        ])?;
        let report = migration.ended("failed", 1)?;
        scene.own("completed")?;
        ensure!(report.error().contains("QEMU's own migration"), "{}", report.0);
        let again = stage.start_migration("vm", "a", "b", &[])?.ended("failed", 1)?;
        ensure!(again.error().contains("is not set running here"), "{}", again.error());
        ensure!(scene.status()? == "postmigrate", "I1: it stays where it is: {}", scene.status()?);
        scene.q2.execute("cont", json!({}))?;
        scene.guest.runs()?;

        // Memory that is plugged in while it is moved is in no comparison, also where all memory is compared.
        for (n, more) in [&[][..], &["--verify"]].into_iter().enumerate() {
            let (late, dimm) = (format!("late{n}"), format!("dimm{n}"));
            let migration = scene.slow(more)?;
            let memory =
                json!({ "qom-type": "memory-backend-memfd", "id": late, "size": 128 << 20, "share": true });
            let module = json!({ "driver": "pc-dimm", "id": dimm, "memdev": late });
            scene.all(&[("object-add", memory), ("device_add", module)])?;
            let report = migration.ended("failed", 1)?;
            let told = format!("device {dimm} (pc-dimm) was plugged in");
            ensure!(report.error().contains(&told), "{more:?}: {}", report.error());
            ensure!(report.vm_runs_on() == Some("a"), "{more:?}: {}", report.0);
            stage.runs_only_on("vm", "a")?;
        }
        scene.guest.verify().map(drop)
    });
}

/// The monitor of a VM that whimbrel started on this host.
fn monitor(lab: &Lab, host: &str, vm: &str) -> Result<Qmp> {
    let dir = lab.host(host).dir.join("run");
    let files = std::fs::read_dir(&dir).doing(format!("list {}", dir.display()))?;
    let sockets = files.flatten().map(|file| file.path());
    let name = format!("{vm}-");
    let of_it = |path: &PathBuf| {
        path.extension().is_some_and(|ending| ending == "qmp")
            && path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(&name))
    };
    let mut sockets: Vec<_> = sockets.filter(of_it).collect();
    sockets.sort();
    Qmp::connect(sockets.last().doing(format!("find the monitor of {vm}"))?)
}

/// What a drive shows, by its name.
fn drive(qmp: &mut Qmp, name: &str) -> Result<Value> {
    let drives = qmp.execute("query-block", json!({}))?;
    let is = |drive: &&Value| {
        drive["device"] == name
            || drive["qdev"].as_str().is_some_and(|device| device.split('/').any(|part| part == name))
    };
    drives.as_array().into_iter().flatten().find(is).cloned().doing(format!("find drive {name} in {drives}"))
}

#[test]
fn i6_i9_drives_are_on_the_target_as_they_are_on_the_source() {
    story("media, overlays and limits", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let mut scene = Scene::new(&stage, lab, tools, 92)?;
        let overlay = lab.dir().join("over.qcow2").display().to_string();
        let medium = scene.media[1].display().to_string();
        // Before it is adopted, and after.
        scene.q2.execute("eject", json!({ "id": "cd", "force": true }))?;
        scene.adopt()?;
        let limits = json!({ "id": "/machine/peripheral/blk0/virtio-backend", "bps": 50_000_000, "bps_rd": 0,
            "bps_wr": 0,
            "iops": 0, "iops_rd": 0, "iops_wr": 0 });
        scene.all(&[
            ("blockdev-change-medium", json!({ "id": "ecd", "filename": medium, "format": "raw" })),
            (
                "blockdev-snapshot-sync",
                json!({ "node-name": "d0", "snapshot-file": overlay, "snapshot-node-name": "over" }),
            ),
            ("block_set_io_throttle", limits),
            ("block-dirty-bitmap-add", json!({ "node": "over", "name": "changed" })),
        ])?;
        let report = stage.migrate("vm", &scene.guest, "a", "b", &["--mode", "pre-copy"])?;
        let (look, reading) = (report.number("check_ms")?, report.number("reading_ms")?);
        eprintln!("looked {look} ms of {} ms, read {reading} ms", report.number("downtime_ms")?);
        ensure!(look > 0.0, "it was looked at in the pause: {}", report.0);
        let left = report.0["left_behind"].to_string();
        ensure!(left.contains("dirty bitmap changed"), "what stays behind is said: {left}");
        {
            let mut there = monitor(lab, "b", "vm")?;
            let (cd, ecd, disk) =
                (drive(&mut there, "cd")?, drive(&mut there, "ecd")?, drive(&mut there, "blk0")?);
            ensure!(cd["inserted"].is_null() && cd["tray_open"] == true, "ejected as it was: {cd}");
            ensure!(ecd["inserted"]["file"] == medium.as_str(), "the medium that was inserted: {ecd}");
            ensure!(ecd["inserted"]["ro"] == true, "read only: {ecd}");
            ensure!(disk["inserted"]["file"] == overlay.as_str(), "the overlay: {disk}");
            ensure!(disk["inserted"]["backing_file_depth"] == 1, "over what it lies on: {disk}");
            ensure!(disk["inserted"]["bps"] == 50_000_000, "as limited as it was: {disk}");
            // What was started by a recipe is changed, too.
            there.execute("blockdev-open-tray", json!({ "id": "ecd", "force": true }))?;
            there.execute("blockdev-remove-medium", json!({ "id": "ecd" }))?;
        }
        stage.migrate("vm", &scene.guest, "b", "a", &["--mode", "post-copy"])?;
        let mut here = monitor(lab, "a", "vm")?;
        let (ecd, disk) = (drive(&mut here, "ecd")?, drive(&mut here, "blk0")?);
        ensure!(ecd["inserted"].is_null(), "no medium comes back: {ecd}");
        ensure!(disk["inserted"]["node-name"] == "over", "by its own name: {disk}");

        // A cable that was pulled stays so.
        here.execute("set_link", json!({ "name": "net0", "up": false }))?;
        drop(here);
        stage.start_migration("vm", "a", "b", &["--mode", "pre-copy"])?.completed()?;
        let echo = SocketAddr::from((scene.guest.spec().ip(), 7));
        ensure!(lab::connect(&stage.client, echo, Duration::from_secs(1)).is_err(), "its cable is pulled");
        monitor(lab, "b", "vm")?.execute("set_link", json!({ "name": "net0", "up": true }))?;
        lab::connect(&stage.client, echo, SOON).map(drop)
    });
}

#[test]
fn i6_a_vm_of_run_is_moved_with_its_overlay() {
    story("a VM of run and its monitor", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let disk = lab.dir().join("vm.qcow2");
        lab::run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("32M"))?;
        let disks = vec![(disk, "qcow2".to_owned())];
        let extra = "args = [\"-device\", \"qemu-xhci,id=usb\"]".to_owned();
        let guest = stage.run("a", &VmFile { disks, extra, ..VmFile::new("vm", Spec::new(93, WORK)) })?;
        let overlay = lab.dir().join("over.qcow2").display().to_string();
        {
            let mut qmp = monitor(lab, "a", "vm")?;
            let snapshot =
                json!({ "node-name": "disk0", "snapshot-file": overlay, "snapshot-node-name": "over" });
            qmp.execute("blockdev-snapshot-sync", snapshot)?;
            qmp.execute("device_add", json!({ "driver": "usb-tablet", "id": "late", "bus": "usb.0" }))?;
        }
        stage.migrate("vm", &guest, "a", "b", &["--mode", "pre-copy"])?;
        let mut there = monitor(lab, "b", "vm")?;
        let disk = drive(&mut there, "blk0")?;
        ensure!(disk["inserted"]["file"] == overlay.as_str(), "the overlay: {disk}");
        let devices = there.execute("qom-list", json!({ "path": "/machine/peripheral" }))?.to_string();
        ensure!(devices.contains("late"), "the tablet: {devices}");
        Ok(())
    });
}

/// What it costs to read the VM again. Alone on its machine:
/// `cargo test --release -p lab --test changed -- --ignored --nocapture`.
#[test]
#[ignore = "measures: needs a machine of its own"]
fn reading_a_vm_again_costs_little() {
    story("what the second reading costs", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let scene = Scene::new(&stage, lab, tools, 96)?;
        scene.adopt()?;
        let (mut looks, mut readings, mut pauses) = (Vec::new(), Vec::new(), Vec::new());
        for n in 0..40 {
            let (from, to) = if n % 2 == 0 { ("a", "b") } else { ("b", "a") };
            let report = stage.start_migration("vm", from, to, &["--mode", "pre-copy"])?.completed()?;
            looks.push(report.number("check_ms")?);
            readings.push(report.number("reading_ms")?);
            pauses.push(report.number("downtime_ms")?);
        }
        let quarters = |what: &str, values: &mut Vec<f64>| {
            values.sort_by(f64::total_cmp);
            let [median, tenth, worst] = [values[20], values[36], values[39]];
            eprintln!("{what}: {median:.1} ms (median), {tenth:.1} ms (90 %), {worst:.1} ms (worst)");
            median
        };
        quarters("pause", &mut pauses);
        let look = quarters("of it, looking again", &mut looks);
        let reading = quarters("reading before it", &mut readings);
        ensure!(look <= 3.0 && reading <= 50.0, "the second reading costs {look} ms and {reading} ms");
        Ok(())
    });
}
