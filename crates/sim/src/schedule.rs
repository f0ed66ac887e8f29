//! A run that can be had again: what is simulated, and what happens when.

use crate::{
    fault::Fault,
    outside::Outside,
    planted::PlantedBug,
    random,
    setup::Setup,
    world::{Conditions, World},
};
use std::{fmt, str::FromStr};

/// A run that moves so often without an end goes round in circles.
pub(crate) const ENDLESS: u32 = 30_000;

/// A departure from the usual order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// Whoever is next does not move until nobody else can.
    Sleep,
    /// Time passes, although somebody could move: everybody is slow.
    Time,
    /// The storm strikes.
    Fault(Fault),
    /// Somebody else acts on the VM.
    Others(Outside),
}

impl Turn {
    /// All of them, as long as nobody else acts on the VM.
    pub fn all() -> impl Iterator<Item = Self> {
        let faults = (0..Fault::COUNT).map(|number| Self::Fault(Fault::of(number)));
        [Self::Sleep, Self::Time].into_iter().chain(faults)
    }

    /// All that others do.
    pub fn others() -> impl Iterator<Item = Self> {
        Outside::all().map(Self::Others)
    }
}

/// A whole run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Schedule {
    /// What is done wrongly on purpose.
    pub bug: Option<PlantedBug>,
    /// How it goes.
    pub course: Course,
}

/// How a run goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Course {
    /// In the usual order but for these turns, each before the step of its number.
    Enumerated(Setup, Vec<(u32, Turn)>),
    /// As chance will have it.
    Random(u64),
}

impl Schedule {
    /// Runs it, with a trace. The world at the end says whether a promise was broken.
    pub fn replay(&self) -> World {
        match &self.course {
            Course::Random(seed) => random::run(*seed, self.bug, true),
            Course::Enumerated(setup, turns) => {
                let mut world = World::new(*setup, self.bug);
                world.trace.0 = Some(Vec::new());
                run_out(&mut world, 0, turns);
                world
            }
        }
    }
}

/// Runs a world to its end, from this step on, with these turns on the way.
fn run_out(world: &mut World, from: u32, turns: &[(u32, Turn)]) {
    let mut turns = turns.iter().filter(|(at, _)| *at >= from).peekable();
    for at in from.. {
        while let Some((_, turn)) = turns.next_if(|(when, _)| *when == at) {
            world.take(*turn);
        }
        if world.breach.0.is_some() {
            return;
        }
        if at - from > ENDLESS {
            return world.breach(|| "it never ends".into());
        }
        if !world.step() {
            break;
        }
    }
    world.verdict();
}

impl World {
    /// Whether this turn would make a difference now.
    pub fn can_take(&self, turn: Turn) -> bool {
        match turn {
            Turn::Sleep => (self.movers() & !self.asleep).count_ones() > 1,
            Turn::Time => !self.timers.is_empty() && self.movers() != 0,
            Turn::Fault(fault) => self.can_strike(fault),
            Turn::Others(outside) => self.can_meddle(outside),
        }
    }

    /// Takes it.
    pub fn take(&mut self, turn: Turn) {
        match turn {
            Turn::Sleep => {
                let awake = self.movers() & !self.asleep;
                let later = awake & u64::MAX << self.turn;
                let next = if later == 0 { awake } else { later };
                self.asleep |= next & next.wrapping_neg();
            }
            Turn::Time => {
                self.ghost.conditions = Conditions::Storm;
                self.pass_time();
                self.check();
            }
            Turn::Fault(fault) => self.strike(fault),
            Turn::Others(outside) => self.meddle(outside),
        }
    }
}

impl fmt::Display for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sleep => f.write_str("sleep"),
            Self::Time => f.write_str("time"),
            Self::Fault(fault) => fault.fmt(f),
            Self::Others(outside) => outside.fmt(f),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.course {
            Course::Enumerated(setup, _) => setup.fmt(f)?,
            Course::Random(seed) => write!(f, "random-{seed}")?,
        }
        if let Some(bug) = self.bug {
            write!(f, "+{}", bug.word())?;
        }
        if let Course::Enumerated(_, turns) = &self.course {
            for (at, turn) in turns {
                write!(f, "@{at}:{turn}")?;
            }
        }
        Ok(())
    }
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split('@');
        let head = parts.next().unwrap_or_default();
        let (head, bug) = match head.split_once('+') {
            Some((head, bug)) => (head, Some(bug.parse()?)),
            None => (head, None),
        };
        if let Some(seed) = head.strip_prefix("random-") {
            let seed = seed.parse().map_err(|e| format!("{seed}: {e}"))?;
            return Ok(Self { bug, course: Course::Random(seed) });
        }
        let turns = parts.map(|part| {
            let (at, turn) = part.split_once(':').ok_or_else(|| format!("{part} is not STEP:WHAT"))?;
            let at = at.parse().map_err(|e| format!("{at}: {e}"))?;
            let turn = match turn {
                "sleep" => Turn::Sleep,
                "time" => Turn::Time,
                word => match word.parse() {
                    Ok(fault) => Turn::Fault(fault),
                    Err(_) => Turn::Others(word.parse()?),
                },
            };
            Ok((at, turn))
        });
        let turns = turns.collect::<Result<Vec<_>, String>>()?;
        Ok(Self { bug, course: Course::Enumerated(head.parse()?, turns) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setup::{Keeper, Spooling, Way};

    #[test]
    fn a_schedule_is_read_as_it_is_written() {
        let setup = Setup::small(Way::PostCopy, Keeper::File, Spooling::Relaxed);
        let turns = vec![(3, Turn::Sleep), (9, Turn::Time), (9, Turn::Fault(Fault::of(3)))];
        let bug = Some(PlantedBug::NoBarrier);
        for course in [Course::Enumerated(setup, turns), Course::Random(77)] {
            let schedule = Schedule { bug, course };
            assert_eq!(schedule.to_string().parse(), Ok(schedule));
        }
        assert!("random-x".parse::<Schedule>().is_err());
        assert!("post-held-bare-1-3-1-1-5@3".parse::<Schedule>().is_err());
    }
}
