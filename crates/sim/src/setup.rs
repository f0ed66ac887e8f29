//! What is simulated: the VM, the way it migrates, and what it can rely on.

use crate::pages::MOST;
use std::{fmt, str::FromStr};

/// How memory travels.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Way {
    /// So many rounds, then the rest while the guest stands still.
    PreCopy,
    /// One round, then the rest while the guest runs on the target.
    Hybrid,
    /// Everything while the guest runs on the target.
    PostCopy,
}

/// Where the ownership record is held.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Keeper {
    /// By the target's agent, in its store.
    Target,
    /// In files on the shared datastore: an answer may be as old as a client's cache, a created name never
    /// is.
    File,
    /// By etcd.
    Etcd,
}

/// What goes into the spool.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Spooling {
    /// There is none.
    Off,
    /// What is missing, as it gets on.
    Relaxed,
    /// What is missing, durably before the promise.
    Strict,
}

/// One kind of migration.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Setup {
    /// How memory travels.
    pub way: Way,
    /// Who keeps the record.
    pub keeper: Keeper,
    /// What is spooled.
    pub spooling: Spooling,
    /// How many data connections.
    pub streams: u8,
    /// How many pages the guest has.
    pub pages: u8,
    /// How many rounds before the last; of a pre-copy.
    pub rounds: u8,
    /// What the guest does.
    pub guest: u16,
    /// How much the guest does on each side before it rests.
    pub busy: u16,
    /// The source refers to pages that may not have arrived: only verification saves it (I7).
    pub eager: bool,
    /// A link that is lost while the guest runs on the source is waited for (`--give-up`).
    pub rejoin: bool,
    /// Both sides compare their memory before the commit (`--verify`).
    pub verify: bool,
    /// Somebody has paused the guest before.
    pub paused: bool,
    /// The target keeps the VM's memory from before.
    pub kept: bool,
}

impl Setup {
    /// A small VM that migrates so.
    pub fn small(way: Way, keeper: Keeper, spooling: Spooling) -> Self {
        let (eager, rejoin, verify, paused, kept) = (false, false, false, false, false);
        Self {
            way,
            keeper,
            spooling,
            streams: 1,
            pages: 3,
            rounds: 1,
            guest: 1,
            busy: 5,
            eager,
            rejoin,
            verify,
            paused,
            kept,
        }
    }

    /// Whether the guest may run on the target before all its memory is there.
    pub fn post_copy(&self) -> bool {
        self.way != Way::PreCopy
    }
}

/// What may follow the numbers.
const EAGER: &str = "eager";
const REJOIN: &str = "rejoin";
const VERIFY: &str = "verify";
const PAUSED: &str = "paused";
const KEPT: &str = "kept";

const WAYS: [(Way, &str); 3] = [(Way::PreCopy, "pre"), (Way::Hybrid, "hybrid"), (Way::PostCopy, "post")];
const KEEPERS: [(Keeper, &str); 3] =
    [(Keeper::Target, "held"), (Keeper::File, "file"), (Keeper::Etcd, "etcd")];
const SPOOLINGS: [(Spooling, &str); 3] =
    [(Spooling::Off, "bare"), (Spooling::Relaxed, "relaxed"), (Spooling::Strict, "strict")];

fn word<T: PartialEq + Copy>(of: T, table: &[(T, &'static str)]) -> &'static str {
    table.iter().find(|(value, _)| *value == of).map_or("?", |(_, word)| word)
}

fn value<T: Copy>(word: Option<&str>, table: &[(T, &str)]) -> Result<T, String> {
    let word = word.ok_or("the setup is too short")?;
    let found = table.iter().find(|(_, known)| *known == word).map(|(value, _)| *value);
    found.ok_or_else(|| {
        format!("{word} is none of {}", table.iter().map(|t| t.1).collect::<Vec<_>>().join(", "))
    })
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { streams, pages, rounds, guest, busy, .. } = self;
        let (way, keeper) = (word(self.way, &WAYS), word(self.keeper, &KEEPERS));
        let spooling = word(self.spooling, &SPOOLINGS);
        write!(f, "{way}-{keeper}-{spooling}-{streams}-{pages}-{rounds}-{guest}-{busy}")?;
        let also = [
            (self.eager, EAGER),
            (self.rejoin, REJOIN),
            (self.verify, VERIFY),
            (self.paused, PAUSED),
            (self.kept, KEPT),
        ];
        also.iter().filter(|(set, _)| *set).try_for_each(|(_, word)| write!(f, "-{word}"))
    }
}

impl FromStr for Setup {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split('-');
        let (way, keeper) = (value(words.next(), &WAYS)?, value(words.next(), &KEEPERS)?);
        let spooling = value(words.next(), &SPOOLINGS)?;
        let mut number = |most: u16| -> Result<u16, String> {
            let word = words.next().ok_or("the setup is too short")?;
            let number = word.parse::<u16>().map_err(|e| format!("{word}: {e}"))?;
            if number <= most { Ok(number) } else { Err(format!("{number} is more than {most}")) }
        };
        let mut setup = Self {
            way,
            keeper,
            spooling,
            streams: number(4)?.max(1) as u8,
            pages: number(MOST as u16)?.max(2) as u8,
            rounds: number(8)?.max(1) as u8,
            guest: number(u16::MAX)?,
            busy: number(1000)?,
            ..Self::small(way, keeper, spooling)
        };
        for word in words {
            match word {
                EAGER => setup.eager = true,
                REJOIN => setup.rejoin = true,
                VERIFY => setup.verify = true,
                PAUSED => setup.paused = true,
                KEPT => setup.kept = true,
                more => {
                    return Err(format!("{more} is none of {EAGER}, {REJOIN}, {VERIFY}, {PAUSED}, {KEPT}"));
                }
            }
        }
        Ok(setup)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setup_is_read_as_it_is_written() {
        let mut setup = Setup::small(Way::Hybrid, Keeper::Etcd, Spooling::Strict);
        setup.streams = 2;
        (setup.eager, setup.verify, setup.kept) = (true, true, true);
        assert_eq!(setup.to_string().parse(), Ok(setup));
        assert_eq!(setup.to_string(), "hybrid-etcd-strict-2-3-1-1-5-eager-verify-kept");
        for bad in
            ["", "pre", "pre-held-bare-1-3-1-1", "pre-held-bare-1-3-1-1-5-0", "pre-held-bare-1-65-1-1-5"]
        {
            assert!(bad.parse::<Setup>().is_err(), "{bad}");
        }
    }
}
