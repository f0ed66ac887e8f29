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
    /// Which of these it was: without them the refusal is a fault.
    pub done: &'static [Deed],
    /// What undoes it: thereafter the refusal is a fault.
    pub undone: &'static [Deed],
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
    Listed {
        section: "query-memory-devices",
        line: ".data.hotplugged = ",
        what: "memory that was plugged in is there from the start",
    },
    Listed {
        section: "info qtree",
        line: " port = ",
        what: "the port of a USB device that was plugged in is said, where QEMU had chosen it",
    },
    Listed {
        section: "info network",
        line: "hub 1",
        what: "a hub of QEMU's own that has lost its last port is gone",
    },
];

/// What ends a migration.
pub const REFUSALS: &[Refusal] = &[
    Refusal {
        after: "the guest has gone to sleep",
        done: &[Deed::Sleep],
        undone: &[Deed::Wake, Deed::Reset],
        says: "it is in state suspended",
    },
    Refusal {
        after: "it was reset while it was paused",
        done: &[Deed::Reset],
        undone: &[Deed::Resume],
        says: "it is in state prelaunch",
    },
    Refusal {
        after: "the guest has switched itself off",
        done: &[Deed::PowerOff],
        undone: &[],
        says: "it is in state shutdown",
    },
    Refusal {
        after: "the guest has panicked",
        done: &[Deed::Panic],
        undone: &[],
        says: "it is in state guest-panicked",
    },
    Refusal {
        after: "QEMU has migrated the VM itself",
        done: &[Deed::Migrate],
        undone: &[],
        says: "it is in state postmigrate",
    },
    Refusal {
        after: "a mirror began",
        done: &[Deed::Mirror],
        undone: &[Deed::CancelJobs],
        says: "job job0 (mirror) runs and would be lost",
    },
    Refusal {
        after: "a backup began",
        done: &[Deed::Backup],
        undone: &[Deed::CancelJobs],
        says: "job job0 (backup) runs and would be lost",
    },
    Refusal {
        after: "a commit began",
        done: &[Deed::Commit],
        undone: &[Deed::CancelJobs],
        says: "job job0 (commit) runs and would be lost",
    },
    Refusal {
        after: "a network was plugged in of which QEMU does not tell the options",
        done: &[Deed::AddNetwork],
        undone: &[Deed::DropNetwork],
        says: "was added after the start, and QEMU cannot be asked for its options",
    },
    Refusal {
        after: "the VM was changed in the middle of it",
        done: &[],
        undone: &[],
        says: "the VM was changed while it was moved",
    },
    Refusal {
        after: "the VM was changed just before its device state was saved",
        done: &[],
        undone: &[],
        says: "the VM was changed meanwhile: ",
    },
    Refusal {
        after: "QEMU began to migrate the VM itself just before it was stopped",
        done: &[Deed::Migrate],
        undone: &[],
        says: "QEMU's own migration of it is under way",
    },
    Refusal {
        after: "memory was plugged in just when the move began",
        done: &[Deed::PlugMemory],
        undone: &[],
        says: "some was plugged in or unplugged just now",
    },
    Refusal {
        after: "a vCPU was plugged in just before the device state was saved",
        done: &[Deed::PlugCpu],
        undone: &[],
        says: "Unknown savevm section or instance 'cpu_common'",
    },
    Refusal {
        after: "it was reset in the pause",
        done: &[Deed::Reset],
        undone: &[],
        says: "the guest was reset",
    },
    Refusal {
        after: "it was continued in the pause",
        done: &[Deed::Resume],
        undone: &[],
        says: "somebody let the guest run on",
    },
    Refusal {
        after: "the power button was pressed in the pause",
        done: &[Deed::PowerButton],
        undone: &[],
        says: "somebody asked the guest to power off",
    },
];

/// What QEMU takes from others between our last look and the saving, about a millisecond, stays behind with
/// it. No random sequence does these in our pause; `./dev storm --meddle` does.
pub const OPEN_IN_PAUSE: &[Deed] = &[
    Deed::Plug,
    Deed::Unplug,
    Deed::Eject,
    Deed::Insert,
    Deed::Throttle,
    Deed::Unthrottle,
    Deed::LinkDown,
    Deed::LinkUp,
    Deed::Snapshot,
    Deed::Commit,
    Deed::Grow,
    Deed::Mirror,
    Deed::Backup,
    Deed::CancelJobs,
    Deed::AddNode,
    Deed::DropNode,
    Deed::AddObject,
    Deed::DropObject,
    Deed::AddChardev,
    Deed::DropChardev,
    Deed::AddNetwork,
    Deed::DropNetwork,
    Deed::PlugMemory,
    Deed::PlugCpu,
    Deed::Migrate,
];

impl Refusal {
    /// Whether it is one, and nothing was done that makes it a fault.
    pub fn covers(&self, error: &str, done: &[Deed]) -> bool {
        let last = |of: &[Deed]| done.iter().rposition(|deed| of.contains(deed));
        let still = self.done.is_empty() || last(self.done) > last(self.undone);
        still && error.contains(self.says)
    }
}

impl Listed {
    /// Whether this is it.
    pub fn covers(&self, difference: &Difference) -> bool {
        let lines = [&difference.stayed, &difference.moved];
        self.section == difference.section && lines.into_iter().flatten().all(|line| line.contains(self.line))
    }
}
