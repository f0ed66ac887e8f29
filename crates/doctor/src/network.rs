//! What VMs with a network card need.

use crate::{Check, qemu::in_path};
use std::{
    fs::OpenOptions,
    io,
    process::{Command, Stdio},
};

/// iproute2 and TAP devices.
pub(crate) fn checks() -> Vec<Check> {
    vec![ip(), judge_tun(OpenOptions::new().read(true).write(true).open("/dev/net/tun").map(drop))]
}

fn ip() -> Check {
    // A service's PATH may lack the directories for administrators.
    let found = in_path("ip").into_iter().chain(["/usr/sbin/ip".into(), "/sbin/ip".into()]);
    let version = found.into_iter().find_map(|path| {
        let output = Command::new(&path).arg("-V").stdin(Stdio::null()).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success().then(|| format!("{}: {text}", path.display()))
    });
    match version {
        Some(found) => Check::ok("ip", &[], found),
        None => Check::warn(
            "ip",
            &[],
            "no `ip` that runs: VMs with a network card cannot be started here",
            "install iproute2: apt-get install iproute2",
        ),
    }
}

fn judge_tun(opened: io::Result<()>) -> Check {
    let Err(e) = opened else { return Check::ok("tun", &[], "/dev/net/tun opens") };
    let remedy = match e.kind() {
        io::ErrorKind::PermissionDenied => {
            "run as root, or give this user the device: chmod 0666 /dev/net/tun"
        }
        _ => "load the driver: modprobe tun (in a container, pass the device in)",
    };
    Check::warn(
        "tun",
        &[],
        format!("/dev/net/tun: {e}: VMs with a network card cannot be started here"),
        remedy,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_driver_and_a_missing_right_have_different_remedies() {
        let remedy = |kind: io::ErrorKind| judge_tun(Err(kind.into())).remedy.unwrap();
        assert!(remedy(io::ErrorKind::NotFound).contains("modprobe"));
        assert!(remedy(io::ErrorKind::PermissionDenied).contains("root"));
    }
}
