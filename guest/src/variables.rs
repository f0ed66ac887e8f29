//! Variables of UEFI firmware, which outlive a reboot.

use crate::setup;
use rustix::mount::{MountFlags, mount};
use std::{ffi::CStr, fs, path::PathBuf};

/// Where Linux shows them.
const PLACE: &str = "/sys/firmware/efi/efivars";

/// Whose they are.
const VENDOR: &str = "5d0c1d3e-6a55-4d5f-9d52-6e1a40b7a3c1";

/// Kept in flash, and there for the firmware and for the system that it has started.
const ATTRIBUTES: u32 = 7;

/// Makes a new one.
pub(crate) fn keep(name: &str, value: &str) -> Result<(), String> {
    let path = place(name)?;
    let bytes = [&ATTRIBUTES.to_le_bytes(), value.as_bytes()].concat();
    fs::write(&path, bytes).map_err(|e| format!("{}: {e}", path.display()))
}

/// What is in it.
pub(crate) fn kept(name: &str) -> Result<String, String> {
    let path = place(name)?;
    let bytes = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let value = bytes.get(size_of_val(&ATTRIBUTES)..).unwrap_or_default();
    Ok(String::from_utf8_lossy(value).into_owned())
}

fn place(name: &str) -> Result<PathBuf, String> {
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric()) {
        return Err("a variable has a name of letters".to_owned());
    }
    setup::load("variables")?;
    match mount("efivarfs", PLACE, "efivarfs", MountFlags::empty(), None::<&CStr>) {
        Ok(()) | Err(rustix::io::Errno::BUSY) => {}
        Err(e) => return Err(format!("mounting efivarfs on {PLACE}: {e}; has the machine UEFI firmware?")),
    }
    Ok(PathBuf::from(PLACE).join(format!("{name}-{VENDOR}")))
}
