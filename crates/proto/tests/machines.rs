//! Each machine by itself: what comes late. A peer that says what it likes is the fuzzers' (`fuzz`, target
//! `machines`); whole migrations, in every order of events that can be thought of, are the simulation's
//! (`crates/sim`).

use proto::control::{self, Kind};
use proto::{
    NextStep, Source, SourceEffect, SourceEnd, SourceEvent, Target, TargetEffect, TargetEnd, TargetEvent,
};

/// The source ended all connections to ask the record; what the target had said before may still be heard.
/// Serving what is missing on connections that are gone would leave the target's guest waiting for ever.
#[test]
fn a_commit_heard_while_the_record_is_asked_reconnects() {
    let mut source = asking();
    let committed = control::Committed { epoch: 2, ..Default::default() };
    let effects = source.handle(SourceEvent::Message(Kind::Committed(committed)));
    assert_eq!(effects, [SourceEffect::Gone(2), SourceEffect::Reconnect]);
    assert_eq!(source.handle(SourceEvent::ClaimLost(2)), []);
}

/// One that has authorized, in a post-copy, and asks the record.
fn asking() -> Source {
    let prepare = control::Prepare { post_copy: true, ..Default::default() };
    let (mut source, _) = Source::new(control::Hello::default(), prepare, NextStep::PostCopy);
    for event in [
        SourceEvent::Message(Kind::Hello(control::Hello::default())),
        SourceEvent::Message(Kind::Ready(control::Ready::default())),
        SourceEvent::StreamsOpen,
        SourceEvent::Message(Kind::MissingRecorded(control::MissingRecorded {})),
        SourceEvent::Stopped,
        SourceEvent::Saved { more: false },
        SourceEvent::StateSent,
        SourceEvent::Fenced,
    ] {
        source.handle(event);
    }
    assert_eq!(source.handle(SourceEvent::LinkLost("a stream broke".into())), [SourceEffect::Claim]);
    source
}

/// The stream that broke was heard of first, and what the target had said before behind it: by then the
/// source knows better what the target has. That is no reason to end a migration.
#[test]
fn a_late_round_landed_changes_nothing_after_a_reconnect() {
    let back = || {
        let prepare = control::Prepare { post_copy: true, give_up_ms: 1, ..Default::default() };
        let (mut source, _) = Source::new(control::Hello::default(), prepare, NextStep::Round);
        for event in [
            SourceEvent::Message(Kind::Hello(control::Hello::default())),
            SourceEvent::Message(Kind::Ready(control::Ready::default())),
            SourceEvent::StreamsOpen,
            SourceEvent::Sent(1),
            SourceEvent::LinkLost("a stream broke".into()),
        ] {
            source.handle(event);
        }
        assert_eq!(source.handle(SourceEvent::Rejoined(1)), [SourceEffect::Decide]);
        source
    };
    let received = |round| SourceEvent::Message(Kind::RoundReceived(control::RoundReceived { round }));
    for (step, effects) in [
        (NextStep::Round, vec![SourceEffect::SendRound(2)]),
        (NextStep::PostCopy, vec![SourceEffect::SendMissing]),
        (NextStep::Switchover, vec![SourceEffect::JournalPause, SourceEffect::StopGuest]),
    ] {
        let mut source = back();
        assert_eq!(source.handle(SourceEvent::Decided(step)), effects);
        assert_eq!(source.handle(received(1)), [], "{step:?}");
        if step == NextStep::Switchover {
            assert_eq!(source.handle(SourceEvent::Stopped), [SourceEffect::Save, SourceEffect::SendRound(2)]);
            assert_eq!(source.handle(received(1)), []);
        }
        // One that it cannot have said is none.
        let effects = source.handle(received(3));
        assert!(matches!(effects.last(), Some(SourceEffect::End(SourceEnd::Failed { .. }))), "{effects:?}");
    }
}

/// A link that is lost while the guest stands still, before its device state was sent: the guest runs on at
/// once, and the migration goes on as if there had been no pause. What the pause still brings comes too late.
#[test]
fn i3_an_aborted_pause_lets_guest_and_migration_go_on() {
    let until = |first: NextStep, events: &[SourceEvent]| {
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
    let received = |round| SourceEvent::Message(Kind::RoundReceived(control::RoundReceived { round }));
    let taken = || SourceEvent::Message(Kind::MissingRecorded(control::MissingRecorded {}));
    let lost = || SourceEvent::LinkLost("cut".into());
    let round = [SourceEvent::Sent(1), received(1)];
    let with = |more: &[SourceEvent]| [&round, more].concat();
    let pre = SourceEvent::Decided(NextStep::Switchover);
    let post = SourceEvent::Decided(NextStep::PostCopy);
    let saved = |more| SourceEvent::Saved { more };
    let aborts = |source: &mut Source, seen: &[SourceEvent]| {
        assert_eq!(source.handle(lost()), [SourceEffect::AbortPause], "{seen:?}");
        assert_eq!(source.handle(SourceEvent::RanOn(true)), [SourceEffect::Rejoin], "{seen:?}");
    };

    // In the last round: what of it has not arrived is sent again, while the guest runs.
    for seen in [vec![], vec![SourceEvent::Sent(2)], vec![saved(true)], vec![received(2), saved(false)]] {
        let mut source =
            until(NextStep::Round, &with(&[&[pre.clone(), SourceEvent::Stopped], &*seen].concat()));
        aborts(&mut source, &seen);
        assert_eq!(source.handle(saved(true)), []);
        assert!(source.cancellable());
        let mut other = source.clone();
        assert_eq!(source.handle(SourceEvent::Rejoined(1)), [SourceEffect::SendRest(2)]);
        assert_eq!(source.handle(SourceEvent::Sent(2)), []);
        assert_eq!(source.handle(received(2)), [SourceEffect::Decide]);
        // The next pause is one from its beginning.
        assert_eq!(source.handle(pre.clone()), [SourceEffect::JournalPause, SourceEffect::StopGuest]);
        assert_eq!(source.handle(SourceEvent::Stopped), [SourceEffect::Save, SourceEffect::SendRound(3)]);
        // It had received all of it.
        assert_eq!(other.handle(SourceEvent::Rejoined(2)), [SourceEffect::Decide]);
    }
    // Before a post-copy, at each of its steps.
    for seen in [vec![], vec![taken()], vec![taken(), SourceEvent::Stopped]] {
        let mut source = until(NextStep::Round, &with(&[std::slice::from_ref(&post), &seen].concat()));
        aborts(&mut source, &seen);
        assert_eq!(source.handle(taken()), [], "said before the link was lost");
        assert_eq!(source.handle(SourceEvent::Rejoined(1)), [SourceEffect::Decide]);
        assert_eq!(source.handle(post.clone()), [SourceEffect::SendMissing]);
        assert_eq!(source.handle(taken()), [SourceEffect::JournalPause, SourceEffect::StopGuest]);
    }
    let mut source = until(NextStep::PostCopy, &[taken(), SourceEvent::Stopped]);
    // One that is lost whenever the guest stands still ends it.
    for _ in 0..3 {
        aborts(&mut source, &[]);
        assert_eq!(source.handle(SourceEvent::Rejoined(0)), [SourceEffect::SendMissing]);
        source.handle(taken());
        source.handle(SourceEvent::Stopped);
    }
    assert_eq!(source.handle(lost()), [SourceEffect::AbortPause]);
    let effects = source.handle(SourceEvent::RanOn(true));
    assert!(matches!(effects.last(), Some(SourceEffect::End(SourceEnd::Failed { .. }))), "{effects:?}");
    // Not all hashes could be said.
    let mut source = until(NextStep::PostCopy, &[taken(), SourceEvent::Stopped, saved(false)]);
    aborts(&mut source, &[]);
    // Once the device state is sent, a lost link ends it.
    let mut source =
        until(NextStep::PostCopy, &[taken(), SourceEvent::Stopped, saved(false), SourceEvent::StateSent]);
    let effects = source.handle(lost());
    assert_eq!(effects[0], SourceEffect::ResumeGuest);
    assert!(matches!(effects.last(), Some(SourceEffect::End(SourceEnd::Failed { .. }))), "{effects:?}");
    // A guest that does not run on: as any failure before the promise.
    let mut source = until(NextStep::PostCopy, &[taken(), SourceEvent::Stopped]);
    source.handle(lost());
    let effects = source.handle(SourceEvent::Broke { what: "resume".into(), why: "no".into() });
    assert_eq!(effects[0], SourceEffect::ResumeGuest);
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
    let missing = || TargetEvent::Message(Kind::Missing(control::Missing::default()));
    let lost = || TargetEvent::LinkLost("cut".into());
    let state = || TargetEvent::Message(Kind::State(control::State::default()));
    let back = [TargetEffect::ForgetAnnounced, TargetEffect::SendReceived];

    let mut target = receiving();
    assert_eq!(
        target.handle(TargetEvent::Reconnected),
        [TargetEffect::SendReceived],
        "nothing was announced"
    );
    assert_eq!(target.handle(missing()), [TargetEffect::TakeMissing(vec![])]);
    assert_eq!(target.handle(lost()), []);
    assert_eq!(target.handle(TargetEvent::Reconnected), back);
    assert_eq!(target.handle(missing()), [TargetEffect::TakeMissing(vec![])]);
    assert_eq!(target.handle(TargetEvent::MissingRecorded), [], "that was the first one");
    assert_eq!(target.handle(state()), [], "the second one has not been taken yet");
    assert_eq!(target.handle(TargetEvent::MissingRecorded).len(), 2, "now it is, and the state is loaded");

    // Nothing was missing after all.
    let mut target = receiving();
    target.handle(missing());
    target.handle(TargetEvent::MissingRecorded);
    target.handle(TargetEvent::AllPlaced);
    assert_eq!(target.handle(TargetEvent::Reconnected), back);
    assert_eq!(target.handle(TargetEvent::Reconnected), [TargetEffect::SendReceived]);

    let mut target = receiving();
    target.handle(missing());
    target.handle(TargetEvent::MissingRecorded);
    target.handle(state());
    let effects = target.handle(lost());
    assert!(matches!(effects.last(), Some(TargetEffect::End(TargetEnd::Failed { .. }))), "{effects:?}");

    // It has not noticed anything yet: whoever is back must know that there is nothing to come back to.
    let mut target = receiving();
    target.handle(state());
    let effects = target.handle(TargetEvent::Reconnected);
    assert!(
        effects.iter().any(|effect| matches!(effect, TargetEffect::Send(Kind::Failed(_)))),
        "{effects:?}"
    );
    assert_eq!(effects[0], TargetEffect::Destroy);
    // With the authorization the record decides.
    let mut target = receiving();
    target.handle(state());
    target.handle(TargetEvent::Message(Kind::Authorize(control::Authorize {})));
    assert_eq!(target.handle(TargetEvent::Reconnected), []);
}

/// I1: a message that cannot be believed (another host's name, page sets of another VM) reaches the machine
/// as an act that broke. If it had waited in the driver's queue while the record was asked, it must not be
/// taken for a failure before the authorization.
#[test]
fn i1_a_failure_while_the_record_is_asked_resumes_no_guest() {
    let mut source = asking();
    let broke = || SourceEvent::Broke { what: "believe the target".into(), why: "another name".into() };
    assert_eq!(
        source.handle(broke()),
        [SourceEffect::Claim],
        "asking again is harmless, running it again is not"
    );
    assert_eq!(source.handle(SourceEvent::ClaimLost(2)), [SourceEffect::Gone(2), SourceEffect::Reconnect]);
}
