//! A step of a migration that came to nothing.

use crate::ports::MachineError;
use std::io;

/// What was tried and why it came to nothing: what the state machines are told, and then people.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub(crate) struct Broken {
    pub(crate) what: String,
    pub(crate) why: String,
}

impl Broken {
    pub(crate) fn new(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { what: what.into(), why: why.into() }
    }
}

impl From<MachineError> for Broken {
    fn from(MachineError { what, why }: MachineError) -> Self {
        Self { what, why }
    }
}

/// Names the step at which the system failed.
pub(crate) fn why(what: &str) -> impl FnOnce(io::Error) -> Broken {
    move |error| Broken::new(what, error.to_string())
}
