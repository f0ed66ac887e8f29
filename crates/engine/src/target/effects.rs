//! What the target does, act by act.

use super::{AGAIN, MAX_STREAMS, Signal, Taken, TargetDriver};
use crate::{
    Broken,
    conn::now_ns,
    faults::Faults,
    kept,
    pause::Timed,
    ports::{Block, Claim, Claimed, DeviceState, Handover, Reach, Request, RunState},
    receive::{PageReceiver, WritePolicy},
    shared_port::SharedPort,
    why,
};
use proto::{
    TargetEffect, TargetEvent,
    control::{self, step::Part},
};
use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use units::{BlockId, Epoch, Locked, MigrationId, PAGE_SIZE};

/// RAM blocks of one VM, at most; QEMU itself stops at 256 memory slots of a machine.
const MAX_BLOCKS: usize = 256;

/// Pages of one RAM block, at most: 64 TiB, beyond what x86-64 guests have today.
const MAX_PAGES: u64 = 1 << 34;

/// A RAM block's name, at most: QEMU's own are shorter.
const MAX_NAME: usize = 256;

/// Where a block is to be found that may be handed over, at most: a name, or a number drawn at random.
const MAX_PLACE: usize = 256;

/// The identity of an ownership record, at most: ours have 60 bytes.
const MAX_RECORD: usize = 256;

/// A device state's parts, at most, all of them together: 512 MiB, the largest video memory. What packs so
/// well that it fits into a message could otherwise unpack to 255 times as much.
const MAX_STATE: u64 = 512 << 20;

/// How long a bridge's port may take until it forwards: twice the longest forward delay (30 s), and some
/// more. And how often it is looked; there is no event for it.
const HEARD: Duration = Duration::from_secs(65);
const LISTEN: Duration = Duration::from_millis(100);

/// Nobody may have this host wait for longer.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

impl TargetDriver {
    pub(super) fn effect(&mut self, effect: TargetEffect) -> Result<Option<TargetEvent>, Broken> {
        match effect {
            TargetEffect::Send(mut kind) => {
                if let control::Kind::Ready(ready) = &mut kind {
                    ready.token = self.token.0.to_vec();
                    ready.spool = self.taken.as_ref().is_some_and(|taken| taken.spool.is_some());
                    ready.no_spool = std::mem::take(&mut self.no_spool);
                    ready.record = self.taken()?.request.record.clone();
                    // Otherwise `prepare` would have failed.
                    ready.private = true;
                    ready.kept = self.taken()?.receiver.kept().is_some();
                    let reached = self.taken()?.reached.iter();
                    ready.reached = reached
                        .map(|one| control::Reached { block: one.block.0.into(), nonce: one.nonce.number() })
                        .collect();
                }
                if let control::Kind::Committed(committed) = &mut kind {
                    committed.steps = self.steps();
                }
                self.gave_reasons |= matches!(kind, control::Kind::Failed(_) | control::Kind::Refused(_));
                let ready = matches!(kind, control::Kind::Ready(_));
                let round = matches!(kind, control::Kind::RoundReceived(_));
                self.say(kind);
                if round {
                    self.try_journal()?;
                }
                if ready {
                    self.tell_kept();
                }
                Ok(None)
            }
            TargetEffect::Prepare(prepare) => match self.prepare(prepare) {
                Ok(()) => Ok(self.once_heard()?),
                refused => Ok(Some(TargetEvent::Prepared(refused))),
            },
            TargetEffect::TakeMissing(bitmaps) => {
                self.pause.begin(Part::Missing);
                let taken = self.taken()?;
                let pages = proto::page_sets(&bitmaps, &taken.receiver.shape)
                    .map_err(|e| Broken::new("read the missing pages", e.to_string()))?;
                taken.receiver.owe(&pages).map_err(why("make holes for the missing pages"))?;
                let missing = taken.receiver.missing().clone();
                let nothing = missing.is_empty();
                taken.record_missing(missing).map_err(why("record the missing pages"))?;
                // The guest is stopped upon our answer: whoever gets ready for the load must be done.
                drop(taken.machine.lock());
                self.pause.end(Part::Missing);
                if nothing {
                    let _ = self.tell.send(Signal::Event(TargetEvent::AllPlaced));
                }
                Ok(Some(TargetEvent::MissingRecorded))
            }
            TargetEffect::ForgetAnnounced => {
                self.taken()?.forget_announced().map_err(why("record that nothing is missing"))?;
                Ok(None)
            }
            TargetEffect::KeepHashes(hashes) => {
                let receiver = &self.taken()?.receiver;
                let mut announced = receiver.announced.locked();
                if let Some(announced) = announced.as_mut() {
                    announced.keep(&hashes, &*receiver.memory).map_err(why("read the hashes"))?;
                }
                Ok(None)
            }
            TargetEffect::Compare => {
                self.pause.begin(Part::Compare);
                let compared = self.compare()?;
                self.pause.end(Part::Compare);
                Ok(Some(TargetEvent::Compared(compared)))
            }
            TargetEffect::Load(mut state) => {
                self.pause.begin(Part::Load);
                self.taken()?.request.history = std::mem::take(&mut state.history);
                self.goes_on = if state.paused { RunState::Paused } else { RunState::Running };
                let state = decompress(&state).map_err(|e| Broken::new("decompress the device state", e))?;
                let taken = self.taken()?;
                if taken.receiver.missing().is_empty() {
                    taken.receiver.enter(WritePolicy::Closed);
                }
                self.load(state)?;
                Ok(None)
            }
            TargetEffect::Claim if self.asked_in_vain => {
                self.asks_at = Some(Instant::now() + AGAIN);
                Ok(None)
            }
            TargetEffect::Claim => self.claim().map(Some),
            TargetEffect::Resume => {
                self.arrived = true;
                let (goes_on, began) = (self.goes_on, now_ns());
                let mut machine = self.taken()?.machine.lock();
                match machine.restore(goes_on) {
                    Ok(ago) => {
                        let restored = now_ns();
                        let at_ns = restored.saturating_sub(ago.as_nanos() as u64);
                        if let Err(e) = machine.announce() {
                            tracing::warn!(%e, "the guest runs, but could not be announced to the network");
                        }
                        drop(machine);
                        self.pause.add(Part::Resume, began, at_ns.max(began));
                        self.pause.add(Part::Announce, restored, now_ns());
                        self.taken()?.note_that_it_went_on();
                        // Not before: looking through what is missing for what the file has takes a processor
                        // from the pause.
                        self.taken()?.place_spooled();
                        Ok(Some(TargetEvent::Resumed { at_ns }))
                    }
                    Err(e) => Ok(Some(TargetEvent::ResumeFailed(e.to_string()))),
                }
            }
            TargetEffect::SendReceived => {
                let taken = self.taken()?;
                let blocks = proto::bitmaps(&taken.receiver.received());
                self.say(control::Kind::Received(control::Received {
                    round: self.round,
                    blocks,
                    token: self.token.0.to_vec(),
                }));
                Ok(None)
            }
            TargetEffect::SendStillMissing => {
                let blocks = proto::bitmaps(&self.taken()?.receiver.missing());
                self.say(control::Kind::StillMissing(control::StillMissing {
                    blocks,
                    token: self.token.0.to_vec(),
                }));
                Ok(None)
            }
            TargetEffect::Settle => {
                self.settle()?;
                Ok(None)
            }
            TargetEffect::Destroy => {
                self.destroy();
                Ok(None)
            }
            TargetEffect::End(_) => unreachable!("the loop ends before"),
        }
    }

    fn prepare(&mut self, prepare: control::Prepare) -> Result<(), Vec<String>> {
        let blocks: Vec<Block> =
            prepare.blocks.into_iter().map(|b| Block { name: b.name, pages: b.pages }).collect();
        let sane = (1..=MAX_BLOCKS).contains(&blocks.len())
            && blocks.iter().all(|b| (1..=MAX_PAGES).contains(&b.pages) && b.name.len() <= MAX_NAME)
            && (1..=MAX_STREAMS).contains(&prepare.streams)
            && Epoch(prepare.epoch) <= Epoch::MOST
            && prepare.record.len() <= MAX_RECORD
            && prepare.handovers.len() <= blocks.len()
            && prepare.handovers.iter().all(|handover| {
                (handover.block as usize) < blocks.len() && handover.place.len() <= MAX_PLACE
            });
        if !sane {
            return Err(vec![format!(
                "the request is out of bounds: 1 to {MAX_BLOCKS} RAM blocks of at most {MAX_PAGES} pages, 1 \
                 to {MAX_STREAMS} streams, an epoch of at most {}, an ownership record named by at most \
                 {MAX_RECORD} bytes, and RAM blocks to be handed over that are among those, found by at most \
                 {MAX_PLACE} bytes",
                Epoch::MOST
            )]);
        }
        let tagger = match *prepare.tag_key {
            [] => None,
            ref key => match <[u8; 32]>::try_from(key) {
                Ok(key) => Some(page::Tagger::new(key)),
                Err(_) => return Err(vec!["the key of the tags has another length than agreed".into()]),
            },
        };
        let private = decompress_private(&prepare.private, &mut { MAX_STATE }).map_err(|why| vec![why])?;
        let mut request = Request {
            migration: self.migration,
            vm: prepare.vm,
            from: self.source.clone(),
            epoch: Epoch(prepare.epoch),
            recipe: prepare.recipe,
            blocks,
            handovers: prepare.handovers.into_iter().filter_map(handover).collect(),
            private,
            post_copy: prepare.post_copy,
            came_by: prepare.came_by.try_into().ok().map(|id| MigrationId(u128::from_le_bytes(id))),
            record: prepare.record,
            history: vec![],
        };
        self.give_up = Duration::from_millis(prepare.give_up_ms).min(LONGEST);
        let waiting = self.host.prepare(&request)?;
        // QEMU has it now.
        request.private = vec![];
        let spool = prepare.spool;
        let tell = self.tell.clone();
        let all_placed = move || drop(tell.send(Signal::Event(TargetEvent::AllPlaced)));
        let receiver = PageReceiver::new(waiting.memory, waiting.missing, prepare.verify, tagger, all_placed);
        let receiver = receiver.keeps(waiting.kept);
        let mut taken = Taken {
            request,
            reached: waiting.reached,
            has_ended: waiting.machine.has_ended(),
            ender: waiting.machine.ender(),
            machine: SharedPort::new(waiting.machine),
            journal: SharedPort::new(waiting.journal),
            recorded: None,
            loading: false,
            receiver: Arc::new(receiver),
            faults: None,
            spool: None,
            streams: prepare.streams,
        };
        if let Some(spool) = spool {
            self.open_spool(&mut taken, &spool);
        }
        // Beside the first pages, which are soon on their way.
        let ready = taken.machine.spawn("get-ready", |machine| {
            if let Err(e) = machine.prepare_load() {
                tracing::debug!(%e, "loading will take a little longer");
            }
        });
        if let Err(e) = ready {
            tracing::debug!(%e, "loading will take a little longer");
        }
        // Loading a device state reads guest RAM: whoever faults then must be answered.
        let faults =
            taken.receiver.missing_mode.is_some().then(|| Faults::start(taken.receiver.clone())).transpose();
        let result = match faults {
            Ok(faults) => {
                taken.faults = faults;
                Ok(())
            }
            Err(e) => Err(vec![format!("cannot start a thread: {e}")]),
        };
        self.taken = Some(taken);
        result
    }

    /// Tells the source what is kept of its VM, beside the pages that are on their way.
    fn tell_kept(&self) {
        let Some((receiver, (conn, speaker))) =
            self.taken.as_ref().map(|taken| &taken.receiver).zip(self.control.as_ref())
        else {
            return;
        };
        let Some((kept, tagger)) = receiver.kept() else { return };
        let (kept, shape, speaker) = (Arc::downgrade(&kept), receiver.shape.clone(), speaker.clone());
        let told = conn.another().and_then(|conn| {
            let tell = move || kept::tell(&kept, &shape, &tagger, &conn, &speaker);
            thread::Builder::new().name("tell-kept".into()).spawn(tell)
        });
        if let Err(e) = told {
            tracing::debug!(%e, "what is kept is not told; all pages travel");
        }
    }

    /// The target is ready once its network would hear the guest: a bridge with a spanning tree forwards
    /// nothing of a new port for up to a minute, and until then a guest that is resumed is cut off. Whatever
    /// is heard meanwhile is acted upon.
    fn once_heard(&mut self) -> Result<Option<TargetEvent>, Broken> {
        let (unheard, differences) = {
            let machine = self.taken()?.machine.lock();
            (machine.unheard(), machine.differences())
        };
        for what in differences {
            let text = format!("on {}, {what}", self.host.name());
            tracing::info!(text, "the VM");
            self.say(control::Kind::Note(control::Note { text }));
        }
        let Some(silent) = unheard() else { return Ok(Some(TargetEvent::Prepared(Ok(())))) };
        let speaker = self.control.as_ref().map(|(_, speaker)| speaker.clone());
        let note = move |text: String| {
            tracing::info!(text, "the network");
            // A source that is gone is noticed by who listens.
            let note = control::Kind::Note(control::Note { text });
            drop(speaker.as_ref().map(|speaker| speaker.say(note)));
        };
        let host = self.host.name();
        note(format!("on {host}, {silent}; waiting for it, at most {} s", HEARD.as_secs()));
        let tell = self.tell.clone();
        let wait = move || {
            let end = Instant::now() + HEARD;
            while let Some(silent) = unheard() {
                if Instant::now() > end {
                    note(format!("on {host}, {silent}; the guest's network is silent there until it does"));
                    break;
                }
                thread::sleep(LISTEN);
            }
            drop(tell.send(Signal::Event(TargetEvent::Prepared(Ok(())))));
        };
        thread::Builder::new().name("heard".into()).spawn(wait).map_err(why("wait for the network"))?;
        Ok(None)
    }

    fn compare(&mut self) -> Result<Result<(), String>, Broken> {
        let receiver = &self.taken()?.receiver;
        let missing = receiver.missing().clone();
        let announced = receiver.announced.locked();
        let Some(announced) = announced.as_ref() else { return Ok(Ok(())) };
        let differing = announced.differing(&*receiver.memory, &missing).map_err(why("hash the memory"))?;
        Ok(match differing {
            None => Ok(()),
            Some((block, page)) => {
                let name = &receiver.memory.blocks()[usize::from(block.0)].name;
                let at = page.0 * PAGE_SIZE as u64;
                Err(format!(
                    "page {} of RAM block {name} (offset {at:#x}) differs between the two sides",
                    page.0
                ))
            }
        })
    }

    /// Claims the VM at its record.
    pub(super) fn claim(&mut self) -> Result<TargetEvent, Broken> {
        (self.asks_at, self.asked_in_vain) = (None, false);
        self.pause.begin(Part::Claim);
        let record = self.host.record();
        let claimer = self.host.name();
        let request = &self.taken()?.request;
        let claim =
            Claim { vm: request.vm.clone(), migration: request.migration, expected: request.epoch, claimer };
        let claimed = record.claim(&claim);
        self.pause.end(Part::Claim);
        Ok(match claimed {
            Ok(Claimed::Yours(epoch)) => TargetEvent::ClaimWon(epoch.0),
            Ok(Claimed::Lost(record)) => TargetEvent::ClaimLost(record.owner),
            Err(e) => {
                tracing::error!(%e, "the ownership record cannot be asked");
                self.asked_in_vain = true;
                TargetEvent::ClaimUnknown(e.to_string())
            }
        })
    }

    /// What this side did while the guest stood still, for the source's report.
    fn steps(&self) -> Vec<control::Step> {
        let step = |step: &Timed<Part>| control::Step {
            part: step.part.into(),
            began_ns: step.began,
            ended_ns: step.ended,
        };
        self.pause.steps().iter().map(step).collect()
    }

    /// Nothing is missing: the guest's memory is like any other's again.
    fn settle(&mut self) -> Result<(), Broken> {
        let taken = self.taken()?;
        taken.receiver.enter(WritePolicy::Closed);
        taken.receiver.forget_kept();
        if let Some(missing_mode) = &taken.receiver.missing_mode {
            // Only a QEMU that is gone refuses, and then nobody misses a page.
            if let Err(e) = missing_mode.finish() {
                tracing::error!(%e, "the watch for missing pages would not end");
            }
        }
        if let Some(faults) = taken.faults.take() {
            faults.end();
        }
        while let Err(e) = taken.journal.lock().settled() {
            tracing::error!(%e, "cannot record that everything is here; trying again");
            thread::sleep(AGAIN);
        }
        let summary = taken.receiver.summary();
        if let Some(spool) = taken.spool.take() {
            spool.thread.settled();
            // A source that cannot hear us finds our word in our file.
            let source_hears = self.control.is_some();
            spool.thread.remove(source_hears, false);
            self.settled_spool = Some(spool.thread);
        }
        let summary = control::Settled { qemu_ended: self.qemu_ended, ..summary };
        self.say(control::Kind::Settled(summary));
        Ok(())
    }

    fn destroy(&mut self) {
        let source_may_ask = !self.source_is_back;
        let Some(mut taken) = self.taken.take() else { return };
        if let Some(spool) = taken.spool.take() {
            spool.thread.core().stop();
            spool.thread.remove(true, false);
        }
        if let Some(faults) = taken.faults.take() {
            faults.end();
        }
        if taken.loading {
            // It may wait for a page that nobody sends any more.
            (taken.ender)();
        }
        let destroyed = taken.machine.lock().destroy();
        if let Err(e) = destroyed {
            tracing::error!(%e, "the half-made VM would not end");
        }
        let abandoned = taken.journal.lock().abandoned(source_may_ask);
        if let Err(e) = abandoned {
            tracing::error!(%e, "cannot forget an abandoned migration yet; trying again");
            // As long as it is known, no other migration of the VM is taken.
            let again = taken.journal.later("forget", move |journal| {
                while journal.abandoned(source_may_ask).is_err() {
                    thread::sleep(AGAIN);
                }
            });
            if let Err(e) = again {
                tracing::error!(%e, "no thread to forget it");
            }
        }
        self.host.ended(&taken.request, false);
    }
}

/// What may be reached; none if it is of a kind that this side does not know: such a block travels.
fn handover(offered: control::Handover) -> Option<Handover> {
    let reach = match offered.reach {
        1 => Reach::Host,
        _ => return None,
    };
    Some(Handover { block: BlockId(u16::try_from(offered.block).ok()?), reach, place: offered.place })
}

pub(crate) fn decompress(state: &control::State) -> Result<DeviceState, String> {
    decompress_within(state, MAX_STATE)
}

/// All parts together may be so large.
fn decompress_within(state: &control::State, mut room: u64) -> Result<DeviceState, String> {
    let private = decompress_private(&state.private, &mut room)?;
    let stream = state.stream.as_ref().map_or(Ok(vec![]), |stream| decompress_part(stream, &mut room))?;
    Ok(DeviceState { stream, private })
}

fn decompress_private(
    blocks: &[control::PrivateBlock],
    room: &mut u64,
) -> Result<Vec<(String, Vec<u8>)>, String> {
    let mut decompress = |block: &control::PrivateBlock| {
        let content = block.content.as_ref().map_or(Ok(vec![]), |content| decompress_part(content, room))?;
        Ok((block.name.clone(), content))
    };
    blocks.iter().map(&mut decompress).collect()
}

fn decompress_part(compressed: &control::Compressed, room: &mut u64) -> Result<Vec<u8>, String> {
    let raw = proto::decompressed(compressed, *room).map_err(|e| e.to_string())?;
    *room -= raw.len() as u64;
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_is_reached_in_an_unknown_way_travels() {
        let offered = |block, reach| control::Handover { block, reach, place: b"p0".to_vec() };
        let known = Handover { block: BlockId(3), reach: Reach::Host, place: b"p0".to_vec() };
        let table =
            [((3, 1), Some(known)), ((3, 0), None), ((3, 2), None), ((3, 9), None), ((1 << 16, 1), None)];
        for ((block, reach), wanted) in table {
            assert_eq!(handover(offered(block, reach)), wanted);
        }
    }

    #[test]
    fn a_device_state_is_bounded_as_a_whole_too() {
        let part = || Some(proto::compressed(&[0; 600]));
        let private = control::PrivateBlock { name: "vga.vram".into(), content: part() };
        let state = |parts: usize| control::State {
            stream: part(),
            private: vec![private.clone(); parts],
            ..Default::default()
        };
        let decompressed = decompress_within(&state(2), 1800).unwrap();
        assert_eq!((decompressed.stream.len(), decompressed.private.len()), (600, 2));
        assert!(decompress_within(&state(3), 1800).unwrap_err().contains("at most 0 are acceptable"));
        assert!(decompress_within(&state(2), 1799).is_err());
    }
}
