//! What became of a VM: the one value that headline, exit status and JSON of a report come from.

use crate::{Outcome, Report};
use ports::RunState;
use serde::{Deserialize, Serialize};

/// Where a VM is once a migration is over, and what it does there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "vm", rename_all = "kebab-case")]
pub enum Fate {
    /// It does on this host what it did before: mostly it runs.
    On {
        /// The host.
        host: String,
        /// What it does.
        state: RunState,
    },
    /// It belongs to this host, and stands still there although it ran before.
    Stuck {
        /// The host.
        host: String,
    },
    /// Its QEMU on this host has ended: nobody runs it.
    Ended {
        /// The host.
        host: String,
    },
    /// Nobody can say yet who owns it.
    Unknown,
}

impl Report {
    /// What became of the VM. Of a report that does not say so itself, by its outcome and its error.
    pub fn fate(&self) -> Fate {
        if let Some(fate) = &self.fate {
            return fate.clone();
        }
        let runs = |host: &String| Fate::On { host: host.clone(), state: RunState::Running };
        let named = self.error.as_ref().and_then(|error| error.vm_runs_on.as_ref());
        match (self.outcome, &self.error, named) {
            (Outcome::InDoubt, ..) => Fate::Unknown,
            (Outcome::Completed, None, _) => runs(&self.to),
            (Outcome::Completed, Some(_), None) => Fate::Stuck { host: self.to.clone() },
            (_, _, Some(host)) => runs(host),
            (Outcome::Cancelled, ..) => runs(&self.from),
            (Outcome::Failed, _, None) => Fate::Unknown,
        }
    }
}
