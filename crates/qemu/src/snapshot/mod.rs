//! What others can change of a VM through its monitors, as it is at one moment: a migration takes it when it
//! begins, and again later, and ends if both differ.
//!
//! It lists what counts. What changes by itself is left out: statistics, allocated sizes, the progress of
//! jobs, who is connected.

/// QEMU's own migration.
pub(crate) mod own;
mod round; // asked in one go

pub(crate) use round::{Depth, WITHIN, drive_name};

use std::collections::BTreeMap;

/// What a thing is. Things of a kind have a name; what is said of one is its value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Setting {
    /// QEMU's own migration: `status`.
    Migration,
    /// What QEMU itself objects to a migration: each reason.
    Blocker,
    /// A job, with its type.
    Job,
    /// An export of a node to others, with its type and node.
    Export,
    /// A device that a user added, with its type.
    Device,
    /// An object of `-object` or `object-add`, with its type.
    Object,
    /// A group of block nodes that share limits, with these.
    ThrottleGroup,
    /// What is set of an object while it works, with its value.
    Property,
    /// A memory backend, with its size.
    Memory,
    /// A memory device, with its size.
    MemoryDevice,
    /// A vCPU.
    Cpu,
    /// A network back end or card, with its type.
    Network,
    /// A character device.
    Chardev,
    /// A drive of a device, with its medium and its limits.
    Drive,
    /// A block node, with its driver, file, size and bitmaps.
    Node,
    /// A connection of the block graph: who leads to which node.
    Edge,
}

/// How a difference of this kind is told: the noun, what is said of one that is new and of one that is gone,
/// and what to do.
struct Words(&'static str, &'static str, &'static str, &'static str);

const AGAIN: &str = "migrate again when that is done";

impl Setting {
    fn words(self) -> Words {
        match self {
            Self::Migration => Words("QEMU's own migration", "was begun", "was forgotten", AGAIN),
            Self::Blocker => Words("QEMU itself objects to a migration:", "", "is no reason any more", AGAIN),
            Self::Device => Words("device", "was plugged in", "was unplugged", AGAIN),
            Self::Object => Words("object", "was added", "was removed", AGAIN),
            Self::ThrottleGroup => Words("throttle group", "was added", "was removed", AGAIN),
            Self::Property => Words("property", "is there now", "is no more", AGAIN),
            Self::Memory => Words("memory backend", "was added", "was removed", AGAIN),
            Self::MemoryDevice => Words("memory device", "was plugged in", "was unplugged", AGAIN),
            Self::Cpu => Words("vCPU", "was plugged in", "was unplugged", AGAIN),
            Self::Network => Words("network", "was added", "was removed", AGAIN),
            Self::Chardev => Words("character device", "was added", "was removed", AGAIN),
            Self::Drive => Words("drive", "was added", "was removed", AGAIN),
            Self::Node => Words("block node", "was added", "was removed", AGAIN),
            Self::Edge => Words("block graph:", "was connected", "was disconnected", AGAIN),
            Self::Job => Words(
                "job",
                "was started",
                "ended",
                "wait for its end, or cancel it (job-cancel), and migrate again",
            ),
            Self::Export => {
                Words("export", "was added", "was removed", "remove it (block-export-del), and migrate again")
            }
        }
    }
}

/// A VM's configuration at one moment. A kind that was not asked for, or that this QEMU does not know, is not
/// there.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Snapshot {
    /// QEMU's word for what it does, such as `running`.
    pub(crate) run_state: String,
    pub(crate) kinds: BTreeMap<Setting, BTreeMap<String, String>>,
}

impl Snapshot {
    /// How `now` differs: what was changed, and what to do about it. Only kinds that both have are compared.
    /// What changes in the block graph on account of something else is not told.
    pub(crate) fn differences(&self, now: &Self) -> Vec<String> {
        let mut told: Vec<String> = now.taken_elsewhere().into_iter().collect();
        for (kind, before) in &self.kinds {
            if matches!(kind, Setting::Node | Setting::Edge) && !told.is_empty() {
                break;
            }
            let Some(after) = now.kinds.get(kind) else { continue };
            let Words(noun, new, gone, mend) = kind.words();
            let said = |value: &str| if value.is_empty() { String::new() } else { format!(" ({value})") };
            for (name, value) in after {
                match before.get(name) {
                    Some(old) if old == value => {}
                    Some(old) => told.push(format!("{noun} {name} is {value}, and was {old}; {mend}")),
                    None => told.push(format!("{noun} {name}{} {new}; {mend}", said(value))),
                }
            }
            for (name, value) in before.iter().filter(|(name, _)| !after.contains_key(*name)) {
                told.push(format!("{noun} {name}{} {gone}; {mend}", said(value)));
            }
        }
        told
    }

    /// Why a migration cannot begin now, whatever the VM consists of, and what to do about it.
    pub(crate) fn hindrances(&self) -> Vec<String> {
        let mut reasons: Vec<String> = self.taken_elsewhere().into_iter().collect();
        let migration = self.migration();
        if reasons.is_empty() && !own::is_over(migration) {
            reasons.push(format!(
                "QEMU's own migration of it is under way (it is {migration}); wait for its end, or cancel it \
                 (migrate_cancel)"
            ));
        }
        let of = |kind| self.kinds.get(&kind).into_iter().flatten();
        for (job, what) in of(Setting::Job) {
            reasons.push(format!(
                "job {job} ({what}) runs and would be lost; wait for its end, or cancel it (job-cancel {job})"
            ));
        }
        for (export, what) in of(Setting::Export) {
            reasons.push(format!(
                "export {export} ({what}) would end; let its users finish, and remove it (block-export-del \
                 {export})"
            ));
        }
        reasons
    }

    /// QEMU's word for its own migration.
    pub(crate) fn migration(&self) -> &str {
        let kind = self.kinds.get(&Setting::Migration);
        kind.and_then(|kind| kind.get("status")).map_or("none", String::as_str)
    }

    fn taken_elsewhere(&self) -> Option<String> {
        own::elsewhere(&self.run_state, self.migration()).map(str::to_owned)
    }
}

#[cfg(test)]
mod tests;
