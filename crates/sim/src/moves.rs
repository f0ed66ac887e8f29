//! Who can move, and one move at a time.

use crate::{
    guest::Deed,
    link::{Over, Purpose, Side, Word},
    planted::PlantedBug,
    printed::Printed,
    qemu::Run,
    record::Answer,
    setup::Keeper,
    source, target,
    watchdog::Watchdog,
    world::{World, say},
};
use proto::control::Kind;
use std::ops::Range;

/// Connections whose messages can be delivered: one for control, four for data, one for faults, one that asks
/// the record; and as many that are on their way out. They leave the list when they are over, so that the
/// others come up.
const CONNS: u8 = 12;

/// Data connections.
const STREAMS: u8 = 4;

/// Claims on their way to a record elsewhere that may be next.
const CLAIMS: u8 = 4;

/// Who may move, as a number: so many that a set of them fits a machine word.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Who {
    /// The source's driver.
    Source,
    /// The target's.
    Target,
    /// The thread that saves the device state.
    Saver,
    /// The thread that records what is missing.
    Recorder,
    /// The thread that hears of missing pages.
    Faults,
    /// The guest.
    Guest,
    /// The thread that answers claims.
    Server,
    /// The thread that writes the spool.
    Spooler,
    /// The thread that reads it.
    Reader,
    /// A stream's thread.
    Stream(u8),
    /// A message, or the end of a connection, on its way to a side.
    Wire(u8, Side),
    /// A claim on its way to a record elsewhere.
    Claim(u8),
    /// An answer on its way back.
    Answer(Side),
    /// The process that watches over the source's pause.
    Watchdog,
    /// The thread that tells the target that the migration has ended.
    Caller,
    /// The thread of a side that waits for the datastore.
    Disk(Side),
}

/// From these numbers on come the connections, the claims, the answers, the watchdog, the caller and the
/// datastore …
const WIRE: u8 = 9 + STREAMS;
const CLAIM: u8 = WIRE + 2 * CONNS;
const ANSWER: u8 = CLAIM + CLAIMS;
const WATCHDOG: u8 = ANSWER + 2;
const DISK: u8 = WATCHDOG + 2;

/// … and these are all who may move.
pub(crate) const MOVERS: u8 = WATCHDOG + 4;

/// The number of the thread that reads the spool.
pub(crate) const READER: u8 = 8;

/// The number of the first connection's way to the target: for control, mostly.
pub(crate) const TO_TARGET: u8 = WIRE + 1;

impl Who {
    /// By its number.
    pub fn of(number: u8) -> Self {
        let side = |odd: bool| if odd { Side::Target } else { Side::Source };
        match number {
            0 => Self::Source,
            1 => Self::Target,
            2 => Self::Saver,
            3 => Self::Recorder,
            4 => Self::Faults,
            5 => Self::Guest,
            6 => Self::Server,
            7 => Self::Spooler,
            READER => Self::Reader,
            9..WIRE => Self::Stream(number - 9),
            WIRE..CLAIM => Self::Wire((number - WIRE) / 2, side((number - WIRE) % 2 == 1)),
            CLAIM..ANSWER => Self::Claim(number - CLAIM),
            ANSWER..WATCHDOG => Self::Answer(side(number > ANSWER)),
            WATCHDOG => Self::Watchdog,
            DISK.. => Self::Disk(side(number > DISK)),
            _ => Self::Caller,
        }
    }
}

impl World {
    /// All who can move now, as bits.
    pub fn movers(&self) -> u64 {
        let mut can = 0;
        let mut look = |numbers: Range<u8>| {
            for number in numbers {
                can |= u64::from(self.can(Who::of(number))) << number;
            }
        };
        // Of connections and claims only those that there are: this is asked before every move.
        let conns = self.conns.len().min(usize::from(CONNS)) as u8;
        let claims = self.record.asked.len().min(usize::from(CLAIMS)) as u8;
        look(0..WIRE);
        look(WIRE..WIRE + 2 * conns);
        look(CLAIM..CLAIM + claims);
        look(ANSWER..MOVERS);
        can
    }

    fn can(&self, who: Who) -> bool {
        match who {
            Who::Source => self.source_can(),
            Who::Target => self.target_can(),
            Who::Saver => self.up[0] && self.source.work.as_ref().is_some_and(|work| work.saving.is_some()),
            Who::Recorder => self.recorder_can(),
            Who::Faults => self.faults_can(),
            Who::Guest => self.guest.rest > 0 && self.qemus.iter().any(|q| q.runs() && q.waits_for.is_none()),
            Who::Server => self.server_can(),
            Who::Spooler => self.spooler_can(),
            Who::Reader => self.reader_can(),
            Who::Stream(i) => self.stream_can(usize::from(i)),
            Who::Wire(i, side) => self.conns.get(usize::from(i)).is_some_and(|conn| {
                !conn.to[side.at()].is_empty() || (conn.over[side.at()].is_some() && conn.open[side.at()])
            }),
            Who::Claim(i) => self.record.up && usize::from(i) < self.record.asked.len(),
            Who::Answer(side) => self.record.answers[side.at()].is_some(),
            Who::Watchdog => matches!(self.watchdog, Watchdog::Acts(_)),
            Who::Caller => self.caller_can(),
            Who::Disk(side) => self.disk_can(side),
        }
    }

    /// Somebody moves.
    pub fn moves(&mut self, who: Who) {
        match who {
            Who::Source => self.source_moves(),
            Who::Target => self.target_moves(),
            Who::Saver => self.source_saves(),
            Who::Recorder => self.recorder_moves(),
            Who::Faults => self.faults_move(),
            Who::Guest => self.guest_moves(),
            Who::Server => self.server_moves(),
            Who::Spooler => self.spooler_moves(),
            Who::Reader => self.reader_moves(),
            Who::Stream(i) => self.stream_moves(usize::from(i)),
            Who::Wire(i, side) => self.wire_moves(usize::from(i), side),
            Who::Claim(i) => self.record_decides(usize::from(i)),
            Who::Answer(side) => self.record_answers(side),
            Who::Watchdog => self.watchdog_moves(),
            Who::Caller => self.caller_moves(),
            Who::Disk(side) => self.disk_moves(side),
        }
    }

    /// The next move of the usual order, in which everybody takes turns; else time passes. Says whether there
    /// was any.
    pub fn step(&mut self) -> bool {
        let can = self.movers();
        let awake = can & !self.asleep;
        if awake == 0 {
            if can != 0 {
                self.asleep = 0;
                return true;
            }
            self.asleep = 0;
            let more = self.pass_time();
            self.check();
            return more;
        }
        let later = awake & u64::MAX << self.turn;
        self.step_by(if later == 0 { awake } else { later }.trailing_zeros() as u8);
        true
    }

    /// This one moves.
    pub fn step_by(&mut self, number: u8) {
        self.turn = (number + 1) % MOVERS;
        self.steps.0 += 1;
        self.moves(Who::of(number));
        if self.conns.iter().any(|conn| conn.is_gone()) {
            self.conns.retain(|conn| !conn.is_gone());
        }
        self.check();
    }

    /// A connection's next message arrives, or its end is heard of.
    fn wire_moves(&mut self, i: usize, side: Side) {
        let conn = &mut self.conns[i];
        let (id, purpose) = (conn.id, conn.purpose);
        let Some(word) = conn.to[side.at()].pop_front() else {
            let Some(over) = conn.over[side.at()].take() else { return };
            conn.open[side.at()] = false;
            say!(self, "{side:?} hears that {purpose:?} {id} is over: {over:?}");
            return match side {
                Side::Source => self.source_loses(id, purpose, over),
                Side::Target => self.target_loses(id, purpose, over),
            };
        };
        if !conn.open[side.at()] {
            return;
        }
        match side {
            Side::Source => self.source_receives(id, word),
            Side::Target => self.target_receives(id, purpose, word),
        }
    }

    fn source_loses(&mut self, id: u16, purpose: Purpose, over: Over) {
        if self.source.call.is_some_and(|call| call.conn() == Some(id)) {
            return self.caller_loses(over);
        }
        let refused = self.conns.iter().any(|c| c.id == id && c.welcome == Some(false));
        let Some(work) = self.source.work.as_deref_mut() else { return };
        match purpose {
            Purpose::Control | Purpose::Resume => {
                work.refused |= refused && work.control == Some(id);
                work.heard.push_back(source::Heard::Silent(id));
            }
            Purpose::Data(_) | Purpose::Faults => work.heard.push_back(source::Heard::Lost(id)),
            Purpose::Record => {}
        }
    }

    fn target_loses(&mut self, id: u16, purpose: Purpose, over: Over) {
        let Some(work) = self.target.work.as_deref_mut() else { return };
        match purpose {
            Purpose::Control | Purpose::Resume => work.heard.push_back(target::Heard::Lost(id, over)),
            Purpose::Data(_) => work.heard.push_back(target::Heard::Lost(id, over)),
            // That the source closed it is no news.
            Purpose::Faults if over == Over::Cut => work.heard.push_back(target::Heard::Lost(id, over)),
            _ => {}
        }
    }

    fn source_receives(&mut self, id: u16, word: Word) {
        if matches!(word, Word::Say(_) | Word::Want(_) | Word::Claimed(Answer::Yours(_) | Answer::Lost(_))) {
            self.idle = 0;
        }
        if self.source.call.is_some_and(|call| call.conn() == Some(id)) {
            // Whatever it says: it has not heard yet.
            return;
        }
        let Some(work) = self.source.work.as_deref_mut() else { return };
        match word {
            Word::Say(kind) => work.heard.push_back(source::Heard::Said(id, Box::new(kind))),
            Word::Want(page) => self.source_is_asked_for(id, page),
            Word::Claimed(answer) if work.asking == Some(id) => work.answer = Some(answer),
            _ => {}
        }
    }

    fn target_receives(&mut self, id: u16, purpose: Purpose, word: Word) {
        match word {
            Word::Hello => self.accept(id, purpose),
            Word::Page(page, meant, how) => self.land(id, page, meant, how),
            Word::Claim(claim) => self.target.serving.push_back((id, claim, None)),
            Word::Say(Printed(Kind::Spooled(spooled))) => {
                if let Some(work) = self.target.work.as_deref_mut() {
                    work.heard.push_back(target::Heard::Spooled(id, Printed(spooled)));
                }
            }
            Word::Say(kind) => {
                if let Some(work) = self.target.work.as_deref_mut() {
                    work.heard.push_back(target::Heard::Said(id, kind));
                }
            }
            Word::RoundEnd(round) => {
                if let (Some(work), Purpose::Data(stream)) = (self.target.work.as_deref_mut(), purpose) {
                    work.heard.push_back(target::Heard::RoundEnd(id, stream, round));
                }
            }
            Word::Want(_) | Word::Claimed(_) => {}
        }
    }

    /// A claim reaches the record elsewhere, whether or not its sender still lives.
    fn record_decides(&mut self, i: usize) {
        let (from, claim, waited) = self.record.asked.remove(i);
        let idempotent = !self.has(PlantedBug::ClaimNotIdempotent);
        let answer = if self.record.restored {
            // It says an epoch that is not the one that was seen before: then nobody may rely on it.
            Answer::Unknown
        } else {
            let before = self.record.owner;
            let answer = self.record.owner.claim(claim, idempotent);
            if self.record.owner != before {
                self.record.before = before;
            }
            answer
        };
        let owner = self.record.owner;
        self.ghost.committed |= !self.record.restored && owner.decided && owner.owner == Side::Target;
        say!(self, "record: {from:?}'s claim for {:?} comes to {answer:?}", claim.claimer);
        if waited {
            self.record.answers[from.at()] = Some(answer);
        }
    }

    fn record_answers(&mut self, side: Side) {
        let answer = self.record.answers[side.at()].take();
        match side {
            Side::Source => {
                if let Some(work) = self.source.work.as_deref_mut() {
                    work.answer = answer;
                }
            }
            Side::Target => {
                if let Some(work) = self.target.work.as_deref_mut() {
                    work.answer = answer;
                }
            }
        }
    }

    /// The guest does its next deed, wherever it runs.
    fn guest_moves(&mut self) {
        let Some(side) = self.qemus.iter().position(|q| q.runs() && q.waits_for.is_none()) else { return };
        let qemu = &mut self.qemus[side];
        let deed = self.guest.deed(self.setup.guest, self.setup.pages);
        let touched = match deed {
            Deed::Read(page) | Deed::Write(page) | Deed::Clear(page) => [page, page],
            Deed::Copy(to, from) => [from, to],
        };
        if !touched.iter().all(|page| qemu.can_touch(*page)) {
            say!(self, "guest: waits for page {:?}", qemu.waits_for);
            return;
        }
        let read = touched[0];
        let (found, truth) = (qemu.ram.at(read).content, self.guest.truth.at(read).content);
        let written = match deed {
            Deed::Read(_) => None,
            Deed::Write(page) => Some((page, self.guest.write(page))),
            Deed::Clear(page) => Some((page, self.guest.put(page, 0))),
            Deed::Copy(to, _) => Some((to, self.guest.put(to, truth))),
        };
        if let Some((page, now)) = written {
            qemu.ram.put(page, now);
            if let Some(tracked) = &mut qemu.tracked {
                tracked.add(page);
            }
        }
        self.guest.done += 1;
        self.guest.rest -= 1;
        qemu.state = Some(self.guest.done);
        let has_disk = qemu.has_disk;
        say!(self, "guest: {deed:?}");
        if found != truth {
            self.breach(|| format!("the guest read {found} in page {read}, and had written {truth}"));
        }
        if !has_disk {
            self.breach(|| "I6: the guest runs without its disk's lock".into());
        }
    }

    /// QEMU lets the guest run (`cont`).
    pub fn guest_runs(&mut self, side: Side) {
        if side == Side::Source && self.ghost.spoken {
            self.ghost.by_person = true;
            // What the target did is lost with its host: the guest goes on from where it was stopped.
            self.ghost.wanted = self.ghost.wanted_at_stop;
            if let Some(stop) = self.at_stop.take() {
                self.guest = *stop;
            }
        }
        let other_has_disk = self.qemus[side.other().at()].has_disk;
        let qemu = &mut self.qemus[side.at()];
        let state = qemu.state;
        qemu.run = Run::Running;
        qemu.has_disk = true;
        say!(self, "the guest runs on the {side:?}");
        self.guest.wake(self.setup.busy);
        if other_has_disk {
            self.breach(|| "I6: both QEMUs have the disk active".into());
        }
        if state != Some(self.guest.done) {
            let done = self.guest.done;
            self.breach(|| format!("the guest goes on from {state:?}, and was at {done}"));
        }
    }

    /// Whether somebody keeps the record elsewhere.
    pub fn record_is_elsewhere(&self) -> bool {
        self.setup.keeper != Keeper::Target
    }
}
