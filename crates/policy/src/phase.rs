use serde::{Deserialize, Serialize};

/// Where a migration stands. The words are the same in the display, the logs and `--json`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Both sides look whether it can work; the target starts an empty QEMU.
    Preflight,
    /// Rounds over the memory of the running guest.
    PreCopy,
    /// The guest is stopped.
    Switchover,
    /// The guest runs on the target and still lacks pages.
    PostCopy,
    /// It is over.
    Done,
}
