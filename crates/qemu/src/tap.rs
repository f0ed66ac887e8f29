//! TAP interfaces: made for a VM's network card, put on a bridge, and taken away with the VM.

use crate::random;
use std::{
    io,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

/// How often, and how long after the last time, it is tried to take away a TAP that could not be.
const ATTEMPTS: u32 = 20;
const AGAIN: Duration = Duration::from_millis(500);

/// Why a TAP could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a TAP on bridge {bridge}: {why}")]
pub struct TapError {
    /// The bridge.
    pub bridge: String,
    /// What `ip` said.
    pub why: String,
}

/// Makes a TAP on `bridge` and returns its name. The name is new each time, so that source and target of a migration
/// can be one host.
pub fn create(vm: &str, bridge: &str) -> Result<String, TapError> {
    let failed = |why| TapError { bridge: bridge.to_owned(), why };
    if !is_bridge(bridge) {
        return Err(failed(format!(
            "there is no bridge {bridge} here; make it with: ip link add {bridge} type bridge"
        )));
    }
    // Interface names have at most 15 bytes.
    let stem: String = vm.chars().filter(char::is_ascii_alphanumeric).take(6).collect();
    let tap =
        format!("w{stem}-{:06x}", random::number().map_err(|error| failed(error.to_string()))? & 0xff_ffff);
    ip(&["tuntap", "add", "dev", &tap, "mode", "tap"]).map_err(failed)?;
    let up = ip(&["link", "set", "dev", &tap, "master", bridge])
        .and_then(|()| ip(&["link", "set", "dev", &tap, "up"]));
    if let Err(why) = up {
        remove(&tap);
        return Err(failed(why));
    }
    Ok(tap)
}

/// Takes a TAP away; harmless when it is gone.
pub fn remove(tap: &str) {
    if let Err(error) = try_to_remove(tap) {
        tracing::debug!(tap, %error, "the TAP cannot be removed yet");
        let tap = tap.to_owned();
        // Without a descriptor left, for example: that passes.
        thread::spawn(move || {
            for _ in 0..ATTEMPTS {
                thread::sleep(AGAIN);
                if try_to_remove(&tap).is_ok() {
                    return;
                }
            }
            tracing::warn!(tap, "this TAP stays: ip (package iproute2) cannot be run");
        });
    }
}

/// An error: nobody could be asked.
fn try_to_remove(tap: &str) -> io::Result<()> {
    let asked = Command::new("ip").args(["link", "delete", "dev", tap]).stdin(Stdio::null()).output()?;
    if !asked.status.success() {
        tracing::debug!(tap, why = %String::from_utf8_lossy(&asked.stderr).trim(), "there is no such TAP");
    }
    Ok(())
}

/// Whether there is a bridge of this name in our network namespace. Asks `ip`: `/sys` shows the namespace that it was
/// mounted in, which need not be ours.
pub fn is_bridge(name: &str) -> bool {
    let listed =
        Command::new("ip").args(["-o", "link", "show", "type", "bridge"]).stdin(Stdio::null()).output();
    let text = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines()
        .any(|line| line.split(": ").nth(1).is_some_and(|found| found.split('@').next() == Some(name)))
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("cannot run ip (package iproute2): {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}
