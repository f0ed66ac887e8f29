//! How the process of an adopted VM is confined and scheduled, and what of that its target's will not be.

use crate::Account;
use std::{collections::BTreeSet, fs, io, path::Path};
use sys::{
    proc::{self, Stat},
    process::PidFd,
};

/// What is different on the target, in words; nothing where it is not. `argv` is its command line.
pub(super) fn notes(process: &PidFd, argv: &[String]) -> Vec<String> {
    let read = |name: &str| fs::read_to_string(process.proc_path(name));
    let looked = (|| -> io::Result<Vec<String>> {
        let root = fs::read_link(process.proc_path("root"))?;
        let (group, ours) = (read("cgroup")?, fs::read_to_string("/proc/self/cgroup")?);
        let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let mut status = read("status")?;
        // The target's QEMU has that filter, too.
        let own = argv.windows(2).any(|words| words[0].ends_with("-sandbox") && words[1].starts_with("on"));
        if own {
            status = status.replace("Seccomp:", "");
        }
        // As on the target, if both hosts are set up alike; root gives rights up there, and takes none along.
        let usual = Account::choose(None).ok().and_then(|account| Some(account.ids()?.user));
        let same = [Some(0), usual].map(|user| user.unwrap_or(0).to_string());
        let mut notes = differences(&status, &same, &root, &group, &ours, &users);
        notes.extend(unlike(&scheduled(&process.proc_path(""))?, &scheduled(Path::new("/proc/self"))?));
        Ok(notes)
    })();
    looked.unwrap_or_else(|error| vec![format!("cannot look how its QEMU is confined: {error}")])
}

/// How the host treats the threads of a process. One that has changed while it is read is told as it was.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Scheduled {
    /// The processors that its threads may use, each list once.
    processors: BTreeSet<String>,
    /// What `nice` says of its first thread.
    nice: String,
    /// Whether a thread of it goes before all others (`chrt`).
    real_time: bool,
    /// What the kernel adds when it looks for somebody to end (`oom_score_adj`).
    oom: String,
}

/// Field numbers of `/proc/PID/stat`.
const NICE: usize = 19;
const PRIORITY: usize = 40;

fn scheduled(process: &Path) -> io::Result<Scheduled> {
    let oom = fs::read_to_string(process.join("oom_score_adj"))?.trim().to_owned();
    let mut found = Scheduled { oom, ..Scheduled::default() };
    let stat = Stat::parse(&fs::read_to_string(process.join("stat"))?)?;
    stat.word(NICE).unwrap_or_default().clone_into(&mut found.nice);
    for thread in fs::read_dir(process.join("task"))?.flatten() {
        let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
        found.processors.extend(proc::value(&status, "Cpus_allowed_list").map(str::to_owned));
        let stat = fs::read_to_string(thread.path().join("stat")).and_then(|text| Stat::parse(&text));
        found.real_time |= stat.and_then(|stat| stat.number(PRIORITY)).is_ok_and(|priority| priority > 0);
    }
    Ok(found)
}

/// How the target's QEMU is treated otherwise: it has what its agent has, as one that this agent starts.
fn unlike(its: &Scheduled, ours: &Scheduled) -> Vec<String> {
    let mut notes = Vec::new();
    if its.processors != ours.processors {
        let all: Vec<_> = its.processors.iter().map(String::as_str).collect();
        notes.push(format!(
            "its threads may use the processors {} only (taskset, vcpupin); on the target they may use those \
             of the agent",
            all.join(" and ")
        ));
    }
    if its.nice != ours.nice || its.real_time {
        let real = if its.real_time { ", and a thread of it goes before others (chrt)" } else { "" };
        notes.push(format!("it has a nice value of {}{real}; on the target it has the agent's", its.nice));
    }
    if its.oom != ours.oom {
        notes.push(format!("its oom_score_adj is {}; on the target it is the agent's", its.oom));
    }
    notes
}

/// `same` are users of which nothing is said.
fn differences(
    status: &str,
    same: &[String],
    root: &Path,
    group: &str,
    ours: &str,
    users: &str,
) -> Vec<String> {
    let mut notes = Vec::new();
    let user = proc::value(status, "Uid").and_then(|ids| ids.split_whitespace().nth(1)).unwrap_or("0");
    if !same.iter().any(|same| same == user) {
        let name = users.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)? == user).then_some(name)
        });
        let name = name.map_or_else(|| format!("number {user}"), str::to_owned);
        notes.push(format!(
            "its QEMU runs as the user {name} here; on the target as the one of [qemu] user there"
        ));
    }
    if proc::value(status, "Seccomp") == Some("2") {
        notes.push(
            "its seccomp filter stays behind; on the target QEMU's own applies (-sandbox on, no programs)"
                .to_owned(),
        );
    }
    if root != Path::new("/") {
        let root = root.display();
        notes.push(format!(
            "its QEMU has the root directory {root} here; on the target it sees the host's, read-only"
        ));
    }
    let name =
        |text: &str| text.lines().next().and_then(|line| line.splitn(3, ':').nth(2)).map(str::to_owned);
    if let (Some(group), Some(ours)) = (name(group), name(ours))
        && group != ours
    {
        notes.push(format!(
            "the limits of its control group {group} do not apply on the target, but those of the agent there"
        ));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_confines_a_qemu_is_told() {
        let free = "Uid:\t0\t0\t0\t0\nSeccomp:\t0\n";
        let bound = "Uid:\t64055\t64055\t64055\t64055\nSeccomp:\t2\n";
        let users =
            "root:x:0:0:root:/root:/bin/sh\nlibvirt-qemu:x:64055:994::/var/lib/libvirt:/usr/sbin/nologin\n";
        let told = |status: &str, root: &str, group: &str| {
            differences(status, &["0".to_owned()], Path::new(root), group, "0::/agent\n", users)
        };
        assert_eq!(told(free, "/", "0::/agent\n"), Vec::<String>::new());
        let notes = told(bound, "/var/empty", "0::/machine.slice/a\n");
        assert_eq!(notes.len(), 4, "{notes:#?}");
        for (note, says) in
            notes.iter().zip(["user libvirt-qemu", "seccomp", "/var/empty", "/machine.slice/a"])
        {
            assert!(note.contains(says), "{note}");
        }
        let ours = Scheduled {
            processors: ["0-7".to_owned()].into(),
            nice: "0".into(),
            oom: "0".into(),
            real_time: false,
        };
        assert_eq!(unlike(&ours, &ours), Vec::<String>::new());
        let bound = Scheduled {
            processors: ["0-7".to_owned(), "3".to_owned()].into(),
            nice: "-5".into(),
            real_time: true,
            oom: "-900".into(),
        };
        let notes = unlike(&bound, &ours);
        assert_eq!(notes.len(), 3, "{notes:#?}");
        for (note, says) in
            notes.iter().zip(["processors 0-7 and 3 only", "of -5, and a thread", "adj is -900"])
        {
            assert!(note.contains(says), "{note}");
        }
        let me = scheduled(Path::new("/proc/self")).unwrap();
        assert!(!me.processors.is_empty() && me.nice.parse::<i32>().is_ok(), "{me:?}");
        let stranger = differences("Uid: 1 7 1 1", &[], Path::new("/"), "", "", users);
        assert!(stranger[0].contains("user number 7"), "{stranger:?}");
    }
}
