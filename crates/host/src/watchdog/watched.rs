//! What of a migration its watchdog hears: when writers may have to wait, and where a pause has got to.

use super::{heartbeat::Watchdog, words::Word};
use agent::store::Departure;
use ports::{RunState, SourceJournal, Stalls, Tracker};
use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, mpsc::sync_channel},
    thread,
    time::Duration,
};
use units::{BlockId, Epoch, Locked, MemorySet};

/// So long the guest is kept waiting for the state directory, in a pause or on the way there. As long as the
/// fence is not known to be durable, it may always go on here: no authorization was sent.
const PATIENCE: Duration = Duration::from_secs(2);

/// The source's journal, of whose pauses a watchdog hears.
pub(crate) struct Watched {
    journal: Arc<Mutex<Departure>>,
    watchdog: Arc<Watchdog>,
    /// The journal says that the pause is ours.
    pausing: bool,
}

impl Watched {
    pub(crate) fn new(journal: Departure, watchdog: Arc<Watchdog>) -> Self {
        Self { journal: Arc::new(Mutex::new(journal)), watchdog, pausing: false }
    }

    /// Waits for what is late.
    fn journal(&self) -> MutexGuard<'_, Departure> {
        self.journal.locked()
    }

    /// Does it on a thread of its own. If that is not done in time it never counts: it is undone as soon as
    /// it is done, and nobody comes to the journal in between.
    fn within_patience(
        &self,
        step: impl FnOnce(&mut Departure) -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        // Without room: what is not taken was not said.
        let (journal, (tell, told)) = (self.journal.clone(), sync_channel(0));
        let work = move || {
            let mut journal = journal.locked();
            let done = step(&mut journal);
            if tell.send(done).is_err()
                && let Err(error) = journal.withdrawn()
            {
                tracing::error!(%error, "a pause that came to nothing stays in the journal; a restarted \
                                         agent clears it up");
            }
        };
        thread::Builder::new().name("journal".into()).spawn(work)?;
        told.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            let why = format!("the state directory does not answer for {} s", PATIENCE.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, why))
        })
    }

    /// Says it to the watchdog. One that is gone does nothing any more.
    fn tell(&self, word: Word) {
        if let Err(error) = self.watchdog.say(word) {
            tracing::warn!(%error, ?word, "nobody heard it");
        }
    }
}

impl SourceJournal for Watched {
    fn pausing(&mut self, before: RunState) -> io::Result<()> {
        let word = if before == RunState::Running { Word::Pausing } else { Word::PausingStopped };
        self.watchdog.say(word)?;
        let noted = self.within_patience(move |journal| journal.pausing(before));
        // A guest that was not stopped need not be resumed. Said a second time, it was.
        if noted.is_err() && !self.pausing {
            self.tell(Word::Back);
        }
        self.pausing |= noted.is_ok();
        noted
    }

    fn fence(&mut self, expected: Epoch) -> io::Result<()> {
        self.within_patience(move |journal| journal.fence(expected))?;
        self.tell(Word::Fenced);
        Ok(())
    }

    fn back(&mut self) -> io::Result<()> {
        self.journal().back()?;
        self.pausing = false;
        self.tell(Word::Back);
        Ok(())
    }

    fn gone(&mut self, epoch: Epoch) -> io::Result<()> {
        self.journal().gone(epoch)
    }

    fn settled(&mut self) -> io::Result<()> {
        self.journal().settled()
    }
}

/// A tracker of which the watchdog hears whether writers may have to wait for it.
pub(crate) struct WatchedTracker {
    /// None: it has ended.
    tracker: Option<Box<dyn Tracker>>,
    watchdog: Arc<Watchdog>,
    /// What was said last.
    waits: bool,
}

impl WatchedTracker {
    /// One of whose writers the watchdog believes that they may have to wait.
    pub(crate) fn new(tracker: Box<dyn Tracker>, watchdog: Arc<Watchdog>) -> Self {
        Self { tracker: Some(tracker), watchdog, waits: true }
    }

    fn tracker(&mut self) -> io::Result<&mut Box<dyn Tracker>> {
        self.tracker.as_mut().ok_or_else(|| io::Error::other("the tracker has ended"))
    }

    /// Says it where it changes: before writers may have to wait, and after that is over.
    fn say(&mut self, waits: bool) -> io::Result<()> {
        if self.waits != waits {
            self.watchdog.say(if waits { Word::Waits } else { Word::Free })?;
            self.waits = waits;
        }
        Ok(())
    }

    fn now(&mut self) -> io::Result<()> {
        let waits = self.tracker.as_ref().is_some_and(|tracker| tracker.may_make_wait());
        self.say(waits)?;
        // Nobody waits for us whom nobody would let go.
        if waits { self.watchdog.watches() } else { Ok(()) }
    }
}

impl Tracker for WatchedTracker {
    fn begin(&mut self) -> io::Result<()> {
        self.tracker()?.begin()?;
        self.now()
    }

    fn collect(&mut self, dirty: &mut MemorySet) -> io::Result<()> {
        // What was written is missing, whatever else is wrong (I2).
        self.tracker()?.collect(dirty)?;
        self.now()
    }

    fn leave_out(&mut self, blocks: &[BlockId]) -> io::Result<()> {
        self.tracker()?.leave_out(blocks)?;
        self.now()
    }

    fn can_throttle(&self) -> bool {
        self.tracker.as_ref().is_some_and(|tracker| tracker.can_throttle())
    }

    fn throttle(&mut self, sent_per_s: f64) -> io::Result<()> {
        self.say(true)?;
        self.tracker()?.throttle(sent_per_s)?;
        self.now()
    }

    fn agree(&mut self, share: f64, max_stall: Duration) {
        if let Some(tracker) = &mut self.tracker {
            tracker.agree(share, max_stall);
        }
    }

    fn suspend_throttling(&mut self) -> io::Result<()> {
        self.tracker()?.suspend_throttling()
    }

    fn resume_throttling(&mut self) {
        if let Some(tracker) = &mut self.tracker {
            tracker.resume_throttling();
        }
    }

    fn learn(&mut self, unchanged: &MemorySet) {
        if let Some(tracker) = &mut self.tracker {
            tracker.learn(unchanged);
        }
    }

    fn stalls(&self) -> Stalls {
        self.tracker.as_ref().map(|tracker| tracker.stalls()).unwrap_or_default()
    }

    fn may_make_wait(&self) -> bool {
        self.tracker.as_ref().is_some_and(|tracker| tracker.may_make_wait())
    }

    fn writers(&mut self) -> Option<Vec<i32>> {
        self.tracker.as_mut()?.writers()
    }
}

impl Drop for WatchedTracker {
    fn drop(&mut self) {
        self.tracker = None;
        // Whoever does not hear it takes us for a little more important than we are.
        let _ = self.say(false);
    }
}
