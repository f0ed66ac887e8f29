//! What the bytes travel over.

use lab::{Lab, Result};
use std::time::Duration;
use units::{Bytes, Rate};

/// The link between the two hosts: a veth.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Link {
    /// Shaped to a gigabit a second by a token bucket at either end.
    #[value(name = "1gbit")]
    Gigabit,
    /// As fast as the machine copies.
    Unshaped,
}

impl Link {
    /// In the order in which they take turns.
    pub(crate) const ALL: [Self; 2] = [Self::Gigabit, Self::Unshaped];

    /// Its name in options, tables and files.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gigabit => "1gbit",
            Self::Unshaped => "unshaped",
        }
    }

    /// What it carries, if that is known beforehand.
    pub(crate) fn rate(self) -> Option<Rate> {
        (self == Self::Gigabit).then_some(Rate(1_000_000_000 / 8))
    }

    /// Makes the hosts' links so.
    pub(crate) fn shape(self, lab: &Lab) -> Result<()> {
        lab.hosts().iter().try_for_each(|host| host.shape(self.rate()))
    }
}

/// A run may take so many times as long as a copy of the whole memory at the link's speed.
const COPIES: u32 = 3;
/// But always so long: where the link is faster than the processors, it is not what a run waits for.
const AT_LEAST: Duration = Duration::from_secs(10);

/// When a run is ended that does not end by itself.
pub(crate) fn patience(memory: Bytes, rate: Rate) -> Duration {
    memory.time_at(rate).map_or(AT_LEAST, |copy| (copy * COPIES).max(AT_LEAST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_copies_but_never_too_soon() {
        let gib = Bytes(1 << 30);
        assert_eq!(patience(gib, Rate(1 << 26)), Duration::from_secs(48));
        assert_eq!(patience(gib, Rate(1 << 32)), AT_LEAST);
        assert_eq!(patience(gib, Rate(0)), AT_LEAST);
    }
}
