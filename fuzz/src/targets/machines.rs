//! Each machine alone, with whatever messages and events in whatever order: a peer says what it likes, and
//! things on this side fail or come late. What must hold is written down here once more, without any of the
//! machines' states.

use crate::input::Input;
use proto::{
    NextStep, Source, SourceEffect, SourceEvent, Target, TargetEffect, TargetEvent,
    control::{self, Kind},
};

/// A byte for the machine and how it begins, then a few for each event.
pub(crate) fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    match input.u8() % 6 {
        0 => source(Source::new(hello(), prepare(&mut input), NextStep::Round), false, false, &mut input),
        1 => source(Source::new(hello(), prepare(&mut input), NextStep::PostCopy), false, false, &mut input),
        2 => source(asking(), true, false, &mut input),
        3 => source(Source::after_commit(), true, true, &mut input),
        4 => target(Target::new(hello()), false, &mut input),
        _ => target(Target::after_claim(hello()), true, &mut input),
    }
}

/// A source that has authorized and lost its link: only the record can tell.
fn asking() -> (Source, Vec<SourceEffect>) {
    use SourceEvent as E;
    let prepare = control::Prepare { post_copy: true, ..Default::default() };
    let (mut source, mut effects) = Source::new(hello(), prepare, NextStep::PostCopy);
    for event in [
        E::Message(Kind::Hello(hello())),
        E::Message(Kind::Ready(control::Ready::default())),
        E::StreamsOpen,
        E::Message(Kind::MissingRecorded(control::MissingRecorded {})),
        E::Stopped,
        E::Saved { more: false },
        E::StateSent,
        E::Fenced,
        E::LinkLost("cut".into()),
    ] {
        effects = source.handle(event);
    }
    assert_eq!(effects, [SourceEffect::Claim]);
    (source, effects)
}

fn hello() -> control::Hello {
    control::Hello::default()
}

fn prepare(input: &mut Input<'_>) -> control::Prepare {
    let byte = input.u8();
    let (verify, give_up_ms) = (byte.is_multiple_of(2), u64::from(byte / 2 % 2));
    control::Prepare { verify, give_up_ms, post_copy: true, ..Default::default() }
}

fn message(input: &mut Input<'_>) -> Kind {
    let small = |input: &mut Input<'_>| u32::from(input.u8() % 8);
    match input.u8() % 18 {
        0 => Kind::Hello(hello()),
        1 => Kind::Ping(control::Ping::default()),
        2 => Kind::Pong(control::Pong::default()),
        3 => Kind::Failed(control::Failed::default()),
        4 => Kind::Prepare(prepare(input)),
        5 => Kind::Missing(control::Missing::default()),
        6 => Kind::Hashes(control::Hashes::default()),
        7 => Kind::State(control::State { after_round: small(input), ..Default::default() }),
        8 => Kind::Authorize(control::Authorize {}),
        9 => Kind::Claim(control::Claim::default()),
        10 => Kind::Ready(control::Ready::default()),
        11 => Kind::Refused(control::Refused::default()),
        12 => Kind::RoundReceived(control::RoundReceived { round: small(input) }),
        13 => Kind::Committed(control::Committed { epoch: u64::from(input.u8()), ..Default::default() }),
        14 => Kind::StillMissing(control::StillMissing::default()),
        15 => Kind::Settled(control::Settled::default()),
        16 => Kind::Claimed(control::Claimed::default()),
        _ => Kind::MissingRecorded(control::MissingRecorded {}),
    }
}

fn source_event(input: &mut Input<'_>) -> SourceEvent {
    use SourceEvent as E;
    match input.u8() % 18 {
        0 => E::LinkLost("cut".into()),
        1 => E::Cancel,
        2 => E::Broke { what: "act".into(), why: "chance".into() },
        3 => E::StreamsOpen,
        4 => E::Sent(u32::from(input.u8() % 8)),
        5 => E::Decided(input.one_of(&[NextStep::Round, NextStep::Switchover, NextStep::PostCopy])),
        6 => E::Stopped,
        7 => E::Saved { more: input.u8().is_multiple_of(2) },
        8 => E::Fenced,
        9 => E::ClaimWon,
        10 => E::ClaimLost(u64::from(input.u8())),
        11 => E::ClaimUnknown("down".into()),
        12 => E::Resolved,
        13 => E::Rejoined(u32::from(input.u8() % 8)),
        14 => E::StateSent,
        15 => E::RanOn(input.u8().is_multiple_of(2)),
        _ => E::Message(message(input)),
    }
}

/// Says whether it came to a commit.
fn source(
    (mut machine, effects): (Source, Vec<SourceEffect>),
    mut authorized: bool,
    mut gone: bool,
    input: &mut Input<'_>,
) -> bool {
    let (mut stopped, mut is_fenced, mut ended) = (authorized, authorized, false);
    let (mut journalled, mut held) = (authorized, authorized);
    let mut event = None;
    let mut effects = effects;
    for _ in 0..500 {
        assert!(!ended || effects.is_empty(), "after the end: {effects:?}");
        for effect in effects {
            match effect {
                SourceEffect::JournalPause => journalled = true,
                SourceEffect::StopGuest => {
                    assert!(journalled, "I3: a pause that nobody would end");
                    stopped = true;
                }
                SourceEffect::HoldGuest => held = stopped,
                SourceEffect::Fence => {
                    assert!(
                        held,
                        "I1: a promise about a guest that was not stopped, or that somebody may let run"
                    );
                    is_fenced = true;
                }
                SourceEffect::Send(Kind::Authorize(_)) => {
                    assert!(is_fenced && event == Some(SourceEvent::Fenced), "I1: authorized, not promised");
                    authorized = true;
                }
                SourceEffect::ResumeGuest => {
                    let asked = matches!(event, Some(SourceEvent::ClaimWon | SourceEvent::Resolved));
                    assert!(!authorized || asked, "I1: resumed after the authorization upon {event:?}");
                    assert!(!gone, "I4: resumed although the target owns it, upon {event:?}");
                    (journalled, stopped, held) = (false, false, false);
                }
                SourceEffect::AbortPause => {
                    assert!(!is_fenced && !ended, "I1: it runs on after it fenced itself, upon {event:?}");
                    (journalled, stopped, held) = (false, false, false);
                }
                SourceEffect::Gone(_) => {
                    let told = matches!(
                        event,
                        Some(SourceEvent::ClaimLost(_) | SourceEvent::Message(Kind::Committed(_)))
                    );
                    assert!(authorized && told, "given away without an authorization, upon {event:?}");
                    gone = true;
                }
                SourceEffect::Forget => {
                    assert!(gone, "a copy is destroyed that may be the only one, upon {event:?}")
                }
                SourceEffect::End(_) => ended = true,
                _ => {}
            }
        }
        if input.is_empty() {
            break;
        }
        assert!(
            !(authorized && machine.cancellable() && !ended),
            "it can be cancelled after the authorization"
        );
        event = Some(source_event(input));
        effects = event.clone().map(|event| machine.handle(event)).unwrap_or_default();
    }
    gone
}

fn target_event(input: &mut Input<'_>) -> TargetEvent {
    use TargetEvent as E;
    match input.u8() % 20 {
        0 => E::LinkLost("cut".into()),
        1 => E::Broke { what: "act".into(), why: "chance".into() },
        2 => E::Prepared(Ok(())),
        3 => E::Prepared(Err(vec!["no".into()])),
        4 => E::Received(u32::from(input.u8() % 8)),
        5 => E::MissingRecorded,
        6 => E::Compared(Ok(())),
        7 => E::Compared(Err("differs".into())),
        8 => E::Loaded,
        9 => E::ClaimWon(u64::from(input.u8())),
        10 => E::ClaimLost("hosta".into()),
        11 => E::ClaimUnknown("down".into()),
        12 => E::Resumed { at_ns: 1 },
        13 => E::ResumeFailed("no".into()),
        14 => E::AllPlaced,
        15 => E::Reconnected,
        16 => E::GiveUp("ended".into()),
        _ => E::Message(message(input)),
    }
}

/// Says whether it came to a commit.
fn target(mut machine: Target, mut owned: bool, input: &mut Input<'_>) -> bool {
    let (mut authorized, mut loading, mut loaded, mut claiming) = (owned, owned, owned, owned);
    let (mut resumed, mut ended) = (owned, false);
    // Missing pages that were announced, and those that were recorded.
    let (mut owes, mut recorded) = (0, 0);
    for _ in 0..500 {
        if input.is_empty() {
            break;
        }
        let event = target_event(input);
        authorized |= event == TargetEvent::Message(Kind::Authorize(control::Authorize {}));
        loaded |= loading && event == TargetEvent::Loaded;
        recorded += u32::from(event == TargetEvent::MissingRecorded);
        resumed |= owned
            && matches!(
                event,
                TargetEvent::Resumed { .. } | TargetEvent::ResumeFailed(_) | TargetEvent::Broke { .. }
            );
        let effects = machine.handle(event.clone());
        assert!(!ended || effects.is_empty(), "after the end: {effects:?}");
        for effect in effects {
            match effect {
                TargetEffect::TakeMissing(_) => owes += 1,
                TargetEffect::Load(_) => {
                    assert!(!loading, "a device state is loaded twice");
                    assert!(recorded >= owes, "loaded before what is missing was recorded");
                    loading = true;
                }
                TargetEffect::Claim => {
                    assert!(authorized, "I1: claimed without an authorization, upon {event:?}");
                    assert!(loaded, "claimed for a guest that cannot run, upon {event:?}");
                    claiming = true;
                }
                TargetEffect::Resume => {
                    let won = claiming && matches!(event, TargetEvent::ClaimWon(_));
                    assert!(won && !owned, "I1: resumed without having claimed, or twice, upon {event:?}");
                    owned = true;
                }
                TargetEffect::Destroy => assert!(!owned, "the owner destroys the VM, upon {event:?}"),
                TargetEffect::Settle => assert!(resumed, "settled before it ran, upon {event:?}"),
                TargetEffect::End(_) => ended = true,
                _ => {}
            }
        }
    }
    owned
}

/// The way of whole migrations, event by event: numbers of the tables above, as a driver and a peer would
/// say them (17 and 19: a message).
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let ways: [&[u8]; 9] = [
        // A pre-copy, and a post-copy.
        &[
            0, 0, 17, 0, 17, 10, 3, 4, 1, 17, 12, 1, 5, 0, 4, 2, 17, 12, 2, 5, 1, 6, 4, 3, 7, 1, 17, 12, 3,
            14, 8, 17, 13, 5,
        ],
        &[1, 0, 17, 0, 17, 10, 3, 17, 17, 6, 7, 0, 14, 8, 17, 13, 5, 0, 17, 14, 17, 15],
        // The link is lost in the pause.
        &[1, 3, 17, 0, 17, 10, 3, 17, 17, 6, 0, 13, 0, 17, 17, 6, 7, 0, 14, 8, 17, 13, 5, 17, 15],
        // The record is asked, and the target is there late.
        &[2, 0, 11, 11, 10, 5, 17, 14, 17, 15],
        &[3, 17, 14, 0, 17, 14, 17, 15],
        // A target: of a pre-copy, of a post-copy in doubt, of a pause that came to nothing, and restarted.
        &[4, 19, 0, 19, 4, 1, 2, 4, 1, 4, 2, 19, 7, 2, 8, 19, 8, 9, 5, 12],
        &[4, 19, 0, 19, 4, 0, 2, 19, 5, 5, 19, 7, 0, 6, 8, 19, 8, 11, 9, 5, 12, 0, 15, 14],
        &[4, 19, 0, 19, 4, 3, 2, 19, 5, 5, 0, 15, 4, 1, 19, 7, 1, 8, 19, 8, 9, 5, 12],
        &[5, 15, 0, 15, 14],
    ];
    ways.map(<[u8]>::to_vec).into()
}
