//! The target's driver: does what `proto::Target` says, and tells it what came of it.

use crate::{
    Broken,
    conn::{Conn, LONG_SILENCE, Speaker},
    faults::Faults,
    pause::PauseLog,
    ports::{
        Ender, HasEnded, Host, Machine, MachineError, Reached, Request, RunState, SpoolRecord, TargetJournal,
        Waiting,
    },
    receive::{PageReceiver, WritePolicy},
    shared_port::SharedPort,
    spaced::Spaced,
    unspool::{Unspool, Unspooled},
};
use proto::{
    Brief, Purpose, Target, TargetEffect, TargetEnd, TargetEvent, Token,
    control::{self, step::Part},
};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    io::{self},
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::{Duration, Instant},
};
use units::{BlockId, MemorySet, MigrationId};

mod effects; // what it does
mod link; // its connections: welcomed, heard, lost
mod loading; // the device state, and who does not want it any more
mod spooling; // the file that pages come by, too
pub(crate) use effects::decompress;
use link::Stream;

/// Streams of one migration, at most: each costs a thread and a batch of memory.
const MAX_STREAMS: u32 = 64;

/// How long to wait before asking the record again.
const AGAIN: Duration = Duration::from_millis(500);

/// How often it is looked whether the QEMU that waits is still there, and the source still wanted.
const LOOK: Duration = Duration::from_millis(500);

/// A source that was lost may come back so much later than it gives up itself: clocks and connections take
/// their time.
const GRACE: Duration = Duration::from_secs(5);

/// A connection that was closed rather than silent was closed by a source that has ended, or by one that is
/// back at once.
const CLOSED: Duration = Duration::from_secs(5);

/// By which a running migration is told things from outside, and none that only its own threads may say. One
/// that has ended hears nothing: a connection that is attached to it ends, too.
#[derive(Clone)]
pub(crate) struct Outside(Sender<Signal>);

impl Outside {
    /// A connection belongs to it.
    pub(crate) fn attach(&self, kind: Purpose, conn: Conn) {
        let _ = self.0.send(Signal::Attach(kind, conn));
    }

    /// The agent is about to end.
    pub(crate) fn give_up(&self) {
        let why = "the target's agent ends".to_owned();
        let _ = self.0.send(Signal::Event(TargetEvent::GiveUp(why)));
    }
}

enum Signal {
    Event(TargetEvent),
    /// The source's word, on the control connection of this generation.
    Said(u32, control::Kind),
    Attach(Purpose, Conn),
    /// What the source says of its file, on the control connection of this generation.
    Spooled(u32, control::Spooled),
    /// From the thread that reads the file.
    Unspooled(Unspooled),
    /// The device state is loaded, or cannot be.
    Loaded(Result<(), MachineError>),
    RoundEnd {
        generation: u32,
        stream: u16,
        round: u32,
    },
    /// This one of the connections of this generation ended that carry pages.
    StreamLost(u32, u16, u32, io::Error),
    /// Another one did.
    Lost(u32, io::Error),
}

/// The empty QEMU and what arrives in it.
struct Taken {
    request: Request,
    /// What of the source's memory its QEMU maps.
    reached: Vec<Reached>,
    machine: SharedPort<dyn Machine>,
    /// Whether its process has ended.
    has_ended: HasEnded,
    /// Ends that process, whatever waits for it.
    ender: Ender,
    journal: SharedPort<dyn TargetJournal>,
    /// How the missing pages that were taken last are being recorded.
    recorded: Option<Receiver<io::Result<()>>>,
    /// A device state is being loaded.
    loading: bool,
    receiver: Arc<PageReceiver>,
    faults: Option<Faults>,
    spool: Option<Spool>,
    streams: u32,
}

/// The file, and where it is.
struct Spool {
    thread: Unspool,
    directory: PathBuf,
    secret: [u8; 32],
    /// How what the source said of it is being recorded.
    recorded: Option<Receiver<io::Result<()>>>,
}

impl Taken {
    /// Begins to record what is missing: it takes as long as a disk does, and must be over by the time of the
    /// claim.
    fn record_missing(&mut self, missing: MemorySet) -> io::Result<()> {
        self.missing_is_recorded()?;
        let (tell, told) = channel();
        self.journal.spawn("record", move |journal| drop(tell.send(journal.missing(&missing))))?;
        self.recorded = Some(told);
        Ok(())
    }

    /// The guest does what it did on the source. Only of interest as long as it lacks pages: the arrival is
    /// over after that.
    fn note_that_it_went_on(&self) {
        if !self.receiver.post_copy() {
            return;
        }
        // Beside us: a disk's write takes as long as a few pages that the guest may wait for.
        let noted = self.journal.later("went on", |journal| {
            if let Err(e) = journal.went_on() {
                tracing::error!(%e, "an agent that is started again will have the guest go on once more");
            }
        });
        if let Err(e) = noted {
            tracing::error!(%e, "no thread to record that the guest goes on");
        }
    }

    /// The source is back, and its guest runs there: nothing of what it announced holds. That goes into the
    /// record, too: what is written there of missing pages would be waited for after a restart (zeros among
    /// them stay holes), and what is written of the file must not come after what is written of it next.
    fn forget_announced(&mut self) -> io::Result<()> {
        self.receiver.forget_hashes();
        if !self.receiver.post_copy() {
            return Ok(());
        }
        self.receiver.disown();
        self.spool_is_recorded()?;
        if let Some(spool) = &self.spool {
            spool.thread.core().forget();
        }
        let nothing = MemorySet::empty(self.receiver.shape.0.iter().copied());
        self.record_missing(nothing)
    }

    /// Waits until what is missing is recorded durably.
    fn missing_is_recorded(&mut self) -> io::Result<()> {
        let Some(told) = self.recorded.take() else { return Ok(()) };
        told.recv().unwrap_or_else(|_| Err(io::Error::other("the recording thread ended without a word")))
    }
}

impl From<Broken> for TargetEvent {
    fn from(Broken { what, why }: Broken) -> Self {
        tracing::warn!(what, why, "an act failed");
        Self::Broke { what, why }
    }
}

/// One migration, at its target.
pub(crate) struct TargetDriver {
    host: Arc<dyn Host>,
    migration: MigrationId,
    token: Token,
    tell: Sender<Signal>,
    signals: Receiver<Signal>,
    source: String,
    taken: Option<Taken>,
    control: Option<(Conn, Speaker)>,
    /// All that pages travel on.
    streams: HashMap<u16, Stream>,
    /// How many of these there were.
    streams_taken: u32,
    answering: Option<Conn>,
    /// How long a source that was lost while its guest runs there may take to come back; and until when that
    /// is.
    give_up: Duration,
    gives_up: Option<Instant>,
    /// The record was asked in vain just now; and when it is asked again.
    asked_in_vain: bool,
    asks_at: Option<Instant>,
    generation: u32,
    /// When it was looked around last.
    looked: Spaced,
    round: u32,
    ended_streams: HashSet<u16>,
    arrived: bool,
    /// What the guest does once it is here.
    goes_on: RunState,
    /// Whether that is recorded, as soon as it is known.
    noted: Option<Receiver<Result<(), String>>>,
    /// The source said that the guest goes on there: it will never ask the record about this migration.
    source_is_back: bool,
    /// The source was told why nothing comes of it.
    gave_reasons: bool,
    /// Why there is no file although there was to be one.
    no_spool: String,
    /// The guest's QEMU ended before it had all its memory.
    qemu_ended: bool,
    /// What it does while the guest stands still.
    pause: PauseLog<Part>,
    /// What read the spool, once nobody needs its files any more.
    settled_spool: Option<Unspool>,
}

impl TargetDriver {
    /// With that by which further connections reach it. `token`: what those that carry pages have to say.
    pub(crate) fn new(host: Arc<dyn Host>, migration: MigrationId, token: Token) -> (Self, Outside) {
        let (tell, signals) = channel();
        let outside = Outside(tell.clone());
        let driver = Self {
            host,
            migration,
            token,
            tell,
            signals,
            source: String::new(),
            taken: None,
            control: None,
            streams: HashMap::new(),
            streams_taken: 0,
            answering: None,
            give_up: Duration::ZERO,
            gives_up: None,
            asked_in_vain: false,
            asks_at: None,
            generation: 0,
            looked: Spaced::new(),
            round: 0,
            ended_streams: HashSet::new(),
            arrived: false,
            goes_on: RunState::Running,
            noted: None,
            source_is_back: false,
            gave_reasons: false,
            no_spool: String::new(),
            qemu_ended: false,
            pause: PauseLog::default(),
            settled_spool: None,
        };
        (driver, outside)
    }

    /// Takes a VM in, or leaves no trace.
    pub(crate) fn run(mut self, conn: Conn) -> io::Result<()> {
        self.hear(conn, LONG_SILENCE)?;
        let machine = Target::new(self.hello());
        self.drive(machine)
    }

    /// Goes on after a restart of this agent: the VM is ours, and its guest waits for pages that only the
    /// source has.
    pub(crate) fn run_after_claim(
        mut self,
        request: Request,
        waiting: Waiting,
        mut missing: MemorySet,
        spool: Option<SpoolRecord>,
    ) -> io::Result<()> {
        // What was kept went with the agent that told of it.
        let Waiting { memory, reached, kept: _, missing: missing_mode, machine, journal } = waiting;
        let recorded = missing.blocks().map(|(_, set)| set.capacity());
        if !recorded.eq(memory.blocks().iter().map(|block| block.pages)) {
            // A guest with holes that nobody knows of would read zeros.
            let why = "the pages that are recorded as missing are not those of this VM's RAM blocks";
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        for id in (0..memory.blocks().len()).map(|i| BlockId(i as u16)) {
            // What is present has been received: a page leaves its hole in one step.
            missing.block_mut(id).subtract(&memory.present(id)?);
        }
        let tell = self.tell.clone();
        let all_placed = move || drop(tell.send(Signal::Event(TargetEvent::AllPlaced)));
        let receiver = PageReceiver::new(memory, missing_mode, false, None, all_placed);
        receiver.go_on(missing);
        let receiver = Arc::new(receiver);
        let faults = Some(Faults::start(receiver.clone())?);
        self.source = request.from.clone();
        self.arrived = true;
        let (has_ended, ender) = (machine.has_ended(), machine.ender());
        let (machine, journal) = (SharedPort::new(machine), SharedPort::new(journal));
        let spool = spool.and_then(|record| self.take_up(request.migration, record, &receiver));
        let (recorded, streams) = (None, MAX_STREAMS);
        self.taken = Some(Taken {
            request,
            reached,
            machine,
            has_ended,
            ender,
            journal,
            recorded,
            loading: false,
            receiver,
            faults,
            spool,
            streams,
        });
        let _ = self.tell.send(Signal::Event(TargetEvent::AllPlaced));
        let machine = Target::after_claim(self.hello());
        self.drive(machine)
    }

    fn hello(&self) -> control::Hello {
        control::Hello {
            host: self.host.name(),
            software: concat!("whimbrel ", env!("CARGO_PKG_VERSION")).into(),
        }
    }

    fn drive(mut self, mut machine: Target) -> io::Result<()> {
        let mut todo: VecDeque<TargetEffect> = VecDeque::new();
        loop {
            while let Some(effect) = todo.pop_front() {
                tracing::debug!(effect = %Brief(&effect), "act");
                if let TargetEffect::End(end) = effect {
                    return self.finish(end);
                }
                match self.effect(effect) {
                    Ok(Some(event)) => todo.extend(machine.handle(event)),
                    Ok(None) => {}
                    Err(broken) => todo.extend(machine.handle(broken.into())),
                }
            }
            let patience = self.patience();
            // Also while one signal follows the other.
            let signal = match patience.is_zero() {
                true => Err(RecvTimeoutError::Timeout),
                false => self.signals.recv_timeout(patience),
            };
            let event = match signal {
                Ok(signal) => self.look_at(signal),
                Err(RecvTimeoutError::Timeout) => match self.asks_at.take_if(|at| *at <= Instant::now()) {
                    Some(_) => Some(self.claim().unwrap_or_else(TargetEvent::from)),
                    None => self.look_around(),
                },
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other("nothing can be heard any more"));
                }
            };
            if let Some(event) = event {
                todo.extend(machine.handle(event));
            }
        }
    }

    /// How long to wait for a word before looking around, or asking the record again.
    fn patience(&self) -> Duration {
        let due = [self.gives_up, self.asks_at].into_iter().flatten().min();
        let left = due.map_or(LOOK, |end| end.saturating_duration_since(Instant::now()));
        left.min(self.looked.due_in(LOOK))
    }

    /// Nothing was heard for a while: is there still something to wait for?
    fn look_around(&mut self) -> Option<TargetEvent> {
        let began = Instant::now();
        let seen = self.look();
        self.looked.done_since(began);
        seen
    }

    fn look(&mut self) -> Option<TargetEvent> {
        if self.gives_up.is_some_and(|end| end <= Instant::now()) {
            self.gives_up = None;
            return Some(TargetEvent::GiveUp("it was lost, and not back in time".to_owned()));
        }
        if let Some(why) = self.missed() {
            return self.lost(why);
        }
        let taken = self.taken.as_ref()?;
        if !(taken.has_ended)() {
            return None;
        }
        if !self.arrived {
            return self.alive().err().map(TargetEvent::from);
        }
        // A guest that crashed lacks nothing any more, and nobody can bring it back.
        if !std::mem::replace(&mut self.qemu_ended, true) {
            tracing::error!("QEMU has ended while memory was on its way to its guest");
            taken.receiver.enter(WritePolicy::Closed);
            taken.receiver.missing().clear();
            return Some(TargetEvent::AllPlaced);
        }
        None
    }

    /// Whether there is a QEMU. Looked at before a claim, too: a VM whose QEMU has ended until then goes on
    /// at the source.
    fn alive(&mut self) -> Result<(), Broken> {
        if (self.taken()?.has_ended)() {
            return Err(Broken::new("the waiting QEMU", "it has ended"));
        }
        Ok(())
    }

    fn look_at(&mut self, signal: Signal) -> Option<TargetEvent> {
        match signal {
            Signal::Spooled(generation, spooled) => self.spooled(generation, &spooled),
            // Of a connection that is lost: a source that is back has taken back what it announced there.
            // That its guest goes on without this migration stays true.
            Signal::Said(generation, kind)
                if generation != self.generation && !matches!(kind, control::Kind::Failed(_)) =>
            {
                tracing::debug!(kind = %Brief(&kind), "too late");
                None
            }
            Signal::Said(_, kind) => self.hear_word(kind),
            Signal::Unspooled(said) => {
                self.hear_spool(said);
                None
            }
            Signal::Event(TargetEvent::AllPlaced) => {
                // More may be missing since that was said.
                let all = self.taken.as_ref().is_some_and(|t| t.receiver.missing().is_empty());
                all.then_some(TargetEvent::AllPlaced)
            }
            Signal::Event(event) => Some(event),
            Signal::Loaded(loaded) => self.loaded(loaded),
            Signal::Attach(kind, conn) => self.attach(kind, conn),
            Signal::RoundEnd { generation, stream, round } => {
                if generation != self.generation || round != self.round + 1 {
                    return None;
                }
                self.ended_streams.insert(stream);
                let all = self.taken.as_ref().is_some_and(|t| self.ended_streams.len() as u32 == t.streams);
                all.then(|| {
                    self.round = round;
                    self.ended_streams.clear();
                    self.pause.mark(Part::RoundReceived);
                    if let Some(taken) = &self.taken {
                        taken.receiver.received().clear();
                        taken.receiver.forget_kept();
                    }
                    TargetEvent::Received(round)
                })
            }
            Signal::StreamLost(generation, stream, number, e) => {
                let current = generation == self.generation
                    && self.streams.get(&stream).is_some_and(|stream| stream.number == number);
                if current { self.stream_lost(stream, e) } else { None }
            }
            Signal::Lost(generation, e) if generation == self.generation => self.lost(e),
            Signal::Lost(..) => None,
        }
    }

    /// What the driver itself learns from a word on its way to the machine.
    fn hear_word(&mut self, kind: control::Kind) -> Option<TargetEvent> {
        match &kind {
            control::Kind::SpoolStop(_) => {
                if let Some(spool) = self.taken.as_ref().and_then(|taken| taken.spool.as_ref()) {
                    spool.thread.core().stop();
                }
                self.say(control::Kind::SpoolStopped(control::SpoolStopped {}));
                return None;
            }
            control::Kind::Hello(hello) => {
                if let Some(why) = self.control.as_ref().and_then(|(conn, _)| conn.belies(&hello.host)) {
                    return Some(TargetEvent::Broke { what: "believe the source".to_owned(), why });
                }
                self.source = hello.host.clone();
            }
            control::Kind::Failed(_) => self.source_is_back = true,
            control::Kind::State(_) => self.pause.mark(Part::StateHeard),
            control::Kind::Authorize(_) if !self.arrived => {
                self.pause.mark(Part::AuthorizeHeard);
                if let Err(broken) = self.alive() {
                    return Some(broken.into());
                }
            }
            _ => {}
        }
        Some(TargetEvent::Message(kind))
    }

    /// The link is lost.
    fn lost(&mut self, e: io::Error) -> Option<TargetEvent> {
        // Wrong words are not a lost link: the source is told what was wrong with them, while it still can
        // be.
        if e.kind() == io::ErrorKind::InvalidData && !self.arrived {
            let what = "understand the source".to_owned();
            return Some(TargetEvent::Broke { what, why: e.to_string() });
        }
        self.hang_up();
        // Soon enough the source has given up, too.
        let closed = matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset);
        let long = self.give_up + GRACE;
        self.gives_up = Some(Instant::now() + if closed { long.min(CLOSED) } else { long });
        Some(TargetEvent::LinkLost(e.to_string()))
    }

    fn taken(&mut self) -> Result<&mut Taken, Broken> {
        self.taken.as_mut().ok_or_else(|| Broken::new("the protocol", "nothing was prepared"))
    }

    fn finish(mut self, end: TargetEnd) -> io::Result<()> {
        if let Some(taken) = self.taken.take() {
            drop(taken.machine);
            self.host.ended(&taken.request, self.arrived);
        }
        // The other side hangs up first, so that the last word is not lost in a reset.
        let was_heard = self.gave_reasons && self.control.is_some();
        if matches!(end, TargetEnd::Completed) || was_heard {
            self.wait_for_the_other_side();
        }
        if let Some(spool) = self.settled_spool.take() {
            // By now the source has written its last word into its file, or never will.
            spool.remove(false, true);
        }
        self.hang_up();
        match end {
            TargetEnd::Completed => Ok(()),
            TargetEnd::Failed { what, why } => Err(io::Error::other(format!("{what}: {why}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that is asked nothing.
    struct Idle;

    impl Host for Idle {
        fn name(&self) -> String {
            "idle".into()
        }
        fn prepare(&self, _: &Request) -> Result<Waiting, Vec<String>> {
            Err(vec![])
        }
        fn spool_directory(&self, _: &str) -> Result<PathBuf, String> {
            unreachable!("nobody spools")
        }
        fn record(&self) -> Arc<dyn crate::ports::Ownership> {
            unreachable!("nobody claims")
        }
        fn settled(&self, _: MigrationId) -> bool {
            false
        }
        fn ended(&self, _: &Request, _: bool) {}
    }

    /// What the source announced, it has taken back since; heard in the wrong order, pages would be taken for
    /// missing ones, and all others be lost.
    #[test]
    fn i2_words_of_a_lost_connection_are_not_believed_later() {
        let (mut driver, _outside) =
            TargetDriver::new(Arc::new(Idle), MigrationId(1), Token([0; Token::SIZE]));
        let missing = || control::Kind::Missing(control::Missing::default());
        let (old, new) = (driver.generation, driver.generation + 1);
        assert!(driver.look_at(Signal::Said(old, missing())).is_some());
        driver.hang_up();
        assert_eq!(driver.look_at(Signal::Said(old, missing())), None);
        let state = control::Kind::State(control::State::default());
        assert_eq!(driver.look_at(Signal::Said(old, state)), None);
        assert!(driver.look_at(Signal::Said(new, missing())).is_some());
        // That stays true.
        let failed = control::Kind::Failed(control::Failed::default());
        assert!(driver.look_at(Signal::Said(old, failed)).is_some());
    }
}
