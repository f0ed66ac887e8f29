//! Every turn at every step, and every second turn at every step thereafter.
//!
//! States that were seen before, with as many turns still to be taken, are not gone on from: what follows was
//! seen, too.

use crate::{
    planted::PlantedBug,
    schedule::{Course, ENDLESS, Schedule, Turn},
    setup::Setup,
    world::World,
};
use std::{
    collections::HashSet,
    hash::{BuildHasherDefault, Hash, Hasher},
};

/// What was done.
#[derive(Clone, Copy, Default, Debug)]
pub struct Counts {
    /// Runs that differ in at least one turn.
    pub schedules: u64,
    /// Of these, runs that came into a state from which another one had gone on.
    pub joined: u64,
    /// Different states.
    pub states: u64,
    /// Blows of the storm.
    pub faults: u64,
    /// Moves.
    pub moves: u64,
}

impl Counts {
    /// These and those.
    pub fn add(&mut self, other: Self) {
        self.schedules += other.schedules;
        self.joined += other.joined;
        self.states += other.states;
        self.faults += other.faults;
        self.moves += other.moves;
    }
}

/// The exploration of one setup.
pub struct Enumeration<'a> {
    setup: Setup,
    bug: Option<PlantedBug>,
    seen: HashSet<u64, BuildHasherDefault<Same>>,
    path: Vec<(u32, Turn)>,
    /// The turns that are tried.
    among: &'a [Turn],
    /// What was done.
    pub counts: Counts,
    /// The first run that broke a promise.
    pub found: Option<(Schedule, String)>,
}

impl<'a> Enumeration<'a> {
    /// All runs of this setup with up to `turns` turns, each one of `among`, until one breaks a promise.
    pub fn run(setup: Setup, bug: Option<PlantedBug>, turns: u32, among: &'a [Turn]) -> Self {
        let mut this = Self {
            setup,
            bug,
            seen: HashSet::default(),
            path: Vec::new(),
            among,
            counts: Counts::default(),
            found: None,
        };
        this.go(World::new(setup, bug), 0, turns);
        this.counts.states = this.seen.len() as u64;
        this
    }

    fn go(&mut self, mut world: World, from: u32, turns: u32) {
        let begun = world.steps.0;
        for at in from.. {
            if let Some(what) = world.breach.0.take() {
                return self.breach(what);
            }
            if !self.seen.insert(print(&world, turns)) {
                self.counts.joined += 1;
                break;
            }
            if turns > 0 {
                for turn in self.among.iter().copied().filter(|turn| world.can_take(*turn)) {
                    let mut other = world.clone();
                    other.take(turn);
                    self.counts.faults += u64::from(matches!(turn, Turn::Fault(_)));
                    self.path.push((at, turn));
                    self.go(other, at, turns - 1);
                    if self.found.is_some() {
                        return;
                    }
                    self.path.pop();
                }
            }
            if at > ENDLESS {
                return self.breach("it never ends".into());
            }
            if !world.step() {
                world.verdict();
                if let Some(what) = world.breach.0.take() {
                    return self.breach(what);
                }
                break;
            }
        }
        self.counts.schedules += 1;
        self.counts.moves += u64::from(world.steps.0 - begun);
    }

    fn breach(&mut self, what: String) {
        let course = Course::Enumerated(self.setup, self.path.clone());
        self.found = Some((Schedule { bug: self.bug, course }, what));
    }
}

/// What a state is told from others by.
fn print(world: &World, turns: u32) -> u64 {
    let mut hasher = Mixer(u64::from(turns));
    world.hash(&mut hasher);
    hasher.finish()
}

/// Multiplies and rotates, 64 bits at a time (after FxHash), with a last mixing: fast, and even enough for a
/// set of some million states. Two that collide only cost a look at one of them.
struct Mixer(u64);

impl Mixer {
    fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

impl Hasher for Mixer {
    fn finish(&self) -> u64 {
        crate::guest::mix(self.0)
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.add(u64::from_le_bytes(word) ^ (chunk.len() as u64) << 56);
        }
    }

    fn write_u8(&mut self, x: u8) {
        self.add(u64::from(x));
    }

    fn write_u16(&mut self, x: u16) {
        self.add(u64::from(x));
    }

    fn write_u32(&mut self, x: u32) {
        self.add(u64::from(x));
    }

    fn write_u64(&mut self, x: u64) {
        self.add(x);
    }

    fn write_usize(&mut self, x: usize) {
        self.add(x as u64);
    }
}

/// Prints are hashed already.
#[derive(Default)]
struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    }

    fn write_u64(&mut self, x: u64) {
        self.0 = x;
    }
}
