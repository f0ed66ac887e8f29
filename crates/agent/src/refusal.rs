//! What the agent says when it does not do what it was asked for.

use crate::store::StoreError;
use api::Failure;

/// Whose turn it is after a refusal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RefusalKind {
    /// The request makes no sense as it is.
    Bad,
    /// What it names is not here.
    Unknown,
    /// It cannot be done now, or not to this VM.
    Conflict,
    /// It was tried and failed.
    Failed,
}

/// A refusal in four answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// Whose turn it is.
    pub kind: RefusalKind,
    /// What, where, why, and who runs the VM.
    pub failure: Failure,
}

impl Refusal {
    /// `what` was not done by `host`, because of `why`.
    pub fn new(kind: RefusalKind, what: impl Into<String>, host: &str, why: impl Into<String>) -> Self {
        let place = format!("agent of {host}");
        Self { kind, failure: Failure { what: what.into(), place, why: why.into(), vm_runs_on: None } }
    }

    /// The same, with the host that runs the VM.
    pub fn vm_runs_on(mut self, host: impl Into<String>) -> Self {
        self.failure.vm_runs_on = Some(host.into());
        self
    }

    /// The store failed.
    pub fn store(error: StoreError, host: &str) -> Self {
        Self::new(RefusalKind::Failed, "the agent's state could not be used", host, error.to_string())
    }
}
