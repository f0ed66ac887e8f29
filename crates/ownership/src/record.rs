//! What is written down of a VM's ownership, and under which names.

use ports::OwnershipRecord;
use serde::{Deserialize, Serialize};
use std::{fmt, io};
use units::{Epoch, MigrationId};

/// The longest entry: names have at most 48 bytes each, numbers 39 digits. What is longer was not written by
/// us.
pub const LONGEST: usize = 1024;

/// The longest name of a host or VM, as everywhere; it becomes part of a file's name.
const LONGEST_NAME: usize = 48;

/// Who owns a VM from an epoch on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The VM.
    pub vm: String,
    /// From this epoch on.
    pub epoch: u64,
    /// The owner; empty: nobody.
    pub owner: String,
    /// Who owned it before.
    pub from: String,
    /// Which change brought it there: the migration's id, or one of its own.
    pub change: String,
    /// Whether that was a migration.
    pub migration: bool,
}

impl Entry {
    /// As it is written: one line of JSON, and one with its sum, so that half a file is never taken for a
    /// whole one.
    pub fn encode(&self) -> Vec<u8> {
        // A struct of strings and numbers always becomes JSON.
        let line = serde_json::to_string(self).unwrap_or_default();
        format!("{line}\n{}\n", blake3::hash(line.as_bytes()).to_hex()).into_bytes()
    }

    /// Reads what `encode` wrote. Anything else is an error that names `place`.
    pub fn decode(bytes: &[u8], place: &dyn fmt::Display) -> io::Result<Self> {
        let bad = |why: &str| {
            let why = format!(
                "{place} holds no ownership record: {why}. Nothing is decided by it; it was damaged, or not \
                 written by Whimbrel"
            );
            io::Error::new(io::ErrorKind::InvalidData, why)
        };
        match bytes.len() {
            0 => return Err(bad("it is empty")),
            LONGEST.. => return Err(bad("it is too long")),
            _ => {}
        }
        let text = std::str::from_utf8(bytes).map_err(|_| bad("it is no text"))?;
        let (line, sum) = text.split_once('\n').ok_or_else(|| bad("its end is missing"))?;
        let whole = sum.strip_suffix('\n').is_some_and(|sum| *sum == *blake3::hash(line.as_bytes()).to_hex());
        if !whole {
            return Err(bad("its sum is wrong or its end is missing"));
        }
        serde_json::from_str(line).map_err(|e| bad(&e.to_string()))
    }

    /// The migration that it was, if it was one.
    pub fn migration(&self) -> Option<MigrationId> {
        self.change.parse().ok().filter(|_| self.migration)
    }
}

impl From<Entry> for OwnershipRecord {
    fn from(entry: Entry) -> Self {
        Self { migration: entry.migration(), epoch: Epoch(entry.epoch), owner: entry.owner }
    }
}

/// A name that may become part of a path or a key: as the agent's own rule.
pub(crate) fn check_name(name: &str) -> io::Result<()> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && name.len() <= LONGEST_NAME && name.chars().all(fine) {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} is no name of a host or VM")))
}

/// The file that says who owns the VM from this epoch on.
pub fn epoch_name(epoch: u64) -> String {
    format!("epoch-{epoch:020}")
}

/// The file by which `owner` may take the VM from this epoch to the next.
pub fn offer_name(epoch: u64, change: MigrationId, owner: &str) -> String {
    format!("offer-{epoch:020}-{change}-{owner}")
}

/// An offer that is still being written.
pub(crate) fn draft_name(epoch: u64, number: u128) -> String {
    format!("draft-{epoch:020}-{number:032x}")
}

/// What a name in a VM's directory stands for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Named {
    Epoch(u64),
    /// An offer or a draft at this epoch; a draft belongs to no change.
    Offer(u64, Option<MigrationId>),
}

impl Named {
    /// `None`: not ours.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (kind, rest) = name.split_once('-')?;
        let (digits, rest) = rest.split_at_checked(20)?;
        let number = Some(digits).filter(|d| d.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()?;
        match kind {
            "epoch" => rest.is_empty().then_some(Self::Epoch(number)),
            "draft" => Some(Self::Offer(number, None)),
            "offer" => Some(Self::Offer(number, Some(rest.get(1..33)?.parse().ok()?))),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        Entry {
            vm: "web1".into(),
            epoch: 7,
            owner: "b".into(),
            from: "a".into(),
            change: MigrationId(0xfeed).to_string(),
            migration: true,
        }
    }

    #[test]
    fn an_entry_survives_being_written_and_read() {
        assert_eq!(Entry::decode(&entry().encode(), &"f").unwrap(), entry());
        assert_eq!(entry().migration(), Some(MigrationId(0xfeed)));
        assert_eq!(Entry { migration: false, ..entry() }.migration(), None);
    }

    #[test]
    fn half_a_file_is_never_a_record() {
        let whole = entry().encode();
        assert!(whole.len() < LONGEST);
        for end in 0..whole.len() {
            let error = Entry::decode(&whole[..end], &"the file f").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(error.to_string().contains("the file f"), "{error}");
        }
        for at in 0..whole.len() {
            let mut bent = whole.clone();
            bent[at] ^= 1;
            assert!(Entry::decode(&bent, &"f").is_err(), "byte {at}");
        }
        for bad in [&b"\0\0\0\0"[..], &[b'x'; LONGEST + 1], "{}\n\n".as_bytes()] {
            assert!(Entry::decode(bad, &"f").is_err());
        }
    }

    #[test]
    fn names_tell_what_they_stand_for() {
        assert_eq!(Named::parse(&epoch_name(7)), Some(Named::Epoch(7)));
        let id = MigrationId(9);
        assert_eq!(Named::parse(&offer_name(7, id, "host-b")), Some(Named::Offer(7, Some(id))));
        assert_eq!(Named::parse(&offer_name(7, id, "")), Some(Named::Offer(7, Some(id))));
        assert_eq!(Named::parse(&draft_name(7, 3)), Some(Named::Offer(7, None)));
        for strange in
            ["", "epoch", "epoch-7", "epoch-0000000000000000000x", ".nfs0001", "offer-00000000000000000007"]
        {
            assert_eq!(Named::parse(strange), None, "{strange}");
        }
    }
}
