//! What a migration is asked for and what it says of itself: shared by the command, the agent and the engine,
//! each option and each figure written down once.

/// What became of a VM.
mod fate;
/// What is asked of a migration.
mod options;
/// What a migration says of itself.
mod report;

pub use fate::Fate;
pub use options::{Compression, MigrateOptions, Mode, Robust};
pub use report::*;
