//! Ownership records that both hosts reach by themselves: a migration whose target is lost for good is
//! decided without it.

use crate::{Claimed, Ownership, OwnershipRecord};
use std::io;
use units::Epoch;

/// The owner of a VM that belongs to nobody: it was stopped.
pub const NOBODY: &str = "";

/// An ownership record of all VMs that all hosts of a workgroup can ask.
///
/// As with [`Ownership`], an error means: not known, ask again. Whoever knows the epoch of a VM from before
/// says so (`known`): a record that lies behind that was restored from an old backup and is not believed.
pub trait SharedRecord: Ownership {
    /// What it is, for people: `the directory /shared/whimbrel`.
    fn words(&self) -> String;

    /// What it says of the VM; `None` if it has never heard of it. What others have just written may not be
    /// seen yet.
    fn look(&self, vm: &str) -> io::Result<Option<OwnershipRecord>>;

    /// The VM is started or adopted on `host`: it takes it, at the next epoch, if it belongs to nobody, to
    /// `host` already, or to a host that a person has `fenced`.
    fn start(&self, vm: &str, host: &str, fenced: Option<&str>, known: Option<Epoch>) -> io::Result<Claimed>;

    /// The VM has ended on `host`: if it belongs to it, it belongs to nobody from the next epoch on.
    fn end(&self, vm: &str, host: &str, known: Option<Epoch>) -> io::Result<()>;
}

/// A record that lies behind what is known, in the words in which every back end says so.
pub fn restored(place: &str, vm: &str, why: &str) -> io::Error {
    let why = format!(
        "{place} cannot be believed about {vm}: {why}. Either it was restored from an old backup, or this \
         host does not see yet what others have written; nothing is decided by it"
    );
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// What everybody says who knows the epoch of a VM from before.
pub fn not_behind(
    place: &str,
    vm: &str,
    found: Option<&OwnershipRecord>,
    known: Option<Epoch>,
) -> io::Result<()> {
    match (found.map(|record| record.epoch), known) {
        (found, Some(known)) if found.unwrap_or_default() < known => {
            let there = found.map_or("nothing".to_owned(), |epoch| format!("epoch {epoch}"));
            Err(restored(place, vm, &format!("it was at epoch {known} before, and now there is {there}")))
        }
        _ => Ok(()),
    }
}
