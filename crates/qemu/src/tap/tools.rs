//! The programs of iproute2. They run in our own network namespace, which need not be the one that `/sys`
//! shows.

use serde::de::DeserializeOwned;
use std::{
    io::ErrorKind,
    process::{Command, Stdio},
};

/// What `ip` answers.
pub(super) fn ip(arguments: &[&str]) -> Result<String, String> {
    run("ip", arguments)
}

/// Runs a program of iproute2 and returns what it says.
pub(super) fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("cannot run {program} (package iproute2): {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {}: {}", arguments.join(" "), said.trim()))
}

/// The same for a program that need not be installed: without it, nobody has used it either.
pub(super) fn run_if_there(program: &str, arguments: &[&str]) -> Option<String> {
    match Command::new(program).args(arguments).stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => {
            tracing::debug!(program, said = %String::from_utf8_lossy(&output.stderr).trim(), "does not \
                                                                                              answer");
            None
        }
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => {
            tracing::debug!(program, %error, "cannot be run");
            None
        }
    }
}

/// Understands what a program says with `-json`. Nothing at all is an empty list.
pub(super) fn understand<T: DeserializeOwned>(said: &str) -> Result<Vec<T>, String> {
    if said.trim().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_str(said)
        .map_err(|error| format!("iproute2 answers something else than expected: {error}"))
}
