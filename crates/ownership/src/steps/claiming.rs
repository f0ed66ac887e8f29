//! One claim.

use super::{Got, Op, Step, Steps, entry, newest, odd, read, unknown};
use crate::record::{epoch_name, offer_name};
use ports::{Claim, Claimed, shared::restored};
use units::Epoch;

/// One claim: a link from the offer to the name of the next epoch.
#[derive(Clone, Debug)]
pub struct Claiming {
    place: String,
    claim: Claim,
    at: ClaimAt,
}

#[derive(Clone, Debug)]
enum ClaimAt {
    /// Is it decided already?
    Next,
    /// Is there what it starts from?
    Base,
    /// Now or never.
    Link,
    /// The name was taken: by whom?
    Taken,
    /// The answer is made durable before it is given.
    Settle(Claimed),
    /// Something is missing: has everybody gone on since?
    List,
    Newest(u64),
}

impl Claiming {
    /// In the directory that people know as `place`.
    pub fn new(place: &str, claim: &Claim) -> Self {
        Self { place: place.to_owned(), claim: claim.clone(), at: ClaimAt::Next }
    }

    fn base(&self) -> u64 {
        self.claim.expected.0
    }

    fn target(&self) -> u64 {
        self.claim.expected.next().0
    }

    fn link(&mut self) -> Step<Claimed> {
        self.at = ClaimAt::Link;
        let from = offer_name(self.base(), self.claim.migration, &self.claim.claimer);
        Step::Do(Op::Link { from, to: epoch_name(self.target()) })
    }

    /// The next epoch's file was read: that decides, for ever.
    fn decided(&mut self, content: &[u8], epoch: u64) -> Step<Claimed> {
        let entry = match entry(content, &self.claim.vm, epoch) {
            Ok(entry) => entry,
            Err(error) => return Step::End(Err(error)),
        };
        let ours = epoch == self.target()
            && entry.owner == self.claim.claimer
            && entry.change == self.claim.migration.to_string();
        self.settle(if ours { Claimed::Yours(Epoch(epoch)) } else { Claimed::Lost(entry.into()) })
    }

    fn settle(&mut self, answer: Claimed) -> Step<Claimed> {
        self.at = ClaimAt::Settle(answer);
        Step::Do(Op::Sync)
    }

    fn missing(&self, what: &str) -> Step<Claimed> {
        Step::End(Err(restored(&self.place, &self.claim.vm, what)))
    }
}

impl Steps for Claiming {
    type Outcome = Claimed;

    fn begin(&mut self) -> Step<Claimed> {
        self.at = ClaimAt::Next;
        read(self.target())
    }

    fn next(&mut self, got: Got) -> Step<Claimed> {
        match (self.at.clone(), got) {
            (ClaimAt::Next | ClaimAt::Taken, Got::Content(content)) => self.decided(&content, self.target()),
            // The first epoch starts from nothing.
            (ClaimAt::Next, Got::Missing) if self.base() == 0 => self.link(),
            (ClaimAt::Next, Got::Missing) => {
                self.at = ClaimAt::Base;
                read(self.base())
            }
            (ClaimAt::Base, Got::Content(content)) => match entry(&content, &self.claim.vm, self.base()) {
                Ok(_) => self.link(),
                Err(error) => Step::End(Err(error)),
            },
            (ClaimAt::Link, Got::Done) => self.settle(Claimed::Yours(Epoch(self.target()))),
            (ClaimAt::Link, Got::Exists) => {
                self.at = ClaimAt::Taken;
                read(self.target())
            }
            (ClaimAt::Taken, Got::Missing) => {
                unknown(format!("the next epoch of {} is decided, but cannot be read yet", self.claim.vm))
            }
            (ClaimAt::Settle(answer), Got::Done) => Step::End(Ok(answer)),
            (ClaimAt::Base | ClaimAt::Link, Got::Missing) => {
                self.at = ClaimAt::List;
                Step::Do(Op::List)
            }
            (ClaimAt::List, Got::Names(names)) => match newest(&names) {
                Some(newest) if newest >= self.target() => {
                    self.at = ClaimAt::Newest(newest);
                    read(newest)
                }
                _ => self.missing(&format!(
                    "the word by which {} may claim it at epoch {} is not there",
                    self.claim.claimer, self.claim.expected
                )),
            },
            (ClaimAt::List, Got::Missing) => self.missing("nothing is known of it at all"),
            (ClaimAt::Newest(epoch), Got::Content(content)) => self.decided(&content, epoch),
            (ClaimAt::Newest(epoch), Got::Missing) => {
                unknown(format!("epoch {epoch} of {} was listed, but cannot be read yet", self.claim.vm))
            }
            (_, got) => odd(&got),
        }
    }
}
