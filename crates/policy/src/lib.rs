//! When to go another round, and when to stop the guest. Pure functions of what was observed.

mod rounds;

pub use rounds::{Budget, Next, Seen, next, predicted_downtime};
