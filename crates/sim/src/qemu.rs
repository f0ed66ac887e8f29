//! A QEMU process: vCPUs, memory, the kernel's watch over it, and its disk's lock.

use crate::{
    outside::{Meddle, News},
    pages::{Pages, Ram},
};

/// QEMU's run state, as far as it makes a difference here.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum Run {
    /// Nothing has run yet, or it was reset while it stood still.
    #[default]
    Prelaunch,
    /// Its vCPUs run.
    Running,
    /// Somebody has stopped it.
    Paused,
    /// The guest sleeps (S3).
    Suspended,
    /// The guest has switched itself off, and QEMU is to stay (`-no-shutdown`).
    Shutdown,
    /// The guest has panicked.
    Panicked,
    /// QEMU's own migration has taken it away.
    Postmigrate,
}

impl Run {
    /// Whether `cont` alone lets it run.
    pub fn stands_still(self) -> bool {
        matches!(self, Self::Prelaunch | Self::Paused)
    }

    /// Whether a person would say that they are the same.
    pub fn like(self, other: Self) -> bool {
        self == other || (self.stands_still() && other.stands_still())
    }
}

/// What the guest did before our `stop`, as far as it can be carried over.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum Was {
    /// It ran.
    #[default]
    Ran,
    /// Somebody had paused it.
    Stood,
}

/// A migration that QEMU was asked for by somebody else.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum Theirs {
    /// There is none, or it failed.
    #[default]
    None,
    /// It gets on.
    Active,
    /// The VM is somewhere else.
    Finished,
}

/// The process on one host.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Qemu {
    /// Whether the process is there.
    pub alive: bool,
    /// Its run state.
    pub run: Run,
    /// It is stopped as a process (`SIGSTOP`): nothing of it does anything.
    pub frozen: bool,
    /// It was let go by a signal since.
    pub woken: bool,
    /// No signal lets it go: the agent traces it.
    pub held: bool,
    /// What its monitor was asked for meanwhile.
    pub queued: Option<Meddle>,
    /// Which of its devices and media are not as they were when the migration began.
    pub config: u8,
    /// A migration of QEMU's own.
    pub theirs: Theirs,
    /// What its events have told since our `stop`.
    pub told: News,
    /// A waiting one was let run, or left standing still as the source's guest was.
    pub started: bool,
    /// The guest's memory. Outlives the process for as long as an agent has it open.
    pub ram: Ram,
    /// What its vCPUs' registers are; none before a device state was loaded.
    pub state: Option<u16>,
    /// Write protection is on, and these pages were written since.
    pub tracked: Option<Pages>,
    /// Holes are faults, not zeros (`userfaultfd` in missing mode, held by QEMU too).
    pub watched: bool,
    /// The page that a vCPU, or the loading of a device state, waits for.
    pub waits_for: Option<u8>,
    /// Whether it holds its disk's lock.
    pub has_disk: bool,
}

impl Qemu {
    /// A running one.
    pub fn running(ram: Ram) -> Self {
        Self {
            alive: true,
            run: Run::Running,
            started: true,
            ram,
            state: Some(0),
            has_disk: true,
            ..Self::default()
        }
    }

    /// One that waits for a device state (`-S -incoming defer`).
    pub fn waiting() -> Self {
        Self { alive: true, ..Self::default() }
    }

    /// Whether its vCPUs run.
    pub fn runs(&self) -> bool {
        self.run == Run::Running
    }

    /// The process ends. Its memory stays as long as somebody has it open.
    pub fn die(&mut self) {
        *self = Self { ram: self.ram.clone(), ..Self::default() };
    }

    /// Whether the page can be touched; if not, whoever touches it waits.
    pub fn can_touch(&mut self, page: u8) -> bool {
        let there = !self.watched || self.ram.present.has(page);
        self.waits_for = (!there).then_some(page);
        there
    }

    /// Puts a page where a hole is, and lets go on whoever waits for it. Says whether there was a hole (I5).
    pub fn place(&mut self, page: u8, what: crate::pages::Page) -> bool {
        if self.waits_for == Some(page) {
            self.waits_for = None;
        }
        let hole = !self.ram.present.has(page);
        if hole {
            self.ram.put(page, what);
        }
        hole
    }
}
