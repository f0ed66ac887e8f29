//! The twin: a migration is invisible (I9). Two VMs start alike and are told the same, in random sequences of
//! actions; one of them is also moved, in every mode, between the actions and during them; the other never
//! is. After each action both look the same, through their monitors and to their guests, or the difference is
//! one of those that are listed.
//!
//! Their guest is a boot sector: it starts in half a second, and two of them have the same memory.

mod action; // what is done to them
mod guest; // who lives in them
mod listed; // what may differ, and what may be refused
mod look; // what they look like
mod pair; // both of them, and one sequence
mod search; // random sequences, the smallest that fails, and those that failed before
mod vm; // one of them

pub use action::{Action, Deed, Mode, from_words, in_words};
pub use listed::{DIFFERENCES, Listed, OPEN_IN_PAUSE, REFUSALS, Refusal};
pub use pair::{Broken, Outcome, Twins, Went};
pub use search::{Found, How, all, draw, interventions, interventions_that_hold, kept};
pub(crate) use vm::{second_monitor, wrapper};
