//! What a migration will take, said before anything moves: how long, how much traffic, which pause, and what the guest feels.
//!
//! A migration is played through with what was measured: the guest's working set, how its content shrinks, the link. It is played
//! three times, because each of these is only known so well: as is likely, and with everything somewhat better or worse.

use crate::governor::{CREDIT, OUTRUN, SHARE};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use units::PAGE_SIZE;

/// By how much the pace may be better or worse than measured; in `./dev bench` half of the forecasts are nearer than that.
const UNSURE: f64 = 0.12;

/// What it costs a guest to lack memory, compared with a writer that waits as long: it waits for some pages only.
const LACKING: f64 = 0.5;

/// Pages pushed to a running guest travel so much slower than before it runs: each is looked at by itself.
const PUSHED: f64 = 1.1;

/// Rounds after which there is no end in sight.
const MANY: u32 = 40;

/// Writers that are seen to outrun a round are governed after so long, in the first round (`engine`'s `JUDGED`).
const NOTICED: f64 = 0.3;

/// How many distinct pages a guest writes within a time, as far as it was watched.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct WorkingSet {
    /// Seconds since the watch began, and how many different pages were written by then; ascending.
    seen: Vec<(f64, f64)>,
    /// The guest has no more.
    most: f64,
}

/// What follows after the watch ended.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Tail {
    /// What grew more slowly lately will stop growing.
    Ends,
    /// It goes on as it did lately.
    GoesOn,
    /// Between the two.
    Likely,
}

impl WorkingSet {
    /// Of a guest with so many pages, of which nothing was seen yet.
    pub fn of(most: u64) -> Self {
        Self { seen: vec![], most: most as f64 }
    }

    /// So many different pages were written since the watch began.
    pub fn see(&mut self, after: Duration, pages: u64) {
        let (at, pages) = (after.as_secs_f64(), pages as f64);
        if self.seen.last().is_none_or(|(last, before)| at > *last && pages >= *before) && at > 0.0 {
            self.seen.push((at, pages));
        }
    }

    /// Pages a second at the end of the watch, counted from its beginning.
    pub fn per_s(&self) -> f64 {
        self.seen.last().map_or(0.0, |(at, pages)| pages / at)
    }

    /// Distinct pages that are written within so many seconds.
    fn within(&self, time: f64, tail: Tail) -> f64 {
        let Some(&(end, all)) = self.seen.last() else { return 0.0 };
        let pages = if time <= end {
            let mut before = (0.0, 0.0);
            let next = self.seen.iter().copied().find(|next| {
                let found = time <= next.0;
                if !found {
                    before = *next;
                }
                found
            });
            let next = next.unwrap_or((end, all));
            before.1 + (next.1 - before.1) * (time - before.0) / (next.0 - before.0).max(1e-9)
        } else {
            let half = self.within(end / 2.0, tail);
            let lately = all - half;
            let goes_on = lately * (time - end) / (end / 2.0);
            // Each half as long as the watch brings this part of what the one before it brought.
            let less = if half > 0.0 { lately / half } else { 1.0 };
            let ends = if less > 0.97 {
                goes_on
            } else {
                lately * less / (1.0 - less) * (1.0 - less.powf((time - end) / (end / 2.0)))
            };
            all + match tail {
                Tail::Ends => ends,
                Tail::GoesOn => goes_on,
                Tail::Likely => (ends + goes_on) / 2.0,
            }
        };
        pages.min(self.most)
    }
}

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
    /// How many bytes can be looked at in a second.
    pub look: f64,
    /// What a switchover costs besides memory, in seconds.
    pub fixed: f64,
    /// How many threads of the guest may write at a time.
    pub writers: u32,
    /// Whether earlier migrations say that its writers have to be governed from the start.
    pub known_hard: bool,
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

/// What the user was promised.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Promise {
    /// The longest pause.
    Downtime,
    /// The longest migration.
    Time,
    /// The longest wait of a writer.
    Stall,
}

/// What the user wants.
#[derive(Clone, PartialEq, Debug)]
pub struct Terms {
    /// The longest pause.
    pub downtime: Duration,
    /// The longest migration, if that matters.
    pub time: Option<Duration>,
    /// The longest that a writer may be made to wait.
    pub stall: Duration,
    /// Which of these is kept first, where not all can be.
    pub keep: [Promise; 3],
    /// The way, if it is not to be found out.
    pub way: Option<Way>,
    /// Whether the guest may run before all its memory is there.
    pub post_copy: bool,
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

/// What it takes to go one way.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Course {
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
    pub lacking_ms: Span,
    /// Whether its writers have to be slowed.
    pub governed: bool,
    /// Whether it ends at all.
    pub ends: bool,
}

/// What is done, and what is expected of it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// All ways.
    pub courses: Vec<Course>,
    /// The one to go.
    pub takes: Way,
    /// Why.
    pub because: String,
    /// Pages that a governed guest may open, as a part of those that are sent.
    pub share: f64,
    /// The longest that a writer may be made to wait, in milliseconds.
    pub stall_ms: f64,
    /// The longest pause to wait for, in milliseconds.
    pub downtime_ms: f64,
    /// After so long the guest is stopped whatever that costs, in milliseconds.
    pub stop_after_ms: Option<f64>,
    /// Which promises cannot be kept, in words.
    pub gives_way: Vec<String>,
}

impl Plan {
    /// What is expected of the way that is taken.
    pub fn expected(&self) -> Option<&Course> {
        self.courses.iter().find(|course| course.way == self.takes)
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
    /// Whether the guest's writers are governed.
    pub governed: bool,
}

/// One play.
#[derive(Clone, Copy, Debug, Default)]
struct Played {
    total: f64,
    downtime: f64,
    wire: f64,
    stalled: f64,
    lacking: f64,
    governed: bool,
    ends: bool,
}

/// How the play is played.
#[derive(Clone, Copy, Debug)]
struct Rules {
    downtime: f64,
    share: f64,
    stop_after: Option<f64>,
    tail: Tail,
    /// Of the measured one.
    pace: f64,
}

impl Measured {
    /// Seconds for so many pages of which this part travels.
    fn time(&self, pages: f64, travels: f64, rules: &Rules) -> f64 {
        let bytes = pages * PAGE_SIZE as f64;
        (bytes * travels / (self.pace * rules.pace).max(1.0)).max(bytes / self.look.max(1.0))
    }

    fn wire(&self, pages: f64, travels: f64) -> f64 {
        pages * PAGE_SIZE as f64 * travels * self.wire + pages * 16.0
    }

    fn beginning(&self) -> Standing {
        Standing { left: self.present, first: true, governed: self.known_hard, ..Standing::default() }
    }

    fn play(&self, way: Way, from: &Standing, rules: &Rules) -> Played {
        let all = from.left as f64;
        match way {
            Way::PreCopy => self.rounds(from, rules),
            Way::Hybrid => {
                let first = self.time(all, self.travels, rules);
                let dirty = self.written.within(from.lasted.as_secs_f64() + first, rules.tail);
                let lacking = self.time(dirty, self.again, rules) * PUSHED;
                Played {
                    total: first + self.fixed + lacking,
                    downtime: self.fixed,
                    wire: self.wire(all, self.travels) + self.wire(dirty, self.again),
                    lacking,
                    ends: true,
                    ..Played::default()
                }
            }
            Way::PostCopy => {
                let lacking = self.time(all, self.travels, rules) * PUSHED;
                Played {
                    total: self.fixed + lacking,
                    downtime: self.fixed,
                    wire: self.wire(all, self.travels),
                    lacking,
                    ends: true,
                    ..Played::default()
                }
            }
        }
    }

    /// Pre-copy, round by round.
    fn rounds(&self, from: &Standing, rules: &Rules) -> Played {
        let mut played = Played { governed: from.governed, ..Played::default() };
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
            if !played.governed
                && outrun
                && self.time(wanted, self.again, rules) + self.fixed > rules.downtime
            {
                played.governed = true;
                changed = true;
            }
            let mut dirty = wanted;
            if played.governed {
                let free = if changed { self.written.within(all.min(NOTICED), rules.tail) } else { 0.0 };
                let slowed = if changed { (all - NOTICED).max(0.0) } else { all };
                let opened = rules.share * pages_per_s * (slowed + CREDIT.as_secs_f64());
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

    /// How much longer it will take, in seconds.
    pub fn remaining(&self, way: Way, from: &Standing, plan: &Plan) -> Option<f64> {
        let rules = Rules {
            downtime: plan.downtime_ms / 1e3,
            share: plan.share,
            stop_after: None,
            tail: Tail::Likely,
            pace: 1.0,
        };
        let played = self.play(way, from, &rules);
        played.ends.then_some(played.total)
    }
}

/// What to do, and what will come of it.
pub fn plan(measured: &Measured, want: &Terms) -> Plan {
    let mut gives_way = vec![];
    let rank = |promise| want.keep.iter().position(|kept| *kept == promise).unwrap_or(want.keep.len());
    let mut rules = Rules {
        downtime: want.downtime.as_secs_f64(),
        share: SHARE,
        stop_after: None,
        tail: Tail::Likely,
        pace: 1.0,
    };
    // What is left in the end when writers are governed, and little more than nothing where they need not be.
    let least = measured.fixed + 0.001;
    if rules.downtime < least {
        gives_way.push(format!(
            "--max-downtime {}: stopping the guest, its devices' state and starting it there take about {} by themselves",
            millis(rules.downtime),
            millis(least)
        ));
        rules.downtime = least;
    }
    let play = |rules: &Rules| measured.play(Way::PreCopy, &measured.beginning(), rules);
    let mut pre = play(&rules);
    if let Some(limit) = want.time.map(|time| time.as_secs_f64()) {
        let other = want.way.is_some_and(|way| way != Way::PreCopy) || want.post_copy;
        let late = |played: &Played| !played.ends || played.total > limit;
        for share in [0.35, 0.25, 0.15, 0.08] {
            if late(&pre) && pre.governed {
                rules.share = share;
                pre = play(&rules);
            }
        }
        if late(&pre) && !other {
            if rank(Promise::Time) < rank(Promise::Downtime) {
                rules.stop_after = Some(limit);
                pre = play(&rules);
                gives_way.push(format!(
                    "--max-downtime {}: to end within --max-time {} the guest has to be stopped with much left to send, \
                     for about {}",
                    millis(want.downtime.as_secs_f64()),
                    millis(limit),
                    millis(pre.downtime)
                ));
            } else {
                gives_way.push(format!(
                    "--max-time {}: it will take about {}",
                    millis(limit),
                    millis(pre.total)
                ));
            }
        }
    }
    // Below a page a writer and stall the share cannot be kept.
    let mut stall = want.stall.as_secs_f64();
    let opened_per_s = rules.share * measured.pace / PAGE_SIZE as f64;
    let needed = f64::from(measured.writers) / opened_per_s.max(1e-3);
    if pre.governed && needed > stall && want.way.is_none_or(|way| way == Way::PreCopy) {
        if rank(Promise::Stall) > rank(Promise::Time).min(rank(Promise::Downtime)) {
            stall = needed.min(1.0);
            gives_way.push(format!(
                "--max-stall {}: {} writers over so slow a link have to wait up to {} for each page",
                millis(want.stall.as_secs_f64()),
                measured.writers,
                millis(stall)
            ));
        } else {
            rules.share = f64::from(measured.writers) / stall / (measured.pace / PAGE_SIZE as f64).max(1e-3);
            pre = play(&rules);
            let what = if pre.ends {
                format!("it takes about {}", millis(pre.total))
            } else {
                "it may never end".into()
            };
            gives_way.push(format!(
                "--max-time, because --max-stall {} is kept: writers can be slowed so little that {what}",
                millis(want.stall.as_secs_f64())
            ));
        }
    }
    let courses = [Way::PreCopy, Way::Hybrid, Way::PostCopy].map(|way| course(measured, way, &rules));
    let (takes, because) = choose(&courses, want);
    Plan {
        courses: courses.to_vec(),
        takes,
        because,
        share: rules.share,
        stall_ms: stall * 1e3,
        downtime_ms: rules.downtime * 1e3,
        stop_after_ms: rules.stop_after.map(|s| s * 1e3),
        gives_way,
    }
}

fn course(measured: &Measured, way: Way, rules: &Rules) -> Course {
    let play = |pace, tail| measured.play(way, &measured.beginning(), &Rules { pace, tail, ..*rules });
    let likely = play(1.0, Tail::Likely);
    let well = play(1.0 + UNSURE, Tail::Ends);
    let ill = play(1.0 - UNSURE, Tail::GoesOn);
    let span = |of: fn(&Played) -> f64, scale: f64| {
        let (a, b, c) = (of(&well) * scale, of(&likely) * scale, of(&ill) * scale);
        Span { low: a.min(b).min(c), likely: b, high: a.max(b).max(c) }
    };
    Course {
        way,
        total_ms: span(|p| p.total, 1e3),
        downtime_ms: span(|p| p.downtime, 1e3),
        wire_bytes: span(|p| p.wire, 1.0),
        stalled_ms: span(|p| p.stalled, 1e3),
        lacking_ms: span(|p| p.lacking, 1e3),
        governed: likely.governed,
        ends: likely.ends,
    }
}

fn choose(courses: &[Course; 3], want: &Terms) -> (Way, String) {
    let [pre, hybrid, _] = courses;
    if let Some(way) = want.way {
        return (way, "that was asked for".into());
    }
    if !pre.governed && pre.ends {
        return (Way::PreCopy, "the guest writes less than the link carries".into());
    }
    if !want.post_copy {
        let why = "the guest writes more than the link carries, and is not to run before its memory is there: its writers \
                   are slowed";
        return (Way::PreCopy, why.into());
    }
    let (slowed, lacking) = (pre.stalled_ms.likely, hybrid.lacking_ms.likely * LACKING);
    let in_time = |course: &Course| {
        course.ends && want.time.is_none_or(|limit| course.total_ms.likely <= limit.as_secs_f64() * 1e3)
    };
    if in_time(pre) && (slowed < lacking || !in_time(hybrid)) {
        let why = format!(
            "its writers would wait {} altogether, which is kinder than to lack memory for {}",
            millis(slowed / 1e3),
            millis(hybrid.lacking_ms.likely / 1e3)
        );
        return (Way::PreCopy, why);
    }
    let why = format!(
        "it would lack memory for {}, which is kinder than to have its writers wait for {} altogether",
        millis(hybrid.lacking_ms.likely / 1e3),
        millis(slowed / 1e3)
    );
    (Way::Hybrid, why)
}

/// In words that a person would use.
fn millis(seconds: f64) -> String {
    if seconds >= 1.0 { format!("{seconds:.1} s") } else { format!("{:.1} ms", seconds * 1e3) }
}
