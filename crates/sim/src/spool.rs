//! The spool: two files on the datastore that both hosts reach, with what the datastore and the hosts' caches
//! make of them. Mirrors the contract of the crate `spool`.
//!
//! An extent is one page. What was appended is seen by the other host at once, or later; it survives the loss
//! of its writer's host only after an `fsync`. One that is damaged is told by its seal.

use crate::{
    link::Side,
    pages::{Page, Pages},
    planted::PlantedBug,
    source::Departure,
    world::{World, say},
};

/// One page in the source's file. Its place is its sequence number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Extent {
    /// Which page.
    pub page: u8,
    /// What it held.
    pub what: Page,
    /// Its seal is right. If not, nobody but the checks may look at `what`.
    pub whole: bool,
}

/// The source's file.
#[derive(Clone, Hash, Default, Debug)]
pub struct File {
    /// In the order of their sequence numbers.
    pub extents: Vec<Extent>,
    /// So many of them survive whatever crashes.
    pub durable: u16,
}

/// The target's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Own {
    /// It says nothing that matters.
    Made,
    /// That everything is there is on its way into it.
    Asked,
    /// It says so.
    Complete,
}

/// The datastore.
#[derive(Clone, Hash)]
pub struct Spool {
    /// The source's file.
    pub file: Option<File>,
    /// The same without its name: whoever has it open may read on.
    pub unlinked: Option<File>,
    /// The target's.
    pub own: Option<Own>,
    /// Which side's agent is about to remove the source's file.
    pub doomed: [bool; 2],
    /// Which side's agent is about to remove the target's.
    pub own_doomed: [bool; 2],
    /// It answers.
    pub up: bool,
    /// The next operation of a side fails.
    pub fails: [bool; 2],
}

/// What a page's content becomes that is read from a damaged extent.
const TORN: u16 = 0x2000;

impl Spool {
    /// With an empty file of the source's, if there is to be one.
    pub fn new(wanted: bool) -> Self {
        Self {
            file: wanted.then(File::default),
            unlinked: None,
            own: None,
            doomed: [false; 2],
            own_doomed: [false; 2],
            up: true,
            fails: [false; 2],
        }
    }

    /// Extents that the source has appended.
    pub fn appended(&self) -> u16 {
        self.file.as_ref().map_or(0, |file| file.extents.len() as u16)
    }

    /// The file's name goes.
    fn remove(&mut self) -> bool {
        self.unlinked = self.file.take();
        self.unlinked.is_some()
    }

    /// The extent of this number, for whoever had the file open before it was removed, too.
    pub fn extent_open(&self, sequence: u16) -> Option<Extent> {
        let file = self.file.as_ref().or(self.unlinked.as_ref());
        file?.extents.get(usize::from(sequence)).copied()
    }

    /// The extent of this number.
    pub fn extent(&self, sequence: u16) -> Option<Extent> {
        self.file.as_ref()?.extents.get(usize::from(sequence)).copied()
    }

    /// The writing host is gone, with its page cache. `torn`: the first of what was not durable is damaged,
    /// and what was written behind it had reached the datastore.
    pub fn lose_cache(&mut self, torn: bool) {
        let Some(file) = &mut self.file else { return };
        let durable = usize::from(file.durable);
        match file.extents.get_mut(durable) {
            Some(first) if torn => first.whole = false,
            _ => file.extents.truncate(durable),
        }
    }

    /// Which extent can be damaged there: the last of a page that is there several times, or else the last.
    fn rots(&self) -> Option<usize> {
        let extents = &self.file.as_ref()?.extents;
        let again = |i: usize| extents[..i].iter().any(|before| before.page == extents[i].page);
        let which = (0..extents.len()).rev().find(|i| again(*i)).or(extents.len().checked_sub(1))?;
        extents[which].whole.then_some(which)
    }

    /// Whether there is one.
    pub fn can_rot(&self) -> bool {
        self.rots().is_some()
    }

    /// It is damaged.
    pub fn rot(&mut self) {
        if let (Some(which), Some(file)) = (self.rots(), &mut self.file) {
            file.extents[which].whole = false;
        }
    }
}

impl Extent {
    /// What whoever looks at no seal would take it for.
    pub fn unsealed(self) -> Page {
        let content = if self.whole { self.what.content } else { self.what.content ^ TORN };
        Page { content, ..self.what }
    }
}

impl World {
    /// Whether the thread of a side that waits for the datastore can go on (`Writer`, and whoever removes
    /// files).
    pub fn disk_can(&self, side: Side) -> bool {
        if !self.spool.up || !self.up[side.at()] {
            return false;
        }
        if self.spool.doomed[side.at()] || self.spool.own_doomed[side.at()] {
            return true;
        }
        match side {
            // A careless writer leaves it to the kernel, which takes its time.
            Side::Source if self.has(PlantedBug::SpoolNotSynced) => false,
            Side::Source => {
                let writes = |work: &crate::source::Work| {
                    work.spooling.spooler.as_ref().is_some_and(|spooler| !spooler.failed)
                };
                let unsynced =
                    self.spool.file.as_ref().is_some_and(|f| usize::from(f.durable) < f.extents.len());
                unsynced && self.source.work.as_deref().is_some_and(writes)
            }
            Side::Target => self.spool.own == Some(Own::Asked),
        }
    }

    /// It removes a file, or makes durable what was written.
    pub fn disk_moves(&mut self, side: Side) {
        if std::mem::take(&mut self.spool.doomed[side.at()]) {
            say!(self, "spool: the {side:?} removes the source's file");
            self.spool.remove();
            return;
        }
        if std::mem::take(&mut self.spool.own_doomed[side.at()]) {
            say!(self, "spool: the {side:?} removes the target's file");
            self.spool.own = None;
            return;
        }
        match side {
            Side::Target => {
                say!(self, "spool: the target's file says that everything is there");
                self.spool.own = Some(Own::Complete);
            }
            Side::Source => {
                let fails = std::mem::take(&mut self.spool.fails[0]);
                let Some(spooler) =
                    self.source.work.as_deref_mut().and_then(|work| work.spooling.spooler.as_mut())
                else {
                    return;
                };
                if fails {
                    say!(self, "spool: the fsync fails");
                    // The kernel reports a lost write once: nothing is ever called durable again.
                    spooler.failed = true;
                    return;
                }
                say!(self, "spool: synced");
                if let Some(file) = &mut self.spool.file {
                    file.durable = file.extents.len() as u16;
                }
            }
        }
    }

    /// An agent looks for files that nobody needs any more (`host/janitor.rs`).
    pub fn janitor(&mut self, side: Side) {
        if !self.spool.up || !self.up[side.at()] {
            return;
        }
        let blind = self.has(PlantedBug::JanitorIgnoresJournals);
        let gone = match side {
            Side::Source => {
                let runs = self.source.work.as_deref().is_some_and(|work| work.spooling.at_work);
                let open = !matches!(self.source.journal.read(), Departure::None | Departure::Settled);
                !runs && (!open || blind)
            }
            Side::Target => {
                let store = self.target.store.read();
                let open = store.arrival.is_some();
                if !open {
                    self.spool.own = None;
                }
                // Somebody else has made it.
                !open && store.arrived
            }
        };
        if gone && self.spool.remove() {
            say!(self, "{side:?}: the janitor removes the source's file");
        }
    }

    /// Pages of which the file has, whole and durable, what the target may take for current.
    pub fn safe_in_file(&self) -> Pages {
        let mut safe = Pages::default();
        let Some(record) = self.target.store.durable().arrival.as_ref().and_then(|arrival| arrival.spool)
        else {
            return safe;
        };
        let Some(file) = &self.spool.file else { return safe };
        for (extent, sequence) in file.extents[..usize::from(file.durable)].iter().zip(0..) {
            let since = if record.outdated.has(extent.page) { record.end } else { record.floor };
            if sequence >= since {
                if extent.whole {
                    safe.add(extent.page);
                } else {
                    safe.drop(extent.page);
                }
            }
        }
        safe
    }
}
