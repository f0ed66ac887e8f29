//! What went wrong, in words or as JSON, and the exit status for it.

use crate::words::json;
use api::{Failure, Fate, Outcome, Report};
use std::{collections::BTreeMap, io, process::ExitCode};

/// Nothing more to wish for.
pub(crate) const DONE: u8 = 0;
/// It failed; the VM still runs where it was.
pub(crate) const FAILED: u8 = 1;
/// The command was wrong.
pub(crate) const WRONG_USE: u8 = 2;
/// Nobody can say who runs the VM.
pub(crate) const IN_DOUBT: u8 = 3;
/// Cancelled, as by the signal.
pub(crate) const CANCELLED: u8 = 130;

/// Where something went wrong on this side of the socket.
const OURS: &str = "this command";

/// Why a command ended without doing what it should.
#[derive(Debug)]
pub(crate) struct Trouble {
    pub(crate) status: u8,
    /// Boxed: every result of this program has room for it.
    pub(crate) failure: Box<Failure>,
    /// What to do about it.
    pub(crate) next: Option<String>,
}

impl Trouble {
    /// Something on this side of the socket.
    pub(crate) fn local(status: u8, what: impl Into<String>, why: impl Into<String>) -> Self {
        let (what, why) = (what.into(), why.into());
        let place = OURS.to_owned();
        Self { status, failure: Box::new(Failure { what, place, why, vm_runs_on: None }), next: None }
    }

    /// Whether the agent has said nothing of it.
    pub(crate) fn is_ours(&self) -> bool {
        self.failure.place == OURS
    }

    pub(crate) fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    /// Says it, on standard error or, for programs, on standard output.
    pub(crate) fn tell(self, as_json: bool) -> ExitCode {
        if as_json {
            println!("{}", json(&BTreeMap::from([("error", &self.failure)])));
        } else {
            eprint!("{}", self.words());
        }
        ExitCode::from(self.status)
    }

    fn words(&self) -> String {
        let Failure { what, place, why, vm_runs_on } = &*self.failure;
        let mut words = format!("error: {what}\n");
        for (i, line) in why.lines().enumerate() {
            words += if i == 0 { "  why:   " } else { "         " };
            words += line;
            words.push('\n');
        }
        if !self.is_ours() {
            words += &format!("  where: {place}\n");
        }
        if let Some(host) = vm_runs_on {
            words += &format!("  the VM runs on {host}\n");
        }
        if let Some(next) = &self.next {
            words += &format!("  next:  {next}\n");
        }
        words
    }
}

/// Output that cannot be written, as into a closed pipe.
impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::local(FAILED, "cannot write the output", error.to_string())
    }
}

/// The exit status for how a migration ended.
pub(crate) fn status_of(report: &Report) -> u8 {
    match (report.outcome, report.fate()) {
        (Outcome::InDoubt, _) | (_, Fate::Unknown) => IN_DOUBT,
        (Outcome::Completed, Fate::On { .. }) if report.verified != Some(false) => DONE,
        (Outcome::Cancelled, Fate::On { .. }) => CANCELLED,
        _ => FAILED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_four_answers_and_the_next_step_are_said() {
        let failure = Failure {
            what: "cannot migrate web1".to_owned(),
            place: "agent of hosta".to_owned(),
            why: "no bridge br0\nnot enough memory".to_owned(),
            vm_runs_on: Some("hosta".to_owned()),
        };
        let trouble =
            Trouble { status: FAILED, failure: Box::new(failure), next: Some("mend it".to_owned()) };
        let expected = "\
error: cannot migrate web1
  why:   no bridge br0
         not enough memory
  where: agent of hosta
  the VM runs on hosta
  next:  mend it
";
        assert_eq!(trouble.words(), expected);
    }
}
