//! Which way a migration goes, and which promises it can keep: said before anything moves.

use crate::{
    forecast::{Estimate, Measured, Played, Rules, Way},
    throttle::{CREDIT, SHARE},
};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use units::PAGE_SIZE;

/// What it costs a guest to lack memory, compared with a writer that waits as long: it waits for some pages
/// only.
const MISSING: f64 = 0.5;

/// A guest that has to be stopped for its migration to end in time is stopped so much earlier: the last pages
/// may take longer.
const SURELY: f64 = 0.92;

/// Writers wait no longer than that whatever gives way: a guest's kernel complains of vCPUs that hang.
pub const LONGEST_STALL: Duration = Duration::from_secs(1);

/// What the user was promised.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// The longest pause.
    Downtime,
    /// The longest migration.
    Time,
    /// The longest wait of a writer.
    Stall,
}

impl Limit {
    /// What is kept first, where not all can be: the pause, because peers of the guest notice it; then the
    /// end.
    pub const USUAL: [Self; 3] = [Self::Downtime, Self::Time, Self::Stall];
}

/// What the user wants.
#[derive(Clone, PartialEq, Debug)]
pub struct Limits {
    /// The longest pause.
    pub downtime: Duration,
    /// The longest migration, if that matters, and how much of it has passed.
    pub time: Option<Duration>,
    /// See `time`.
    pub passed: Duration,
    /// The longest that a writer may be made to wait.
    pub stall: Duration,
    /// Which of these is kept first, where not all can be.
    pub keep: [Limit; 3],
    /// The way, if it is not to be found out.
    pub way: Option<Way>,
    /// Whether the guest may run before all its memory is there.
    pub post_copy: bool,
}

/// What is done, and what is expected of it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// All ways.
    pub estimates: Vec<Estimate>,
    /// The one to go.
    pub takes: Way,
    /// Why.
    pub because: String,
    /// Pages that a throttled guest may open, as a part of those that are sent.
    pub share: f64,
    /// The longest that a writer may be made to wait, in milliseconds.
    pub stall_ms: f64,
    /// The longest pause to wait for, in milliseconds.
    pub downtime_ms: f64,
    /// After so long the guest is stopped whatever that costs, in milliseconds.
    pub stop_after_ms: Option<f64>,
    /// How long a stop waits for the guest's disks if it meets them at work, in milliseconds.
    #[serde(default)]
    pub drain_ms: f64,
    /// For which part of the time they are at work, in percent.
    #[serde(default)]
    pub disks_busy_percent: f64,
    /// Which promises cannot be kept, in words.
    pub violated: Vec<String>,
}

impl Plan {
    /// What is expected of the way that is taken.
    pub fn expected(&self) -> Option<&Estimate> {
        self.estimates.iter().find(|estimate| estimate.way == self.takes)
    }
}

/// What to do, and what will come of it.
pub fn plan(measured: &Measured, want: &Limits) -> Plan {
    let rules = Rules { downtime: want.downtime.as_secs_f64(), share: SHARE, ..Rules::default() };
    let mut deal = Deal { measured, want, rules, stall: want.stall.as_secs_f64(), violated: vec![] };
    let least = deal.pause();
    deal.disks(least);
    deal.end();
    deal.stalls();
    deal.punctuality();
    let Deal { rules, stall, violated, .. } = deal;
    let estimates = [Way::PreCopy, Way::Hybrid, Way::PostCopy].map(|way| measured.estimate(way, &rules));
    let (takes, because) = choose(&estimates, want);
    Plan {
        estimates: estimates.to_vec(),
        takes,
        because,
        share: rules.share,
        stall_ms: stall * 1e3,
        downtime_ms: rules.downtime * 1e3,
        stop_after_ms: rules.stop_after.map(|s| s * 1e3),
        drain_ms: measured.drain.wait * 1e3,
        disks_busy_percent: measured.drain.busy * 100.0,
        violated,
    }
}

/// What is promised for pre-copy, as far as it was found out; only pre-copy takes any of it back.
struct Deal<'a> {
    measured: &'a Measured,
    want: &'a Limits,
    rules: Rules,
    /// The longest wait of a writer.
    stall: f64,
    violated: Vec<String>,
}

impl Deal<'_> {
    fn play(&self, rules: &Rules) -> Played {
        self.measured.play(Way::PreCopy, &self.measured.beginning(), rules)
    }

    /// Whether the one is kept rather than the other.
    fn prefers(&self, this: Limit, to: Limit) -> bool {
        let rank = |promise| self.want.keep.iter().position(|kept| *kept == promise);
        rank(this) < rank(to)
    }

    /// Whether another way may be taken where pre-copy keeps no promise.
    fn may_go_otherwise(&self) -> bool {
        self.want.post_copy || self.want.way.is_some_and(|way| way != Way::PreCopy)
    }

    /// When it has to be over, counted from the first page.
    fn limit(&self) -> Option<f64> {
        self.want.time.map(|time| time.saturating_sub(self.want.passed).as_secs_f64())
    }

    /// A pause that a switchover fits into. Says how long that is at least.
    fn pause(&mut self) -> f64 {
        let mut least = self.measured.fixed + 0.001;
        let played = self.play(&Rules { downtime: self.rules.downtime.max(least), ..self.rules });
        if played.throttled && !played.ends {
            // What throttled writers leave in the end: what they may have saved up, again and again.
            least += CREDIT.as_secs_f64() * self.rules.share / (1.0 - self.rules.share);
        }
        if self.rules.downtime < least {
            self.violated.push(format!(
                "--max-downtime {}: stopping the guest, its devices' state and starting it there take about \
                 {} by themselves",
                millis(self.rules.downtime),
                millis(least)
            ));
            self.rules.downtime = least;
        }
        least
    }

    /// Disks that are always busy take their part of the pause. If that leaves too little for memory, it
    /// gives way to them: more of it would not make the pause shorter, and rounds would not end.
    fn disks(&mut self, least: f64) {
        let drain = self.measured.drain.likely();
        if drain <= (self.rules.downtime - least) / 2.0 {
            self.rules.downtime -= drain;
            return;
        }
        self.violated.push(format!(
            "--max-downtime {}: stopping the guest waits about {} for its disks, which are always busy, and \
             the rest takes {}; allow a longer pause, or move it when it does less with its disks",
            words(self.want.downtime),
            millis(drain),
            millis(least)
        ));
    }

    /// Writers are slowed more where it would take too long.
    fn end(&mut self) {
        let Some((time, limit)) = self.want.time.zip(self.limit()) else { return };
        let late = |played: &Played| !played.ends || played.total > limit;
        let mut played = self.play(&self.rules);
        for share in [0.35, 0.25, 0.15, 0.08] {
            if late(&played) && played.throttled {
                self.rules.share = share;
                played = self.play(&self.rules);
            }
        }
        if late(&played) && !self.prefers(Limit::Time, Limit::Downtime) && !self.may_go_otherwise() {
            self.takes_longer(time, &played);
        }
    }

    fn takes_longer(&mut self, than: Duration, played: &Played) {
        let total = played.total + self.want.passed.as_secs_f64();
        self.violated.push(format!("--max-time {}: it will take about {}", words(than), millis(total)));
    }

    /// Below a page a writer and stall the share cannot be kept.
    fn stalls(&mut self) {
        let writers = f64::from(self.measured.writers);
        let sent_per_s = (self.measured.pace / PAGE_SIZE as f64).max(1e-3);
        let needed = writers / (self.rules.share * sent_per_s);
        let pre_copy = self.want.way.is_none_or(|way| way == Way::PreCopy);
        if !pre_copy || needed <= self.stall || !self.play(&self.rules).throttled {
            return;
        }
        let asked = words(self.want.stall);
        if self.prefers(Limit::Stall, Limit::Time) && self.prefers(Limit::Stall, Limit::Downtime) {
            self.rules.share = writers / self.stall / sent_per_s;
            let played = self.play(&self.rules);
            let what = if played.ends {
                format!("it takes about {}", millis(played.total))
            } else {
                "it may never end".into()
            };
            self.violated.push(format!(
                "--max-time, because --max-stall {asked} is kept: writers can be slowed so little that {what}"
            ));
        } else {
            self.stall = needed.min(LONGEST_STALL.as_secs_f64());
            self.violated.push(format!(
                "--max-stall {asked}: {} writers over so slow a link have to wait up to {} for each page",
                self.measured.writers,
                millis(self.stall)
            ));
        }
    }

    /// Where the end is kept rather than the pause, the guest is stopped in time with whatever is left to
    /// send. Also where that should not be needed: a forecast may be wrong.
    fn punctuality(&mut self) {
        let Some((time, limit)) = self.want.time.zip(self.limit()) else { return };
        if self.may_go_otherwise() || !self.prefers(Limit::Time, Limit::Downtime) {
            return;
        }
        self.rules.stop_after = Some(limit * SURELY);
        let played = self.play(&self.rules);
        if played.total > limit {
            self.takes_longer(time, &played);
        }
        let pause = played.downtime;
        if pause > self.rules.downtime {
            self.violated.push(format!(
                "--max-downtime {}: to end within --max-time {} the guest has to be stopped with much left \
                 to send, for about {}",
                words(self.want.downtime),
                words(time),
                millis(pause)
            ));
        }
    }
}

fn choose(estimates: &[Estimate; 3], want: &Limits) -> (Way, String) {
    let [pre, hybrid, _] = estimates;
    if let Some(way) = want.way {
        return (way, "that was asked for".into());
    }
    if !pre.throttled && pre.ends {
        return (Way::PreCopy, "the guest writes less than the link carries".into());
    }
    if !want.post_copy {
        let why = "the guest writes more than the link carries, and is not to run before its memory is \
                   there: its writers are slowed";
        return (Way::PreCopy, why.into());
    }
    let (slowed, missing) = (pre.stalled_ms.likely, hybrid.missing_ms.likely * MISSING);
    let in_time = |estimate: &Estimate| {
        estimate.ends
            && want.time.is_none_or(|time| {
                estimate.total_ms.likely <= time.saturating_sub(want.passed).as_secs_f64() * 1e3
            })
    };
    if in_time(pre) && (slowed < missing || !in_time(hybrid)) {
        let why = format!(
            "its writers would wait {} altogether, which is kinder than to lack memory for {}",
            millis(slowed / 1e3),
            millis(hybrid.missing_ms.likely / 1e3)
        );
        return (Way::PreCopy, why);
    }
    let why = format!(
        "it would lack memory for {}, which is kinder than to have its writers wait for {} altogether",
        millis(hybrid.missing_ms.likely / 1e3),
        millis(slowed / 1e3)
    );
    (Way::Hybrid, why)
}

fn words(time: Duration) -> String {
    millis(time.as_secs_f64())
}

/// In words that a person would use.
fn millis(seconds: f64) -> String {
    if seconds >= 1.0 { format!("{seconds:.1} s") } else { format!("{:.1} ms", seconds * 1e3) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        disks::Drain,
        forecast::{HARD, Standing},
        working_set::WorkingSet,
    };
    use proptest::prelude::*;

    const MIB: f64 = (1 << 20) as f64;
    /// Of a GiB.
    const PAGES: u64 = 1 << 18;

    /// A GiB of which all travels as it is, over a link of so many MiB a second; the guest writes so many MiB
    /// a second in new places of so many MiB.
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
            unthrottleable: false,
            drain: Drain::default(),
        }
    }

    fn limits() -> Limits {
        Limits {
            downtime: Duration::from_millis(20),
            time: None,
            passed: Duration::ZERO,
            stall: Duration::from_millis(5),
            keep: Limit::USUAL,
            way: None,
            post_copy: false,
        }
    }

    fn seconds(estimate: &Estimate) -> f64 {
        estimate.total_ms.likely / 1e3
    }

    #[test]
    fn a_quiet_guest_takes_one_copy() {
        let plan = plan(&guest(100.0, 0.1, 1.0), &limits());
        let estimate = plan.expected().unwrap();
        assert!(!estimate.throttled && estimate.ends && plan.violated.is_empty(), "{plan:?}");
        assert!((10.2..10.6).contains(&seconds(estimate)), "1024 MiB at 100: {estimate:?}");
        assert!((1024.0..1040.0).contains(&(estimate.wire_bytes.likely / MIB)), "{estimate:?}");
        assert!(estimate.downtime_ms.likely <= 20.0 && estimate.stalled_ms.likely == 0.0, "{estimate:?}");
        assert!(
            estimate.total_ms.low < estimate.total_ms.likely
                && estimate.total_ms.likely < estimate.total_ms.high
        );
    }

    #[test]
    fn a_small_working_set_converges_whatever_its_rate() {
        // 300 MiB/s within 1 MiB: each round leaves no more than that, which is 10 ms.
        let plan = plan(&guest(100.0, 300.0, 1.0), &limits());
        assert!(!plan.expected().unwrap().throttled, "{plan:?}");
    }

    #[test]
    fn a_guest_that_outruns_the_link_is_governed_and_ends() {
        for rate in [120.0, 200.0, 500.0] {
            let plan = plan(&guest(100.0, rate, 900.0), &limits());
            let estimate = plan.expected().unwrap();
            assert!(
                estimate.throttled && estimate.ends && estimate.downtime_ms.likely <= 20.0,
                "{estimate:?}"
            );
            assert!(seconds(estimate) < 2.0 * 10.24, "within twice a copy: {estimate:?}");
            assert!(estimate.stalled_ms.likely > 1000.0, "{estimate:?}");
        }
    }

    #[test]
    fn the_way_that_is_kinder_is_taken_where_it_is_allowed() {
        let free = Limits { post_copy: true, ..limits() };
        let hard = plan(&guest(100.0, 500.0, 200.0), &free);
        assert_eq!(hard.takes, Way::Hybrid, "2 s of missing memory or many of waiting: {hard:?}");
        assert!(hard.because.contains("kinder"));
        assert_eq!(plan(&guest(100.0, 1.0, 50.0), &free).takes, Way::PreCopy);
        let asked = Limits { way: Some(Way::PostCopy), ..free };
        assert_eq!(plan(&guest(100.0, 500.0, 200.0), &asked).takes, Way::PostCopy);
    }

    #[test]
    fn promises_that_cannot_all_be_kept_give_way_in_their_order() {
        let limit = |time, keep| {
            plan(
                &guest(100.0, 300.0, 900.0),
                &Limits { time: Some(Duration::from_secs(time)), keep, ..limits() },
            )
        };
        // Enough: slowing more is all that it takes.
        let plan_15 = limit(15, Limit::USUAL);
        assert!(plan_15.violated.is_empty() && plan_15.share < SHARE, "{plan_15:?}");
        assert!(seconds(plan_15.expected().unwrap()) <= 15.0);
        // Less than a copy takes: the time gives way, or the pause.
        let late = limit(8, Limit::USUAL);
        assert!(late.violated[0].starts_with("--max-time 8.0 s: it will take about"), "{late:?}");
        assert_eq!(late.stop_after_ms, None);
        let paused = limit(12, [Limit::Time, Limit::Downtime, Limit::Stall]);
        assert!(
            paused.violated[0].starts_with("--max-downtime 20.0 ms: to end within --max-time 12.0 s"),
            "{paused:?}"
        );
        assert!(paused.stop_after_ms.is_some_and(|ms| (11_000.0..12_000.0).contains(&ms)), "{paused:?}");
        // A pause that no switchover fits into.
        let tight = plan(&guest(100.0, 1.0, 1.0), &Limits { downtime: Duration::from_millis(2), ..limits() });
        assert!(tight.violated[0].starts_with("--max-downtime 2.0 ms: stopping the guest"), "{tight:?}");
        assert!(tight.expected().unwrap().ends);
        // A link so slow that a page for each writer and stall is too much.
        let slow = guest(1.0, 50.0, 900.0);
        let stall = plan(&slow, &limits());
        assert!(stall.stall_ms > 5.0 && stall.violated[0].starts_with("--max-stall 5.0 ms"), "{stall:?}");
        let kept = plan(&slow, &Limits { keep: [Limit::Stall, Limit::Downtime, Limit::Time], ..limits() });
        assert!(kept.stall_ms == 5.0 && kept.violated[0].contains("--max-stall 5.0 ms is kept"), "{kept:?}");
    }

    #[test]
    fn a_plan_says_what_the_disks_do_to_the_pause() {
        let with = |wait: f64, busy: f64| {
            let measured = Measured { drain: Drain { wait, busy }, ..guest(100.0, 0.1, 1.0) };
            plan(&measured, &limits())
        };
        let downtime = |plan: &Plan| plan.expected().unwrap().downtime_ms;
        let none = with(0.0, 0.0);
        // Always busy and slow: the limit cannot hold. Memory's part of the pause stays as it is.
        let slow = with(0.5, 1.0);
        assert!(
            slow.violated[0].starts_with("--max-downtime 20.0 ms: stopping the guest waits about 500.0 ms"),
            "{slow:?}"
        );
        assert_eq!((slow.violated.len(), slow.downtime_ms, slow.drain_ms), (1, 20.0, 500.0));
        assert!((downtime(&slow).likely - downtime(&none).likely - 500.0).abs() < 0.1, "{slow:?}");
        // Busy now and then: another moment is taken, most likely.
        let bursts = with(0.5, 0.5);
        assert!(bursts.violated.is_empty() && bursts.disks_busy_percent == 50.0, "{bursts:?}");
        assert_eq!(downtime(&bursts).likely, downtime(&none).likely);
        assert!(downtime(&bursts).high > 500.0);
        // Always busy and quick: both fit.
        let quick = with(0.004, 1.0);
        assert!(quick.violated.is_empty() && quick.downtime_ms == 16.0, "{quick:?}");
        assert!(downtime(&quick).likely <= 20.0, "{quick:?}");
    }

    #[test]
    fn what_remains_shrinks_as_it_goes() {
        let measured = guest(100.0, 20.0, 900.0);
        let plan = plan(&measured, &limits());
        let at = |left, ms, first| {
            let standing = Standing { left, lasted: Duration::from_millis(ms), first, throttled: false };
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
            wait in proptest::option::of(0.0f64..0.1),
            busy in 0.0f64..1.0,
            keep in Just(Limit::USUAL).prop_shuffle(),
        ) {
            let want = Limits {
                downtime: Duration::from_millis(downtime_ms),
                time: time_s.map(Duration::from_secs),
                keep,
                ..limits()
            };
            let drain = Drain { wait: wait.unwrap_or_default(), busy };
            let plan = plan(&Measured { drain, ..guest(link, rate, set) }, &want);
            let estimate = plan.expected().unwrap();
            let said = |word: &str| plan.violated.iter().any(|text| text.starts_with(word));
            prop_assert!(estimate.ends || said("--max-time"), "{plan:?}");
            if let (true, Some(limit)) = (estimate.ends, time_s) {
                prop_assert!(seconds(estimate) <= limit as f64 * 1.001 || said("--max-time"), "{plan:?}");
            }
            prop_assert!(!estimate.ends || estimate.downtime_ms.likely <= downtime_ms as f64 + 0.01
                || said("--max-downtime"), "{plan:?}");
            prop_assert!(plan.stall_ms <= 5.0 || said("--max-stall"), "{plan:?}");
            for way in &plan.estimates {
                for span in [way.total_ms, way.downtime_ms, way.wire_bytes, way.stalled_ms, way.missing_ms] {
                    prop_assert!(span.low <= span.likely && span.likely <= span.high && span.low >= 0.0
                        && span.high.is_finite());
                }
            }
        }
    }
}
