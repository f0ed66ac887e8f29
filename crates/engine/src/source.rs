//! The source's driver: does what `proto::Source` says, and tells it what came of it.

use crate::{
    conn::{Conn, Heard, LONG_SILENCE, SILENCE, Speaker, now_ns},
    ports::{Claim, Claimed, DeviceState, HasEnded, MachineError},
    queue::{Owing, Round},
    report::{Event, Mode, Phase, Report},
    secrets::Secrets,
    ship::{Job, Pacer, Said, Streams},
    survey, verify, why,
};
use proto::{Brief, Kind, Shape, Source, SourceAct, SourceEnd, SourceEvent, Step, Token, control};
use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};
use units::{Epoch, MemorySet};

mod foresight; // what is expected
mod governing; // when the guest is slowed
mod link; // its connections: opened, lost, opened again
mod parts; // what it is given
mod story; // what the user is told
use foresight::Foresight;
pub(crate) use foresight::foresee;
pub use foresight::plan;
use governing::Governing;
pub use parts::{Options, Road, SourceParts};
use story::Story;

/// How long to wait before asking the record or the target again.
const AGAIN: Duration = Duration::from_millis(500);

/// How often the display is told how it goes.
const TICK: Duration = Duration::from_millis(250);

/// How often the guest's writes are looked at while the target prepares.
const LOOK: Duration = Duration::from_millis(40);

/// After so long without an answer about who owns the VM, the user is told that it is in doubt; asking goes on.
const DOUBT: Duration = Duration::from_secs(30);

/// Said of each migration to which it applies.
const NOT_PROTECTED: &str = "NOT PROTECTED (--insecure-plaintext): whoever is on the network can read and change the \
     guest's memory on its way";

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
    /// The device state, or why there is none.
    Saved(Result<DeviceState, MachineError>),
    /// From the streams of this connection's generation: those of an older one no longer matter.
    Said(u32, Said),
    /// The control connection of this generation ended.
    Silent(u32, io::Error),
}

/// One migration, at its source.
pub struct SourceDriver {
    parts: SourceParts,
    options: Options,
    tell: Sender<Signal>,
    signals: Receiver<Signal>,
    /// Heard while something else was waited for.
    later: VecDeque<Signal>,
    shape: Shape,
    /// Written by the guest and not yet given to a stream, or owed to the target: nothing is ever in neither (I2).
    dirty: MemorySet,
    owed: MemorySet,
    secrets: Secrets,
    /// What the target said that connections with pages must say.
    token: Option<Token>,
    round_parts: u32,
    state: Option<DeviceState>,
    speaker: Option<Speaker>,
    streams: Option<Streams>,
    answering: Option<Conn>,
    control: Option<Conn>,
    owing: Arc<Owing>,
    current: Option<Arc<Round>>,
    pacer: Arc<Pacer>,
    heard: Arc<Heard>,
    generation: u32,
    /// What the target had when the link was lost last, and how often in a row it had no more than that.
    lost_here: ((u32, u64), u32),
    stopped: bool,
    /// Whether the VM's QEMU has ended.
    has_ended: HasEnded,
    doubt_since: Option<Instant>,
    doubt_after: Duration,
    governing: Governing,
    foresight: Foresight,
    story: Story,
}

impl SourceDriver {
    /// Prepares a migration; `events` hears how it goes.
    pub fn new(
        parts: SourceParts,
        options: Options,
        events: Arc<dyn Fn(Event) + Send + Sync>,
    ) -> (Self, Handle) {
        let (tell, signals) = channel();
        let has_ended = parts.machine.lock().has_ended();
        let blocks = parts.memory.blocks();
        let shape = Shape(blocks.iter().map(|b| b.pages).collect());
        let story = Story::new(&parts, &options, events);
        let driver = Self {
            dirty: MemorySet::empty(shape.0.iter().copied()),
            owed: MemorySet::empty(shape.0.iter().copied()),
            secrets: Secrets::default(),
            token: None,
            round_parts: 0,
            state: None,
            speaker: None,
            streams: None,
            answering: None,
            control: None,
            owing: Arc::new(Owing::new(MemorySet::empty(shape.0.iter().copied()))),
            current: None,
            shape,
            pacer: Arc::new(Pacer::new(options.bandwidth)),
            heard: Arc::default(),
            generation: 0,
            lost_here: ((u32::MAX, 0), 0),
            stopped: false,
            has_ended,
            doubt_since: None,
            doubt_after: DOUBT,
            governing: Governing::default(),
            foresight: Foresight::default(),
            story,
            tell: tell.clone(),
            signals,
            later: VecDeque::new(),
            parts,
            options,
        };
        (driver, Handle(tell))
    }

    /// After how long without an answer the user is told that nobody knows who owns the VM. It decides nothing else.
    pub fn doubting_after(self, time: Duration) -> Self {
        Self { doubt_after: time, ..self }
    }

    /// Migrates. Every way out leaves the VM running on exactly one side, or says that nobody can know yet.
    pub fn run(mut self) -> Report {
        self.story.phase(Phase::Preflight);
        if self.parts.dial.is_plaintext() {
            self.story.note(NOT_PROTECTED.to_owned());
        }
        match Secrets::draw() {
            Ok(secrets) => self.secrets = secrets,
            Err(e) => {
                let what = "draw random numbers".to_owned();
                return self.finish(SourceEnd::Failed { what, why: e.to_string() });
            }
        }
        if let Err(e) = self.connect(Kind::Control) {
            return self
                .finish(SourceEnd::Failed { what: format!("reach {}", self.parts.to), why: e.to_string() });
        }
        if let Err((what, why)) = self.look_ahead() {
            return self.finish(SourceEnd::Failed { what, why });
        }
        let hello = control::Hello {
            host: self.parts.from.clone(),
            software: concat!("whimbrel ", env!("CARGO_PKG_VERSION")).into(),
        };
        let first = if self.options.mode == Mode::PostCopy { Step::PostCopy } else { Step::Round };
        let (mut machine, acts) = Source::new(hello, self.prepare(), first);
        self.drive(&mut machine, acts)
    }

    /// Goes on after a restart of this agent: the target owns the VM and may still want pages of the copy here. Returns
    /// once the target has everything and the copy is destroyed.
    pub fn run_after_commit(mut self) -> Report {
        self.stopped = true;
        self.story.phase(Phase::PostCopy);
        let (mut machine, acts) = Source::after_commit();
        self.drive(&mut machine, acts)
    }

    fn prepare(&self) -> control::Prepare {
        let block = |b: &crate::ports::Block| control::Block { name: b.name.clone(), pages: b.pages };
        control::Prepare {
            vm: self.parts.vm.clone(),
            recipe: self.parts.recipe.clone(),
            blocks: self.parts.memory.blocks().iter().map(block).collect(),
            streams: *self.options.streams.end(),
            post_copy: self.options.post_copy(),
            verify: self.options.verify,
            epoch: self.parts.epoch.0,
            give_up_ms: self.options.give_up.as_millis() as u64,
            seal_key: self.secrets.seals.to_vec(),
        }
    }

    fn drive(&mut self, machine: &mut Source, acts: Vec<SourceAct>) -> Report {
        let mut todo: VecDeque<SourceAct> = acts.into();
        loop {
            while let Some(act) = todo.pop_front() {
                tracing::debug!(act = %Brief(&act), "act");
                if let SourceAct::End(end) = act {
                    return self.finish(end);
                }
                match self.act(act) {
                    Ok(Some(event)) => todo.extend(machine.handle(event)),
                    Ok(None) => {}
                    Err(failed) => {
                        // What was to follow it, a promise perhaps, is no longer wanted.
                        todo.clear();
                        todo.extend(machine.handle(self.broke(failed)));
                    }
                }
            }
            let signal = match self.later.pop_front() {
                Some(signal) => Ok(signal),
                None if self.story.now() == Phase::Preflight => self.signals.recv_timeout(LOOK),
                None => self.signals.recv_timeout(TICK),
            };
            let event = match signal {
                Ok(Signal::Event(event)) => self.look_at(event, machine.cancellable()),
                Ok(Signal::Saved(saved)) => Some(self.saved(saved)),
                Ok(Signal::Said(generation, said)) if generation == self.generation => self.hear(said),
                Ok(Signal::Silent(generation, e)) if generation == self.generation => {
                    self.hang_up();
                    Some(SourceEvent::LinkLost(e.to_string()))
                }
                Ok(_) | Err(RecvTimeoutError::Disconnected) => None,
                Err(RecvTimeoutError::Timeout) => {
                    let watched = if self.gone_before_its_time() {
                        Err(("the VM".to_owned(), String::new()))
                    } else if self.story.now() == Phase::Preflight {
                        self.look_at_writes()
                    } else {
                        self.tick();
                        self.watch()
                    };
                    watched.err().map(|failed| self.broke(failed))
                }
            };
            if let Some(event) = event {
                todo.extend(machine.handle(event));
            }
            if self.in_doubt_for_long() {
                return self.story.in_doubt();
            }
        }
    }

    /// Whether the guest that is to be moved is gone. Once it is the target's, nobody asks for this QEMU any more.
    fn gone_before_its_time(&self) -> bool {
        matches!(self.story.now(), Phase::Preflight | Phase::PreCopy) && (self.has_ended)()
    }

    /// An act failed: because of what it says, or because there is no QEMU any more.
    fn broke(&self, (what, mut why): (String, String)) -> SourceEvent {
        if (self.has_ended)() {
            why = format!("its QEMU has ended; {why}").trim_end_matches("; ").to_owned();
        }
        tracing::warn!(what, why, "an act failed");
        SourceEvent::Broke { what, why }
    }

    /// What the driver itself learns from an event on its way to the machine.
    fn look_at(&mut self, event: SourceEvent, cancellable: bool) -> Option<SourceEvent> {
        match &event {
            SourceEvent::Message(control::Kind::Hello(hello)) => {
                if let Some(why) = self.control.as_ref().and_then(|conn| conn.belies(&hello.host)) {
                    return Some(SourceEvent::Broke { what: "believe the target".into(), why });
                }
            }
            SourceEvent::Message(control::Kind::Ready(ready)) => self.token = Token::read(&ready.token),
            SourceEvent::Message(control::Kind::Committed(committed)) => {
                let resumed = self.heard.to_here(committed.resumed_ns);
                self.story.committed(committed, resumed);
            }
            SourceEvent::Message(control::Kind::Settled(settled)) => self.story.settled(settled),
            SourceEvent::Message(control::Kind::StillOwed(still)) => {
                match proto::page_sets(&still.blocks, &self.shape) {
                    Ok(owed) => self.owed = owed,
                    Err(e) => {
                        return Some(SourceEvent::Broke { what: "reconnect".into(), why: e.to_string() });
                    }
                }
            }
            SourceEvent::Cancel if !cancellable => {
                self.story.note("too late to cancel: the target may own the VM already".into());
            }
            _ => {}
        }
        Some(event)
    }

    fn hear(&mut self, said: Said) -> Option<SourceEvent> {
        if let Some(streams) = &self.streams {
            self.story.streams(streams.widest());
        }
        match said {
            Said::RoundDone(round, shipped) => {
                self.story.shipped(shipped);
                self.round_parts += 1;
                let all = self.streams.as_ref().is_some_and(|s| self.round_parts == s.count());
                all.then_some(SourceEvent::Shipped(round))
            }
            Said::PushDone(shipped) => {
                self.story.shipped(shipped);
                None
            }
            Said::Lost(e) => {
                self.hang_up();
                Some(SourceEvent::LinkLost(e.to_string()))
            }
        }
    }

    /// Does one act. Errors say what was tried and why it failed.
    fn act(&mut self, act: SourceAct) -> Result<Option<SourceEvent>, (String, String)> {
        match act {
            SourceAct::Send(kind) => {
                self.say(kind);
                Ok(None)
            }
            SourceAct::OpenStreams => {
                self.look_at_writes()?;
                self.dirty =
                    survey::present(&*self.parts.memory).map_err(why("look for the guest's pages"))?;
                self.story.begun(&self.dirty);
                self.foresee()?;
                self.open_streams().map_err(why("open the streams"))?;
                Ok(Some(SourceEvent::StreamsOpen))
            }
            SourceAct::Ship(round) => self.ship(round),
            SourceAct::ShipRest(_) => {
                if let Some(round) = self.current.clone() {
                    self.give(round);
                }
                Ok(None)
            }
            SourceAct::Rejoin => self.rejoin(),
            SourceAct::Decide => {
                if let (Some(tracker), Some(round)) = (&mut self.parts.tracker, &self.current) {
                    tracker.learn(&round.unchanged());
                }
                self.collect()?;
                let step = self.story.decide(&self.dirty);
                if step == Step::Round {
                    self.judge()?;
                }
                Ok(Some(SourceEvent::Decided(step)))
            }
            SourceAct::StopGuest => {
                self.parts.machine.lock().get_ready().map_err(|e| (e.what, e.why))?;
                self.parts.journal.pausing().map_err(why("journal the pause"))?;
                self.calm();
                if let Some(tracker) = &mut self.parts.tracker {
                    tracker.hurry().map_err(why("let the guest's writers go on"))?;
                }
                self.count_stalls();
                self.story.stopping(now_ns());
                self.stopped = true;
                self.parts.machine.lock().stop().map_err(|e| (e.what, e.why))?;
                Ok(Some(SourceEvent::Stopped))
            }
            SourceAct::SendOwed => {
                self.collect()?;
                let owed = control::Owed { blocks: proto::bitmaps(&self.dirty) };
                self.owed.union(&self.dirty);
                self.dirty.clear();
                self.say(control::Kind::Owed(owed));
                Ok(None)
            }
            SourceAct::Save => {
                let tell = self.tell.clone();
                let save = self.parts.machine.spawn("save", move |machine| {
                    let _ = tell.send(Signal::Saved(machine.save()));
                });
                save.map_err(why("start a thread"))?;
                Ok(None)
            }
            SourceAct::SendState(after_round) => self.send_state(after_round).map(|()| None),
            SourceAct::Promise => {
                // From here on a target that is only slow costs the whole migration.
                self.bear_silence(LONG_SILENCE);
                self.parts.journal.promise(self.parts.epoch).map_err(why("journal the promise"))?;
                Ok(Some(SourceEvent::Promised))
            }
            SourceAct::ResumeGuest => {
                self.bring_back();
                Ok(None)
            }
            SourceAct::Claim => {
                // By way of the queue: between two claims a person's word is heard, and how long it has been in doubt.
                let answer = self.claim();
                let _ = self.tell.send(Signal::Event(answer));
                Ok(None)
            }
            SourceAct::Gone(epoch) => {
                self.doubt_since = None;
                self.bear_silence(SILENCE);
                self.insist("journal that the VM is gone", |d| d.parts.journal.gone(Epoch(epoch)));
                Ok(None)
            }
            SourceAct::ServeOwed => {
                self.serve_owed();
                Ok(None)
            }
            SourceAct::Reconnect => {
                self.reconnect();
                Ok(None)
            }
            SourceAct::Forget => {
                self.hang_up();
                // Before QEMU ends, and its writes with it.
                self.parts.tracker = None;
                self.insist("journal that everything is there", |d| d.parts.journal.settled());
                if let Err(e) = self.parts.machine.lock().destroy() {
                    self.story.note(format!("the empty QEMU on the source would not end: {e}"));
                }
                Ok(None)
            }
            SourceAct::End(_) => unreachable!("the loop ends before"),
        }
    }

    fn ship(&mut self, number: u32) -> Result<Option<SourceEvent>, (String, String)> {
        self.collect()?;
        let empty = MemorySet::empty(self.shape.0.iter().copied());
        let set = std::mem::replace(&mut self.dirty, empty);
        self.story.round(number, &set);
        self.give(Arc::new(Round::new(number, set)));
        Ok(None)
    }

    /// To the streams.
    fn give(&mut self, round: Arc<Round>) {
        self.round_parts = 0;
        self.current = Some(round.clone());
        if let Some(streams) = &self.streams {
            streams.give(&Job::Round(round));
        }
    }

    fn collect(&mut self) -> Result<(), (String, String)> {
        let Some(tracker) = &mut self.parts.tracker else { return Ok(()) };
        tracker.collect(&mut self.dirty).map_err(why("collect the pages that the guest wrote"))
    }

    /// The device state is there; what was written to guest memory meanwhile must go along.
    fn saved(&mut self, saved: Result<DeviceState, MachineError>) -> SourceEvent {
        let saved = saved.map_err(|e| (e.what, e.why)).and_then(|state| {
            self.state = Some(state);
            self.collect()
        });
        match saved {
            Ok(()) => SourceEvent::Saved { more: !self.dirty.is_empty() },
            Err((what, why)) => SourceEvent::Broke { what, why },
        }
    }

    fn send_state(&mut self, after_round: u32) -> Result<(), (String, String)> {
        self.story.end_round(0);
        let speaker =
            self.speaker.clone().ok_or(("send the device state".to_owned(), "not connected".to_owned()))?;
        if self.options.verify {
            verify::hash_all(&*self.parts.memory, |hashes| {
                speaker.say(control::Kind::Hashes(hashes)).map(drop)
            })
            .map_err(why("send the hashes of the guest's memory"))?;
        }
        let state = self.state.take().unwrap_or_default();
        let private = |(name, content): &(String, Vec<u8>)| control::PrivateBlock {
            name: name.clone(),
            content: Some(proto::packed(content)),
        };
        self.say(control::Kind::State(control::State {
            after_round,
            stream: Some(proto::packed(&state.stream)),
            private: state.private.iter().map(private).collect(),
            history: self.story.history(&self.parts.history, self.streams.as_ref().and_then(Streams::learnt)),
        }));
        Ok(())
    }

    /// The guest runs here again (I3). There is no other place left for it, so this is tried until it works or QEMU
    /// is gone.
    fn bring_back(&mut self) {
        self.calm();
        if !self.stopped {
            return;
        }
        // While it is being saved, this waits for that.
        let resumed = self.parts.machine.lock().resume();
        match resumed {
            Ok(_) => {
                self.stopped = false;
                // Not before: taking the protections back takes 60 ms a GiB.
                self.parts.tracker = None;
                self.insist("journal that the guest is back", |d| d.parts.journal.back());
                let announced = self.parts.machine.lock().announce();
                if let Err(e) = announced {
                    self.story
                        .note(format!("the guest is back, but could not be announced to the network: {e}"));
                }
            }
            Err(e) => self.story.not_back(&e),
        }
    }

    fn claim(&mut self) -> SourceEvent {
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
    fn wait_for_word(&mut self, time: Duration, is_it: impl Fn(&SourceEvent) -> bool) -> bool {
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

    fn in_doubt_for_long(&self) -> bool {
        self.doubt_since.is_some_and(|since| since.elapsed() > self.doubt_after)
    }

    fn serve_owed(&mut self) {
        self.story.owing(&self.owed);
        self.owing.refill(self.owed.clone());
        if let Some(streams) = &self.streams {
            streams.give(&Job::Push(self.owing.clone()));
        }
    }

    /// A promise must reach the disk, or what follows from it must wait.
    fn insist(&mut self, what: &str, attempt: impl Fn(&mut Self) -> io::Result<()>) {
        let mut told = false;
        while let Err(e) = attempt(self) {
            if !std::mem::replace(&mut told, true) {
                self.story.note(format!("cannot {what}: {e}; trying again"));
            }
            thread::sleep(AGAIN);
        }
    }

    fn tick(&mut self) {
        if let Some(streams) = &self.streams {
            streams.allow((self.parts.cores)());
        }
        let left = match self.story.now() {
            Phase::PostCopy => self.owing.left(),
            _ => self.current.as_ref().map_or(0, |round| round.left()),
        };
        let ends_in = self.ends_in(left);
        self.story.tick(left, &self.dirty, ends_in);
    }

    fn finish(&mut self, end: SourceEnd) -> Report {
        self.calm();
        if let (None, SourceEnd::Failed { .. } | SourceEnd::Cancelled) = (&self.speaker, &end) {
            self.call_off();
        }
        self.hang_up();
        let runs_here = !self.stopped && !(self.has_ended)();
        self.story.finish(end, runs_here)
    }
}
