//! Sets of pages, and what pages hold.

use std::hash::{Hash, Hasher};

/// Pages that a simulated guest has at most: one machine word of them, so that sets cost nothing.
pub(crate) const MOST: usize = 64;

/// A set of pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Pages(pub u64);

impl Pages {
    /// The first `n` pages.
    pub fn first(n: u8) -> Self {
        Self(u64::MAX.checked_shr(64 - u32::from(n)).unwrap_or(0))
    }

    /// Whether the page is one of them.
    pub fn has(self, page: u8) -> bool {
        self.0 >> page & 1 == 1
    }

    /// Adds a page.
    pub fn add(&mut self, page: u8) {
        self.0 |= 1 << page;
    }

    /// Takes a page out.
    pub fn drop(&mut self, page: u8) {
        self.0 &= !(1 << page);
    }

    /// These or those.
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// These but not those.
    pub fn less(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether there is none.
    pub fn none(self) -> bool {
        self.0 == 0
    }

    /// The lowest.
    pub fn lowest(self) -> Option<u8> {
        (self.0 != 0).then(|| self.0.trailing_zeros() as u8)
    }

    /// The highest.
    pub fn highest(self) -> Option<u8> {
        (self.0 != 0).then(|| 63 - self.0.leading_zeros() as u8)
    }

    /// The lowest from `page` on, or else the lowest of all.
    pub fn from(self, page: u8) -> Option<u8> {
        Self(self.0 & u64::MAX << page).lowest().or(self.lowest())
    }

    /// All of them, in order.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        let mut left = self;
        std::iter::from_fn(move || {
            let page = left.lowest()?;
            left.drop(page);
            Some(page)
        })
    }
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// No page's content: nobody knows what it is.
pub(crate) const UNKNOWN: u16 = u16::MAX;

/// What a page holds, and, for the oracle alone, when the guest wrote that.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Page {
    /// Its content; 0: all zeros.
    pub content: u16,
    /// The number of the guest's write; no part of the real thing may look at it.
    pub written: u16,
}

/// The content of each page, as far as somebody knows it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Contents(pub [u16; MOST]);

impl Default for Contents {
    fn default() -> Self {
        Self([0; MOST])
    }
}

/// What each page holds.
#[derive(Clone, PartialEq, Eq)]
pub struct Table(pub [Page; MOST]);

impl Default for Table {
    fn default() -> Self {
        Self([Page::default(); MOST])
    }
}

impl Table {
    /// What the page holds.
    pub fn at(&self, page: u8) -> Page {
        self.0[usize::from(page)]
    }

    /// Writes a page.
    pub fn put(&mut self, page: u8, what: Page) {
        self.0[usize::from(page)] = what;
    }
}

/// Most worlds have few pages: only those that were ever written count.
impl Hash for Table {
    fn hash<H: Hasher>(&self, to: &mut H) {
        for (i, page) in self.0.iter().enumerate().filter(|(_, page)| **page != Page::default()) {
            to.write_u64((i as u64) << 32 | u64::from(page.content) << 16 | u64::from(page.written));
        }
    }
}

/// A guest's memory: pages, or holes.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Ram {
    /// What is in them; holes are zeros.
    pub pages: Table,
    /// Which are no holes.
    pub present: Pages,
}

impl Ram {
    /// What the page holds.
    pub fn at(&self, page: u8) -> Page {
        self.pages.at(page)
    }

    /// Writes a page.
    pub fn put(&mut self, page: u8, what: Page) {
        self.pages.put(page, what);
        self.present.add(page);
    }

    /// Makes a hole.
    pub fn punch(&mut self, page: u8) {
        self.pages.put(page, Page::default());
        self.present.drop(page);
    }
}
