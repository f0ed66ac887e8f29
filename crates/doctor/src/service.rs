//! How the agent of this host runs, if it does: what ends it must not end the guests.

use crate::Check;
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
};

/// Where the agent keeps its state, sockets and consoles unless told otherwise.
const DIRECTORIES: [&str; 2] = ["/var/lib/whimbrel", "/run/whimbrel"];

/// What of them nobody else may read.
const FILES: [&str; 3] = ["redb", "console", "log"];

/// Whether a restart of the agent would end the guests, and whether others can read what is the agent's.
pub(crate) fn service() -> Vec<Check> {
    vec![judge_unit(agents_unit().map(|unit| (kill_mode(&unit), unit))), judge_open(&open_to_others())]
}

/// The systemd service in which an agent runs.
fn agents_unit() -> Option<String> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes
        .filter(|process| is_agent(&fs::read(process.path().join("cmdline")).unwrap_or_default()))
        .find_map(|process| unit_of(&fs::read_to_string(process.path().join("cgroup")).unwrap_or_default()))
}

/// Whether this is the command line of an agent.
fn is_agent(command: &[u8]) -> bool {
    let words: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
    let program = words.first().and_then(|word| word.rsplit(|byte| *byte == b'/').next());
    program == Some(b"whimbrel".as_slice()) && words[1..].contains(&b"agent".as_slice())
}

/// The service to which the cgroups of a process belong.
fn unit_of(cgroups: &str) -> Option<String> {
    let paths = cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let mut units = paths.flat_map(|path| path.split('/')).filter(|part| part.ends_with(".service"));
    // Of a user's service manager, the last is the service itself.
    units.next_back().map(str::to_owned)
}

fn kill_mode(unit: &str) -> Option<String> {
    let show = ["show", "--property=KillMode", "--value", "--", unit];
    let said =
        Command::new("systemctl").args(show).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let mode = String::from_utf8_lossy(&said.stdout).trim().to_owned();
    (said.status.success() && !mode.is_empty()).then_some(mode)
}

fn judge_unit(unit: Option<(Option<String>, String)>) -> Check {
    let name = "agent-service";
    match unit {
        None => Check::ok(name, &[], "no agent runs as a systemd service here"),
        Some((Some(mode), unit)) if matches!(mode.as_str(), "process" | "none") => {
            Check::ok(name, &[], format!("the agent runs as {unit} with KillMode={mode}: guests outlive it"))
        }
        Some((Some(mode), unit)) => Check::warn(
            name,
            &[],
            format!(
                "the agent runs as {unit} with KillMode={mode}: its restart kills every guest that it has started"
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
            (None, Status::Ok),
            (unit(Some("process")), Status::Ok),
            (unit(Some("none")), Status::Ok),
            (unit(Some("control-group")), Status::Warn),
            (unit(Some("mixed")), Status::Warn),
            (unit(None), Status::Warn),
        ];
        for (unit, expected) in table {
            assert_eq!(judge_unit(unit.clone()).status, expected, "{unit:?}");
        }
    }

    #[test]
    fn an_agent_and_its_service_are_recognised() {
        assert!(is_agent(b"/usr/bin/whimbrel\0agent\0--config\0x\0"));
        assert!(!is_agent(b"/usr/bin/whimbrel\0watchdog\0") && !is_agent(b"vi\0agent\0") && !is_agent(b""));
        let table = [
            ("0::/system.slice/whimbrel-agent.service\n", Some("whimbrel-agent.service")),
            ("0::/user.slice/user@0.service/app.slice/w.service/x\n", Some("w.service")),
            ("4:memory:/\n0::/\n", None),
        ];
        for (cgroups, unit) in table {
            assert_eq!(unit_of(cgroups).as_deref(), unit, "{cgroups}");
        }
    }

    #[test]
    fn what_others_can_read_is_named() {
        assert_eq!(judge_open(&[]).status, Status::Ok);
        let check = judge_open(&["/run/whimbrel".to_owned()]);
        assert!(check.status == Status::Warn && check.found.contains("/run/whimbrel"));
    }
}
