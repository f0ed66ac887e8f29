//! All storms: the smaller part for tests, everything for `./dev storm`, and the hunt for one planted fault.

use crate::{
    enumerate::{Counts, Enumeration},
    fault::{Again, Fault},
    link::Side,
    planted::PlantedBug,
    random::{self, KEPT, MEDDLED, SPOOLED},
    schedule::{Course, Schedule, Turn},
    setup::{Keeper, Setup, Spooling, Way},
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};
use units::Locked;

/// How much is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Size {
    /// Whether every second fault is tried behind every first, and a few kinds of turns three at a time.
    pub pairs: bool,
    /// Seeds for random runs in which others act on the VM, too; a quarter as many for storms alone, and for
    /// those over a spool, and for those to a target that keeps memory.
    pub seeds: u64,
    /// Threads that runs are shared out among; none has a thread of its own.
    pub threads: usize,
}

impl Size {
    /// What every run of the tests does: some 15 s of one core.
    pub const TEST: Self = Self { pairs: false, seeds: 40_000, threads: 1 };
    /// Everything.
    pub const STORM: Self = Self { pairs: true, seeds: 1_000_000, threads: 2 };
}

/// A broken promise.
#[derive(Clone, Debug)]
pub struct Finding {
    /// How to see it again.
    pub schedule: Schedule,
    /// What was broken.
    pub what: String,
}

/// What was run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Every storm of one or two faults.
    pub enumerated: Counts,
    /// Random ones; of these no states are counted.
    pub random: Counts,
    /// What was found.
    pub findings: Vec<Finding>,
    /// How long each of the two parts took.
    pub took: [Duration; 2],
}

/// All setups whose storms of one fault are enumerated.
fn singles(all_of_them: bool) -> Vec<Setup> {
    let mut all = Vec::new();
    for keeper in [Keeper::Target, Keeper::File, Keeper::Etcd] {
        for (way, spooling) in ways() {
            let small = Setup::small(way, keeper, spooling);
            let eager = way == Way::PreCopy;
            let large = Setup { streams: 2, rounds: 3, guest: 6, pages: 5, busy: 8, ..small };
            all.push(Setup { rounds: 2, rejoin: true, ..small });
            // Without waiting for a lost link it is the same with each record; so is what happens to a spool.
            if (eager || keeper == Keeper::Target) && spooling == Spooling::Off {
                all.push(Setup { eager, ..large });
            }
            if all_of_them || keeper == Keeper::Target || spooling == Spooling::Off {
                all.push(Setup { rejoin: true, verify: true, ..large });
            }
            if keeper == Keeper::Target && spooling == Spooling::Off {
                all.push(Setup { kept: true, rejoin: true, ..large });
                all.push(Setup { kept: true, ..small });
            }
            // A guest that writes faster than a datastore takes it; one that is not waited for.
            if spooling == Spooling::Strict && keeper == Keeper::Target {
                all.push(Setup { rounds: 3, guest: 3, ..small });
            }
        }
    }
    all
}

/// Those whose storms of two faults are.
fn pairs() -> Vec<Setup> {
    let mut all = Vec::new();
    for keeper in [Keeper::Target, Keeper::Etcd] {
        for (way, spooling) in ways() {
            let small = Setup::small(way, keeper, spooling);
            all.push(Setup { pages: 2, busy: 3, rejoin: true, ..small });
            all.push(Setup {
                streams: 2,
                rounds: 2,
                guest: 6,
                rejoin: way != Way::PostCopy,
                verify: true,
                ..small
            });
        }
    }
    all
}

/// Storms of three turns, of these few: who loses the link, who hears of it late, and who then would not go
/// on; or what a target makes of a switchover that was undone.
fn triples() -> impl Iterator<Item = (Setup, Vec<Turn>)> {
    let refuse = Turn::Fault(Fault::Refuse);
    let crash = Turn::Fault(Fault::Crash { side: Side::Target, lucky: false, again: Again::Soon });
    let tiny = |way, guest| {
        let small = Setup::small(way, Keeper::Target, Spooling::Off);
        Setup { pages: 2, busy: 3, guest, rejoin: true, ..small }
    };
    let few = |cut, third| vec![Turn::Sleep, Turn::Fault(Fault::Cut(cut)), third];
    [
        (tiny(Way::PreCopy, 1), few(0, refuse)),
        (tiny(Way::Hybrid, 2), few(1, crash)),
        (tiny(Way::Hybrid, 1), few(0, refuse)),
    ]
    .into_iter()
}

/// What others do, at every step; and in full also what befalls the agents, the link and the guest before or
/// after it.
fn meddled(all_of_them: bool) -> Vec<(Setup, u32, Vec<Turn>)> {
    let others: Vec<Turn> = Turn::others().collect();
    let crash = |side, again| Turn::Fault(Fault::Crash { side, lucky: false, again });
    let beside = [
        Turn::Sleep,
        crash(Side::Source, Again::Soon),
        crash(Side::Source, Again::Never),
        crash(Side::Target, Again::Soon),
        Turn::Fault(Fault::Fail(Side::Source)),
        Turn::Fault(Fault::Refuse),
        Turn::Fault(Fault::Cut(0)),
    ];
    let both: Vec<Turn> = others.iter().copied().chain(beside).collect();
    let mut all = Vec::new();
    for (keeper, way) in [Keeper::Target, Keeper::Etcd]
        .iter()
        .flat_map(|keeper| [Way::PreCopy, Way::Hybrid, Way::PostCopy].map(|way| (*keeper, way)))
    {
        let small = Setup { rejoin: keeper == Keeper::Target, ..Setup::small(way, keeper, Spooling::Off) };
        all.push((small, 1, others.clone()));
        all.push((Setup { paused: true, ..small }, 1, others.clone()));
        if all_of_them {
            let tiny = Setup { pages: 2, busy: 3, ..small };
            all.push((tiny, 2, both.clone()));
        }
    }
    all
}

fn ways() -> impl Iterator<Item = (Way, Spooling)> {
    use Spooling::{Off, Relaxed, Strict};
    let post = [Way::Hybrid, Way::PostCopy].into_iter();
    let post = post.flat_map(|way| [Off, Relaxed, Strict].map(|spooling| (way, spooling)));
    // A strict post-copy begins with a round: it is a hybrid one.
    let post = post.filter(|how| *how != (Way::PostCopy, Strict));
    [(Way::PreCopy, Off), (Way::PreCopy, Relaxed)].into_iter().chain(post)
}

/// Runs all storms of this size. `tell` hears how it goes.
pub fn storm(size: Size, tell: impl Fn(&str) + Sync) -> Report {
    let mut report = Report::default();
    let begin = Instant::now();
    let mut work: Vec<_> =
        singles(size.pairs).into_iter().map(|setup| (setup, 1, Turn::all().collect())).collect();
    work.extend(meddled(size.pairs));
    if size.pairs {
        work.extend(pairs().into_iter().map(|setup| (setup, 2, Turn::all().collect())));
        work.extend(triples().map(|(setup, few)| (setup, 3, few)));
    }
    let all = Mutex::new((Counts::default(), Vec::new()));
    let next = AtomicUsize::new(0);
    shared_out(size.threads, || {
        while let Some((setup, turns, among)) = work.get(next.fetch_add(1, Relaxed)) {
            let done = catch_unwind(|| Enumeration::run(*setup, None, *turns, among));
            let mut all = all.locked();
            match done {
                Ok(done) => {
                    tell(&format!(
                        "{setup}, {turns} at a time: {} schedules, {} states",
                        done.counts.schedules, done.counts.states
                    ));
                    all.0.add(done.counts);
                    all.1.extend(done.found.map(|(schedule, what)| Finding { schedule, what }));
                }
                Err(_) => {
                    let schedule = Schedule { bug: None, course: Course::Enumerated(*setup, vec![]) };
                    all.1.push(Finding { schedule, what: "a panic, in some storm of this setup".into() });
                }
            }
        }
    });
    (report.enumerated, report.findings) = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.took[0] = begin.elapsed();

    let begin = Instant::now();
    let next = AtomicU64::new(0);
    let all = Mutex::new((Counts::default(), Vec::new()));
    shared_out(size.threads, || {
        /// Seeds that a thread takes at a time.
        const SHARE: u64 = 1000;
        loop {
            let from = next.fetch_add(SHARE, Relaxed);
            if from >= size.seeds {
                return;
            }
            let to = (from + SHARE).min(size.seeds);
            let (mut counts, mut findings) = seeds(from / 4..to / 4, None, false);
            let quarter = |first| first + from / 4..first + to / 4;
            for first in [quarter(SPOOLED), quarter(KEPT), MEDDLED + from..MEDDLED + to] {
                let (more, found) = seeds(first, None, false);
                counts.add(more);
                findings.extend(found);
            }
            let mut all = all.locked();
            all.0.add(counts);
            all.1.extend(findings);
            if all.0.schedules.is_multiple_of(150_000) {
                tell(&format!("{} at random", all.0.schedules));
            }
        }
    });
    let (counts, findings) = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.random = counts;
    report.findings.extend(findings);
    report.took[1] = begin.elapsed();
    report
}

/// Random runs from these seeds.
fn seeds(range: std::ops::Range<u64>, bug: Option<PlantedBug>, first: bool) -> (Counts, Vec<Finding>) {
    let mut counts = Counts::default();
    let mut findings = Vec::new();
    for seed in range {
        let ended = catch_unwind(AssertUnwindSafe(|| random::run(seed, bug, false)));
        let what = match ended {
            Ok(mut world) => {
                counts.moves += u64::from(world.steps.0);
                counts.faults += u64::from(world.faults.0);
                world.breach.0.take()
            }
            Err(_) => Some("a panic".into()),
        };
        counts.schedules += 1;
        if let Some(what) = what {
            findings.push(Finding { schedule: Schedule { bug, course: Course::Random(seed) }, what });
            if first {
                break;
            }
        }
    }
    (counts, findings)
}

/// Hunts for one planted fault with what the tests run; returns the first run that shows it, and how many it
/// took.
pub fn hunt(bug: PlantedBug) -> (Option<Finding>, u64) {
    /// Most show themselves soon, somewhere; this takes some seconds.
    const FIRST: u64 = 20_000;
    let mut runs = 0;
    let kinds: &[u64] = match bug {
        _ if bug.is_of_spool() => &[SPOOLED, 0],
        _ if bug.is_of_others() => &[MEDDLED],
        _ if bug.is_of_kept() => &[KEPT],
        _ => &[0],
    };
    for first in kinds.iter().copied() {
        let (counts, mut findings) = seeds(first..first + FIRST, Some(bug), true);
        runs += counts.schedules;
        if let Some(finding) = findings.pop() {
            return (Some(finding), runs);
        }
    }
    let others = meddled(true).into_iter().filter(|_| bug.is_of_others());
    let few = triples().take(2).map(|(setup, few)| (setup, 3, few));
    // Those with most in them first.
    let all = singles(false).into_iter().rev().map(|setup| (setup, 1, Turn::all().collect()));
    for (setup, turns, among) in others.chain(few).chain(all) {
        let done = Enumeration::run(setup, Some(bug), turns, &among);
        runs += done.counts.schedules;
        if let Some((schedule, what)) = done.found {
            return (Some(Finding { schedule, what }), runs);
        }
    }
    (None, runs)
}

fn shared_out(threads: usize, work: impl Fn() + Sync) {
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(&work);
        }
        work();
    });
}
