//! Takes a laboratory down, whatever became of its owner.
//!
//! There is one way down only: a small shell process waits for the end of a pipe that the owner holds. The
//! pipe ends when the laboratory is dropped, and also when the owner is killed. The shell then kills whatever
//! still runs in the laboratory's namespaces (machines outlive the agents that started them), removes the
//! namespaces, unmounts and removes the directory.

use crate::{Doing, Result};
use std::{
    collections::BTreeSet,
    fs,
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
};

/// What the names of all namespaces and directories of laboratories begin with; the owner's process id
/// follows.
pub(crate) const PREFIX: &str = "whb-";

/// Arguments: the prefix of the namespaces' names, the prefix of directories, `keep` to keep the directories.
/// A process that is being born while we kill is found on the next turn.
const SCRIPT: &str = r#"
trap '' INT TERM HUP
read -r _
for turn in 1 2 3 4 5 6 7 8 9 10; do
    found=
    for ns in /run/netns/"$1"*; do
        [ -e "$ns" ] || continue
        pids=$(ip netns pids "${ns##*/}" 2>/dev/null) || continue
        [ -z "$pids" ] || { found=1; kill -9 $pids 2>/dev/null; }
    done
    [ -n "$found" ] || break
    sleep 0.05
done
for ns in /run/netns/"$1"*; do
    [ ! -e "$ns" ] || ip netns del "${ns##*/}" 2>/dev/null
done
for dir in "$2"*; do
    [ -d "$dir" ] || continue
    while read -r _ at _; do
        case $at in "$dir"/*) umount -l "$at" 2>/dev/null;; esac
    done </proc/mounts
    [ "$3" = keep ] || rm -rf "$dir"
done
"#;

/// Holds the pipe whose end takes the laboratory down.
#[derive(Debug)]
pub(crate) struct Reaper(Child);

impl Reaper {
    /// Guards the namespaces whose names begin with `prefix`, and `dir`.
    pub(crate) fn new(prefix: &str, dir: &Path) -> Result<Self> {
        let keep = if std::env::var_os("WHIMBREL_LAB_KEEP").is_some() { "keep" } else { "" };
        let child = shell(prefix, dir, keep).stdin(Stdio::piped()).spawn().doing("start the reaper")?;
        Ok(Self(child))
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn shell(prefix: &str, dir: &Path, keep: &str) -> Command {
    let mut shell = Command::new("/bin/sh");
    // A group of its own, so that Ctrl-C reaches the owner and not the one that cleans up after it.
    shell.args(["-c", SCRIPT, "reaper", prefix]).arg(dir).arg(keep).process_group(0);
    shell.stdout(Stdio::null()).stderr(Stdio::null());
    shell
}

/// Takes down what is left of laboratories whose owner is dead and whose reaper was killed too.
pub(crate) fn reap_leftovers() {
    let names = |dir: &str| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok())
    };
    let temp = std::env::temp_dir();
    let owners: BTreeSet<u32> = names("/run/netns")
        .chain(names(&temp.to_string_lossy()))
        .filter_map(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok())
        .collect();
    for pid in owners.into_iter().filter(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
        let prefix = format!("{PREFIX}{pid}-");
        let _ = shell(&prefix, &temp.join(&prefix), "").stdin(Stdio::null()).status();
    }
}
