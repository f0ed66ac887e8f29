//! Disks that QEMU reads directly. Such a read pins the guest's pages when it is submitted, and its data
//! lands there later, through no page table: no tracker sees it. While a VM is moved there must be none.

use lab::{Doing, Guest, HandStart, Result, SlowDisk, Spec, Stage, ensure, story, wait_for};
use std::{fs, path::Path, process::Command, time::Duration};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn i2_no_direct_read_lands_while_a_vm_is_moved() {
    story("delayed direct reads", &["a", "b"], |lab, tools| {
        // Before any agent: they see only mounts that are older than they.
        let disk = SlowDisk::mount(&lab.dir().join("slow"), &vec![0; 32 << 20])?;
        let mut stage = Stage::new(lab, tools)?;
        let spec = Spec::new(71, "whimbrel.check=32M,rate=8M whimbrel.disk=vda,set=8M,direct=on");
        let start = HandStart::new(spec.clone()).disk(disk.path(), "cache=none,aio=threads");
        let machine = start.start(lab.host("a"), tools)?;
        let guest = Guest::reach(&stage.client, &spec)?;
        let reads_on = |why: &str| {
            let before = disk.direct_reads();
            wait_for(why, SOON, || Ok((disk.direct_reads() > before).then_some(())))
        };
        reads_on("direct reads of the machine")?;
        let socket = machine.qmp_socket();
        let answer = stage.agent("a").cli().run(["adopt", "direct", "--qmp", &socket.to_string_lossy()])?;
        answer.exited(0)?;
        reads_on("direct reads of an adopted machine")?;

        let slowly = ["--mode", "pre-copy", "--bandwidth", "80Mbit"];
        let mut cancelled = stage.start_migration("direct", "a", "b", &slowly)?;
        cancelled.until_moving("pre-copy")?;
        let before = disk.direct_reads();
        cancelled.until_round(1)?;
        ensure!(disk.direct_reads() == before, "nothing is read directly in a round");
        cancelled.interrupt()?;
        cancelled.ended("cancelled", 130)?;
        reads_on("direct reads after a cancelled migration")?;

        let mut killed = stage.start_migration("direct", "a", "b", &slowly)?;
        killed.until_moving("pre-copy")?;
        stage.agent_mut("a").crash()?;
        drop(killed);
        stage.agent_mut("a").begin()?;
        reads_on("direct reads after the agent's death")?;
        wait_for("a target that is rid of it", SOON, || {
            Ok(stage.show("b", "direct")?.is_none().then_some(()))
        })?;

        // One that waits when the migration begins lands before anything is watched.
        disk.hold();
        disk.wait_held(SOON)?;
        let options = ["--mode", "pre-copy", "--verify", "--bandwidth", "160Mbit"];
        let mut migration = stage.start_migration("direct", "a", "b", &options)?;
        disk.release();
        migration.until_moving("pre-copy")?;
        let before = disk.direct_reads();
        migration.until_round(1)?;
        ensure!(disk.direct_reads() == before, "nothing is read directly in a round");
        let report = migration.completed()?;
        ensure!(report.verified() == Some(true), "memory was compared: {}", report.0);
        reads_on("direct reads on the target")?;
        stage.check_moved("direct", &guest, "a", "b")
    });
}

/// Whether a process has a file open directly; nothing if it has not got it open.
fn opened_directly(pid: &serde_json::Value, file: &Path) -> Result<Option<bool>> {
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).doing("list descriptors")?.flatten() {
        if fs::read_link(fd.path()).is_ok_and(|leads| leads == file) {
            let info = format!("/proc/{pid}/fdinfo/{}", fd.file_name().display());
            let info = fs::read_to_string(info).doing("read a descriptor's flags")?;
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or_default();
            return Ok(Some(u32::from_str_radix(flags.trim(), 8).doing("read flags")? & 0o40000 != 0));
        }
    }
    Ok(None)
}

#[test]
fn i6_every_engine_of_direct_io_moves_there_and_back() {
    story("direct engines", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let rows =
            [("native", "qcow2", "none"), ("io_uring", "raw", "directsync"), ("threads", "qcow2", "none")];
        for (number, (aio, format, cache)) in (72..).zip(rows) {
            let (name, image) = (format!("with-{aio}"), lab.dir().join(format!("{aio}.img")));
            let make =
                Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&image).arg("64M").status();
            ensure!(make.doing("make an image")?.success(), "qemu-img makes an image");
            let guest = Spec::new(number, "whimbrel.check=16M,rate=4M whimbrel.disk=vda,set=8M,direct=both");
            let drive =
                format!("file={},format={format},if=none,id=d,cache={cache},aio={aio}", image.display());
            let extra = ["-drive", &drive, "-device", "virtio-blk-pci,drive=d"].map(str::to_owned).to_vec();
            let (guest, _machine) = stage.adopt("a", &name, HandStart { extra, ..HandStart::new(guest) })?;
            for (from, to, mode) in [("a", "b", "pre-copy"), ("b", "a", "hybrid")] {
                stage.migrate(&name, &guest, from, to, &["--mode", mode])?;
                let shown = stage.show(to, &name)?.unwrap_or_default();
                let direct = opened_directly(&shown["pid"], &image)?;
                ensure!(direct == Some(true), "{aio}, {to}: {direct:?}");
            }
            stage.agent("a").cli().json(&["stop", &name])?;
        }
        Ok(())
    });
}
