//! The link is lost while the guest stands still at the source and nothing is promised: it runs on, and so
//! does the migration.

use super::*;

fn said(events: &[Event], word: &str) -> usize {
    events.iter().filter(|e| matches!(e, Event::Note { text } if text.contains(word))).count()
}

/// The phases, one after the other.
fn phases(events: &[Event]) -> Vec<Phase> {
    let phase = |event: &Event| match event {
        Event::Phase { phase, .. } => Some(*phase),
        _ => None,
    };
    events.iter().filter_map(phase).collect()
}

/// When the link is cut.
#[derive(Clone, Copy, PartialEq, Debug)]
enum At {
    /// The target is to lack pages, and the guest still runs.
    Announcing,
    /// The guest has just been stopped.
    Stop,
    /// Its device state has just been saved.
    Save,
    /// It is being saved, and the loss is noticed before that is over.
    Saving,
    /// The source says what its memory is, for the comparison.
    Hashing,
}

#[test]
fn i2_i3_i5_a_link_lost_in_the_pause_ends_no_migration() {
    for (mode, at) in [
        (Mode::PreCopy, At::Stop),
        (Mode::PreCopy, At::Save),
        (Mode::PreCopy, At::Saving),
        (Mode::PreCopy, At::Hashing),
        (Mode::PostCopy, At::Hashing),
        (Mode::Hybrid, At::Announcing),
        (Mode::Hybrid, At::Saving),
        (Mode::PostCopy, At::Announcing),
        (Mode::PostCopy, At::Stop),
        (Mode::PostCopy, At::Saving),
    ] {
        println!("{mode:?}, cut at {at:?}");
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        source.guest(1);
        let cable = Cable::to(listen(&inn));
        let cutter = cable.clone();
        match at {
            At::Announcing => *inn.ram.on_hole.lock().unwrap() = Some(Box::new(move || cutter.cut())),
            At::Stop => source.cpu.on_stop.lock().unwrap().push_back(Box::new(move || cutter.cut())),
            At::Save => source.cpu.on_save.lock().unwrap().push_back(Box::new(move || cutter.cut())),
            At::Hashing => {
                // The next to look which pages there are makes the hashes.
                let ram = source.ram.clone();
                let then = move || *ram.on_hole.lock().unwrap() = Some(Box::new(move || cutter.cut()));
                source.cpu.on_save.lock().unwrap().push_back(Box::new(then));
            }
            At::Saving => source.cpu.on_save.lock().unwrap().push_back(Box::new(move || {
                cutter.cut();
                // The source hears of that at once, and waits for this to be over.
                thread::sleep(Duration::from_millis(200));
            })),
        }
        let (mender, cpu, ram) = (cable.clone(), source.cpu.clone(), source.ram.clone());
        let (report, events) = source.migrate(cable.address, options(mode), move |_| {
            wait_until("the cut", || mender.cut.load(SeqCst));
            // It has called in vain: so the guest was let go on before.
            wait_until("two attempts", || mender.refused.load(SeqCst) >= 2);
            assert!(cpu.running.load(SeqCst), "a guest waits for a link");
            assert!(!ram.hurried.load(SeqCst), "its writers are made to wait again");
            // What the target was to lack, or has of the last round, and what it has holes for.
            (0..3000).step_by(7).for_each(|page| ram.guest_writes(0, page, page % 2));
            mender.mend();
        });
        let story = format!("{mode:?} {at:?}: {report:?}\n{events:?}");
        assert_eq!((report.outcome, report.verified), (Outcome::Completed, Some(true)), "{story}");
        assert_eq!(inn.ram.content(), source.ram.content(), "I2: {mode:?} {at:?}");
        assert_eq!(inn.ram.overwritten(), 0, "I5: {story}");
        assert!(inn.cpu.running.load(SeqCst) && !source.cpu.running.load(SeqCst), "I1: {story}");
        let saves = source.cpu.saves.load(SeqCst);
        assert_eq!(inn.cpu.loaded.load(SeqCst), saves, "the state of the last pause: {story}");
        assert!(report.downtime_ms.is_some_and(|ms| ms > 0.0 && ms < 1000.0), "{story}");
        assert_eq!(report.mode, mode, "{story}");
        assert_eq!(said(&events, "connected to target again"), 1, "{story}");
        let pauses = if at == At::Announcing { 1 } else { 2 };
        assert_eq!(said(&events, "it ran on here after"), pauses - 1, "{story}");
        assert_eq!(report.aborted_pauses_ms > 0.0, pauses == 2, "{story}");
        assert_eq!(phases(&events).iter().filter(|phase| **phase == Phase::Switchover).count(), pauses);
        assert_eq!(saves as usize, pauses, "{story}");
        let journal = source.journal.events.lock().unwrap().join(",");
        let before = if pauses == 2 { "pausing,back," } else { "" };
        assert_eq!(journal, format!("{before}pausing,promise,gone 4,settled"), "{story}");
        if mode != Mode::PreCopy {
            // What it missed is not, before it misses anew: also in its journal.
            let missing: Vec<String> = inn.journal.events.lock().unwrap().clone();
            let none = missing.iter().position(|event| event == "missing 0").expect("it was forgotten");
            assert!(
                none > 0 && missing[none + 1..].iter().any(|event| event.starts_with("missing ")),
                "{missing:?}"
            );
        }
    }
}

#[test]
fn i3_a_guest_that_does_not_run_on_is_said_to_stand_still() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    let cable = Cable::to(listen(&inn));
    let (cutter, refuses) = (cable.clone(), source.cpu.refuses.clone());
    source.cpu.on_stop.lock().unwrap().push_back(Box::new(move || {
        refuses.store(true, SeqCst);
        cutter.cut();
    }));
    let (report, _) = source.migrate(cable.address, options(Mode::PreCopy), |_| {});
    let error = report.error.unwrap();
    assert_eq!((report.outcome, error.vm_runs_on), (Outcome::Failed, None));
    assert!(error.why.contains("could not be resumed here"), "{}", error.why);
    assert_eq!(*source.journal.events.lock().unwrap(), ["pausing"], "a restarted agent lets it run");
}

#[test]
fn i3_a_link_that_breaks_in_every_pause_ends_no_guest() {
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        source.guest(1);
        let cable = Cable::to(listen(&inn));
        for _ in 0..10 {
            let cutter = cable.clone();
            let cut = move || {
                cutter.cut();
                let mender = cutter.clone();
                thread::spawn(move || {
                    let refused = mender.refused.load(SeqCst);
                    // A call that comes at the very end finds nobody.
                    let end = Instant::now() + Duration::from_secs(5);
                    while mender.refused.load(SeqCst) == refused && Instant::now() < end {
                        thread::sleep(Duration::from_millis(1));
                    }
                    mender.mend();
                });
            };
            source.cpu.on_stop.lock().unwrap().push_back(Box::new(cut));
        }
        let (report, events) = source.migrate(cable.address, options(mode), |_| {});
        let error = report.error.expect("it fails");
        assert_eq!((report.outcome, error.vm_runs_on.as_deref()), (Outcome::Failed, Some("source")));
        assert_eq!(said(&events, "it ran on here after"), 4, "{mode:?}: {events:?}");
        assert!(error.why.contains("lost"), "{}", error.why);
        assert!(source.cpu.running.load(SeqCst));
        let journal = source.journal.events.lock().unwrap().join(",");
        assert_eq!(journal, ["pausing,back"; 4].join(","), "{mode:?}");
        wait_until("the target's end", || *inn.ended.lock().unwrap() == Some(false));
    }
}

/// Said to be lost only when the device state is on its way: then the migration ends, as ever.
#[test]
fn i1_i3_after_the_device_state_a_lost_link_is_for_the_record() {
    let (mut source, inn) = (Source::new(), Inn::new(&PAGES));
    let cable = Cable::to(listen(&inn));
    source.journal.cut_at_fence = Some(cable.clone());
    let mender = cable.clone();
    let (report, events) = source.migrate(cable.address, options(Mode::PreCopy), move |_| {
        wait_until("an attempt", || mender.refused.load(SeqCst) > 0);
        mender.mend();
    });
    assert_eq!(report.outcome, Outcome::Failed, "{report:?}");
    assert!(report.aborted_pauses_ms > 0.0 && report.downtime_ms.is_none(), "{report:?}");
    assert_eq!(said(&events, "it ran on here after"), 0, "{events:?}");
    assert!(source.cpu.running.load(SeqCst) && !inn.cpu.running.load(SeqCst), "I1");
    assert_eq!(*source.journal.events.lock().unwrap(), ["pausing", "promise", "back"]);
}
