//! Serial numbers and names.

use std::{fmt, str::FromStr};

/// The serial number of a VM's ownership: it grows by one whenever the VM changes hands.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Epoch(pub u64);

impl Epoch {
    /// Beyond every VM's: changing hands a thousand times a second takes a hundred million years to get here.
    /// A peer that claims more is wrong, and an epoch that begins at 0 anew would be older than those that it
    /// must fence (I6).
    pub const MOST: Self = Self(u64::MAX / 2);

    /// The epoch after this one. Never one that is older.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One attempt to migrate one VM. Drawn at random by the source; whoever knows it may join its connections.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MigrationId(pub u128);

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is not 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadId;

impl fmt::Display for BadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a migration's id is 32 hexadecimal digits")
    }
}

impl std::error::Error for BadId {}

impl FromStr for MigrationId {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        if !digits {
            return Err(BadId);
        }
        u128::from_str_radix(text, 16).map(Self).map_err(|_| BadId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_epoch_is_followed_by_an_older_one() {
        assert_eq!(Epoch(1).next(), Epoch(2));
        assert!(Epoch(u64::MAX).next() >= Epoch(u64::MAX));
    }

    #[test]
    fn an_id_survives_being_written_and_read() {
        let id = MigrationId(0x00ff_1234);
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "12", "+0000000000000000000000000000001", "g0000000000000000000000000000000"] {
            assert_eq!(bad.parse::<MigrationId>(), Err(BadId), "{bad}");
        }
    }
}
