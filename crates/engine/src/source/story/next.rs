//! What comes next, by what was seen of the rounds so far.

use super::Story;
use crate::report::{Mode, Way};
use policy::{Next, Seen};
use proto::Step;
use std::time::{Duration, Instant};
use units::{MemorySet, PAGE_SIZE, Rate};

impl Story {
    /// A round has landed and this is dirty: what next?
    pub(in crate::source) fn decide(&mut self, dirty: &MemorySet) -> Step {
        self.end_round(dirty.len());
        self.seen.dirtied.push(dirty.bytes());
        self.choose(dirty)
    }

    /// What next, by what was seen.
    pub(in crate::source) fn choose(&mut self, dirty: &MemorySet) -> Step {
        if self.mode == Mode::Hybrid {
            return Step::PostCopy;
        }
        let pause = policy::predicted_downtime(&self.seen);
        if self
            .stop_after
            .is_some_and(|end| policy::must_stop(end.saturating_duration_since(Instant::now()), pause))
        {
            if let Some(pause) = pause.filter(|pause| *pause > self.budget.downtime) {
                let pause = pause.as_millis();
                self.note(format!("to end within --max-time the guest is stopped now, for about {pause} ms: --max-downtime gives way"));
            }
            return Step::Switchover;
        }
        if self.takes == Some(Way::Hybrid) && pause.is_none_or(|pause| pause > self.budget.downtime) {
            return Step::PostCopy;
        }
        match policy::next(&self.seen, &self.budget) {
            Next::Switchover => Step::Switchover,
            Next::PostCopy => Step::PostCopy,
            Next::Round => Step::Round,
            Next::Hopeless => {
                if !std::mem::replace(&mut self.hopeless, true) {
                    let dirty = dirty.bytes();
                    self.note(format!(
                        "this does not converge: the guest writes as fast as the link carries ({dirty} are dirty \
                         after each round); cancel it, allow post-copy (--allow-post-copy), or allow a longer pause \
                         (--max-downtime)"
                    ));
                }
                Step::Round
            }
        }
    }

    /// How long the current round has lasted.
    pub(in crate::source) fn round_lasts(&self) -> Option<Duration> {
        self.round.as_ref().map(|(_, since, ..)| since.elapsed())
    }

    /// Bytes that were sent in the current round.
    pub(in crate::source) fn sent_in_round(&self) -> u64 {
        self.round.as_ref().map_or(0, |(_, _, sent, _)| self.traffic.sent() - sent)
    }

    /// The pages of the last round, and how many moved in a second.
    pub(in crate::source) fn last_round(&self) -> Option<(u64, f64)> {
        Some((self.report.rounds.last()?.pages, self.moved_per_s?))
    }

    /// How many pages fit into the pause if so many are sent in a second.
    pub(in crate::source) fn fit(&self, sent_per_s: f64) -> f64 {
        self.budget.downtime.saturating_sub(self.seen.fixed).as_secs_f64() * sent_per_s
    }

    /// Whether the guest could be stopped with so much dirty if so many pages are sent in a second.
    pub(in crate::source) fn would_fit(&self, dirty: &MemorySet, sent_per_s: f64) -> bool {
        let rate = Rate((sent_per_s * PAGE_SIZE as f64) as u64);
        let seen = Seen { dirtied: vec![dirty.bytes()], rate, fixed: self.seen.fixed };
        policy::predicted_downtime(&seen).is_some_and(|pause| pause <= self.budget.downtime)
    }
}
