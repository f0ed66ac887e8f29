//! Source: which of the open streams carry pages.

use policy::Width;
use std::{
    ops::RangeInclusive,
    sync::{
        Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::Instant,
};
use units::Locked;

/// Lets as many streams through as it pays to use. The others are connected and wait: one more costs no time
/// when it is wanted.
#[derive(Debug)]
pub(crate) struct Gate {
    width: Mutex<Width>,
    changed: Condvar,
    start: Instant,
    widest: AtomicU32,
    closed: AtomicBool,
}

impl Gate {
    pub(crate) fn new(streams: RangeInclusive<u32>) -> Self {
        let width = Width::new(streams);
        let widest = AtomicU32::new(width.now());
        Self {
            width: Mutex::new(width),
            changed: Condvar::new(),
            start: Instant::now(),
            widest,
            closed: false.into(),
        }
    }

    /// The streams get something to do.
    pub(crate) fn begin(&self) {
        self.width.locked().begin(self.start.elapsed());
    }

    /// Waits until this stream is wanted, or there is nothing left to do for it.
    pub(crate) fn wait(&self, stream: u32, idle: impl Fn() -> bool) {
        let width = self.width.locked();
        let waits = |width: &mut Width| stream >= width.now() && !self.closed.load(Relaxed) && !idle();
        drop(self.changed.wait_while(width, waits));
    }

    /// Nothing is left to do: nobody need wait.
    pub(crate) fn all_taken(&self) {
        // Whoever found something left has begun to wait by now.
        drop(self.width.lock());
        self.changed.notify_all();
    }

    /// The streams end: nobody waits any more.
    pub(crate) fn close(&self) {
        self.closed.store(true, Relaxed);
        self.all_taken();
    }

    /// A stream moved some of the guest's memory. Says how many streams there are from now on, if that
    /// changes.
    pub(crate) fn moved(&self, bytes: u64) -> Option<u32> {
        let changed = self.width.locked().observe(self.start.elapsed(), bytes)?;
        tracing::debug!(streams = changed, "another number of streams");
        self.widest.fetch_max(changed, Relaxed);
        self.changed.notify_all();
        Some(changed)
    }

    /// The most streams that were in use at a time.
    pub(crate) fn widest(&self) -> u32 {
        self.widest.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::mpsc::channel, thread, time::Duration};

    #[test]
    fn a_stream_waits_until_it_is_wanted_or_nothing_is_left() {
        let gate = Gate::new(1..=2);
        gate.wait(0, || false);
        gate.wait(1, || true);
        thread::scope(|scope| {
            let (through, passed) = channel();
            let waiting = &gate;
            scope.spawn(move || {
                waiting.wait(1, || false);
                let _ = through.send(());
            });
            gate.begin();
            // As long as the only stream moves anything, another is tried at some time.
            while gate.moved(1 << 20).is_none() {
                assert!(passed.try_recv().is_err());
                thread::sleep(Duration::from_millis(1));
            }
            passed.recv_timeout(Duration::from_secs(5)).unwrap();
        });
        assert_eq!(gate.widest(), 2);
    }

    #[test]
    fn nobody_waits_for_work_that_others_took() {
        let gate = Gate::new(1..=2);
        let taken = std::sync::atomic::AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| gate.wait(1, || taken.load(Relaxed)));
            taken.store(true, Relaxed);
            gate.all_taken();
        });
        thread::scope(|scope| {
            scope.spawn(|| gate.wait(1, || false));
            gate.close();
        });
    }
}
