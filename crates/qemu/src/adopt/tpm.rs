//! Which TPM a QEMU has.

use super::cmdline::Read;
use crate::{
    qmp::{Qmp, QmpError},
    recipe::TpmVersion,
};
use serde_json::json;

/// Of which kind its TPM is: asked of the registers that it shows the guest, whose reading changes nothing
/// (TCG's PC Client Platform TPM Profile: the interface's version, in its capabilities; the other interface
/// is 2.0's alone).
pub(super) fn look(qmp: &mut Qmp, read: &mut Read, reasons: &mut Vec<String>) -> Result<(), QmpError> {
    const CAPABILITIES: u64 = 0xfed4_0014;
    let Some(tpm) = &mut read.recipe.tpm else { return Ok(()) };
    let models = qmp.execute("query-tpm", json!({}))?;
    let model = models.as_array().into_iter().flatten().find(|model| model["id"] == tpm.id.as_str());
    match model.and_then(|model| model["model"].as_str()) {
        Some("tpm-crb") => tpm.version = TpmVersion::V2,
        Some("tpm-tis") => {
            let said = qmp.human(&format!("xp /1wx {CAPABILITIES:#x}"))?;
            let word = said.trim().rsplit_once("0x").and_then(|(_, hex)| u32::from_str_radix(hex, 16).ok());
            match word.map(|word| word >> 28 & 7) {
                Some(3) => tpm.version = TpmVersion::V2,
                Some(0 | 2) => tpm.version = TpmVersion::V1,
                _ => reasons.push(format!("TPM {}: QEMU does not tell of which version it is", tpm.id)),
            }
        }
        // No device uses it.
        _ => read.recipe.tpm = None,
    }
    Ok(())
}
