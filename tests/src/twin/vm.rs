//! One of the two VMs: its QEMU, its files, and the monitor by which it is looked at.

use super::{
    action::Deed,
    guest::{self, Words, press, words},
    look::Look,
};
use crate::{Doing, Error, Host, Process, QEMU, Qmp, Result, wait_for};
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    os::unix::{
        fs::{FileExt, PermissionsExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// How long something may take that was asked for.
const SOON: Duration = Duration::from_secs(30);

/// Its USB controller's bus, and what is plugged in there.
const TABLET: &str = "tablet0";
/// Its disk, by the name of its device's `-drive`.
const DISK: &str = "disk0";
const CARD: &str = "card0";
const DRIVE: &str = "cd0";
/// By so much a disk grows.
const STEP: u64 = 1 << 20;
const JOB: &str = "job0";
const BACKUP: &str = "backup.qcow2";
const DIMM: &str = "dimm-memory0";
pub(super) const CHARDEV: &str = "port0";

/// How it was before something was done.
pub(super) struct Before {
    /// What its guest said.
    pub(super) said: Words,
    /// Its run state, for whoever knows of no migration.
    pub(super) state: String,
    /// A key may have been pressed while it stood still all the same.
    pub(super) lost: bool,
}

/// A VM.
pub(super) struct Vm {
    pub(super) name: String,
    host: Host,
    tap: String,
    dir: PathBuf,
    /// The process that was started for it; another one once it was moved.
    process: Option<Process>,
    pub(super) pid: u32,
    monitor: Option<Qmp>,
    overlays: u32,
    /// A socket behind which everything is thrown away.
    sink: PathBuf,
    size: u64,
    /// It was reset while it stood still: it starts once it runs.
    will_start: bool,
    /// QEMU's own migration has taken its disks, and nothing has given them back.
    pub(super) has_no_disks: bool,
    /// Somebody has ended it.
    pub(super) over: bool,
}

/// Where a QEMU of this process has its second monitor: the wrapper that starts it puts it where it may make
/// sockets.
pub(crate) fn second_monitor(pid: u32) -> Result<PathBuf> {
    let environment = fs::read(format!("/proc/{pid}/environ")).doing("read the environment of a QEMU")?;
    let environment = String::from_utf8_lossy(&environment);
    let first = environment.split('\0').find_map(|line| line.strip_prefix("WHIMBREL_QMP="));
    Ok(Path::new(first.doing("find the monitor of a QEMU")?).with_extension("sockets").join("second.sock"))
}

/// A QEMU with a second monitor, wherever whimbrel starts one.
pub(crate) fn wrapper(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("qemu-with-a-second-monitor");
    let socket = "${WHIMBREL_QMP%.qmp}.sockets/second.sock";
    let text = format!(
        "#!/bin/sh\n# Only where a VM is to come: QEMU is also asked what it can do.\n\
         case \" $* \" in\n\
         *\" -incoming \"*) set -- \"$@\" -qmp \"unix:{socket},server=on,wait=off\" ;;\n\
         esac\n\
         exec {QEMU} \"$@\"\n"
    );
    fs::write(&path, text).doing(format!("write {}", path.display()))?;
    let mode = PermissionsExt::from_mode(0o755);
    fs::set_permissions(&path, mode).doing("let it be run")?;
    Ok(path)
}

/// A socket behind which everything is thrown away: where QEMU's own migration goes. (Its own `exec:` starts
/// a program, which a QEMU under `-sandbox spawn=deny` must not.)
pub(super) fn sink(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("sink.sock");
    let listener = UnixListener::bind(&path).doing("listen for what is thrown away")?;
    fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).doing("let any QEMU use it")?;
    thread::spawn(move || {
        for stream in listener.incoming().map_while(std::result::Result::ok) {
            thread::spawn(move || std::io::copy(&mut &stream, &mut std::io::sink()));
        }
    });
    Ok(path)
}

impl Vm {
    /// Starts one, as somebody would who has never heard of whimbrel.
    pub(super) fn start(host: &Host, at: &Path, sink: &Path, name: &str) -> Result<Self> {
        let dir = at.join(name);
        fs::create_dir_all(&dir).doing(format!("make {}", dir.display()))?;
        // The QEMU of a VM that was moved is another user, and makes overlays here.
        fs::set_permissions(&dir, PermissionsExt::from_mode(0o777)).doing("open a directory")?;
        guest::make_disk(&dir.join("disk.img"))?;
        for medium in ["one.iso", "two.iso"] {
            fs::write(dir.join(medium), medium.repeat(2048)).doing("make a medium")?;
        }
        let tap = format!("t-{name}");
        host.add_tap(&tap)?;
        let mut command = host.namespace.command(QEMU);
        let file = |name: &str| dir.join(name).display().to_string();
        let words = format!(
            "-name {name} -nodefaults -no-user-config -display none -accel tcg -no-shutdown \
             -m 16M,slots=2,maxmem=64M -smp 1,maxcpus=2 \
             -object memory-backend-memfd,id=ram0,size=16M,share=on -machine q35,memory-backend=ram0 \
             -drive file={},format=raw,if=none,id={DISK},cache=writeback \
             -device virtio-blk-pci,drive={DISK},id=vda,bootindex=0 \
             -drive file={},format=raw,if=none,id={DRIVE}-drive,media=cdrom,readonly=on \
             -device ide-cd,drive={DRIVE}-drive,id={DRIVE} \
             -netdev tap,id=net0,ifname={tap},script=no,downscript=no \
             -device virtio-net-pci,netdev=net0,id={CARD},mac=52:54:00:78:01:01,romfile= \
             -device qemu-xhci,id=usb -device pvpanic \
             -qmp unix:{},server=on,wait=off -qmp unix:{},server=on,wait=off",
            file("disk.img"),
            file("one.iso"),
            file("first.sock"),
            file("second.sock"),
        );
        command.args(words.split_whitespace());
        let mut process = host.spawn(name, &mut command)?;
        let second = dir.join("second.sock");
        let mut monitor = wait_for("a monitor", SOON, || {
            process.must_live()?;
            Ok(second.exists().then(|| Qmp::connect(&second).ok()).flatten())
        })?;
        guest::started(&mut monitor, Words::default())?;
        let pid = process.pid();
        let (at, content) = guest::content();
        let memory = File::options().write(true).open(format!("/proc/{pid}/mem")).doing("open its memory")?;
        let address = guest::address_of(&mut monitor, at)?;
        memory.write_all_at(&content, address).doing("fill its memory")?;
        let (process, monitor) = (Some(process), Some(monitor));
        let (name, host) = (name.to_owned(), host.clone());
        Ok(Self {
            name,
            host,
            tap,
            dir,
            process,
            pid,
            monitor,
            overlays: 0,
            sink: sink.to_owned(),
            size: guest::DISK,
            will_start: false,
            has_no_disks: false,
            over: false,
        })
    }

    /// The monitor that whimbrel may have.
    pub(super) fn first_monitor(&self) -> PathBuf {
        self.dir.join("first.sock")
    }

    /// It was moved to this process.
    pub(super) fn is_now(&mut self, pid: u32) -> Result<()> {
        self.process = None;
        self.pid = pid;
        let path = second_monitor(pid)?;
        self.monitor =
            Some(wait_for("the monitor of a VM that was moved", SOON, || Ok(Qmp::connect(&path).ok()))?);
        Ok(())
    }

    pub(super) fn monitor(&mut self) -> Result<&mut Qmp> {
        self.monitor.as_mut().doing("find a monitor")
    }

    pub(super) fn look(&mut self) -> Result<Look> {
        let (pid, dir, name) = (self.pid, self.dir.display().to_string(), self.name.clone());
        Look::at(self.monitor()?, pid, |line| without_names(line, &dir, &name))
    }

    pub(super) fn state(&mut self) -> Result<String> {
        let status = self.monitor()?.execute("query-status", json!({}))?;
        Ok(status["status"].as_str().unwrap_or("?").to_owned())
    }

    /// Seconds since midnight by the guest's real-time clock.
    pub(super) fn clock(&mut self) -> Result<i64> {
        let now = self.monitor()?.execute("qom-get", json!({"path": "/machine", "property": "rtc-time"}))?;
        let part = |name: &str| now[name].as_i64().doing(format!("read {name} of {now}"));
        Ok(part("tm_hour")? * 3600 + part("tm_min")? * 60 + part("tm_sec")?)
    }

    /// Does it, and says what QEMU said: its error, if it had one. Does not wait for what follows.
    ///
    /// `runs`: whether its guest does, for anybody who knows of no migration.
    pub(super) fn begin(&mut self, deed: Deed, runs: bool) -> Result<Option<String>> {
        if let Some(key) = key_of(deed) {
            return if runs { press(self.monitor()?, key).map(|()| None) } else { Ok(None) };
        }
        if deed == Deed::PlugMemory {
            let memory =
                json!({"qom-type": "memory-backend-memfd", "id": DIMM, "size": 16 << 20, "share": true});
            // Where it is there already, what follows says so.
            let _ = self.monitor()?.execute("object-add", memory);
        }
        if deed == Deed::Backup {
            // What another QEMU has left there, on another host perhaps, belongs to that one's user.
            let _ = fs::remove_file(self.dir.join(BACKUP));
        }
        let (command, arguments) = self.command(deed);
        match self.monitor()?.execute(&command, arguments) {
            Ok(_) => Ok(None),
            Err(error) if error.what == command => Ok(Some(error.why)),
            Err(error) => {
                // Nobody has answered: it is done once more where the VM is now.
                self.size -= if deed == Deed::Grow { STEP } else { 0 };
                self.overlays -= u32::from(deed == Deed::Snapshot);
                Err(error)
            }
        }
    }

    fn command(&mut self, deed: Deed) -> (String, Value) {
        let file = |name: &str| self.dir.join(name).display().to_string();
        let (command, arguments) = match deed {
            Deed::Pause => ("stop", json!({})),
            Deed::Resume => ("cont", json!({})),
            Deed::Reset => ("system_reset", json!({})),
            Deed::Wake => ("system_wakeup", json!({})),
            // QEMU takes whichever port has been free for longest, if none is named.
            Deed::Plug => {
                ("device_add", json!({"driver": "usb-tablet", "id": TABLET, "bus": "usb.0", "port": "1"}))
            }
            Deed::Unplug => ("device_del", json!({"id": TABLET})),
            Deed::Eject => ("eject", json!({"id": DRIVE, "force": true})),
            Deed::Insert => {
                let two = file("two.iso");
                ("blockdev-change-medium", json!({"id": DRIVE, "filename": two, "format": "raw"}))
            }
            Deed::Throttle | Deed::Unthrottle => {
                let most = if deed == Deed::Throttle { 1_000_000 } else { 0 };
                let (bytes, operations) =
                    (json!({"bps": most, "bps_rd": 0, "bps_wr": 0}), ["iops", "iops_rd", "iops_wr"]);
                let mut limits = bytes;
                operations.into_iter().for_each(|name| limits[name] = json!(0));
                limits["device"] = json!(DISK);
                ("block_set_io_throttle", limits)
            }
            Deed::LinkDown | Deed::LinkUp => ("set_link", json!({"name": CARD, "up": deed == Deed::LinkUp})),
            Deed::Snapshot => {
                self.overlays += 1;
                let overlay = file(&format!("overlay{}.qcow2", self.overlays));
                (
                    "blockdev-snapshot-sync",
                    json!({"device": DISK, "snapshot-file": overlay, "format": "qcow2"}),
                )
            }
            Deed::Commit => ("block-commit", json!({"device": DISK, "job-id": JOB})),
            Deed::Grow => {
                self.size += STEP;
                ("block_resize", json!({"device": DISK, "size": self.size}))
            }
            Deed::Mirror => {
                let copy = file("mirror.img");
                let whole =
                    json!({"device": DISK, "job-id": JOB, "target": copy, "format": "raw", "sync": "full"});
                ("drive-mirror", whole)
            }
            Deed::Backup => {
                let copy = file(BACKUP);
                // A full one would be at its end, or not, when both are looked at.
                let later =
                    json!({"device": DISK, "job-id": JOB, "target": copy, "format": "qcow2", "sync": "none"});
                ("drive-backup", later)
            }
            Deed::CancelJobs => ("block-job-cancel", json!({"device": JOB, "force": true})),
            Deed::AddNode => {
                ("blockdev-add", json!({"driver": "null-co", "node-name": "node0", "read-zeroes": true}))
            }
            Deed::DropNode => ("blockdev-del", json!({"node-name": "node0"})),
            Deed::AddObject => ("object-add", json!({"qom-type": "rng-builtin", "id": "object0"})),
            Deed::DropObject => ("object-del", json!({"id": "object0"})),
            Deed::AddChardev => {
                ("chardev-add", json!({"id": CHARDEV, "backend": {"type": "null", "data": {}}}))
            }
            Deed::DropChardev => ("chardev-remove", json!({"id": CHARDEV})),
            Deed::AddNetwork => ("netdev_add", json!({"type": "hubport", "id": "net1", "hubid": 1})),
            Deed::DropNetwork => ("netdev_del", json!({"id": "net1"})),
            Deed::PlugMemory => ("device_add", json!({"driver": "pc-dimm", "id": "dimm0", "memdev": DIMM})),
            Deed::PlugCpu => {
                let place = json!({"socket-id": 0, "core-id": 1, "thread-id": 0});
                let mut cpu = place;
                (cpu["driver"], cpu["id"]) = (json!("qemu64-x86_64-cpu"), json!("cpu1"));
                ("device_add", cpu)
            }
            Deed::PowerButton => ("system_powerdown", json!({})),
            Deed::Migrate => ("migrate", json!({"uri": format!("unix:{}", self.sink.display())})),
            Deed::Quit => ("quit", json!({})),
            // The guest's own.
            Deed::Write | Deed::Sum | Deed::Reboot | Deed::Sleep | Deed::Panic | Deed::PowerOff => {
                ("query-name", json!({}))
            }
        };
        (command.to_owned(), arguments)
    }

    /// Waits for what follows from it. `failed`: QEMU refused.
    pub(super) fn finish(&mut self, deed: Deed, before: &Before, failed: bool) -> Result<()> {
        let (said, state) = (before.said, before.state.as_str());
        let ran = state == "running";
        if let Some(key) = key_of(deed).filter(|_| ran) {
            guest::handled(self.monitor()?, key, said, before.lost)?;
        }
        match deed {
            Deed::Quit if !failed => {
                self.over = true;
                return self.ends();
            }
            Deed::Migrate if !failed => {
                // With a job on a disk it fails.
                let monitor = self.monitor()?;
                wait_for("the end of QEMU's own migration", SOON, || {
                    let is = monitor.execute("query-migrate", json!({}))?;
                    let is = is["status"].as_str().unwrap_or("none");
                    Ok(matches!(is, "completed" | "failed" | "cancelled" | "none").then_some(()))
                })?;
                self.has_no_disks |= self.state()? == "postmigrate";
            }
            Deed::Mirror if !failed => {
                let monitor = self.monitor()?;
                wait_for("a mirror", SOON, || {
                    let jobs = monitor.execute("query-block-jobs", json!({}))?;
                    Ok((jobs[0]["ready"] == true).then_some(()))
                })?;
            }
            Deed::CancelJobs if !failed => {
                let monitor = self.monitor()?;
                wait_for("the end of a job", SOON, || {
                    let jobs = monitor.execute("query-block-jobs", json!({}))?;
                    Ok(jobs.as_array().is_some_and(Vec::is_empty).then_some(()))
                })?;
            }
            Deed::Sleep if ran => self.comes_to("suspended")?,
            Deed::Panic if ran => self.comes_to("guest-panicked")?,
            Deed::PowerOff if ran => self.comes_to("shutdown")?,
            Deed::Reset => self.will_start |= !failed,
            Deed::Resume if !failed => self.has_no_disks = false,
            Deed::Reboot => self.will_start |= ran,
            Deed::Wake => self.will_start |= state == "suspended" && !failed,
            Deed::Commit if !failed => {
                let monitor = self.monitor()?;
                wait_for("a commit", SOON, || {
                    let jobs = monitor.execute("query-block-jobs", json!({}))?;
                    match jobs.as_array().and_then(|jobs| jobs.first()) {
                        None => return Ok(Some(())),
                        Some(job) if job["ready"] == true => {
                            // It may have come to its end between the two.
                            let _ = monitor.execute("block-job-complete", json!({"device": JOB}));
                        }
                        Some(_) => {}
                    }
                    Ok(None)
                })?;
            }
            _ => {}
        }
        if self.will_start && self.state()? == "running" {
            guest::started(self.monitor()?, said)?;
            self.will_start = false;
        }
        Ok(())
    }

    /// Waits until its QEMU has ended.
    fn ends(&mut self) -> Result<()> {
        self.monitor = None;
        let pid = self.pid;
        wait_for("the end of QEMU", SOON, || {
            if let Some(process) = &mut self.process {
                return process.ended().map(|ended| ended.map(drop));
            }
            Ok((!Path::new(&format!("/proc/{pid}/fd/0")).exists()).then_some(()))
        })
    }

    fn comes_to(&mut self, state: &str) -> Result<()> {
        wait_for(&format!("a guest that is {state}"), SOON, || Ok((self.state()? == state).then_some(())))
    }

    /// Whether it is done by a key: QEMU ignores those of a guest that stands still.
    pub(super) fn is_by_key(deed: Deed) -> bool {
        key_of(deed).is_some()
    }

    /// What the guest says of itself.
    pub(super) fn words(&mut self) -> Result<Words> {
        words(self.monitor()?)
    }

    /// Words for what is named after it.
    pub(super) fn without_its_name(&self, line: &str) -> String {
        without_names(line, &self.dir.display().to_string(), &self.name)
    }
}

/// What the guest does is asked for by a key.
fn key_of(deed: Deed) -> Option<char> {
    match deed {
        Deed::Write => Some('x'),
        Deed::Sum => Some('v'),
        Deed::Reboot => Some('r'),
        Deed::Sleep => Some('s'),
        Deed::Panic => Some('p'),
        Deed::PowerOff => Some('o'),
        _ => None,
    }
}

/// Its directory, its TAP and its own name are no difference.
fn without_names(line: &str, dir: &str, name: &str) -> String {
    let line = line.replace(dir, "DIR");
    match line.split_once("ifname=") {
        Some((before, tap)) => {
            let after = tap.find(',').map_or("", |at| &tap[at..]);
            format!("{before}ifname=TAP{after}")
        }
        None => line.replace(&format!("\"{name}\""), "\"NAME\""),
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // One that was moved is nobody's child here.
        if self.process.is_none() {
            let pid = i32::try_from(self.pid).ok().and_then(rustix::process::Pid::from_raw);
            let _ = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
        }
        self.process = None;
        // The one that was moved has taken its own with it.
        let _ = self.host.namespace.ip(&format!("link del {}", self.tap));
    }
}

/// What is wrong with a sequence, or with the program.
pub(super) fn fault(what: impl Into<String>, why: impl std::fmt::Display) -> Error {
    Error::new(what, why)
}
