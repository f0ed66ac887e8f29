//! What the storm does to the world.

use crate::{
    fault::Fault,
    link::{Purpose, Side},
    setup::Keeper,
    source,
    spool::{File, Own},
    target::{Session, Stage},
    watchdog::Watchdog,
    world::{Timer, Weather, World, say},
};
use std::{fmt, str::FromStr};

/// When an agent that was killed is started again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Again {
    /// After a while.
    Later,
    /// Before anybody else moves.
    Soon,
    /// Never.
    Never,
}

/// One blow.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Blow {
    /// `kill -9` of an agent. `lucky`: what it had written, but not synced, is on the disk all the same.
    Crash {
        /// Whose.
        side: Side,
        /// What becomes of what was not synced.
        lucky: bool,
        /// When it is started again.
        again: Again,
    },
    /// The process that watches over the source's pause is killed.
    KillWatchdog,
    /// A QEMU dies.
    Kill(Side),
    /// A host loses power and comes back.
    Reboot(Side),
    /// A host is gone for good.
    Burn(Side),
    /// A connection breaks, with all that is on its way: control, the first data connection, the one for
    /// faults, or the one on which the record is asked.
    Cut(u8),
    /// The source takes the first data connection for lost; what it has sent there still arrives.
    Lose,
    /// All of them do.
    CutAll,
    /// … and no new ones can be made for a while.
    LinkDown,
    /// The record elsewhere cannot be reached for a while.
    RecordDown,
    /// Its answer to a side is lost.
    AnswerLost(Side),
    /// A claim reaches it twice.
    ClaimTwice,
    /// It is restored from an old backup, in an outage in which all connections break.
    Restored,
    /// The datastore stalls for a while.
    SpoolDown,
    /// … and is back before anybody gives it up.
    SpoolSlow,
    /// The next operation of a side on it fails.
    SpoolFails(Side),
    /// Of a page that is there several times the last version is damaged; or what was written last.
    SpoolRots,
    /// The source's host is gone for good in the middle of writing to it: some of what was not durable is
    /// there, some is torn.
    BurnTorn,
    /// The next page that lands on the target, while nothing runs there, is damaged behind all that protects
    /// it on its way. Only in migrations that compare both sides' memory.
    Damage,
    /// The target's agent is told to end: it gives up what it may.
    GiveUp,
    /// The next act of a side that can fail does.
    Fail(Side),
    /// The source's QEMU refuses to let the guest run when the driver asks for that.
    Refuse,
    /// The user wants it to end.
    Cancel,
}

const SOURCE: Side = Side::Source;
const TARGET: Side = Side::Target;

const fn crash(side: Side, lucky: bool, again: Again) -> Blow {
    Blow::Crash { side, lucky, again }
}

/// All of them, and how they are written.
const WORDS: [(Blow, &str); 39] = [
    (crash(SOURCE, false, Again::Later), "crash-source"),
    (crash(SOURCE, false, Again::Soon), "crash-source-soon"),
    (crash(SOURCE, false, Again::Never), "crash-source-for-good"),
    (crash(SOURCE, true, Again::Later), "crash-source-lucky"),
    (crash(SOURCE, true, Again::Soon), "crash-source-lucky-soon"),
    (crash(TARGET, false, Again::Later), "crash-target"),
    (crash(TARGET, false, Again::Soon), "crash-target-soon"),
    (crash(TARGET, true, Again::Later), "crash-target-lucky"),
    (crash(TARGET, true, Again::Soon), "crash-target-lucky-soon"),
    (Blow::KillWatchdog, "kill-watchdog"),
    (Blow::Kill(SOURCE), "kill-source"),
    (Blow::Kill(TARGET), "kill-target"),
    (Blow::Reboot(SOURCE), "reboot-source"),
    (Blow::Reboot(TARGET), "reboot-target"),
    (Blow::Burn(SOURCE), "burn-source"),
    (Blow::Burn(TARGET), "burn-target"),
    (Blow::Cut(0), "cut-control"),
    (Blow::Cut(1), "cut-data"),
    (Blow::Cut(2), "cut-faults"),
    (Blow::Cut(3), "cut-record"),
    (Blow::CutAll, "cut-all"),
    (Blow::LinkDown, "link-down"),
    (Blow::RecordDown, "record-down"),
    (Blow::AnswerLost(SOURCE), "answer-lost-source"),
    (Blow::AnswerLost(TARGET), "answer-lost-target"),
    (Blow::ClaimTwice, "claim-twice"),
    (Blow::Restored, "restored"),
    (Blow::SpoolDown, "spool-down"),
    (Blow::SpoolSlow, "spool-slow"),
    (Blow::SpoolFails(SOURCE), "spool-fails-source"),
    (Blow::SpoolFails(TARGET), "spool-fails-target"),
    (Blow::SpoolRots, "spool-rots"),
    (Blow::BurnTorn, "burn-source-torn"),
    (Blow::Damage, "damage"),
    (Blow::GiveUp, "give-up"),
    (Blow::Fail(SOURCE), "fail-source"),
    (Blow::Fail(TARGET), "fail-target"),
    (Blow::Refuse, "refuse"),
    (Blow::Lose, "lose-data"),
];

impl Blow {
    /// How many there are.
    pub const COUNT: u8 = WORDS.len() as u8 + 1;

    /// By its number.
    pub fn of(number: u8) -> Self {
        WORDS.get(usize::from(number)).map_or(Self::Cancel, |(blow, _)| *blow)
    }
}

impl fmt::Display for Blow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(WORDS.iter().find(|(blow, _)| blow == self).map_or("cancel", |(_, word)| word))
    }
}

impl FromStr for Blow {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let known = WORDS.iter().find(|(_, known)| *known == word).map(|(blow, _)| *blow);
        known
            .or((word == "cancel").then_some(Self::Cancel))
            .ok_or_else(|| format!("no blow is called {word}"))
    }
}

impl World {
    /// Whether it would change anything.
    pub fn can_strike(&self, blow: Blow) -> bool {
        match blow {
            Blow::Crash { side, lucky, .. } => {
                let unsynced = match side {
                    Side::Source => self.source.journal.is_unsynced(),
                    Side::Target => self.target.store.is_unsynced(),
                };
                self.up[side.at()] && (unsynced || !lucky)
            }
            Blow::KillWatchdog => self.watchdog != Watchdog::Ended,
            Blow::Kill(side) => self.qemus[side.at()].alive,
            Blow::Reboot(side) | Blow::Burn(side) => !self.burnt[side.at()] && self.up[side.at()],
            Blow::Cut(which) => self.cuttable(which).is_some(),
            Blow::Lose => self.cuttable(1).is_some(),
            Blow::CutAll => !self.conns.is_empty(),
            Blow::LinkDown => self.link,
            Blow::RecordDown => self.record_is_elsewhere() && self.record.up,
            Blow::AnswerLost(side) => self.record.answers[side.at()].is_some(),
            Blow::ClaimTwice => !self.record.asked.is_empty() && self.record.asked.len() < 3,
            Blow::Restored => {
                self.setup.keeper == Keeper::Etcd && !self.record.restored && self.record.owner.decided
            }
            Blow::SpoolDown | Blow::SpoolSlow => self.spool.file.is_some() && self.spool.up,
            Blow::SpoolFails(side) => self.spool.file.is_some() && !self.spool.fails[side.at()],
            Blow::SpoolRots => self.spool.can_rot(),
            Blow::BurnTorn => {
                let unsynced = |f: &File| usize::from(f.durable) < f.extents.len();
                !self.burnt[0] && self.up[0] && self.spool.file.as_ref().is_some_and(unsynced)
            }
            Blow::Damage => {
                let lands =
                    |work: &Session| work.machine.is_some() && work.stage == Stage::Before && !work.damages;
                self.setup.verify && self.target.work.as_deref().is_some_and(lands)
            }
            Blow::GiveUp => self.target.work.as_ref().is_some_and(|work| work.machine.is_some()),
            Blow::Fail(Side::Source) => {
                self.source.work.as_ref().is_some_and(|work| work.machine.is_some() && !work.fails)
            }
            Blow::Fail(Side::Target) => {
                self.target.work.as_ref().is_some_and(|work| work.machine.is_some() && !work.fails)
            }
            Blow::Refuse => {
                let could = |work: &source::Work| work.stopped && work.machine.is_some() && !work.refuses;
                self.source.work.as_deref().is_some_and(could)
            }
            Blow::Cancel => self
                .source
                .work
                .as_ref()
                .is_some_and(|work| work.machine.as_ref().is_some_and(|machine| machine.cancellable())),
        }
    }

    fn cuttable(&self, which: u8) -> Option<usize> {
        self.conns.iter().position(|conn| {
            let wanted = match which {
                0 => matches!(conn.purpose, Purpose::Control | Purpose::Resume),
                1 => conn.purpose == Purpose::Data(0),
                2 => conn.purpose == Purpose::Fault,
                _ => conn.purpose == Purpose::Record,
            };
            wanted && conn.open == [true; 2] && conn.over == [None; 2]
        })
    }

    /// It happens.
    pub fn strike(&mut self, blow: Blow) {
        say!(self, "!!! {blow}");
        self.idle = 0;
        self.blows.0 += 1;
        let cut = matches!(blow, Blow::Cut(_) | Blow::Lose | Blow::CutAll | Blow::LinkDown);
        let store = matches!(blow, Blow::SpoolDown | Blow::SpoolSlow | Blow::SpoolFails(_) | Blow::SpoolRots);
        self.ghost.weather = match self.ghost.weather {
            Weather::Fair if cut => Weather::OneCut,
            Weather::Fair | Weather::Datastore if store => Weather::Datastore,
            _ => Weather::Storm,
        };
        match blow {
            Blow::Crash { side, lucky, again } => {
                self.crash(side, lucky);
                match (again, side) {
                    (Again::Later, _) => self.set(Timer::Restart(side)),
                    (Again::Soon, Side::Source) => self.restart_source(),
                    (Again::Soon, Side::Target) => self.restart_target(),
                    (Again::Never, _) => self.ghost.for_good = true,
                }
            }
            Blow::KillWatchdog => {
                self.watchdog = Watchdog::Ended;
                self.ghost.unwatched = true;
            }
            Blow::Kill(side) => self.kill(side),
            Blow::Reboot(side) => {
                self.power_off(side, false);
                self.set(Timer::Restart(side));
            }
            Blow::Burn(side) => {
                self.power_off(side, false);
                self.burnt[side.at()] = true;
                if side == TARGET {
                    self.set(Timer::Person);
                }
            }
            Blow::Cut(which) => {
                if let Some(i) = self.cuttable(which) {
                    self.conns[i].cut();
                }
            }
            Blow::Lose => {
                if let Some(i) = self.cuttable(1) {
                    self.conns[i].lose(SOURCE);
                }
            }
            Blow::CutAll => self.conns.iter_mut().for_each(|conn| conn.cut()),
            Blow::LinkDown => {
                self.link = false;
                self.conns.iter_mut().for_each(|conn| conn.cut());
                self.set(Timer::LinkUp);
            }
            Blow::RecordDown => {
                self.record.up = false;
                self.set(Timer::RecordUp);
            }
            Blow::AnswerLost(side) => self.record.answers[side.at()] = None,
            Blow::ClaimTwice => {
                let (side, claim, _) = self.record.asked[0];
                self.record.asked.push((side, claim, false));
            }
            Blow::Restored => {
                let record = &mut self.record;
                std::mem::swap(&mut record.owner, &mut record.before);
                record.restored = self.fault != Some(Fault::BackupBelieved);
                self.conns.iter_mut().for_each(|conn| conn.cut());
                self.set(Timer::Person);
            }
            Blow::SpoolDown => {
                self.spool.up = false;
                self.set(Timer::SpoolUp);
            }
            Blow::SpoolSlow => {
                self.spool.up = false;
                self.set(Timer::SpoolBack);
            }
            Blow::SpoolFails(side) => self.spool.fails[side.at()] = true,
            Blow::SpoolRots => {
                self.spool.rot();
                self.ghost.rotten = true;
            }
            Blow::BurnTorn => {
                self.power_off(SOURCE, true);
                self.burnt[0] = true;
            }
            Blow::Damage => {
                if let Some(work) = self.target.work.as_deref_mut() {
                    work.damages = true;
                }
            }
            Blow::GiveUp => self.target_gives_up(),
            Blow::Fail(Side::Source) => {
                if let Some(work) = self.source.work.as_deref_mut() {
                    work.fails = true;
                }
            }
            Blow::Fail(Side::Target) => {
                if let Some(work) = self.target.work.as_deref_mut() {
                    work.fails = true;
                }
            }
            Blow::Refuse => {
                if let Some(work) = self.source.work.as_deref_mut() {
                    work.refuses = true;
                }
            }
            Blow::Cancel => {
                if let Some(work) = self.source.work.as_deref_mut() {
                    work.heard.push_back(source::Heard::Cancel);
                }
            }
        }
        self.check();
    }

    /// An agent dies; the kernel closes what it had open.
    fn crash(&mut self, side: Side, lucky: bool) {
        self.up[side.at()] = false;
        for conn in &mut self.conns {
            conn.shut(side);
        }
        for (from, _, waited) in &mut self.record.asked {
            *waited &= *from != side;
        }
        self.record.answers[side.at()] = None;
        self.spool.doomed[side.at()] = false;
        if self.spool.file.is_some() {
            self.set(Timer::Janitor);
        }
        for timer in [Timer::Again(side), Timer::Patience(side), Timer::Lazy(side), Timer::GiveUp(side)] {
            self.call_off(timer);
        }
        match side {
            Side::Source => {
                for timer in [Timer::Doubt, Timer::CallAgain, Timer::CallEnd, Timer::Stall] {
                    self.call_off(timer);
                }
                self.source.work = None;
                self.source.call = None;
                self.spool.own_doomed[0] = false;
                self.watchdog_is_alone();
                self.source.journal.crash(lucky);
                self.state_is_not_recorded();
                self.ghost.orphan[0] |=
                    self.qemus[0].alive && *self.source.journal.durable() == source::Departure::Settled;
                // The watch over writes dies with its descriptor: fail open. So does the tracer.
                self.qemus[0].tracked = None;
                self.qemus[0].held = false;
            }
            Side::Target => {
                self.call_off(Timer::Closed);
                self.call_off(Timer::Missed);
                self.target.work = None;
                self.spool.own_doomed[1] = false;
                if self.spool.own == Some(Own::Asked) {
                    self.spool.own = Some(Own::Made);
                }
                self.target.serving.clear();
                if lucky {
                    self.target_synced();
                }
                self.target.store.crash(false);
                let store = self.target.store.durable();
                self.ghost.orphan[1] |=
                    self.qemus[1].alive && !self.qemus[1].runs() && !store.arrived && store.arrival.is_none();
                // A fault that was heard of is heard of again: the watch is QEMU's too. Fail stop.
            }
        }
    }

    pub(crate) fn kill(&mut self, side: Side) {
        if self.qemus[side.at()].alive {
            self.ghost.killed[side.at()] = true;
            self.ghost.killed_before_commit |= !self.ghost.committed;
        }
        self.qemus[side.at()].die();
    }

    fn power_off(&mut self, side: Side, torn: bool) {
        self.crash(side, false);
        self.conns.iter_mut().for_each(|conn| conn.cut());
        self.kill(side);
        if side == SOURCE {
            self.spool.lose_cache(torn);
            self.watchdog = Watchdog::Ended;
        }
    }

    /// The source's agent is started again.
    pub fn restart_source(&mut self) {
        if !self.burnt[0] {
            say!(self, "source: the agent starts");
            self.up[0] = true;
            self.take_up();
            self.janitor(SOURCE);
        }
    }

    /// The target's is.
    pub fn restart_target(&mut self) {
        if !self.burnt[1] {
            say!(self, "target: the agent starts");
            self.up[1] = true;
            self.target_takes_up();
            self.janitor(TARGET);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blow_is_read_as_it_is_written() {
        for blow in (0..Blow::COUNT).map(Blow::of) {
            assert_eq!(blow.to_string().parse(), Ok(blow));
        }
        assert!("hail".parse::<Blow>().is_err());
    }
}
