//! QEMUs that are started by hand.

use super::ends::Folder;
use qemu::{OpenError, Vm, qmp::Qmp};
use serde_json::json;
use std::{
    fs::File,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A QEMU with a QMP socket, ended when dropped.
pub(crate) struct ByHand {
    pub(crate) child: Child,
    pub(crate) qmp: PathBuf,
    pub(crate) folder: Folder,
}

impl ByHand {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_with("qemu-system-x86_64".into(), arguments)
    }

    pub(crate) fn start_with(qemu: PathBuf, arguments: &[&str]) -> Self {
        Self::start_by(Command::new(qemu), &[&["-accel", "tcg"], arguments].concat())
    }

    /// By a command that ends in QEMU's name, under the accelerator that the arguments say.
    pub(crate) fn start_by(mut command: Command, arguments: &[&str]) -> Self {
        let folder = Folder::new();
        let qmp = folder.path().join("qmp");
        let child = command
            .args(["-display", "none"])
            .args(arguments)
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", qmp.display()))
            .stdin(Stdio::null())
            .stderr(File::create(folder.path().join("stderr")).unwrap())
            .spawn()
            .unwrap();
        // From here on it ends with us, whatever happens.
        let mut hand = Self { child, qmp, folder };
        let end = Instant::now() + Duration::from_secs(60);
        // A socket that is there may not be listened to yet.
        while UnixStream::connect(&hand.qmp).is_err() {
            assert!(hand.child.try_wait().unwrap().is_none() && Instant::now() < end, "QEMU does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        // Greeted only once QEMU is ready.
        drop(Qmp::connect_within(&hand.qmp, Duration::from_secs(60)).unwrap());
        hand
    }

    /// What QEMU has written to its standard error.
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default()
    }

    pub(crate) fn refusal(&self) -> Vec<String> {
        match Vm::adopt("hand", &self.qmp) {
            Err(OpenError::Refused { reasons, .. }) => reasons,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("it was adopted"),
        }
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprint!("{}", self.said());
        }
    }
}

pub(crate) const SHARED: &[&str] = &[
    "-nodefaults",
    "-machine",
    "q35,memory-backend=mem",
    "-m",
    "64M",
    "-object",
    "memory-backend-memfd,id=mem,size=64M,share=on",
];

/// The words of a command line.
pub(crate) fn line(words: &str) -> Vec<&str> {
    words.split_whitespace().collect()
}

pub(crate) fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SHARED.iter().chain(more).copied().collect()
}

pub(crate) fn has(reasons: &[String], what: &str) {
    assert!(reasons.iter().any(|reason| reason.contains(what)), "no {what:?} in {reasons:#?}");
}

/// Returns once QEMU has answered what it was asked as it was stopped: it reads these questions, which are
/// longer, beside those.
pub(crate) fn after_its_answers(others: &mut Qmp) {
    for _ in 0..40 {
        others.execute("query-status", json!({})).unwrap();
    }
}
