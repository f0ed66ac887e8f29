//! What is recorded, as it is written: JSON, so that a person can read it and a later version can add to it.

use ports::{OwnershipRecord, RunState};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use units::{Epoch, MigrationId};

/// A process, told apart from a later one that was given the same number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since boot: field 22 of `/proc/PID/stat`.
    pub start_time: u64,
}

/// How a VM came to this host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// `whimbrel run` started it.
    Run,
    /// Something else started it, `whimbrel adopt` took charge.
    Adopted,
    /// A migration brought it.
    Migrated,
}

/// Whether the VM is this host's.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Standing {
    /// It belongs here.
    Here,
    /// Its memory is coming in; the source owns it still.
    Arriving {
        /// In which migration.
        #[serde(with = "id")]
        migration: MigrationId,
        /// From which host.
        from: String,
    },
}

/// A VM of this host.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VmRecord {
    /// Its name, unique on this host.
    pub name: String,
    /// All that a target needs to start the same VM.
    pub recipe: serde_json::Value,
    /// Its QEMU; `None` while that is being started.
    pub process: Option<Process>,
    /// QEMU's QMP socket; empty while it is being started.
    pub qmp: PathBuf,
    /// What exists on this host only for its QEMU, and goes with it.
    #[serde(default)]
    pub belongings: serde_json::Value,
    /// How it came here.
    pub origin: Origin,
    /// Whether it is this host's.
    pub standing: Standing,
}

/// How far a migration away from this host has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum DepartureState {
    /// The pause is ours: the guest may be resumed.
    Pausing,
    /// Only the ownership record decides who runs the guest: it is claimed at this epoch.
    Fenced {
        /// The epoch before the migration.
        #[serde(with = "epoch")]
        expected: Epoch,
    },
    /// The target owns the VM; the memory here is kept until the target has all of it.
    Gone {
        /// The epoch at which the target owns it.
        #[serde(with = "epoch")]
        epoch: Epoch,
    },
}

/// The source's journal of one VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DepartureRecord {
    /// Which migration.
    #[serde(with = "id")]
    pub migration: MigrationId,
    /// The target's name.
    pub to: String,
    /// The target's address, `host:port`, as it was when the migration began.
    pub address: String,
    /// Which ownership record decides it, by its identity; empty: the target's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub record: String,
    /// What the guest did before it was stopped: what it does again if it goes on here.
    #[serde(default)]
    pub before: RunState,
    /// Where its memory lies, in the hypervisor's words: from the fence on its process stands still, and
    /// cannot be asked.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub memory: serde_json::Value,
    /// How far it has come.
    #[serde(flatten)]
    pub state: DepartureState,
}

/// The target's journal of one VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ArrivalRecord {
    /// Which migration.
    #[serde(with = "id")]
    pub migration: MigrationId,
    /// The source's name.
    pub from: String,
    /// Whether this host has claimed the VM: from then on it is never given back.
    pub claimed: bool,
    /// Whether a missing set is kept with it.
    pub incomplete: bool,
    /// Whether a shared record may already say that this host owns it: only that record decides.
    #[serde(default)]
    pub claiming: bool,
    /// What the guest does once it is here.
    #[serde(default)]
    pub goes_on: RunState,
    /// Whether it did so already: what it does since then is the business of its users.
    #[serde(default)]
    pub went_on: bool,
}

/// An ownership record as it is written.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Owner {
    pub(super) owner: String,
    #[serde(with = "epoch")]
    pub(super) epoch: Epoch,
    #[serde(with = "maybe_id")]
    pub(super) migration: Option<MigrationId>,
}

impl From<&OwnershipRecord> for Owner {
    fn from(record: &OwnershipRecord) -> Self {
        Self { owner: record.owner.clone(), epoch: record.epoch, migration: record.migration }
    }
}

impl From<Owner> for OwnershipRecord {
    fn from(owner: Owner) -> Self {
        Self { owner: owner.owner, epoch: owner.epoch, migration: owner.migration }
    }
}

/// `units` knows no serde: epochs are numbers.
pub(super) mod epoch {
    use serde::{Deserialize, Deserializer, Serializer};
    use units::Epoch;

    pub(in crate::store) fn serialize<S: Serializer>(epoch: &Epoch, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(epoch.0)
    }

    pub(in crate::store) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Epoch, D::Error> {
        u64::deserialize(from).map(Epoch)
    }
}

/// Migration ids are 32 hexadecimal digits: JSON numbers do not hold 128 bits.
pub(super) mod id {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use units::MigrationId;

    pub(in crate::store) fn serialize<S: Serializer>(id: &MigrationId, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(id)
    }

    pub(in crate::store) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<MigrationId, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// The same for an id that may be absent.
mod maybe_id {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
    use units::MigrationId;

    pub(super) fn serialize<S: Serializer>(id: &Option<MigrationId>, to: S) -> Result<S::Ok, S::Error> {
        id.map(|id| id.to_string()).serialize(to)
    }

    pub(super) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Option<MigrationId>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| text.parse().map_err(D::Error::custom)).transpose()
    }
}
