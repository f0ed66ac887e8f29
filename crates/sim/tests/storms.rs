//! The smaller part of all storms: no promise is broken in any of them.

use sim::{Keeper, Schedule, Setup, Size, Spooling, Turn, Way, storm};

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
    assert_eq!(report.random.schedules, Size::TEST.seeds);
}

#[test]
fn a_migration_in_fair_weather_ends_on_the_target() {
    for keeper in [Keeper::Target, Keeper::File, Keeper::Etcd] {
        for way in [Way::PreCopy, Way::Hybrid, Way::PostCopy] {
            let schedule = format!("{}", Setup::small(way, keeper, Spooling::Off));
            let mut world = schedule.parse::<Schedule>().unwrap().replay();
            assert_eq!(world.breach.0, None);
            assert_eq!(world.verdict(), Some(sim::End::Runs(sim::Side::Target)), "{schedule}");
        }
    }
}

/// A run is a function of its schedule: what was found can be seen again.
#[test]
fn a_schedule_replays_the_same() {
    for text in [
        "hybrid-etcd-strict-2-4-1-6-8-0@40:crash-target@52:cut-all@53:sleep".to_owned(),
        "post-held-bare-1-3-1-1-5-0@30:time@31:link-down".to_owned(),
        "random-4711".to_owned(),
    ] {
        let schedule: Schedule = text.parse().unwrap();
        let (one, other) = (schedule.replay(), schedule.replay());
        assert_eq!(one.trace.0, other.trace.0);
        assert!(one.trace.0.is_some_and(|trace| trace.len() > 50), "{text}");
    }
    let turn = Turn::Blow("burn-target".parse().unwrap());
    assert_eq!(turn.to_string(), "burn-target");
}

/// From the commit on, with everything owed in the spool, the source may burn.
#[test]
fn strict_needs_no_source_after_the_commit() {
    let mut burnt_after = 0;
    for at in 0..400 {
        let schedule = format!("post-etcd-strict-1-3-1-1-5-0@{at}:burn-source");
        let mut world = schedule.parse::<Schedule>().unwrap().replay();
        let end = world.verdict();
        assert_eq!(world.breach.0, None, "{schedule}");
        let committed = world.ghost.committed;
        let on_target = end == Some(sim::End::Runs(sim::Side::Target));
        assert_eq!(on_target, committed, "{schedule}: {end:?}");
        burnt_after += u64::from(committed && world.burnt[0]);
    }
    assert!(burnt_after > 10, "{burnt_after}");
}
