//! Who owns a VM: the compare-and-swap that is the commit of a migration.
//!
//! The record that decides a migration is kept by its target, under the migration's id: it starts as what the
//! source says of itself (the *offer*) and changes once, by the first claim that fits. A record per
//! migration, not per name, so that neither a late claim of an old migration nor another VM of the same name
//! can ever disturb it.
//!
//! Beside these, each host keeps for each VM name the last owner that it knows of: what people are told.

use super::{
    ArrivalRecord, Standing, Store, StoreError, Trouble, VmRecord, decode, encode, records::Owner, target,
    vms,
};
use ports::{Claim, Claimed, Ownership, OwnershipRecord, RunState};
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};
use std::io;
use units::{Epoch, MigrationId};

/// Migration id → [`Offer`].
const OFFERS: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("offers");
/// VM name → [`Owner`], as far as this host knows.
const OWNERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("owners");

/// The record that decides one migration.
#[derive(Debug, Serialize, Deserialize)]
struct Offer {
    vm: String,
    #[serde(flatten)]
    owner: Owner,
    /// Whether this host may claim it from the owner. Nobody else ever may.
    open: bool,
    /// Which record decides, by its identity; empty: this one. What another has decided is only written down
    /// here.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    record: String,
}

impl Offer {
    /// What `claim` comes to on the host `here`, and whether that changes the record.
    fn decide(&self, claim: &Claim, here: &str) -> (Claimed, bool) {
        let epoch = claim.expected.next();
        let decided = self.owner.migration == Some(claim.migration);
        if decided && self.owner.owner == claim.claimer && self.owner.epoch == epoch {
            return (Claimed::Yours(epoch), false);
        }
        let may = (self.open && claim.claimer == here) || self.owner.owner == claim.claimer;
        if !decided && self.owner.epoch == claim.expected && may {
            return (Claimed::Yours(epoch), true);
        }
        (Claimed::Lost(self.owner.clone().into()), false)
    }
}

/// Why this host does not take a VM in.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    /// There is a VM of this name.
    #[error("host {host} has a VM named {vm} already")]
    NameTaken {
        /// This host.
        host: String,
        /// The name.
        vm: String,
    },
    /// The migration's id was seen before.
    #[error("migration {0} was seen before and is over")]
    Over(MigrationId),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

pub(super) fn prepare(change: &WriteTransaction) -> Result<(), Trouble> {
    change.open_table(OFFERS)?;
    change.open_table(OWNERS)?;
    Ok(())
}

/// A VM that was started or adopted here belongs here.
pub(super) fn start_here(change: &WriteTransaction, vm: &str, host: &str) -> Result<(), Trouble> {
    let mut owners = change.open_table(OWNERS)?;
    let before: Option<Owner> = owners.get(vm)?.map(|row| decode(row.value())).transpose()?;
    let epoch = before.map_or(Epoch(1), |owner| owner.epoch.next());
    owners.insert(vm, encode(&Owner { owner: host.to_owned(), epoch, migration: None })?.as_slice())?;
    Ok(())
}

/// What this host knows of the VM's owner from now on.
pub(super) fn note(change: &WriteTransaction, vm: &str, record: &OwnershipRecord) -> Result<(), Trouble> {
    change.open_table(OWNERS)?.insert(vm, encode(&Owner::from(record))?.as_slice())?;
    Ok(())
}

/// Nobody but the offering source may claim any more, if nobody has yet.
pub(super) fn withdraw(change: &WriteTransaction, migration: MigrationId) -> Result<(), Trouble> {
    let mut offers = change.open_table(OFFERS)?;
    let row: Option<Offer> = offers.get(migration.0)?.map(|row| decode(row.value())).transpose()?;
    if let Some(mut offer) = row {
        offer.open = false;
        offers.insert(migration.0, encode(&offer)?.as_slice())?;
    }
    Ok(())
}

impl Store {
    /// Takes in a VM that a source offers: records the VM (its standing says which migration brings it and
    /// from where), the journal of its arrival, and the ownership record on which that migration will be
    /// decided, all in one transaction. `of_source` is what the source says of its ownership.
    pub fn accept(&self, vm: &VmRecord, of_source: &OwnershipRecord) -> Result<super::Arrival, OfferError> {
        self.accept_decided_by(vm, of_source, "")
    }

    /// The same, where a shared record of this identity decides; empty: this one does.
    pub fn accept_decided_by(
        &self,
        vm: &VmRecord,
        of_source: &OwnershipRecord,
        record: &str,
    ) -> Result<super::Arrival, OfferError> {
        let Standing::Arriving { migration, from } = &vm.standing else {
            panic!("only an arriving VM is accepted");
        };
        enum Place {
            Free,
            Taken,
            Over,
        }
        let seen = self.change(&format!("take in the VM {}", vm.name), |change| {
            let mut vms = change.open_table(vms::VMS)?;
            if vms.get(vm.name.as_str())?.is_some() {
                return Ok(Place::Taken);
            }
            let mut offers = change.open_table(OFFERS)?;
            if offers.get(migration.0)?.is_some() {
                return Ok(Place::Over);
            }
            let (owner, record) = (Owner::from(of_source), record.to_owned());
            let offer = Offer { vm: vm.name.clone(), owner, open: true, record };
            offers.insert(migration.0, encode(&offer)?.as_slice())?;
            vms.insert(vm.name.as_str(), encode(vm)?.as_slice())?;
            let arrival = ArrivalRecord {
                migration: *migration,
                from: from.clone(),
                claimed: false,
                incomplete: false,
                claiming: false,
                goes_on: RunState::Running,
                went_on: false,
            };
            target::put(change, &vm.name, &arrival)?;
            Ok(Place::Free)
        })?;
        match seen {
            Place::Free => Ok(super::Arrival::new(self.clone(), vm.name.clone(), *migration)),
            Place::Taken => Err(OfferError::NameTaken { host: self.host().to_owned(), vm: vm.name.clone() }),
            Place::Over => Err(OfferError::Over(*migration)),
        }
    }

    /// The VM's owner, as far as this host knows.
    pub fn owner(&self, vm: &str) -> Result<Option<OwnershipRecord>, StoreError> {
        self.look(&format!("look up the owner of {vm}"), |look| {
            let row =
                look.open_table(OWNERS)?.get(vm)?.map(|row| decode::<Owner>(row.value())).transpose()?;
            Ok(row.map(OwnershipRecord::from))
        })
    }

    fn claim_here(&self, claim: &Claim) -> io::Result<Claimed> {
        let claimed = self.change(&format!("claim the VM {}", claim.vm), |change| {
            let mut offers = change.open_table(OFFERS)?;
            let row: Option<Offer> =
                offers.get(claim.migration.0)?.map(|row| decode(row.value())).transpose()?;
            let Some(mut offer) = row.filter(|offer| offer.vm == claim.vm) else {
                return Ok(None);
            };
            let (claimed, swap) = offer.decide(claim, self.host());
            if swap {
                let record = OwnershipRecord {
                    owner: claim.claimer.clone(),
                    epoch: claim.expected.next(),
                    migration: Some(claim.migration),
                };
                offer.owner = Owner::from(&record);
                offer.open = false;
                offers.insert(claim.migration.0, encode(&offer)?.as_slice())?;
                if claim.claimer == self.host() {
                    note(change, &claim.vm, &record)?;
                    target::claimed(change, claim)?;
                    vms::edit(change, &claim.vm, |vm| vm.standing = Standing::Here)?;
                }
            }
            Ok(Some(claimed))
        })?;
        claimed.ok_or_else(|| {
            let why = format!(
                "host {} keeps no ownership record for migration {} of {}",
                self.host(),
                claim.migration,
                claim.vm
            );
            io::Error::new(io::ErrorKind::NotFound, why)
        })
    }

    /// Which record decides this migration, by its identity; empty: this one. `None`: nothing is known of it
    /// here.
    pub fn decided_by(&self, migration: MigrationId) -> Result<Option<String>, StoreError> {
        Ok(self.offer_of(migration)?.map(|offer| offer.record))
    }

    /// This host's own claim to a VM whose arrival is recorded.
    pub fn own_claim(&self, migration: MigrationId) -> Result<Option<Claim>, StoreError> {
        Ok(self.offer_of(migration)?.map(|offer| {
            let decided = offer.owner.migration == Some(migration);
            let before = offer.owner.epoch.0.saturating_sub(u64::from(decided));
            Claim { vm: offer.vm, migration, expected: Epoch(before), claimer: self.host().to_owned() }
        }))
    }

    /// Before a shared record is asked for the VM on behalf of this host: from now on only that record
    /// decides. An error if its arrival was given up.
    pub fn begin_claim(&self, claim: &Claim) -> io::Result<()> {
        let what = format!("record that {} is being claimed", claim.vm);
        let there =
            self.change(&what, |change| target::claiming(change, &claim.vm, claim.migration, true))?;
        if there { Ok(()) } else { Err(io::Error::other(format!("cannot {what}: its arrival was given up"))) }
    }

    /// The shared record says that somebody else owns the VM, or it can never run here any more: its arrival
    /// may be given up.
    pub fn lose_claim(&self, vm: &str, migration: MigrationId) -> Result<(), StoreError> {
        self.change(&format!("record that {vm} is not this host's"), |change| {
            target::claiming(change, vm, migration, false).map(drop)
        })
    }

    fn offer_of(&self, migration: MigrationId) -> Result<Option<Offer>, StoreError> {
        self.look("look up a migration", |look| {
            look.open_table(OFFERS)?.get(migration.0)?.map(|row| decode(row.value())).transpose()
        })
    }

    /// Whether this migration has brought its VM here, all of it.
    pub fn has_arrived(&self, migration: MigrationId) -> Result<bool, StoreError> {
        self.look("look up a migration", |look| {
            let offers = look.open_table(OFFERS)?;
            let Some(offer) = offers.get(migration.0)?.map(|row| decode::<Offer>(row.value())).transpose()?
            else {
                return Ok(false);
            };
            let ours = offer.owner.migration == Some(migration) && offer.owner.owner == self.host();
            Ok(ours && target::entry(look, &offer.vm)?.is_none_or(|arrival| arrival.migration != migration))
        })
    }

    /// Forgets the record on which a migration was decided. Only once the source has said that it will not
    /// ask again.
    pub fn forget_offer(&self, migration: MigrationId) -> Result<(), StoreError> {
        self.change("forget a decided migration", |change| {
            change.open_table(OFFERS)?.remove(migration.0)?;
            Ok(())
        })
    }
}

/// Keeps the records of the migrations that come to this host.
impl Ownership for Store {
    fn identity(&self) -> io::Result<String> {
        Ok(String::new())
    }

    fn offer(&self, _: &ports::Offer) -> io::Result<()> {
        // A migration to here was written down when it was prepared.
        Ok(())
    }

    fn claim(&self, claim: &Claim) -> io::Result<Claimed> {
        self.claim_here(claim)
    }
}

/// See `super::fuzz::read_row`.
pub(super) fn read_owner(row: &[u8]) -> bool {
    decode::<Owner>(row).is_ok()
}

/// See `super::fuzz::read_row`.
pub(super) fn read_offer(row: &[u8]) -> bool {
    decode::<Offer>(row).is_ok()
}
