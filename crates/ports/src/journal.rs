//! What each side writes down before it acts.

use crate::RunState;
use std::{io, path::PathBuf};
use units::{Epoch, MemorySet};

/// What the source promises, each durable before the method returns.
pub trait SourceJournal: Send {
    /// The coming pause is ours: a restarted agent may give the guest the state back that it has now. Said
    /// again if it turns out to have had another one.
    fn pausing(&mut self, before: RunState) -> io::Result<()>;

    /// From now on this guest runs here again only if the ownership record says so.
    fn fence(&mut self, expected: Epoch) -> io::Result<()>;

    /// The pause is over and the guest runs here, as if nothing had happened (I3).
    fn back(&mut self) -> io::Result<()>;

    /// The target owns the VM (I4). What it still misses is kept and served.
    fn gone(&mut self, epoch: Epoch) -> io::Result<()>;

    /// The target has everything: nothing here is needed any more.
    fn settled(&mut self) -> io::Result<()>;
}

/// What the target records, each durable before the method returns.
pub trait TargetJournal: Send {
    /// These pages are still on their way when the guest starts. Before the claim, in a post-copy. None: what
    /// was recorded before, of pages and of a file, was taken back.
    fn missing(&mut self, pages: &MemorySet) -> io::Result<()>;

    /// In which state the guest will go on here. Before the claim, and always said: a host that
    /// cannot write this down could not claim the VM either.
    fn goes_on(&mut self, state: RunState) -> io::Result<()>;

    /// It went on: what it does from now on is its own affair, and that of its users.
    fn went_on(&mut self) -> io::Result<()>;

    /// A file has what is missing, or will have. Before the claim.
    fn spool(&mut self, record: &SpoolRecord) -> io::Result<()>;

    /// Nothing is missing any more.
    fn settled(&mut self) -> io::Result<()>;

    /// This side gives up and has destroyed its QEMU. `source_may_ask`: the source may have promised, so the
    /// record stays for it; otherwise no trace does.
    fn abandoned(&mut self, source_may_ask: bool) -> io::Result<()>;
}

/// What a target must remember of a file to live on it. Durable before the claim.
#[derive(Clone, Debug)]
pub struct SpoolRecord {
    /// The directory that both hosts reach.
    pub directory: PathBuf,
    /// What seals the file.
    pub secret: [u8; 32],
    /// Extents before this one do not matter.
    pub floor: u64,
    /// Extents that were durable when the VM changed hands.
    pub end: u64,
    /// Missing pages of which only later extents count.
    pub outdated: MemorySet,
}
