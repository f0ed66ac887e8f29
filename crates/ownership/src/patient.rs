//! Asks a record that may not answer: a datastore that is gone can hold a system call for ever.

use ports::{Claim, Claimed, Offer, Ownership, OwnershipRecord, shared::SharedRecord};
use std::{
    collections::HashSet,
    io::{self, ErrorKind},
    sync::{Arc, Mutex, mpsc::channel},
    thread,
    time::Duration,
};
use units::{Epoch, Locked};

/// After so long without an answer, "not known, ask again" is the answer. The question may still be answered
/// later: all of them may be, at any time, or never. So it decides nothing; it bounds how long a guest that
/// could still go on stands still, and how soon people are told. A datastore that answers takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks by threads of their own, one question of a kind about a VM at a time.
pub struct Patient {
    record: Arc<dyn SharedRecord>,
    patience: Duration,
    open: Arc<Mutex<HashSet<String>>>,
}

impl Patient {
    /// For this record.
    pub fn new(record: Arc<dyn SharedRecord>) -> Self {
        Self { record, patience: PATIENCE, open: Arc::default() }
    }

    /// With another patience.
    pub fn waiting(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    fn ask<T: Send + 'static>(
        &self,
        about: String,
        question: impl FnOnce(&dyn SharedRecord) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let silent = || {
            let why = format!("{} does not answer", self.record.words());
            io::Error::new(ErrorKind::TimedOut, why)
        };
        let lock = |open: &Mutex<HashSet<String>>, about: &str, enter: bool| {
            let mut open = open.locked();
            if enter { open.insert(about.to_owned()) } else { open.remove(about) }
        };
        if !lock(&self.open, &about, true) {
            return Err(silent());
        }
        let (tell, told) = channel();
        let (record, open, key) = (self.record.clone(), self.open.clone(), about.clone());
        let spawned = thread::Builder::new().name("ask-record".into()).spawn(move || {
            let answer = question(&*record);
            lock(&open, &key, false);
            let _ = tell.send(answer);
        });
        if let Err(error) = spawned {
            lock(&self.open, &about, false);
            return Err(error);
        }
        told.recv_timeout(self.patience).unwrap_or_else(|_| Err(silent()))
    }
}

impl Ownership for Patient {
    fn identity(&self) -> io::Result<String> {
        self.ask("identity".into(), |record| record.identity())
    }

    fn offer(&self, offer: &Offer) -> io::Result<()> {
        let question = offer.clone();
        self.ask(format!("offer {} {}", offer.vm, offer.migration), move |record| record.offer(&question))
    }

    fn claim(&self, claim: &Claim) -> io::Result<Claimed> {
        let question = claim.clone();
        self.ask(format!("claim {} {} {}", claim.vm, claim.migration, claim.claimer), move |record| {
            record.claim(&question)
        })
    }
}

impl SharedRecord for Patient {
    fn words(&self) -> String {
        self.record.words()
    }

    fn look(&self, vm: &str) -> io::Result<Option<OwnershipRecord>> {
        let question = vm.to_owned();
        self.ask(format!("look {vm}"), move |record| record.look(&question))
    }

    fn start(&self, vm: &str, host: &str, fenced: Option<&str>, known: Option<Epoch>) -> io::Result<Claimed> {
        let (name, host, fenced) = (vm.to_owned(), host.to_owned(), fenced.map(str::to_owned));
        self.ask(format!("start {vm}"), move |record| record.start(&name, &host, fenced.as_deref(), known))
    }

    fn end(&self, vm: &str, host: &str, known: Option<Epoch>) -> io::Result<()> {
        let (name, host) = (vm.to_owned(), host.to_owned());
        self.ask(format!("end {vm}"), move |record| record.end(&name, &host, known))
    }
}
