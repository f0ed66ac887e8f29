//! `./dev demo`, interrupted in the middle.

use lab::{Doing, Result, Tools, ensure, skip, wait_for};
use rustix::process::{Pid, Signal, kill_process_group};
use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

const SOON: Duration = Duration::from_secs(30);

/// Killed when dropped; its laboratory goes with it.
struct Demo(Child);

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The entries of a directory that begin like this, with their whole paths.
fn entries(dir: &Path, prefix: &str) -> Vec<String> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let ours = |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    names.filter(|path| ours(path)).map(|path| path.display().to_string()).collect()
}

/// What identifies a process as long as it lives: its id may be given to another.
fn started(pid: &str) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<_> = stat.rsplit_once(") ")?.1.split(' ').collect();
    // A zombie has let go of everything.
    (fields.first() != Some(&"Z")).then(|| fields.get(19).copied().unwrap_or_default().to_owned())
}

#[test]
fn a_demo_that_is_interrupted_leaves_nothing_behind() -> Result<()> {
    if let Err(lacks) = Tools::find() {
        skip("an interrupted demo", &lacks);
        return Ok(());
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
    command.stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
    let mut demo = Demo(command.spawn().doing("start the demo")?);
    let stdout = demo.0.stdout.take().doing("hear the demo")?;
    let mut lines = BufReader::new(stdout).lines().map_while(|line| line.ok());
    let migrates = lines.find(|line| line.starts_with("$ whimbrel migrate"));
    ensure!(migrates.is_some(), "the demo came as far as its first migration");

    let prefix = format!("whb-{}-", demo.0.id());
    let (netns, temp) = (Path::new("/run/netns"), std::env::temp_dir());
    let mut processes = Vec::new();
    for namespace in entries(netns, &prefix) {
        let name = Path::new(&namespace).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let pids = lab::run(Command::new("ip").args(["netns", "pids", &name]))?;
        processes.extend(pids.lines().filter_map(|pid| Some((pid.to_owned(), started(pid)?))));
    }
    // Two agents and a machine at least; the sockets, logs and memory files are below one directory.
    ensure!(processes.len() >= 3, "there is something to clean up: {processes:?}");
    ensure!(entries(&temp, &prefix[..prefix.len() - 1]).len() == 1, "and a directory");

    let group = i32::try_from(demo.0.id()).ok().and_then(Pid::from_raw).doing("name the group")?;
    kill_process_group(group, Signal::INT).doing("press Ctrl-C")?;
    let status = demo.0.wait().doing("wait for the demo")?;
    ensure!(!status.success(), "an interrupted demo is no success");
    let mut left = Vec::new();
    wait_for("nothing to be left", SOON, || {
        left = entries(netns, &prefix);
        left.extend(entries(&temp, &prefix[..prefix.len() - 1]));
        let alive = processes.iter().filter(|(pid, start)| started(pid).as_ref() == Some(start));
        left.extend(alive.map(|(pid, _)| format!("process {pid}")));
        Ok(left.is_empty().then_some(()))
    })
    .map_err(|error| lab::Error::new(error.what, left.join(", ")))
}
