//! The spool: a file on the shared datastore, written by the source and read by the target.
//!
//! An extent is durable after the file's `fsync`; one that is torn is told by its checksum, so here it is there or not.

use crate::pages::{Page, Pages, Table};

/// The file.
#[derive(Clone, Hash)]
pub struct Spool {
    /// What is in its extents.
    pub pages: Table,
    /// Which are written.
    pub written: Pages,
    /// Which are durable.
    pub durable: Pages,
    /// The datastore answers.
    pub up: bool,
}

impl Spool {
    /// An empty one.
    pub fn new() -> Self {
        Self { pages: Table::ZEROS, written: Pages::default(), durable: Pages::default(), up: true }
    }

    /// Writes a page, not durably.
    pub fn write(&mut self, page: u8, what: Page) {
        self.pages.put(page, what);
        self.written.add(page);
        self.durable.drop(page);
    }

    /// Makes durable what was written.
    pub fn sync(&mut self) {
        self.durable = self.written;
    }

    /// The writing host is gone, with its page cache.
    pub fn lose_cache(&mut self) {
        self.written = self.durable;
    }
}
