//! What is on a disk, and what is only on its way there.

/// A file that changes by transactions: written first, durable after its `fsync`.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Durable<T> {
    disk: T,
    cache: Option<T>,
}

impl<T: Clone> Durable<T> {
    /// What whoever opens it reads.
    pub fn read(&self) -> &T {
        self.cache.as_ref().unwrap_or(&self.disk)
    }

    /// What is durable.
    pub fn durable(&self) -> &T {
        &self.disk
    }

    /// Writes, not durably.
    pub fn write(&mut self, change: impl FnOnce(&mut T)) {
        let mut next = self.read().clone();
        change(&mut next);
        self.cache = Some(next);
    }

    /// Makes durable what was written.
    pub fn sync(&mut self) {
        if let Some(cache) = self.cache.take() {
            self.disk = cache;
        }
    }

    /// Whether something is not durable yet.
    pub fn is_unsynced(&self) -> bool {
        self.cache.is_some()
    }

    /// Its writer died: what was not durable is lost, or was lucky.
    pub fn crash(&mut self, lucky: bool) {
        if lucky {
            self.sync();
        }
        self.cache = None;
    }
}
