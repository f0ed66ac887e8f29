//! The model guest, and the oracle: what it wrote, wherever it ran.

use crate::pages::{Page, Ram, Table};

/// What the guest does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Deed {
    /// Reads a page and checks it.
    Read(u8),
    /// Writes something new.
    Write(u8),
    /// Copies a page to another, so that contents repeat.
    Copy(u8, u8),
    /// Writes a page full of zeros.
    Clear(u8),
}

/// The guest as it sees itself: its own clock and memory. The oracle compares every QEMU's with this.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Guest {
    /// What it wrote last.
    pub truth: Table,
    /// How often it wrote.
    pub writes: u16,
    /// How much it has done: what its vCPUs' registers are.
    pub done: u16,
    /// How much it may still do before it rests.
    pub rest: u16,
}

/// Spreads a number's bits all over (the finalizer of splitmix64).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

impl Guest {
    /// A guest that has written all its pages but every fifth, and does `rest` deeds before it rests.
    pub fn new(pages: u8, rest: u16) -> (Self, Ram) {
        let mut guest = Self { truth: Table::default(), writes: 0, done: 0, rest };
        let mut ram = Ram::default();
        for page in (0..pages).filter(|page| page % 5 != 4) {
            ram.put(page, guest.write(page));
        }
        (guest, ram)
    }

    /// It has something to do again: in each phase of a migration, so that no phase finds it at rest.
    pub fn wake(&mut self, busy: u16) {
        self.rest = self.rest.max(busy);
    }

    /// What it does as its deed of this number.
    pub fn deed(&self, seed: u16, pages: u8) -> Deed {
        let chance = mix((u64::from(seed) << 32) | (u64::from(self.done) + 1));
        let (page, other) = ((chance >> 8) % u64::from(pages), (chance >> 24) % u64::from(pages));
        let (page, other) = (page as u8, other as u8);
        match chance % 8 {
            0 | 1 => Deed::Read(page),
            2 if page != other => Deed::Copy(page, other),
            3 => Deed::Clear(page),
            _ => Deed::Write(page),
        }
    }

    /// Something new is in the page.
    pub fn write(&mut self, page: u8) -> Page {
        // Different from all others, and never zero.
        self.put(page, self.writes + 1)
    }

    /// This content is in the page.
    pub fn put(&mut self, page: u8, content: u16) -> Page {
        self.writes += 1;
        let page_now = Page { content, written: self.writes };
        self.truth.put(page, page_now);
        page_now
    }
}
