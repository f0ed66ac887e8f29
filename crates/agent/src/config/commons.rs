//! `[commons]`: what is kept of VMs that have left, for when they come back.

use serde::{Deserialize, Deserializer, de::Error as _};
use std::str::FromStr;
use units::Bytes;

/// `[commons]`.
#[derive(Clone, Copy, Default, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Table {
    pub(super) keep: Option<Keep>,
}

/// How much memory of VMs that have left may be kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keep {
    /// So many hundredths of the memory that is free, what is kept included.
    Share(u32),
    /// So much, as long as it is free.
    Bytes(u64),
}

impl Default for Keep {
    /// Nothing: who has a VM moved away may count on its memory being gone.
    fn default() -> Self {
        Self::NOTHING
    }
}

impl Keep {
    /// Nothing.
    pub const NOTHING: Self = Self::Bytes(0);

    /// How many bytes that comes to where so many are free.
    pub fn of(self, free: u64) -> u64 {
        match self {
            Self::Share(share) => (u128::from(free) * u128::from(share) / 100) as u64,
            Self::Bytes(bytes) => bytes.min(free),
        }
    }
}

impl FromStr for Keep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || "keep is a share of free memory such as \"25%\", an amount such as \"4GiB\", or 0".to_owned();
        match text.trim().strip_suffix('%') {
            Some(share) => {
                let share = share.trim_end().parse().ok().filter(|share| *share <= 100);
                share.map(Self::Share).ok_or_else(wrong)
            }
            None => text.parse().map(|Bytes(bytes)| Self::Bytes(bytes)).map_err(|_| wrong()),
        }
    }
}

impl<'d> Deserialize<'d> for Keep {
    fn deserialize<D: Deserializer<'d>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u64),
            Text(String),
        }
        match Written::deserialize(from)? {
            Written::Number(bytes) => Ok(Self::Bytes(bytes)),
            Written::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, tests::load};

    #[test]
    fn what_is_kept_is_a_share_or_an_amount() {
        let table = [
            ("", Keep::NOTHING),
            ("keep = \"25%\"", Keep::Share(25)),
            ("keep = 0", Keep::NOTHING),
            ("keep = \"0\"", Keep::NOTHING),
            ("keep = \"0%\"", Keep::Share(0)),
            ("keep = \"40%\"", Keep::Share(40)),
            ("keep = \"4GiB\"", Keep::Bytes(4 << 30)),
            ("keep = 1048576", Keep::Bytes(1 << 20)),
        ];
        for (text, keep) in table {
            let text = format!("[commons]\n{text}\n");
            assert_eq!(load(&text, Flags::default()).unwrap().keep, keep, "{text}");
        }
        for wrong in ["\"101%\"", "\"-1%\"", "\"much\"", "-1", "0.5", "\"%\""] {
            assert!(load(&format!("[commons]\nkeep = {wrong}\n"), Flags::default()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn no_more_is_kept_than_is_free() {
        let rows = [
            (Keep::Share(25), 1000, 250),
            (Keep::Share(0), 1000, 0),
            (Keep::Share(100), u64::MAX, u64::MAX),
            (Keep::Bytes(300), 1000, 300),
            (Keep::Bytes(300), 100, 100),
        ];
        for (keep, free, bytes) in rows {
            assert_eq!(keep.of(free), bytes, "{keep:?} of {free}");
        }
    }
}
