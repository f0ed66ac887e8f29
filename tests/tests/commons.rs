//! What a host keeps of a VM that has left, for when it comes back.

use lab::{
    Doing, Error, Guest, Lab, Oddity, Report, Result, Spec, Stage, Tools, VmFile, ensure, story, wait_for,
};
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};
use units::Rate;

const MODES: [&str; 3] = ["pre-copy", "hybrid", "post-copy"];
/// Idle, with memory that cannot be compressed, and a little that the guest watches over.
const WORK: &str = "whimbrel.fill=128M,content=random whimbrel.check=2M,rate=256K";

/// `ip netns exec` hides what is mounted there.
const SHOW_GROUPS: &str = "mount -t cgroup -o memory none /sys/fs/cgroup 2>/dev/null ||
    mount -t cgroup2 none /sys/fs/cgroup || true";

/// Only `a` keeps what leaves it.
fn stage<'a>(lab: &'a Lab, tools: &'a Tools) -> Result<Stage<'a>> {
    Stage::with(lab, tools, |host| {
        let lines = if host.name == "a" { "commons.keep = \"50%\"" } else { "" };
        Oddity { lines: lines.to_owned(), prelude: SHOW_GROUPS.to_owned(), ..Oddity::default() }
    })
}

fn run(stage: &Stage, on: &str, number: u8) -> Result<Guest> {
    stage.run(on, &VmFile { memory: "384MiB".to_owned(), ..VmFile::new("web", Spec::new(number, WORK)) })
}

fn hop(stage: &Stage, guest: &Guest, mode: &str, from: &str, to: &str) -> Result<(f64, f64)> {
    // With a limit, nobody probes a link that is new to it.
    let report: Report = stage.migrate("web", guest, from, to, &["--mode", mode, "--bandwidth", "4Gbit"])?;
    let (kept, wire) = (report.number("pages.kept")?, report.number("wire_bytes")?);
    let (total, downtime) = (report.number("total_ms")?, report.number("downtime_ms")?);
    eprintln!(
        "{mode} {from} → {to}: {wire} bytes, {total:.0} ms, down {downtime:.1} ms, {}",
        report.0["pages"]
    );
    // What is found there says nothing of the link: nobody is slowed for it, and no round is in vain.
    let rounds = report.0["rounds"].as_array().map_or(0, Vec::len);
    ensure!(rounds <= 4, "{mode} {from} → {to}: {rounds} rounds of an idle guest");
    ensure!(report.0["throttle"]["throttled"] == false, "{mode} {from} → {to}: an idle guest was throttled");
    Ok((kept, wire))
}

#[test]
fn i2_i7_a_vm_that_returns_costs_what_changed() {
    story("there and back to a host that keeps", &["a", "b"], |lab, tools| {
        let stage = stage(lab, tools)?;
        let guest = run(&stage, "a", 111)?;
        let mut costly = vec![];
        for mode in MODES {
            let (kept, there) = hop(&stage, &guest, mode, "a", "b")?;
            ensure!(kept == 0.0, "{mode}: b keeps nothing");
            let (kept, back) = hop(&stage, &guest, mode, "b", "a")?;
            ensure!(kept > 30_000.0, "{mode}: only {kept} pages were kept");
            costly
                .extend((back >= there / 20.0).then(|| format!("{mode}: {there} bytes there, {back} back")));
        }
        ensure!(costly.is_empty(), "{costly:?}");
        Ok(())
    });
}

#[test]
fn what_is_kept_is_not_for_another_vm_of_that_name() {
    story("another VM of the same name", &["a", "b"], |lab, tools| {
        let stage = stage(lab, tools)?;
        let guest = run(&stage, "a", 112)?;
        hop(&stage, &guest, "pre-copy", "a", "b")?;
        stage.agent("b").cli().json(&["stop", "web"])?;
        drop(guest);
        let other = run(&stage, "b", 113)?;
        let (kept, _) = hop(&stage, &other, "pre-copy", "b", "a")?;
        ensure!(kept == 0.0, "{kept} pages of another VM were named");
        Ok(())
    });
}

#[test]
fn what_an_agent_keeps_ends_with_it() {
    story("an agent that keeps and is killed", &["a", "b"], |lab, tools| {
        let mut stage = stage(lab, tools)?;
        let guest = run(&stage, "a", 114)?;
        hop(&stage, &guest, "pre-copy", "a", "b")?;
        stage.agent_mut("a").crash()?;
        stage.agent_mut("a").begin()?;
        let (kept, _) = hop(&stage, &guest, "pre-copy", "b", "a")?;
        ensure!(kept == 0.0, "{kept} pages outlived the agent that kept them");
        Ok(())
    });
}

/// A cgroup that may have so much memory: there is room for what is kept, until somebody fills it.
struct Group {
    at: PathBuf,
    filled: PathBuf,
}

const LIMIT_MIB: u32 = 512;

impl Group {
    /// Where this host has one that counts memory.
    fn new() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/mounts").doing("read what is mounted")?;
        let made = mounts.lines().find_map(|line| {
            let fields: Vec<_> = line.split(' ').collect();
            let memory =
                fields.get(2) == Some(&"cgroup2") || fields.get(3)?.split(',').any(|o| o == "memory");
            let at = Path::new(fields.get(1)?).join(format!("whimbrel-test-{}", std::process::id()));
            if !memory || !fields.get(2)?.starts_with("cgroup") {
                return None;
            }
            fs::create_dir(&at).ok()?;
            let limit = (u64::from(LIMIT_MIB) << 20).to_string();
            let mut files = ["memory.max", "memory.limit_in_bytes"].iter();
            let limited =
                files.any(|file| at.join(file).exists() && fs::write(at.join(file), &limit).is_ok());
            let filled = Path::new("/dev/shm").join(format!("whimbrel-test-{}", std::process::id()));
            // Dropping it takes it away.
            Some(Self { at, filled }).filter(|_| limited)
        });
        made.ok_or_else(|| Error::new("make a cgroup with a limit of memory", "no hierarchy has it here"))
    }

    fn take(&self, pid: &str) -> Result<()> {
        fs::write(self.at.join("cgroup.procs"), pid).doing("move a process")
    }

    /// Somebody takes nearly all of its memory.
    fn fill(&self) -> Result<()> {
        let (procs, filled) = (self.at.join("cgroup.procs"), self.filled.display());
        let count = LIMIT_MIB - 20;
        let script = format!(
            "echo $$ > {}; exec dd if=/dev/zero of={filled} bs=1M count={count} status=none",
            procs.display()
        );
        lab::run(Command::new("sh").args(["-ec", &script])).map(drop)
    }

    fn empty(&self) -> Result<()> {
        fs::remove_file(&self.filled).doing("give the memory back")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.filled);
        let _ = fs::remove_dir(&self.at);
    }
}

/// The memory that a process holds, by the numbers of its files.
fn held(pid: u32) -> Result<BTreeSet<u64>> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).doing("list what the agent holds")?;
    let memory = fds
        .flatten()
        .map(|fd| fd.path())
        .filter(|path| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:")));
    Ok(memory.filter_map(|path| Some(fs::metadata(path).ok()?.ino())).collect())
}

/// None of this memory is held any more.
fn is_given_back(pid: u32, memory: &BTreeSet<u64>) -> Result<()> {
    wait_for("the memory that was kept to be given back", Duration::from_secs(10), || {
        Ok(held(pid)?.is_disjoint(memory).then_some(()))
    })
}

fn leave(stage: &Stage, guest: &Guest, group: &Group, pid: u32) -> Result<BTreeSet<u64>> {
    let vm = stage.show("a", "web")?.unwrap_or_default();
    group.take(&vm["pid"].to_string())?;
    let before = held(pid)?;
    hop(stage, guest, "pre-copy", "a", "b")?;
    let kept: BTreeSet<u64> = held(pid)?.difference(&before).copied().collect();
    ensure!(!kept.is_empty(), "nothing is kept of a VM that has left");
    Ok(kept)
}

#[test]
fn i2_i7_what_is_kept_is_given_back_when_memory_is_scarce() {
    story("a cgroup that runs short of memory", &["a", "b"], |lab, tools| {
        let mut stage = stage(lab, tools)?;
        let group = Group::new()?;
        let pid = stage.agent_mut("a").process()?.pid();
        let guest = run(&stage, "a", 115)?;

        // Nobody uses it.
        let kept = leave(&stage, &guest, &group, pid)?;
        group.fill()?;
        is_given_back(pid, &kept)?;
        group.empty()?;
        let (kept, _) = hop(&stage, &guest, "pre-copy", "b", "a")?;
        ensure!(kept == 0.0, "{kept} pages are kept although memory was scarce");

        // The VM that comes back uses it: telling of it takes some seconds over this link.
        let kept = leave(&stage, &guest, &group, pid)?;
        lab.host("a").shape(Some(Rate(60 << 10)))?;
        let options = ["--mode", "pre-copy", "--bandwidth", "4Gbit", "--verify"];
        let mut back = stage.start_migration("web", "b", "a", &options)?;
        back.until_moving("pre-copy")?;
        ensure!(!held(pid)?.is_disjoint(&kept), "it is not in use");
        group.fill()?;
        is_given_back(pid, &kept)?;
        lab.host("a").shape(None)?;
        let report = back.completed()?;
        ensure!(report.verified() == Some(true), "the memory of both sides was compared");
        let kept = report.number("pages.kept")?;
        ensure!(kept < 25_000.0, "{kept} pages of memory that was given back");
        stage.check_moved("web", &guest, "b", "a")
    });
}
