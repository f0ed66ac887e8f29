//! Where it does not suffice that writes wait, vCPUs are stunned; and not for longer than that is of use.

use super::*;

/// A guest that outruns the link whatever its writes are made to wait, and what stuns it.
fn unruly() -> (Source, Stunned) {
    let stuns = Stunned::default();
    let source = Source { stuns: Some(stuns.clone()), ..Source::new() };
    // It may not wait long enough at a time.
    *source.ram.throttle.lock().unwrap() = Some(policy::Throttle::new(Duration::from_nanos(1), 1));
    source.guest(400);
    (source, stuns)
}

fn slowly() -> MigrateOptions {
    let mut wish = options(Mode::PreCopy);
    wish.bandwidth = Some(units::Rate(20 << 20));
    wish.compress = Compression::None;
    wish
}

#[test]
fn governed_rounds_that_do_not_shrink_lead_to_stuns_and_it_ends() {
    let (source, stuns) = unruly();
    let inn = Inn::new(&PAGES);
    let (report, events) = source.migrate(listen(&inn), slowly(), |_| {});
    assert_eq!((report.outcome, report.verified), (Outcome::Completed, Some(true)), "{:?}", report.error);
    let told = events.iter().filter(|e| matches!(e, Event::Note { text } if text.contains("stand still")));
    assert_eq!(told.count(), 1, "the user is told, once: {events:?}");
    assert!(!stuns.is_stunned());
    // The tracker's and those of the stuns.
    assert_eq!((report.throttle.stalled_ms, report.throttle.longest_ms), (42.0, 6.0));
}

#[test]
fn nobody_is_stunned_where_it_suffices_that_writes_wait() {
    let (source, stuns) = unruly();
    *source.ram.throttle.lock().unwrap() = Some(policy::Throttle::new(Duration::from_millis(5), 1));
    let (report, events) = source.migrate(listen(&Inn::new(&PAGES)), slowly(), |_| {});
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.error);
    assert!(!events.iter().any(|e| matches!(e, Event::Note { text } if text.contains("stand still"))));
    assert!(!stuns.is_stunned());
}

#[test]
fn i3_stuns_end_with_a_cancelled_and_with_a_failed_migration() {
    for fails in [false, true] {
        let (source, stuns) = unruly();
        stuns.in_vain.store(true, SeqCst);
        let inn = Inn::new(&PAGES);
        let cable = Cable::to(listen(&inn));
        let (report, _) = source.migrate(cable.address, slowly(), |handle| {
            wait_until("stuns", || stuns.is_stunned());
            if fails { cable.cut() } else { handle.cancel() }
        });
        let outcome = if fails { Outcome::Failed } else { Outcome::Cancelled };
        assert_eq!(report.outcome, outcome, "{:?}", report.error);
        assert!(!stuns.is_stunned() && source.cpu.running.load(SeqCst));
    }
}
