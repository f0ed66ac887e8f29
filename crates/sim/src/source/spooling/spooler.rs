//! The thread that writes the file. Mirrors `engine/spooler.rs`.

use super::{mark, secured};
use crate::{
    pages::{Pages, UNKNOWN},
    planted::PlantedBug,
    source::Work,
    world::{Timer, World, say},
};
use proto::SpoolSaid;
use std::collections::VecDeque;

/// The thread.
#[derive(Clone, Hash, Default, Debug)]
pub struct Spooler {
    /// What it is told, and in which turn.
    pub jobs: VecDeque<(u32, Task)>,
    /// What it does.
    pub now: Option<(u32, Doing)>,
    /// How much it said to be durable.
    pub told: u16,
    /// The target reads no further.
    pub over: bool,
    /// It has waited for too long.
    pub late: bool,
    /// The writer has failed for good.
    pub failed: bool,
}

/// What the thread is told.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Task {
    /// To take pages of the round from its end.
    Round,
    /// To put these into the file, until they are durable.
    Secure(Pages),
}

/// How far it is with that.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Doing {
    /// From this extent on; these are under way.
    Round(u16, VecDeque<(u16, u8)>),
    /// These are left; it is durable once this extent is.
    Secure(Pages, Option<u16>),
}

impl World {
    /// Whether the thread that writes the file can go on (`Worker`).
    pub fn spooler_can(&self) -> bool {
        let Some(work) = self.source.work.as_deref().filter(|_| self.up[0]) else { return false };
        let Some(spooler) = &work.spooling.spooler else { return false };
        let Some((turn, doing)) = &spooler.now else { return !spooler.jobs.is_empty() };
        let durable = self.durable();
        let trouble = spooler.failed || spooler.late || *turn != work.spooling.core.turn();
        if durable > spooler.told || trouble {
            return true;
        }
        match doing {
            Doing::Round(_, flights) => {
                let received =
                    flights.front().is_some_and(|(seq, _)| u64::from(*seq) < work.spooling.core.taken());
                let takes = self.takes_more(work, flights.len());
                let ended = flights.is_empty() && (work.left.none() || work.spooling.left);
                received || spooler.over || takes || ended
            }
            Doing::Secure(left, end) => {
                spooler.over
                    || (!left.none() && self.spool.up)
                    || (left.none() && end.is_none_or(|end| durable >= end))
            }
        }
    }

    fn takes_more(&self, work: &Work, flights: usize) -> bool {
        /// Pages that are under way at a time.
        const AHEAD: usize = 2;
        flights < AHEAD && self.spool.up && !work.spooling.left && !work.left.none()
    }

    /// What the writer calls durable.
    fn durable(&self) -> u16 {
        if self.has(PlantedBug::SpoolNotSynced) {
            return self.spool.appended();
        }
        self.spool.file.as_ref().map_or(0, |file| file.durable)
    }

    /// It does one thing.
    pub fn spooler_moves(&mut self) {
        let durable = self.durable();
        let appended = self.spool.appended();
        let keeps = self.has(PlantedBug::SpooledIsKnown);
        let more = self.source.work.as_deref().is_some_and(|work| {
            let now = work.spooling.spooler.as_ref().and_then(|spooler| spooler.now.as_ref());
            matches!(now, Some((_, Doing::Round(_, flights))) if self.takes_more(work, flights.len()))
        });
        let Some(work) = self.source.work.as_deref_mut() else { return };
        let (left, core) = (work.spooling.left, &work.spooling.core);
        let (given_turn, taken, secures) = (core.turn(), core.taken(), core.secures());
        let Some(spooler) = &mut work.spooling.spooler else { return };
        let Some((turn, doing)) = &mut spooler.now else {
            spooler.late = false;
            let Some((turn, task)) = spooler.jobs.pop_front() else { return };
            say!(self, "spooler: {task:?}");
            spooler.now = Some(match task {
                Task::Round => (turn, Doing::Round(appended, VecDeque::new())),
                Task::Secure(pages) => (turn, Doing::Secure(pages, None)),
            });
            return Timer::Stall.set_in(&mut self.timers);
        };
        let turn = *turn;
        let tell = |said| crate::source::Heard::Spool(turn, said);
        if durable > spooler.told {
            spooler.told = durable;
            let from = match doing {
                Doing::Round(from, _) => Some(u64::from(*from)),
                Doing::Secure(..) => None,
            };
            work.heard.push_back(tell(SpoolSaid::Durable(mark(durable), from)));
            return self.spool_moved_on();
        }
        let trouble = spooler.failed || spooler.late || spooler.over || turn != given_turn;
        match doing {
            Doing::Round(_, flights) => {
                if let Some((_, page)) = flights.front().copied().filter(|(seq, _)| u64::from(*seq) < taken) {
                    flights.pop_front();
                    if !left {
                        work.spooling.unsure.drop(page);
                    }
                    return self.spool_moved_on();
                }
                if trouble || !more {
                    say!(
                        self,
                        "spooler: the round is over{}",
                        if trouble { ", not as it should" } else { "" }
                    );
                    spooler.now = None;
                    let returned = work.spooling.unsure;
                    for page in returned.iter().filter(|_| !keeps && turn == given_turn) {
                        work.sent.0[usize::from(page)] = UNKNOWN;
                    }
                    let failed = trouble.then(|| "it is of no use".to_owned());
                    work.heard.push_back(tell(SpoolSaid::RoundOver(returned, failed)));
                    return self.call_off(Timer::Stall);
                }
                let Some(page) = work.left.highest() else { return };
                work.left.drop(page);
                work.spooling.unsure.add(page);
                let ram = &self.qemus[0].ram;
                let now = work.read_before.as_ref().map_or(ram.at(page), |read| read.at(page));
                if std::mem::replace(&mut work.sent.0[usize::from(page)], now.content) == now.content {
                    work.spooling.unsure.drop(page);
                    return;
                }
                flights.push_back((appended, page));
                self.append(page, now);
            }
            Doing::Secure(left, end) => {
                if let Some(page) = left.highest().filter(|_| !trouble && self.spool.up) {
                    left.drop(page);
                    let now = self.qemus[0].ram.at(page);
                    return self.append(page, now);
                }
                if left.none() && end.is_none() {
                    *end = Some(appended);
                    return;
                }
                let done = end.is_some_and(|end| durable >= end);
                if done || trouble {
                    spooler.now = None;
                    let failed = || SpoolSaid::Failed("it is of no use".to_owned());
                    work.heard.push_back(tell(if done { secured() } else { failed() }));
                    self.call_off(Timer::Stall);
                    if secures {
                        self.set(Timer::Stall);
                    }
                }
            }
        }
    }

    fn append(&mut self, page: u8, what: crate::pages::Page) {
        say!(self, "spooler: page {page} is {}", what.content);
        if let Some(file) = &mut self.spool.file {
            file.extents.push(crate::spool::Extent { page, what, whole: true });
        }
        self.spool_moved_on();
    }
}
