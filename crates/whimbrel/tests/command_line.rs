//! The command as its users type it: words, JSON, exit status. The agent is real, its VMs are `sleep`
//! processes and its migrations are played from a script.

#[path = "../../agent/tests/fake/mod.rs"]
mod fake;

use fake::{Host, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::fs::PermissionsExt,
    process::{Command, Output, Stdio},
};

const WHIMBREL: &str = env!("CARGO_BIN_EXE_whimbrel");

fn command(host: &Host, line: &str) -> Command {
    let mut command = Command::new(WHIMBREL);
    command.args(line.split(' ')).env("WHIMBREL_SOCKET", host.socket()).current_dir(host.dir.path());
    command.stdin(Stdio::null());
    command
}

/// Exit status, standard output, standard error.
fn type_in(host: &Host, line: &str) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command(host, line).output().unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

fn with_vm() -> Host {
    let host = Host::new();
    fs::write(host.dir.path().join("web1.toml"), "name = \"web1\"").unwrap();
    let (status, out, err) = type_in(&host, "run web1.toml");
    assert_eq!(status, 0, "{err}");
    assert!(out.starts_with("web1 runs (QEMU is process "), "{out}");
    host
}

#[test]
fn a_vm_is_listed_shown_and_stopped() {
    let host = with_vm();
    let pid = host.json("GET", "/v1/vms/web1", Value::Null).1["pid"].to_string();
    let (_, out, _) = type_in(&host, "list");
    let gap = " ".repeat(pid.len().saturating_sub(3));
    let expected = format!(
        "NAME  STATE    VCPUS  MEMORY   MACHINE     PID{gap}\nweb1  running  2      1.0 GiB  pc-q35-7.2  \
         {pid}\n"
    );
    assert_eq!(out.replace("PID\n", &format!("PID{gap}\n")), expected);
    let (_, out, _) = type_in(&host, "show web1");
    for line in ["state    running", "owner    hosta, at epoch 1", "accel    tcg"] {
        assert!(out.contains(line), "{out}");
    }
    let (_, out, _) = type_in(&host, "list --json");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()[0]["name"], "web1");
    assert_eq!(type_in(&host, "stop web1").1, "web1 is stopped\n");
    assert!(type_in(&host, "list").1.starts_with("no VMs; "));
}

#[test]
fn a_migration_is_told_line_by_line_and_ends_with_a_report() {
    let host = with_vm();
    let (status, out, err) = type_in(&host, "migrate web1 --to good --verify");
    let expected = "     \
     0 ms  preflight: both hosts look whether it can work
   312 ms  pre-copy: memory moves while the VM runs here
           round 1: 262,144 pages looked at, 1.0 GiB sent in 2.31 s (443.3 MiB/s), 12,034 written meanwhile
   2.70 s  switchover: the VM is stopped

web1 runs on good now: all its memory was compared and is the same.

  mode      pre-copy
  total     2.72 s (preflight 312 ms)
  downtime  8.41 ms
  traffic   314.7 MiB over 2 streams for 1.0 GiB of guest memory (31 %)
  rounds    2
  pages     262,144: 180,000 never written, 2,144 zero, 80,000 raw
";
    assert_eq!((status, out.as_str(), err.as_str()), (0, expected, ""));
    let (_, out, _) = type_in(&host, "status web1");
    assert!(
        out.starts_with("The last migration of web1 from hosta took it to good: all its memory"),
        "{out}"
    );
}

#[test]
fn programs_get_events_and_the_bare_report_as_the_last_line() {
    let host = with_vm();
    let (status, out, _) = type_in(&host, "migrate web1 --to good --json");
    assert_eq!(status, 0);
    let lines: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (report, events) = lines.split_last().unwrap();
    assert!(events.iter().all(|event| event["event"].is_string()));
    let names: Vec<&String> = report.as_object().unwrap().keys().collect();
    let promised = [
        "aborted_pauses_ms",
        "check_ms",
        "downtime",
        "downtime_ms",
        "drain_ms",
        "error",
        "fate",
        "faults",
        "forecast",
        "forecast_off_percent",
        "from",
        "frozen_in_ms",
        "guest_bytes",
        "handed_over",
        "left_behind",
        "mode",
        "outcome",
        "pages",
        "preflight_ms",
        "protected",
        "reading_ms",
        "rounds",
        "spool",
        "streams",
        "throttle",
        "to",
        "total_ms",
        "verified",
        "vm",
        "waited_for_disks_ms",
        "wire_bytes",
    ];
    assert_eq!(names, promised);
    assert!(out.lines().last().unwrap().starts_with(r#"{"vm":"web1","from":"hosta","to":"good","outcome":"#));
}

#[test]
fn a_refusal_says_every_reason_who_runs_the_vm_and_a_remedy() {
    let host = with_vm();
    let (status, out, _) = type_in(&host, "migrate web1 --to bad");
    let expected = "
The migration of web1 to bad failed.

  what   migrate web1 to bad
  why    there is no bridge br0 on bad
         its QEMU is too old
  where  preflight, target
  VM     the VM runs on hosta, as if nothing had happened

  next: mend what the reason says and migrate again; nothing of web1 was left on bad
";
    assert_eq!(status, 1);
    assert!(out.ends_with(expected), "{out}");
}

#[test]
fn a_migration_in_doubt_says_how_to_resolve_it() {
    let host = with_vm();
    let (status, out, _) = type_in(&host, "migrate web1 --to doubt");
    assert_eq!(status, 3);
    assert!(out.contains("whimbrel resolve web1 --here --i-have-fenced doubt"), "{out}");
    assert_eq!(type_in(&host, "status web1").0, 3);
    assert_eq!(type_in(&host, "resolve web1 --here").0, 2, "the promise is not optional");
}

#[test]
fn interrupting_a_migration_cancels_it_and_waits() {
    let host = with_vm();
    let mut child = command(&host, "migrate web1 --to slow").stdout(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("round 1") {
        line.clear();
        assert!(out.read_line(&mut line).unwrap() > 0, "it ended early");
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(
        rest.contains("The migration of web1 to slow was cancelled; web1 runs on hosta as before."),
        "{rest}"
    );
}

#[test]
fn a_detached_migration_is_watched_and_cancelled_from_elsewhere() {
    let host = with_vm();
    let (status, out, _) = type_in(&host, "migrate web1 --to slow --detach");
    assert_eq!((status, out.contains("whimbrel status web1 --follow")), (0, true), "{out}");
    until("under way", || type_in(&host, "status web1").1.contains("12,034 pages (47.0 MiB) left"));
    assert!(type_in(&host, "list").1.contains("migrating"), "{}", type_in(&host, "list").1);
    let watcher = command(&host, "status web1 --follow").stdout(Stdio::piped()).spawn().unwrap();
    assert_eq!(
        type_in(&host, "cancel web1"),
        (0, "cancelled; web1 runs on hosta as before\n".into(), "".into())
    );
    let watched = watcher.wait_with_output().unwrap();
    assert_eq!(watched.status.code(), Some(130));
    assert!(String::from_utf8(watched.stdout).unwrap().contains("round 1"));
    let (status, _, err) = type_in(&host, "cancel web1");
    assert_eq!(status, 1);
    assert!(err.contains("web1 is not being migrated"), "{err}");
}

#[test]
fn an_agent_that_ends_is_told_apart_from_a_migration_that_ends() {
    let mut host = with_vm();
    let child =
        command(&host, "migrate web1 --to postcopy").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    until("post-copy", || type_in(&host, "status web1").1.contains("post-copy"));
    host.stop();
    let output = child.unwrap().wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(words.contains("start the agent again"), "{words}");
}

#[test]
fn what_is_wrong_is_said_with_the_fitting_status() {
    let host = with_vm();
    let table = [
        ("show wbe1", 2, "did you mean web1?"),
        ("migrate web1 --to godo", 2, "did you mean good?"),
        ("migrate web1 --to good --max-downtime 20", 2, "write one like 20ms"),
        ("migrate web1 --to good --bandwidth fast", 2, "is not an amount"),
        ("migrate web1 --to good --streams 65", 2, "65 is not in 1..=64"),
        ("run nowhere.toml", 2, "cannot read the VM file nowhere.toml"),
        ("run web1.toml", 1, "has a VM named web1 already"),
        ("adopt db --qmp nowhere.qmp", 1, "nothing answers at"),
        ("adopt --check --qmp nowhere.qmp", 1, "nothing answers at"),
        ("adopt --qmp nowhere.qmp", 2, "required"),
        ("--socket /nowhere/agent.sock list", 1, "start one with `whimbrel agent"),
        ("status web1", 2, "none was started"),
        ("frobnicate", 2, "unrecognized subcommand"),
    ];
    for (line, status, says) in table {
        let (code, out, err) = type_in(&host, line);
        assert_eq!(code, status, "{line}: {err}");
        assert!(err.contains(says) && out.is_empty(), "{line}: {out}{err}");
    }
    let (code, out, _) = type_in(&host, "show wbe1 --json");
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &answer["error"]["where"]), (2, &Value::from("agent of hosta")));
}

#[test]
fn a_user_without_rights_is_told_so() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIPPED: only root can become somebody else");
    }
    let host = with_vm();
    // Where it was built, others may not look.
    fs::set_permissions(host.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = host.dir.path().join("whimbrel");
    fs::copy(WHIMBREL, &copy).unwrap();
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]);
    let output = nobody.arg(&copy).arg("--socket").arg(host.socket()).arg("list").output().unwrap();
    let words = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(words.contains("only user 0 may") && words.contains("sudo"), "{words}");
}

#[test]
fn a_mistake_in_the_configuration_is_shown_with_line_and_column() {
    let host = Host::new();
    fs::write(host.dir.path().join("agent.toml"), "name = \"a\"\n[peers]\nb = \"10.0.0.2\"\n").unwrap();
    let (status, _, err) = type_in(&host, "agent --config agent.toml");
    assert_eq!(status, 2);
    assert!(err.contains("line 3, column 5") && err.contains("  3 | b = \"10.0.0.2\""), "{err}");
}
