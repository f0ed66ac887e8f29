//! What goes over the API. Events and reports of migrations are those of `api`, refusals its
//! `Failure`.

use crate::store::Origin;
use api::Phase;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// `GET /v1/host`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostInfo {
    /// Its name.
    pub name: String,
    /// The agent's version.
    pub version: String,
    /// The agent's process.
    pub pid: u32,
    /// Where other agents find it.
    pub listen: String,
    /// Where the store is.
    pub state_dir: PathBuf,
    /// Where the sockets are.
    pub runtime_dir: PathBuf,
    /// The QEMU binary.
    pub qemu: PathBuf,
    /// The hosts that it knows by name.
    pub peers: Vec<PeerInfo>,
}

/// Another host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeerInfo {
    /// Its name.
    pub name: String,
    /// Where its agent listens.
    pub address: String,
}

/// What a VM is doing, in one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// Its guest runs here.
    Running,
    /// Its guest is here and does not run.
    Paused,
    /// It is here and something is being done with it: it is being started, stopped or migrated.
    Busy,
    /// A migration from here is running.
    Migrating,
    /// It is on its way here.
    Arriving,
    /// It runs on the target of its migration, which still needs memory from here.
    Left,
    /// Only the ownership record can say who runs it, and the record cannot be reached.
    InDoubt,
    /// Its QEMU has ended.
    Gone,
    /// Its QEMU does not answer.
    Unknown,
}

/// `GET /v1/vms/NAME`; `GET /v1/vms` is a list of these.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VmInfo {
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub state: VmState,
    /// More about that, for people.
    pub note: Option<String>,
    /// Its QEMU process.
    pub pid: Option<u32>,
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// How it came here.
    pub origin: Origin,
    /// The host that owns it, as far as this one knows.
    pub owner: Option<String>,
    /// At which epoch.
    pub epoch: Option<u64>,
    /// Its running migration.
    pub migration: Option<MigrationBrief>,
    /// What will be different on another host, in words; only in the answer to `adopt`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub different: Vec<String>,
    /// What it is made of.
    pub recipe: serde_json::Value,
    /// What its character devices and its screen end in on this host, if the agent's QEMU runs it: `id`,
    /// `kind`, `path`, the name `link` that stays the same, `log`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<serde_json::Value>,
}

/// A running migration in short.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MigrationBrief {
    /// Its id.
    pub id: String,
    /// The target.
    pub to: String,
    /// Where it stands.
    pub phase: Option<Phase>,
}

/// `POST /v1/vms`: start a VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// The VM file's text.
    pub text: String,
    /// Where it was read from: its mistakes are told by this name, relative paths in it start from its
    /// directory.
    pub path: PathBuf,
    /// A host that owned it and can never run it again, as a person says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fenced: Option<String>,
}

/// `POST /v1/vms/NAME/adopt`: take charge of a VM that something else started. `POST /v1/check`: only look at
/// it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdoptRequest {
    /// Its QMP socket.
    pub qmp: PathBuf,
}

/// The answer to a migration that was started.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Started {
    /// The migration's id.
    pub migration: String,
}

/// `POST /v1/vms/NAME/resolve`: a person says who runs a VM that is in doubt.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    /// This host, which was fenced, can never run it: it is to run here.
    pub here_fenced: String,
}
