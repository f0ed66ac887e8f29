//! Preflight: a target that cannot take the VM says why, all of it at once, and nothing has happened.

use lab::{Doing, Oddity, Spec, Stage, Traces, VmFile, ensure, story};
use std::{fs, os::unix::fs::PermissionsExt};

const WORK: &str = "whimbrel.check=16M,rate=4M whimbrel.disk=vda,set=4M";

/// QEMU, on a host whose CPUs have one feature less.
const LESSER_QEMU: &str = r#"#!/bin/sh
last=
for word; do
    shift
    [ "$last" != -cpu ] || word=$word,cx16=off
    set -- "$@" "$word"
    last=$word
done
exec QEMU "$@"
"#;

#[test]
fn a_target_that_cannot_take_the_vm_says_every_reason_at_once() {
    story("preflight", &["a", "b"], |lab, tools| {
        let shared = lab.dir().join("shared");
        fs::create_dir(&shared).doing("make a directory")?;
        let disk = shared.join("web.img");
        fs::write(&disk, vec![0; 16 << 20]).doing("make a disk")?;
        let memory = lab.dir().join("meminfo");
        // As much as a small host has; what is asked for is a megabyte more than that.
        let little = "MemTotal: 131072 kB\nMemFree: 65536 kB\nMemAvailable: 65536 kB\n";
        fs::write(&memory, little).doing("write a meminfo")?;
        let prelude = format!(
            "mount -t tmpfs none '{}'\nmount --bind '{}' /proc/meminfo",
            shared.display(),
            memory.display()
        );
        let mut stage = Stage::with(lab, tools, |host| Oddity {
            prelude: if host.name == "b" { prelude.clone() } else { String::new() },
            ..Oddity::default()
        })?;
        lab.host("b").namespace.ip("link set br0 down")?;
        lab.host("b").namespace.ip("link del br0")?;
        let vm = VmFile {
            disks: vec![(disk.clone(), "raw".to_owned())],
            ..VmFile::new("web", Spec::new(51, WORK))
        };
        let guest = stage.run("a", &vm)?;

        let before = Traces::of(lab.host("b"))?;
        let report = stage.start_migration("web", "a", "b", &[])?.ended("failed", 1)?;
        let error = report.error();
        for reason in ["memory", "br0", "web.img"] {
            ensure!(error.contains(reason), "{reason} is among the reasons: {error}");
        }
        ensure!(report.vm_runs_on() == Some("a"), "it says who runs the VM: {error}");
        stage.check_untouched("web", &guest, "a", "b", &before)?;

        // The same host mended, but with another file in the disk's place, and a QEMU that is none.
        let other = lab.dir().join("other");
        fs::create_dir(&other).doing("make a directory")?;
        fs::write(other.join("web.img"), vec![1; 16 << 20]).doing("make a disk")?;
        lab.host("b").namespace.ip("link add br0 type bridge forward_delay 0")?;
        lab.host("b").namespace.ip("link set br0 up")?;
        lab.host("b").namespace.ip("link set uplink master br0")?;
        stage.agent_mut("b").end()?;
        let swap = format!("mount --bind '{}' '{}'", other.display(), shared.display());
        *stage.agent_mut("b") = lab::Agent::start_odd(
            lab.host("b"),
            lab.hosts(),
            tools,
            Oddity { prelude: swap, lines: "qemu = \"/bin/false\"".to_owned(), ..Oddity::default() },
        )?;
        let error = stage.start_migration("web", "a", "b", &[])?.ended("failed", 1)?.error();
        for reason in ["web.img", "/bin/false"] {
            ensure!(error.contains(reason), "{reason} is among the reasons: {error}");
        }
        stage.runs_only_on("web", "a")?;

        // A QEMU whose CPUs lack what the guest was shown. Only when it is started does that come out.
        stage.agent_mut("b").end()?;
        let lesser = lab.dir().join("lesser-qemu");
        fs::write(&lesser, LESSER_QEMU.replace("QEMU", lab::QEMU)).doing("write a script")?;
        fs::set_permissions(&lesser, fs::Permissions::from_mode(0o755)).doing("make it executable")?;
        let odd = Oddity { lines: format!("qemu = {lesser:?}"), ..Oddity::default() };
        *stage.agent_mut("b") = lab::Agent::start_odd(lab.host("b"), lab.hosts(), tools, odd)?;
        let before = Traces::of(lab.host("b"))?;
        let error = stage.start_migration("web", "a", "b", &[])?.ended("failed", 1)?.error();
        ensure!(error.contains("CPU features"), "the guest's CPU is not to be had: {error}");
        // What Intel and AMD call CMPXCHG16B.
        ensure!(error.contains("CPUID[EAX=0x1].ECX[bit 13]"), "the missing feature is named: {error}");
        stage.check_untouched("web", &guest, "a", "b", &before)?;

        // Mended altogether, but there is a VM of that name already.
        stage.agent_mut("b").end()?;
        *stage.agent_mut("b") = lab::Agent::start(lab.host("b"), lab.hosts(), tools)?;
        let twin = VmFile::new("web", Spec::new(52, ""));
        stage.run("b", &twin)?;
        let report = stage.start_migration("web", "a", "b", &[])?.ended("failed", 1)?;
        ensure!(report.error().contains("web"), "the name is taken: {}", report.error());
        stage.agent("b").cli().json(&["stop", "web"])?;

        // And at last it goes.
        stage.migrate("web", &guest, "a", "b", &[])?;
        Ok(())
    });
}

#[test]
fn i3_a_target_that_runs_short_leaves_the_vm_where_it_is() {
    story("short", &["a", "b"], |lab, tools| {
        let mut stage = Stage::with(lab, tools, |_| Oddity::default())?;
        let guest = stage.run("a", &VmFile::new("web", Spec::new(52, "whimbrel.check=16M,rate=4M")))?;
        // QEMU of memory to map. The host of room for files, the VM's memory among them; whoever writes more
        // is told so, as on a full disk.
        let qemu = lab.dir().join("confined-qemu");
        let confined = format!("#!/bin/sh\nulimit -v 300000\nexec {} \"$@\"\n", lab::QEMU);
        fs::write(&qemu, confined).doing("write a script")?;
        fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).doing("make it executable")?;
        let memory = Oddity { lines: format!("qemu = {qemu:?}"), ..Oddity::default() };
        let room = Oddity { prelude: "trap '' XFSZ\nulimit -f 16384".to_owned(), ..Oddity::default() };
        for odd in [memory, room] {
            let error = runs_short(&mut stage, lab, tools, &guest, odd)?.doing("fail for lack of it")?;
            ensure!(error["what"] == "preflight", "it is told before anything is sent: {error}");
        }
        Ok(())
    });
}

/// Of descriptors: before, while and after it takes the connections in, until there are enough.
#[test]
fn i3_a_target_short_of_descriptors_leaves_the_vm_there() {
    story("descriptors", &["a", "b"], |lab, tools| {
        let mut stage = Stage::with(lab, tools, |_| Oddity::default())?;
        let guest = stage.run("a", &VmFile::new("web", Spec::new(52, "whimbrel.check=16M,rate=4M")))?;
        let mut failed = Vec::new();
        for enough in 17..64 {
            // Beside those that whoever started us has left open.
            let prelude = format!("ulimit -n $(({enough} + $(ls /proc/$$/fd | wc -l) - 3))");
            let odd = Oddity { prelude, ..Oddity::default() };
            match runs_short(&mut stage, lab, tools, &guest, odd)? {
                Some(error) => failed.push(error["what"].to_string()),
                None => break,
            }
        }
        ensure!(failed.len() < 64 - 17, "with enough of them it goes: {failed:?}");
        let early = failed.iter().filter(|what| what.contains("preflight")).count();
        ensure!(early > 0 && early < failed.len(), "there are too few before and while it runs: {failed:?}");
        stage.check_moved("web", &guest, "a", "b")
    });
}

/// A migration to an agent that is started like this: its error, after which nothing has happened to the VM,
/// or none.
fn runs_short(
    stage: &mut Stage,
    lab: &lab::Lab,
    tools: &lab::Tools,
    guest: &lab::Guest,
    odd: Oddity,
) -> lab::Result<Option<serde_json::Value>> {
    stage.agent_mut("b").end()?;
    *stage.agent_mut("b") = lab::Agent::start_odd(lab.host("b"), lab.hosts(), tools, odd)?;
    let before = Traces::of(lab.host("b"))?;
    let report = stage.start_migration("web", "a", "b", &["--give-up", "1s", "--streams", "8"])?.end()?.1;
    if report.outcome() == "completed" {
        return Ok(None);
    }
    let error = report.error();
    eprintln!("short: {error}");
    // The bridge is there, whether or not it could be looked for.
    ensure!(!error.contains("there is no bridge"), "what is missing is told: {error}");
    ensure!(report.vm_runs_on() == Some("a"), "it says who runs the VM: {}", report.0);
    stage.check_untouched("web", guest, "a", "b", &before)?;
    Ok(Some(report.0["error"].clone()))
}
