//! Pages as they were last sent, for as many as a bounded cache holds: what deltas are made against.

use crate::delta;
use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};
use units::PAGE_SIZE;

/// Parts with a lock each, so that threads at different pages seldom meet.
const PARTS: usize = 16;

/// Neighbouring pages that share a part.
const NEIGHBOURS: u64 = 1024;

/// What it may hold at first: 4 MiB.
const FIRST: usize = 1024;

/// A page that no delta was made for in so many rounds makes room.
const IDLE: u32 = 2;

type Part = HashMap<u64, Version>;

struct Version {
    content: Box<[u8; PAGE_SIZE]>,
    used: u32,
}

/// The cache. A full one takes nothing new in before something in it has fallen idle: rounds go over pages in
/// order, and a cache that forgot the oldest first would always forget the page that comes next.
pub(crate) struct Versions {
    parts: Vec<Mutex<Part>>,
    /// Pages that it may hold now, and at most.
    room: AtomicUsize,
    most: usize,
    held: AtomicUsize,
    hits: AtomicUsize,
    turned_away: AtomicUsize,
}

impl Versions {
    /// Grows up to so many bytes.
    pub(crate) fn new(most: usize) -> Self {
        let most = most / PAGE_SIZE;
        Self {
            parts: (0..PARTS).map(|_| Mutex::default()).collect(),
            room: AtomicUsize::new(FIRST.min(most)),
            most,
            held: AtomicUsize::new(0),
            hits: AtomicUsize::new(0),
            turned_away: AtomicUsize::new(0),
        }
    }

    fn part(&self, page: u64) -> MutexGuard<'_, Part> {
        let part = (page / NEIGHBOURS) as usize % PARTS;
        self.parts[part].lock().expect("no one panics here")
    }

    /// Appends `content` as a difference from what was last sent of this page. False when that is not known
    /// or too much.
    pub(crate) fn delta(&self, page: u64, content: &[u8], out: &mut Vec<u8>) -> bool {
        let part = self.part(page);
        let Some(version) = part.get(&page) else { return false };
        let fits = delta::encode(&*version.content, content, out);
        if fits {
            self.hits.fetch_add(1, Relaxed);
        }
        fits
    }

    /// This is what is sent of the page in this round. `used`: a delta was made for it.
    pub(crate) fn keep(&self, page: u64, content: &[u8], round: u32, used: bool) {
        let Ok(content) = <&[u8; PAGE_SIZE]>::try_from(content) else { return };
        let mut part = self.part(page);
        if let Some(version) = part.get_mut(&page) {
            version.content.copy_from_slice(content);
            if used {
                version.used = round;
            }
        } else if self.held.fetch_add(1, Relaxed) < self.room.load(Relaxed) {
            part.insert(page, Version { content: Box::new(*content), used: round });
        } else {
            self.held.fetch_sub(1, Relaxed);
            self.turned_away.fetch_add(1, Relaxed);
        }
    }

    /// The page was sent as something that no delta is made against.
    pub(crate) fn forget(&self, page: u64) {
        if self.part(page).remove(&page).is_some() {
            self.held.fetch_sub(1, Relaxed);
        }
    }

    /// A round begins: what fell idle makes room, and the cache grows while it pays and had to turn pages
    /// away.
    pub(crate) fn turn(&self, round: u32) {
        let held = self.held.load(Relaxed);
        let hits = self.hits.swap(0, Relaxed);
        let turned_away = self.turned_away.swap(0, Relaxed);
        let room = self.room.load(Relaxed);
        // A quarter: a delta saves most of a page, keeping one costs a copy of it.
        let pays = hits * 4 >= held;
        match (pays, turned_away > 0) {
            (true, true) => self.room.store((room * 2).min(self.most), Relaxed),
            (false, _) if round > 3 => self.room.store((room / 2).max(FIRST.min(self.most)), Relaxed),
            _ => {}
        }
        for part in &self.parts {
            let mut part = part.lock().expect("no one panics here");
            let before = part.len();
            part.retain(|_, version| version.used + IDLE >= round);
            self.held.fetch_sub(before - part.len(), Relaxed);
        }
    }

    #[cfg(test)]
    pub(crate) fn room(&self) -> usize {
        self.room.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A round that rewrites one word of each page; how many deltas it made.
    fn round(versions: &Versions, number: u32, pages: u64, same: bool) -> usize {
        versions.turn(number);
        let mut made = 0;
        for page in 0..pages {
            let mut content = [if same { 1 } else { number as u8 }; PAGE_SIZE];
            content[8] = number as u8;
            let used = versions.delta(page, &content, &mut vec![]);
            versions.keep(page, &content, number, used);
            made += usize::from(used);
        }
        made
    }

    #[test]
    fn it_grows_while_it_pays_and_never_beyond_its_bound() {
        let versions = Versions::new(6000 * PAGE_SIZE);
        let made: Vec<usize> = (2..12).map(|n| round(&versions, n, 8000, true)).collect();
        assert_eq!(made[0], 0);
        assert_eq!(made[1], FIRST);
        assert_eq!(*made.last().unwrap(), 6000);
        assert_eq!(versions.held.load(Relaxed), 6000);
    }

    #[test]
    fn it_stays_small_where_it_is_of_no_use() {
        let versions = Versions::new(6000 * PAGE_SIZE);
        for n in 2..12 {
            assert_eq!(round(&versions, n, 8000, false), 0);
        }
        assert_eq!(versions.room(), FIRST);
        assert!(versions.held.load(Relaxed) <= FIRST);
    }
}
