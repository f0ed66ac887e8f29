//! Networks whose packets the kernel carries (`vhost=on`): on a kernel that has it, which is booted for that.
//! From Linux 6.4 on its workers are threads of QEMU's own; Debian's 6.1 has kernel threads
//! (`other_kernel.rs`).

use lab::{
    Doing, Error, Guest, HandStart, QEMU, Result, Spec, Stage, Tools, ensure,
    other_kernel::{Kernel, run_under},
    skip, story,
};
use serde_json::Value;
use std::{
    env, fs,
    net::UdpSocket,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};
use units::Bytes;

/// The kernel, if there is one here.
fn kernel(tools: &Tools) -> Option<Result<Kernel>> {
    let directory = tools.linux_6_12.as_deref().map(Kernel::unpacked);
    if directory.is_none() {
        skip("vhost", &"WHIMBREL_LINUX_6_12 must name a Linux 6.12 (tests/linux-6.12.sh unpacks one)");
    }
    directory
}

#[test]
fn i2_what_a_vhost_worker_writes_is_seen_by_both_trackers() {
    story("vhost under 6.12", &[], |lab, tools| {
        let Some(kernel) = kernel(tools) else { return Ok(()) };
        let (_, said) = run_under(&kernel?, &tools.whimbrel, &["doctor", "--json"], &["cat"], lab.dir())?;
        let diagnosis: Value =
            serde_json::from_str(&said).doing(format!("understand the doctor's {said}"))?;
        let checks = diagnosis["checks"].as_array().into_iter().flatten();
        let vhost: Vec<_> = checks.filter(|check| check["name"] == "vhost-net").collect();
        let [vhost] = vhost[..] else { return Err(Error::new("find the check of vhost in", said)) };
        ensure!(vhost["status"] == "ok", "it is proven: {vhost}");
        ensure!(vhost["found"].to_string().contains("both trackers see"), "by both trackers: {vhost}");
        Ok(())
    });
}

/// Where QEMU's firmware is.
const FIRMWARE: [&str; 3] = ["/usr/share/seabios", "/usr/share/qemu", "/usr/lib/ipxe/qemu"];

/// Two hosts with two agents, in the machine with the other kernel: an emulation in an emulation.
#[test]
#[ignore = "takes a quarter of an hour"]
fn i2_a_vm_with_vhost_goes_there_and_back_in_every_mode() {
    story("a VM with vhost under 6.12", &[], |lab, tools| {
        let Some(kernel) = kernel(tools) else { return Ok(()) };
        let kernel = Kernel { patience: Duration::from_secs(1800), ..kernel? };
        let this = env::current_exe().doing("find this program")?;
        let mut also: Vec<String> = [
            "ip",
            "tc",
            "bridge",
            "qemu-img",
            "swtpm",
            "cat",
            "rm",
            "sleep",
            "umount",
            QEMU,
            "/etc/passwd",
            "/etc/group",
        ]
        .map(str::to_owned)
        .into();
        let modules = "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so".to_owned();
        also.push(modules);
        for folder in FIRMWARE {
            let files = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
            let wanted = |path: &PathBuf| {
                path.is_file() && path.extension().is_some_and(|ending| ending == "bin" || ending == "rom")
            };
            also.extend(files.filter(wanted).map(|path| path.display().to_string()));
        }
        let files =
            [&tools.whimbrel, &tools.kernel, &tools.initrd, &this].map(|path| path.display().to_string());
        also.extend(files.clone());
        let [whimbrel, image, initrd, this] = files;
        let script = format!(
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin WHIMBREL_BIN={whimbrel} WHIMBREL_GUEST_KERNEL={image} \
             WHIMBREL_GUEST_INITRD={initrd} WHIMBREL_MUST_RUN=1 {this} --exact inside --ignored --nocapture \
             2>&1"
        );
        let also: Vec<&str> = also.iter().map(String::as_str).collect();
        let (status, said) = run_under(&kernel, "/bin/sh".as_ref(), &["-c", &script], &also, lab.dir())?;
        ensure!(status == 0 && said.contains("1 passed"), "exit status {status}: {said}");
        eprintln!("{said}");
        Ok(())
    });
}

#[test]
#[ignore = "runs in another kernel"]
fn inside() {
    story("a VM with vhost", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let start = HandStart {
            vhost: true,
            memory: Bytes(128 << 20),
            ..HandStart::new(Spec::new(
                97,
                "whimbrel.check=8M,rate=1M whimbrel.dirty=4M,rate=1M,pattern=hot-cold",
            ))
        };
        let spec = start.guest.clone();
        let machine = start.start(lab.host("a"), tools)?;
        // It boots in an emulated machine's emulation.
        let mut reached = Guest::reach(&stage.client, &spec);
        for _ in 0..5 {
            reached = reached.or_else(|_| Guest::reach(&stage.client, &spec));
        }
        let guest = reached?;
        stage.agent("a").cli().json(&["adopt", "vm", "--qmp", &machine.qmp_socket().to_string_lossy()])?;
        ensure!(workers(machine.pid().into())? == 1, "a worker carries its packets");
        for (mode, from, to) in [("pre-copy", "a", "b"), ("post-copy", "b", "a"), ("hybrid", "a", "b")] {
            let report =
                flooded(&stage, &guest, || stage.migrate("vm", &guest, from, to, &["--mode", mode]))?;
            let shown = stage.show(to, "vm")?.doing("find the VM")?;
            let pid = shown["pid"].as_u64().doing(format!("find its process in {shown}"))?;
            ensure!(workers(pid)? == 1, "it has one on {to}");
            println!("{mode}: verified, {} ms down", report.number("downtime_ms")?);
        }
        Ok(())
    });
}

/// Sends datagrams to the guest all the while: the worker writes each into the guest's memory.
fn flooded<T>(stage: &Stage, guest: &Guest, what: impl FnOnce() -> Result<T>) -> Result<T> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            stage.client.inside(|| {
                let socket = UdpSocket::bind("0.0.0.0:0").doing("make a socket")?;
                while !over.load(Ordering::Relaxed) {
                    // Nobody listens, which comes back as an error.
                    let _ = socket.send_to(&[0x77; 1000], (guest.spec().ip(), 9));
                    thread::sleep(Duration::from_millis(2));
                }
                Ok(())
            })
        });
        let done = what();
        over.store(true, Ordering::Relaxed);
        sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        done
    })
}

/// How many workers of the kernel's a process has.
fn workers(pid: u64) -> Result<usize> {
    let device = fs::metadata("/dev/vhost-net").doing("look at /dev/vhost-net")?.rdev();
    let open = fs::read_dir(format!("/proc/{pid}/fd")).doing("look what QEMU has open")?.flatten();
    Ok(open.filter(|entry| fs::metadata(entry.path()).is_ok_and(|found| found.rdev() == device)).count())
}
