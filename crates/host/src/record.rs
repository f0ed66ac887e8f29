//! Who owns a VM: each migration is decided by one record, the one that both sides named when it began.

use agent::{
    config::{Config, EtcdPlace, OwnershipPlace},
    store::Store,
};
use ownership::{Etcd, Memory, Patient, SharedDir};
use ports::shared::SharedRecord;
use ports::{Claim, Claimed, Offer, Ownership};
use std::{fs, io, sync::Arc};

/// What the configuration says; `None`: the target of each migration keeps the record. Nothing is asked yet:
/// VMs are served also while the record cannot be reached.
pub fn shared_record(config: &Config) -> io::Result<Option<Arc<dyn SharedRecord>>> {
    let memory = || {
        fs::create_dir_all(&config.state_dir)?;
        Memory::at(&config.state_dir.join("ownership.json"))
    };
    let record: Arc<dyn SharedRecord> = match &config.ownership {
        OwnershipPlace::Target => return Ok(None),
        OwnershipPlace::Directory(path) => Arc::new(SharedDir::new(path, memory()?)),
        OwnershipPlace::Etcd(EtcdPlace { endpoints, tls }) => {
            Arc::new(Etcd::new(endpoints, tls.as_ref(), memory()?)?)
        }
    };
    Ok(Some(Arc::new(Patient::new(record))))
}

/// The shared record of this identity, or what is wrong with asking it here.
pub(crate) fn named(
    shared: Option<&Arc<dyn SharedRecord>>,
    identity: &str,
) -> io::Result<Arc<dyn SharedRecord>> {
    let shared = shared.ok_or_else(|| {
        let why = format!(
            "it is decided by the shared ownership record ({identity}), which this agent's configuration \
             does not name any more; name it under [ownership] and start the agent again"
        );
        io::Error::other(why)
    })?;
    let here = shared.identity()?;
    if here == identity {
        return Ok(shared.clone());
    }
    let why = format!("it is decided by the ownership record {identity}, but {} is {here}", shared.words());
    Err(io::Error::other(why))
}

/// Why a VM whose source names the record `theirs` is not taken in; `None` if both ask the same.
pub(crate) fn differ(shared: Option<&Arc<dyn SharedRecord>>, theirs: &str, from: &str) -> Option<String> {
    let mend = "give both hosts the same [ownership] in their agents' configurations";
    match (shared, theirs) {
        (None, "") => None,
        (None, theirs) => Some(format!(
            "{from} keeps who owns a VM in a shared record ({theirs}), this host in none; {mend}"
        )),
        (Some(ours), "") => Some(format!(
            "this host keeps who owns a VM in {}, {from} in no shared record; {mend}",
            ours.words()
        )),
        (Some(ours), theirs) => match ours.identity() {
            Ok(here) if here == theirs => None,
            Ok(here) => Some(format!(
                "this host keeps who owns a VM in {} ({here}), {from} in another record ({theirs}). The same \
                 path or address can lead to different places: is the datastore mounted on both? Otherwise \
                 {mend}",
                ours.words()
            )),
            Err(error) => Some(format!("the record that says who owns a VM cannot be asked here: {error}")),
        },
    }
}

/// The records of the migrations that come to this host.
pub(crate) struct HostRecord {
    pub(crate) store: Store,
    pub(crate) shared: Option<Arc<dyn SharedRecord>>,
}

impl Ownership for HostRecord {
    fn identity(&self) -> io::Result<String> {
        self.store.identity()
    }

    fn offer(&self, offer: &Offer) -> io::Result<()> {
        // Here these are records of migrations to this host, which were written down when they were prepared.
        self.store.offer(offer)
    }

    fn claim(&self, claim: &Claim) -> io::Result<Claimed> {
        let decided_by = self.store.decided_by(claim.migration)?.unwrap_or_default();
        if decided_by.is_empty() {
            return self.store.claim(claim);
        }
        let shared = named(self.shared.as_ref(), &decided_by)?;
        let ours = claim.claimer == self.store.host();
        if ours {
            // If we die in the middle, the next agent knows that only the record can tell.
            self.store.begin_claim(claim)?;
        }
        match shared.claim(claim)? {
            // What was decided there is written down here, with all that follows from it. It cannot come out
            // otherwise: nobody claims by this host's own record of such a migration.
            Claimed::Yours(epoch) if ours => match self.store.claim(claim)? {
                Claimed::Yours(_) => Ok(Claimed::Yours(epoch)),
                Claimed::Lost(record) => {
                    let why = format!(
                        "{} is this host's, but its arrival was given up for {}",
                        claim.vm, record.owner
                    );
                    Err(io::Error::other(why))
                }
            },
            Claimed::Lost(record) if ours => {
                self.store.lose_claim(&claim.vm, claim.migration)?;
                Ok(Claimed::Lost(record))
            }
            answer => Ok(answer),
        }
    }
}
