//! The threads that write the target's store: one transaction at a time. Mirrors `agent/store` and
//! `Acceptor::answer_record`.

use super::{Recording, SpoolRecording};
use crate::{
    link::{Side, Word},
    planted::PlantedBug,
    record::Answer,
    world::{Timer, World, say},
};

impl World {
    /// Whether a transaction of the store can begin: there is one at a time.
    pub(super) fn store_is_free(&self) -> bool {
        !self.target.store.is_unsynced() || self.has(PlantedBug::ClaimNotSynced)
    }

    /// An `fsync` of the store.
    pub(super) fn target_syncs(&mut self) {
        let claimed = self.target.store.read().arrival.as_ref().is_some_and(|arrival| arrival.claimed);
        if self.has(PlantedBug::ClaimNotSynced) && claimed {
            return self.set(Timer::Lazy(Side::Target));
        }
        self.target_synced();
    }

    /// The store is durable as it is now.
    pub fn target_synced(&mut self) {
        self.target.store.sync();
        let owner = self.target.store.durable().offer;
        self.ghost.committed |= owner.is_some_and(|offer| offer.decided && offer.owner == Side::Target);
    }

    /// Whether the thread that records what is missing can go on.
    pub fn recorder_can(&self) -> bool {
        let Some(work) = self.target.work.as_deref().filter(|_| self.up[1]) else { return false };
        match work.recording {
            _ if work.recording_spool == SpoolRecording::Written => true,
            Recording::Written => true,
            Recording::Asked(_) => self.store_is_free(),
            Recording::Done => work.recording_spool != SpoolRecording::Done && self.store_is_free(),
        }
    }

    /// It writes, then syncs.
    pub fn recorder_moves(&mut self) {
        let Some(work) = self.target.work.as_deref_mut() else { return };
        if work.recording == Recording::Done || work.recording_spool == SpoolRecording::Written {
            if let SpoolRecording::Asked(record) = work.recording_spool {
                say!(self, "target: records where the spool is, {record:?}");
                work.recording_spool = SpoolRecording::Written;
                self.target.store.write(|store| {
                    if let Some(arrival) = &mut store.arrival {
                        arrival.spool = Some(record);
                    }
                });
            } else {
                say!(self, "target: where the spool is is durable");
                work.recording_spool = SpoolRecording::Done;
                self.target_synced();
            }
            return;
        }
        if let Recording::Asked(missing) = work.recording {
            say!(self, "target: records what it is missing");
            work.recording = Recording::Written;
            self.target.store.write(|store| {
                if let Some(arrival) = &mut store.arrival {
                    arrival.missing = Some(missing);
                    // Nor is anything to be had from a file, then.
                    arrival.spool = arrival.spool.filter(|_| !missing.none());
                }
            });
        } else {
            say!(self, "target: what it is missing is durable");
            work.recording = Recording::Done;
            self.target_synced();
        }
    }

    /// Whether a claim that came over a connection can be gone on with (`answer_record`).
    pub fn server_can(&self) -> bool {
        let begun = self.target.serving.front().map(|(_, _, answer)| answer.is_some());
        self.up[1] && begun.is_some_and(|begun| begun || self.store_is_free())
    }

    /// It is written, then durable and answered.
    pub fn server_moves(&mut self) {
        let idempotent = !self.has(PlantedBug::ClaimNotIdempotent);
        let Some((conn, claim, answer)) = self.target.serving.pop_front() else { return };
        match answer {
            None => {
                let mut answer = Answer::Unknown;
                self.target.store.write(|store| {
                    if let Some(offer) = &mut store.offer {
                        answer = offer.claim(claim, idempotent);
                    }
                });
                say!(self, "target: the source's claim comes to {answer:?}");
                self.target.serving.push_front((conn, claim, Some(answer)));
            }
            Some(answer) => {
                self.target_synced();
                self.say_on(conn, Side::Target, Word::Claimed(answer));
                self.shut(conn, Side::Target);
            }
        }
    }
}
