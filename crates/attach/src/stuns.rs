//! Has vCPUs stand still for moments, again and again.

use crate::Error;
use ports::{Stalls, Stuns};
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use sys::{
    process::PidFd,
    pulse::{Part, Pulse},
    stun::Stun,
};
use units::Locked;

/// How often it is looked who faults, where nobody says who writes. A throttled writer faults several times
/// within it; a vCPU that stopped writing is stunned for so long in vain.
const LOOK: Duration = Duration::from_millis(200);

/// The vCPU threads of a process, of which those that write are stunned when that is asked for.
///
/// A thread that writes is one that faults: its CPU time tells nothing, since who is throttled waits most of
/// the time, and who only computes is none of our business.
#[derive(Debug)]
pub struct VcpuStuns {
    vcpus: u32,
    shared: Arc<StunState>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct StunState {
    process: Arc<PidFd>,
    threads: Vec<i32>,
    longest: Duration,
    wanted: Mutex<Wanted>,
    changed: Condvar,
    stalls: Mutex<Stalls>,
}

#[derive(Debug, Default)]
struct Wanted {
    /// The share of the time, and who writes, where that is known.
    stun: Option<(f64, Option<Vec<i32>>)>,
    /// Somebody stands still just now, or is about to.
    busy: bool,
    over: bool,
}

impl VcpuStuns {
    /// Of these threads; none of them stands still for longer than `longest` at a time.
    pub(crate) fn new(
        process: &Arc<PidFd>,
        mut threads: Vec<i32>,
        longest: Duration,
        pulse: &Pulse,
    ) -> Result<Self, Error> {
        let pid = process.pid();
        // A VMM can run all vCPUs on one thread.
        threads.sort_unstable();
        threads.dedup();
        let vcpus = threads.len() as u32;
        let (wanted, changed, stalls) = Default::default();
        let shared =
            Arc::new(StunState { process: Arc::clone(process), threads, longest, wanted, changed, stalls });
        let (of, pulse) = (Arc::clone(&shared), pulse.clone());
        let thread = thread::Builder::new().name("stuns".to_owned()).spawn(move || of.run(&pulse.part()));
        let thread = thread.map_err(Error::step("start a thread to stun the vCPUs", pid))?;
        Ok(Self { vcpus, shared, thread: Some(thread) })
    }
}

impl Stuns for VcpuStuns {
    fn vcpus(&self) -> u32 {
        self.vcpus
    }

    fn stun(&mut self, duty: f64, writers: Option<&[i32]>) -> io::Result<()> {
        self.shared.wanted.locked().stun =
            Some((duty.clamp(0.01, 1.0), writers.map(<[i32]>::to_vec))).filter(|_| duty > 0.0);
        self.shared.changed.notify_all();
        Ok(())
    }

    fn calm(&mut self) {
        let mut wanted = self.shared.wanted.locked();
        wanted.stun = None;
        self.shared.changed.notify_all();
        while wanted.busy {
            wanted = self.shared.changed.wait(wanted).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn stalls(&self) -> Stalls {
        *self.shared.stalls.locked()
    }
}

impl Drop for VcpuStuns {
    fn drop(&mut self) {
        self.shared.wanted.locked().over = true;
        self.calm();
        if let Some(thread) = self.thread.take() {
            // Its panic was printed.
            let _ = thread.join();
        }
    }
}

impl StunState {
    fn run(&self, part: &Part) {
        sys::urgent::become_urgent();
        part.rest();
        let mut seen = Writers::default();
        let mut wanted = self.wanted.locked();
        while !wanted.over {
            let Some((duty, writers)) = wanted.stun.clone() else {
                wanted = self.changed.wait(wanted).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            wanted.busy = true;
            drop(wanted);
            let whom: Vec<i32> = match writers {
                None => seen.writing(&self.process, &self.threads),
                Some(writers) => self.threads.iter().copied().filter(|tid| writers.contains(tid)).collect(),
            };
            // From here on somebody stands still until we get on.
            part.turn();
            let stood = self.stun(&whom).unwrap_or_else(|error| {
                tracing::debug!(%error, "nobody could be stunned");
                self.longest
            });
            part.rest();
            wanted = self.wanted.locked();
            wanted.busy = false;
            self.changed.notify_all();
            // They run for the rest of the period, or until something else is wanted.
            let runs = stood.mul_f64(1.0 / duty - 1.0);
            let same = |wanted: &mut Wanted| wanted.stun.as_ref().is_some_and(|(now, _)| *now == duty);
            let waited = self.changed.wait_timeout_while(wanted, runs, same);
            wanted = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has them stand still once; shorter when nobody is to be stunned any more. Says for how long.
    fn stun(&self, whom: &[i32]) -> io::Result<Duration> {
        if whom.is_empty() {
            return Ok(self.longest);
        }
        let stun = Stun::begin(&self.process, whom, self.longest)?;
        let count = stun.stunned() as u64;
        let stood = stun.wait();
        self.stalls.locked().add(count, stood);
        Ok(stood)
    }
}

/// How often threads have faulted, and which of them did lately.
#[derive(Default)]
struct Writers {
    looked: Option<Instant>,
    faults: HashMap<i32, u64>,
    writing: Vec<i32>,
}

impl Writers {
    /// At first, all of them.
    fn writing(&mut self, process: &PidFd, threads: &[i32]) -> Vec<i32> {
        if self.looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            self.looked = Some(Instant::now());
            let faulted = |tid: &i32| {
                // One that has ended did not.
                let faults = process.thread_faults(*tid).unwrap_or(0);
                self.faults.insert(*tid, faults).is_none_or(|before| faults > before)
            };
            self.writing = threads.iter().copied().filter(faulted).collect();
        }
        self.writing.clone()
    }
}
