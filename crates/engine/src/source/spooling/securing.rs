//! Before a post-copy that must survive its source: all that will be missing goes into the file.
//!
//! It goes in passes while the guest runs, the last of it while it stands still; the machine hears that the
//! device state is saved only when all of that is durable. The target reads along. It must have read the
//! first pass, which shows that it can be left alone with the file; nobody waits for it to have read the
//! rest.

use super::{SourceDriver, so_far};
use crate::{
    Broken,
    spooler::{STALL, SpoolJob},
    why,
};
use policy::{Pass, Secure};
use proto::{NextStep, SourceEvent, control};
use std::time::{Duration, Instant};
use units::MemorySet;

/// The guest stands still while the last of what is missing becomes durable. If that takes longer than this,
/// it does not change hands.
const PAUSE: Duration = Duration::from_secs(1);

pub(super) struct Securing {
    floor: u64,
    passes: Vec<Pass>,
    /// Pages that the guest has written since the last pass began.
    insecure: MemorySet,
    /// Jobs that the thread is not done with.
    jobs: u32,
    /// The first pass, durable, while the target has not read it yet.
    unread: Option<Unread>,
    pub(super) stage: SecuringPhase,
}

struct Unread {
    pages: u64,
    took: Duration,
    durable_at: Instant,
    extents: u64,
    /// How far the target was, and since when.
    taken: (u64, Instant),
}

pub(super) enum SecuringPhase {
    /// The guest runs.
    Passes,
    /// It is about to be stopped, or stands still.
    Pausing,
    /// The device state is saved: that is told once what is missing is safe.
    Saved {
        /// Whether pages were written meanwhile.
        more: bool,
        since: Instant,
    },
    Safe,
}

impl SourceDriver {
    /// A strict post-copy is begun by making what it would owe safe: then nothing is decided yet.
    pub(in crate::source) fn secure_before(&mut self, step: NextStep) -> Option<NextStep> {
        if step != NextStep::PostCopy || !self.is_strict() {
            return Some(step);
        }
        let Some(spooler) = &self.spooling.spooler else { return Some(step) };
        let floor = spooler.appended();
        spooler.give(SpoolJob::Secure(self.dirty.clone()));
        self.spooling.securing = Some(Securing {
            floor,
            passes: vec![],
            insecure: self.nothing(),
            jobs: 1,
            unread: None,
            stage: SecuringPhase::Passes,
        });
        None
    }

    /// What else is done where a post-copy cannot be made safe.
    pub(super) fn decide_without(&mut self) -> NextStep {
        self.forbid_post_copy();
        let decision = self.rounds.choose(self.reporter.lasted(), self.dirty.bytes());
        let step = self.heed(decision);
        if step == NextStep::Round
            && let Err(Broken { what, why }) = self.judge()
        {
            self.reporter.note(format!("the guest could not be slowed: {what}: {why}"));
        }
        step
    }

    pub(super) fn secured(&mut self, pages: u64, took: Duration) -> Option<SourceEvent> {
        let Some(securing) = &mut self.spooling.securing else {
            if self.spooling.owes {
                self.reporter.safe();
                self.reporter
                    .note("all that the target lacks is in the spool: it no longer needs this host".into());
            }
            return None;
        };
        securing.jobs -= 1;
        if !matches!(securing.stage, SecuringPhase::Passes) {
            return self.safe_now();
        }
        if !securing.passes.is_empty() {
            return self.pass_is_over(pages, took);
        }
        let (extents, now) = (self.spooling.durable.extents, Instant::now());
        let taken = (self.spooling.taken, now);
        securing.unread = Some(Unread { pages, took, durable_at: now, extents, taken });
        if taken.0 < extents {
            // It may have been told over a connection that was lost since.
            self.say(control::Kind::Spooled(so_far(self.spooling.durable)));
        }
        self.first_is_read()
    }

    /// The first pass is over once the target has read it.
    pub(super) fn first_is_read(&mut self) -> Option<SourceEvent> {
        let taken = self.spooling.taken;
        let securing = self.spooling.securing.as_mut()?;
        let unread = securing.unread.as_mut()?;
        if taken < unread.extents {
            if taken > unread.taken.0 {
                unread.taken = (taken, Instant::now());
            }
            return None;
        }
        let (pages, took) = (unread.pages, unread.took + unread.durable_at.elapsed());
        securing.unread = None;
        self.pass_is_over(pages, took)
    }

    /// What comes after a pass.
    fn pass_is_over(&mut self, pages: u64, took: Duration) -> Option<SourceEvent> {
        let mut written = self.nothing();
        if let Some(tracker) = &mut self.parts.tracker
            && let Err(e) = tracker.collect(&mut written)
        {
            let Broken { what, why } = why("collect the pages that the guest wrote")(e);
            return Some(SourceEvent::Broke { what, why });
        }
        self.dirty.union(&written);
        let securing = self.spooling.securing.as_mut()?;
        securing.passes.push(Pass { pages, took, dirtied: written.len() });
        let passes = securing.passes.len() as u32;
        self.reporter.spool(|s| s.passes = passes);
        match policy::secure(&securing.passes, self.options.max_downtime) {
            Secure::Stop => {
                securing.insecure = written;
                securing.stage = SecuringPhase::Pausing;
                Some(SourceEvent::Decided(NextStep::PostCopy))
            }
            Secure::Again => {
                securing.jobs += 1;
                if let Some(spooler) = &self.spooling.spooler {
                    spooler.give(SpoolJob::Secure(written));
                }
                None
            }
            Secure::Hopeless => {
                self.spooling.securing = None;
                self.reporter.note(
                    "the guest writes faster than the datastore takes it, so a post-copy would not be safe \
                     (--robust strict): this goes on as pre-copy"
                        .into(),
                );
                self.release_spool();
                Some(SourceEvent::Decided(self.decide_without()))
            }
        }
    }

    /// Collects what will be missing; what of it is not safe yet is made so once the guest stands still.
    pub(in crate::source) fn collect_missing(&mut self) -> Result<(), Broken> {
        self.spooling.owes = true;
        let mut written = self.nothing();
        if let Some(tracker) = &mut self.parts.tracker {
            tracker.collect(&mut written).map_err(why("collect the pages that the guest wrote"))?;
        }
        self.dirty.union(&written);
        let nothing = self.nothing();
        if let (Some(securing), Some(spooler)) = (&mut self.spooling.securing, &self.spooling.spooler) {
            securing.insecure.union(&written);
            if self.stopped && !securing.insecure.is_empty() {
                securing.jobs += 1;
                spooler.give(SpoolJob::Secure(std::mem::replace(&mut securing.insecure, nothing)));
            }
        }
        Ok(())
    }

    /// The device state is saved. Before a strict post-copy that is told only when what is missing is safe.
    pub(in crate::source) fn hold(&mut self, event: SourceEvent) -> Option<SourceEvent> {
        let (Some(securing), Some(spooler)) = (&mut self.spooling.securing, &self.spooling.spooler) else {
            return Some(event);
        };
        let SourceEvent::Saved { more } = event else { return Some(event) };
        // What was written while it was saved.
        if !self.dirty.is_empty() {
            securing.jobs += 1;
            spooler.give(SpoolJob::Secure(self.dirty.clone()));
        }
        securing.stage = SecuringPhase::Saved { more, since: Instant::now() };
        self.safe_now()
    }

    /// Whether all that is missing is durable; says what was held back until then, and tells the target what
    /// it can live on.
    fn safe_now(&mut self) -> Option<SourceEvent> {
        let durable = self.spooling.durable;
        let securing = self.spooling.securing.as_mut()?;
        let SecuringPhase::Saved { more, .. } = securing.stage else { return None };
        if securing.jobs > 0 {
            return None;
        }
        securing.stage = SecuringPhase::Safe;
        let (floor, end) = (securing.floor, durable.extents);
        let manifest = Some(control::Manifest { floor, outdated: vec![], end });
        self.say(control::Kind::Spooled(control::Spooled { manifest, ..so_far(durable) }));
        self.reporter.safe();
        Some(SourceEvent::Saved { more })
    }

    /// The guest stands still and waits for the datastore for too long.
    pub(in crate::source) fn waits_in_vain(&mut self) -> Option<SourceEvent> {
        let securing = self.spooling.securing.as_ref()?;
        if let Some(unread) = &securing.unread
            && unread.taken.1.elapsed() > STALL
        {
            let waited = unread.taken.1.elapsed().as_millis();
            return self.spool_failed(&format!("the target has read nothing of it for {waited} ms"));
        }
        let SecuringPhase::Saved { since, .. } = &securing.stage else { return None };
        if since.elapsed() < PAUSE {
            return None;
        }
        self.spool_failed(&format!("the guest stood still for {} ms", PAUSE.as_millis()))
    }
}
