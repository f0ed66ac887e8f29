//! A workload that can be paused, and what it has counted.

use crate::{
    pace::{Pace, Turn},
    say,
};
use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Instant,
};

/// Everything that runs in this guest.
#[derive(Default)]
pub(crate) struct Jobs {
    all: Mutex<Vec<Arc<Job>>>,
    findings: Mutex<Vec<String>>,
    corrupt: AtomicU64,
}

/// Findings kept for the control port; the console has them all.
const KEPT: usize = 64;

impl Jobs {
    pub(crate) fn add(&self, name: &'static str) -> Arc<Job> {
        let job = Arc::new(Job { name, ..Job::default() });
        locked(&self.all).push(job.clone());
        job
    }

    pub(crate) fn list(&self) -> Vec<Arc<Job>> {
        locked(&self.all).clone()
    }

    /// Something is not what was written: says so on the console, and remembers it.
    pub(crate) fn corrupt(&self, finding: impl std::fmt::Display) {
        say!("CORRUPT {finding}");
        self.corrupt.fetch_add(1, Relaxed);
        let mut findings = locked(&self.findings);
        if findings.len() < KEPT {
            findings.push(finding.to_string());
        }
    }

    pub(crate) fn corrupted(&self) -> u64 {
        self.corrupt.load(Relaxed)
    }

    pub(crate) fn findings(&self) -> Vec<String> {
        locked(&self.findings).clone()
    }
}

/// One workload, whatever the number of its threads.
#[derive(Default)]
pub(crate) struct Job {
    pub(crate) name: &'static str,
    /// Pages done.
    pub(crate) pages: AtomicU64,
    /// Times its whole set was gone through.
    pub(crate) loops: AtomicU64,
    gate: Mutex<Gate>,
    moved: Condvar,
}

#[derive(Default)]
struct Gate {
    closed: bool,
    /// Threads within a batch.
    inside: usize,
}

impl Job {
    /// Runs `batch` again and again, each time for as many pages as `pace` allows, never while the job is
    /// paused.
    pub(crate) fn run(&self, mut pace: Pace, mut batch: impl FnMut(u64)) -> ! {
        let start = Instant::now();
        loop {
            match pace.turn(start.elapsed()) {
                Turn::Wait(time) => thread::sleep(time),
                Turn::Pages(pages) => {
                    self.once(|| batch(pages));
                    self.pages.fetch_add(pages, Relaxed);
                }
            }
        }
    }

    /// Does `work` as soon as the job is not paused.
    pub(crate) fn once<T>(&self, work: impl FnOnce() -> T) -> T {
        self.enter();
        let done = work();
        self.leave();
        done
    }

    /// Returns once no thread of this job is at work.
    pub(crate) fn pause(&self) {
        let mut gate = locked(&self.gate);
        gate.closed = true;
        while gate.inside > 0 {
            gate = self.moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn go(&self) {
        locked(&self.gate).closed = false;
        self.moved.notify_all();
    }

    fn enter(&self) {
        let mut gate = locked(&self.gate);
        while gate.closed {
            gate = self.moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.inside += 1;
    }

    fn leave(&self) {
        locked(&self.gate).inside -= 1;
        self.moved.notify_all();
    }
}

/// A lock whose holder panicked still guards what it guarded: here only counters and pages that are checked
/// anyway.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paused_job_stands_still_until_it_may_go() {
        let jobs = Jobs::default();
        let job = jobs.add("test");
        let (worker, (tell, told)) = (job.clone(), std::sync::mpsc::sync_channel(0));
        thread::spawn(move || {
            worker.run(Pace::new(None, 1), |_| {
                let _ = tell.send(());
            })
        });
        told.recv().unwrap();
        // The worker is in a batch that ends only when somebody listens.
        let pausing = job.clone();
        let paused = thread::spawn(move || pausing.pause());
        while !paused.is_finished() {
            let _ = told.try_recv();
            thread::yield_now();
        }
        let before = job.pages.load(Relaxed);
        assert!(told.try_recv().is_err());
        assert_eq!(job.pages.load(Relaxed), before);
        job.go();
        told.recv().unwrap();
    }
}
