/// Frames: preambles, replies, headers, tables.
pub(crate) mod wire;

/// What data connections carry, until it is in a guest's memory.
pub(crate) mod land;

/// Control messages.
pub(crate) mod control;

/// Both sides as state machines.
pub(crate) mod machines;

/// Both sides with everything that they rely on, and others who act on the VM.
pub(crate) mod others;

/// What a peer's VM wants to be started with.
pub(crate) mod recipe;

/// What real QEMUs open that are started with what passes.
pub(crate) mod opens;

/// Images and private memory.
pub(crate) mod foreign;

/// How earlier migrations went, by the word of other hosts.
pub(crate) mod history;

/// The agent's own rows.
pub(crate) mod store;

/// Files on a shared datastore.
pub(crate) mod spool;

/// What a QEMU answers.
pub(crate) mod qmp;

/// VM files.
pub(crate) mod vmfile;

/// The agent's configuration.
pub(crate) mod config;
