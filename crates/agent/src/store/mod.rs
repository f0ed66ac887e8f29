//! What must survive a crash of the agent: the VMs of this host, who owns them, and where migrations stand.
//!
//! One database, `agent.redb`, in the state directory. Every change is one transaction that is on the disk
//! (`fsync`) when the method returns, so that nothing here is ever half true: a claim, the missing set that
//! goes with it and the VM's new standing become visible together or not at all.

#[doc(hidden)]
pub mod fuzz;
mod history;
mod missing;
mod opened;
mod ownership;
mod records;
mod reports;
mod second;
mod shared;
mod source;
mod spools;
mod target;
mod vms;

#[cfg(test)]
mod tests;

pub use history::Known;
pub use ownership::OfferError;
pub use records::{ArrivalRecord, DepartureRecord, DepartureState, Origin, Process, Standing, VmRecord};
pub use second::{Place, SELF, SecondRecord, Side};
pub use source::Departure;
pub use target::Arrival;

use crate::private;
use opened::Opened;
use redb::{
    Builder, Database, DatabaseError, ReadTransaction, ReadableDatabase, ReadableTable, StorageError,
    TableDefinition, WriteTransaction,
};
use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

/// What redb may keep of the file in memory. It holds a few kilobytes; redb's own default would be 1 GiB.
const CACHE_BYTES: usize = 4 << 20;

/// The store could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another agent has it open.
    #[error(
        "the state directory {dir} is in use by another agent{holder}; end that agent, or give this one a \
         directory of its own with --state-dir"
    )]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// ` (pid N)`, where it is known.
        holder: String,
    },
    /// The directory or the file in it cannot be used.
    #[error("cannot open the state directory {dir}: {why}")]
    Open {
        /// The directory.
        dir: PathBuf,
        /// The cause.
        why: String,
    },
    /// A read or a change failed.
    #[error("cannot {what} in the agent's state: {cause}")]
    Access {
        /// What was tried, such as `record the VM web1`.
        what: String,
        /// The database's error.
        #[source]
        cause: redb::Error,
    },
    /// What is recorded cannot be understood.
    #[error("cannot {what}: the agent's state holds something unreadable: {why}")]
    Corrupt {
        /// What was tried.
        what: String,
        /// What is wrong with it.
        why: String,
    },
}

impl From<StoreError> for io::Error {
    fn from(error: StoreError) -> Self {
        io::Error::other(error)
    }
}

/// The store of one agent. Clones share it.
#[derive(Clone)]
pub struct Store {
    database: Arc<Opened>,
    host: Arc<str>,
}

impl Store {
    /// Opens the store in `dir`, which is made if it is missing, for the host named `host`.
    pub fn open(dir: &Path, host: &str) -> Result<Self, StoreError> {
        let refused = |why: String| StoreError::Open { dir: dir.to_owned(), why };
        private::directory(dir).map_err(|e| refused(e.to_string()))?;
        let pid_file = dir.join("agent.pid");
        let (file, first) = (dir.join("agent.redb"), OnceLock::new());
        let open = move || {
            let mut builder = Builder::new();
            let builder = builder.set_cache_size(CACHE_BYTES);
            let identity = || fs::metadata(&file).map(|found| (found.dev(), found.ino()));
            match first.get() {
                None => {
                    let made = builder.create(&file)?;
                    let _ = first.set(identity().map_err(StorageError::Io)?);
                    Ok(made)
                }
                Some(first) if identity().map_err(StorageError::Io)? == *first => builder.open(&file),
                Some(_) => Err(StorageError::Io(io::Error::other("another file is in its place")).into()),
            }
        };
        let database = match Opened::by(open) {
            Ok(database) => database,
            Err(DatabaseError::DatabaseAlreadyOpen) => {
                let holder = fs::read_to_string(&pid_file).map(|pid| format!(" (pid {})", pid.trim()));
                return Err(StoreError::InUse { dir: dir.to_owned(), holder: holder.unwrap_or_default() });
            }
            Err(error) => return Err(refused(error.to_string())),
        };
        private::file(&dir.join("agent.redb")).map_err(|e| refused(e.to_string()))?;
        // Only a courtesy to whoever comes second: the lock on the database is what decides.
        let _ = fs::write(&pid_file, std::process::id().to_string());
        Self::over(database, host)
    }

    fn over(database: Opened, host: &str) -> Result<Self, StoreError> {
        let store = Self { database: Arc::new(database), host: host.into() };
        store.change("prepare the tables", |change| {
            vms::prepare(change)?;
            ownership::prepare(change)?;
            source::prepare(change)?;
            target::prepare(change)?;
            second::prepare(change)?;
            spools::prepare(change)?;
            reports::prepare(change)?;
            shared::prepare(change)?;
            history::prepare(change)
        })?;
        Ok(store)
    }

    /// The name of this host.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// One change: durable when it returns `Ok`, undone if the body fails. Where its file could not be
    /// written, only the next look tells.
    fn change<T>(
        &self,
        what: &str,
        body: impl FnOnce(&WriteTransaction) -> Result<T, Trouble>,
    ) -> Result<T, StoreError> {
        let attempt = |database: &Database| {
            let change = database.begin_write().map_err(Trouble::from)?;
            let value = body(&change)?;
            change.commit().map_err(Trouble::from)?;
            Ok(value)
        };
        self.database.with(attempt).map_err(|trouble: Trouble| trouble.of(what))
    }

    /// One consistent look.
    fn look<T>(
        &self,
        what: &str,
        body: impl FnOnce(&ReadTransaction) -> Result<T, Trouble>,
    ) -> Result<T, StoreError> {
        let attempt = |database: &Database| body(&database.begin_read().map_err(Trouble::from)?);
        self.database.with(attempt).map_err(|trouble: Trouble| trouble.of(what))
    }
}

/// An error within a transaction, before it is known what the transaction was for.
#[derive(Debug)]
enum Trouble {
    Database(redb::Error),
    Unreadable(String),
}

impl Trouble {
    fn of(self, what: &str) -> StoreError {
        let what = what.to_owned();
        match self {
            Self::Database(cause) => StoreError::Access { what, cause },
            Self::Unreadable(why) => StoreError::Corrupt { what, why },
        }
    }
}

impl<E: Into<redb::Error>> From<E> for Trouble {
    fn from(error: E) -> Self {
        Self::Database(error.into())
    }
}

/// All entries of a table, by name.
fn entries<T: serde::de::DeserializeOwned>(
    look: &ReadTransaction,
    table: TableDefinition<'_, &str, &[u8]>,
) -> Result<Vec<(String, T)>, Trouble> {
    let rows = look.open_table(table)?;
    rows.iter()?
        .map(|row| {
            let (name, entry) = row?;
            Ok((name.value().to_owned(), decode(entry.value())?))
        })
        .collect()
}

fn encode<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, Trouble> {
    serde_json::to_vec(value).map_err(|e| Trouble::Unreadable(e.to_string()))
}

fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, Trouble> {
    serde_json::from_slice(bytes).map_err(|e| Trouble::Unreadable(e.to_string()))
}
