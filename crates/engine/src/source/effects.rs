//! What the source does, act by act.

use super::{AGAIN, Signal, SourceDriver};
use crate::{
    Broken,
    conn::{LONG_SILENCE, SILENCE, now_ns},
    pause::PauseLog,
    ports::{MachineError, RunState, Saved, Stopped, Tracker},
    queue::RoundQueue,
    send::{Job, Streams},
    survey, verify, why,
};
use policy::PausePart;
use proto::{Decision, NextStep, SourceEffect, SourceEvent, SpoolEvent, control};
use std::{io, sync::Arc, thread};
use units::{Bytes, Epoch, MemorySet, PAGE_SIZE};

impl SourceDriver {
    /// Does one act. Errors say what was tried and why it failed.
    pub(super) fn effect(&mut self, effect: SourceEffect) -> Result<Option<SourceEvent>, Broken> {
        match effect {
            SourceEffect::Send(kind) => {
                self.asked |= matches!(kind, control::Kind::Prepare(_));
                if matches!(kind, control::Kind::Authorize(_)) {
                    self.reporter.pause.begin(PausePart::Authorize);
                }
                self.say(kind);
                self.reporter.pause.end(PausePart::Authorize);
                Ok(None)
            }
            SourceEffect::OpenStreams => {
                self.before = self.parts.machine.lock().run_state()?;
                self.look_at_writes()?;
                let present = survey::present(&*self.parts.memory, &self.handed_over);
                self.dirty = present.map_err(why("look for the guest's pages"))?;
                self.reporter.begun(&self.dirty);
                self.foresee()?;
                self.open_streams().map_err(why("open the streams"))?;
                self.bear_silence(SILENCE);
                Ok(Some(SourceEvent::StreamsOpen))
            }
            SourceEffect::SendRound(round) => self.send_round(round),
            SourceEffect::SendRest(_) => {
                if let Some(round) = self.current.clone() {
                    self.give(round);
                }
                Ok(None)
            }
            SourceEffect::AbortPause => self.run_on().map(Some),
            SourceEffect::Rejoin => Ok(self.rejoin()),
            SourceEffect::Decide => {
                if let (Some(tracker), Some(round)) = (&mut self.parts.tracker, &self.current) {
                    tracker.learn(&round.unchanged());
                }
                self.collect()?;
                self.end_round(self.dirty.len());
                let decision = self.rounds.decide(self.reporter.lasted(), self.dirty.bytes());
                let step = self.heed(decision);
                if step == NextStep::Round {
                    self.judge()?;
                }
                Ok(self.decided(step))
            }
            SourceEffect::JournalPause => {
                self.end_watch();
                let before = self.parts.machine.lock().prepare_stop()?;
                self.before = before;
                self.can_be_carried(before)?;
                self.offer().map_err(why("start a thread"))?;
                self.parts.journal.pausing(before).map_err(why("journal the pause"))?;
                Ok(None)
            }
            SourceEffect::StopGuest => {
                self.look_before_the_stop();
                self.calm();
                if let Some(tracker) = &mut self.parts.tracker {
                    tracker.suspend_throttling().map_err(why("let the guest's writers go on"))?;
                }
                self.count_stalls();
                self.reporter.stopping(now_ns());
                self.stopped = true;
                let Stopped { before: found, drained } = self.parts.machine.lock().stop()?;
                self.reporter.stopped(now_ns(), drained);
                if found != self.before {
                    // Somebody has stopped it, or it has, between our question and our stop.
                    self.before = found;
                    self.parts.journal.pausing(found).map_err(why("journal the pause"))?;
                    self.can_be_carried(found)?;
                }
                Ok(Some(SourceEvent::Stopped))
            }
            SourceEffect::SendMissing => {
                let written = self.collect_written()?;
                self.spool(SpoolEvent::Written(written));
                self.spool(SpoolEvent::Missing(self.stopped));
                self.reporter.pause.begin(PausePart::Missing);
                let missing = control::Missing { blocks: proto::bitmaps(&self.dirty) };
                self.missing.union(&self.dirty);
                self.dirty.clear();
                self.say(control::Kind::Missing(missing));
                self.reporter.pause.end(PausePart::Missing);
                Ok(None)
            }
            SourceEffect::Save => {
                let (tell, pause) = (self.tell.clone(), self.aborted_pauses);
                let save = self.parts.machine.spawn("save", move |machine| {
                    let _ = tell.send(Signal::Saved(pause, machine.save()));
                });
                save.map_err(why("start a thread"))?;
                Ok(None)
            }
            SourceEffect::SendState(after_round) => self.send_state(after_round).map(Some),
            SourceEffect::HoldGuest => {
                self.reporter.pause.begin(PausePart::Offer);
                self.offered().map_err(why("offer the VM to the target"))?;
                self.reporter.pause.end(PausePart::Offer);
                self.reporter.pause.begin(PausePart::Hold);
                // From here on a target that is only slow costs the whole migration.
                self.bear_silence(LONG_SILENCE);
                // From the authorization on the target may run it, and nobody here.
                self.parts.machine.lock().hold()?;
                self.reporter.pause.end(PausePart::Hold);
                Ok(None)
            }
            SourceEffect::Fence => {
                self.reporter.pause.begin(PausePart::Fence);
                self.parts.journal.fence(self.parts.epoch).map_err(why("journal the fence"))?;
                self.reporter.pause.end(PausePart::Fence);
                Ok(Some(SourceEvent::Fenced))
            }
            SourceEffect::ResumeGuest => {
                self.bring_back();
                Ok(None)
            }
            SourceEffect::Claim => {
                self.claim();
                Ok(None)
            }
            SourceEffect::Gone(epoch) => {
                (self.doubt_since, self.asks_at) = (None, None);
                self.bear_silence(SILENCE);
                self.insist("journal that the VM is gone", |d| d.parts.journal.gone(Epoch(epoch)));
                Ok(None)
            }
            SourceEffect::ServeMissing => {
                self.serve_missing();
                Ok(None)
            }
            SourceEffect::Reconnect => Ok(self.reconnect()),
            SourceEffect::Forget => {
                self.hang_up();
                self.insist("journal that everything is there", |d| d.parts.journal.settled());
                self.end_spool();
                self.end_targets_file();
                // What QEMU still writes on its way out is let through. Protections that end with it cost
                // nothing; taking them back costs 60 ms a GiB.
                if let Some(Err(e)) = self.parts.tracker.as_mut().map(|tracker| tracker.suspend_throttling())
                {
                    tracing::debug!(%e, "writers may have to wait for QEMU's end");
                }
                if let Err(e) = self.parts.machine.lock().destroy() {
                    self.reporter.note(format!("the empty QEMU on the source would not end: {e}"));
                }
                self.parts.tracker = None;
                Ok(None)
            }
            SourceEffect::End(_) => unreachable!("the loop ends before"),
        }
    }

    /// Ends the migration of a VM whose state cannot be carried over, before anything was done to it.
    pub(super) fn can_be_carried(&self, state: RunState) -> Result<(), Broken> {
        match state.hindrance() {
            None => Ok(()),
            Some(why) => Err(Broken::new(format!("move {}", self.parts.vm), why)),
        }
    }

    fn send_round(&mut self, number: u32) -> Result<Option<SourceEvent>, Broken> {
        self.collect()?;
        let empty = self.nothing();
        let set = std::mem::replace(&mut self.dirty, empty);
        self.end_round(0);
        self.reporter.round(number, &set);
        if self.stopped {
            self.reporter.pause.begin(PausePart::LastPages);
        }
        self.give(Arc::new(RoundQueue::new(number, set)));
        Ok(None)
    }

    /// The current round, if there is one, has carried all that it was to carry.
    pub(super) fn end_round(&mut self, dirtied: u64) {
        let finds_kept = self.reporter.finds_kept();
        let Some(mut moved) = self.reporter.end_round(dirtied) else { return };
        if finds_kept {
            // As if it had been as fast as it was foreseen.
            let pages = self.foreseen_in(moved.took);
            moved.told = moved.told.max(pages);
            moved.wire = moved.wire.max(Bytes(pages * PAGE_SIZE as u64));
        }
        self.rounds.moved(moved);
    }

    /// Tells the user what is to be known of the next step.
    pub(super) fn heed(&self, Decision { step, warning }: Decision) -> NextStep {
        if let Some(warning) = warning {
            self.reporter.warn(warning);
        }
        step
    }

    /// To the streams.
    pub(super) fn give(&mut self, round: Arc<RoundQueue>) {
        self.current = Some(round.clone());
        if let Some(streams) = &self.streams {
            if round.number > 1 {
                streams.forget_kept();
            }
            streams.give(&Job::Round(round.clone(), Arc::new(MemorySet::empty([]))));
        }
        self.spool(SpoolEvent::Round {
            number: round.number,
            pages: round.set.len(),
            streams: self.streams.as_ref().map_or(0, Streams::count),
            stopped: self.stopped,
        });
    }

    pub(super) fn nothing(&self) -> MemorySet {
        MemorySet::empty(self.shape.0.iter().copied())
    }

    pub(super) fn collect(&mut self) -> Result<(), Broken> {
        scan(&mut self.parts.tracker, &mut self.reporter.pause, &mut self.dirty)
    }

    /// What the guest wrote since that was asked last, which is dirty now.
    pub(super) fn collect_written(&mut self) -> Result<MemorySet, Broken> {
        let mut written = self.nothing();
        scan(&mut self.parts.tracker, &mut self.reporter.pause, &mut written)?;
        self.dirty.union(&written);
        Ok(written)
    }

    /// The device state is there; what was written to guest memory meanwhile must go along.
    pub(super) fn saved(&mut self, saved: Result<Saved, MachineError>) -> Option<SourceEvent> {
        let saved = saved.map_err(Broken::from).and_then(|saved| {
            self.reporter.saved(&saved);
            self.state = Some(saved.state);
            self.collect()
        });
        match saved {
            Ok(()) => self.spool(SpoolEvent::Saved(!self.dirty.is_empty())),
            Err(Broken { what, why }) => Some(SourceEvent::Broke { what, why }),
        }
    }

    fn send_state(&mut self, after_round: u32) -> Result<SourceEvent, Broken> {
        self.end_round(0);
        self.reporter.pause.end(PausePart::Secure);
        if self.options.verify {
            self.reporter.pause.begin(PausePart::Hash);
            if let Some(lost) = self.send_hashes()? {
                self.hang_up();
                return Ok(SourceEvent::LinkLost(lost.to_string()));
            }
            self.reporter.pause.end(PausePart::Hash);
        }
        self.spool(SpoolEvent::Sending(self.spooled_so_far()));
        self.reporter.pause.begin(PausePart::SendState);
        let state = self.state.take().unwrap_or_default();
        self.say(control::Kind::State(control::State {
            after_round,
            stream: Some(proto::compressed(&state.stream)),
            private: private_blocks(&state.private),
            history: self
                .reporter
                .history(&self.parts.history, self.streams.as_ref().and_then(Streams::learnt)),
            paused: self.before == RunState::Paused,
        }));
        self.reporter.pause.end(PausePart::SendState);
        Ok(SourceEvent::StateSent)
    }

    /// Says why the link is lost, if it is.
    fn send_hashes(&self) -> Result<Option<io::Error>, Broken> {
        let mut lost = None;
        let hashed = verify::hash_all(&*self.parts.memory, |hashes| {
            let said = match &self.speaker {
                Some(speaker) => speaker.say(control::Kind::Hashes(hashes)).map(drop),
                None => Err(io::ErrorKind::NotConnected.into()),
            };
            said.map_err(|e| {
                lost = Some(e);
                io::ErrorKind::NotConnected.into()
            })
        });
        match (hashed, lost) {
            (_, Some(lost)) => Ok(Some(lost)),
            (Err(e), None) => Err(why("send the hashes of the guest's memory")(e)),
            (Ok(()), None) => Ok(None),
        }
    }

    fn serve_missing(&mut self) {
        self.end_round(0);
        self.reporter.post_copy(&self.missing);
        self.to_push.refill(&self.missing);
        if let Some(streams) = &self.streams {
            if self.current.is_some() {
                streams.forget_kept();
            }
            streams.give(&Job::Push(self.to_push.clone()));
        }
        self.spool(SpoolEvent::Serving);
    }

    /// A fence must reach the disk, or what follows from it must wait.
    pub(super) fn insist(&mut self, what: &str, attempt: impl Fn(&mut Self) -> io::Result<()>) {
        let mut told = false;
        while let Err(e) = attempt(self) {
            if !std::mem::replace(&mut told, true) {
                self.reporter.note(format!("cannot {what}: {e}; trying again"));
            }
            thread::sleep(AGAIN);
        }
    }
}

/// Adds what the guest wrote since that was asked last.
fn scan(
    tracker: &mut Option<Box<dyn Tracker>>,
    pause: &mut PauseLog<PausePart>,
    written: &mut MemorySet,
) -> Result<(), Broken> {
    let Some(tracker) = tracker else { return Ok(()) };
    pause.begin(PausePart::LastScan);
    tracker.collect(written).map_err(why("collect the pages that the guest wrote"))?;
    pause.end(PausePart::LastScan);
    Ok(())
}

/// As they travel.
pub(super) fn private_blocks(blocks: &[(String, Vec<u8>)]) -> Vec<control::PrivateBlock> {
    let compressed = |(name, content): &(String, Vec<u8>)| control::PrivateBlock {
        name: name.clone(),
        content: Some(proto::compressed(content)),
    };
    blocks.iter().map(compressed).collect()
}
