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

/// After so long without an answer the guest, which stands still meanwhile, goes on at the source: before the
/// fence it always may.
const OFFER: Duration = Duration::from_secs(2);

impl SourceDriver {
    /// Begins to tell the record that the target may claim. It takes as long as a disk or a network does, and
    /// must be over by the time of the fence: as long as it is not, nobody can claim.
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

    /// Waits until it is told. If it cannot be, or not in time, the guest goes on here: that is no decision,
    /// there was none to make.
    pub(super) fn offered(&mut self) -> io::Result<()> {
        let Some(told) = self.offering.take() else { return Ok(()) };
        told.recv_timeout(OFFER)
            .unwrap_or_else(|_| Err(io::Error::other("the ownership record does not answer")))
    }

    /// Asks the record who owns the VM, a little later if it was asked in vain just now.
    pub(super) fn claim(&mut self) {
        self.hang_up();
        match self.doubt_since {
            Some(_) => self.asks_at = Some(Instant::now() + AGAIN),
            None => self.ask_record(),
        }
    }

    /// The answer comes by way of the queue: between two claims a person's word is heard, and how long it has
    /// been in doubt.
    pub(super) fn ask_record(&mut self) {
        let answer = self.ask();
        let _ = self.tell.send(Signal::Event(answer));
    }

    fn ask(&mut self) -> SourceEvent {
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
                self.reporter.note(format!("cannot learn who owns the VM: {e}; asking again"));
                SourceEvent::ClaimUnknown(e.to_string())
            }
        }
    }

    pub(super) fn in_doubt_for_long(&self) -> bool {
        self.doubt_since.is_some_and(|since| since.elapsed() > self.doubt_after)
    }
}
