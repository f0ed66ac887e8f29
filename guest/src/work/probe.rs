//! What one who writes a little feels: a page not written lately each millisecond, and how long that took.
//!
//! It goes round a set of self-checking records so large that a migration has sent a page, and watches it
//! anew, before it is written again: each write is one that a migration notices. Two things are measured: how
//! long the write itself took, and how late it began. Whoever was held up for longer than a millisecond
//! missed some: their lateness is counted too, or a stall of a second would count as one. The guest's clock
//! measures it. That runs on while a vCPU waits for a page, and stands still while the guest is stopped (as
//! `beat` says): the pause of a switchover is not in it.

use crate::{
    beat,
    content::Page,
    histogram::Histogram,
    job::{Job, Jobs, locked},
    record, words,
    work::spawn,
};
use std::{
    sync::{Arc, Mutex, atomic::Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};
use units::PAGE_SIZE;

/// From one write to the next.
const EVERY: Duration = Duration::from_millis(1);

/// The pages, and what was measured.
pub(crate) struct Probe {
    records: Mutex<Records>,
    times: Mutex<Times>,
}

struct Records {
    pages: Vec<Page>,
    /// What each page should be, in other pages.
    versions: Vec<u64>,
}

/// What was measured, in microseconds.
#[derive(Default)]
struct Times {
    write: Histogram,
    late: Histogram,
}

/// Writes all pages once, then starts.
pub(crate) fn start(wish: &words::Probe, jobs: &Jobs) -> Result<Arc<Probe>, String> {
    let probe = Arc::new(Probe::new(wish.set.0 / PAGE_SIZE as u64));
    let (mine, job) = (probe.clone(), jobs.add("probe"));
    spawn(wish.cpu, move || mine.run(&job))?;
    Ok(probe)
}

impl Probe {
    fn new(pages: u64) -> Self {
        let fresh = |index| {
            let mut page = Page::ZERO;
            record::write(&mut page, index, 0);
            page
        };
        let records = Records { pages: (0..pages).map(fresh).collect(), versions: vec![0; pages as usize] };
        Self { records: records.into(), times: Mutex::default() }
    }

    fn run(&self, job: &Job) -> ! {
        beat::hurry();
        let (mut place, mut due) = (0, Instant::now());
        loop {
            due += EVERY;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let (began, write) = job.once(|| self.write(place));
            due = locked(&self.times).add(due, began, write);
            job.pages.fetch_add(1, Relaxed);
            place += 1;
            if place == locked(&self.records).versions.len() {
                place = 0;
                job.loops.fetch_add(1, Relaxed);
            }
        }
    }

    /// Writes the next version: when it began, and how long it took.
    fn write(&self, place: usize) -> (Instant, Duration) {
        let mut records = locked(&self.records);
        let version = records.versions[place] + 1;
        let began = Instant::now();
        record::write(&mut records.pages[place], place as u64, version);
        let took = began.elapsed();
        records.versions[place] = version;
        (began, took)
    }

    /// Compares every page with what was written last, one at a time: the probe goes on meanwhile.
    pub(crate) fn verify(&self, jobs: &Jobs) -> u64 {
        let pages = locked(&self.records).pages.len();
        for place in 0..pages {
            let records = locked(&self.records);
            if let Err(corrupt) = record::verify(&records.pages[place], place as u64, records.versions[place])
            {
                jobs.corrupt(format_args!("probe {corrupt} at {:p}", &records.pages[place]));
            }
        }
        pages as u64
    }

    /// What was measured since it was forgotten.
    pub(crate) fn json(&self) -> String {
        let times = locked(&self.times);
        let (count, due) = (times.write.count(), times.late.count());
        let (write, late) = (times.write.json(), times.late.json());
        format!("{{\"count\":{count},\"missed\":{},\"write_us\":{write},\"late_us\":{late}}}", due - count)
    }

    /// Measures anew.
    pub(crate) fn forget(&self) {
        *locked(&self.times) = Times::default();
    }
}

impl Times {
    /// A write that was due, when it began and how long it took. Those that were due meanwhile were missed:
    /// which one was the last that is accounted for.
    fn add(&mut self, mut due: Instant, began: Instant, write: Duration) -> Instant {
        self.write.add(write.as_micros() as u64);
        loop {
            let late = began.saturating_duration_since(due);
            self.late.add(late.as_micros() as u64);
            if late < EVERY {
                return due;
            }
            due += EVERY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_write_is_found() {
        let (probe, jobs) = (Probe::new(4), Jobs::default());
        let old = locked(&probe.records).pages[2].clone();
        probe.write(2);
        assert_eq!((probe.verify(&jobs), jobs.corrupted()), (4, 0));
        locked(&probe.records).pages[2] = old;
        probe.verify(&jobs);
        let found = jobs.findings();
        assert!(found[0].starts_with("probe page 2 version 1: stale, has version 0"), "{found:?}");
    }

    #[test]
    fn who_is_held_up_is_late_once_for_each_that_was_missed() {
        let (start, ms, mut times) = (Instant::now(), Duration::from_millis, Times::default());
        let on_time = times.add(start, start + ms(1) / 10, ms(8));
        assert_eq!(on_time, start);
        // The write of 8 ms: the next one is due after one, and eight are due before it begins.
        let last = times.add(on_time + EVERY, start + ms(8) + ms(1) / 10, ms(1) / 1000);
        assert_eq!(last, start + ms(8));
        assert_eq!((times.write.count(), times.late.count()), (2, 9));
        assert_eq!((times.write.percentile(50), times.write.percentile(100)), (1, 8000));
        assert_eq!(times.late.percentile(100), 7100);
        let probe = Probe { records: Probe::new(0).records, times: times.into() };
        assert!(probe.json().starts_with("{\"count\":2,\"missed\":7,\"write_us\":{"), "{}", probe.json());
        probe.forget();
        assert!(probe.json().starts_with("{\"count\":0,\"missed\":0,"), "{}", probe.json());
    }
}
