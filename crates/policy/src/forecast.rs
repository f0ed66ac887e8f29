//! What a migration will take, said before anything moves: how long, how much traffic, which pause, and what the guest feels.
//!
//! A migration is played through with what was measured: the guest's working set, how its content shrinks, the link. It is played
//! three times, because each of these is only known so well: as is likely, and with everything somewhat better or worse.

use crate::governor::{CREDIT, OUTRUN, SHARE, share_of_round};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use units::PAGE_SIZE;

/// By how much the pace may be better or worse than measured; in `./dev bench` half of the forecasts are nearer than that.
const UNSURE: f64 = 0.12;

/// What it costs a guest to lack memory, compared with a writer that waits as long: it waits for some pages only.
const LACKING: f64 = 0.5;

/// Pages pushed to a running guest travel so much slower than before it runs: each is looked at by itself.
const PUSHED: f64 = 1.1;

/// A guest that has to be stopped for its migration to end in time is stopped so much earlier: the last pages may take longer.
const SURELY: f64 = 0.92;

/// Rounds after which there is no end in sight.
const MANY: u32 = 40;

/// Who writes so many times what the link carries is governed from the start, without being watched in the first round.
pub const HARD: f64 = 2.0;

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

    /// Pages a second that had not been written before, in the second half of the watch.
    pub fn new_per_s(&self) -> f64 {
        self.seen.last().map_or(0.0, |(end, all)| (all - self.within(end / 2.0, Tail::Likely)) / (end / 2.0))
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
    /// How many bytes that do not travel are dealt with in a second.
    pub look: f64,
    /// What a switchover costs besides memory, in seconds.
    pub fixed: f64,
    /// How many threads of the guest may write at a time.
    pub writers: u32,
    /// Whether its writers are governed from the start: because they had to be before, or write far more than the link carries.
    pub hard: bool,
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
    /// The longest migration, if that matters, and how much of it has passed.
    pub time: Option<Duration>,
    /// See `time`.
    pub passed: Duration,
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
        bytes * travels / (self.pace * rules.pace).max(1.0) + bytes * (1.0 - travels) / self.look.max(1.0)
    }

    fn wire(&self, pages: f64, travels: f64) -> f64 {
        pages * PAGE_SIZE as f64 * travels * self.wire + pages * 16.0
    }

    fn beginning(&self) -> Standing {
        Standing { left: self.present, first: true, governed: self.hard, ..Standing::default() }
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
    let mut least = measured.fixed + 0.001;
    let play = |rules: &Rules| measured.play(Way::PreCopy, &measured.beginning(), rules);
    let mut pre = play(&Rules { downtime: rules.downtime.max(least), ..rules });
    if pre.governed && !pre.ends {
        // What governed writers leave in the end: what they may have saved up, again and again.
        least += CREDIT.as_secs_f64() * rules.share / (1.0 - rules.share);
    }
    if rules.downtime < least {
        gives_way.push(format!(
            "--max-downtime {}: stopping the guest, its devices' state and starting it there take about {} by themselves",
            millis(rules.downtime),
            millis(least)
        ));
        rules.downtime = least;
    }
    pre = play(&rules);
    if let Some(time) = want.time {
        let limit = time.saturating_sub(want.passed).as_secs_f64();
        let time = time.as_secs_f64();
        let other = want.way.is_some_and(|way| way != Way::PreCopy) || want.post_copy;
        let late = |played: &Played| !played.ends || played.total > limit;
        for share in [0.35, 0.25, 0.15, 0.08] {
            if late(&pre) && pre.governed {
                rules.share = share;
                pre = play(&rules);
            }
        }
        let punctual = rank(Promise::Time) < rank(Promise::Downtime) && !other;
        if punctual {
            // Also where it should not be needed: a forecast may be wrong.
            rules.stop_after = Some(limit * SURELY);
        }
        if late(&pre) && !other {
            if punctual {
                pre = play(&rules);
                gives_way.push(format!(
                    "--max-downtime {}: to end within --max-time {} the guest has to be stopped with much left to send, \
                     for about {}",
                    millis(want.downtime.as_secs_f64()),
                    millis(time),
                    millis(pre.downtime)
                ));
            } else {
                let total = pre.total + want.passed.as_secs_f64();
                gives_way.push(format!("--max-time {}: it will take about {}", millis(time), millis(total)));
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
        course.ends
            && want.time.is_none_or(|time| {
                course.total_ms.likely <= time.saturating_sub(want.passed).as_secs_f64() * 1e3
            })
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: f64 = (1 << 20) as f64;
    /// Of a GiB.
    const PAGES: u64 = 1 << 18;

    /// A GiB of which all travels as it is, over a link of so many MiB a second; the guest writes so many MiB a second in new
    /// places of so many MiB.
    fn guest(link: f64, rate: f64, set: f64) -> Measured {
        let mut written = WorkingSet::of(PAGES);
        for ms in [125, 250, 500, 1000] {
            let pages = (rate * f64::from(ms) / 1e3).min(set) * MIB / PAGE_SIZE as f64;
            written.see(Duration::from_millis(ms.try_into().unwrap()), pages as u64);
        }
        let hard = written.new_per_s() * PAGE_SIZE as f64 >= HARD * link * MIB;
        Measured {
            present: PAGES,
            written,
            travels: 1.0,
            again: 1.0,
            pace: link * MIB,
            wire: 1.0,
            look: 4e9,
            fixed: 0.008,
            writers: 2,
            hard,
        }
    }

    fn terms() -> Terms {
        Terms {
            downtime: Duration::from_millis(20),
            time: None,
            passed: Duration::ZERO,
            stall: Duration::from_millis(5),
            keep: [Promise::Downtime, Promise::Time, Promise::Stall],
            way: None,
            post_copy: false,
        }
    }

    fn seconds(course: &Course) -> f64 {
        course.total_ms.likely / 1e3
    }

    #[test]
    fn a_quiet_guest_takes_one_copy() {
        let plan = plan(&guest(100.0, 0.1, 1.0), &terms());
        let course = plan.expected().unwrap();
        assert!(!course.governed && course.ends && plan.gives_way.is_empty(), "{plan:?}");
        assert!((10.2..10.6).contains(&seconds(course)), "1024 MiB at 100: {course:?}");
        assert!((1024.0..1040.0).contains(&(course.wire_bytes.likely / MIB)), "{course:?}");
        assert!(course.downtime_ms.likely <= 20.0 && course.stalled_ms.likely == 0.0, "{course:?}");
        assert!(
            course.total_ms.low < course.total_ms.likely && course.total_ms.likely < course.total_ms.high
        );
    }

    #[test]
    fn a_small_working_set_converges_whatever_its_rate() {
        // 300 MiB/s within 1 MiB: each round leaves no more than that, which is 10 ms.
        let plan = plan(&guest(100.0, 300.0, 1.0), &terms());
        assert!(!plan.expected().unwrap().governed, "{plan:?}");
    }

    #[test]
    fn a_guest_that_outruns_the_link_is_governed_and_ends() {
        for rate in [120.0, 200.0, 500.0] {
            let plan = plan(&guest(100.0, rate, 900.0), &terms());
            let course = plan.expected().unwrap();
            assert!(course.governed && course.ends && course.downtime_ms.likely <= 20.0, "{course:?}");
            assert!(seconds(course) < 2.0 * 10.24, "within twice a copy: {course:?}");
            assert!(course.stalled_ms.likely > 1000.0, "{course:?}");
        }
    }

    #[test]
    fn the_way_that_is_kinder_is_taken_where_it_is_allowed() {
        let free = Terms { post_copy: true, ..terms() };
        let hard = plan(&guest(100.0, 500.0, 200.0), &free);
        assert_eq!(hard.takes, Way::Hybrid, "2 s of lacking memory or many of waiting: {hard:?}");
        assert!(hard.because.contains("kinder"));
        assert_eq!(plan(&guest(100.0, 1.0, 50.0), &free).takes, Way::PreCopy);
        let asked = Terms { way: Some(Way::PostCopy), ..free };
        assert_eq!(plan(&guest(100.0, 500.0, 200.0), &asked).takes, Way::PostCopy);
    }

    #[test]
    fn promises_that_cannot_all_be_kept_give_way_in_their_order() {
        let limit = |time, keep| {
            plan(
                &guest(100.0, 300.0, 900.0),
                &Terms { time: Some(Duration::from_secs(time)), keep, ..terms() },
            )
        };
        let usual = [Promise::Downtime, Promise::Time, Promise::Stall];
        // Enough: slowing more is all that it takes.
        let plan_15 = limit(15, usual);
        assert!(plan_15.gives_way.is_empty() && plan_15.share < SHARE, "{plan_15:?}");
        assert!(seconds(plan_15.expected().unwrap()) <= 15.0);
        // Less than a copy takes: the time gives way, or the pause.
        let late = limit(8, usual);
        assert!(late.gives_way[0].starts_with("--max-time 8.0 s: it will take about"), "{late:?}");
        assert_eq!(late.stop_after_ms, None);
        let paused = limit(11, [Promise::Time, Promise::Downtime, Promise::Stall]);
        assert!(
            paused.gives_way[0].starts_with("--max-downtime 20.0 ms: to end within --max-time 11.0 s"),
            "{paused:?}"
        );
        assert!(paused.stop_after_ms.is_some_and(|ms| (10_000.0..11_000.0).contains(&ms)), "{paused:?}");
        // A pause that no switchover fits into.
        let tight = plan(&guest(100.0, 1.0, 1.0), &Terms { downtime: Duration::from_millis(2), ..terms() });
        assert!(tight.gives_way[0].starts_with("--max-downtime 2.0 ms: stopping the guest"), "{tight:?}");
        assert!(tight.expected().unwrap().ends);
        // A link so slow that a page for each writer and stall is too much.
        let slow = guest(1.0, 50.0, 900.0);
        let stall = plan(&slow, &terms());
        assert!(stall.stall_ms > 5.0 && stall.gives_way[0].starts_with("--max-stall 5.0 ms"), "{stall:?}");
        let kept =
            plan(&slow, &Terms { keep: [Promise::Stall, Promise::Downtime, Promise::Time], ..terms() });
        assert!(kept.stall_ms == 5.0 && kept.gives_way[0].contains("--max-stall 5.0 ms is kept"), "{kept:?}");
    }

    #[test]
    fn what_was_seen_goes_on_between_its_two_ends() {
        let mut random = WorkingSet::of(PAGES);
        // Random writes to 50,000 pages, 50,000 a second.
        let truth = |s: f64| 50_000.0 * (1.0 - (-s).exp());
        for ms in [125u64, 250, 500, 1000] {
            random.see(Duration::from_millis(ms), truth(ms as f64 / 1e3) as u64);
        }
        for later in [2.0, 4.0, 20.0] {
            let (ends, goes_on) = (random.within(later, Tail::Ends), random.within(later, Tail::GoesOn));
            assert!(
                ends <= goes_on && (ends / truth(later) - 1.0).abs() < 0.1,
                "{later}: {ends} of {}",
                truth(later)
            );
        }
        assert!((random.within(0.3, Tail::Likely) / truth(0.3) - 1.0).abs() < 0.1);
        assert_eq!(random.within(1e9, Tail::GoesOn), PAGES as f64, "no more than there is");
        assert_eq!(WorkingSet::of(9).within(1.0, Tail::Likely), 0.0);
    }

    #[test]
    fn what_remains_shrinks_as_it_goes() {
        let measured = guest(100.0, 20.0, 900.0);
        let plan = plan(&measured, &terms());
        let at = |left, ms, first| {
            let standing = Standing { left, lasted: Duration::from_millis(ms), first, governed: false };
            measured.remaining(Way::PreCopy, &standing, &plan).unwrap()
        };
        let begin = at(PAGES, 0, true);
        assert!((begin * 1e3 / plan.expected().unwrap().total_ms.likely - 1.0).abs() < 0.01);
        let later = at(PAGES / 2, 5120, true);
        assert!((begin - 5.12 - later).abs() < 0.3, "half of the first round: {begin} and {later}");
        assert!(at(1000, 100, false) < 1.0);
    }

    proptest! {
        #[test]
        fn no_promise_is_broken_without_a_word(
            link in 1.0f64..5000.0,
            rate in 0.0f64..2000.0,
            set in 1.0f64..1024.0,
            downtime_ms in 1u64..200,
            time_s in proptest::option::of(1u64..100),
            keep in Just([Promise::Downtime, Promise::Time, Promise::Stall]).prop_shuffle(),
        ) {
            let want = Terms {
                downtime: Duration::from_millis(downtime_ms),
                time: time_s.map(Duration::from_secs),
                keep,
                ..terms()
            };
            let plan = plan(&guest(link, rate, set), &want);
            let course = plan.expected().unwrap();
            let said = |word: &str| plan.gives_way.iter().any(|text| text.starts_with(word));
            prop_assert!(course.ends || said("--max-time"), "{plan:?}");
            if let (true, Some(limit)) = (course.ends, time_s) {
                prop_assert!(seconds(course) <= limit as f64 * 1.001 || said("--max-time") || said("--max-downtime"), "{plan:?}");
            }
            prop_assert!(!course.ends || course.downtime_ms.likely <= downtime_ms as f64 + 0.01 || said("--max-downtime"), "{plan:?}");
            prop_assert!(plan.stall_ms <= 5.0 || said("--max-stall"), "{plan:?}");
            for way in &plan.courses {
                for span in [way.total_ms, way.downtime_ms, way.wire_bytes, way.stalled_ms, way.lacking_ms] {
                    prop_assert!(span.low <= span.likely && span.likely <= span.high && span.low >= 0.0 && span.high.is_finite());
                }
            }
        }
    }
}
