//! The ownership record of one VM.

use std::io;
use units::{Epoch, MigrationId};

/// Who owns a VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OwnershipRecord {
    /// The owning host.
    pub owner: String,
    /// Grows by one with every change of hands.
    pub epoch: Epoch,
    /// The migration that brought it to this owner; `None` for a VM that was started or adopted here.
    pub migration: Option<MigrationId>,
}

/// The compare-and-swap by which a VM changes hands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Claim {
    /// The VM.
    pub vm: String,
    /// On behalf of which migration: makes the claim idempotent.
    pub migration: MigrationId,
    /// The epoch that the claimer believes to be current.
    pub expected: Epoch,
    /// Who wants to own it.
    pub claimer: String,
}

/// What a claim came to. Asking again with the same claim gives the same answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Claimed {
    /// The claimer owns the VM, at this epoch.
    Yours(Epoch),
    /// It belongs to somebody else now.
    Lost(OwnershipRecord),
}

/// The source's word, without which nobody can claim: this migration may bring the VM from one host to
/// another.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// The VM.
    pub vm: String,
    /// In which migration.
    pub migration: MigrationId,
    /// The epoch at which the source owns it.
    pub expected: Epoch,
    /// The source, which may claim it back.
    pub from: String,
    /// The target, which may claim it.
    pub to: String,
}

/// The ownership record of one VM, wherever it is held. An error means: not known, ask again (I1). No answer
/// is ever guessed from how long one has waited.
pub trait Ownership: Send + Sync {
    /// What tells this record from all others: two hosts that say the same ask the same record. Empty: it is
    /// the target's.
    fn identity(&self) -> io::Result<String>;

    /// Durable when it returns, and only then the source may fence itself and authorize. Said again before
    /// each further pause of the same migration, which changes nothing. Where the target keeps the record, it
    /// has written that down when it prepared.
    fn offer(&self, offer: &Offer) -> io::Result<()>;

    /// Claims the VM; durable when it returns.
    fn claim(&self, claim: &Claim) -> io::Result<Claimed>;
}
