//! What a migration will take, said before anything moves: how long, how much traffic, which pause, and what
//! the guest feels.
//!
//! A migration is played through with what was measured: the guest's working set, how its content shrinks,
//! the link. It is played three times, because each of these is only known so well: as is likely, and with
//! everything somewhat better or worse.

use crate::{
    disks::Drain,
    plan::Plan,
    throttle::{CREDIT, OUTRUN, SHARE, share_of_round},
    working_set::{Tail, WorkingSet},
};
use serde::{Deserialize, Serialize};
use std::{ops::Add, time::Duration};
use units::PAGE_SIZE;

/// By how much the pace may be better or worse than measured: half of the forecasts of `./dev bench` were
/// nearer than that.
const UNSURE: f64 = 0.12;

/// Pages pushed to a running guest travel so much slower than before it runs: each is looked at by itself.
const PUSHED: f64 = 1.1;

/// Rounds after which there is no end in sight.
const MANY: u32 = 40;

/// Who writes so many times what the link carries is throttled from the start, without being watched in the
/// first round.
pub const HARD: f64 = 2.0;

/// Writers that are seen to outrun a round are throttled after so long, in the first round (`engine`'s
/// `JUDGED`).
const NOTICED: f64 = 0.3;

/// What was measured of a guest, and of the way that its memory is to take.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Pages that the guest ever wrote.
    pub present: u64,
    /// How it writes.
    pub written: WorkingSet,
    /// Which part of its pages travels at all: neither zeros nor what the target has by then.
    pub travels: f64,
    /// The same, of pages that are written again.
    pub again: f64,
    /// How much content moves in a second, in bytes.
    pub pace: f64,
    /// Bytes on the wire for each byte of content.
    pub wire: f64,
    /// How many bytes that do not travel are dealt with in a second.
    pub look: f64,
    /// What a switchover costs besides memory, in seconds.
    pub fixed: f64,
    /// How many threads of the guest may write at a time.
    pub writers: u32,
    /// Whether its writers are throttled from the start: because they had to be before, or write far more
    /// than the link carries.
    pub hard: bool,
    /// Whether nobody can be throttled: its memory is on a file system where writers cannot be made to wait.
    #[serde(default)]
    pub unthrottleable: bool,
    /// What a stop waits for the guest's disks.
    #[serde(default)]
    pub drain: Drain,
}

/// How memory travels relative to the switchover.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// All of it before.
    PreCopy,
    /// One round before, what was written meanwhile after it.
    Hybrid,
    /// All of it after.
    PostCopy,
}

/// A figure that is not known exactly.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Span {
    /// If all goes well.
    pub low: f64,
    /// What is expected.
    pub likely: f64,
    /// If much goes wrong.
    pub high: f64,
}

impl Add<f64> for Span {
    type Output = Self;

    fn add(self, more: f64) -> Self {
        Self { low: self.low + more, likely: self.likely + more, high: self.high + more }
    }
}

/// What it takes to go one way.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Estimate {
    /// Which.
    pub way: Way,
    /// From the first page to the last, in milliseconds.
    pub total_ms: Span,
    /// The pause.
    pub downtime_ms: Span,
    /// Bytes on the wire.
    pub wire_bytes: Span,
    /// How long the guest's writers wait altogether, so that it ends.
    pub stalled_ms: Span,
    /// How long the guest runs without all its memory.
    pub missing_ms: Span,
    /// Whether its writers have to be slowed.
    pub throttled: bool,
    /// Whether it ends at all.
    pub ends: bool,
}

impl Estimate {
    /// A stop waits for the disks, too.
    fn with(self, drain: &Drain) -> Self {
        let also = |span: Span, scale: f64| Span {
            low: span.low,
            likely: span.likely + drain.likely() * scale,
            high: span.high + drain.wait * scale,
        };
        Self { total_ms: also(self.total_ms, 1e3), downtime_ms: also(self.downtime_ms, 1e3), ..self }
    }
}

/// Where a migration stands.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Standing {
    /// Pages of this round that are still to be looked at.
    pub left: u64,
    /// How long this round has lasted.
    pub lasted: Duration,
    /// Whether it is the first.
    pub first: bool,
    /// Whether the guest's writers are throttled.
    pub throttled: bool,
}

/// One play.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Played {
    pub total: f64,
    pub downtime: f64,
    wire: f64,
    stalled: f64,
    missing: f64,
    pub throttled: bool,
    pub ends: bool,
}

/// How the play is played.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub downtime: f64,
    pub share: f64,
    pub stop_after: Option<f64>,
    pub tail: Tail,
    /// Of the measured one.
    pub pace: f64,
}

impl Default for Rules {
    fn default() -> Self {
        Self { downtime: 0.0, share: SHARE, stop_after: None, tail: Tail::Likely, pace: 1.0 }
    }
}

impl Measured {
    /// Seconds for so many pages of which this part travels.
    fn time(&self, pages: f64, travels: f64, rules: &Rules) -> f64 {
        let bytes = pages * PAGE_SIZE as f64;
        bytes * travels / (self.pace * rules.pace).max(1.0) + bytes * (1.0 - travels) / self.look.max(1.0)
    }

    fn wire(&self, pages: f64, travels: f64) -> f64 {
        pages * PAGE_SIZE as f64 * travels * self.wire + pages * 16.0
    }

    pub(crate) fn beginning(&self) -> Standing {
        Standing { left: self.present, first: true, throttled: self.hard, ..Standing::default() }
    }

    pub(crate) fn play(&self, way: Way, from: &Standing, rules: &Rules) -> Played {
        let all = from.left as f64;
        match way {
            Way::PreCopy => self.rounds(from, rules),
            Way::Hybrid => {
                let first = self.time(all, self.travels, rules);
                let dirty = self.written.within(from.lasted.as_secs_f64() + first, rules.tail);
                let missing = self.time(dirty, self.again, rules) * PUSHED;
                Played {
                    total: first + self.fixed + missing,
                    downtime: self.fixed,
                    wire: self.wire(all, self.travels) + self.wire(dirty, self.again),
                    missing,
                    ends: true,
                    ..Played::default()
                }
            }
            Way::PostCopy => {
                let missing = self.time(all, self.travels, rules) * PUSHED;
                Played {
                    total: self.fixed + missing,
                    downtime: self.fixed,
                    wire: self.wire(all, self.travels),
                    missing,
                    ends: true,
                    ..Played::default()
                }
            }
        }
    }

    /// Pre-copy, round by round.
    fn rounds(&self, from: &Standing, rules: &Rules) -> Played {
        let mut played = Played { throttled: from.throttled, ..Played::default() };
        // What this round looks at, and what of it travels.
        let (mut looked, mut moved) = (from.left as f64, from.left as f64);
        let mut travels = if from.first { self.travels } else { self.again };
        let mut lasted = from.lasted.as_secs_f64();
        let pages_per_s = self.pace * rules.pace / PAGE_SIZE as f64 / self.again.max(0.01);
        for round in 0..MANY {
            let took = self.time(moved, travels, rules).max(self.time(looked, 0.0, rules));
            played.total += took;
            played.wire += self.wire(moved, travels);
            let all = lasted + took;
            let wanted = self.written.within(all, rules.tail);
            let outrun = wanted > OUTRUN * moved;
            let mut changed = false;
            if !played.throttled
                && !self.unthrottleable
                && outrun
                && self.time(wanted, self.again, rules) + self.fixed > rules.downtime
            {
                played.throttled = true;
                changed = true;
            }
            let mut dirty = wanted;
            if played.throttled {
                let free = if changed { self.written.within(all.min(NOTICED), rules.tail) } else { 0.0 };
                let slowed = if changed { (all - NOTICED).max(0.0) } else { all };
                let fit = (rules.downtime - self.fixed).max(0.0) * pages_per_s;
                let share = share_of_round(rules.share, moved, fit);
                let opened = share * pages_per_s * (slowed + CREDIT.as_secs_f64());
                dirty = wanted.min(free + opened);
                let kept = if wanted > 0.0 { dirty / wanted } else { 1.0 };
                played.stalled += slowed * (1.0 - kept);
            }
            let pause = self.time(dirty, self.again, rules) + self.fixed;
            let over = rules.stop_after.is_some_and(|limit| played.total + 1.5 * pause >= limit);
            if pause <= rules.downtime || over {
                played.ends = true;
                played.total += pause;
                played.downtime = pause;
                played.wire += self.wire(dirty, self.again);
                break;
            }
            // After a change of tracker all memory is looked at once more.
            looked = if changed && round == 0 { self.present as f64 } else { dirty };
            (moved, travels, lasted) = (dirty, self.again, 0.0);
        }
        played
    }

    /// Played three times.
    pub(crate) fn estimate(&self, way: Way, rules: &Rules) -> Estimate {
        let play = |pace, tail| self.play(way, &self.beginning(), &Rules { pace, tail, ..*rules });
        let likely = play(1.0, Tail::Likely);
        let well = play(1.0 + UNSURE, Tail::Ends);
        let ill = play(1.0 - UNSURE, Tail::GoesOn);
        let span = |of: fn(&Played) -> f64, scale: f64| {
            let (a, b, c) = (of(&well) * scale, of(&likely) * scale, of(&ill) * scale);
            Span { low: a.min(b).min(c), likely: b, high: a.max(b).max(c) }
        };
        Estimate {
            way,
            total_ms: span(|p| p.total, 1e3),
            downtime_ms: span(|p| p.downtime, 1e3),
            wire_bytes: span(|p| p.wire, 1.0),
            stalled_ms: span(|p| p.stalled, 1e3),
            missing_ms: span(|p| p.missing, 1e3),
            throttled: likely.throttled,
            ends: likely.ends,
        }
        .with(&self.drain)
    }

    /// How much longer it will take, in seconds.
    pub fn remaining(&self, way: Way, from: &Standing, plan: &Plan) -> Option<f64> {
        let rules = Rules { downtime: plan.downtime_ms / 1e3, share: plan.share, ..Rules::default() };
        let played = self.play(way, from, &rules);
        played.ends.then_some(played.total)
    }
}
