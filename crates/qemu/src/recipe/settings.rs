//! What monitors set of a VM at run time, as far as QEMU can be asked for it: the target's QEMU is told the
//! same before it takes the VM over.

use super::check::{is_plain_name, shown};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The limits of `block_set_io_throttle`, as QMP calls them there and in `query-block`. The first six must
/// always be said.
pub(crate) const LIMITS: &[&str] = &[
    "bps",
    "bps_rd",
    "bps_wr",
    "iops",
    "iops_rd",
    "iops_wr",
    "bps_max",
    "bps_rd_max",
    "bps_wr_max",
    "iops_max",
    "iops_rd_max",
    "iops_wr_max",
    "bps_max_length",
    "bps_rd_max_length",
    "bps_wr_max_length",
    "iops_max_length",
    "iops_rd_max_length",
    "iops_wr_max_length",
    "iops_size",
];

/// How many of [`LIMITS`] must be said.
const ALWAYS: usize = 6;

/// Something that a monitor set.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Setting {
    /// A drive's requests are limited (`block_set_io_throttle`).
    Throttle {
        /// The `id` of `-drive`; empty where the device has none.
        #[serde(default)]
        drive: String,
        /// The device, by its id or its path in QEMU's object tree.
        #[serde(default)]
        device: String,
        /// Drives of one group share their limits.
        #[serde(default)]
        group: Option<String>,
        /// Those of `LIMITS` that are not zero.
        limits: BTreeMap<String, u64>,
    },
    /// An event is wanted when more than this of a node is in use (`block-set-write-threshold`).
    WriteThreshold {
        /// The node.
        node: String,
        /// In bytes.
        bytes: u64,
    },
    /// The balloon asks its guest for statistics (`qom-set … guest-stats-polling-interval`).
    BalloonStatistics {
        /// How often: once in so many.
        seconds: u32,
    },
}

impl Setting {
    /// Whether it is well formed; says why not.
    pub(crate) fn check(&self) -> Result<(), String> {
        let (names, known) = match self {
            Self::Throttle { drive, device, group, limits } => {
                let group = group.as_deref().unwrap_or_default();
                (
                    vec![drive.as_str(), device, group],
                    limits.keys().all(|limit| LIMITS.contains(&limit.as_str())),
                )
            }
            Self::WriteThreshold { node, .. } => (vec![node.as_str()], true),
            Self::BalloonStatistics { .. } => (vec![], true),
        };
        match names.iter().find(|name| !is_plain_name(name)) {
            Some(name) => Err(format!("{:?} is no name of a drive or node", shown(name))),
            None if !known => Err("a limit of a drive is not known".to_owned()),
            None => Ok(()),
        }
    }

    /// The command that sets it; `None`: first it must be asked where the target has it.
    pub(crate) fn command(&self) -> Option<(&'static str, Value)> {
        Some(match self {
            Self::Throttle { drive, device, group, limits } => {
                let mut arguments = json!({});
                match drive.as_str() {
                    "" => arguments["id"] = json!(device),
                    drive => arguments["device"] = json!(drive),
                }
                for (n, name) in LIMITS.iter().enumerate() {
                    match limits.get(*name) {
                        Some(limit) => arguments[*name] = json!(limit),
                        None if n < ALWAYS => arguments[*name] = json!(0),
                        None => {}
                    }
                }
                if let Some(group) = group {
                    arguments["group"] = json!(group);
                }
                ("block_set_io_throttle", arguments)
            }
            Self::WriteThreshold { node, bytes } => {
                ("block-set-write-threshold", json!({ "node-name": node, "write-threshold": bytes }))
            }
            Self::BalloonStatistics { .. } => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn throttle(drive: &str, device: &str, limit: &str) -> Setting {
        let limits = BTreeMap::from([(limit.to_owned(), 7)]);
        Setting::Throttle { drive: drive.to_owned(), device: device.to_owned(), group: None, limits }
    }

    #[test]
    fn a_setting_names_a_drive_and_a_limit_that_qemu_knows() {
        let device = "/machine/peripheral/blk0/virtio-backend";
        for (setting, sound) in [
            (throttle("", device, "bps"), true),
            (throttle("disk0", "", "iops_rd_max"), true),
            (throttle("a b", "", "bps"), false),
            (throttle(&"a".repeat(256), "", "bps"), false),
            (throttle("disk0", "", "id"), false),
            (Setting::WriteThreshold { node: "d0".to_owned(), bytes: 1 }, true),
            (Setting::WriteThreshold { node: "\n".to_owned(), bytes: 1 }, false),
        ] {
            assert_eq!(setting.check().is_ok(), sound, "{setting:?}");
        }
    }

    #[test]
    fn what_was_not_limited_is_said_to_be_unlimited() {
        let (command, arguments) = throttle("", "blk0", "bps").command().unwrap();
        assert_eq!(command, "block_set_io_throttle");
        let all = json!({ "id": "blk0", "bps": 7, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0,
            "iops_wr": 0 });
        assert_eq!(arguments, all);
    }
}
