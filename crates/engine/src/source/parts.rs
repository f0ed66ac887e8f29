//! What a migration is given at its source.

use crate::{
    conn::Dial,
    ports::{GuestMemory, Machine, Ownership, SourceJournal, Stuns, Tracker},
    shared_port::SharedPort,
    source::handover::Offered,
};
use api::PastMigration;
use std::{ops::RangeInclusive, sync::Arc, time::Duration};
use units::{Epoch, MigrationId, Rate};

/// What is known of the way from this host to another.
#[derive(Clone, Copy, Debug)]
pub struct LinkHistory {
    /// What the link carries; none: it has to be found out.
    pub link: Option<Rate>,
    /// What a switchover costs besides moving memory: stop, device state, claim, start.
    pub switchover: Duration,
}

/// The VM as it was read when its migration began.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// How long that took.
    pub took: Duration,
    /// What will be different on the target, in words.
    pub left_behind: Vec<String>,
}

/// All that a migration needs at its source.
pub struct SourceParts {
    /// The VM's name.
    pub vm: String,
    /// This host.
    pub from: String,
    /// The target host.
    pub to: String,
    /// This attempt.
    pub migration: MigrationId,
    /// The ownership that this host holds.
    pub epoch: Epoch,
    /// By which migration the VM came to this host, if it did: its target may keep its memory from then.
    pub came_by: Option<MigrationId>,
    /// How the target starts a QEMU for it, as JSON.
    pub recipe: Vec<u8>,
    /// What was found when that was read from the running VM.
    pub reading: Reading,
    /// RAM blocks that QEMU keeps private, as they were when this was made, by name; `Machine::save` tells
    /// what changed in them.
    pub private: Vec<(String, Vec<u8>)>,
    /// The guest's RAM.
    pub memory: Arc<dyn GuestMemory>,
    /// What of it the target may reach by itself.
    pub offered: Offered,
    /// What the guest writes. `None` for a guest that is stopped already, after a restart of the agent.
    pub tracker: Option<Box<dyn Tracker>>,
    /// How its vCPUs are stunned, where that can be done.
    pub stuns: Option<Box<dyn Stuns>>,
    /// The QEMU process.
    pub machine: SharedPort<dyn Machine>,
    /// What this side records durably.
    pub journal: Box<dyn SourceJournal>,
    /// How many cores may compress at a time, at most. Asked now and then: what the guest needs itself
    /// changes.
    pub cores: Box<dyn FnMut() -> u32 + Send>,
    /// How the VM's migrations went before, oldest first.
    pub history: Vec<PastMigration>,
    /// What is known of the way to this target.
    pub link_history: LinkHistory,
    /// How many streams: as many of these as it pays to use.
    pub streams: RangeInclusive<u32>,
    /// How many threads of the guest may write at a time.
    pub writers: u32,
    /// Who owns the VM.
    pub record: Arc<dyn Ownership>,
    /// How to reach the target.
    pub dial: Arc<dyn Dial>,
}
