//! `whimbrel doctor` as its users meet it: words, JSON, exit status.

use serde_json::Value;
use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio},
};

const WHIMBREL: &str = env!("CARGO_BIN_EXE_whimbrel");

fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

fn check<'a>(diagnosis: &'a Value, name: &str) -> &'a Value {
    let checks = diagnosis["checks"].as_array().unwrap();
    checks.iter().find(|c| c["name"] == name).unwrap_or_else(|| panic!("no check {name} in {diagnosis:#}"))
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn a_program_reads_every_requirement_and_the_exit_status_agrees() {
    let output = run(Command::new(WHIMBREL).args(["doctor", "--json"]));
    let diagnosis = json(&output);
    for check in diagnosis["checks"].as_array().unwrap() {
        assert!(check["name"].is_string() && check["found"].is_string() && check["needed_for"].is_array());
        let status = check["status"].as_str().unwrap();
        assert!(["ok", "warn", "fail"].contains(&status), "{check}");
        assert_eq!(check["remedy"].is_null(), status == "ok", "{check}");
    }
    let hopeless = diagnosis["works"].as_array().unwrap().is_empty();
    assert_eq!(output.status.code(), Some(i32::from(hopeless)));
}

#[test]
fn people_get_plain_words_where_there_is_no_terminal() {
    let output = run(Command::new(WHIMBREL).arg("doctor"));
    let words = String::from_utf8(output.stdout).unwrap();
    assert!(words.contains("kernel") && !words.contains('\x1b'), "{words}");
}

#[test]
fn a_host_without_qemu_can_migrate_nothing() {
    if Path::new("/usr/libexec/qemu-kvm").exists() {
        return eprintln!("SKIPPED: this host has a QEMU outside PATH");
    }
    let empty = tempfile::tempdir().unwrap();
    let output = run(Command::new(WHIMBREL).args(["doctor", "--json"]).env("PATH", empty.path()));
    assert_eq!(output.status.code(), Some(1));
    let diagnosis = json(&output);
    assert_eq!(diagnosis["works"], Value::Array(vec![]));
    let qemu = check(&diagnosis, "qemu");
    assert_eq!(qemu["status"], "fail");
    assert!(qemu["remedy"].as_str().unwrap().contains("apt-get install"), "{qemu}");

    let path = env::var_os("PATH").unwrap();
    let named = env::split_paths(&path).map(|dir| dir.join("qemu-system-x86_64")).find(|path| path.exists());
    let Some(named) = named else { return };
    let mut named_run = Command::new(WHIMBREL);
    named_run.args(["doctor", "--json", "--qemu"]).arg(&named).env("PATH", empty.path());
    assert_eq!(check(&json(&run(&mut named_run)), "qemu")["status"], "ok");
}

#[test]
fn a_user_without_rights_is_told_which_and_how_to_get_them() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIPPED: only root can become somebody else");
    }
    let sysctl = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    if sysctl.trim() != "0" {
        return eprintln!("SKIPPED: everybody may use userfaultfd on this host");
    }
    // Where it was built, others may not look.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = dir.path().join("whimbrel");
    fs::copy(WHIMBREL, &copy).unwrap();

    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]);
    let output = run(nobody.arg(&copy).args(["doctor", "--json"]));
    let diagnosis = json(&output);
    assert_eq!(output.status.code(), Some(1), "{diagnosis:#}");
    for name in ["userfaultfd", "map-files"] {
        let check = check(&diagnosis, name);
        assert_eq!(check["status"], "fail", "{check}");
        assert!(check["remedy"].as_str().unwrap().contains("root"), "{check}");
    }
}
