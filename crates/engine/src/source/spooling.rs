//! The file on the datastore: what goes into it when, and what is done when it fails.
//!
//! While the guest runs, pages of large rounds go over both ways; a round is over when the target has all of
//! both. Before a post-copy that must survive the source (`strict`) all that will be missing goes into the
//! file ([`securing`]). After the commit the file is what the target lives on if this side is lost. A file
//! that fails costs nothing but its help.

mod securing; // before a post-copy that must survive this side

use super::{Signal, SourceDriver};
use crate::{
    queue::RoundQueue,
    spooler::{STALL, SpoolJob, SpoolSaid, Spooler},
    unspool::Files,
};
use api::{Mode, Robust};
use proto::{SourceEvent, control};
use securing::{Securing, SecuringPhase};
use spool::{BlockShape, ExtentKind, Header, Mark, Reader, Secret, Side, Writer};
use std::{
    ops::ControlFlow,
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, TryRecvError, channel},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// A round of less goes over the network alone: it is over before the datastore has made the first of it
/// durable.
const LEAST_ROUND: u64 = 16 << 20;

/// How long removing the file may take.
const REMOVE: Duration = Duration::from_millis(500);

#[derive(Default)]
pub(super) struct Spooling {
    spooler: Option<Spooler>,
    /// Where the target records what it has, once it has said that it reads the file.
    theirs: Option<PathBuf>,
    /// What the thread says of jobs of other turns does not matter any more.
    turn: u32,
    round: Part,
    /// Before a strict post-copy.
    securing: Option<Securing>,
    /// Whether pages are missing: it is a post-copy.
    owes: bool,
    /// Whether what is missing in a relaxed one is on its way into the file.
    follows: bool,
    /// The durable end of the file, and extents that the target has read.
    durable: Mark,
    taken: u64,
    /// Whether the target's own file says that it has everything, once somebody has looked.
    look: Option<Receiver<bool>>,
    /// It was to be a post-copy from the start, and begins with a round.
    round_first: bool,
}

impl Spooling {
    pub(super) fn new(round_first: bool) -> Self {
        Self { round_first, ..Self::default() }
    }
}

/// The file's part in the current round.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Part {
    #[default]
    Over,
    /// The thread takes shares.
    Busy,
    /// It was given up: the target must say that nothing old will arrive any more.
    Stopping,
}

impl SourceDriver {
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
        let say = move |turn, said| drop(tell.send(Signal::Spool(turn, said)));
        let compress = matches!(self.options.compress, api::Compression::Lz4 | api::Compression::Zstd);
        let made = Writer::create(&directory, &header, &Secret(self.secrets.spool), STALL)
            .map_err(|e| e.to_string())
            .and_then(|writer| {
                // So that the target can open it.
                writer.sync(STALL).map_err(|e| e.to_string())?;
                Spooler::start(writer, self.parts.memory.clone(), compress, say).map_err(|e| e.to_string())
            });
        match made {
            Ok(spooler) => self.spooling.spooler = Some(spooler),
            Err(e) => self.lose_spool(&e),
        }
    }

    /// What the target is asked to open.
    pub(super) fn spool_offer(&self) -> Option<control::Spool> {
        self.spooling.spooler.as_ref()?;
        let directory = self.options.spool.as_ref()?.display().to_string();
        Some(control::Spool { directory, secret: self.secrets.spool.to_vec() })
    }

    fn is_strict(&self) -> bool {
        self.options.spooled().is_some_and(|(_, robust)| robust == Robust::Strict)
    }

    /// The target's words about the file are not the machine's business.
    pub(super) fn spool_word(&mut self, event: SourceEvent) -> ControlFlow<Option<SourceEvent>, SourceEvent> {
        let SourceEvent::Message(kind) = &event else { return ControlFlow::Continue(event) };
        match kind {
            control::Kind::Ready(ready) => {
                if let Some(directory) = self.options.spool.as_ref().filter(|_| ready.spool) {
                    let files = Files::of(directory, self.parts.migration);
                    self.spooling.theirs = Some(files.target);
                }
                if self.spooling.spooler.is_some() && !ready.spool {
                    self.lose_spool(&format!("{} cannot use it: {}", self.parts.to, ready.no_spool));
                }
                ControlFlow::Continue(event)
            }
            control::Kind::SpoolTaken(taken) => {
                self.spooling.taken = self.spooling.taken.max(taken.extents);
                if let Some(spooler) = &self.spooling.spooler {
                    spooler.taken(taken.extents);
                }
                ControlFlow::Break(self.first_is_read())
            }
            control::Kind::SpoolStopped(_) => {
                if self.spooling.round == Part::Stopping {
                    self.spooling.round = Part::Over;
                    return ControlFlow::Break(self.sent());
                }
                ControlFlow::Break(None)
            }
            control::Kind::SpoolFailed(failed) => {
                ControlFlow::Break(self.spool_failed(&format!("{}: {}", self.parts.to, failed.why)))
            }
            control::Kind::NowMissing(missing) => {
                // What this says can only spare work: a target that lies lacks pages.
                if let Ok(missing) = proto::page_sets(&missing.blocks, &self.shape) {
                    self.to_push.keep_only(&missing);
                }
                ControlFlow::Break(None)
            }
            _ => ControlFlow::Continue(event),
        }
    }

    /// The round is over once all streams have sent their shares and the file's part is in the target's
    /// memory.
    pub(super) fn sent(&self) -> Option<SourceEvent> {
        let all = self.streams.as_ref().is_some_and(|s| self.round_parts.len() as u32 == s.count());
        let round = self.current.as_ref()?.number;
        (all && self.spooling.round == Part::Over).then_some(SourceEvent::Sent(round))
    }

    /// A round begins: the file takes part, if that is worth it.
    pub(super) fn spool_round(&mut self, round: &Arc<RoundQueue>) {
        let worth = !self.stopped && round.set.bytes().0 >= LEAST_ROUND;
        let (Some(spooler), Some(streams)) = (&self.spooling.spooler, &self.streams) else { return };
        if worth && self.spooling.theirs.is_some() {
            self.spooling.round = Part::Busy;
            spooler.give(SpoolJob::Round(round.clone(), streams.sent().clone()));
        }
    }

    /// The link was lost while the guest runs here. Nobody can say what of the file's part of the current
    /// round has arrived, and nothing of it ever will from now on: the target's fence was closed when the
    /// link was lost there, and what is said from now on begins behind it. So all of it is sent again, and
    /// what was made safe for a post-copy is made so anew.
    pub(super) fn leave_spool(&mut self) {
        if let Some(round) = &self.current {
            round.leave_file();
        }
        if let Some(spooler) = &self.spooling.spooler {
            self.spooling.turn = spooler.leave();
        }
        self.spooling.round = Part::Over;
        self.spooling.securing = None;
        // Nothing is: the guest runs here.
        self.spooling.owes = false;
    }

    /// The thread has something to say.
    pub(super) fn hear_spool(&mut self, turn: u32, said: SpoolSaid) -> Option<SourceEvent> {
        if let SpoolSaid::Durable(mark, _) = &said {
            self.spooling.durable = *mark;
            self.reporter.spool(|s| s.bytes = mark.bytes);
        }
        if turn != self.spooling.turn {
            return None;
        }
        match said {
            SpoolSaid::Durable(mark, receive_from) => {
                if self.spooling.theirs.is_some() {
                    self.say(control::Kind::Spooled(control::Spooled {
                        receive: receive_from.is_some(),
                        receive_from: receive_from.unwrap_or_default(),
                        ..so_far(mark)
                    }));
                }
                None
            }
            SpoolSaid::RoundOver { returned, counts, failed } => {
                let moved = counts.zero + counts.raw + counts.unchanged;
                self.reporter.spooled(counts, moved.saturating_sub(returned.len()));
                // Still unacknowledged (I2): nobody knows which of them the target has.
                self.dirty.union(&returned);
                match failed {
                    None => {
                        self.spooling.round = Part::Over;
                        // Nobody reads again what is in the target's memory.
                        self.release_spool();
                        self.sent()
                    }
                    Some(why) => {
                        // Before anything newer is sent, nothing old may arrive any more (I5).
                        self.spooling.round = Part::Stopping;
                        self.lose_spool(&why);
                        None
                    }
                }
            }
            SpoolSaid::Secured { pages, took } => self.secured(pages, took),
            SpoolSaid::Failed(why) => self.spool_failed(&why),
        }
    }

    /// Gives back the room of what the target has read; not of what it has yet to read to get past it.
    fn release_spool(&self) {
        if let Some(spooler) = &self.spooling.spooler
            && spooler.appended() <= self.spooling.taken
        {
            spooler.writer.release();
        }
    }

    fn spool_failed(&mut self, why: &str) -> Option<SourceEvent> {
        if self.spooling.round == Part::Busy {
            // Its thread gives back what is under way, and then the round goes on.
            if let Some(spooler) = &self.spooling.spooler {
                spooler.fail();
            }
            self.reporter.spool(|s| s.trouble = Some(why.to_owned()));
            return None;
        }
        let safe = matches!(&self.spooling.securing, Some(Securing { stage: SecuringPhase::Safe, .. }));
        if safe || (self.spooling.owes && self.spooling.securing.is_none()) {
            // What is in the file may be all that the target has one day: it stays.
            self.reporter.spool(|s| s.trouble = Some(why.to_owned()));
            self.reporter.note(format!("the spool cannot be used any more: {why}"));
            return None;
        }
        let securing = self.spooling.securing.take();
        if self.spooling.spooler.is_some() {
            self.lose_spool(why);
        }
        match securing?.stage {
            SecuringPhase::Passes => Some(SourceEvent::Decided(self.decide_without())),
            SecuringPhase::Pausing | SecuringPhase::Saved { .. } => {
                let what = "put what the target would lack into the spool".to_owned();
                let why = format!("{why}; --robust strict does not hand the VM over without it");
                Some(SourceEvent::Broke { what, why })
            }
            SecuringPhase::Safe => None,
        }
    }

    /// Without the file from now on. Only before anything is missing: then nobody will ever need what is in
    /// it.
    fn lose_spool(&mut self, why: &str) {
        self.spooling.spooler.take().into_iter().for_each(|spooler| end(spooler, Duration::ZERO));
        self.reporter.spool(|s| {
            s.trouble.get_or_insert_with(|| why.to_owned());
        });
        self.reporter.note(format!("the spool is of no use: {why}; pages go over the network alone"));
        if self.spooling.theirs.is_some() {
            self.say(control::Kind::SpoolStop(control::SpoolStop {}));
        }
        let strict = self.is_strict();
        self.options.spool = None;
        if !strict && self.options.post_copy() {
            return;
        }
        if matches!(self.options.mode, Mode::Hybrid | Mode::PostCopy) {
            self.reporter
                .note("--robust strict: no post-copy without it, so this goes on as pre-copy".into());
        }
        self.forbid_post_copy();
    }

    /// From now on the guest runs on the target only when all its memory is there; it may have to be slowed
    /// for that.
    fn forbid_post_copy(&mut self) {
        self.options.mode = Mode::PreCopy;
        self.rounds.forbid_post_copy();
        self.reporter.forbid_post_copy();
    }

    /// In a relaxed post-copy nothing that is missing is in the file when the VM changes hands.
    pub(super) fn announce_relaxed(&mut self) {
        let Some(spooler) = self.spooling.spooler.as_ref().filter(|_| self.spooling.owes) else { return };
        if self.spooling.securing.is_some() {
            return;
        }
        // Not what is durable: more of a round that was interrupted may become so.
        let end = spooler.appended();
        let manifest = Some(control::Manifest { floor: end, outdated: proto::bitmaps(&self.missing), end });
        let spooled = control::Spooled { manifest, ..so_far(self.spooling.durable) };
        self.say(control::Kind::Spooled(spooled));
        let trailed = self.missing.bytes();
        self.reporter.spool(|s| s.trailed_bytes = trailed.0);
    }

    /// The target runs the guest: in a relaxed post-copy what it lacks goes into the file now.
    pub(super) fn secure_missing(&mut self) {
        let Some(spooler) = &self.spooling.spooler else { return };
        if !self.is_strict() && !std::mem::replace(&mut self.spooling.follows, true) {
            spooler.give(SpoolJob::Secure(self.missing.clone()));
        }
        // A target that was reconnected to may have missed it.
        self.say(control::Kind::Spooled(so_far(self.spooling.durable)));
    }

    /// What is on the datastore, and what is not yet there.
    pub(super) fn spool_state(&self) -> Option<(u64, u64)> {
        let spooler = self.spooling.spooler.as_ref()?;
        Some((self.spooling.durable.bytes, spooler.trails()))
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

/// What is durable so far, and stays in the file for now.
fn so_far(Mark { extents, bytes }: Mark) -> control::Spooled {
    control::Spooled { extents, bytes, ..Default::default() }
}

/// Removes the file as soon as the thread lets go of it.
fn end(spooler: Spooler, patience: Duration) {
    spooler.writer.remove(patience);
}
