//! The ports: all that a migration asks of the world, as traits.
//!
//! `attach` and `qemu` keep them with a real QEMU process, the agent keeps the records, and tests keep them
//! with a model. Every method may be called from any thread that owns the port; none may block on another VM.

/// Memory that the target reaches by itself.
mod handover;
/// What a source asks of a target's host.
mod host;
/// What each side writes down before it acts.
mod journal;
/// The vCPUs and the device state.
mod machine;
/// The guest's memory.
mod memory;
/// The record that says who runs a VM.
mod ownership;
/// What a VM does.
mod run_state;
/// Ownership records that both hosts reach.
pub mod shared;

pub use handover::{Handover, Nonce, Reach, Reached};
pub use host::{Host, Request, Waiting};
pub use journal::{SourceJournal, SpoolRecord, TargetJournal};
pub use machine::{
    DeviceState, Ender, HasEnded, Machine, MachineError, SaveStep, SaveStepKind, Saved, Stopped, Unheard,
    VmCheck,
};
pub use memory::{Block, Fault, GuestMemory, KeptCopy, MissingPages, Placed, Stalls, Stuns, Tracker};
pub use ownership::{Claim, Claimed, Offer, Ownership, OwnershipRecord};
pub use run_state::RunState;
