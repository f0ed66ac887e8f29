//! A QEMU process: vCPUs, memory, the kernel's watch over it, and its disk's lock.

use crate::pages::{Pages, Ram};

/// The process on one host.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Qemu {
    /// Whether the process is there.
    pub alive: bool,
    /// Whether its vCPUs run.
    pub runs: bool,
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
    /// No process.
    pub fn none() -> Self {
        Self {
            alive: false,
            runs: false,
            ram: Ram::empty(),
            state: None,
            tracked: None,
            watched: false,
            waits_for: None,
            has_disk: false,
        }
    }

    /// A running one.
    pub fn running(ram: Ram) -> Self {
        Self { alive: true, runs: true, ram, state: Some(0), has_disk: true, ..Self::none() }
    }

    /// One that waits for a device state (`-S -incoming defer`).
    pub fn waiting() -> Self {
        Self { alive: true, ..Self::none() }
    }

    /// The process ends. Its memory stays as long as somebody has it open.
    pub fn die(&mut self) {
        *self = Self { ram: self.ram.clone(), ..Self::none() };
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
