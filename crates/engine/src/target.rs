//! The target's driver: does what `proto::Target` says, and tells it what came of it.

use crate::{
    beside::Beside,
    conn::{Conn, Speaker, now_ns},
    faults::Faults,
    land::{Landing, Stage},
    ports::{Block, Claim, Claimed, DeviceState, HasEnded, Host, Machine, Request, TargetJournal, Waiting},
    why,
};
use proto::{Brief, Kind, Target, TargetAct, TargetEnd, TargetEvent, Token, control};
use std::{
    collections::{HashSet, VecDeque},
    io::{self},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use units::{BlockId, Epoch, MemorySet, MigrationId, PAGE_SIZE};

mod link; // its connections: welcomed, heard, lost

/// Streams of one migration, at most: each costs a thread and a batch of memory.
const MAX_STREAMS: u32 = 64;

/// RAM blocks of one VM, at most; QEMU itself stops at 256 memory slots of a machine.
const MAX_BLOCKS: usize = 256;

/// Pages of one RAM block, at most: 64 TiB, beyond what x86-64 guests have today.
const MAX_PAGES: u64 = 1 << 34;

/// A RAM block's name, at most: QEMU's own are shorter.
const MAX_NAME: usize = 256;

/// A device state's parts, at most, all of them together: 512 MiB, the largest video memory. What packs so well that it fits into a
/// message could otherwise unpack to 255 times as much.
const MAX_STATE: u64 = 512 << 20;

/// How long to wait before asking the record again.
const AGAIN: Duration = Duration::from_millis(500);

/// How often it is looked whether the QEMU that waits is still there, and the source still wanted.
const LOOK: Duration = Duration::from_millis(500);

/// A source that was lost may come back so much later than it gives up itself: clocks and connections take their time.
const GRACE: Duration = Duration::from_secs(5);

/// A connection that was closed rather than silent was closed by a source that has ended, or by one that is back at once.
const CLOSED: Duration = Duration::from_secs(5);

/// Nobody may have this host wait for longer.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// What a running migration is told from outside.
pub(crate) enum ToTarget {
    /// A connection that belongs to it.
    Attach(Kind, Conn),
    /// The agent is about to end.
    GiveUp,
}

enum Signal {
    Event(TargetEvent),
    Attach(Kind, Conn),
    RoundEnd {
        generation: u32,
        stream: u16,
        round: u32,
    },
    /// A connection of this generation ended.
    Lost(u32, io::Error),
}

/// The empty QEMU and what lands in it.
struct Taken {
    request: Request,
    machine: Beside<dyn Machine>,
    /// Whether its process has ended.
    has_ended: HasEnded,
    journal: Beside<dyn TargetJournal>,
    /// How the owed pages that were taken last are being recorded.
    recorded: Option<Receiver<io::Result<()>>>,
    landing: Arc<Landing>,
    faults: Option<Faults>,
    streams: u32,
}

impl Taken {
    /// Begins to record what is owed: it takes as long as a disk does, and must be over by the time of the claim.
    fn record_owed(&mut self, owed: MemorySet) -> io::Result<()> {
        self.owed_is_recorded()?;
        let (tell, told) = channel();
        self.journal.spawn("record", move |journal| drop(tell.send(journal.owed(&owed))))?;
        self.recorded = Some(told);
        Ok(())
    }

    /// Waits until what is owed is recorded durably.
    fn owed_is_recorded(&mut self) -> io::Result<()> {
        let Some(told) = self.recorded.take() else { return Ok(()) };
        told.recv().unwrap_or_else(|_| Err(io::Error::other("the recording thread ended without a word")))
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
    /// All that pages travel on, each with the thread that lands them.
    conns: Vec<(Conn, Option<JoinHandle<()>>)>,
    /// How long a source that was lost while its guest runs there may take to come back; and until when that is.
    give_up: Duration,
    gives_up: Option<Instant>,
    generation: u32,
    round: u32,
    ended_streams: HashSet<u16>,
    arrived: bool,
    /// The source said that the guest goes on there: it will never ask the record about this migration.
    source_is_back: bool,
    /// The source was told why nothing comes of it.
    gave_reasons: bool,
    /// The guest's QEMU ended before it had all its memory.
    qemu_ended: bool,
}

impl TargetDriver {
    /// With the sender by which further connections reach it. `token`: what those that carry pages have to say.
    pub(crate) fn new(host: Arc<dyn Host>, migration: MigrationId, token: Token) -> (Self, Sender<ToTarget>) {
        let (tell, signals) = channel();
        let (outside, told) = channel();
        let forward = tell.clone();
        // A type of its own, so that nobody outside can say what only the driver's own threads may.
        thread::spawn(move || {
            told.into_iter().all(|word| {
                let signal = match word {
                    ToTarget::Attach(kind, conn) => Signal::Attach(kind, conn),
                    ToTarget::GiveUp => {
                        Signal::Event(TargetEvent::GiveUp("the target's agent ends".to_owned()))
                    }
                };
                forward.send(signal).is_ok()
            })
        });
        let driver = Self {
            host,
            migration,
            token,
            tell,
            signals,
            source: String::new(),
            taken: None,
            control: None,
            conns: vec![],
            give_up: Duration::ZERO,
            gives_up: None,
            generation: 0,
            round: 0,
            ended_streams: HashSet::new(),
            arrived: false,
            source_is_back: false,
            gave_reasons: false,
            qemu_ended: false,
        };
        (driver, outside)
    }

    /// Takes a VM in, or leaves no trace.
    pub(crate) fn run(mut self, conn: Conn) -> io::Result<()> {
        self.hear(conn)?;
        let machine = Target::new(self.hello());
        self.drive(machine)
    }

    /// Goes on after a restart of this agent: the VM is ours, and its guest waits for pages that only the source has.
    pub(crate) fn run_after_claim(
        mut self,
        request: Request,
        waiting: Waiting,
        mut owed: MemorySet,
    ) -> io::Result<()> {
        let Waiting { memory, missing, machine, journal } = waiting;
        let recorded = owed.blocks().map(|(_, set)| set.capacity());
        if !recorded.eq(memory.blocks().iter().map(|block| block.pages)) {
            // A guest with holes that nobody knows of would read zeros.
            let why = "the pages that are recorded as owed are not those of this VM's RAM blocks";
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        for id in (0..memory.blocks().len()).map(|i| BlockId(i as u16)) {
            // What is present has been received: a page leaves its hole in one step.
            owed.block_mut(id).subtract(&memory.present(id)?);
        }
        let tell = self.tell.clone();
        let all_placed = move || drop(tell.send(Signal::Event(TargetEvent::AllPlaced)));
        let landing = Landing::new(memory, missing, false, None, all_placed);
        landing.go_on(owed);
        let landing = Arc::new(landing);
        let faults = Some(Faults::start(landing.clone())?);
        self.source = request.from.clone();
        self.arrived = true;
        let has_ended = machine.has_ended();
        let (machine, journal) = (Beside::new(machine), Beside::new(journal));
        let (recorded, streams) = (None, MAX_STREAMS);
        self.taken = Some(Taken { request, machine, has_ended, journal, recorded, landing, faults, streams });
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
        let mut todo: VecDeque<TargetAct> = VecDeque::new();
        loop {
            while let Some(act) = todo.pop_front() {
                tracing::debug!(act = %Brief(&act), "act");
                if let TargetAct::End(end) = act {
                    return self.finish(end);
                }
                match self.act(act) {
                    Ok(Some(event)) => todo.extend(machine.handle(event)),
                    Ok(None) => {}
                    Err((what, why)) => {
                        tracing::warn!(what, why, "an act failed");
                        todo.extend(machine.handle(TargetEvent::Broke { what, why }));
                    }
                }
            }
            let event = match self.signals.recv_timeout(self.patience()) {
                Ok(signal) => self.look_at(signal),
                Err(RecvTimeoutError::Timeout) => self.look_around(),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other("nothing can be heard any more"));
                }
            };
            if let Some(event) = event {
                todo.extend(machine.handle(event));
            }
        }
    }

    /// How long to wait for a word before looking around.
    fn patience(&self) -> Duration {
        let left = self.gives_up.map_or(LOOK, |end| end.saturating_duration_since(Instant::now()));
        left.min(LOOK)
    }

    /// Nothing was heard for a while: is there still something to wait for?
    fn look_around(&mut self) -> Option<TargetEvent> {
        if self.gives_up.is_some_and(|end| end <= Instant::now()) {
            self.gives_up = None;
            return Some(TargetEvent::GiveUp("it was lost, and not back in time".to_owned()));
        }
        let taken = self.taken.as_ref()?;
        if !(taken.has_ended)() {
            return None;
        }
        let (what, why) = ("the waiting QEMU".to_owned(), "it has ended".to_owned());
        if !self.arrived {
            return Some(TargetEvent::Broke { what, why });
        }
        // A guest that crashed lacks nothing any more, and nobody can bring it back.
        if !std::mem::replace(&mut self.qemu_ended, true) {
            tracing::error!("QEMU has ended while memory was on its way to its guest");
            taken.landing.enter(Stage::Closed);
            taken.landing.owed().clear();
            return Some(TargetEvent::AllPlaced);
        }
        None
    }

    fn look_at(&mut self, signal: Signal) -> Option<TargetEvent> {
        match signal {
            Signal::Event(TargetEvent::Message(control::Kind::Hello(hello))) => {
                if let Some(why) = self.control.as_ref().and_then(|(conn, _)| conn.belies(&hello.host)) {
                    return Some(TargetEvent::Broke { what: "believe the source".to_owned(), why });
                }
                self.source = hello.host.clone();
                Some(TargetEvent::Message(control::Kind::Hello(hello)))
            }
            Signal::Event(TargetEvent::Message(control::Kind::Failed(failed))) => {
                self.source_is_back = true;
                Some(TargetEvent::Message(control::Kind::Failed(failed)))
            }
            Signal::Event(TargetEvent::AllPlaced) => {
                // More may be owed since that was said.
                let all = self.taken.as_ref().is_some_and(|t| t.landing.owed().is_empty());
                all.then_some(TargetEvent::AllPlaced)
            }
            Signal::Event(event) => Some(event),
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
                    if let Some(taken) = &self.taken {
                        taken.landing.landed().clear();
                    }
                    TargetEvent::Landed(round)
                })
            }
            Signal::Lost(generation, e) => {
                if generation != self.generation {
                    return None;
                }
                // Wrong words are not a lost link: the source is told what was wrong with them, while it still can be.
                if e.kind() == io::ErrorKind::InvalidData && !self.arrived {
                    let what = "understand the source".to_owned();
                    return Some(TargetEvent::Broke { what, why: e.to_string() });
                }
                self.hang_up();
                // Soon enough the source has given up, too.
                let closed =
                    matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset);
                let long = self.give_up + GRACE;
                self.gives_up = Some(Instant::now() + if closed { long.min(CLOSED) } else { long });
                Some(TargetEvent::LinkLost(e.to_string()))
            }
        }
    }

    fn taken(&mut self) -> Result<&mut Taken, (String, String)> {
        self.taken.as_mut().ok_or_else(|| ("the protocol".into(), "nothing was prepared".into()))
    }

    fn act(&mut self, act: TargetAct) -> Result<Option<TargetEvent>, (String, String)> {
        match act {
            TargetAct::Send(mut kind) => {
                if let control::Kind::Ready(ready) = &mut kind {
                    ready.token = self.token.0.to_vec();
                }
                self.gave_reasons |= matches!(kind, control::Kind::Failed(_) | control::Kind::Refused(_));
                self.say(kind);
                Ok(None)
            }
            TargetAct::Prepare(prepare) => Ok(Some(TargetEvent::Prepared(self.prepare(prepare)))),
            TargetAct::TakeOwed(bitmaps) => {
                let taken = self.taken()?;
                let pages = proto::page_sets(&bitmaps, &taken.landing.shape)
                    .map_err(|e| ("read the owed pages".to_owned(), e.to_string()))?;
                taken.landing.owe(&pages).map_err(why("make holes for the owed pages"))?;
                let owed = taken.landing.owed().clone();
                let nothing = owed.is_empty();
                taken.record_owed(owed).map_err(why("record the owed pages"))?;
                // The guest is stopped upon our answer: whoever gets ready for the load must be done.
                drop(taken.machine.lock());
                if nothing {
                    let _ = self.tell.send(Signal::Event(TargetEvent::AllPlaced));
                }
                Ok(Some(TargetEvent::OwedTaken))
            }
            TargetAct::KeepHashes(hashes) => {
                let landing = &self.taken()?.landing;
                let mut announced = landing.announced.lock().expect("no one panics here");
                if let Some(announced) = announced.as_mut() {
                    announced.keep(&hashes, &*landing.memory).map_err(why("read the hashes"))?;
                }
                Ok(None)
            }
            TargetAct::Compare => Ok(Some(TargetEvent::Compared(self.compare()?))),
            TargetAct::Load(mut state) => {
                self.taken()?.request.history = std::mem::take(&mut state.history);
                let state = unpack(&state).map_err(|e| ("unpack the device state".to_owned(), e))?;
                let taken = self.taken()?;
                if taken.landing.owed().is_empty() {
                    taken.landing.enter(Stage::Closed);
                }
                taken.machine.lock().load(&state).map_err(|e| (e.what, e.why))?;
                // Before anybody can claim.
                taken.owed_is_recorded().map_err(why("record the owed pages"))?;
                Ok(Some(TargetEvent::Loaded))
            }
            TargetAct::Claim => Ok(Some(self.claim()?)),
            TargetAct::Resume => {
                self.arrived = true;
                let mut machine = self.taken()?.machine.lock();
                match machine.resume() {
                    Ok(ago) => {
                        let at_ns = now_ns().saturating_sub(ago.as_nanos() as u64);
                        if let Err(e) = machine.announce() {
                            tracing::warn!(%e, "the guest runs, but could not be announced to the network");
                        }
                        Ok(Some(TargetEvent::Resumed { at_ns }))
                    }
                    Err(e) => Ok(Some(TargetEvent::ResumeFailed(e.to_string()))),
                }
            }
            TargetAct::SendLanded => {
                let taken = self.taken()?;
                let blocks = proto::bitmaps(&taken.landing.landed());
                self.say(control::Kind::Landed(control::Landed {
                    round: self.round,
                    blocks,
                    token: self.token.0.to_vec(),
                }));
                Ok(None)
            }
            TargetAct::SendStillOwed => {
                let blocks = proto::bitmaps(&self.taken()?.landing.owed());
                self.say(control::Kind::StillOwed(control::StillOwed {
                    blocks,
                    token: self.token.0.to_vec(),
                }));
                Ok(None)
            }
            TargetAct::Settle => {
                self.settle()?;
                Ok(None)
            }
            TargetAct::Destroy => {
                self.destroy();
                Ok(None)
            }
            TargetAct::End(_) => unreachable!("the loop ends before"),
        }
    }

    fn prepare(&mut self, prepare: control::Prepare) -> Result<(), Vec<String>> {
        let blocks: Vec<Block> =
            prepare.blocks.into_iter().map(|b| Block { name: b.name, pages: b.pages }).collect();
        let sane = (1..=MAX_BLOCKS).contains(&blocks.len())
            && blocks.iter().all(|b| (1..=MAX_PAGES).contains(&b.pages) && b.name.len() <= MAX_NAME)
            && (1..=MAX_STREAMS).contains(&prepare.streams)
            && Epoch(prepare.epoch) <= Epoch::MOST;
        if !sane {
            return Err(vec![format!(
                "the request is out of bounds: 1 to {MAX_BLOCKS} RAM blocks of at most {MAX_PAGES} pages, 1 to \
                 {MAX_STREAMS} streams, and an epoch of at most {}",
                Epoch::MOST
            )]);
        }
        let sealer = match *prepare.seal_key {
            [] => None,
            ref key => match <[u8; 32]>::try_from(key) {
                Ok(key) => Some(page::Sealer::new(key)),
                Err(_) => return Err(vec!["the key of the seals has another length than agreed".into()]),
            },
        };
        let request = Request {
            migration: self.migration,
            vm: prepare.vm,
            from: self.source.clone(),
            epoch: Epoch(prepare.epoch),
            recipe: prepare.recipe,
            blocks,
            post_copy: prepare.post_copy,
            history: vec![],
        };
        self.give_up = Duration::from_millis(prepare.give_up_ms).min(LONGEST);
        let waiting = self.host.prepare(&request)?;
        let tell = self.tell.clone();
        let all_placed = move || drop(tell.send(Signal::Event(TargetEvent::AllPlaced)));
        let landing = Landing::new(waiting.memory, waiting.missing, prepare.verify, sealer, all_placed);
        let mut taken = Taken {
            request,
            has_ended: waiting.machine.has_ended(),
            machine: Beside::new(waiting.machine),
            journal: Beside::new(waiting.journal),
            recorded: None,
            landing: Arc::new(landing),
            faults: None,
            streams: prepare.streams,
        };
        // Beside the first pages, which are soon on their way.
        let ready = taken.machine.spawn("get-ready", |machine| {
            if let Err(e) = machine.get_ready() {
                tracing::debug!(%e, "loading will take a little longer");
            }
        });
        if let Err(e) = ready {
            tracing::debug!(%e, "loading will take a little longer");
        }
        // Loading a device state reads guest RAM: whoever faults then must be answered.
        let faults =
            taken.landing.missing.is_some().then(|| Faults::start(taken.landing.clone())).transpose();
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

    fn compare(&mut self) -> Result<Result<(), String>, (String, String)> {
        let landing = &self.taken()?.landing;
        let owed = landing.owed().clone();
        let announced = landing.announced.lock().expect("no one panics here");
        let Some(announced) = announced.as_ref() else { return Ok(Ok(())) };
        let differing = announced.differing(&*landing.memory, &owed).map_err(why("hash the memory"))?;
        Ok(match differing {
            None => Ok(()),
            Some((block, page)) => {
                let name = &landing.memory.blocks()[usize::from(block.0)].name;
                let at = page.0 * PAGE_SIZE as u64;
                Err(format!(
                    "page {} of RAM block {name} (offset {at:#x}) differs between the two sides",
                    page.0
                ))
            }
        })
    }

    fn claim(&mut self) -> Result<TargetEvent, (String, String)> {
        let record = self.host.record();
        let claimer = self.host.name();
        let request = &self.taken()?.request;
        let claim =
            Claim { vm: request.vm.clone(), migration: request.migration, expected: request.epoch, claimer };
        Ok(match record.claim(&claim) {
            Ok(Claimed::Yours(epoch)) => TargetEvent::ClaimWon(epoch.0),
            Ok(Claimed::Lost(record)) => TargetEvent::ClaimLost(record.owner),
            Err(e) => {
                tracing::error!(%e, "the ownership record cannot be asked");
                thread::sleep(AGAIN);
                TargetEvent::ClaimUnknown(e.to_string())
            }
        })
    }

    /// Nothing is owed: the guest's memory is like any other's again.
    fn settle(&mut self) -> Result<(), (String, String)> {
        let taken = self.taken()?;
        taken.landing.enter(Stage::Closed);
        if let Some(missing) = &taken.landing.missing {
            // Only a QEMU that is gone refuses, and then nobody misses a page.
            if let Err(e) = missing.finish() {
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
        let summary = control::Settled { qemu_ended: self.qemu_ended, ..self.taken()?.landing.summary() };
        self.say(control::Kind::Settled(summary));
        Ok(())
    }

    fn destroy(&mut self) {
        let source_may_ask = !self.source_is_back;
        let Some(mut taken) = self.taken.take() else { return };
        if let Some(faults) = taken.faults.take() {
            faults.end();
        }
        let destroyed = taken.machine.lock().destroy();
        if let Err(e) = destroyed {
            tracing::error!(%e, "the half-made VM would not end");
        }
        let abandoned = taken.journal.lock().abandoned(source_may_ask);
        if let Err(e) = abandoned {
            tracing::error!(%e, "cannot forget an abandoned migration");
        }
        self.host.ended(&taken.request, false);
    }

    fn finish(mut self, end: TargetEnd) -> io::Result<()> {
        if let Some(taken) = self.taken.take() {
            drop(taken.machine);
            self.host.ended(&taken.request, self.arrived);
        }
        // The other side hangs up first, so that the last word is not lost in a reset.
        if matches!(end, TargetEnd::Completed) || self.gave_reasons {
            self.wait_for_the_other_side();
        }
        self.hang_up();
        match end {
            TargetEnd::Completed => Ok(()),
            TargetEnd::Failed { what, why } => Err(io::Error::other(format!("{what}: {why}"))),
        }
    }
}

pub(crate) fn unpack(state: &control::State) -> Result<DeviceState, String> {
    unpack_within(state, MAX_STATE)
}

/// All parts together may be so large.
fn unpack_within(state: &control::State, mut room: u64) -> Result<DeviceState, String> {
    let mut raw = |packed: &Option<control::Packed>| -> Result<Vec<u8>, String> {
        let Some(packed) = packed else { return Ok(vec![]) };
        let raw = proto::unpacked(packed, room).map_err(|e| e.to_string())?;
        room -= raw.len() as u64;
        Ok(raw)
    };
    let private = state
        .private
        .iter()
        .map(|b| Ok((b.name.clone(), raw(&b.content)?)))
        .collect::<Result<_, String>>()?;
    Ok(DeviceState { stream: raw(&state.stream)?, private })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_state_is_bounded_as_a_whole_and_not_only_in_its_parts() {
        let part = || Some(proto::packed(&[0; 600]));
        let private = control::PrivateBlock { name: "vga.vram".into(), content: part() };
        let state = |parts: usize| control::State {
            stream: part(),
            private: vec![private.clone(); parts],
            ..Default::default()
        };
        let unpacked = unpack_within(&state(2), 1800).unwrap();
        assert_eq!((unpacked.stream.len(), unpacked.private.len()), (600, 2));
        assert!(unpack_within(&state(3), 1800).unwrap_err().contains("at most 0 are acceptable"));
        assert!(unpack_within(&state(2), 1799).is_err());
    }
}
