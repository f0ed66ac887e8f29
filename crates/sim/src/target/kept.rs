//! What the target keeps of the VM from before. Mirrors `engine/kept.rs`, a page a message, and what
//! `engine/receive.rs` and `host/copies.rs` do with it.

use super::{Heard, Session};
use crate::{
    fault::Fault,
    link::{Over, Side},
    pages::{Contents, Page, Pages},
    planted::PlantedBug,
    world::{World, say},
};
use proto::control::{self, Kind};

/// What the guest has done to a page since it left.
const OTHER: u16 = 0x2000;

/// What becomes of a page that changes while it is kept.
const CHANGED: u16 = 0x1000;

impl Session {
    /// Whether anything is kept.
    pub(crate) fn keeps(&self) -> bool {
        self.kept != Contents::default()
    }
}

impl World {
    /// The VM was here before: every second page is as it was then.
    pub(super) fn find_kept(&mut self) {
        let ram = &self.qemus[0].ram;
        if let Some(work) = self.target.work.as_deref_mut().filter(|_| self.setup.kept) {
            for page in Pages::first(self.setup.pages).iter() {
                let now = ram.at(page).content;
                let before = if page % 2 == 0 { now } else { now ^ OTHER };
                work.kept.0[usize::from(page)] = if now == 0 { 0 } else { before };
            }
        }
    }

    /// All of it is told (`kept::tell`); it arrives message by message.
    pub(super) fn tell_kept(&mut self) {
        let Some(kept) =
            self.target.work.as_deref().filter(|work| work.keeps()).map(|work| work.kept.clone())
        else {
            return;
        };
        for page in Pages::first(self.setup.pages).iter().filter(|page| kept.0[usize::from(*page)] != 0) {
            let tags = vec![u64::from(kept.0[usize::from(page)])];
            self.target_says(Kind::Kept(control::Kept { start: page.into(), tags, ..Default::default() }));
        }
        self.target_says(Kind::Kept(control::Kept { end: true, ..Default::default() }));
    }

    /// A page that is named is not what is kept: that ends its stream, and no more
    /// (`PageReceiver::undecoded`). Says whether it is so.
    pub(super) fn is_not_kept(&mut self, id: u16, page: u8, meant: Page) -> bool {
        let counts = self.has(PlantedBug::RefusedCountsAsReceived);
        let unverified = self.has(PlantedBug::KeptNotVerified);
        let Some(work) = self.target.work.as_deref_mut() else { return true };
        if work.kept.0[usize::from(page)] == meant.content || unverified {
            return false;
        }
        say!(self, "target: page {page} is not kept any more");
        work.kept = Contents::default();
        if counts {
            work.received.add(page);
        }
        work.heard.push_back(Heard::Lost(id, Over::Cut));
        self.shut(id, Side::Target);
        true
    }

    /// The host gives what it keeps to somebody else, or it is not what it was.
    pub(crate) fn kept_suffers(&mut self, fault: Fault) {
        let Some(work) = self.target.work.as_deref_mut() else { return };
        match fault {
            Fault::KeptChanges => {
                work.kept.0.iter_mut().filter(|tag| **tag != 0).for_each(|tag| *tag ^= CHANGED)
            }
            _ => work.kept = Contents::default(),
        }
    }
}
