//! The smallest guest: a boot sector that does what a keyboard tells it, and is asked through its memory. Two
//! of them that were told the same have the same memory.

use crate::{Doing, Error, Qmp, Result, wait_for};
use serde_json::json;
use std::{fs, path::Path, time::Duration};

/// `guest.s`, assembled as it says.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x70, 0xea, 0x0f, 0x7c, 0x00, 0x00, 0xc7,
    0x06, 0x24, 0x00, 0x59, 0x7c, 0xc7, 0x06, 0x26, 0x00, 0x00, 0x00, 0xc7, 0x06, 0x02, 0x60, 0x00,
    0x00, 0xc7, 0x06, 0x04, 0x60, 0x00, 0x00, 0xc7, 0x06, 0x06, 0x60, 0x00, 0x00, 0xc7, 0x06, 0x08,
    0x60, 0x00, 0x00, 0xc7, 0x06, 0x0a, 0x60, 0x00, 0x00, 0xe4, 0x64, 0xa8, 0x01, 0x74, 0x04, 0xe4,
    0x60, 0xeb, 0xf6, 0xb0, 0xfd, 0xe6, 0x21, 0xb0, 0xff, 0xe6, 0xa1, 0xc7, 0x06, 0x00, 0x60, 0x68,
    0x77, 0xff, 0x06, 0x0c, 0x60, 0xfb, 0xf4, 0xeb, 0xfc, 0xe4, 0x60, 0xa8, 0x80, 0x0f, 0x85, 0xa1,
    0x00, 0x30, 0xe4, 0xa3, 0x04, 0x60, 0x3c, 0x18, 0x74, 0x78, 0x3c, 0x1f, 0x74, 0x79, 0x3c, 0x13,
    0x74, 0x7e, 0x3c, 0x19, 0x0f, 0x84, 0x80, 0x00, 0x3c, 0x2f, 0x74, 0x35, 0x3c, 0x14, 0x74, 0x55,
    0x88, 0xc3, 0xa1, 0x0a, 0x60, 0xff, 0x06, 0x0a, 0x60, 0x30, 0xe4, 0xc1, 0xe0, 0x08, 0x05, 0x00,
    0x10, 0x3d, 0x00, 0x8f, 0x72, 0x09, 0xc7, 0x06, 0x0a, 0x60, 0x00, 0x00, 0xb8, 0x00, 0x8f, 0x8e,
    0xc0, 0x31, 0xff, 0x88, 0xd8, 0x8a, 0x26, 0x0a, 0x60, 0xb9, 0x00, 0x08, 0xfc, 0xf3, 0xab, 0xeb,
    0x4d, 0x31, 0xdb, 0xb8, 0x00, 0x10, 0x8e, 0xc0, 0x31, 0xf6, 0xb9, 0x00, 0x40, 0x26, 0x03, 0x1c,
    0x83, 0xd3, 0x00, 0x46, 0x46, 0xe2, 0xf6, 0x05, 0x00, 0x08, 0x3d, 0x00, 0x90, 0x72, 0xe7, 0x89,
    0x1e, 0x06, 0x60, 0xeb, 0x29, 0xb0, 0x00, 0xe6, 0x70, 0xe4, 0x71, 0x30, 0xe4, 0xa3, 0x08, 0x60,
    0xeb, 0x1c, 0xb8, 0x00, 0x20, 0xeb, 0x03, 0xb8, 0x00, 0x24, 0xba, 0x04, 0x06, 0xef, 0xeb, 0x0e,
    0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xeb, 0x06, 0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xff, 0x06,
    0x02, 0x60, 0xb0, 0x20, 0xe6, 0x20, 0xcf,
];

/// What makes a sector one that a firmware starts.
const MARK: [u8; 2] = [0x55, 0xaa];

const SECTOR: usize = 512;

/// How large the disk is that it boots from.
pub(super) const DISK: u64 = 1 << 20;

/// Booting takes half a second on a quiet machine.
const BOOT: Duration = Duration::from_secs(60);

/// A disk with the guest on it.
pub(super) fn make_disk(path: &Path) -> Result<()> {
    let mut disk = vec![0; DISK as usize];
    disk[..CODE.len()].copy_from_slice(CODE);
    disk[SECTOR - MARK.len()..SECTOR].copy_from_slice(&MARK);
    fs::write(path, disk).doing(format!("write {}", path.display()))
}

/// What the guest says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Words {
    /// It runs.
    pub(super) up: bool,
    /// How many keys it has handled since it started.
    pub(super) keys: u16,
    /// The last one's scan code.
    pub(super) last: u16,
    /// The sum of its memory, when it was asked for last.
    pub(super) sum: u16,
    /// How many pages it has filled.
    pub(super) pages: u16,
    /// How often it has started.
    pub(super) starts: u16,
}

/// Reads what the guest says.
pub(super) fn words(qmp: &mut Qmp) -> Result<Words> {
    let said = qmp.human("xp /7hx 0x6000")?;
    let numbers = said.lines().flat_map(|line| line.split_whitespace().skip(1));
    let words: Vec<u16> =
        numbers.filter_map(|word| u16::from_str_radix(word.trim_start_matches("0x"), 16).ok()).collect();
    let [up, keys, last, sum, _, pages, starts] = words[..] else {
        return Err(Error::new("read the guest's words", said));
    };
    Ok(Words { up: up == 0x7768, keys, last, sum, pages, starts })
}

/// Waits until it has started once more.
pub(super) fn started(qmp: &mut Qmp, before: Words) -> Result<()> {
    let again = format!("a guest that has started {} times to start once more", before.starts);
    wait_for(&again, BOOT, || {
        let now = words(qmp)?;
        Ok((now.up && now.starts != before.starts).then_some(()))
    })
}

/// Presses a key; does not wait.
pub(super) fn press(qmp: &mut Qmp, key: char) -> Result<()> {
    let keys = json!({"keys": [{"type": "qcode", "data": key.to_string()}], "hold-time": 1});
    qmp.execute("send-key", keys).map(drop)
}

/// Waits until it has handled another key than before. `lost`: it may have been pressed while the guest stood
/// still, which QEMU ignores; then it is pressed again.
pub(super) fn handled(qmp: &mut Qmp, key: char, before: Words, lost: bool) -> Result<()> {
    /// A key that was not lost is handled within milliseconds.
    const AGAIN: Duration = Duration::from_secs(10);
    let wait = |qmp: &mut Qmp, within: Duration| {
        wait_for("a guest to handle a key", within, || {
            let (now, status) = (words(qmp)?, qmp.execute("query-status", json!({}))?);
            let done =
                now.keys != before.keys || now.starts != before.starts || status["status"] != "running";
            Ok(done.then_some(()))
        })
    };
    if lost && wait(qmp, AGAIN).is_err() {
        press(qmp, key)?;
    }
    wait(qmp, BOOT)
}

/// Memory of the guest's that it never touches, and what it holds: so that there is something to move.
const CONTENT: std::ops::Range<u64> = 0x20_0000..0x60_0000;

/// The same in each guest; no page of it is like another, or shorter than itself.
pub(super) fn content() -> (u64, Vec<u8>) {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut words = Vec::new();
    for _ in 0..(CONTENT.end - CONTENT.start) / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        words.extend(state.to_le_bytes());
    }
    (CONTENT.start, words)
}

/// Where QEMU has the guest's memory.
pub(super) fn address_of(qmp: &mut Qmp, at: u64) -> Result<u64> {
    let said = qmp.human(&format!("gpa2hva {at:#x}"))?;
    let address = said.split(" is ").nth(1).and_then(|word| word.split_whitespace().next());
    let address = address.and_then(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok());
    address.doing(format!("find guest memory at {at:#x} in {said:?}"))
}
