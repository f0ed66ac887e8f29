//! The TPM of a VM on this host: a swtpm of its own, which ends with its QEMU.
//!
//! The two are joined by a pair of sockets that nobody else can have: whichever ends, the other hears it, and
//! swtpm then ends, too (`--terminate`). A VM that arrives has its TPM's state in its device state; swtpm
//! writes what outlives a power cycle to its directory as soon as QEMU hands it over.

use crate::{
    account::Account,
    confine::view::View,
    host::{Host, in_path},
    recipe::{Tpm, TpmVersion},
};
use std::{
    fs,
    fs::{DirBuilder, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, fchown},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};
use sys::rights::{self, Rights};

/// The program, or why it cannot be had.
pub(crate) fn program() -> Result<PathBuf, String> {
    in_path("swtpm").ok_or_else(|| {
        "the VM has a TPM, and swtpm is not in PATH here; install the package swtpm".to_owned()
    })
}

/// Where the TPM of the QEMU of this tag has its state.
pub(crate) fn folder(host: &Host, tagged: &str) -> PathBuf {
    let above = if host.owner.as_os_str().is_empty() { &host.runtime } else { &host.owner };
    above.join("tpm").join(tagged)
}

/// Makes that directory, for this user.
pub(crate) fn make(folder: &Path, account: &Account) -> io::Result<()> {
    let above = folder.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o700).create(above)?;
    DirBuilder::new().mode(0o700).create(folder)?;
    match account.ids() {
        Some(ids) => fchown(File::open(folder)?, Some(ids.user), Some(ids.group)),
        None => Ok(()),
    }
}

/// Takes away the state of a TPM that lives elsewhere now, or never did here.
pub(crate) fn forget(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %folder.display(), %error, "could not be removed");
    }
}

/// Keeps the state of a TPM whose VM has ended here, under the VM's name: there is no other, and whoever
/// starts the VM anew needs it.
pub(crate) fn keep(folder: &Path, vm: &str) {
    let kept = folder.with_file_name(vm);
    if !folder.is_dir() {
        return;
    }
    forget(&kept);
    match fs::rename(folder, &kept) {
        Ok(()) => tracing::info!(vm, path = %kept.display(), "the state of its TPM is kept"),
        Err(error) => tracing::warn!(vm, path = %folder.display(), %error, "the state of its TPM stays here"),
    }
}

/// A channel: swtpm's end, and QEMU's.
pub(crate) fn channel() -> io::Result<(OwnedFd, OwnedFd)> {
    let (swtpm, qemu) = UnixStream::pair()?;
    Ok((swtpm.into(), qemu.into()))
}

/// What is started.
pub(crate) struct Start<'a> {
    pub(crate) program: &'a Path,
    pub(crate) tpm: &'a Tpm,
    pub(crate) account: &'a Account,
    pub(crate) folder: &'a Path,
    /// What is the agent's: it sees nothing of that.
    pub(crate) agents: Vec<PathBuf>,
    /// What it prints.
    pub(crate) log: File,
}

impl Start<'_> {
    /// Starts it at this end of a channel. It sees of the host what QEMU does, and its own directory.
    pub(crate) fn spawn(self, end: OwnedFd) -> Result<Child, String> {
        let failed = |what: &str, error: io::Error| format!("its TPM: {what}: {error}");
        let again = self.log.try_clone().map_err(|error| failed("duplicate a descriptor", error))?;
        let mut command = Command::new(self.program);
        command.arg("socket").args((self.tpm.version == TpmVersion::V2).then_some("--tpm2"));
        command.arg("--tpmstate").arg(format!("dir={}", self.folder.display()));
        command.arg("--ctrl").arg(format!("type=unixio,clientfd={}", end.as_raw_fd())).arg("--terminate");
        command.current_dir("/").stdin(Stdio::null()).stdout(self.log).stderr(again);
        let user = self.account.ids();
        let without = if user.is_some() { u64::MAX } else { 0 };
        let rights = Rights {
            user,
            without,
            apart: user.is_some(),
            io_uring: false,
            modes: true,
            inherits: vec![end],
        };
        rights::give(&mut command, rights);
        let view = user.map(|user| View {
            user,
            name: self.account.name(),
            agents: self.agents,
            shown: vec![(self.folder.to_owned(), true)],
            pins: Vec::new(),
            devices: Vec::new(),
            terminals: false,
        });
        // A view of its own is a thread's, and its children's.
        thread::scope(|scope| {
            let begin = || {
                view.as_ref().map_or(Ok(()), View::enter)?;
                command.spawn().map_err(|error| failed("run swtpm", error))
            };
            let thread = thread::Builder::new().name("tpm".into()).spawn_scoped(scope, begin);
            let thread = thread.map_err(|error| failed("start a thread", error))?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}
