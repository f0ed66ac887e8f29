//! A database that is opened again once its file could not be written because its disk was full.
//!
//! After such an error redb does nothing more until it was opened anew, because it does not know what of a
//! change is in the file. Opening finds the last change that is whole, as the start of an agent does: who was
//! told that a change failed must ask what is recorded.

use super::Trouble;
use redb::{Database, DatabaseError, Error};
use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

type Open = dyn Fn() -> Result<Database, DatabaseError> + Send + Sync;

pub(super) struct Opened {
    /// None: it could not be opened again so far.
    database: Mutex<Option<Arc<Database>>>,
    /// Its disk was full.
    failed: AtomicBool,
    open: Box<Open>,
}

impl Opened {
    pub(super) fn by(
        open: impl Fn() -> Result<Database, DatabaseError> + Send + Sync + 'static,
    ) -> Result<Self, DatabaseError> {
        let database = Mutex::new(Some(Arc::new(open()?)));
        Ok(Self { database, failed: AtomicBool::new(false), open: Box::new(open) })
    }

    /// Does something with it.
    pub(super) fn with<T>(&self, act: impl FnOnce(&Database) -> Result<T, Trouble>) -> Result<T, Trouble> {
        let done = self.usable().and_then(|database| act(&database));
        // After any other error the kernel may show what is not on the disk: that takes a person.
        if let Err(Trouble::Database(Error::Io(error))) = &done
            && matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        {
            self.failed.store(true, SeqCst);
        }
        done
    }

    fn usable(&self) -> Result<Arc<Database>, Trouble> {
        let mut held = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        if self.failed.load(SeqCst) {
            // While others have it in hand it keeps its lock on the file.
            if held.as_ref().is_some_and(|known| Arc::strong_count(known) > 1) {
                return Err(Trouble::Database(Error::PreviousIo));
            }
            tracing::info!("the disk with the agent's state was full: the state is opened anew");
            *held = None;
            *held = Some(Arc::new((self.open)()?));
            self.failed.store(false, SeqCst);
        }
        held.clone().ok_or(Trouble::Database(Error::PreviousIo))
    }
}
