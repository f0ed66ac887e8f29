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

/// Why a network card cannot be put on a bridge.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BridgeError {
    /// There is none of this name.
    #[error("there is no bridge {0} here; make it with: ip link add {0} type bridge")]
    Absent(String),
    /// It is not known whether there is one.
    #[error("cannot look whether there is a bridge {bridge} here: {why}")]
    Unseen {
        /// The bridge.
        bridge: String,
        /// What was in the way.
        why: String,
    },
}

/// A name for a TAP of this VM, to be written down before it is made. It is new each time, so that source and target of a
/// migration can be one host.
pub fn name(vm: &str) -> io::Result<String> {
    // Interface names have at most 15 bytes.
    let stem: String = vm.chars().filter(char::is_ascii_alphanumeric).take(6).collect();
    Ok(format!("w{stem}-{:06x}", random::number()? & 0xff_ffff))
}

/// Makes a TAP of this name on `bridge`.
pub fn create(tap: &str, bridge: &str) -> Result<(), TapError> {
    let failed = |why| TapError { bridge: bridge.to_owned(), why };
    find_bridge(bridge).map_err(|error| failed(error.to_string()))?;
    ip(&["tuntap", "add", "dev", tap, "mode", "tap"]).map_err(failed)?;
    let up = ip(&["link", "set", "dev", tap, "master", bridge])
        .and_then(|_| ip(&["link", "set", "dev", tap, "up"]));
    up.map(drop).map_err(|why| {
        remove(tap);
        failed(why)
    })
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

/// Looks for a bridge of this name in our network namespace. Asks `ip`: `/sys` shows the namespace that it was mounted in, which
/// need not be ours.
pub fn find_bridge(name: &str) -> Result<(), BridgeError> {
    is_among(name, ip(&["-o", "link", "show", "type", "bridge"]))
}

/// Whether a bridge is among those that `ip` lists.
fn is_among(name: &str, listed: Result<String, String>) -> Result<(), BridgeError> {
    let listed = listed.map_err(|why| BridgeError::Unseen { bridge: name.to_owned(), why })?;
    let named = |line: &str| line.split(": ").nth(1).and_then(|found| found.split('@').next()) == Some(name);
    if listed.lines().any(named) { Ok(()) } else { Err(BridgeError::Absent(name.to_owned())) }
}

/// What `ip` answers.
fn ip(arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("cannot run ip (package iproute2): {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bridge_that_is_not_listed_is_absent() {
        let listed = "3: br0: <BROADCAST> mtu 1500 \\ link/ether\n5: br1@if4: <BROADCAST> mtu 1500\n";
        let look = |name: &str, listed: Result<&str, &str>| {
            is_among(name, listed.map(str::to_owned).map_err(str::to_owned))
                .map_err(|error| error.to_string())
        };
        assert_eq!(look("br0", Ok(listed)), Ok(()));
        assert_eq!(look("br1", Ok(listed)), Ok(()));
        for (name, listed) in [("br", listed), ("br9", listed), ("br0", "")] {
            let why = look(name, Ok(listed)).unwrap_err();
            assert!(why.starts_with(&format!("there is no bridge {name} here; make it")), "{why}");
        }
        let why = look("br0", Err("cannot run ip: Too many open files (os error 24)")).unwrap_err();
        assert!(why.starts_with("cannot look whether there is a bridge br0 here: "), "{why}");
        assert!(why.contains("Too many open files") && !why.contains("make it"), "{why}");
    }
}
