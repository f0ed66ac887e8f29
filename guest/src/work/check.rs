//! A large area of self-checking records, rewritten and verified all the time.

use crate::{
    content::Page,
    job::{Job, Jobs, locked},
    pace::Pace,
    record,
    words::Check,
};
use std::{
    sync::{Arc, Mutex, atomic::Ordering::Relaxed},
    thread,
};
use units::PAGE_SIZE;

/// Pages under one lock: a thread that verifies everything holds up a rewriting one for about a millisecond.
const CHUNK: u64 = 64;

/// All records of this guest.
pub(crate) struct Area {
    chunks: Vec<Mutex<Chunk>>,
}

struct Chunk {
    /// The index of its first record.
    first: u64,
    pages: Vec<Page>,
    /// What each page should be. It lies in other pages than the records, so one that is whole but old is
    /// found out.
    versions: Vec<u64>,
}

impl Area {
    fn new(pages: u64) -> Self {
        let chunk = |first: u64| Mutex::new(Chunk::new(first, CHUNK.min(pages - first)));
        Self { chunks: (0..pages).step_by(CHUNK as usize).map(chunk).collect() }
    }

    /// Verifies every record, and changes none.
    pub(crate) fn verify(&self, jobs: &Jobs) -> u64 {
        self.chunks.iter().map(|chunk| locked(chunk).verify(jobs)).sum()
    }
}

impl Chunk {
    fn new(first: u64, pages: u64) -> Self {
        let fresh = |index| {
            let mut page = Page::ZERO;
            record::write(&mut page, index, 0);
            page
        };
        Self { first, pages: (first..first + pages).map(fresh).collect(), versions: vec![0; pages as usize] }
    }

    /// Verifies record `place` and writes its next version, whatever it was.
    fn renew(&mut self, place: usize, jobs: &Jobs) {
        self.look(place, jobs);
        self.versions[place] += 1;
        record::write(&mut self.pages[place], self.first + place as u64, self.versions[place]);
    }

    fn look(&self, place: usize, jobs: &Jobs) {
        let index = self.first + place as u64;
        if let Err(corrupt) = record::verify(&self.pages[place], index, self.versions[place]) {
            jobs.corrupt(format_args!("check {corrupt} at {:p}", &self.pages[place]));
        }
    }

    fn verify(&self, jobs: &Jobs) -> u64 {
        (0..self.pages.len()).for_each(|place| self.look(place, jobs));
        self.pages.len() as u64
    }
}

/// Writes all records once, then goes on with `threads` threads.
pub(crate) fn start(wish: &Check, threads: usize, jobs: &Arc<Jobs>) -> Arc<Area> {
    let area = Arc::new(Area::new(wish.set.0 / PAGE_SIZE as u64));
    let job = jobs.add("check");
    let threads = threads.min(area.chunks.len());
    for mine in 0..threads {
        let pace = Pace::new(wish.rate, threads);
        let (area, job, jobs) = (area.clone(), job.clone(), jobs.clone());
        thread::spawn(move || rewrite(&area, &job, &jobs, pace, mine, threads));
    }
    area
}

/// Renews every `of`-th chunk from `mine` on, page after page, for ever.
fn rewrite(area: &Area, job: &Job, jobs: &Jobs, pace: Pace, mine: usize, of: usize) -> ! {
    let (mut chunk, mut place) = (mine, 0);
    job.run(pace, |pages| {
        for _ in 0..pages {
            let mut records = locked(&area.chunks[chunk]);
            records.renew(place, jobs);
            place += 1;
            if place == records.pages.len() {
                place = 0;
                chunk += of;
            }
            if chunk >= area.chunks.len() {
                chunk = mine;
                // The first thread stands for all: they go at the same pace.
                job.loops.fetch_add(u64::from(mine == 0), Relaxed);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_page_among_new_ones_is_found() {
        let (area, jobs) = (Area::new(CHUNK + 3), Jobs::default());
        assert_eq!(area.verify(&jobs), CHUNK + 3);
        let old = locked(&area.chunks[1]).pages[2].clone();
        locked(&area.chunks[1]).renew(2, &jobs);
        area.verify(&jobs);
        assert_eq!(jobs.corrupted(), 0);
        locked(&area.chunks[1]).pages[2] = old;
        area.verify(&jobs);
        let found = jobs.findings();
        assert_eq!(found.len(), 1);
        assert!(
            found[0].starts_with(&format!("check page {} version 1: stale, has version 0", CHUNK + 2)),
            "{found:?}"
        );
    }
}
