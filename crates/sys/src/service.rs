//! The service of systemd that a process belongs to.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

/// Whether systemd manages this host's processes (`sd_booted(3)`).
pub fn is_booted() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// The systemd service to which a process belongs, by its number or `self`.
pub fn unit_of(process: &str) -> Option<String> {
    service(&fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap_or_default())
}

fn service(cgroups: &str) -> Option<String> {
    let paths = cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let mut units = paths.flat_map(|path| path.split('/')).filter(|part| part.ends_with(".service"));
    // Of a user's service manager, the last is the service itself.
    units.next_back().map(str::to_owned)
}

/// Whom a service takes along when it ends, in systemd's word (`systemd.kill(5)`).
pub fn kill_mode(unit: &str) -> Option<String> {
    let show = ["show", "--property=KillMode", "--value", "--", unit];
    let said =
        Command::new("systemctl").args(show).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let mode = String::from_utf8_lossy(&said.stdout).trim().to_owned();
    (said.status.success() && !mode.is_empty()).then_some(mode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_recognised_by_its_cgroup() {
        let table = [
            ("0::/system.slice/whimbrel-agent.service\n", Some("whimbrel-agent.service")),
            ("0::/user.slice/user@0.service/app.slice/w.service/x\n", Some("w.service")),
            ("4:memory:/\n0::/\n", None),
        ];
        for (cgroups, unit) in table {
            assert_eq!(service(cgroups).as_deref(), unit, "{cgroups}");
        }
    }
}
