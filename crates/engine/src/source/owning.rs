//! Who owns the VM: what the source says to the record, and asks it.

use super::{AGAIN, Signal, SourceDriver};
use crate::ports::{Claim, Claimed, Offer};
use proto::SourceEvent;
use std::{
    io,
    sync::mpsc::channel,
    thread,
    time::{Duration, Instant},
};

/// After so long without an answer the guest, which stands still meanwhile, goes on at the source: before the promise it always may.
const OFFER: Duration = Duration::from_secs(2);

impl SourceDriver {
    /// Begins to tell the record that the target may claim. It takes as long as a disk or a network does, and must be over by the
    /// time of the promise: as long as it is not, nobody can claim.
    pub(super) fn offer(&mut self) -> io::Result<()> {
        let offer = Offer {
            vm: self.parts.vm.clone(),
            migration: self.parts.migration,
            expected: self.parts.epoch,
            from: self.parts.from.clone(),
            to: self.target.clone(),
        };
        let (record, (tell, told)) = (self.parts.record.clone(), channel());
        thread::Builder::new().name("offer".into()).spawn(move || drop(tell.send(record.offer(&offer))))?;
        self.offering = Some(told);
        Ok(())
    }

    /// Waits until it is told. If it cannot be, or not in time, the guest goes on here: that is no decision, there was none to make.
    pub(super) fn offered(&mut self) -> io::Result<()> {
        let Some(told) = self.offering.take() else { return Ok(()) };
        told.recv_timeout(OFFER)
            .unwrap_or_else(|_| Err(io::Error::other("the ownership record does not answer")))
    }

    pub(super) fn claim(&mut self) -> SourceEvent {
        self.hang_up();
        if self.doubt_since.is_some() {
            // Asked in vain just now.
            self.wait_for_word(AGAIN, |event| matches!(event, SourceEvent::Resolved));
        }
        self.doubt_since.get_or_insert_with(Instant::now);
        let claim = Claim {
            vm: self.parts.vm.clone(),
            migration: self.parts.migration,
            expected: self.parts.epoch,
            claimer: self.parts.from.clone(),
        };
        match self.parts.record.claim(&claim) {
            Ok(Claimed::Yours(_)) => {
                self.doubt_since = None;
                SourceEvent::ClaimWon
            }
            Ok(Claimed::Lost(record)) => {
                self.doubt_since = None;
                SourceEvent::ClaimLost(record.epoch.0)
            }
            Err(e) => {
                self.story.note(format!("cannot learn who owns the VM: {e}; asking again"));
                SourceEvent::ClaimUnknown(e.to_string())
            }
        }
    }

    /// Waits, but not longer than until a person has said this word, and says whether that was so. What is heard meanwhile is kept
    /// for later.
    pub(super) fn wait_for_word(&mut self, time: Duration, is_it: impl Fn(&SourceEvent) -> bool) -> bool {
        let end = Instant::now() + time;
        while let Ok(signal) = self.signals.recv_timeout(end.saturating_duration_since(Instant::now())) {
            let spoken = matches!(&signal, Signal::Event(event) if is_it(event));
            self.later.push_back(signal);
            if spoken {
                return true;
            }
        }
        false
    }

    pub(super) fn in_doubt_for_long(&self) -> bool {
        self.doubt_since.is_some_and(|since| since.elapsed() > self.doubt_after)
    }
}
