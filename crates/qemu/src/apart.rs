//! A guest must outlive what ends its agent. A service manager may end a service with all that it has started
//! (systemd's default, `KillMode=control-group`): so a QEMU that is started there gets a cgroup of its own.

use std::{
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};
use sys::{cgroup, process::PidFd, service};

/// How long systemd may take to make a scope.
const SCOPE: Duration = Duration::from_secs(5);

/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(10);

/// Sets a QEMU apart that has just been started, if what ends the agent would end it. Where that cannot be,
/// it runs all the same; `doctor` tells it.
pub(crate) fn settle(process: &PidFd, name: &str) {
    let settled = match service::is_booted() {
        true => scope(process, name),
        false => cgroup::set_apart(&process.pid().to_string(), name).map(drop).map_err(|e| e.to_string()),
    };
    if let Err(why) = settled {
        tracing::warn!(vm = name, why, "the guest stays in the agent's cgroup, and ends with it");
    }
}

/// Has systemd make a scope of a process, where its service would take it along.
fn scope(process: &PidFd, name: &str) -> Result<(), String> {
    let Some(unit) = service::unit_of("self") else { return Ok(()) };
    if matches!(service::kill_mode(&unit).as_deref(), Some("process" | "none")) {
        return Ok(());
    }
    let said = Command::new("busctl")
        .args(scope_call(process.pid(), name))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output()
        .map_err(|error| format!("busctl cannot be run: {error}"))?;
    if !said.status.success() {
        return Err(format!("systemd makes no scope: {}", String::from_utf8_lossy(&said.stderr).trim()));
    }
    // It answers before it does it.
    let end = Instant::now() + SCOPE;
    while service::unit_of(&process.pid().to_string()).as_ref() == Some(&unit) {
        if Instant::now() > end {
            return Err(format!("systemd has made no scope within {SCOPE:?}"));
        }
        sleep(LOOK);
    }
    Ok(())
}

/// `StartTransientUnit` of `org.freedesktop.systemd1(5)`.
fn scope_call(pid: i32, name: &str) -> Vec<String> {
    let kept = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let name: String = name.chars().map(|c| if kept(c) { c } else { '_' }).collect();
    let mut words: Vec<String> = [
        "call",
        "--timeout=5",
        "org.freedesktop.systemd1",
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager",
        "StartTransientUnit",
        "ssa(sv)a(sa(sv))",
    ]
    .map(str::to_owned)
    .to_vec();
    words.push(format!("whimbrel-{name}.scope"));
    words.extend(["fail", "2", "Slice", "s", "machine.slice", "PIDs", "au", "1"].map(str::to_owned));
    words.extend([pid.to_string(), "0".to_owned()]);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_is_asked_for_by_a_name_that_systemd_takes() {
        let call = scope_call(7, "a.b/c-0011").join(" ");
        assert!(
            call.ends_with("whimbrel-a_b_c-0011.scope fail 2 Slice s machine.slice PIDs au 1 7 0"),
            "{call}"
        );
    }
}
