//! A shared datastore that is as fast as a story wants, or does not answer at all.
//!
//! Both ways have a rate of their own, as the ways over a network have. Knows nothing of the rest of the
//! laboratory: tests of single crates include this file as it is.

use fuser::Errno;
use std::{
    io,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};
use view::{Belief, Call, Fate, Job, View, locked};

/// By its path, so that whoever includes this file has it, too.
#[path = "view.rs"]
pub(crate) mod view;

/// What a bucket passes at once: 20 ms of its rate.
const BURST: Duration = Duration::from_millis(20);

/// A mounted directory.
pub struct Datastore {
    shared: Arc<DatastoreState>,
    view: View,
}

#[derive(Default)]
struct DatastoreState {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    stalled: bool,
    /// Bytes a second that each way carries.
    rate: Option<u64>,
    /// What `fsync` answers, and how often it was asked.
    fsync: Option<i32>,
    fsyncs: u64,
    /// What `read` answers, and how often it has.
    reads: Option<i32>,
    failed_reads: u64,
}

impl DatastoreState {
    fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Waits while the store is made to stall.
    fn pass(&self) -> MutexGuard<'_, State> {
        let state = self.lock();
        self.changed.wait_while(state, |state| state.stalled).unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, call: Call, job: Box<dyn Job>) {
        let mut state = self.lock();
        let error = match call {
            Call::Sync => {
                state.fsyncs += 1;
                state.fsync
            }
            Call::Read | Call::DirectRead => {
                state.failed_reads += u64::from(state.reads.is_some());
                state.reads
            }
            _ => None,
        };
        drop(state);
        match error {
            Some(errno) => job.fail(Errno::from_i32(errno)),
            None => job.go(),
        }
    }
}

impl Datastore {
    /// Mounts the directory `of` at the new directory `at`.
    pub fn mount(at: &Path, of: &Path) -> io::Result<Self> {
        let shared = Arc::new(DatastoreState::default());
        let ways = Ways { out: way(shared.clone()), back: way(shared.clone()), shared: shared.clone() };
        Ok(Self { shared, view: View::mount(at, of, Belief::Nothing, ways)? })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.view.path()
    }

    /// From now on each way carries so many bytes a second; none: as many as it can.
    pub fn limit(&self, bytes_per_s: Option<u64>) {
        self.shared.lock().rate = bytes_per_s;
    }

    /// From now on nothing is answered, or everything again.
    pub fn stall(&self, stalled: bool) {
        self.shared.lock().stalled = stalled;
        self.shared.changed.notify_all();
    }

    /// From now on `fsync` fails with this error, or works again.
    pub fn fail_fsync(&self, errno: Option<i32>) {
        self.shared.lock().fsync = errno;
    }

    /// From now on `read` fails with this error, or works again.
    pub fn fail_reads(&self, errno: Option<i32>) {
        self.shared.lock().reads = errno;
    }

    /// How often `read` has failed because it was to.
    pub fn failed_reads(&self) -> u64 {
        self.shared.lock().failed_reads
    }

    /// Bytes that were written, and that were read.
    pub fn traffic(&self) -> (u64, u64) {
        self.view.tree().traffic()
    }

    /// How often it was asked to make something durable.
    pub fn fsyncs(&self) -> u64 {
        self.shared.lock().fsyncs
    }
}

impl Drop for Datastore {
    fn drop(&mut self) {
        // Whoever waits for it could not be killed.
        self.stall(false);
        self.limit(None);
    }
}

type Way = mpsc::Sender<(Call, usize, Box<dyn Job>)>;

/// What one way carries: answers come as late as its rate demands.
fn way(shared: Arc<DatastoreState>) -> Way {
    let (jobs, todo) = mpsc::channel::<(Call, usize, Box<dyn Job>)>();
    thread::spawn(move || {
        let mut free_at = Instant::now();
        for (call, bytes, job) in todo {
            let rate = shared.pass().rate;
            if let Some(rate) = rate {
                free_at = free_at.max(Instant::now() - BURST);
                free_at += Duration::from_secs_f64(bytes as f64 / rate as f64);
                thread::sleep(free_at.saturating_duration_since(Instant::now()));
            }
            shared.finish(call, job);
        }
    });
    jobs
}

struct Ways {
    shared: Arc<DatastoreState>,
    out: Way,
    back: Way,
}

impl Fate for Ways {
    fn meet(&self, call: Call, bytes: usize, job: Box<dyn Job>) {
        match call {
            // Durable is what was written before it.
            Call::Write | Call::Sync => drop(self.out.send((call, bytes, job))),
            Call::Read | Call::DirectRead => drop(self.back.send((call, bytes, job))),
            Call::Resize => job.go(),
            _ => {
                drop(self.shared.pass());
                job.go();
            }
        }
    }
}
