//! Removes spool files that crashed migrations left on datastores.

use agent::{config::Config, store::Store};
use spool::{Found, Verdict, sweep};
use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, SystemTime},
};
use units::{Locked, MigrationId};

/// A file that nobody has written to for so long is no longer in use, if its owner knows nothing of it: far
/// more than any migration lets its file rest before the commit, and after that the journals know of it.
const AGE: Duration = Duration::from_secs(3600);

/// How often it is looked: what is left behind takes room, and does no other harm.
const EACH: Duration = Duration::from_secs(1800);

/// The thread, for as long as this lives.
pub(crate) struct Janitor {
    store: Store,
    running: Arc<Mutex<HashSet<MigrationId>>>,
    _ends_it: Sender<()>,
}

/// While this lives, the migration's file is in use.
pub(crate) struct AtWork {
    running: Arc<Mutex<HashSet<MigrationId>>>,
    migration: MigrationId,
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.running.locked().remove(&self.migration);
    }
}

impl Janitor {
    pub(crate) fn start(config: &Config, store: &Store) -> Self {
        let (ends_it, end) = channel();
        let running = Arc::<Mutex<HashSet<MigrationId>>>::default();
        let (at_work, known) = (running.clone(), store.clone());
        let given: Vec<PathBuf> = config.spool.iter().chain(&config.allow.spool).cloned().collect();
        let work = move || work(&known, &given, &at_work, &end);
        if let Err(e) = thread::Builder::new().name("janitor".into()).spawn(work) {
            tracing::warn!(%e, "nobody clears away spool files that were left behind");
        }
        Self { store: store.clone(), running, _ends_it: ends_it }
    }

    /// A migration uses a file in this directory.
    pub(crate) fn at_work(&self, migration: MigrationId, directory: &Path) -> AtWork {
        if let Err(error) = self.store.spools_in(directory) {
            tracing::warn!(%error, "a file that is left there will not be looked for");
        }
        self.running.locked().insert(migration);
        AtWork { running: self.running.clone(), migration }
    }
}

fn work(store: &Store, given: &[PathBuf], running: &Mutex<HashSet<MigrationId>>, end: &Receiver<()>) {
    loop {
        let used = store.spool_directories().unwrap_or_default();
        let directories: HashSet<PathBuf> = given.iter().cloned().chain(used).collect();
        for directory in directories {
            let removed = sweep(&directory, AGE, SystemTime::now(), |found| judge(store, running, found));
            for path in removed.unwrap_or_default() {
                tracing::info!(path = %path.display(), "removed a spool file that a migration had left");
            }
        }
        if !matches!(end.recv_timeout(EACH), Err(RecvTimeoutError::Timeout)) {
            return;
        }
    }
}

/// Only what this host has made, or what belongs to a migration that its journal knows to be over; nothing
/// that may still be needed.
fn judge(store: &Store, running: &Mutex<HashSet<MigrationId>>, found: &Found) -> Verdict {
    let migration = found.name.migration;
    if running.locked().contains(&migration) {
        return Verdict::Keep;
    }
    let (Ok(departures), Ok(arrivals)) = (store.departures(), store.arrivals()) else { return Verdict::Keep };
    let open = departures.iter().any(|(_, entry)| entry.migration == migration)
        || arrivals.iter().any(|(_, entry)| entry.migration == migration);
    let made_here = found.header.as_ref().is_some_and(|header| header.host == store.host());
    let over = store.has_arrived(migration).unwrap_or(false);
    if !open && (made_here || over) { Verdict::Remove } else { Verdict::Keep }
}
