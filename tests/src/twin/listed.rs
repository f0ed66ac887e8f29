//! What a migration changes and what it refuses: all of it is here, or it is a fault. docs/compatibility.md
//! is made from these tables.

use super::{action::Deed, look::Difference};

/// A difference that is announced.
#[derive(Debug)]
pub struct Listed {
    /// Which answer of QEMU's shows it.
    pub section: &'static str,
    /// What is in every such line.
    pub line: &'static str,
    /// What that is, for people.
    pub what: &'static str,
}

/// A refusal that leaves the VM where and as it was.
#[derive(Debug)]
pub struct Refusal {
    /// What was done before.
    pub after: &'static str,
    /// What the error says.
    pub says: &'static str,
}

/// What is different on the target.
pub const DIFFERENCES: &[Listed] = &[
    Listed { section: "query-cpus-fast", line: ".thread-id", what: "vCPUs are threads of another process" },
    Listed {
        section: "info qtree",
        line: " cyls = ",
        what: "the number of cylinders of a disk that was resized is what it would be after a restart",
    },
    Listed {
        section: "query-block",
        line: ".inserted.cache.writeback = ",
        what: "of a paused guest's disk QEMU says only once it runs whether the guest has a write cache",
    },
];

/// What ends a migration.
pub const REFUSALS: &[Refusal] = &[
    Refusal { after: "the guest has gone to sleep", says: "it is in state suspended" },
    Refusal { after: "the guest has switched itself off", says: "it is in state shutdown" },
    Refusal { after: "the guest has panicked", says: "it is in state guest-panicked" },
    Refusal { after: "QEMU has migrated the VM itself", says: "it is in state postmigrate" },
    Refusal {
        after: "the VM was changed in the middle of it",
        says: "the VM was changed while it was moved",
    },
    Refusal {
        after: "the power button was pressed in the pause",
        says: "somebody asked the guest to power off",
    },
];

/// What a migration does not carry over yet, and does not refuse either: no sequence has it.
pub const OPEN: &[Deed] = &[
    Deed::Pause,
    Deed::Resume,
    Deed::Reset,
    Deed::Reboot,
    Deed::Sleep,
    Deed::Wake,
    Deed::Panic,
    Deed::PowerOff,
    Deed::Plug,
    Deed::Unplug,
    Deed::Eject,
    Deed::Insert,
    Deed::Throttle,
    Deed::Unthrottle,
    Deed::Grow,
    Deed::Snapshot,
    Deed::Commit,
    Deed::Mirror,
    Deed::Backup,
    Deed::CancelJobs,
    Deed::AddNode,
    Deed::AddObject,
    Deed::PlugMemory,
    Deed::PlugCpu,
    Deed::Migrate,
    Deed::Quit,
];

impl Listed {
    /// Whether this is it.
    pub fn covers(&self, difference: &Difference) -> bool {
        let lines = [&difference.stayed, &difference.moved];
        self.section == difference.section && lines.into_iter().flatten().all(|line| line.contains(self.line))
    }
}
