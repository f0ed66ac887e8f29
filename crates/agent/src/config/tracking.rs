//! How the writes of guests are seen.

use serde::{Deserialize, Deserializer, de::Error as _};
use std::str::FromStr;

/// How the writes of guests are seen that leave this host.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Tracker {
    /// By the kernel alone, until a guest must be slowed; where the kernel cannot, as below.
    #[default]
    Auto,
    /// By a thread of the agent that hears of them, from the start.
    Synchronous,
}

impl FromStr for Tracker {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "synchronous" => Ok(Self::Synchronous),
            _ => Err("a tracker is auto or synchronous".to_owned()),
        }
    }
}

impl<'d> Deserialize<'d> for Tracker {
    fn deserialize<D: Deserializer<'d>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// How many pages one write opens that the agent hears of. `None`: what pays, region by region.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Group(pub Option<u64>);

impl FromStr for Group {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(pages) if (1..=512_u64).contains(&pages) && pages.is_power_of_two() => Ok(Self(Some(pages))),
            _ if text == "auto" => Ok(Self(None)),
            _ => Err("a group is auto, or a power of two from 1 to 512".to_owned()),
        }
    }
}

impl<'d> Deserialize<'d> for Group {
    fn deserialize<D: Deserializer<'d>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u64),
            Word(String),
        }
        let text = match Written::deserialize(from)? {
            Written::Number(pages) => pages.to_string(),
            Written::Word(word) => word,
        };
        text.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ConfigError, Flags, tests::load};

    #[test]
    fn tracker_and_groups_are_chosen_in_the_file_or_by_flags() {
        let config = load("", Flags::default()).unwrap();
        assert_eq!((config.tracker, config.group), (Tracker::Auto, Group(None)));
        let config = load("tracker = \"synchronous\"\ngroup = 64\n", Flags::default()).unwrap();
        assert_eq!((config.tracker, config.group), (Tracker::Synchronous, Group(Some(64))));
        let flags = Flags { tracker: Some(Tracker::Auto), group: Some(Group(Some(8))), ..Flags::default() };
        let config = load("tracker = \"synchronous\"\ngroup = \"auto\"\n", flags).unwrap();
        assert_eq!((config.tracker, config.group), (Tracker::Auto, Group(Some(8))));
        for bad in ["group = 0", "group = 100", "group = 1024", "group = \"many\"", "tracker = \"fast\""] {
            assert!(matches!(load(bad, Flags::default()), Err(ConfigError::Mistake { .. })), "{bad}");
        }
    }
}
