//! What the owner of a VM writes down before it may be claimed.

use super::{Got, Op, Step, Steps, entry, odd, read, unknown};
use crate::record::{Entry, draft_name, offer_name};
use ports::{Offer, shared::restored};
use units::{Epoch, MigrationId};

/// How often an offer's draft is written before it is given up: a lost reply leaves a file that nobody may
/// touch again, and two in a row are no accident any more.
const DRAFTS: u32 = 3;

/// Words by which others may claim a VM: each a file that is complete before it has its name.
#[derive(Clone, Debug)]
pub struct Offering {
    place: String,
    vm: String,
    base: u64,
    change: MigrationId,
    /// Who must own it for the word to count.
    from: String,
    /// What is still to be written, the current one last.
    words: Vec<Entry>,
    /// The number of the next draft: random, so that nobody else uses it.
    number: u128,
    failed: u32,
    at: OfferAt,
}

#[derive(Clone, Copy, Debug)]
enum OfferAt {
    Base,
    Next,
    Draft,
    Link,
    /// The name is taken, or it is not known whether it is: is it this word?
    Same,
    Remove,
    Sync,
}

impl Offering {
    /// The two words of a migration: that the target may have the VM, and that the source may have it back.
    /// `number` is random.
    pub fn migration(place: &str, offer: &Offer, number: u128) -> Self {
        let owners = [offer.from.as_str(), &offer.to];
        Self::new(place, &offer.vm, offer.expected, offer.migration, &offer.from, &owners, true, number)
    }

    /// The word of a change that is no migration: `owner` may have the VM from `from`.
    pub fn change(
        place: &str,
        vm: &str,
        base: Epoch,
        id: MigrationId,
        from: &str,
        owner: &str,
        number: u128,
    ) -> Self {
        Self::new(place, vm, base, id, from, &[owner], false, number)
    }

    #[expect(clippy::too_many_arguments, reason = "each is one field")]
    fn new(
        place: &str,
        vm: &str,
        base: Epoch,
        change: MigrationId,
        from: &str,
        owners: &[&str],
        migration: bool,
        number: u128,
    ) -> Self {
        let word = |owner: &&str| Entry {
            vm: vm.to_owned(),
            epoch: base.next().0,
            owner: (*owner).to_owned(),
            from: from.to_owned(),
            change: change.to_string(),
            migration,
        };
        Self {
            place: place.to_owned(),
            vm: vm.to_owned(),
            base: base.0,
            change,
            from: from.to_owned(),
            words: owners.iter().map(word).collect(),
            number,
            failed: 0,
            at: OfferAt::Base,
        }
    }

    fn draft(&mut self) -> Step<()> {
        let Some(word) = self.words.last() else {
            self.at = OfferAt::Sync;
            return Step::Do(Op::Sync);
        };
        self.at = OfferAt::Draft;
        self.number = self.number.wrapping_add(1);
        Step::Do(Op::Make { name: draft_name(self.base, self.number), content: word.encode() })
    }

    fn offer_name(&self) -> String {
        let owner = self.words.last().map_or("", |word| &word.owner);
        offer_name(self.base, self.change, owner)
    }

    /// It has its name; the draft's goes.
    fn named(&mut self) -> Step<()> {
        self.at = OfferAt::Remove;
        Step::Do(Op::Remove { name: draft_name(self.base, self.number) })
    }
}

impl Steps for Offering {
    type Outcome = ();

    fn begin(&mut self) -> Step<()> {
        if self.base == 0 {
            self.at = OfferAt::Next;
            return read(1);
        }
        self.at = OfferAt::Base;
        read(self.base)
    }

    fn next(&mut self, got: Got) -> Step<()> {
        match (self.at, got) {
            (OfferAt::Base, Got::Content(content)) => match entry(&content, &self.vm, self.base) {
                Ok(base) if base.owner == self.from => {
                    self.at = OfferAt::Next;
                    read(self.base + 1)
                }
                Ok(base) => Step::End(Err(restored(
                    &self.place,
                    &self.vm,
                    &format!(
                        "at epoch {} it belongs to {:?}, not to {:?}",
                        base.epoch, base.owner, self.from
                    ),
                ))),
                Err(error) => Step::End(Err(error)),
            },
            (OfferAt::Base, Got::Missing) => {
                let why = format!("epoch {}, from which it is to be moved, is not there", self.base);
                Step::End(Err(restored(&self.place, &self.vm, &why)))
            }
            (OfferAt::Next, Got::Missing) => self.draft(),
            (OfferAt::Next, Got::Content(content)) => match entry(&content, &self.vm, self.base + 1) {
                Ok(entry) => unknown(format!(
                    "{} has gone on to {:?} at epoch {}; it cannot be offered from epoch {}",
                    self.vm, entry.owner, entry.epoch, self.base
                )),
                Err(error) => Step::End(Err(error)),
            },
            (OfferAt::Draft, Got::Done) => {
                self.at = OfferAt::Link;
                Step::Do(Op::Link { from: draft_name(self.base, self.number), to: self.offer_name() })
            }
            // Whatever is there now may be half a file: it is left alone, and swept later.
            (OfferAt::Draft, Got::Exists | Got::Failed(_)) if self.failed + 1 < DRAFTS => {
                self.failed += 1;
                self.draft()
            }
            (OfferAt::Link, Got::Done) => self.named(),
            (OfferAt::Link, Got::Exists | Got::Failed(_)) => {
                self.at = OfferAt::Same;
                Step::Do(Op::Read { name: self.offer_name() })
            }
            (OfferAt::Same, Got::Content(content)) => {
                if self.words.last().is_some_and(|word| word.encode() == content) {
                    return self.named();
                }
                unknown(format!("the file {} of {} holds something else", self.offer_name(), self.vm))
            }
            (OfferAt::Same, Got::Missing) => {
                unknown(format!("the file {} of {} cannot be read yet", self.offer_name(), self.vm))
            }
            // A draft that stays is swept later.
            (OfferAt::Remove, _) => {
                self.words.pop();
                self.draft()
            }
            (OfferAt::Sync, Got::Done) => Step::End(Ok(())),
            (_, got) => odd(&got),
        }
    }
}
