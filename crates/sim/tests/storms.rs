//! The smaller part of all storms: no promise is broken in any of them.

use sim::{End, Keeper, Schedule, Setup, Side, Size, Spooling, Turn, Way, storm};

/// As many different runs as are enumerated at least.
const ENUMERATED: u64 = 100_000;

#[test]
fn no_storm_breaks_a_promise() {
    let report = storm(Size::TEST, |_| {});
    let found: Vec<String> = report
        .findings
        .iter()
        .take(10)
        .map(|f| format!("{}\n  cargo run --release -p sim -- replay '{}'", f.what, f.schedule))
        .collect();
    assert!(found.is_empty(), "{} schedules break a promise:\n{}", report.findings.len(), found.join("\n"));
    assert!(report.enumerated.schedules >= ENUMERATED, "{:?}", report.enumerated);
    assert_eq!(report.random.schedules, Size::TEST.seeds * 7 / 4);
}

#[test]
fn a_migration_in_fair_weather_ends_on_the_target() {
    for keeper in [Keeper::Target, Keeper::File, Keeper::Etcd] {
        for way in [Way::PreCopy, Way::Hybrid, Way::PostCopy] {
            let schedule = format!("{}", Setup::small(way, keeper, Spooling::Off));
            let mut world = schedule.parse::<Schedule>().unwrap().replay();
            assert_eq!(world.breach.0, None);
            assert_eq!(world.verdict(), Some(End::Runs(Side::Target)), "{schedule}");
        }
    }
}

/// A run is a function of its schedule: what was found can be seen again.
#[test]
fn a_schedule_replays_the_same() {
    for text in [
        "hybrid-etcd-strict-2-4-1-6-8-rejoin@40:crash-target@52:cut-all@53:sleep".to_owned(),
        "post-held-bare-1-3-1-1-5@30:time@31:link-down".to_owned(),
        "random-4712".to_owned(),
    ] {
        let schedule: Schedule = text.parse().unwrap();
        let (one, other) = (schedule.replay(), schedule.replay());
        assert_eq!(one.trace.0, other.trace.0);
        assert!(one.trace.0.is_some_and(|trace| trace.len() > 50), "{text}");
    }
    let turn = Turn::Fault("burn-target".parse().unwrap());
    assert_eq!(turn.to_string(), "burn-target");
}

/// From the commit on, with everything missing in the spool, the source may burn.
#[test]
fn strict_needs_no_source_after_the_commit() {
    let mut burnt_after = 0;
    for at in 0..400 {
        let schedule = format!("post-etcd-strict-1-3-1-1-5@{at}:burn-source");
        let mut world = schedule.parse::<Schedule>().unwrap().replay();
        let end = world.verdict();
        assert_eq!(world.breach.0, None, "{schedule}");
        let committed = world.ghost.committed;
        let on_target = end == Some(End::Runs(Side::Target));
        assert_eq!(on_target, committed, "{schedule}: {end:?}");
        burnt_after += u64::from(committed && world.burnt[0]);
    }
    assert!(burnt_after > 10, "{burnt_after}");
}

/// Runs this setup with the fault before each of its steps; says how each run ended whose trace told of
/// `what`.
fn at_each_step(setup: &str, fault: &str, what: &str) -> Vec<Option<End>> {
    let mut ends = Vec::new();
    for at in 0..400 {
        let schedule = format!("{setup}@{at}:{fault}");
        let mut world = schedule.parse::<Schedule>().unwrap().replay();
        let end = world.verdict();
        assert_eq!(world.breach.0, None, "{schedule}");
        if world.trace.0.iter().flatten().any(|line| line.contains(what)) {
            ends.push(end);
        }
    }
    ends
}

/// Whatever was on its way: what was lost is sent again, and the migration goes on where it was.
#[test]
fn a_link_lost_once_while_the_guest_runs_ends_no_migration() {
    for (fault, what) in [
        ("cut-data", "goes on"),
        ("lose-data", "goes on"),
        ("cut-control", "act Rejoin"),
        ("cut-all", "act Rejoin"),
        ("link-down", "act Rejoin"),
    ] {
        let ends = at_each_step("pre-held-bare-2-5-3-6-8-rejoin-verify", fault, what);
        assert!(ends.len() > 50, "{fault}: {} times", ends.len());
        assert!(ends.iter().all(|end| *end == Some(End::Runs(Side::Target))), "{fault}: {ends:?}");
    }
}

/// Nor does one that is lost when what will be missing is announced, or while the guest stands still: it runs
/// on meanwhile.
#[test]
fn a_link_that_is_lost_once_in_the_pause_ends_no_migration() {
    for setup in [
        "pre-held-bare-2-5-3-6-8-rejoin-verify",
        "hybrid-held-bare-1-4-1-1-6-rejoin-verify",
        "hybrid-etcd-strict-1-4-1-2-6-rejoin",
        "post-held-relaxed-1-4-1-1-6-rejoin",
    ] {
        for fault in ["cut-control", "cut-all", "link-down"] {
            let ends = at_each_step(setup, fault, "act AbortPause");
            assert!(ends.len() > 5, "{setup}, {fault}: {} times", ends.len());
            assert!(
                ends.iter().all(|end| *end == Some(End::Runs(Side::Target))),
                "{setup}, {fault}: {ends:?}"
            );
        }
    }
}

/// A stream that is lost alone is opened again, with and without `--give-up`, also while the guest stands
/// still and after the commit.
#[test]
fn a_stream_that_is_lost_alone_ends_no_migration() {
    for setup in
        ["pre-held-bare-2-5-3-6-8-verify", "hybrid-held-bare-1-4-1-1-6", "post-etcd-strict-2-4-1-2-6"]
    {
        for fault in ["cut-data", "lose-data"] {
            let ends = at_each_step(setup, fault, "goes on");
            assert!(ends.len() > 5, "{setup}, {fault}: {} times", ends.len());
            assert!(
                ends.iter().all(|end| *end == Some(End::Runs(Side::Target))),
                "{setup}, {fault}: {ends:?}"
            );
        }
    }
}

/// Whoever pauses the guest in the middle of it finds it paused where it is then, and loses no migration by
/// that.
#[test]
fn i9_a_guest_that_somebody_pauses_arrives_paused() {
    for setup in ["pre-held-bare-1-3-1-1-5", "hybrid-etcd-bare-1-4-1-1-6-rejoin"] {
        let ends = at_each_step(setup, "stop", "others: stop");
        assert!(ends.len() > 20, "{setup}: {} times", ends.len());
        assert!(ends.iter().all(|end| *end == Some(End::Runs(Side::Target))), "{setup}: {ends:?}");
        let paused = format!("{setup}-paused");
        let ends = at_each_step(&paused, "cancel", "act ResumeGuest");
        assert!(ends.iter().all(|end| *end == Some(End::Runs(Side::Source))), "{paused}: {ends:?}");
    }
}

/// Whatever others do to the source's QEMU in the pause that a migration cannot carry over ends it before the
/// authorization.
#[test]
fn i9_what_cannot_be_carried_over_ends_a_migration() {
    for (what, least) in [("cont", 5), ("reset", 5), ("eject", 20), ("power-off", 10), ("panic", 10)] {
        let ends = at_each_step("pre-held-bare-1-3-1-1-5", what, "the VM has changed");
        assert!(ends.len() >= least, "{what}: {} times", ends.len());
        assert!(ends.iter().all(|end| *end == Some(End::Runs(Side::Source))), "{what}: {ends:?}");
    }
}

/// An agent that is never started again leaves no guest that stands still, unless it has promised to ask
/// first.
#[test]
fn a_watchdog_needs_no_agent() {
    let ends = at_each_step("pre-held-bare-1-3-1-1-5", "crash-source-for-good", "lets the guest run");
    assert!(ends.len() > 5, "{} times", ends.len());
    assert!(ends.iter().all(|end| *end == Some(End::Runs(Side::Source))), "{ends:?}");
}

/// What is damaged behind all that protects a page on its way is seen before the commit.
#[test]
fn a_damaged_page_is_seen_before_the_commit() {
    for way in ["pre", "hybrid"] {
        let setup = format!("{way}-held-bare-1-8-1-1-3-verify");
        let ends = at_each_step(&setup, "damage", "compares: Err");
        assert!(ends.len() > 5, "{way}: {} times", ends.len());
        assert!(ends.iter().all(|end| *end == Some(End::Runs(Side::Source))), "{way}: {ends:?}");
    }
}
