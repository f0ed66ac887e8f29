//! What comes after a round of pre-copy: another one, the switchover, or post-copy.

use crate::NextStep;
use policy::{Budget, Next, RoundsSoFar, Way};
use std::time::Duration;
use units::{Bytes, PAGE_SIZE, Rate};

/// A rate over less than this says nothing: the last known one holds.
const MEASURABLE: Duration = Duration::from_millis(20);

/// What the rounds showed so far, and the limits that they must keep. Times are since the migration began.
#[derive(Clone, Debug)]
pub struct Rounds {
    /// The mode that the user demands; none: whichever keeps the limits.
    mode: Option<Way>,
    /// The mode that was planned before anything moved.
    planned: Option<Way>,
    limits: Budget,
    /// The guest must be stopped in time for this, whatever the pause costs.
    end: Option<Duration>,
    seen: RoundsSoFar,
    /// The last round's pages, and how many pages moved in a second.
    last: Option<(u64, Option<f64>)>,
    warned: bool,
}

/// What a round that is over has moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Moved {
    /// Its number.
    pub round: u32,
    /// The pages that were dirty when it began.
    pub pages: u64,
    /// Those of them that the target had to be told anything of.
    pub told: u64,
    /// What was written to sockets.
    pub wire: Bytes,
    /// How long that took.
    pub took: Duration,
}

/// The next step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    /// What is done.
    pub step: NextStep,
    /// What the user should know of it.
    pub warning: Option<Warning>,
}

/// Why a step is not what the user hopes for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Warning {
    /// The limit of the whole migration is kept by a pause that is longer than its own limit.
    LongPause(Duration),
    /// Rounds do not help any more, and nothing else is allowed; so much is dirty after each of them. Said
    /// once.
    NoConvergence(Bytes),
}

impl Rounds {
    /// Before the first round. `mode`: what the user demands; none: whichever keeps the limits. `fixed`: what
    /// a switchover costs besides moving memory.
    pub fn new(mode: Option<Way>, limits: Budget, fixed: Duration) -> Self {
        let seen = RoundsSoFar { fixed, ..Default::default() };
        Self { mode, planned: None, limits, end: None, seen, last: None, warned: false }
    }

    /// The plan, once there is one: its mode, its downtime, and when the guest must be stopped at the latest.
    pub fn planned(&mut self, mode: Way, downtime: Duration, end: Option<Duration>) {
        (self.planned, self.limits.downtime, self.end) = (Some(mode), downtime, end);
    }

    /// From now on the guest runs on the target only when all its memory is there.
    pub fn forbid_post_copy(&mut self) {
        self.limits.post_copy = false;
        if self.mode.is_some() {
            self.mode = Some(Way::PreCopy);
        }
        self.planned = self.planned.map(|_| Way::PreCopy);
    }

    /// A round is over.
    pub fn moved(&mut self, Moved { round, pages, told, wire, took }: Moved) {
        let mut per_s = self.last.and_then(|(_, per_s)| per_s);
        if took >= MEASURABLE || self.seen.rate == Rate(0) {
            // What is dirty is memory, and most of it travels as less; zeros and what has not changed are
            // left out, which the next round may have fewer of. The first round says nothing of that: it
            // carries what the guest does not write.
            per_s = Some(told as f64 / took.as_secs_f64()).filter(|pages| *pages > 0.0);
            let memory = if round > 1 { told * PAGE_SIZE as u64 } else { 0 };
            self.seen.rate = Bytes(memory.max(wire.0)).per(took);
        }
        self.last = Some((pages, per_s));
    }

    /// A round has arrived, and so much is dirty: what next?
    pub fn decide(&mut self, now: Duration, dirty: Bytes) -> Decision {
        self.seen.dirtied.push(dirty);
        self.choose(now, dirty)
    }

    /// The switchover that was decided has not begun, and so much is dirty by now: is it still the next step?
    /// Another round is none that did not pay.
    pub fn still(&mut self, now: Duration, dirty: Bytes, step: NextStep) -> NextStep {
        if let Some(last) = self.seen.dirtied.last_mut() {
            *last = dirty;
        }
        let fits = policy::predicted_downtime(&self.seen).is_some_and(|pause| pause <= self.limits.downtime);
        let due = self.time_left(now).is_some_and(|left| left.is_zero());
        if step == NextStep::Switchover && !fits && !due { NextStep::Round } else { step }
    }

    /// How long until the guest must be stopped, whatever the pause costs.
    pub fn time_left(&self, now: Duration) -> Option<Duration> {
        let pause = policy::predicted_downtime(&self.seen).unwrap_or_default();
        self.end.map(|end| end.saturating_sub(now).saturating_sub(pause + pause / 2))
    }

    /// What a pause takes with what is dirty after the last round; and how long it may be.
    pub fn pause(&self) -> (Duration, Duration) {
        (policy::predicted_downtime(&self.seen).unwrap_or(self.seen.fixed), self.limits.downtime)
    }

    /// What next, by what was seen so far.
    pub fn choose(&mut self, now: Duration, dirty: Bytes) -> Decision {
        let mut warning = None;
        let step = match self.mode {
            Some(Way::Hybrid | Way::PostCopy) => NextStep::PostCopy,
            Some(Way::PreCopy) | None => self.step(now, dirty, &mut warning),
        };
        Decision { step, warning }
    }

    fn step(&mut self, now: Duration, dirty: Bytes, warning: &mut Option<Warning>) -> NextStep {
        let pause = policy::predicted_downtime(&self.seen);
        let long = |pause: &Duration| *pause > self.limits.downtime;
        if self.end.is_some_and(|end| policy::must_stop(end.saturating_sub(now), pause)) {
            *warning = pause.filter(long).map(Warning::LongPause);
            return NextStep::Switchover;
        }
        if self.planned == Some(Way::Hybrid) && pause.as_ref().is_none_or(long) {
            return NextStep::PostCopy;
        }
        match policy::next(&self.seen, &self.limits) {
            Next::Switchover => NextStep::Switchover,
            Next::PostCopy => NextStep::PostCopy,
            Next::Round => NextStep::Round,
            Next::Hopeless => {
                if !std::mem::replace(&mut self.warned, true) {
                    *warning = Some(Warning::NoConvergence(dirty));
                }
                NextStep::Round
            }
        }
    }

    /// The pages of the last round, and how many moved in a second.
    pub fn last(&self) -> Option<(u64, f64)> {
        self.last.and_then(|(pages, per_s)| Some((pages, per_s?)))
    }

    /// How many pages fit into the pause if so many are sent in a second.
    pub fn fit(&self, sent_per_s: f64) -> f64 {
        self.limits.downtime.saturating_sub(self.seen.fixed).as_secs_f64() * sent_per_s
    }

    /// Whether the guest could be stopped with so much dirty if so many pages are sent in a second.
    pub fn would_fit(&self, dirty: Bytes, sent_per_s: f64) -> bool {
        let pause = self.pause_at(dirty, Rate((sent_per_s * PAGE_SIZE as f64) as u64));
        pause.is_some_and(|pause| pause <= self.limits.downtime)
    }

    /// How long the guest would stand still with so much dirty, at this rate. None before the first round is
    /// over.
    pub fn predicted(&self, dirty: Bytes, rate: Rate) -> Option<Duration> {
        if self.seen.dirtied.is_empty() { None } else { self.pause_at(dirty, rate) }
    }

    fn pause_at(&self, dirty: Bytes, rate: Rate) -> Option<Duration> {
        policy::predicted_downtime(&RoundsSoFar { dirtied: vec![dirty], rate, fixed: self.seen.fixed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A guest that leaves `dirty` MiB after each round, on a link that moves 1 MiB in a millisecond; a pause
    /// may last 20 ms.
    fn after(mode: Option<Way>, post_copy: bool, planned: Option<Way>, dirty: &[u64]) -> Decision {
        let mut rounds = Rounds::new(mode, Budget { downtime: ms(20), post_copy }, ms(8));
        if let Some(planned) = planned {
            rounds.planned(planned, ms(20), Some(ms(1000)));
        }
        let mut decision = None;
        for (n, dirty) in (1..).zip(dirty) {
            let wire = Bytes(100 * MIB);
            rounds.moved(Moved { round: n, pages: 25_600, told: 25_600, wire, took: ms(100) });
            decision = Some(rounds.decide(ms(100), Bytes(dirty * MIB)));
        }
        decision.unwrap_or_else(|| rounds.choose(ms(0), Bytes(0)))
    }

    #[test]
    fn the_next_step_keeps_mode_plan_and_limits() {
        use NextStep::{PostCopy, Round, Switchover};
        let flat = [500; 4];
        let none = None;
        let table = [
            // What the user demands.
            (Some(Way::Hybrid), true, none, &[500][..], PostCopy, None),
            (Some(Way::PreCopy), false, none, &[500], Round, None),
            (Some(Way::PreCopy), false, none, &[12], Switchover, None),
            // What was planned, unless it fits anyway.
            (none, true, Some(Way::Hybrid), &[500], PostCopy, None),
            (none, true, Some(Way::Hybrid), &[12], Switchover, None),
            // A plan with an end: another round would miss it.
            (none, false, Some(Way::PreCopy), &[900], Switchover, Some(Warning::LongPause(ms(908)))),
            (none, false, Some(Way::PreCopy), &[400], Round, None),
            // Rounds that do not help.
            (none, true, none, &flat, PostCopy, None),
            (none, false, none, &flat, Round, Some(Warning::NoConvergence(Bytes(500 * MIB)))),
        ];
        for (mode, post_copy, planned, dirty, step, warning) in table {
            let got = after(mode, post_copy, planned, dirty);
            assert_eq!(got, Decision { step, warning }, "{mode:?}, {planned:?}, {dirty:?}");
        }
    }

    #[test]
    fn a_switchover_that_waits_is_still_one_if_it_fits() {
        use NextStep::{PostCopy, Round, Switchover};
        let mut rounds = Rounds::new(None, Budget { downtime: ms(20), post_copy: true }, ms(8));
        rounds.planned(Way::PreCopy, ms(20), Some(ms(1000)));
        rounds.moved(Moved { round: 1, pages: 1, told: 1, wire: Bytes(100 * MIB), took: ms(100) });
        assert_eq!(rounds.decide(ms(100), Bytes(10 * MIB)).step, Switchover);
        assert_eq!((rounds.pause(), rounds.time_left(ms(100))), ((ms(18), ms(20)), Some(ms(873))));
        for (now, dirty, step, expected) in [
            (200, 12, Switchover, Switchover),
            (200, 13, Switchover, Round),
            (200, 500, PostCopy, PostCopy),
            // Too late for another round.
            (200, 600, Switchover, Switchover),
            (980, 13, Switchover, Switchover),
        ] {
            assert_eq!(rounds.still(ms(now), Bytes(dirty * MIB), step), expected, "{now} {dirty} {step:?}");
        }
    }

    #[test]
    fn without_post_copy_every_mode_is_pre_copy() {
        for mode in [None, Some(Way::PreCopy), Some(Way::Hybrid), Some(Way::PostCopy)] {
            let mut rounds = Rounds::new(mode, Budget { downtime: ms(20), post_copy: true }, ms(8));
            rounds.planned(Way::Hybrid, ms(20), None);
            rounds.forbid_post_copy();
            for _ in 0..9 {
                assert_eq!(rounds.decide(ms(0), Bytes(500 * MIB)).step, NextStep::Round, "{mode:?}");
            }
        }
    }

    #[test]
    fn a_short_round_does_not_change_the_rate() {
        let mut rounds = Rounds::new(None, Budget { downtime: ms(20), post_copy: false }, ms(0));
        let moved = |told, took| Moved { round: 2, pages: told, told, wire: Bytes(0), took: ms(took) };
        rounds.moved(moved(2560, 100));
        assert_eq!(rounds.last(), Some((2560, 25_600.0)));
        rounds.moved(moved(1, 1));
        assert_eq!(rounds.last(), Some((1, 25_600.0)));
        // 100 MiB a second.
        assert_eq!(rounds.predicted(Bytes(MIB), Rate(MIB)), None);
        assert_eq!(rounds.decide(ms(0), Bytes(2 * MIB)).step, NextStep::Switchover);
        assert_eq!(rounds.decide(ms(0), Bytes(3 * MIB)).step, NextStep::Round);
        assert_eq!(rounds.predicted(Bytes(MIB), Rate(MIB)), Some(ms(1000)));
    }
}
