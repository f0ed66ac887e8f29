//! A host that takes VMs in.

use crate::{
    Block, GuestMemory, Handover, KeptCopy, Machine, MissingPages, Ownership, Reached, TargetJournal,
};
use std::{path::PathBuf, sync::Arc};
use units::{Epoch, MigrationId};

/// What a source asks a host to take in. Comes from a peer: whoever acts on it checks it first.
#[derive(Clone, Debug)]
pub struct Request {
    /// This attempt.
    pub migration: MigrationId,
    /// The VM's name.
    pub vm: String,
    /// The source host, by its own word.
    pub from: String,
    /// The ownership that the source holds.
    pub epoch: Epoch,
    /// How to start a QEMU for it, as JSON.
    pub recipe: Vec<u8>,
    /// Its RAM blocks.
    pub blocks: Vec<Block>,
    /// Those of them that this host may reach by itself.
    pub handovers: Vec<Handover>,
    /// RAM blocks that its QEMU keeps private, by QEMU's name for them, as they were while the guest ran: the
    /// waiting QEMU is given them at once.
    pub private: Vec<(String, Vec<u8>)>,
    /// Whether the guest may start before all its memory is there.
    pub post_copy: bool,
    /// By which migration the VM came to the source: what is kept of it from then is of this VM.
    pub came_by: Option<MigrationId>,
    /// Which ownership record decides, by its identity; empty: this host's own.
    pub record: String,
    /// How the VM's migrations went so far, by the source's word; comes with the device state.
    pub history: Vec<u8>,
}

/// A QEMU on the target that waits for a VM, with all that belongs to it.
pub struct Waiting {
    /// The guest's RAM: all holes, but for the blocks that were reached.
    pub memory: Arc<dyn GuestMemory>,
    /// The blocks that are the source's own memory. The source's guest runs in them until the commit: nothing
    /// but that guest writes there, `memory` least of all.
    pub reached: Vec<Reached>,
    /// The VM's memory as it was when it left this host for the source's, if that is still there.
    pub kept: Option<Arc<dyn KeptCopy>>,
    /// Missing pages, when the request allows post-copy.
    pub missing: Option<Arc<dyn MissingPages>>,
    /// The QEMU process.
    pub machine: Box<dyn Machine>,
    /// What this side records.
    pub journal: Box<dyn TargetJournal>,
}

/// A host that can take VMs in.
pub trait Host: Send + Sync {
    /// Its name.
    fn name(&self) -> String;

    /// Looks whether a VM can be taken in, and starts a QEMU that waits for it; or all reasons why not, and
    /// no trace.
    fn prepare(&self, request: &Request) -> Result<Waiting, Vec<String>>;

    /// Where a directory is that the source wants to share pages by, if this host may use it; or why not. May
    /// take as long as a datastore does.
    fn spool_directory(&self, asked: &str) -> Result<PathBuf, String>;

    /// The ownership records that this host holds.
    fn record(&self) -> Arc<dyn Ownership>;

    /// Whether a migration that no longer runs has brought its VM here, all of it.
    fn settled(&self, migration: MigrationId) -> bool;

    /// A migration is over; `arrived`: the VM runs here now.
    fn ended(&self, request: &Request, arrived: bool);
}
