//! Ownership in etcd.
//!
//! ```text
//! /whimbrel/identity                      a random number: clusters made alike have one number
//! /whimbrel/vms/web1/owner                who owns web1, from which epoch on
//! /whimbrel/vms/web1/offers/…7/MIGRATION  by the owner at epoch 7; once decided, by what
//! ```
//!
//! A claim is one transaction: if the owner is still who it was when it was offered, and the offer is still
//! open, both become the new owner. Otherwise the offer says how it was decided, for as long as it is kept:
//! so the answer stays. All transactions go through the cluster's log, so none of them sees anything old.
//!
//! *From an old backup*: the offer of this very migration must be there, the owner must be the one that it
//! starts from, and the cluster's revision must never be lower than this host has seen it; hosts keep that,
//! with the cluster's identity, over restarts.
//!
//! Not supported: users and passwords. Let only the hosts reach etcd.

use crate::{
    changing::Changing,
    draw,
    gateway::{Gateway, Outcome, delete, exists, get, is, put},
    memory::Memory,
    prune::KEPT_EPOCHS,
    record::{Entry, check_name},
};
use pki::ClientFiles;
use ports::{
    Claim, Claimed, Offer, Ownership, OwnershipRecord,
    shared::{NOBODY, SharedRecord, not_behind, restored},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    io::{self, ErrorKind},
    sync::atomic::{AtomicU64, Ordering},
};
use units::{Epoch, MigrationId};

const IDENTITY: &str = "/whimbrel/identity";

/// How often a change that is no migration begins again because somebody else was faster.
const TRIES: u32 = 16;

/// A cluster.
#[derive(Debug)]
pub struct Etcd {
    gateway: Gateway,
    place: String,
    memory: Memory,
    /// The newest revision that was seen.
    seen: AtomicU64,
}

/// The source's word, and what became of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Word {
    from: String,
    to: String,
    /// Who took it.
    taken: Option<String>,
}

fn owner_key(vm: &str) -> String {
    format!("/whimbrel/vms/{vm}/owner")
}

fn offers_key(vm: &str, epoch: u64) -> String {
    format!("/whimbrel/vms/{vm}/offers/{epoch:020}/")
}

fn offer_key(vm: &str, epoch: Epoch, migration: MigrationId) -> String {
    format!("{}{migration}", offers_key(vm, epoch.0))
}

/// A claim's owner and offer as they are.
struct Stands {
    now: Option<Entry>,
    word: Option<Word>,
    /// The offer as it is written.
    bytes: Option<Vec<u8>>,
}

/// What the n-th read of a transaction found.
fn value(outcome: &Outcome, n: usize) -> Option<Vec<u8>> {
    outcome.values.get(n).cloned().flatten()
}

impl Etcd {
    /// The cluster with these end points: `https://HOST:PORT` each with `tls`, `http://HOST:PORT` without.
    /// Nothing is asked yet.
    pub fn new(endpoints: &[String], tls: Option<&ClientFiles>, memory: Memory) -> io::Result<Self> {
        let mut names = endpoints.to_vec();
        names.sort();
        let place = format!("etcd at {}", names.join(", "));
        let seen = AtomicU64::new(memory.seen(&place).unwrap_or(0));
        Ok(Self { gateway: Gateway::new(endpoints, tls)?, place, memory, seen })
    }

    /// A transaction of a cluster that has not gone backwards.
    fn transact(&self, compare: &[Value], success: &[Value], failure: &[Value]) -> io::Result<Outcome> {
        // Read before it is asked: answers may overtake each other.
        let before = self.seen.load(Ordering::SeqCst);
        let outcome = self.gateway.transact(compare, success, failure)?;
        if outcome.revision < before {
            let why = format!(
                "{} has gone backwards, from revision {before} to {}: it was restored from an old backup, \
                 and nothing is decided by it",
                self.place, outcome.revision
            );
            return Err(io::Error::new(ErrorKind::InvalidData, why));
        }
        self.seen.fetch_max(outcome.revision, Ordering::SeqCst);
        Ok(outcome)
    }

    fn entry(&self, vm: &str, bytes: Option<Vec<u8>>) -> io::Result<Option<Entry>> {
        let place = format!("{}, key {}", self.place, owner_key(vm));
        bytes.map(|bytes| Entry::decode(&bytes, &place)).transpose()
    }

    /// The reads of a claim, first of the owner, then of the offer with this key.
    fn stands(&self, vm: &str, offer: &str, outcome: &Outcome) -> io::Result<Stands> {
        let bytes = value(outcome, 1);
        let word = bytes.as_deref().map(serde_json::from_slice::<Word>).transpose().map_err(|e| {
            let why = format!("{}: the key {offer} holds no offer: {e}", self.place);
            io::Error::new(ErrorKind::InvalidData, why)
        })?;
        Ok(Stands { now: self.entry(vm, value(outcome, 0))?, word, bytes })
    }

    fn now(&self, vm: &str) -> io::Result<Option<Entry>> {
        check_name(vm)?;
        self.identity()?;
        let outcome = self.transact(&[], &[get(&owner_key(vm))], &[])?;
        self.entry(vm, value(&outcome, 0))
    }
}

impl Changing for Etcd {
    fn change(
        &self,
        vm: &str,
        owner: &str,
        known: Option<Epoch>,
        may: &dyn Fn(&str) -> bool,
    ) -> io::Result<Claimed> {
        for _ in 0..TRIES {
            let now = self.now(vm)?;
            let record = now.clone().map(OwnershipRecord::from);
            not_behind(&self.place, vm, record.as_ref(), known)?;
            let base = record.as_ref().map_or(Epoch(0), |record| record.epoch);
            let from = record.as_ref().map_or(NOBODY.to_owned(), |record| record.owner.clone());
            if let Some(record) = record.filter(|record| !may(&record.owner)) {
                return Ok(Claimed::Lost(record));
            }
            let next = Entry {
                vm: vm.to_owned(),
                epoch: base.next().0,
                owner: owner.to_owned(),
                from,
                change: MigrationId(draw()?).to_string(),
                migration: false,
            };
            let key = owner_key(vm);
            let condition = now.map_or_else(|| exists(&key, false), |now| is(&key, &now.encode()));
            let outcome = self.transact(&[condition], &[put(&key, &next.encode())], &[get(&key)])?;
            // A member that answers the second time finds what it did the first time.
            if outcome.succeeded || value(&outcome, 0) == Some(next.encode()) {
                return Ok(Claimed::Yours(base.next()));
            }
        }
        let why = format!("{}: others were always faster to change who owns {vm}; try again", self.place);
        Err(io::Error::new(ErrorKind::ResourceBusy, why))
    }
}

impl Ownership for Etcd {
    fn identity(&self) -> io::Result<String> {
        let number = format!("{}\n", MigrationId(draw()?));
        let read = get(IDENTITY);
        let made = put(IDENTITY, number.as_bytes());
        // Whoever remembers a cluster does not make it another one.
        let known = self.memory.has_met(&self.place);
        let success = if known { vec![read.clone()] } else { vec![made, read.clone()] };
        let outcome = self.transact(&[exists(IDENTITY, false)], &success, &[read])?;
        let found = value(&outcome, 0).and_then(|bytes| String::from_utf8(bytes).ok());
        let number = found.and_then(|text| text.trim_end().parse::<MigrationId>().ok());
        let identity = match number {
            Some(number) => format!("etcd {:x} {number}", outcome.cluster),
            None => format!("etcd {:x} without an identity", outcome.cluster),
        };
        self.memory.meet(&self.place, &identity, None)?;
        match number {
            Some(_) => Ok(identity),
            None => Err(io::Error::new(
                ErrorKind::InvalidData,
                format!("{}: its key {IDENTITY} cannot be read", self.place),
            )),
        }
    }

    fn offer(&self, offer: &Offer) -> io::Result<()> {
        let Offer { vm, migration, expected, from, to } = offer;
        check_name(from)?;
        check_name(to)?;
        let now = self.now(vm)?;
        let Some(now) = now.filter(|now| now.epoch == expected.0 && now.owner == *from) else {
            return Err(restored(
                &self.place,
                vm,
                &format!("it does not say that {from} owns it at epoch {expected}"),
            ));
        };
        let key = offer_key(vm, *expected, *migration);
        let word = Word { from: from.clone(), to: to.clone(), taken: None };
        let bytes = serde_json::to_vec(&word)?;
        let mut acts = vec![put(&key, &bytes)];
        if expected.0 > KEPT_EPOCHS {
            acts.push(delete(&offers_key(vm, 0), &offers_key(vm, expected.0 - KEPT_EPOCHS)));
        }
        let conditions = [is(&owner_key(vm), &now.encode()), exists(&key, false)];
        let outcome = self.transact(&conditions, &acts, &[get(&key)])?;
        if !outcome.succeeded && value(&outcome, 0) != Some(bytes) {
            let why = format!("{}: {vm} cannot be offered: its owner has just changed", self.place);
            return Err(io::Error::other(why));
        }
        let identity = self.identity()?;
        self.memory.meet(&self.place, &identity, Some(outcome.revision))
    }

    fn claim(&self, claim: &Claim) -> io::Result<Claimed> {
        let Claim { vm, migration, expected, claimer } = claim;
        check_name(vm)?;
        check_name(claimer)?;
        let (owner, offer) = (owner_key(vm), offer_key(vm, *expected, *migration));
        let read = [get(&owner), get(&offer)];
        let look = |outcome: &Outcome| self.stands(vm, &offer, outcome);
        let outcome = self.transact(&[], &read, &[])?;
        let Stands { mut now, mut word, bytes } = look(&outcome)?;
        let open = match (&now, &word) {
            (Some(now), Some(word)) => {
                let may = word.to == *claimer || word.from == *claimer;
                word.taken.is_none() && now.epoch == expected.0 && now.owner == word.from && may
            }
            _ => false,
        };
        if let (true, Some(before), Some(said), Some(bytes)) = (open, now.clone(), word.clone(), bytes) {
            let next = Entry {
                vm: vm.clone(),
                epoch: expected.next().0,
                owner: claimer.clone(),
                from: before.owner.clone(),
                change: migration.to_string(),
                migration: true,
            };
            let taken = serde_json::to_vec(&Word { taken: Some(claimer.clone()), ..said })?;
            let conditions = [is(&owner, &before.encode()), is(&offer, &bytes)];
            let acts = [put(&owner, &next.encode()), put(&offer, &taken)];
            let outcome = self.transact(&conditions, &acts, &read)?;
            if outcome.succeeded {
                return Ok(Claimed::Yours(expected.next()));
            }
            Stands { now, word, .. } = look(&outcome)?;
        }
        let lost = |owner: String, epoch: Epoch, migration| {
            Ok(Claimed::Lost(OwnershipRecord { owner, epoch, migration }))
        };
        let taken = word.as_ref().and_then(|word| word.taken.clone());
        match (taken, now) {
            (Some(taken), Some(now)) if now.epoch > expected.0 => {
                if taken == *claimer {
                    return Ok(Claimed::Yours(expected.next()));
                }
                lost(taken, expected.next(), Some(*migration))
            }
            (None, Some(now)) if now.epoch > expected.0 => {
                let record = OwnershipRecord::from(now);
                lost(record.owner, record.epoch, record.migration)
            }
            (_, now) => {
                let at =
                    now.map_or("nothing".to_owned(), |now| format!("{:?} at epoch {}", now.owner, now.epoch));
                let why = format!(
                    "the word by which {claimer} may claim it at epoch {expected} is not there, or not from \
                     its owner; there is {at}"
                );
                Err(restored(&self.place, vm, &why))
            }
        }
    }
}

impl SharedRecord for Etcd {
    fn words(&self) -> String {
        self.place.clone()
    }

    fn look(&self, vm: &str) -> io::Result<Option<OwnershipRecord>> {
        Ok(self.now(vm)?.map(OwnershipRecord::from))
    }

    fn start(&self, vm: &str, host: &str, fenced: Option<&str>, known: Option<Epoch>) -> io::Result<Claimed> {
        self.start_here(vm, host, fenced, known)
    }

    fn end(&self, vm: &str, host: &str, known: Option<Epoch>) -> io::Result<()> {
        self.end_here(vm, host, known)
    }
}
