//! From the streams to guest memory, and faults the other way. Mirrors `engine/receive.rs`,
//! `engine/faults.rs` and `page/decode.rs`.

use super::{Heard, WritePolicy};
use crate::{
    link::{As, Side, Word},
    pages::Page,
    planted::PlantedBug,
    world::{World, say},
};

/// What becomes of a page's content that is damaged.
const DAMAGE: u16 = 0x4000;

impl World {
    /// A page has come over a connection (`PageReceiver::arrive`).
    pub fn land(&mut self, id: u16, page: u8, meant: Page, how: As) {
        let unverified = self.has(PlantedBug::KnownNotVerified);
        let overwrites = self.has(PlantedBug::PlaceOverwrites);
        let Some(work) = self.target.work.as_deref_mut().filter(|work| work.conns.contains(&id)) else {
            return;
        };
        let kept = work.kept.0[usize::from(page)];
        if how == As::Kept && self.is_not_kept(id, page, meant) {
            return;
        }
        let Some(work) = self.target.work.as_deref_mut() else { return };
        // While the guest runs, a page that it waited for comes twice: the one that names it may follow.
        if work.stage == WritePolicy::Before || how == As::Kept {
            work.kept.0[usize::from(page)] = 0;
        }
        let qemu = &mut self.qemus[1];
        let refers = matches!(how, As::Duplicate(_) | As::Delta(_));
        match work.stage {
            WritePolicy::Closed if overwrites => qemu.ram.put(page, meant),
            WritePolicy::Before
                if !refers || unverified || restored(qemu, page, meant, how, kept) == meant.content =>
            {
                let mut content = restored(qemu, page, meant, how, kept);
                let damaged = std::mem::take(&mut work.damages);
                self.ghost.damaged.drop(page);
                if damaged {
                    content ^= DAMAGE;
                    self.ghost.damaged.add(page);
                }
                work.received.add(page);
                let before = qemu.ram.at(page);
                let runs = qemu.runs();
                let now = Page { content, ..meant };
                qemu.ram.put(page, now);
                if content == 0 {
                    qemu.ram.present.drop(page);
                }
                say!(self, "target: page {page} is {content}");
                if content != meant.content && !damaged {
                    self.breach(|| {
                        format!("I7: page {page} became {content}, and {} was meant", meant.content)
                    });
                }
                if before.written > meant.written {
                    self.breach(|| {
                        format!(
                            "I5: page {page}, written as number {}, overwrote number {}",
                            meant.written, before.written
                        )
                    });
                }
                if runs {
                    self.breach(|| format!("I5: page {page} was written under a running guest"));
                }
            }
            WritePolicy::PostCopy if !refers => {
                if !work.missing.has(page) && !overwrites {
                    return;
                }
                let content = restored(qemu, page, meant, how, kept);
                let placed = qemu.place(page, Page { content, ..meant });
                if overwrites {
                    qemu.ram.put(page, meant);
                }
                work.asked.drop(page);
                work.missing.drop(page);
                if work.missing.none() {
                    work.heard.push_back(Heard::AllPlaced);
                }
                say!(self, "target: page {page} is placed{}", if placed { "" } else { ", and was there" });
            }
            // It refers to memory that it may not refer to, or to what is not there, or comes too late.
            _ => {
                say!(self, "target: page {page} is wrong");
                work.heard.push_back(Heard::Wrong(id));
            }
        }
    }

    /// Whether a fault is to be heard of.
    pub fn faults_can(&self) -> bool {
        let Some(work) = self.target.work.as_deref().filter(|work| self.up[1] && work.watches) else {
            return false;
        };
        let qemu = &self.qemus[1];
        let waits = qemu.waits_for.filter(|_| qemu.alive && qemu.watched);
        waits.is_some_and(|page| !work.missing.has(page) || !work.asked.has(page))
    }

    /// It is asked for, or answered with zeros if nobody owes it.
    pub fn faults_move(&mut self) {
        let early = self.has(PlantedBug::StruckOffEarly);
        let Some(work) = self.target.work.as_deref_mut() else { return };
        let Some(page) = self.qemus[1].waits_for else { return };
        if !work.missing.has(page) {
            say!(self, "target: page {page} is missing, and zeros");
            self.qemus[1].place(page, Page::default());
            return;
        }
        say!(self, "target: page {page} is missing, and wanted");
        work.asked.add(page);
        if early {
            work.missing.drop(page);
        }
        let on = work.asking_on;
        self.say_on(on, Side::Target, Word::Want(page));
    }
}

/// What comes out of a message (`PageDecoder::decode`, before it is verified).
fn restored(qemu: &crate::qemu::Qemu, page: u8, meant: Page, how: As, kept: u16) -> u16 {
    match how {
        As::Kept => kept,
        As::Raw => meant.content,
        As::Zero => 0,
        As::Duplicate(other) => qemu.ram.at(other).content,
        As::Delta(base) if qemu.ram.at(page).content == base => meant.content,
        As::Delta(_) => meant.content ^ 0x8000,
    }
}
