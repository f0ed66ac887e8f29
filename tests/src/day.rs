//! A day of an ordinary Debian (`tests/debian.sh`): it is moved, updated while it is moved, rebooted, moved
//! while it reboots, suspended, woken, moved and switched off. After each its services are looked at.

use crate::{
    Doing, Error, Lab, Process, QEMU, Qmp, Result, Stage, Tools, ensure, run,
    twin::{second_monitor, wrapper},
    wait_for,
};
use serde_json::json;
use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// What an emulated Debian may take to boot, or to do something, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(600);

const NAME: &str = "day";

/// As `tests/debian.sh` has it.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 199);

const HOSTS: [&str; 2] = ["a", "b"];

/// They run all day.
const SERVICES: &str = "ssh cron nginx dbus systemd-journald systemd-networkd whimbrel-day";

/// What a kernel says of a disk, a file system or memory that is not as it left it.
const WRONG: [&str; 6] = ["I/O error", "EXT4-fs error", "Oops", "general protection", "Bad page", "corrupt"];

/// The guest's clock may be so far from the host's. It is asked over ssh, which takes an emulated CPU a
/// while.
const CLOCKS: u64 = 15;

struct Day<'a> {
    stage: &'a Stage<'a>,
    key: PathBuf,
    dir: PathBuf,
    process: Option<Process>,
    at: usize,
    /// Lines of its chain when it was looked at last.
    lines: usize,
    begin: Instant,
    moves: u32,
}

/// Lets it live a day. `image`: what `tests/debian.sh` has made.
pub fn live(lab: &Lab, tools: &Tools, image: &Path) -> Result<String> {
    let qemu = wrapper(lab.dir())?;
    let stage = Stage::with(lab, tools, |_| crate::Oddity {
        lines: format!("qemu = {qemu:?}"),
        ..crate::Oddity::default()
    })?;
    let mut day = Day::begin(&stage, image)?;
    let lived = day.lives();
    if lived.is_err() {
        // One that was moved has its console where it is now.
        let here = match day.process {
            Some(_) => day.dir.join("console"),
            None => lab.host(HOSTS[day.at]).dir.join("run").join(format!("{NAME}.console")),
        };
        let said = String::from_utf8_lossy(&fs::read(here).unwrap_or_default()).into_owned();
        let last: Vec<_> = said.lines().rev().take(30).collect();
        last.iter().rev().for_each(|line| eprintln!("console: {line}"));
    }
    lived?;
    Ok(format!(
        "moved {} times, {} lines in its chain; {} s",
        day.moves,
        day.lines,
        day.begin.elapsed().as_secs()
    ))
}

impl<'a> Day<'a> {
    fn begin(stage: &'a Stage<'a>, image: &Path) -> Result<Self> {
        let (dir, host) = (stage.lab.dir().join(NAME), stage.lab.host(HOSTS[0]));
        fs::create_dir_all(&dir).doing("make a directory")?;
        for file in ["disk.img", "vmlinuz", "initrd.img", "key"] {
            run(Command::new("cp").arg("--sparse=always").arg(image.join(file)).arg(&dir))?;
        }
        host.add_tap("t-day")?;
        let at = |name: &str| dir.join(name).display().to_string();
        let words = format!(
            "-name {NAME} -nodefaults -no-user-config -display none -accel tcg -smp 2 -m 512M \
             -object memory-backend-memfd,id=ram0,size=512M,share=on -machine q35,memory-backend=ram0 \
             -kernel {} -initrd {} \
             -drive file={},format=raw,if=none,id=disk0,cache=writeback -device virtio-blk-pci,drive=disk0 \
             -netdev tap,id=net0,ifname=t-day,script=no,downscript=no \
             -device virtio-net-pci,netdev=net0,mac=52:54:00:78:01:99,romfile= \
             -object rng-random,id=random0,filename=/dev/urandom -device virtio-rng-pci,rng=random0 \
             -serial file:{} -qmp unix:{},server=on,wait=off -qmp unix:{},server=on,wait=off",
            at("vmlinuz"),
            at("initrd.img"),
            at("disk.img"),
            at("console"),
            at("first.sock"),
            at("second.sock"),
        );
        let mut command = host.namespace.command(QEMU);
        command
            .args(words.split_whitespace())
            .arg("-append")
            .arg("root=/dev/vda rw console=ttyS0 net.ifnames=0");
        let mut process = host.spawn(NAME, &mut command)?;
        wait_for("a monitor", PATIENCE, || {
            process.must_live()?;
            Ok(Qmp::connect(&dir.join("second.sock")).ok())
        })?;
        stage.agent(HOSTS[0]).cli().json(&["adopt", NAME, "--qmp", &at("first.sock")])?;
        let (key, process) = (dir.join("key"), Some(process));
        Ok(Self { stage, key, dir, process, at: 0, lines: 0, begin: Instant::now(), moves: 0 })
    }

    fn lives(&mut self) -> Result<()> {
        let mut boot = self.boots(None)?;
        self.works("it has booted")?;
        self.moves("pre-copy")?;
        self.works("it was moved")?;

        let update =
            self.start("apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y upgrade")?;
        self.moves("hybrid")?;
        ended_well(update, "its update")?;
        ensure!(self.inside("dpkg-query -W -f '${Version}' whimbrel-day")? == "2", "it was updated");
        self.works("it was moved while it was updated")?;

        self.inside("systemd-run --on-active=1 systemctl reboot")?;
        boot = self.boots(Some(&boot))?;
        self.works("it was rebooted")?;

        self.inside("systemd-run --on-active=1 systemctl reboot")?;
        self.silent()?;
        self.moves("post-copy")?;
        boot = self.boots(Some(&boot))?;
        self.works("it was moved while it rebooted")?;

        self.inside("systemd-run --on-active=1 systemctl suspend")?;
        self.comes_to("suspended")?;
        let (_, report) = self.migration("pre-copy")?.end()?;
        ensure!(
            report.error().contains("it is in state suspended"),
            "one that sleeps is not moved: {}",
            report.0
        );
        self.monitor()?.execute("system_wakeup", json!({}))?;
        ensure!(self.boots(None)? == boot, "it was woken, and not booted");
        self.works("it was suspended and woken")?;

        self.moves("pre-copy")?;
        self.works("it was moved after its sleep")?;
        ensure!(!self.inside("cat /var/lib/cron-was-here")?.is_empty(), "cron was there");

        // A q35 of QEMU 7.2 whose guest has slept does not let it switch itself off, moved or not, before it
        // has been reset: the write to its power management is lost, and Linux panics.
        self.inside("systemd-run --on-active=1 systemctl reboot")?;
        self.boots(Some(&boot))?;
        self.works("it was rebooted after its sleep")?;

        self.inside("systemd-run --on-active=1 systemctl poweroff")?;
        wait_for("the end of its QEMU", PATIENCE, || {
            let shown = self.stage.show(HOSTS[self.at], NAME)?;
            Ok(shown.is_none_or(|vm| vm["state"] != "running").then_some(()))
        })?;
        // A file system that was cleanly left; whatever is wrong with it, e2fsck says.
        run(Command::new("/sbin/e2fsck").args(["-fn"]).arg(self.dir.join("disk.img"))).map(drop)?;
        self.say("it has switched itself off, and its file system is clean");
        Ok(())
    }

    fn say(&self, what: &str) {
        println!("[{:3} s] on {}: {what}", self.begin.elapsed().as_secs(), HOSTS[self.at]);
    }

    fn ssh(&self, what: &str) -> Command {
        let mut command = self.stage.client.command("ssh");
        command.args(["-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
        command.args(["-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]);
        // A connection ends with the boot that it was made to, and not by a move.
        command.args(["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=12"]);
        command.arg("-i").arg(&self.key).arg(format!("root@{ADDRESS}")).arg(what);
        command
    }

    /// What a command says in the guest.
    fn inside(&self, what: &str) -> Result<String> {
        run(&mut self.ssh(what)).map(|said| said.trim().to_owned())
    }

    fn start(&self, what: &str) -> Result<Child> {
        let mut command = self.ssh(what);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .doing(what.to_owned())
    }

    /// Waits until it is up, after another boot than this one; which boot it is.
    fn boots(&self, before: Option<&str>) -> Result<String> {
        let boot = wait_for("a Debian that is up", PATIENCE, || {
            let boot = self.inside("cat /proc/sys/kernel/random/boot_id").ok();
            Ok(boot.filter(|boot| Some(boot.as_str()) != before))
        })?;
        // Says so by its status, too, if something has failed.
        let _ = self.inside("systemctl is-system-running --wait");
        Ok(boot)
    }

    /// Waits until nobody answers there any more: it is on its way down, or up again.
    fn silent(&self) -> Result<()> {
        wait_for("a Debian that goes down", PATIENCE, || Ok(self.page().is_err().then_some(())))
    }

    fn migration(&self, mode: &str) -> Result<crate::Migration> {
        let (from, to) = (HOSTS[self.at], HOSTS[1 - self.at]);
        self.stage.start_migration(NAME, from, to, &["--mode", mode, "--max-downtime", "300ms", "--verify"])
    }

    fn moves(&mut self, mode: &str) -> Result<()> {
        let report = self.migration(mode)?.completed()?;
        ensure!(report.verified() == Some(true), "memory was compared: {}", report.0);
        self.stage.runs_only_on(NAME, HOSTS[1 - self.at])?;
        (self.at, self.process, self.moves) = (1 - self.at, None, self.moves + 1);
        self.say(&format!("moved ({mode})"));
        Ok(())
    }

    fn monitor(&self) -> Result<Qmp> {
        if self.process.is_some() {
            return Qmp::connect(&self.dir.join("second.sock"));
        }
        let shown = self.stage.show(HOSTS[self.at], NAME)?.doing("find it")?;
        let pid = shown["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).doing("read its process")?;
        Qmp::connect(&second_monitor(pid)?)
    }

    fn comes_to(&self, state: &str) -> Result<()> {
        let mut monitor = self.monitor()?;
        wait_for(&format!("a guest that is {state}"), PATIENCE, || {
            Ok((monitor.execute("query-status", json!({}))?["status"] == state).then_some(()))
        })
    }

    /// The first line of what its web server answers.
    fn page(&self) -> Result<String> {
        const WITHIN: Duration = Duration::from_secs(10);
        self.stage.client.inside(|| {
            let asked = || {
                let mut stream = TcpStream::connect_timeout(&SocketAddr::from((ADDRESS, 80)), WITHIN)?;
                stream.set_read_timeout(Some(WITHIN))?;
                stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer).map(|_| answer)
            };
            let answer = asked().doing("ask its web server")?;
            Ok(answer.lines().next().unwrap_or_default().to_owned())
        })
    }

    /// Whatever runs in it does what it is for.
    fn works(&mut self, after: &str) -> Result<()> {
        let wrong = |what: &str, why: String| Err(Error::new(format!("after {after}: {what}"), why));
        let failed = self.inside("systemctl --failed --plain --no-legend")?;
        if !failed.is_empty() {
            return wrong("units have failed", failed);
        }
        let active = self.inside(&format!("systemctl is-active {SERVICES}"));
        if let Err(error) = active {
            return wrong("a service is not active", error.to_string());
        }
        let page = self.page()?;
        if !page.contains("200 OK") {
            return wrong("its web server", page);
        }
        let said = self.inside("journalctl -q -k -b -p warning --no-pager -o cat")?;
        if let Some(line) = said.lines().find(|line| WRONG.iter().any(|wrong| line.contains(wrong))) {
            return wrong("its kernel", line.to_owned());
        }
        let theirs: u64 = self.inside("date +%s")?.parse().doing("read its clock")?;
        let ours = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if ours.abs_diff(theirs) > CLOCKS {
            return wrong("its clock", format!("{theirs}, and {ours} here"));
        }
        let chain = self.inside("cat /var/lib/whimbrel-day")?;
        let lines = follow(&chain)?;
        if lines <= self.lines {
            return wrong("its chain", format!("{lines} lines, and {} before", self.lines));
        }
        self.lines = lines;
        self.say(&format!("{after}: its services work, {lines} lines in its chain"));
        Ok(())
    }
}

fn ended_well(child: Child, what: &str) -> Result<()> {
    let output = child.wait_with_output().doing(what.to_owned())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{what} ended with {}: {said}", output.status);
    Ok(())
}

/// How many lines a chain has, each with the checksum of the one before.
fn follow(chain: &str) -> Result<usize> {
    let mut before = String::new();
    for (n, line) in chain.lines().enumerate() {
        let (sum, size) = (cksum(before.as_bytes()), before.len());
        ensure!(
            line.starts_with(&format!("{sum} {size} ")),
            "line {} of its chain is {line:?}, and should begin with {sum} {size}",
            n + 1
        );
        before = format!("{line}\n");
    }
    Ok(chain.lines().count())
}

/// As `cksum` has it (POSIX: its CRC takes the length along).
fn cksum(bytes: &[u8]) -> u32 {
    let bit = |crc: u32, _| (crc << 1) ^ if crc >> 31 == 1 { 0x04c1_1db7 } else { 0 };
    let step = |crc: u32, byte: u8| (0..8).fold(crc ^ (u32::from(byte) << 24), bit);
    let mut crc = bytes.iter().fold(0, |crc, byte| step(crc, *byte));
    let mut length = bytes.len();
    while length > 0 {
        crc = step(crc, (length & 0xff) as u8);
        length >>= 8;
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_one_of_checksums_as_cksum_has_them() {
        assert_eq!(cksum(b""), 4_294_967_295);
        assert_eq!(cksum(b"123456789"), 930_766_865);
        let first = "4294967295 0 1\n";
        let second = format!("{} {} 2\n", cksum(first.as_bytes()), first.len());
        assert_eq!(follow(&format!("{first}{second}")).unwrap(), 2);
        assert!(follow(&format!("{first}{first}")).is_err());
    }
}
