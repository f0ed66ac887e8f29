//! `[memory]`: how much memory the VMs of other hosts may need here.

use serde::{Deserialize, Deserializer, de::Error as _};

/// `[memory]`.
#[derive(Clone, Copy, Default, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Table {
    pub(super) overcommit: Option<Overcommit>,
}

/// How many times the memory that is free VMs of other hosts may need, in hundredths: 100 unless this host
/// overcommits, for guests that touch only part of theirs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Overcommit(pub u32);

/// A guest of 64 TiB on a host of 64 GiB.
const MOST: f64 = 1024.0;

impl Default for Overcommit {
    fn default() -> Self {
        Self(100)
    }
}

impl<'d> Deserialize<'d> for Overcommit {
    fn deserialize<D: Deserializer<'d>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Whole(u32),
            Part(f64),
        }
        let times = match Written::deserialize(from)? {
            Written::Whole(times) => f64::from(times),
            Written::Part(times) => times,
        };
        if (1.0..=MOST).contains(&times) {
            Ok(Self((times * 100.0) as u32))
        } else {
            Err(D::Error::custom(format!("overcommit is a factor from 1 to {MOST}, such as 1.5")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, tests::load};

    #[test]
    fn memory_is_overcommitted_only_where_the_file_says_so() {
        for (text, expected) in
            [("", 100), ("[memory]\n", 100), ("overcommit = 4", 400), ("overcommit = 1.5", 150)]
        {
            let text = if text.starts_with('o') { format!("[memory]\n{text}\n") } else { text.to_owned() };
            assert_eq!(load(&text, Flags::default()).unwrap().overcommit, Overcommit(expected), "{text}");
        }
        for wrong in ["0.5", "0", "2000", "\"much\"", "-1", "nan"] {
            let text = format!("[memory]\novercommit = {wrong}\n");
            assert!(load(&text, Flags::default()).is_err(), "{wrong}");
        }
    }
}
