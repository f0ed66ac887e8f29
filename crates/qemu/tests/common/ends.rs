//! What ends with its test, also when that panics.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Child,
};
use tempfile::TempDir;

/// A directory of a test. Whatever was started with a file in it ends with it: a VM's handle leaves its QEMU
/// running when it is dropped.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let ours = std::process::id().cast_signed();
        for pid in pids.filter(|pid| *pid != ours).filter_map(Pid::from_raw) {
            // Held before it is looked at: its number cannot become another's.
            if let Ok(held) = pidfd_open(pid, PidfdFlags::empty())
                && uses(pid, self.path())
            {
                let _ = pidfd_send_signal(held, Signal::KILL);
            }
        }
    }
}

/// Whether a process was started with a name in this directory, or has a file there open.
fn uses(pid: Pid, folder: &Path) -> bool {
    let at = |name: &str| PathBuf::from(format!("/proc/{}/{name}", pid.as_raw_nonzero()));
    let words = fs::read(at("cmdline")).unwrap_or_default();
    if String::from_utf8_lossy(&words).contains(&*folder.to_string_lossy()) {
        return true;
    }
    let files = fs::read_dir(at("fd")).into_iter().flatten().flatten();
    files.filter_map(|file| fs::read_link(file.path()).ok()).any(|file| file.starts_with(folder))
}

/// A process of a test.
pub(crate) struct Ended(pub(crate) Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
