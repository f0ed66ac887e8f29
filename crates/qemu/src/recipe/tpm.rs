//! A VM's TPM, which is another program beside QEMU (swtpm). What it holds is in the VM's device state.

use super::allow::{RESERVED, is_id};
use serde::{Deserialize, Serialize};

/// The TPM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tpm {
    /// The id of its `-tpmdev`, which a `-device` refers to.
    pub id: String,
    /// Of which kind it is.
    pub version: TpmVersion,
}

/// The specification that a TPM follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum TpmVersion {
    /// TPM 1.2.
    #[serde(rename = "1.2")]
    V1,
    /// TPM 2.0.
    #[serde(rename = "2.0")]
    V2,
}

/// The id of the character device by which QEMU reaches it.
const CHANNEL: &str = "whimbrel-tpm";

impl Tpm {
    /// What is wrong with it.
    pub(super) fn check(&self) -> Option<String> {
        let usable = is_id(&self.id) && !self.id.starts_with(RESERVED);
        (!usable).then(|| format!("the id {:?} of a TPM is not usable", super::check::shown(&self.id)))
    }

    /// Its options for QEMU, which inherits this descriptor.
    pub(super) fn argv(&self, channel: i32) -> [String; 4] {
        let id = &self.id;
        [
            "-chardev".to_owned(),
            format!("socket,id={CHANNEL},fd={channel}"),
            "-tpmdev".to_owned(),
            format!("emulator,id={id},chardev={CHANNEL}"),
        ]
    }
}
