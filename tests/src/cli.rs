//! The command line of the program under test.

use crate::{Doing, Error, Result};
use serde_json::Value;
use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Runs `whimbrel` commands.
#[derive(Clone, Debug)]
pub struct Cli {
    program: PathBuf,
    socket: Option<PathBuf>,
}

/// How a command ended.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The command, for error messages.
    pub command: String,
    /// Its exit status; −1 where a signal ended it.
    pub status: i32,
    /// What it wrote to its standard output.
    pub stdout: String,
    /// What it wrote to its standard error.
    pub stderr: String,
}

impl Cli {
    /// Commands to the agent behind `socket`.
    pub fn new(program: &Path, socket: Option<PathBuf>) -> Self {
        Self { program: program.to_owned(), socket }
    }

    /// A command, not yet started.
    pub fn command(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(socket) = &self.socket {
            command.arg("--socket").arg(socket);
        }
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end, whatever that is.
    pub fn run(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Answer> {
        let mut command = self.command(arguments);
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        let name = format!("whimbrel {}", words.join(" "));
        let output = command.output().doing(&name)?;
        Ok(Answer {
            command: name,
            status: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs a command with `--json` that must succeed, and returns the last line that it printed, understood.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        self.run(arguments.iter().chain(&["--json"]))?.succeeded()?.json()
    }
}

impl Answer {
    /// An error unless the exit status is 0.
    pub fn succeeded(self) -> Result<Self> {
        self.exited(0)
    }

    /// An error unless the exit status is this one.
    pub fn exited(self, status: i32) -> Result<Self> {
        if self.status == status {
            return Ok(self);
        }
        let words = format!("exit status {}, not {status}\n{}{}", self.status, self.stdout, self.stderr);
        Err(Error::new(self.command, words))
    }

    /// An error unless it says each of these (in whatever case, on whichever output).
    pub fn says(self, words: &[&str]) -> Result<Self> {
        let said = format!("{}{}", self.stdout, self.stderr);
        let lower = said.to_lowercase();
        match words.iter().find(|word| !lower.contains(&word.to_lowercase())) {
            None => Ok(self),
            Some(word) => Err(Error::new(self.command, format!("says nothing of {word:?}, but:\n{said}"))),
        }
    }

    /// Its output as one JSON value, or the last of its lines that is one.
    pub fn json(&self) -> Result<Value> {
        let whole = serde_json::from_str(&self.stdout).ok();
        let last = || self.stdout.lines().rev().find_map(|line| serde_json::from_str(line).ok());
        whole.or_else(last).doing(format!("find JSON in the output of {}: {}", self.command, self.stdout))
    }
}
