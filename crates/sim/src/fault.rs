//! What the storm does to the world.

use crate::{
    link::{Purpose, Side},
    planted::PlantedBug,
    setup::Keeper,
    source,
    spool::{File, Own},
    target::{Session, WritePolicy},
    watchdog::Watchdog,
    world::{Conditions, Timer, World, say},
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

/// One fault.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fault {
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
    /// The next page that arrives on the target, while nothing runs there, is damaged behind all that
    /// protects it on its way. Only in migrations that compare both sides' memory.
    Damage,
    /// The target's agent is told to end: it gives up what it may.
    GiveUp,
    /// The next act of a side that can fail does.
    Fail(Side),
    /// The source's QEMU refuses to let the guest run when the driver asks for that.
    Refuse,
    /// The target's host gives back what it kept of the VM.
    KeptVanishes,
    /// What it keeps is not what it was.
    KeptChanges,
    /// The user wants it to end.
    Cancel,
}

const SOURCE: Side = Side::Source;
const TARGET: Side = Side::Target;

const fn crash(side: Side, lucky: bool, again: Again) -> Fault {
    Fault::Crash { side, lucky, again }
}

/// All of them, and how they are written.
const WORDS: [(Fault, &str); 41] = [
    (crash(SOURCE, false, Again::Later), "crash-source"),
    (crash(SOURCE, false, Again::Soon), "crash-source-soon"),
    (crash(SOURCE, false, Again::Never), "crash-source-for-good"),
    (crash(SOURCE, true, Again::Later), "crash-source-lucky"),
    (crash(SOURCE, true, Again::Soon), "crash-source-lucky-soon"),
    (crash(TARGET, false, Again::Later), "crash-target"),
    (crash(TARGET, false, Again::Soon), "crash-target-soon"),
    (crash(TARGET, true, Again::Later), "crash-target-lucky"),
    (crash(TARGET, true, Again::Soon), "crash-target-lucky-soon"),
    (Fault::KillWatchdog, "kill-watchdog"),
    (Fault::Kill(SOURCE), "kill-source"),
    (Fault::Kill(TARGET), "kill-target"),
    (Fault::Reboot(SOURCE), "reboot-source"),
    (Fault::Reboot(TARGET), "reboot-target"),
    (Fault::Burn(SOURCE), "burn-source"),
    (Fault::Burn(TARGET), "burn-target"),
    (Fault::Cut(0), "cut-control"),
    (Fault::Cut(1), "cut-data"),
    (Fault::Cut(2), "cut-faults"),
    (Fault::Cut(3), "cut-record"),
    (Fault::CutAll, "cut-all"),
    (Fault::LinkDown, "link-down"),
    (Fault::RecordDown, "record-down"),
    (Fault::AnswerLost(SOURCE), "answer-lost-source"),
    (Fault::AnswerLost(TARGET), "answer-lost-target"),
    (Fault::ClaimTwice, "claim-twice"),
    (Fault::Restored, "restored"),
    (Fault::SpoolDown, "spool-down"),
    (Fault::SpoolSlow, "spool-slow"),
    (Fault::SpoolFails(SOURCE), "spool-fails-source"),
    (Fault::SpoolFails(TARGET), "spool-fails-target"),
    (Fault::SpoolRots, "spool-rots"),
    (Fault::BurnTorn, "burn-source-torn"),
    (Fault::Damage, "damage"),
    (Fault::GiveUp, "give-up"),
    (Fault::Fail(SOURCE), "fail-source"),
    (Fault::Fail(TARGET), "fail-target"),
    (Fault::Refuse, "refuse"),
    (Fault::Lose, "lose-data"),
    (Fault::KeptVanishes, "kept-vanishes"),
    (Fault::KeptChanges, "kept-changes"),
];

impl Fault {
    /// How many there are that befall every migration. What is drawn from these stays what it was whatever is
    /// added.
    pub(crate) const COMMON: u8 = WORDS.len() as u8 - 1;

    /// One of these, by its number.
    pub(crate) fn common(number: u8) -> Self {
        if number + 1 < Self::COMMON { Self::of(number) } else { Self::Cancel }
    }

    /// How many there are.
    pub const COUNT: u8 = WORDS.len() as u8 + 1;

    /// By its number.
    pub fn of(number: u8) -> Self {
        WORDS.get(usize::from(number)).map_or(Self::Cancel, |(fault, _)| *fault)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(WORDS.iter().find(|(fault, _)| fault == self).map_or("cancel", |(_, word)| word))
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let known = WORDS.iter().find(|(_, known)| *known == word).map(|(fault, _)| *fault);
        known
            .or((word == "cancel").then_some(Self::Cancel))
            .ok_or_else(|| format!("no fault is called {word}"))
    }
}

impl World {
    /// Whether it would change anything.
    pub fn can_strike(&self, fault: Fault) -> bool {
        match fault {
            Fault::Crash { side, lucky, .. } => {
                let unsynced = match side {
                    Side::Source => self.source.journal.is_unsynced(),
                    Side::Target => self.target.store.is_unsynced(),
                };
                self.up[side.at()] && (unsynced || !lucky)
            }
            Fault::KillWatchdog => self.watchdog != Watchdog::Ended,
            Fault::Kill(side) => self.qemus[side.at()].alive,
            Fault::Reboot(side) | Fault::Burn(side) => !self.burnt[side.at()] && self.up[side.at()],
            Fault::Cut(which) => self.cuttable(which).is_some(),
            Fault::Lose => self.cuttable(1).is_some(),
            Fault::CutAll => !self.conns.is_empty(),
            Fault::LinkDown => self.link,
            Fault::RecordDown => self.record_is_elsewhere() && self.record.up,
            Fault::AnswerLost(side) => self.record.answers[side.at()].is_some(),
            Fault::ClaimTwice => !self.record.asked.is_empty() && self.record.asked.len() < 3,
            Fault::Restored => {
                self.setup.keeper == Keeper::Etcd && !self.record.restored && self.record.owner.decided
            }
            Fault::SpoolDown | Fault::SpoolSlow => self.spool.file.is_some() && self.spool.up,
            Fault::SpoolFails(side) => self.spool.file.is_some() && !self.spool.fails[side.at()],
            Fault::SpoolRots => self.spool.can_rot(),
            Fault::BurnTorn => {
                let unsynced = |f: &File| usize::from(f.durable) < f.extents.len();
                !self.burnt[0] && self.up[0] && self.spool.file.as_ref().is_some_and(unsynced)
            }
            Fault::Damage => {
                let lands = |work: &Session| {
                    work.machine.is_some() && work.stage == WritePolicy::Before && !work.damages
                };
                self.setup.verify && self.target.work.as_deref().is_some_and(lands)
            }
            Fault::KeptVanishes | Fault::KeptChanges => {
                self.target.work.as_ref().is_some_and(|work| work.keeps())
            }
            Fault::GiveUp => self.target.work.as_ref().is_some_and(|work| work.machine.is_some()),
            Fault::Fail(Side::Source) => {
                self.source.work.as_ref().is_some_and(|work| work.machine.is_some() && !work.fails)
            }
            Fault::Fail(Side::Target) => {
                self.target.work.as_ref().is_some_and(|work| work.machine.is_some() && !work.fails)
            }
            Fault::Refuse => {
                let could = |work: &source::Work| work.stopped && work.machine.is_some() && !work.refuses;
                self.source.work.as_deref().is_some_and(could)
            }
            Fault::Cancel => self
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
                2 => conn.purpose == Purpose::Faults,
                _ => conn.purpose == Purpose::Record,
            };
            wanted && conn.open == [true; 2] && conn.over == [None; 2]
        })
    }

    /// It happens.
    pub fn strike(&mut self, fault: Fault) {
        say!(self, "!!! {fault}");
        self.idle = 0;
        self.faults.0 += 1;
        let cut = matches!(fault, Fault::Cut(_) | Fault::Lose | Fault::CutAll | Fault::LinkDown);
        let store =
            matches!(fault, Fault::SpoolDown | Fault::SpoolSlow | Fault::SpoolFails(_) | Fault::SpoolRots);
        let store = store || matches!(fault, Fault::KeptVanishes | Fault::KeptChanges);
        self.ghost.conditions = match self.ghost.conditions {
            Conditions::Fair if cut => Conditions::OneCut,
            Conditions::Fair | Conditions::Datastore if store => Conditions::Datastore,
            _ => Conditions::Storm,
        };
        match fault {
            Fault::Crash { side, lucky, again } => {
                self.crash(side, lucky);
                match (again, side) {
                    (Again::Later, _) => self.set(Timer::Restart(side)),
                    (Again::Soon, Side::Source) => self.restart_source(),
                    (Again::Soon, Side::Target) => self.restart_target(),
                    (Again::Never, _) => self.ghost.for_good = true,
                }
            }
            Fault::KillWatchdog => {
                self.watchdog = Watchdog::Ended;
                self.ghost.unwatched = true;
            }
            Fault::Kill(side) => self.kill(side),
            Fault::Reboot(side) => {
                self.power_off(side, false);
                self.set(Timer::Restart(side));
            }
            Fault::Burn(side) => {
                self.power_off(side, false);
                self.burnt[side.at()] = true;
                if side == TARGET {
                    self.set(Timer::Person);
                }
            }
            Fault::Cut(which) => {
                if let Some(i) = self.cuttable(which) {
                    self.conns[i].cut();
                }
            }
            Fault::Lose => {
                if let Some(i) = self.cuttable(1) {
                    self.conns[i].lose(SOURCE);
                }
            }
            Fault::CutAll => self.conns.iter_mut().for_each(|conn| conn.cut()),
            Fault::LinkDown => {
                self.link = false;
                self.conns.iter_mut().for_each(|conn| conn.cut());
                self.set(Timer::LinkUp);
            }
            Fault::RecordDown => {
                self.record.up = false;
                self.set(Timer::RecordUp);
            }
            Fault::AnswerLost(side) => self.record.answers[side.at()] = None,
            Fault::ClaimTwice => {
                let (side, claim, _) = self.record.asked[0];
                self.record.asked.push((side, claim, false));
            }
            Fault::Restored => {
                let record = &mut self.record;
                std::mem::swap(&mut record.owner, &mut record.before);
                record.restored = self.bug != Some(PlantedBug::BackupBelieved);
                self.conns.iter_mut().for_each(|conn| conn.cut());
                self.set(Timer::Person);
            }
            Fault::SpoolDown => {
                self.spool.up = false;
                self.set(Timer::SpoolUp);
            }
            Fault::SpoolSlow => {
                self.spool.up = false;
                self.set(Timer::SpoolBack);
            }
            Fault::SpoolFails(side) => self.spool.fails[side.at()] = true,
            Fault::SpoolRots => {
                self.spool.rot();
                self.ghost.rotten = true;
            }
            Fault::BurnTorn => {
                self.power_off(SOURCE, true);
                self.burnt[0] = true;
            }
            Fault::Damage => {
                if let Some(work) = self.target.work.as_deref_mut() {
                    work.damages = true;
                }
            }
            Fault::KeptVanishes | Fault::KeptChanges => self.kept_suffers(fault),
            Fault::GiveUp => self.target_gives_up(),
            Fault::Fail(Side::Source) => {
                if let Some(work) = self.source.work.as_deref_mut() {
                    work.fails = true;
                }
            }
            Fault::Fail(Side::Target) => {
                if let Some(work) = self.target.work.as_deref_mut() {
                    work.fails = true;
                }
            }
            Fault::Refuse => {
                if let Some(work) = self.source.work.as_deref_mut() {
                    work.refuses = true;
                }
            }
            Fault::Cancel => {
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
        for fault in (0..Fault::COUNT).map(Fault::of) {
            assert_eq!(fault.to_string().parse(), Ok(fault));
        }
        assert!("hail".parse::<Fault>().is_err());
    }
}
