//! How the agent of this host runs, if it does: what ends it must not end the guests.

use crate::Check;
use std::{env, fs, os::unix::fs::MetadataExt, path::Path};
use sys::{cgroup, service};

/// Where the agent keeps its state, sockets and consoles unless told otherwise.
const DIRECTORIES: [&str; 2] = ["/var/lib/whimbrel", "/run/whimbrel"];

/// What of them nobody else may read.
const FILES: [&str; 3] = ["redb", "console", "log"];

/// Whether a restart of the agent would end the guests, and whether others can read what is the agent's.
pub(crate) fn service() -> Vec<Check> {
    let agent = agent();
    let unit = agent.as_deref().and_then(service::unit_of);
    let judged = match (unit, agent) {
        (None, Some(agent)) => judge_cgroup(cgroup::can_set_apart(&agent).ok()),
        (unit, _) => judge_unit(unit.map(|unit| (service::kill_mode(&unit), unit)), has_busctl()),
    };
    vec![judged, judge_open(&open_to_others())]
}

/// An agent that runs here: its process.
fn agent() -> Option<String> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let agents =
        processes.filter(|process| is_agent(&fs::read(process.path().join("cmdline")).unwrap_or_default()));
    agents.filter_map(|process| process.file_name().into_string().ok()).next()
}

/// Whether this is the command line of an agent.
fn is_agent(command: &[u8]) -> bool {
    let words: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
    let program = words.first().and_then(|word| word.rsplit(|byte| *byte == b'/').next());
    program == Some(b"whimbrel".as_slice()) && words[1..].contains(&b"agent".as_slice())
}

/// By which a QEMU gets a scope of its own.
fn has_busctl() -> bool {
    env::split_paths(&env::var_os("PATH").unwrap_or_default()).any(|folder| folder.join("busctl").exists())
}

/// Where no service manager is, whoever ends the agent's cgroup ends what is in it.
fn judge_cgroup(can_set_apart: Option<bool>) -> Check {
    let name = "agent-service";
    match can_set_apart {
        Some(true) => {
            Check::ok(name, &[], "no agent runs as a systemd service here; guests outlive its cgroup")
        }
        _ => Check::warn(
            name,
            &[],
            "the agent cannot make cgroups for its guests: whoever ends its own ends them",
            "start it where it may make cgroups beside its own",
        ),
    }
}

fn judge_unit(unit: Option<(Option<String>, String)>, has_busctl: bool) -> Check {
    let name = "agent-service";
    match unit {
        None => Check::ok(name, &[], "no agent runs as a systemd service here"),
        Some((Some(mode), unit)) if matches!(mode.as_str(), "process" | "none") => {
            Check::ok(name, &[], format!("the agent runs as {unit} with KillMode={mode}: guests outlive it"))
        }
        Some((Some(mode), unit)) if has_busctl => Check::ok(
            name,
            &[],
            format!(
                "the agent runs as {unit} with KillMode={mode}: guests get scopes of their own, and outlive \
                 it"
            ),
        ),
        Some((Some(mode), unit)) => Check::warn(
            name,
            &[],
            format!(
                "the agent runs as {unit} with KillMode={mode}: its restart kills every guest that it has \
                 started"
            ),
            format!(
                "systemctl edit {unit}, and set KillMode=process, as contrib/whimbrel-agent.service does"
            ),
        ),
        Some((None, unit)) => Check::warn(
            name,
            &[],
            format!("the agent runs as {unit}, and systemctl does not say with which KillMode"),
            "see that it is KillMode=process, as in contrib/whimbrel-agent.service",
        ),
    }
}

/// What of the agent's others can read, in its usual places.
fn open_to_others() -> Vec<String> {
    let mut open = vec![];
    for directory in DIRECTORIES.map(Path::new) {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
        let private = entries.filter(|path| {
            path.extension().and_then(|ending| ending.to_str()).is_some_and(|ending| FILES.contains(&ending))
        });
        let all = private.chain([directory.to_owned()]);
        let readable = |path: &Path| fs::metadata(path).is_ok_and(|found| found.mode() & 0o066 != 0);
        open.extend(all.filter(|path| readable(path)).map(|path| path.display().to_string()));
    }
    open
}

fn judge_open(open: &[String]) -> Check {
    let name = "private-files";
    match open {
        [] => Check::ok(name, &[], "nobody else reads the agent's state and consoles"),
        open => Check::warn(
            name,
            &[],
            format!("others than the agent can read {}", open.join(", ")),
            "start the agent of this version, which puts that right",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    #[test]
    fn a_service_whose_end_is_the_guests_end_is_told_of() {
        let unit = |mode: Option<&str>| Some((mode.map(str::to_owned), "w.service".to_owned()));
        let table = [
            (None, false, Status::Ok),
            (unit(Some("process")), false, Status::Ok),
            (unit(Some("none")), false, Status::Ok),
            (unit(Some("control-group")), false, Status::Warn),
            (unit(Some("control-group")), true, Status::Ok),
            (unit(Some("mixed")), false, Status::Warn),
            (unit(None), true, Status::Warn),
        ];
        for (unit, has_busctl, expected) in table {
            assert_eq!(judge_unit(unit.clone(), has_busctl).status, expected, "{unit:?}");
        }
        for (can, expected) in [(Some(true), Status::Ok), (Some(false), Status::Warn), (None, Status::Warn)] {
            assert_eq!(judge_cgroup(can).status, expected, "{can:?}");
        }
    }

    #[test]
    fn an_agent_is_recognised() {
        assert!(is_agent(b"/usr/bin/whimbrel\0agent\0--config\0x\0"));
        assert!(!is_agent(b"/usr/bin/whimbrel\0watchdog\0") && !is_agent(b"vi\0agent\0") && !is_agent(b""));
    }

    #[test]
    fn what_others_can_read_is_named() {
        assert_eq!(judge_open(&[]).status, Status::Ok);
        let check = judge_open(&["/run/whimbrel".to_owned()]);
        assert!(check.status == Status::Warn && check.found.contains("/run/whimbrel"));
    }
}
