//! VMs that something else started: adopted and moved, or refused with the reason.

use lab::{
    Agent, Doing, Guest, HandStart, HandStarted, Oddity, Ram, Result, Spec, Stage, ensure, run, story,
};
use serde_json::Value;
use std::{path::Path, process::Command, time::Duration};
use units::Bytes;

const WORK: &str = "whimbrel.check=48M,rate=8M whimbrel.dirty=16M,rate=4M";

/// Adopts it; the answer says what will be different on another host.
fn adopt_and_hear(stage: &Stage, name: &str, start: HandStart) -> Result<(Guest, HandStarted, Value)> {
    let spec = start.guest.clone();
    let machine = start.start(stage.lab.host("a"), stage.tools)?;
    let guest = Guest::reach(&stage.client, &spec)?;
    let socket = machine.qmp_socket();
    let answer = stage.agent("a").cli().json(&["adopt", name, "--qmp", &socket.to_string_lossy()])?;
    Ok((guest, machine, answer["different"].clone()))
}

/// There by pre-copy, back by post-copy.
fn both_ways(stage: &Stage, name: &str, start: HandStart) -> Result<()> {
    let (guest, _machine) = stage.adopt("a", name, start)?;
    go_both_ways(stage, name, &guest).map(drop)
}

/// The same for one that is adopted; what the first report says stays behind.
fn go_both_ways(stage: &Stage, name: &str, guest: &Guest) -> Result<String> {
    let client = guest.echo(Duration::from_millis(5))?;
    let report = stage.migrate(name, guest, "a", "b", &["--mode", "pre-copy"])?;
    stage.migrate(name, guest, "b", "a", &["--mode", "post-copy"])?;
    client.finish(Duration::from_secs(10))?;
    stage.agent("a").cli().json(&["stop", name])?;
    Ok(report.0["left_behind"].to_string())
}

/// Whether files there are memory of the kernel's own.
fn is_tmpfs(dir: &Path) -> Result<bool> {
    let name = run(Command::new("stat").args(["-f", "-c", "%T"]).arg(dir))?;
    Ok(name.trim() == "tmpfs")
}

#[test]
fn a_vm_with_eight_vcpus_vga_and_equal_blocks_is_adopted() {
    story("8 vCPUs, VGA, two equal blocks, runas", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let start = HandStart {
            ram: Ram::TwoMemfds,
            vga: true,
            vcpus: 8,
            // Not one of those that the target's QEMU may have, of which nothing is said.
            user: Some("daemon".to_owned()),
            ..HandStart::new(Spec::new(31, WORK))
        };
        let (guest, _machine, different) = adopt_and_hear(&stage, "odd", start)?;
        let told = "its QEMU runs as the user daemon here";
        ensure!(different.to_string().contains(told), "adopt says so: {different}");
        let left = go_both_ways(&stage, "odd", &guest)?;
        ensure!(left.contains(told), "the report says so: {left}");
        Ok(())
    });
}

#[test]
fn a_vm_with_file_ram_and_a_disk_is_adopted_and_moved() {
    story("file RAM and a disk", &["a", "b"], |lab, tools| {
        let mut stage = Stage::with(lab, tools, |host| Oddity {
            lines: if host.name == "a" { "tracker = \"synchronous\"".to_owned() } else { String::new() },
            ..Oddity::default()
        })?;
        let disk = lab.dir().join("disk.img");
        std::fs::write(&disk, vec![0; 64 << 20]).doing("make a disk")?;
        let ram = lab.dir().join("ram");
        std::fs::create_dir(&ram).doing("make a directory")?;
        let guest = Spec::new(32, format!("{WORK} whimbrel.disk=vda,set=16M"));
        let start = HandStart { ram: Ram::File(ram), ..HandStart::new(guest) }
            .disk(&disk, "cache=writeback,aio=threads");
        let (guest, _machine, different) = adopt_and_hear(&stage, "filed", start)?;
        if is_tmpfs(lab.dir())? {
            lab::skip("a file on a disk", &"temporary files are on a tmpfs here");
        } else {
            let told = "RAM block ram0 is a file on a disk: its writers cannot be slowed";
            ensure!(different.to_string().contains(told), "adopt says so: {different}");
            let report = stage.start_migration("filed", "a", "b", &[])?.ended("failed", 1)?;
            let why = report.error();
            for words in ["whose writes only the asynchronous tracker can follow", "let the agent use that"] {
                ensure!(why.contains(words), "says {words}: {why}");
            }
            stage.runs_only_on("filed", "a")?;
            guest.verify()?;
        }
        stage.agent_mut("a").end()?;
        *stage.agent_mut("a") = Agent::start(lab.host("a"), lab.hosts(), tools)?;
        go_both_ways(&stage, "filed", &guest).map(drop)
    });
}

#[test]
fn an_adopted_microvm_is_moved() {
    story("an adopted microvm", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        both_ways(
            &stage,
            "micro",
            HandStart { machine: "microvm".to_owned(), ..HandStart::new(Spec::new(33, WORK)) },
        )
    });
}

#[test]
fn a_vm_above_the_hole_at_four_gib_is_moved() {
    story("5 GiB", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        // The guest's Linux allocates from the top: `fill` lies above 4 GiB, `check` comes down into it.
        let work = "whimbrel.fill=256M,content=text whimbrel.check=64M,rate=8M";
        let start = HandStart { memory: Bytes(5 << 30), vcpus: 2, ..HandStart::new(Spec::new(34, work)) };
        both_ways(&stage, "large", start)
    });
}

#[test]
fn a_vm_moves_from_qemu_7_2_to_qemu_10_and_on() {
    story("7.2 → 10.0", &["a", "b"], |lab, tools| {
        let Some(newer) = &tools.qemu_10 else {
            lab::skip("7.2 → 10.0", &"WHIMBREL_QEMU_10 must name a QEMU 10 (tests/qemu-10.sh unpacks one)");
            return Ok(());
        };
        let mut stage = Stage::with(lab, tools, |host| {
            let lines = if host.name == "b" { format!("qemu = {newer:?}") } else { String::new() };
            lab::Oddity { lines, ..Default::default() }
        })?;
        // A microvm has no versioned machine types: only q35 promises anything between versions.
        let (guest, _machine) = stage.adopt("a", "old", HandStart::new(Spec::new(35, WORK)))?;
        stage.migrate("old", &guest, "a", "b", &["--mode", "pre-copy"])?;
        // Back to an older QEMU: refused with that reason, and nothing lost.
        let back = stage.start_migration("old", "b", "a", &[])?.ended("failed", 1)?;
        ensure!(back.error().contains("7.2"), "says which QEMU is too old: {}", back.error());
        stage.runs_only_on("old", "b")?;
        guest.verify()?;
        // The user knows better: the machine is of that version.
        let back = stage.migrate("old", &guest, "b", "a", &["--mode", "pre-copy", "--allow-older-qemu"])?;
        let told = back.0["left_behind"].to_string();
        ensure!(told.contains("an older QEMU may take it over"), "it is warned of: {told}");
        stage.migrate("old", &guest, "a", "b", &["--mode", "hybrid"])?;

        // With a newer QEMU there too, it goes back, and there again.
        stage.agent_mut("a").end()?;
        let lines = format!("qemu = {newer:?}");
        let odd = lab::Oddity { lines, ..Default::default() };
        *stage.agent_mut("a") = lab::Agent::start_odd(lab.host("a"), lab.hosts(), tools, odd)?;
        stage.migrate("old", &guest, "b", "a", &["--mode", "post-copy"])?;
        stage.migrate("old", &guest, "a", "b", &["--mode", "pre-copy"]).map(drop)
    });
}

#[test]
fn what_cannot_be_moved_safely_is_refused_with_the_reason() {
    story("refused adoptions", &["a"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let disk = lab.dir().join("disk.img");
        std::fs::write(&disk, vec![0; 1 << 20]).doing("make a disk")?;
        let plain = |number| HandStart::new(Spec::new(number, ""));
        let with = |number, words: &[&str]| HandStart {
            extra: words.iter().map(|word| (*word).to_owned()).collect(),
            ..plain(number)
        };
        let ivshmem = "memory-backend-memfd,id=iv,size=1M,share=on";
        let refused: [(&str, HandStart, &[&str]); 3] = [
            ("edu", with(43, &["-device", "edu"]), &["for tests"]),
            ("files", with(45, &["-virtfs", "local,path=/tmp,mount_tag=t,security_model=none"]), &["9p"]),
            ("ivshmem", with(47, &["-object", ivshmem, "-device", "ivshmem-plain,memdev=iv"]), &["ivshmem"]),
        ];
        for (name, start, words) in refused {
            let mut machine = start.start(lab.host("a"), tools)?;
            let socket = machine.qmp_socket();
            let answer = stage.agent("a").cli().run(["adopt", name, "--qmp", &socket.to_string_lossy()])?;
            answer.exited(1)?.says(words)?;
            machine.process().must_live()?;
            let status = machine.qmp()?.execute("query-status", serde_json::json!({}))?;
            ensure!(status["status"] == "running", "{name} runs on: {status}");
            ensure!(stage.show("a", name)?.is_none(), "{name} was not adopted");
        }

        // What was plugged in later is judged like what was there.
        let machine = with(49, &["-device", "qemu-xhci"]).start(lab.host("a"), tools)?;
        machine
            .qmp()?
            .execute("device_add", serde_json::json!({"driver": "usb-wacom-tablet", "id": "late"}))?;
        let socket = machine.qmp_socket();
        let answer = stage.agent("a").cli().run(["adopt", "plugged", "--qmp", &socket.to_string_lossy()])?;
        answer.exited(1)?.says(&["late", "usb-wacom-tablet"])?;
        // The same is said to who only asks.
        let path = socket.to_string_lossy();
        let answer = stage.agent("a").cli().run(["adopt", "--check", "--qmp", &path])?;
        answer.exited(1)?.says(&["cannot be moved yet", "late", "usb-wacom-tablet", "goes with it"])?;
        machine.qmp()?.execute("device_del", serde_json::json!({"id": "late"}))?;
        let answer = stage.agent("a").cli().run(["adopt", "--check", "--qmp", &path])?;
        answer.exited(0)?.says(&["can be adopted and moved", "different on another host"])?;
        ensure!(stage.show("a", "plugged")?.is_none(), "it was not adopted");
        Ok(())
    });
}

#[test]
fn i2_a_vm_with_private_ram_moves_in_every_mode() {
    story("private RAM", &["a", "b"], |lab, tools| {
        let synchronous = Oddity { lines: "tracker = \"synchronous\"".to_owned(), ..Oddity::default() };
        // One host hears of each write, so that both trackers follow private memory.
        let stage = Stage::with(lab, tools, |host| match host.name.as_str() {
            "b" => synchronous.clone(),
            _ => Oddity::default(),
        })?;
        let rows = [
            ("a", "b", "pre-copy", &["--mode", "pre-copy"][..]),
            ("b", "a", "pre-copy", &["--mode", "pre-copy"]),
            ("a", "b", "post-copy", &["--mode", "post-copy"]),
            ("b", "a", "hybrid", &["--mode", "hybrid"]),
        ];
        for (number, (from, to, mode, options)) in (36..).zip(rows) {
            let name = format!("{mode}-{from}");
            let start = HandStart { ram: Ram::Private, ..HandStart::new(Spec::new(number, WORK)) };
            let (guest, _machine) = stage.adopt(from, &name, start)?;
            let client = guest.echo(Duration::from_millis(5))?;
            let report = stage.migrate(&name, &guest, from, to, options)?;
            ensure!(report.0["mode"] == mode, "{}", report.0);
            client.finish(Duration::from_secs(10))?;
            // What QEMU calls the block is what its own migration would look for.
            let shown = stage.show(to, &name)?.unwrap_or_default();
            let words = std::fs::read_to_string(format!("/proc/{}/cmdline", shown["pid"]))
                .doing("read a command line")?;
            let block = "memory-backend-memfd,id=pc.ram,";
            ensure!(words.contains(block) && words.contains(",memory-backend=pc.ram"), "{words}");
            if number == 36 {
                // From now on it is a VM like any other.
                stage.migrate(&name, &guest, to, from, &["--mode", "post-copy"])?;
                stage.agent(from).cli().json(&["stop", &name])?;
            } else {
                stage.agent(to).cli().json(&["stop", &name])?;
            }
        }
        Ok(())
    });
}
