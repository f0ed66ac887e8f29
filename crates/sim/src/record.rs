//! The ownership record, wherever it is held: a register that changes hands by compare-and-swap.
//!
//! Mirrors `agent/store/ownership.rs` (held by the target), and the contract of a record that is held
//! elsewhere: a claim is idempotent by the migration's id, an error means "not known", a claim that was sent
//! may take effect long after its sender has died.

use crate::link::Side;

/// Who owns the VM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Owner {
    /// The host.
    pub owner: Side,
    /// Counts changes of hands.
    pub epoch: u64,
    /// Whether this migration decided that.
    pub decided: bool,
    /// Whether the target may still claim.
    pub open: bool,
}

/// The epoch at which every simulated migration begins.
pub(crate) const EPOCH: u64 = 1;

/// A claim, for one of the two.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Asked {
    /// For whom.
    pub claimer: Side,
}

/// What came of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Answer {
    /// The claimer owns the VM at this epoch.
    Yours(u64),
    /// The other one does.
    Lost(u64),
    /// Nobody can say. Ask again.
    Unknown,
}

impl Owner {
    /// Before the migration.
    pub const BEFORE: Self = Self { owner: Side::Source, epoch: EPOCH, decided: false, open: true };

    /// Decides a claim, as `Offer::decide` does.
    pub fn claim(&mut self, asked: Asked, idempotent: bool) -> Answer {
        if self.decided {
            let yours = self.owner == asked.claimer && idempotent;
            return if yours { Answer::Yours(self.epoch) } else { Answer::Lost(self.epoch) };
        }
        if asked.claimer == Side::Target && !self.open {
            return Answer::Lost(self.epoch);
        }
        *self = Self { owner: asked.claimer, epoch: EPOCH + 1, decided: true, open: false };
        Answer::Yours(self.epoch)
    }
}

/// A record that neither host holds.
#[derive(Clone, Hash, Debug)]
pub struct Elsewhere {
    /// What it says.
    pub owner: Owner,
    /// What it said before that: an old backup, or a client's cache.
    pub before: Owner,
    /// Claims on their way to it: by whom, the claim, and whether its sender still waits. Any of them may be
    /// next.
    pub asked: Vec<(Side, Asked, bool)>,
    /// Answers on their way back.
    pub answers: [Option<Answer>; 2],
    /// Whether it can be reached.
    pub up: bool,
    /// It was restored from an old backup, which is noticed: it answers nobody until a person has looked at
    /// it.
    pub restored: bool,
}

impl Elsewhere {
    /// As it is before a migration.
    pub fn new() -> Self {
        Self {
            owner: Owner::BEFORE,
            before: Owner::BEFORE,
            asked: Vec::new(),
            answers: [None; 2],
            up: true,
            restored: false,
        }
    }
}
