//! The file that pages come by, too: opened, followed, recorded, lived on, as the core's [`TargetSpool`]
//! decides. Mirrors `engine/target/spooling.rs` and `engine/unspool.rs`.

use super::{Heard, WritePolicy};
use crate::{
    pages::{Page, Pages},
    planted::PlantedBug,
    printed::Printed,
    source::{bitmap, pages},
    spool::{Extent, Own},
    world::{World, say},
};
use proto::{
    Follow, Put, TargetSpool,
    control::{self, Kind},
};
use std::collections::VecDeque;

/// The source is told after so many pages what need not be sent any more, or when there is nothing more to
/// place.
const TELL: u8 = 2;

/// What a target must remember of a file to live on it (`SpoolRecord`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SpoolRecord {
    /// Extents before this one do not matter.
    pub floor: u16,
    /// Extents that there were when the VM changed hands.
    pub end: u16,
    /// Missing pages of which only later extents count.
    pub outdated: Pages,
}

/// How far the recording of it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum SpoolRecording {
    /// Nothing is to be recorded, or it is.
    #[default]
    Done,
    /// To be written.
    Asked(SpoolRecord),
    /// Written, not durable.
    Written,
}

/// The thread that reads the file.
#[derive(Clone, Hash, Debug, Default)]
pub struct Unspool {
    /// What it is told.
    words: VecDeque<Word>,
    /// What it follows.
    follows: Option<Follow>,
    /// The file is open.
    reader: bool,
    /// What decides.
    pub core: TargetSpool,
    /// Extents that are durable, by the source's word.
    durable: u16,
    /// Those of them that are kept for later.
    index: Vec<(u16, u8)>,
    /// Missing pages of which only later extents count.
    outdated: Pages,
    /// So many pages were placed that the source was not told of.
    untold: u8,
    /// A restarted agent opens it first.
    opens: bool,
    /// This side has a file of its own in which it can say that it has everything.
    own: bool,
}

/// What the thread is told.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Word {
    Durable(Follow),
    Manifest(Pages),
}

/// What it says.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Unspooled {
    /// So many extents are read.
    Taken(u16),
    /// No more can be.
    Failed,
    /// Pages were placed: the source need not send them any more.
    Placed,
}

impl Unspool {
    /// Takes a file up again after a restart.
    pub fn resume(record: SpoolRecord) -> Self {
        let core = TargetSpool::resumed(record.floor.into(), record.end.into());
        Self { core, outdated: record.outdated, opens: true, ..Self::default() }
    }

    /// So many extents are read, and the index has more now (`look_again`).
    fn look_again(&mut self, read: u64, bug: Option<PlantedBug>) {
        self.core.has_read(read);
        let Some((floor, end)) = self.core.manifest() else { return };
        self.core.trust(match bug {
            Some(PlantedBug::FloorIgnored) => 0,
            Some(PlantedBug::GapBelieved) => floor,
            _ => self.whole_from(floor, end),
        });
    }

    /// Where trust begins (`Index::whole_from`).
    fn whole_from(&self, floor: u64, end: u64) -> u64 {
        let mut from = end;
        for sequence in self.index.iter().rev().map(|(sequence, _)| u64::from(*sequence)) {
            if sequence < end && (sequence + 1 != from || from == floor) {
                break;
            }
            from = from.min(sequence);
        }
        from.max(floor)
    }

    /// Where the version of a page is that the guest had when it was stopped.
    fn current(&self, page: u8, bug: Option<PlantedBug>) -> Option<u16> {
        let outdated = self.outdated.has(page) && bug != Some(PlantedBug::FloorIgnored);
        let readable = |sequence: &u16| self.core.is_readable((*sequence).into());
        let falls_back = bug == Some(PlantedBug::OlderVersionTaken);
        let mut versions =
            self.index.iter().rev().filter(|(_, of)| *of == page).map(|(sequence, _)| *sequence);
        let newest = if falls_back { versions.find(readable) } else { versions.next() };
        newest.filter(|sequence| self.core.is_current((*sequence).into(), outdated))
    }

    /// Of these pages, those that the file has for certain.
    fn has(&self, missing: Pages, bug: Option<PlantedBug>) -> Pages {
        let mut has = Pages::default();
        missing.iter().filter(|page| self.current(*page, bug).is_some()).for_each(|page| has.add(page));
        has
    }
}

impl World {
    /// Opens the source's file and makes one of this side's. A host that cannot goes without.
    pub(super) fn open_spool(&mut self) {
        let fails = std::mem::take(&mut self.spool.fails[1]);
        let there = self.spool.up && !fails && self.spool.file.is_some() && !self.spool.doomed[0];
        let Some(work) = self.target.work.as_deref_mut().filter(|work| work.wants_spool) else { return };
        if there {
            work.spool = Some(Unspool { reader: true, own: true, ..Unspool::default() });
            self.spool.own = Some(Own::Made);
        }
        say!(self, "target: the spool is {}", if there { "open" } else { "of no use" });
    }

    /// The source says how far its file is (`spooled`).
    pub(super) fn spooled(&mut self, conn: u16, spooled: &control::Spooled) {
        let open = self.has(PlantedBug::FenceOpen);
        let late = self.has(PlantedBug::SpoolNotRecorded);
        let Some(work) = self.target.work.as_deref_mut() else { return };
        if work.control != Some(conn) && !open {
            // Of a connection that is lost: what it tells of is sent anew, and may be newer there (I5).
            return;
        }
        let Some(spool) = &mut work.spool else { return };
        let follow = spool.core.said(spooled);
        spool.words.push_back(Word::Durable(follow));
        let Some(manifest) = &spooled.manifest else { return };
        let outdated = manifest.outdated.first().map_or(Pages::default(), pages);
        let record = SpoolRecord { floor: manifest.floor as u16, end: manifest.end as u16, outdated };
        spool.words.push_back(Word::Manifest(outdated));
        let asked = SpoolRecording::Asked(record);
        if late {
            work.record_late = Some(asked);
        } else {
            work.recording_spool = asked;
        }
    }

    /// The thread has something to say (`hear_spool`).
    pub(super) fn hear_unspooled(&mut self, said: Unspooled) {
        let Some(work) = self.target.work.as_deref_mut() else { return };
        let missing = work.missing;
        let kind = match said {
            Unspooled::Taken(extents) => Kind::SpoolTaken(control::SpoolTaken { extents: extents.into() }),
            Unspooled::Failed => Kind::SpoolFailed(control::SpoolFailed::default()),
            Unspooled::Placed => Kind::NowMissing(control::NowMissing { blocks: vec![bitmap(missing)] }),
        };
        self.target_says(kind);
    }

    /// Everything is here, and that is recorded (`settled`, `remove`).
    pub(super) fn end_spool_here(&mut self) {
        let Some(work) = self.target.work.as_deref_mut() else { return };
        let Some(spool) = work.spool.take() else { return };
        work.spool_settled = true;
        if work.control.is_some() {
            self.spool.own_doomed[1] |= self.spool.own.is_some();
        } else if spool.own && self.spool.own == Some(Own::Made) {
            // A source that cannot hear us finds it there.
            self.spool.own = Some(Own::Asked);
        }
    }

    /// The half-made VM goes, and this side's file with it.
    pub(super) fn drop_spool(&mut self) {
        let Some(work) = self.target.work.as_deref_mut() else { return };
        if work.spool.take().is_some() {
            self.spool.own_doomed[1] |= self.spool.own.is_some();
        }
    }

    /// Whether the thread that reads the file can go on.
    pub fn reader_can(&self) -> bool {
        let Some(work) = self.target.work.as_deref().filter(|_| self.up[1] && self.spool.up) else {
            return false;
        };
        let Some(spool) = &work.spool else { return false };
        spool.opens
            || !spool.words.is_empty()
            || spool.follows.is_some()
            || (spool.core.places()
                && (spool.untold > 0
                    || !spool.has(work.missing, self.bug).none()
                    || (spool.reader && !work.missing.none() && self.explored(spool).is_some())))
    }

    /// What is in the file beyond what the source has told of.
    fn explored(&self, spool: &Unspool) -> Option<Extent> {
        let believed = self.has(PlantedBug::TornForWhole);
        let there = |next| self.spool.extent(next).filter(|extent| extent.whole || believed);
        let next = spool.core.next() as u16;
        there(next).or_else(|| (next..spool.durable).find_map(there))
    }

    /// It does one thing.
    pub fn reader_moves(&mut self) {
        let (bug, believed) = (self.bug, self.has(PlantedBug::TornForWhole));
        let Some(work) = self.target.work.as_deref_mut() else { return };
        let missing = work.missing;
        let Some(spool) = &mut work.spool else { return };
        if spool.opens {
            return self.reopen();
        }
        if let Some(to) = spool.follows {
            return self.follow(to);
        }
        match spool.words.pop_front() {
            Some(Word::Durable(to)) => {
                spool.follows = Some(to);
                spool.durable = spool.durable.max(to.extents as u16);
                // It is opened anew.
                self.spool.unlinked = None;
                return;
            }
            Some(Word::Manifest(outdated)) => {
                spool.outdated = outdated;
                return spool.look_again(spool.core.next(), bug);
            }
            None => {}
        }
        if spool.untold >= TELL {
            spool.untold = 0;
            return work.heard.push_back(Heard::Unspooled(Unspooled::Placed));
        }
        // First what somebody waits for, then from the end downwards.
        let has = spool.has(missing, bug);
        let waits = self.qemus[1].waits_for.filter(|page| has.has(*page));
        if let Some(page) = waits.or(has.highest()) {
            let Some(sequence) = spool.current(page, bug) else { return };
            if std::mem::take(&mut self.spool.fails[1]) {
                // It is tried again.
                say!(self, "target: the spool cannot be read");
                return;
            }
            return match self.spool.extent(sequence).filter(|extent| extent.whole || believed) {
                Some(extent) => {
                    spool.untold += 1;
                    self.place_spooled(page, extent.unsealed());
                }
                None => {
                    say!(self, "target: extent {sequence} of the spool cannot be read");
                    spool.core.unread(sequence.into());
                }
            };
        }
        if std::mem::take(&mut spool.untold) > 0 {
            return work.heard.push_back(Heard::Unspooled(Unspooled::Placed));
        }
        if std::mem::take(&mut self.spool.fails[1]) {
            // It is tried again.
            say!(self, "target: the spool cannot be explored");
            return;
        }
        // What is damaged hides nothing that is behind it and known to be durable.
        let damaged = |next: &u16| self.spool.extent(*next).is_some_and(|extent| !extent.whole) && !believed;
        let read = spool.core.next() as u16;
        let next = (read..spool.durable).find(|next| !damaged(next)).unwrap_or(read);
        if let Some(extent) = self.spool.extent(next).filter(|extent| extent.whole || believed) {
            spool.index.push((next, extent.page));
            spool.look_again(u64::from(next) + 1, bug);
        }
    }

    /// Opens the file that was recorded, and looks through it.
    fn reopen(&mut self) {
        let believed = self.has(PlantedBug::TornForWhole);
        let fails = std::mem::take(&mut self.spool.fails[1]);
        let Some(spool) = self.target.work.as_deref_mut().and_then(|work| work.spool.as_mut()) else {
            return;
        };
        if fails {
            say!(self, "target: the spool cannot be opened");
            // It is tried again.
            return;
        }
        spool.opens = false;
        let Some(file) = &self.spool.file else { return spool.core.forget() };
        let there = file.extents.iter().zip(0..).filter(|(extent, _)| extent.whole || believed);
        spool.index = there.map(|(extent, sequence)| (sequence, extent.page)).collect();
        spool.reader = true;
        let read = spool.index.last().map_or(0, |(sequence, _)| u64::from(*sequence) + 1);
        spool.look_again(read, self.bug);
        say!(self, "target: the spool is open again");
    }

    /// Reads one more of what the source has written.
    fn follow(&mut self, mut to: Follow) {
        let open = self.has(PlantedBug::FenceOpen) || self.has(PlantedBug::SpoolStopIgnored);
        let all = self.has(PlantedBug::LandsFromAnywhere);
        let believed = self.has(PlantedBug::TornForWhole);
        let indexed = self.has(PlantedBug::FloorIgnored);
        let Some(work) = self.target.work.as_deref_mut() else { return };
        let Some(spool) = &mut work.spool else { return };
        let sequence = spool.core.next() as u16;
        if u64::from(sequence) >= to.extents {
            spool.follows = None;
            work.heard.push_back(Heard::Unspooled(Unspooled::Taken(sequence)));
            return;
        }
        let fails = std::mem::take(&mut self.spool.fails[1]);
        let extent = self.spool.extent_open(sequence).filter(|extent| !fails && (extent.whole || believed));
        let Some(extent) = extent.filter(|_| spool.reader) else {
            say!(self, "target: the spool cannot be read");
            spool.follows = None;
            work.heard.push_back(Heard::Unspooled(Unspooled::Failed));
            return;
        };
        if open {
            to.turn = spool.core.turn();
        }
        to.receive_from = to.receive_from.map(|from| if all { 0 } else { from });
        let put = spool.core.put(sequence.into(), &to);
        spool.core.has_read(u64::from(sequence) + 1);
        if put == Ok(Put::Keep) || indexed {
            spool.index.push((sequence, extent.page));
        }
        if put == Ok(Put::Receive) {
            self.receive_spooled(extent);
        }
    }

    /// A page of a round, before anything runs here (`PageReceiver::receive_spooled`).
    fn receive_spooled(&mut self, extent: Extent) {
        let Some(work) = self.target.work.as_deref_mut() else { return };
        let (page, now) = (extent.page, extent.unsealed());
        if work.stage != WritePolicy::Before {
            if let Some(spool) = &mut work.spool {
                spool.follows = None;
            }
            return work.heard.push_back(Heard::Unspooled(Unspooled::Failed));
        }
        say!(self, "target: page {page} of the spool is {}", now.content);
        let qemu = &mut self.qemus[1];
        let (before, runs) = (qemu.ram.at(page), qemu.runs());
        self.ghost.damaged.drop(page);
        qemu.ram.put(page, now);
        if now.content == 0 {
            qemu.ram.present.drop(page);
        }
        if before.written > now.written {
            self.breach(|| {
                format!(
                    "I5: page {page} of the spool, written as number {}, overwrote number {}",
                    now.written, before.written
                )
            });
        }
        if runs {
            self.breach(|| format!("I5: page {page} of the spool was written under a running guest"));
        }
    }

    /// A page that is missing (`PageReceiver::place_spooled`).
    fn place_spooled(&mut self, page: u8, now: Page) {
        let Some(work) = self.target.work.as_deref_mut() else { return };
        if work.stage != WritePolicy::PostCopy || !work.missing.has(page) {
            return;
        }
        say!(self, "target: page {page} of the spool is placed");
        self.qemus[1].place(page, now);
        work.asked.drop(page);
        work.missing.drop(page);
        if work.missing.none() {
            work.heard.push_back(Heard::AllPlaced);
        }
    }

    /// A word about the file is not the machine's business. Says whether it was one.
    pub(super) fn target_spool_word(&mut self, kind: &Printed<Kind>) -> bool {
        match &kind.0 {
            Kind::SpoolStop(_) => {
                if let Some(spool) = self.target.work.as_deref_mut().and_then(|work| work.spool.as_mut()) {
                    spool.core.stop();
                }
                self.target_says(Kind::SpoolStopped(control::SpoolStopped {}));
                true
            }
            _ => false,
        }
    }
}
