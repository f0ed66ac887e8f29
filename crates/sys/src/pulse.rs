//! Whether the threads of ours get on for which another process waits.

use crate::proc::Stat;
use std::{
    fs,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread,
};
use units::Locked;

/// All of them. Clones share it.
#[derive(Clone, Default, Debug)]
pub struct Pulse(Arc<Mutex<Vec<Arc<Turns>>>>);

#[derive(Debug)]
struct Turns {
    thread: i32,
    count: AtomicU64,
    /// How many there were when it was looked last.
    seen: AtomicU64,
    resting: AtomicBool,
}

/// One thread's part in it, from its beginning until this is dropped. A thread that ends in a panic never
/// gets on again.
#[derive(Debug)]
pub struct Part {
    pulse: Pulse,
    turns: Arc<Turns>,
}

impl Pulse {
    /// The calling thread has a part in it from now on.
    pub fn part(&self) -> Part {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        let (count, seen, resting) = (AtomicU64::new(1), AtomicU64::new(0), AtomicBool::new(false));
        let turns = Arc::new(Turns { thread, count, seen, resting });
        self.locked().push(turns.clone());
        Part { pulse: self.clone(), turns }
    }

    /// Whether each of the threads has had a turn since this was asked last, or rests; and none of them is
    /// stopped.
    pub fn goes_on(&self) -> bool {
        // All of them are looked at: what one has done must not count the next time.
        self.locked().iter().filter(|turns| !turns.go_on()).count() == 0
    }

    fn locked(&self) -> MutexGuard<'_, Vec<Arc<Turns>>> {
        self.0.locked()
    }
}

impl Turns {
    fn go_on(&self) -> bool {
        let count = self.count.load(SeqCst);
        let turned = self.seen.swap(count, Relaxed) != count;
        // One that ended takes itself out.
        let stat = fs::read_to_string(format!("/proc/self/task/{}/stat", self.thread)).unwrap_or_default();
        (turned || self.resting.load(SeqCst)) && !Stat::parse(&stat).is_ok_and(|stat| stat.is_stopped())
    }
}

impl Part {
    /// It gets on, and goes on doing so.
    pub fn turn(&self) {
        self.turns.resting.store(false, SeqCst);
        self.turns.count.fetch_add(1, SeqCst);
    }

    /// Nobody waits for it until its next turn; only that it is stopped would still show.
    pub fn rest(&self) {
        self.turns.resting.store(true, SeqCst);
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if thread::panicking() {
            self.turns.resting.store(false, SeqCst);
        } else {
            self.pulse.locked().retain(|turns| !Arc::ptr_eq(turns, &self.turns));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_no_turn_and_does_not_rest_is_missed() {
        let pulse = Pulse::default();
        assert!(pulse.goes_on(), "nobody has a part in it");
        let (first, second) = (pulse.part(), pulse.part());
        assert!(pulse.goes_on(), "both have begun");
        first.turn();
        assert!(!pulse.goes_on(), "the second has done nothing since");
        second.rest();
        first.turn();
        assert!(pulse.goes_on());
        second.turn();
        assert!(!pulse.goes_on(), "the first has done nothing since");
        drop(first);
        assert!(!pulse.goes_on(), "the second has no turn");
        drop(second);
        assert!(pulse.goes_on());
    }

    #[test]
    fn a_thread_that_panicked_is_missed() {
        let pulse = Pulse::default();
        let of = pulse.clone();
        let thread = thread::spawn(move || {
            let _part = of.part();
            panic!("wanted by the test");
        });
        assert!(thread.join().is_err());
        assert!(pulse.goes_on(), "it had begun");
        assert!(!pulse.goes_on());
    }
}
