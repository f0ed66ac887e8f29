//! The source's driver: does what `proto::Source` says, and tells it what came of it.

use crate::{
    Broken,
    conn::{Conn, Heard, Speaker, now_ns},
    kept::KeptTable,
    ports::{DeviceState, HasEnded, MachineError, RunState, Saved, VmCheck},
    queue::{PushQueue, RoundQueue},
    secrets::Secrets,
    send::{Pacer, Said, Streams},
    spaced::Spaced,
};
use api::{Event, Fate, MigrateOptions, Mode, Report, Robust};
use page::Counts;
use policy::{Budget, PausePart};
use proto::{
    Brief, Link, LinkEvent, NextStep, Phase, Rounds, Shape, Source, SourceEffect, SourceEnd, SourceEvent,
    SpoolEvent, SpoolSaid, Token, control,
};
use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    io,
    ops::ControlFlow,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::{Duration, Instant},
};
use units::{BlockId, MemorySet};

mod disks; // how slow the guest's disks are, and when they are quiet
mod effects; // what it does
mod forecaster; // what is expected
mod handover; // what the target reaches by itself
mod link; // its connections: opened, lost, opened again
mod mending; // one connection of several: opened again
mod ownership; // who owns the VM: offered, asked
mod parts; // what it is given
mod pause; // where the downtime went
mod progress; // whether memory still arrives
mod reporter; // what the user is told
mod rollback; // the guest runs on here: the migration is over, or goes on
mod spooling; // the file that pages go into, too
mod throttling; // when the guest is slowed
mod watching; // whether the VM is what it was
use disks::DiskWatch;
use forecaster::Forecaster;
pub(crate) use forecaster::foresee;
pub use forecaster::plan;
pub use handover::Offered;
use mending::Reopened;
pub use parts::{LinkHistory, Reading, SourceParts};
use progress::Progress;
use reporter::Reporter;
use spooling::Spooling;
use throttling::Throttling;
use watching::Watching;

/// How long to wait before asking the record or the target again.
const AGAIN: Duration = Duration::from_millis(500);

/// How often the display is told how it goes, and the guest is watched; less often where that takes long.
const TICK: Duration = Duration::from_millis(250);

/// How often the guest's writes are looked at while the target prepares; less often where that takes long.
const LOOK: Duration = Duration::from_millis(40);

/// After so long without an answer about who owns the VM, the user is told that it is in doubt; asking goes
/// on.
const DOUBT: Duration = Duration::from_secs(30);

/// Notes of the target that are passed on, at most: a hostile one could fill the user's terminal.
const MOST_NOTES: u32 = 16;

/// Said of each migration to which it applies.
const NOT_PROTECTED: &str = "NOT PROTECTED (--insecure-plaintext): whoever is on the network can read and \
     change the guest's memory on its way";

/// Lets others speak to a running migration.
#[derive(Clone, Debug)]
pub struct Handle(Sender<Signal>);

impl Handle {
    /// The user wants it to end. Comes to nothing once the target may own the VM.
    pub fn cancel(&self) {
        let _ = self.0.send(Signal::Event(SourceEvent::Cancel));
    }

    /// A person has fenced the target and says that the VM is ours.
    pub fn resolve_here(&self) {
        let _ = self.0.send(Signal::Event(SourceEvent::Resolved));
    }
}

#[derive(Debug)]
enum Signal {
    Event(SourceEvent),
    /// The device state as it was in the pause of this number, or why there is none.
    Saved(u32, Result<Saved, MachineError>),
    /// How the VM differs from what it was, and what it does.
    Watched(Result<VmCheck, MachineError>),
    /// From the streams of this connection's generation: those of an older one no longer matter.
    Said(u32, Said),
    /// From the thread that writes the file.
    Spool(u32, SpoolSaid<MemorySet>, Counts),
    /// The target's word, on the control connection of this generation.
    Heard(u32, control::Kind),
    /// The target was called for a control connection of this generation.
    Dialled(u32, io::Result<Conn>),
    /// A connection for this stream of this generation, in place of one that was lost.
    Opened(u32, u32, io::Result<Conn>),
    /// The control connection of this generation ended.
    Silent(u32, io::Error),
}

/// One migration, at its source.
pub struct SourceDriver {
    parts: SourceParts,
    options: MigrateOptions,
    /// What decides, once the target can be reached.
    core: Option<Source>,
    rounds: Rounds,
    tell: Sender<Signal>,
    signals: Receiver<Signal>,
    shape: Shape,
    /// Written by the guest and not yet given to a stream, or missing at the target: nothing is ever in
    /// neither (I2).
    dirty: MemorySet,
    missing: MemorySet,
    /// The blocks that the target reaches by itself: none of their pages is ever among those.
    handed_over: BTreeSet<BlockId>,
    secrets: Secrets,
    /// What the target said that connections with pages must say.
    token: Option<Token>,
    /// Whether the target was asked to prepare: from then on it waits for us.
    asked: bool,
    /// Which record decides.
    record: String,
    /// Our word to that record, while it is being written down.
    offering: Option<Receiver<io::Result<()>>>,
    /// How many notes the target has sent for the user.
    notes_heard: u32,
    /// The target's own name, which is what it claims by.
    target: String,
    state: Option<DeviceState>,
    speaker: Option<Speaker>,
    streams: Option<Streams>,
    link: Link,
    /// What the link waits for, and until when; and until when the user does.
    link_timer: Option<(Instant, LinkEvent)>,
    gives_up_at: Option<Instant>,
    /// What the target has of the round after those that have arrived, by its word when the link was opened
    /// again.
    received: MemorySet,
    reopened: HashMap<u32, Reopened>,
    /// What the target keeps from before, as long as it may be named.
    kept: Option<Arc<KeptTable>>,
    answering: Option<Conn>,
    control: Option<Conn>,
    to_push: Arc<PushQueue>,
    current: Option<Arc<RoundQueue>>,
    pacer: Arc<Pacer>,
    heard: Arc<Heard>,
    generation: u32,
    progress: Progress,
    /// When it was looked around last.
    looked: Spaced,
    stopped: bool,
    /// What the VM did before it was stopped.
    before: RunState,
    /// How many pauses came to nothing, after which the migration went on.
    aborted_pauses: u32,
    /// Whether a pause has ended with the guest here, as the migration did.
    given_back: bool,
    /// Whether the VM's QEMU has ended.
    has_ended: HasEnded,
    doubt_since: Option<Instant>,
    /// When the record is asked again.
    asks_at: Option<Instant>,
    doubt_after: Duration,
    throttling: Throttling,
    forecaster: Forecaster,
    spooling: Spooling,
    watching: Watching,
    disks: DiskWatch,
    reporter: Reporter,
}

impl SourceDriver {
    /// Prepares a migration; `events` hears how it goes.
    pub fn new(
        parts: SourceParts,
        mut options: MigrateOptions,
        events: Arc<dyn Fn(Event) + Send + Sync>,
    ) -> (Self, Handle) {
        // What is missing must be safe before the guest is stopped, and is so soonest if both ways carry it.
        let strict = options.spooled().is_some_and(|(_, robust)| robust == Robust::Strict);
        let round_first = strict && options.mode == Mode::PostCopy;
        if round_first {
            options.mode = Mode::Hybrid;
        }
        let (tell, signals) = channel();
        let has_ended = parts.machine.lock().has_ended();
        let blocks = parts.memory.blocks();
        let shape = Shape(blocks.iter().map(|b| b.pages).collect());
        let limits = Budget { downtime: options.max_downtime, post_copy: options.post_copy() };
        let rounds = Rounds::new(options.mode.demanded(), limits, parts.link_history.switchover);
        let reporter = Reporter::new(&parts, &options, events);
        let spooling = Spooling::new(&options, round_first);
        let driver = Self {
            core: None,
            rounds,
            dirty: MemorySet::empty(shape.0.iter().copied()),
            missing: MemorySet::empty(shape.0.iter().copied()),
            handed_over: BTreeSet::new(),
            secrets: Secrets::default(),
            token: None,
            asked: false,
            record: String::new(),
            offering: None,
            notes_heard: 0,
            target: String::new(),
            link: Link::default(),
            link_timer: None,
            gives_up_at: None,
            received: MemorySet::empty(shape.0.iter().copied()),
            reopened: HashMap::new(),
            kept: None,
            state: None,
            speaker: None,
            streams: None,
            answering: None,
            control: None,
            to_push: Arc::new(PushQueue::new(MemorySet::empty(shape.0.iter().copied()))),
            current: None,
            shape,
            pacer: Arc::new(Pacer::new(options.bandwidth)),
            heard: Arc::default(),
            generation: 0,
            progress: Progress::new(),
            looked: Spaced::new(),
            stopped: false,
            before: RunState::Running,
            aborted_pauses: 0,
            given_back: false,
            has_ended,
            doubt_since: None,
            asks_at: None,
            doubt_after: DOUBT,
            throttling: Throttling::default(),
            forecaster: Forecaster::default(),
            spooling,
            watching: Watching::default(),
            disks: DiskWatch::new(),
            reporter,
            tell: tell.clone(),
            signals,
            parts,
            options,
        };
        (driver, Handle(tell))
    }

    /// After how long without an answer the user is told that nobody knows who owns the VM. It decides
    /// nothing else.
    pub fn doubting_after(self, time: Duration) -> Self {
        Self { doubt_after: time, ..self }
    }

    /// Migrates. Every way out leaves the VM running on exactly one side, or says that nobody can know yet.
    pub fn run(mut self) -> Report {
        self.reporter.phase(Phase::Preflight);
        if self.parts.dial.is_plaintext() {
            self.reporter.note(NOT_PROTECTED.to_owned());
        }
        for left in std::mem::take(&mut self.parts.reading.left_behind) {
            self.reporter.leaves_behind(left);
        }
        match Secrets::draw() {
            Ok(secrets) => self.secrets = secrets,
            Err(e) => {
                let what = "draw random numbers".to_owned();
                return self.finish(SourceEnd::Failed { what, why: e.to_string() });
            }
        }
        match self.parts.record.identity() {
            Ok(identity) => self.record = identity,
            Err(e) => {
                let what = "ask the ownership record".to_owned();
                return self.finish(SourceEnd::Failed { what, why: e.to_string() });
            }
        }
        if let Err(e) = self.connect() {
            return self
                .finish(SourceEnd::Failed { what: format!("reach {}", self.parts.to), why: e.to_string() });
        }
        if let Err(Broken { what, why }) = self.look_ahead() {
            return self.finish(SourceEnd::Failed { what, why });
        }
        self.begin_spool();
        let hello = control::Hello {
            host: self.parts.from.clone(),
            software: concat!("whimbrel ", env!("CARGO_PKG_VERSION")).into(),
        };
        let first = if self.options.mode == Mode::PostCopy { NextStep::PostCopy } else { NextStep::Round };
        let begun = Source::new(hello, self.prepare(), first);
        self.drive(begun)
    }

    /// Goes on after a restart of this agent: the target owns the VM and may still want pages of the copy
    /// here. Returns once the target has everything and the copy is destroyed.
    pub fn run_after_commit(mut self) -> Report {
        self.stopped = true;
        self.drive(Source::after_commit())
    }

    fn prepare(&self) -> control::Prepare {
        let block = |b: &crate::ports::Block| control::Block { name: b.name.clone(), pages: b.pages };
        control::Prepare {
            vm: self.parts.vm.clone(),
            recipe: self.parts.recipe.clone(),
            blocks: self.parts.memory.blocks().iter().map(block).collect(),
            streams: *self.parts.streams.end(),
            post_copy: self.options.post_copy(),
            verify: self.options.verify,
            epoch: self.parts.epoch.0,
            give_up_ms: self.options.give_up.as_millis() as u64,
            tag_key: self.secrets.tags.to_vec(),
            spool: self.spool_offer(),
            record: self.record.clone(),
            private: effects::private_blocks(&self.parts.private),
            handovers: self.handovers(),
            came_by: self.parts.came_by.map_or(vec![], |id| id.0.to_le_bytes().to_vec()),
        }
    }

    /// What must be done about an event.
    fn decide(&mut self, event: SourceEvent) -> Vec<SourceEffect> {
        let Some(core) = &mut self.core else { return vec![] };
        let of_pages =
            matches!(event, SourceEvent::Sent(_) | SourceEvent::Message(control::Kind::RoundReceived(_)));
        if self.stopped && of_pages {
            // Whichever comes last; and the target's own word goes before both.
            self.reporter.pause.end_later(PausePart::LastPages);
        }
        let effects = core.handle(event);
        if !effects.is_empty() {
            self.disks.wait_no_more();
        }
        self.show_phase();
        effects
    }

    /// The last phase is shown together with the report.
    fn show_phase(&mut self) {
        let phase = self.phase();
        if phase != Phase::Done {
            self.reporter.phase(phase);
        }
    }

    fn phase(&self) -> Phase {
        self.core.as_ref().map_or(Phase::Preflight, Source::phase)
    }

    fn drive(&mut self, (core, effects): (Source, Vec<SourceEffect>)) -> Report {
        self.core = Some(core);
        self.show_phase();
        let mut todo: VecDeque<SourceEffect> = effects.into();
        loop {
            while let Some(effect) = todo.pop_front() {
                tracing::debug!(effect = %Brief(&effect), "act");
                if let SourceEffect::End(end) = effect {
                    return self.finish(end);
                }
                match self.effect(effect) {
                    Ok(Some(event)) => todo.extend(self.decide(event)),
                    Ok(None) => {}
                    Err(failed) => {
                        // What was to follow it, a fence perhaps, is no longer wanted.
                        todo.clear();
                        let event = self.broke(failed);
                        todo.extend(self.decide(event));
                    }
                }
            }
            let every = if self.phase() == Phase::Preflight { LOOK } else { TICK };
            let wait = self.looked.due_in(every).min(self.due_in());
            // Also while one signal follows the other.
            let signal = match wait.is_zero() {
                true => Err(RecvTimeoutError::Timeout),
                false => self.signals.recv_timeout(wait),
            };
            let event = match signal {
                Ok(Signal::Event(event)) => self.look_at(event),
                Ok(Signal::Saved(pause, saved)) if pause == self.aborted_pauses => {
                    let told = self.saved(saved);
                    if told.is_none() {
                        self.reporter.pause.begin(PausePart::Secure);
                    }
                    told
                }
                Ok(Signal::Watched(seen)) => self.watched(seen),
                Ok(Signal::Spool(turn, said, counts)) => self.hear_spool(turn, said, counts),
                Ok(Signal::Said(generation, said)) if generation == self.generation => self.hear(said),
                Ok(Signal::Opened(generation, stream, conn)) if generation == self.generation => {
                    self.opened(stream, conn)
                }
                Ok(Signal::Heard(generation, kind)) => self.hear_word(generation, kind),
                Ok(Signal::Dialled(generation, conn)) if generation == self.generation => self.dialled(conn),
                Ok(Signal::Silent(generation, e)) if generation == self.generation => {
                    let why = self.why_lost(&e);
                    self.link(LinkEvent::Silent(why))
                }
                Ok(_) | Err(RecvTimeoutError::Disconnected) => None,
                Err(RecvTimeoutError::Timeout) if self.due_in().is_zero() => self.do_what_is_due(),
                Err(RecvTimeoutError::Timeout) => {
                    let began = Instant::now();
                    self.look_around();
                    let watched = if self.gone_before_its_time() {
                        Err(Broken::new("the VM", ""))
                    } else if self.phase() == Phase::Preflight {
                        self.look_at_writes()
                    } else {
                        self.tick();
                        self.look_at_disks_again();
                        self.look_at_progress().and_then(|()| self.watch())
                    };
                    self.looked.done_since(began);
                    watched.err().map(|failed| self.broke(failed))
                }
            };
            if let Some(event) = event {
                todo.extend(self.decide(event));
            }
            if self.in_doubt_for_long() {
                return self.reporter.in_doubt(&self.record);
            }
        }
    }

    /// Whether the guest that is to be moved is gone. Once it is the target's, nobody asks for this QEMU any
    /// more.
    fn gone_before_its_time(&self) -> bool {
        matches!(self.phase(), Phase::Preflight | Phase::PreCopy) && (self.has_ended)()
    }

    /// An act failed: because of what it says, or because there is no QEMU any more.
    fn broke(&self, Broken { what, mut why }: Broken) -> SourceEvent {
        if (self.has_ended)() {
            why = format!("its QEMU has ended; {why}").trim_end_matches("; ").to_owned();
        }
        tracing::warn!(what, why, "an act failed");
        SourceEvent::Broke { what, why }
    }

    /// What the driver itself learns from an event on its way to the machine.
    fn look_at(&mut self, event: SourceEvent) -> Option<SourceEvent> {
        let event = match self.spool_word(event) {
            ControlFlow::Continue(event) => event,
            ControlFlow::Break(then) => return then,
        };
        match &event {
            SourceEvent::Message(control::Kind::Hello(hello)) => {
                if let Some(why) = self.control.as_ref().and_then(|conn| conn.belies(&hello.host)) {
                    return Some(SourceEvent::Broke { what: "believe the target".into(), why });
                }
                self.target = hello.host.clone();
            }
            SourceEvent::Message(control::Kind::Ready(ready)) => {
                if ready.record != self.record {
                    let what = "agree on who keeps the ownership record".into();
                    let why =
                        format!("it was to be {:?}, and the target says {:?}", self.record, ready.record);
                    return Some(SourceEvent::Broke { what, why });
                }
                if !ready.private && !self.parts.private.is_empty() {
                    let what = "bring the guest's firmware to the target".into();
                    let why = format!(
                        "{} runs an older Whimbrel, which would lose it: update it first",
                        self.target
                    );
                    return Some(SourceEvent::Broke { what, why });
                }
                if let Err(Broken { what, why }) = self.hand_over(&ready.reached) {
                    return Some(SourceEvent::Broke { what, why });
                }
                self.token = Token::read(&ready.token);
                self.kept = ready.kept.then(|| Arc::new(KeptTable::new(self.shape.clone())));
            }
            SourceEvent::Message(control::Kind::RoundReceived(received)) => {
                self.progress.received(received.round)
            }
            SourceEvent::Message(control::Kind::Note(note)) => {
                self.notes_heard += 1;
                if self.notes_heard <= MOST_NOTES {
                    self.reporter.note(note.text.clone());
                }
                return None;
            }
            SourceEvent::Message(control::Kind::Kept(kept)) => {
                // What is still told once nobody names it any more does not matter.
                let heard = self.kept.as_ref().map(|table| table.hear(kept));
                return heard.and_then(Result::err).map(|e| SourceEvent::Broke {
                    what: "understand what the target keeps".into(),
                    why: e.to_string(),
                });
            }
            SourceEvent::Message(control::Kind::Committed(committed)) => {
                let heard = &self.heard;
                self.reporter.committed(committed, |theirs_ns| heard.to_here(theirs_ns));
            }
            SourceEvent::Message(control::Kind::StreamLost(lost)) => {
                return self.stream_lost(lost.stream, "the target has lost it");
            }
            SourceEvent::Message(control::Kind::StreamReopened(back)) => {
                return self.stream_is_back(back.clone());
            }
            SourceEvent::Message(control::Kind::Settled(settled)) => self.reporter.settled(settled),
            SourceEvent::Message(control::Kind::StillMissing(still)) => {
                match proto::page_sets(&still.blocks, &self.shape) {
                    Ok(missing) => self.missing = missing,
                    Err(e) => {
                        return Some(SourceEvent::Broke { what: "reconnect".into(), why: e.to_string() });
                    }
                }
            }
            SourceEvent::Cancel if !self.core.as_ref().is_some_and(Source::cancellable) => {
                self.reporter.note("too late to cancel: the target may own the VM already".into());
            }
            _ => {}
        }
        Some(event)
    }

    fn hear(&mut self, said: Said) -> Option<SourceEvent> {
        if let Some(streams) = &self.streams {
            self.reporter.streams(streams.widest());
        }
        match said {
            Said::RoundDone(stream, round, sent) => {
                self.reporter.sent(sent);
                self.spool(SpoolEvent::StreamSent(stream, round))
            }
            Said::PushDone(sent) => {
                self.reporter.sent(sent);
                None
            }
            Said::StreamLost(stream, e) => self.stream_lost(stream, &e.to_string()),
            Said::Lost(e) => self.link(LinkEvent::Silent(e.to_string())),
        }
    }

    /// Nothing that the target keeps is named any more.
    fn forget_kept(&mut self) {
        self.kept.take().iter().for_each(|kept| kept.close());
    }

    fn tick(&mut self) {
        if let Some(streams) = &self.streams {
            streams.allow((self.parts.cores)());
        }
        let left = match self.phase() {
            Phase::PostCopy => self.to_push.left(),
            _ => self.current.as_ref().map_or(0, |round| round.left()),
        };
        let ends_in = self.ends_in(left);
        self.reporter.tick(left, &self.dirty, &self.rounds, ends_in, self.spool_state());
    }

    fn finish(&mut self, mut end: SourceEnd) -> Report {
        self.calm();
        if let SourceEnd::Failed { why, .. } = &mut end
            && self.given_back
        {
            self.add_changes(why);
        }
        if let (None, false, SourceEnd::Failed { .. } | SourceEnd::Cancelled) =
            (&self.speaker, self.stopped, &end)
        {
            self.call_off();
        }
        self.hang_up();
        self.end_spool();
        let host = self.parts.from.clone();
        let here = match (self.stopped, (self.has_ended)()) {
            (_, true) => Fate::Ended { host },
            (true, false) => Fate::Stuck { host },
            (false, false) => Fate::On { host, state: self.before },
        };
        self.reporter.finish(end, here, self.before)
    }
}
