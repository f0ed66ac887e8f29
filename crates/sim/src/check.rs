//! What must always be true (I1 to I7), and what must be true in the end.
//!
//! I5 and I7 are looked at where a page arrives (`target/receiving.rs`), I6 where a guest is let run
//! (`moves.rs`), I3 in the end.

use crate::{
    link::Side,
    pages::Pages,
    qemu::Run,
    setup::Spooling,
    source::Departure,
    world::{Conditions, World},
};

/// Worlds with more pages are looked over page by page only now and then.
const FEW: u8 = 8;

/// How often those are.
const SELDOM: u32 = 16;

/// How a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum End {
    /// The guest runs there, or stands still there as somebody else wants it, and has all its memory.
    Runs(Side),
    /// It runs on the target and waits for memory that was lost with the source, against which nobody asked
    /// for protection.
    Lacks,
    /// Nobody runs it, because the process that did, or had its only memory, was killed.
    Killed,
    /// It is where QEMU's own migration has taken it.
    Elsewhere,
    /// Nobody runs it, because the agent is never started again that had to ask the record, or to do what the
    /// killed watchdog would have done.
    Unattended,
}

impl World {
    /// After every move.
    pub fn check(&mut self) {
        let [source, target] = [&self.qemus[0], &self.qemus[1]];
        let (there, here) = (source.runs(), target.runs());
        if there && here {
            return self.breach(|| "I1: the guest runs on both hosts".into());
        }
        if here && !self.ghost.committed {
            return self.breach(|| {
                "I1: the guest runs on the target, and the record does not durably say so".into()
            });
        }
        if there && self.ghost.committed && !self.ghost.by_person {
            return self.breach(|| "I4: the guest runs on the source after the commit".into());
        }
        if there && self.ghost.by_person && !self.burnt[1] {
            return self.breach(|| "I1: a person decided, and the target lives".into());
        }
        if (there || here) && self.ghost.elsewhere {
            return self
                .breach(|| "I1: QEMU's own migration has taken the guest away, and it runs here".into());
        }
        if here && self.ghost.quit {
            return self.breach(|| "I9: somebody has ended the VM, and it runs on the target".into());
        }
        let unwanted = self.ghost.wanted.is_some_and(|wanted| wanted != Run::Running);
        if (there || here) && unwanted {
            let wanted = self.ghost.wanted;
            return self.breach(|| format!("I9: the guest runs, and would be {wanted:?}"));
        }
        let differs = target.config ^ self.ghost.config;
        if self.ghost.committed && target.started && differs != 0 {
            return self.breach(|| "I9: the VM on the target has other devices or media".into());
        }
        if source.has_disk && target.has_disk {
            return self.breach(|| "I6: both QEMUs have the disk active".into());
        }
        if self.setup.pages <= FEW || self.steps.0.is_multiple_of(SELDOM) {
            let lost = self.lost_before().or_else(|| self.lost_after());
            if let Some(what) = lost {
                self.breach(|| what);
            }
        }
    }

    /// I2, before the commit: what differs between the two sides is on somebody's list.
    fn lost_before(&self) -> Option<String> {
        if self.ghost.committed || !self.qemus[0].alive || !self.qemus[1].alive {
            return None;
        }
        let work = self.source.work.as_deref().filter(|work| work.begun)?;
        let tracked = self.qemus[0].tracked?;
        self.target.work.as_deref().filter(|work| work.machine.is_some())?;
        let listed = work.dirty.or(tracked).or(work.unacknowledged).or(work.missing).or(work.spooling.unsure);
        let page = Pages::first(self.setup.pages)
            .less(listed.or(self.ghost.damaged))
            .iter()
            .find(|page| self.qemus[0].ram.at(*page).content != self.qemus[1].ram.at(*page).content)?;
        Some(format!("I2: page {page} differs on the target, and nobody owes it"))
    }

    /// I2, after the commit: what is missing is missing, and what is there is right.
    fn lost_after(&self) -> Option<String> {
        let qemu = &self.qemus[1];
        if !self.ghost.committed || self.ghost.by_person || !qemu.alive || qemu.state.is_none() {
            return None;
        }
        let missing = self.missing();
        for page in Pages::first(self.setup.pages).iter() {
            let truth = self.guest.truth.at(page).content;
            if !qemu.ram.present.has(page) && missing.has(page) {
                continue;
            }
            let found = qemu.ram.at(page).content;
            if found != truth {
                return Some(format!(
                    "I2: page {page} of the guest on the target is {found}, not {truth}, and nobody owes it"
                ));
            }
        }
        None
    }

    /// What the guest on the target misses.
    fn missing(&self) -> Pages {
        match self.target.work.as_deref() {
            Some(work) if work.machine.is_some() => work.missing,
            _ => self.target.store.read().arrival.as_ref().and_then(|a| a.missing).unwrap_or_default(),
        }
    }

    /// When nothing moves any more: who runs the guest, or a breach.
    pub fn verdict(&mut self) -> Option<End> {
        if self.breach.0.is_some() {
            return None;
        }
        match self.judge().and_then(|end| self.completed(end)) {
            Ok(end) => Some(end),
            Err(what) => {
                self.breach(|| what);
                None
            }
        }
    }

    /// A migration that nothing disturbs completes, and so does one whose link was lost once and waited for.
    fn completed(&self, end: End) -> Result<End, String> {
        let must = matches!(self.ghost.conditions, Conditions::Fair | Conditions::OneCutWaitedFor);
        // Nobody needs the janitor where no agent and no datastore failed.
        let tidy = must || self.ghost.conditions == Conditions::OneCut;
        if tidy && (self.spool.file.is_some() || self.spool.own.is_some()) {
            return Err("a file is left behind on the datastore".into());
        }
        // A strict source does not hand the guest over without the file, if that fails while it stands still.
        let costs = self.ghost.conditions == Conditions::Datastore && self.setup.spooling != Spooling::Strict;
        if costs && !self.setup.eager && end != End::Runs(Side::Target) {
            return Err(format!("the datastore alone was in the way, and it ended as {end:?}"));
        }
        // A source that refers to what may not have arrived is turned away.
        if must && !self.setup.eager && end != End::Runs(Side::Target) {
            return Err(format!("in {:?} it ended as {end:?}", self.ghost.conditions));
        }
        Ok(end)
    }

    fn judge(&self) -> Result<End, String> {
        let target = &self.qemus[1];
        if self.ghost.elsewhere {
            self.nothing_left(Side::Target)?;
            return Ok(End::Elsewhere);
        }
        if self.is_at(Side::Source) {
            self.all_there(Side::Source)?;
            self.nothing_left(Side::Target)?;
            let settled = *self.source.journal.durable() == Departure::None && self.source.work.is_none();
            if !settled && !self.ghost.for_good {
                return Err(format!(
                    "I3: it runs on the source, whose journal says {:?}",
                    self.source.journal.durable()
                ));
            }
            return Ok(End::Runs(Side::Source));
        }
        if self.is_at(Side::Target) {
            let outdated = target.watched;
            if outdated {
                let lost = self.ghost.killed[0] || self.ghost.for_good;
                let in_file = Pages(self.missing().0 & self.safe_in_file().0);
                return match self.setup.spooling {
                    _ if !lost => Err("it lacks memory that the source still has".into()),
                    // Behind damage a reader may find nothing more.
                    _ if self.ghost.rotten => Ok(End::Lacks),
                    Spooling::Strict => Err("strict: it lacks memory that should be in the spool".into()),
                    _ if !in_file.none() => Err(format!("it lacks {in_file:?}, which is in the spool")),
                    _ => Ok(End::Lacks),
                };
            }
            self.all_there(Side::Target)?;
            self.nothing_left(Side::Source)?;
            return Ok(End::Runs(Side::Target));
        }
        // Nobody runs it. Only where whoever owned it was killed.
        let owner = if self.ghost.committed && !self.ghost.by_person { Side::Target } else { Side::Source };
        if self.ghost.killed[owner.at()] {
            return Ok(End::Killed);
        }
        let journal = self.source.journal.durable();
        let is_fenced = matches!(journal, Departure::Fenced(_));
        if self.ghost.for_good && (is_fenced || self.ghost.unwatched) {
            return Ok(End::Unattended);
        }
        Err(format!("I1: nobody runs it, though the {owner:?} could; the source's journal says {journal:?}"))
    }

    /// Whether the guest is on this side as it would be without the migration: running, or otherwise.
    fn is_at(&self, side: Side) -> bool {
        let qemu = &self.qemus[side.at()];
        let owner = if self.ghost.committed && !self.ghost.by_person { Side::Target } else { Side::Source };
        let as_wanted = match self.ghost.wanted {
            Some(Run::Running) => false,
            Some(wanted) => wanted.like(qemu.run),
            None => true,
        };
        qemu.runs() || (side == owner && qemu.alive && qemu.started && !qemu.frozen && as_wanted)
    }

    /// The page-level oracle.
    fn all_there(&self, side: Side) -> Result<(), String> {
        let qemu = &self.qemus[side.at()];
        let wrong = Pages::first(self.setup.pages)
            .iter()
            .find(|page| qemu.ram.at(*page).content != self.guest.truth.at(*page).content);
        if let Some(page) = wrong {
            let (found, truth) = (qemu.ram.at(page).content, self.guest.truth.at(page).content);
            return Err(format!("in the end page {page} of the guest is {found}, not {truth}"));
        }
        if qemu.waits_for.is_some() {
            return Err(format!("in the end the guest on the {side:?} waits for a page"));
        }
        Ok(())
    }

    /// No copy stays behind but one that an agent left which was killed in the one step that leaves it
    /// (`Ghost::orphan`).
    fn nothing_left(&self, side: Side) -> Result<(), String> {
        if side == Side::Source && self.ghost.for_good {
            return Ok(());
        }
        if self.qemus[side.at()].alive && !self.ghost.orphan[side.at()] {
            return Err(format!("a QEMU is left behind on the {side:?}"));
        }
        let open = match side {
            Side::Source => matches!(self.source.journal.durable(), Departure::Fenced(_)) && !self.burnt[0],
            Side::Target => self.target.store.durable().arrival.is_some() && !self.burnt[1],
        };
        if open { Err(format!("the {side:?}'s journal is still open")) } else { Ok(()) }
    }
}
