//! Each machine by itself: a peer that says what it likes, and what comes late. Whole migrations, in every
//! order of events that can be thought of, are the simulation's (`crates/sim`).

use proptest::prelude::*;
use proto::control::{self, Kind};
use proto::{Source, SourceAct, SourceEnd, SourceEvent, Step, Target, TargetAct, TargetEnd, TargetEvent};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Frames of a hostile or confused peer in any order: the source never lets go of its guest before it has
    /// permitted it, the target never runs one that it has not claimed.
    #[test]
    fn arbitrary_messages_endanger_nobody(kinds in prop::collection::vec(message(), 0..40)) {
        let (mut source, _) = Source::new(control::Hello::default(), control::Prepare::default(),
            Step::Round);
        let mut target = Target::new(control::Hello::default());
        for kind in kinds {
            for act in source.handle(SourceEvent::Message(kind.clone())) {
                let lets_go = matches!(act,
                    SourceAct::Gone(_) | SourceAct::Forget | SourceAct::Send(Kind::Permit(_)));
                prop_assert!(!lets_go, "{:?}", act);
            }
            for act in target.handle(TargetEvent::Message(kind)) {
                prop_assert!(!matches!(act, TargetAct::Claim | TargetAct::Resume | TargetAct::Settle), "{:?}",
                    act);
            }
        }
    }
}

/// The source ended all connections to ask the record; what the target had said before may still be heard.
/// Serving what is owed on connections that are gone would leave the target's guest waiting for ever.
#[test]
fn a_commit_heard_while_the_record_is_asked_reconnects() {
    let mut source = asking();
    let committed = control::Committed { epoch: 2, ..Default::default() };
    let acts = source.handle(SourceEvent::Message(Kind::Committed(committed)));
    assert_eq!(acts, [SourceAct::Gone(2), SourceAct::Reconnect]);
    assert_eq!(source.handle(SourceEvent::ClaimLost(2)), []);
}

/// One that has permitted, in a post-copy, and asks the record.
fn asking() -> Source {
    let prepare = control::Prepare { post_copy: true, ..Default::default() };
    let (mut source, _) = Source::new(control::Hello::default(), prepare, Step::PostCopy);
    for event in [
        SourceEvent::Message(Kind::Hello(control::Hello::default())),
        SourceEvent::Message(Kind::Ready(control::Ready::default())),
        SourceEvent::StreamsOpen,
        SourceEvent::Message(Kind::OwedTaken(control::OwedTaken {})),
        SourceEvent::Stopped,
        SourceEvent::Saved { more: false },
        SourceEvent::StateSent,
        SourceEvent::Promised,
    ] {
        source.handle(event);
    }
    assert_eq!(source.handle(SourceEvent::LinkLost("a stream broke".into())), [SourceAct::Claim]);
    source
}

/// The stream that broke was heard of first, and what the target had said before behind it: by then the
/// source knows better what the target has. That is no reason to end a migration.
#[test]
fn a_late_round_landed_changes_nothing_after_a_reconnect() {
    let back = || {
        let prepare = control::Prepare { post_copy: true, give_up_ms: 1, ..Default::default() };
        let (mut source, _) = Source::new(control::Hello::default(), prepare, Step::Round);
        for event in [
            SourceEvent::Message(Kind::Hello(control::Hello::default())),
            SourceEvent::Message(Kind::Ready(control::Ready::default())),
            SourceEvent::StreamsOpen,
            SourceEvent::Shipped(1),
            SourceEvent::LinkLost("a stream broke".into()),
        ] {
            source.handle(event);
        }
        assert_eq!(source.handle(SourceEvent::Rejoined(1)), [SourceAct::Decide]);
        source
    };
    let landed = |round| SourceEvent::Message(Kind::RoundLanded(control::RoundLanded { round }));
    for (step, acts) in [
        (Step::Round, vec![SourceAct::Ship(2)]),
        (Step::PostCopy, vec![SourceAct::SendOwed]),
        (Step::Switchover, vec![SourceAct::JournalPause, SourceAct::StopGuest]),
    ] {
        let mut source = back();
        assert_eq!(source.handle(SourceEvent::Decided(step)), acts);
        assert_eq!(source.handle(landed(1)), [], "{step:?}");
        if step == Step::Switchover {
            assert_eq!(source.handle(SourceEvent::Stopped), [SourceAct::Save, SourceAct::Ship(2)]);
            assert_eq!(source.handle(landed(1)), []);
        }
        // One that it cannot have said is none.
        let acts = source.handle(landed(3));
        assert!(matches!(acts.last(), Some(SourceAct::End(SourceEnd::Failed { .. }))), "{acts:?}");
    }
}

/// A link that is lost while the guest stands still, before its device state was sent: the guest runs on at
/// once, and the migration goes on as if there had been no pause. What the pause still brings comes too late.
#[test]
fn i3_an_aborted_pause_lets_guest_and_migration_go_on() {
    let until = |first: Step, events: &[SourceEvent]| {
        let prepare = control::Prepare { post_copy: true, give_up_ms: 1, ..Default::default() };
        let (mut source, _) = Source::new(control::Hello::default(), prepare, first);
        let begin = [
            SourceEvent::Message(Kind::Hello(control::Hello::default())),
            SourceEvent::Message(Kind::Ready(control::Ready::default())),
            SourceEvent::StreamsOpen,
        ];
        for event in begin.iter().chain(events) {
            source.handle(event.clone());
        }
        source
    };
    let landed = |round| SourceEvent::Message(Kind::RoundLanded(control::RoundLanded { round }));
    let taken = || SourceEvent::Message(Kind::OwedTaken(control::OwedTaken {}));
    let lost = || SourceEvent::LinkLost("cut".into());
    let round = [SourceEvent::Shipped(1), landed(1)];
    let with = |more: &[SourceEvent]| [&round, more].concat();
    let pre = SourceEvent::Decided(Step::Switchover);
    let post = SourceEvent::Decided(Step::PostCopy);
    let saved = |more| SourceEvent::Saved { more };

    // In the last round: what of it has not landed is sent again, while the guest runs.
    for seen in [vec![], vec![SourceEvent::Shipped(2)], vec![saved(true)], vec![landed(2), saved(false)]] {
        let mut source = until(Step::Round, &with(&[&[pre.clone(), SourceEvent::Stopped], &*seen].concat()));
        assert_eq!(source.handle(lost()), [SourceAct::RunOn, SourceAct::Rejoin], "{seen:?}");
        assert_eq!(source.handle(saved(true)), []);
        assert!(source.cancellable());
        let mut other = source.clone();
        assert_eq!(source.handle(SourceEvent::Rejoined(1)), [SourceAct::ShipRest(2)]);
        assert_eq!(source.handle(SourceEvent::Shipped(2)), []);
        assert_eq!(source.handle(landed(2)), [SourceAct::Decide]);
        // The next pause is one from its beginning.
        assert_eq!(source.handle(pre.clone()), [SourceAct::JournalPause, SourceAct::StopGuest]);
        assert_eq!(source.handle(SourceEvent::Stopped), [SourceAct::Save, SourceAct::Ship(3)]);
        // It had landed all of it.
        assert_eq!(other.handle(SourceEvent::Rejoined(2)), [SourceAct::Decide]);
    }
    // Before a post-copy, at each of its steps.
    for seen in [vec![], vec![taken()], vec![taken(), SourceEvent::Stopped]] {
        let mut source = until(Step::Round, &with(&[std::slice::from_ref(&post), &seen].concat()));
        assert_eq!(source.handle(lost()), [SourceAct::RunOn, SourceAct::Rejoin], "{seen:?}");
        assert_eq!(source.handle(taken()), [], "said before the link was lost");
        assert_eq!(source.handle(SourceEvent::Rejoined(1)), [SourceAct::Decide]);
        assert_eq!(source.handle(post.clone()), [SourceAct::SendOwed]);
        assert_eq!(source.handle(taken()), [SourceAct::JournalPause, SourceAct::StopGuest]);
    }
    let mut source = until(Step::PostCopy, &[taken(), SourceEvent::Stopped]);
    assert_eq!(source.handle(lost()), [SourceAct::RunOn, SourceAct::Rejoin]);
    assert_eq!(source.handle(SourceEvent::Rejoined(0)), [SourceAct::SendOwed]);
    // Not all hashes could be said.
    let mut source = until(Step::PostCopy, &[taken(), SourceEvent::Stopped, saved(false)]);
    assert_eq!(source.handle(lost()), [SourceAct::RunOn, SourceAct::Rejoin]);
    // Once the device state is sent, a lost link ends it.
    let mut source =
        until(Step::PostCopy, &[taken(), SourceEvent::Stopped, saved(false), SourceEvent::StateSent]);
    let acts = source.handle(lost());
    assert_eq!(acts[0], SourceAct::ResumeGuest);
    assert!(matches!(acts.last(), Some(SourceAct::End(SourceEnd::Failed { .. }))), "{acts:?}");
    // A guest that does not run on: as any failure before the promise.
    let mut source = until(Step::PostCopy, &[taken(), SourceEvent::Stopped]);
    source.handle(lost());
    let acts = source.handle(SourceEvent::Broke { what: "resume".into(), why: "no".into() });
    assert_eq!(acts[0], SourceAct::ResumeGuest);
}

/// The other side of it: what was announced is forgotten, also if it was nothing or is just being taken; what
/// comes late of it is not taken for a later announcement. A target that has a device state waits for nobody.
#[test]
fn a_target_forgets_the_missing_set_of_a_source_that_is_back() {
    let receiving = || {
        let mut target = Target::new(control::Hello::default());
        let prepare = control::Prepare { post_copy: true, give_up_ms: 1, ..Default::default() };
        for event in [
            TargetEvent::Message(Kind::Hello(control::Hello::default())),
            TargetEvent::Message(Kind::Prepare(prepare)),
            TargetEvent::Prepared(Ok(())),
        ] {
            target.handle(event);
        }
        target
    };
    let owed = || TargetEvent::Message(Kind::Owed(control::Owed::default()));
    let lost = || TargetEvent::LinkLost("cut".into());
    let state = || TargetEvent::Message(Kind::State(control::State::default()));
    let back = [TargetAct::ForgetAnnounced, TargetAct::SendLanded];

    let mut target = receiving();
    assert_eq!(target.handle(TargetEvent::Reconnected), [TargetAct::SendLanded], "nothing was announced");
    assert_eq!(target.handle(owed()), [TargetAct::TakeOwed(vec![])]);
    assert_eq!(target.handle(lost()), []);
    assert_eq!(target.handle(TargetEvent::Reconnected), back);
    assert_eq!(target.handle(owed()), [TargetAct::TakeOwed(vec![])]);
    assert_eq!(target.handle(TargetEvent::OwedTaken), [], "that was the first one");
    assert_eq!(target.handle(state()), [], "the second one has not been taken yet");
    assert_eq!(target.handle(TargetEvent::OwedTaken).len(), 2, "now it is, and the state is loaded");

    // Nothing was owed after all.
    let mut target = receiving();
    target.handle(owed());
    target.handle(TargetEvent::OwedTaken);
    target.handle(TargetEvent::AllPlaced);
    assert_eq!(target.handle(TargetEvent::Reconnected), back);
    assert_eq!(target.handle(TargetEvent::Reconnected), [TargetAct::SendLanded]);

    let mut target = receiving();
    target.handle(owed());
    target.handle(TargetEvent::OwedTaken);
    target.handle(state());
    let acts = target.handle(lost());
    assert!(matches!(acts.last(), Some(TargetAct::End(TargetEnd::Failed { .. }))), "{acts:?}");

    // It has not noticed anything yet: whoever is back must know that there is nothing to come back to.
    let mut target = receiving();
    target.handle(state());
    let acts = target.handle(TargetEvent::Reconnected);
    assert!(acts.iter().any(|act| matches!(act, TargetAct::Send(Kind::Failed(_)))), "{acts:?}");
    assert_eq!(acts[0], TargetAct::Destroy);
    // With the permit the record decides.
    let mut target = receiving();
    target.handle(state());
    target.handle(TargetEvent::Message(Kind::Permit(control::Permit {})));
    assert_eq!(target.handle(TargetEvent::Reconnected), []);
}

/// I1: a message that cannot be believed (another host's name, page sets of another VM) reaches the machine
/// as an act that broke. If it had waited in the driver's queue while the record was asked, it must not be
/// taken for a failure before the permit.
#[test]
fn i1_a_failure_while_the_record_is_asked_resumes_no_guest() {
    let mut source = asking();
    let broke = || SourceEvent::Broke { what: "believe the target".into(), why: "another name".into() };
    assert_eq!(
        source.handle(broke()),
        [SourceAct::Claim],
        "asking again is harmless, running it again is not"
    );
    assert_eq!(source.handle(SourceEvent::ClaimLost(2)), [SourceAct::Gone(2), SourceAct::Reconnect]);
}

fn message() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Hello(control::Hello::default())),
        Just(Kind::Failed(control::Failed::default())),
        Just(Kind::Prepare(control::Prepare::default())),
        Just(Kind::Owed(control::Owed::default())),
        Just(Kind::State(control::State::default())),
        Just(Kind::Permit(control::Permit {})),
        Just(Kind::Ready(control::Ready::default())),
        Just(Kind::Refused(control::Refused::default())),
        (0u32..4).prop_map(|round| Kind::RoundLanded(control::RoundLanded { round })),
        Just(Kind::Committed(control::Committed::default())),
        Just(Kind::StillOwed(control::StillOwed::default())),
        Just(Kind::Settled(control::Settled::default())),
    ]
}
