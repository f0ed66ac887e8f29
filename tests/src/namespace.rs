//! A network namespace: all that makes a host of the laboratory.

use crate::{Doing, Error, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::{
    ffi::OsStr,
    fs::File,
    os::fd::AsFd,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    thread,
};

/// A named network namespace. Cheap to clone; the laboratory's reaper removes it.
#[derive(Clone, Debug)]
pub struct Namespace(Arc<str>);

impl Namespace {
    pub(crate) fn create(name: String) -> Result<Self> {
        run(Command::new("ip").args(["netns", "add", &name]))?;
        run(Command::new("ip").args(["-n", &name, "link", "set", "lo", "up"]))?;
        Ok(Self(name.into()))
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// A command that will run inside. Its process id is that of the program itself (`ip netns exec` replaces
    /// itself), and `/sys` shows the namespace's interfaces. Mounts made later outside may be invisible to
    /// it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.name()]).arg(program);
        command
    }

    /// Moves the calling thread inside, for good. Sockets that it makes from now on belong to the namespace.
    pub fn move_in(&self) -> Result<()> {
        let path = PathBuf::from("/run/netns").join(self.name());
        let file = File::open(&path).doing(format!("open {}", path.display()))?;
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .doing(format!("enter {}", path.display()))
    }

    /// Does `what` inside, on a thread of its own.
    pub fn inside<T: Send>(&self, what: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| self.move_in().and_then(|()| what()));
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs `ip` inside, with the arguments as on the command line. Returns what it says.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        run(Command::new("ip").args(["-n", self.name()]).args(arguments.split_whitespace()))
    }

    /// Runs `tc` inside, with the arguments as on the command line.
    pub fn tc(&self, arguments: &str) -> Result<String> {
        run(Command::new("tc").args(["-n", self.name()]).args(arguments.split_whitespace()))
    }
}

/// Runs a command to its end and returns what it wrote. Whatever it complains of is in the error.
pub fn run(command: &mut Command) -> Result<String> {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let output = command.stdin(Stdio::null()).output().doing(words.join(" "))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Error::new(words.join(" "), format!("{}: {}", output.status, said.trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
