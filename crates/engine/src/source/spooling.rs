//! The file on the datastore: made, written and removed as the core's [`proto::SourceSpool`] decides.

use super::{Signal, SourceDriver};
use crate::{
    Broken,
    spooler::{STALL, SpoolJob, Spooler},
    unspool::Files,
};
use api::{MigrateOptions, Mode, Robust};
use page::Counts;
use proto::{
    NextStep, SourceEvent, SourceSpool, SpoolEffect, SpoolEvent, SpoolSaid, SpoolTerms, ToSecure, control,
};
use spool::{BlockShape, ExtentKind, Header, Reader, Secret, Side, Writer};
use std::{
    collections::VecDeque,
    ops::ControlFlow::{self, Break, Continue},
    path::PathBuf,
    sync::mpsc::{Receiver, TryRecvError, channel},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use units::{MemorySet, PAGE_SIZE};

/// A round of fewer pages goes over the network alone.
const LEAST_ROUND: u64 = (16 << 20) / PAGE_SIZE as u64;

/// How long removing the file may take.
const REMOVE: Duration = Duration::from_millis(500);

pub(super) struct Spooling {
    /// What decides, by times since the beginning.
    pub(super) core: SourceSpool<MemorySet>,
    begun: Instant,
    /// When it wants to hear that it is late.
    pub(super) late_at: Option<Instant>,
    spooler: Option<Spooler>,
    /// Where the target records what it has, once it has said that it reads the file.
    theirs: Option<PathBuf>,
    /// Whether the target's own file says that it has everything, once somebody has looked.
    look: Option<Receiver<bool>>,
    /// It was to be a post-copy from the start, and begins with a round.
    round_first: bool,
}

impl Spooling {
    pub(super) fn new(options: &MigrateOptions, round_first: bool) -> Self {
        let strict = options.spooled().is_some_and(|(_, robust)| robust == Robust::Strict);
        let without = MigrateOptions { spool: None, ..options.clone() };
        let terms = SpoolTerms { strict, post_copy_without: without.post_copy(), least_round: LEAST_ROUND };
        Self {
            core: SourceSpool::new(terms),
            begun: Instant::now(),
            late_at: None,
            spooler: None,
            theirs: None,
            look: None,
            round_first,
        }
    }
}

impl SourceDriver {
    /// Something has happened to the file: does what follows. Returns what the migration is told of it.
    pub(super) fn spool(&mut self, event: SpoolEvent<MemorySet>) -> Option<SourceEvent> {
        let mut events = VecDeque::from([event]);
        let mut told = None;
        while let Some(event) = events.pop_front() {
            for effect in self.spooling.core.handle(self.spooling.begun.elapsed(), event) {
                match self.spool_effect(effect) {
                    Continue(more) => events.extend(more),
                    Break(event) => told = Some(event),
                }
            }
        }
        told
    }

    /// Does one act. `Break`: the migration is told this.
    fn spool_effect(
        &mut self,
        effect: SpoolEffect<MemorySet>,
    ) -> ControlFlow<SourceEvent, Vec<SpoolEvent<MemorySet>>> {
        match effect {
            SpoolEffect::TakeShares => {
                if let (Some(round), Some(streams)) = (&self.current, &self.streams) {
                    self.give_spooler(SpoolJob::Round(round.clone(), streams.sent().clone()));
                }
            }
            SpoolEffect::Secure(pages) => self.give_spooler(SpoolJob::Secure(match pages {
                ToSecure::Dirty => self.dirty.clone(),
                ToSecure::Missing => self.missing.clone(),
                ToSecure::These(pages) => pages,
            })),
            SpoolEffect::EndShares(why) => {
                self.spooling.spooler.iter().for_each(Spooler::fail);
                self.reporter.spool(|s| s.trouble = Some(why));
            }
            SpoolEffect::Leave(turn) => {
                if let Some(round) = &self.current {
                    round.leave_file();
                }
                self.spooling.spooler.iter().for_each(|spooler| spooler.leave(turn));
            }
            SpoolEffect::Release => {
                // Not what the target has yet to read to get past it.
                if let Some(spooler) = &self.spooling.spooler
                    && spooler.appended() <= self.spooling.core.taken()
                {
                    spooler.writer.release();
                }
            }
            SpoolEffect::Lose(why) => self.lose_spool(why),
            SpoolEffect::Keep(why) => {
                self.reporter.note(format!("the spool cannot be used any more: {why}"));
                self.reporter.spool(|s| s.trouble = Some(why));
            }
            SpoolEffect::ForbidPostCopy => {
                self.options.mode = Mode::PreCopy;
                self.rounds.forbid_post_copy();
                self.reporter.forbid_post_copy();
            }
            SpoolEffect::Dirty(pages) => self.dirty.union(&pages),
            SpoolEffect::Collect => {
                let written = match self.collect_written() {
                    Ok(written) => written,
                    Err(Broken { what, why }) => return Break(SourceEvent::Broke { what, why }),
                };
                let passes = self.spooling.core.passes() + 1;
                self.reporter.spool(|s| s.passes = passes);
                let collected = SpoolEvent::Collected(self.options.max_downtime);
                return Continue(vec![SpoolEvent::Written(written), collected]);
            }
            SpoolEffect::Decide => return Break(SourceEvent::Decided(self.decide_without())),
            SpoolEffect::Say(kind) => self.say(kind),
            SpoolEffect::Announce { floor, end, outdated } => {
                if outdated {
                    let trailed = self.missing.bytes();
                    self.reporter.spool(|s| s.trailed_bytes = trailed.0);
                }
                let outdated = if outdated { proto::bitmaps(&self.missing) } else { vec![] };
                let manifest = Some(control::Manifest { floor, outdated, end });
                let spooled = control::Spooled { manifest, ..self.spooling.core.durable().so_far() };
                self.say(control::Kind::Spooled(spooled));
            }
            SpoolEffect::Await(time) => self.spooling.late_at = Some(Instant::now() + time),
            SpoolEffect::Tell(event) => return Break(event),
            SpoolEffect::Safe(runs_there) => {
                self.reporter.safe();
                if runs_there {
                    self.reporter.note(
                        "all that the target lacks is in the spool: it no longer needs this host".into(),
                    );
                }
            }
            SpoolEffect::Hopeless => self.reporter.note(
                "the guest writes faster than the datastore takes it, so a post-copy would not be safe \
                 (--robust strict): this goes on as pre-copy"
                    .into(),
            ),
        }
        Continue(vec![])
    }

    fn give_spooler(&self, job: SpoolJob) {
        if let Some(spooler) = &self.spooling.spooler {
            spooler.give(job);
        }
    }

    /// What else is done where a post-copy cannot be made safe. The guest may have to be slowed for it.
    fn decide_without(&mut self) -> NextStep {
        let decision = self.rounds.choose(self.reporter.lasted(), self.dirty.bytes());
        let step = self.heed(decision);
        if step == NextStep::Round
            && let Err(Broken { what, why }) = self.judge()
        {
            self.reporter.note(format!("the guest could not be slowed: {what}: {why}"));
        }
        step
    }

    /// Makes the file, if one is wanted.
    pub(super) fn begin_spool(&mut self) {
        let Some((directory, robust)) = self.options.spooled() else { return };
        let directory = directory.to_owned();
        self.reporter.spool(|s| {
            s.directory = directory.display().to_string();
            s.robust = robust;
        });
        if self.spooling.round_first {
            self.reporter.note(
                "--robust strict: before the guest is stopped, what it would lack goes over the network and \
                 into the spool"
                    .into(),
            );
        }
        let blocks = self.parts.memory.blocks().iter();
        let header = Header {
            migration: self.parts.migration,
            side: Side::Source,
            host: self.parts.from.clone(),
            vm: self.parts.vm.clone(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            blocks: blocks.map(|b| BlockShape { name: b.name.clone(), pages: b.pages }).collect(),
        };
        let tell = self.tell.clone();
        let say = move |turn, said, counts| drop(tell.send(Signal::Spool(turn, said, counts)));
        let compress = matches!(self.options.compress, api::Compression::Lz4 | api::Compression::Zstd);
        let made = Writer::create(&directory, &header, &Secret(self.secrets.spool), STALL)
            .map_err(|e| e.to_string())
            .and_then(|writer| {
                // So that the target can open it.
                writer.sync(STALL).map_err(|e| e.to_string())?;
                Spooler::start(writer, self.parts.memory.clone(), compress, say).map_err(|e| e.to_string())
            });
        let made = made.map(|spooler| self.spooling.spooler = Some(spooler));
        self.spool(SpoolEvent::Made(made));
    }

    /// What the target is asked to open.
    pub(super) fn spool_offer(&self) -> Option<control::Spool> {
        self.spooling.spooler.as_ref()?;
        let directory = self.options.spool.as_ref()?.display().to_string();
        Some(control::Spool { directory, secret: self.secrets.spool.to_vec() })
    }

    /// The target's words about the file are not the machine's business.
    pub(super) fn spool_word(&mut self, event: SourceEvent) -> ControlFlow<Option<SourceEvent>, SourceEvent> {
        let SourceEvent::Message(kind) = &event else { return Continue(event) };
        if let control::Kind::NowMissing(missing) = kind {
            // What this says can only spare work: a target that lies lacks pages.
            if let Ok(missing) = proto::page_sets(&missing.blocks, &self.shape) {
                self.to_push.keep_only(&missing);
            }
            return Break(None);
        }
        let Some(said) = SpoolEvent::of(kind, &self.parts.to) else { return Continue(event) };
        if let control::Kind::Ready(ready) = kind {
            let directory = self.options.spool.as_ref().filter(|_| ready.spool);
            self.spooling.theirs =
                directory.map(|directory| Files::of(directory, self.parts.migration).target);
            self.spool(said);
            return Continue(event);
        }
        let told = self.spool(said);
        let taken = self.spooling.core.taken();
        self.spooling.spooler.iter().for_each(|spooler| spooler.taken(taken));
        Break(told)
    }

    /// The thread has something to say.
    pub(super) fn hear_spool(
        &mut self,
        turn: u32,
        said: SpoolSaid<MemorySet>,
        counts: Counts,
    ) -> Option<SourceEvent> {
        match &said {
            SpoolSaid::Durable(mark, _) => self.reporter.spool(|s| s.bytes = mark.bytes),
            SpoolSaid::RoundOver(returned, _) if turn == self.spooling.core.turn() => {
                let moved = counts.zero + counts.raw + counts.unchanged;
                self.reporter.spooled(counts, moved.saturating_sub(returned.len()));
            }
            _ => {}
        }
        self.spool(SpoolEvent::Said(turn, said))
    }

    fn lose_spool(&mut self, why: String) {
        self.spooling.spooler.take().into_iter().for_each(|spooler| end(spooler, Duration::ZERO));
        self.reporter.note(format!("the spool is of no use: {why}; pages go over the network alone"));
        self.reporter.spool(|s| {
            s.trouble.get_or_insert(why);
        });
        let strict = self.options.spooled().is_some_and(|(_, robust)| robust == Robust::Strict);
        self.options.spool = None;
        if strict && matches!(self.options.mode, Mode::Hybrid | Mode::PostCopy) {
            self.reporter
                .note("--robust strict: no post-copy without it, so this goes on as pre-copy".into());
        }
    }

    /// Extents that were appended so far.
    pub(super) fn spooled_so_far(&self) -> u64 {
        self.spooling.spooler.as_ref().map_or(0, Spooler::appended)
    }

    /// What is on the datastore, and what is not yet there.
    pub(super) fn spool_state(&self) -> Option<(u64, u64)> {
        let spooler = self.spooling.spooler.as_ref()?;
        Some((self.spooling.core.durable().bytes, spooler.trails()))
    }

    /// Whether the target, which cannot be reached, has recorded on the datastore that it has everything.
    /// Never waits for the datastore: what it says is known the next time.
    pub(super) fn target_is_complete(&mut self) -> bool {
        if let Some(look) = &self.spooling.look {
            match look.try_recv() {
                Ok(true) => return true,
                Err(TryRecvError::Empty) => return false,
                Ok(false) | Err(TryRecvError::Disconnected) => {}
            }
        }
        let Some(path) = self.spooling.theirs.clone() else { return false };
        let secret = Secret(self.secrets.spool);
        let (tell, told) = channel();
        let look = move || {
            let index = Reader::open(&path, &secret).and_then(|reader| reader.scan());
            let complete =
                index.is_ok_and(|i| i.extents().iter().any(|extent| extent.kind == ExtentKind::Complete));
            let _ = tell.send(complete);
        };
        self.spooling.look = Some(told);
        // Without a thread it is not known, as before.
        let _ = thread::Builder::new().name("spool-look".into()).spawn(look);
        false
    }

    /// Nobody needs the file any more.
    pub(super) fn end_spool(&mut self) {
        self.spooling.spooler.take().into_iter().for_each(|spooler| end(spooler, REMOVE));
    }

    /// The target has everything, and this side knows it. A target that could not say so has left its word in
    /// its own file, for us.
    pub(super) fn end_targets_file(&mut self) {
        let Some(path) = self.spooling.theirs.take() else { return };
        // Without a thread, or on a datastore that hangs, the janitor finds it.
        let remove = move || drop(std::fs::remove_file(path));
        let _ = thread::Builder::new().name("spool-end".into()).spawn(remove);
    }
}

/// Removes the file as soon as the thread lets go of it.
fn end(spooler: Spooler, patience: Duration) {
    spooler.writer.remove(patience);
}
