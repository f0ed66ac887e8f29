//! Both machines under every order of events that chance comes up with: a small world with an ownership record, two
//! guests, and links that break.

use proptest::prelude::*;
use proto::control::{self, Kind};
use proto::{Source, SourceAct, SourceEnd, SourceEvent, Step, Target, TargetAct, TargetEnd, TargetEvent};
use std::collections::VecDeque;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Owner {
    Source,
    Target,
}

/// What chance may do next.
#[derive(Clone, Copy, Debug)]
enum Fate {
    ToTarget,
    ToSource,
    SourceWorks,
    TargetWorks,
    SourceFails,
    TargetFails,
    Cut,
    Cancel,
    Saved,
}

struct World {
    source: Source,
    target: Target,
    to_target: VecDeque<Kind>,
    to_source: VecDeque<Kind>,
    source_todo: VecDeque<SourceAct>,
    target_todo: VecDeque<TargetAct>,
    linked: bool,
    rejoining: bool,
    owner: Owner,
    /// The record has moved from the epoch at which the migration began.
    claimed: bool,
    source_runs: bool,
    target_runs: bool,
    target_gone: bool,
    permit_sent: bool,
    source_end: Option<SourceEnd>,
    target_end: Option<TargetEnd>,
    rounds: u32,
    steps: Vec<Step>,
    forgotten: bool,
    settled: bool,
    device_loaded: bool,
    /// The device state is being saved: whether more was written meanwhile.
    saving: Option<bool>,
    /// What the target believes that it will lack, announced while the source's guest ran or in its pause.
    announced: bool,
}

impl World {
    fn new(first: Step, steps: Vec<Step>, verify: bool, give_up_ms: u64) -> Self {
        let prepare = control::Prepare { verify, post_copy: true, give_up_ms, ..Default::default() };
        let (source, acts) = Source::new(control::Hello::default(), prepare, first);
        Self {
            source,
            target: Target::new(control::Hello::default()),
            to_target: VecDeque::new(),
            to_source: VecDeque::new(),
            source_todo: acts.into(),
            target_todo: VecDeque::new(),
            linked: true,
            rejoining: false,
            owner: Owner::Source,
            claimed: false,
            source_runs: true,
            target_runs: false,
            target_gone: false,
            permit_sent: false,
            source_end: None,
            target_end: None,
            rounds: 0,
            steps,
            forgotten: false,
            settled: false,
            device_loaded: false,
            saving: None,
            announced: false,
        }
    }

    fn tell_source(&mut self, event: SourceEvent) {
        self.source_todo.extend(self.source.handle(event));
    }

    fn tell_target(&mut self, event: TargetEvent) {
        self.target_todo.extend(self.target.handle(event));
    }

    fn step(&mut self, fate: Fate) {
        match fate {
            Fate::ToTarget => {
                if let Some(kind) = self.to_target.pop_front() {
                    self.tell_target(TargetEvent::Message(kind));
                }
            }
            Fate::ToSource => {
                if let Some(kind) = self.to_source.pop_front() {
                    self.tell_source(SourceEvent::Message(kind));
                }
            }
            Fate::SourceWorks => self.source_works(),
            Fate::TargetWorks => self.target_works(),
            Fate::SourceFails => {
                // Journals and the guest's return are retried by the driver until they work.
                let may_fail = matches!(
                    self.source_todo.front(),
                    Some(
                        SourceAct::OpenStreams
                            | SourceAct::Ship(_)
                            | SourceAct::Decide
                            | SourceAct::StopGuest
                            | SourceAct::SendOwed
                            | SourceAct::Save
                            | SourceAct::SendState(_)
                            | SourceAct::Promise
                    )
                );
                if may_fail {
                    self.source_todo.pop_front();
                    self.tell_source(SourceEvent::Broke { what: "act".into(), why: "chance".into() });
                }
            }
            Fate::TargetFails => {
                let may_fail = matches!(
                    self.target_todo.front(),
                    Some(
                        TargetAct::TakeOwed(_)
                            | TargetAct::Compare
                            | TargetAct::Load(_)
                            | TargetAct::KeepHashes(_)
                    )
                );
                if may_fail {
                    self.target_todo.pop_front();
                    self.tell_target(TargetEvent::Broke { what: "act".into(), why: "chance".into() });
                }
            }
            Fate::Cut => {
                if self.linked && self.source_end.is_none() {
                    self.linked = false;
                    self.to_source.clear();
                    self.to_target.clear();
                    self.tell_source(SourceEvent::LinkLost("cut".into()));
                    self.tell_target(TargetEvent::LinkLost("cut".into()));
                }
            }
            Fate::Cancel => self.tell_source(SourceEvent::Cancel),
            Fate::Saved => {
                if let Some(more) = self.saving.take() {
                    self.tell_source(SourceEvent::Saved { more });
                }
            }
        }
        self.check();
    }

    fn source_works(&mut self) {
        let Some(act) = self.source_todo.pop_front() else { return };
        match act {
            SourceAct::Send(kind) => {
                if matches!(kind, Kind::Permit(_)) {
                    self.permit_sent = true;
                    assert!(!self.source_runs, "a permit for a running guest");
                }
                if self.linked {
                    self.to_target.push_back(kind);
                }
            }
            SourceAct::OpenStreams => self.tell_source(SourceEvent::StreamsOpen),
            SourceAct::Ship(round) | SourceAct::ShipRest(round) => {
                if self.linked {
                    self.rounds = round;
                    self.tell_target(TargetEvent::Landed(round));
                }
                self.tell_source(SourceEvent::Shipped(round));
            }
            SourceAct::Rejoin => {
                if self.target_end.is_some() || self.target_gone {
                    // It gave up meanwhile.
                    self.tell_source(SourceEvent::Broke { what: "rejoin".into(), why: "unknown".into() });
                } else {
                    (self.linked, self.rejoining) = (true, true);
                    self.tell_target(TargetEvent::Reconnected);
                }
            }
            SourceAct::Decide => {
                let step = self.steps.pop().unwrap_or(Step::Switchover);
                self.tell_source(SourceEvent::Decided(step));
            }
            SourceAct::StopGuest => {
                self.source_runs = false;
                self.tell_source(SourceEvent::Stopped);
            }
            SourceAct::SendOwed => {
                if self.linked {
                    self.to_target.push_back(Kind::Owed(control::Owed::default()));
                }
            }
            SourceAct::Save => {
                assert!(!self.source_runs && self.saving.is_none(), "a running guest is saved");
                self.saving = Some(self.rounds.is_multiple_of(2));
            }
            SourceAct::RunOn => {
                assert!(!self.permit_sent && self.owner == Owner::Source && !self.claimed, "I1, I3");
                (self.source_runs, self.saving) = (true, None);
            }
            SourceAct::SendState(after_round) => {
                assert!(!self.source_runs, "a device state of a running guest");
                if self.linked {
                    self.to_target
                        .push_back(Kind::State(control::State { after_round, ..Default::default() }));
                }
                self.tell_source(SourceEvent::StateSent);
            }
            SourceAct::Promise => self.tell_source(SourceEvent::Promised),
            SourceAct::ResumeGuest => {
                assert!(self.owner == Owner::Source, "I4: it belongs to the target");
                assert!(!self.permit_sent || self.claimed, "I1: permitted, and the record was not asked");
                self.source_runs = true;
            }
            SourceAct::Claim => {
                if !self.claimed {
                    self.claimed = true;
                    self.owner = Owner::Source;
                }
                self.tell_source(match self.owner {
                    Owner::Source => SourceEvent::ClaimWon,
                    Owner::Target => SourceEvent::ClaimLost(2),
                });
            }
            SourceAct::Gone(_) => assert_eq!(self.owner, Owner::Target),
            SourceAct::ServeOwed => {
                self.tell_target(TargetEvent::AllPlaced);
            }
            SourceAct::Reconnect => {
                self.linked = true;
                if self.settled {
                    self.to_source.push_back(Kind::Settled(control::Settled::default()));
                } else {
                    self.tell_target(TargetEvent::Reconnected);
                }
            }
            SourceAct::Forget => {
                assert_eq!(self.owner, Owner::Target);
                self.forgotten = true;
            }
            SourceAct::End(end) => self.source_end = Some(end),
        }
    }

    fn target_works(&mut self) {
        let Some(act) = self.target_todo.pop_front() else { return };
        match act {
            TargetAct::Send(kind) => {
                if self.linked {
                    self.to_source.push_back(kind);
                }
            }
            TargetAct::Prepare(_) => self.tell_target(TargetEvent::Prepared(Ok(()))),
            TargetAct::TakeOwed(_) => {
                self.announced = true;
                self.tell_target(TargetEvent::OwedTaken);
            }
            TargetAct::ForgetAnnounced => {
                assert!(!self.device_loaded && !self.permit_sent, "the source may be gone");
                self.announced = false;
            }
            TargetAct::KeepHashes(_) => {}
            TargetAct::Compare => self.tell_target(TargetEvent::Compared(Ok(()))),
            TargetAct::Load(_) => {
                self.device_loaded = true;
                self.tell_target(TargetEvent::Loaded);
            }
            TargetAct::Claim => {
                assert!(self.permit_sent, "a claim without a permit");
                assert!(self.device_loaded, "a claim for a guest that cannot run");
                if !self.claimed {
                    self.claimed = true;
                    self.owner = Owner::Target;
                }
                self.tell_target(match self.owner {
                    Owner::Target => TargetEvent::ClaimWon(2),
                    Owner::Source => TargetEvent::ClaimLost("source".into()),
                });
            }
            TargetAct::Resume => {
                assert_eq!(self.owner, Owner::Target, "I1");
                assert!(!self.target_gone);
                self.target_runs = true;
                self.tell_target(TargetEvent::Resumed { at_ns: 1 });
            }
            TargetAct::SendLanded => {
                // The answer to an earlier attempt is heard by nobody.
                if self.linked && std::mem::take(&mut self.rejoining) {
                    assert!(self.source_runs && !self.permit_sent, "a rejoining source has a running guest");
                    assert!(!self.announced, "what lands now would be taken for owed");
                    self.tell_source(SourceEvent::Rejoined(self.rounds));
                }
            }
            TargetAct::SendStillOwed => {
                if self.linked {
                    self.to_source.push_back(Kind::StillOwed(control::StillOwed::default()));
                }
            }
            TargetAct::Settle => {
                self.settled = true;
                if self.linked {
                    self.to_source.push_back(Kind::Settled(control::Settled::default()));
                }
            }
            TargetAct::Destroy => {
                assert_ne!(self.owner, Owner::Target, "the owner destroys the VM");
                self.target_gone = true;
            }
            TargetAct::End(end) => self.target_end = Some(end),
        }
    }

    fn check(&self) {
        assert!(!(self.source_runs && self.target_runs), "I1: the guest runs twice");
        assert!(!(self.forgotten && self.target_gone), "the VM is nowhere");
    }

    fn run_out(&mut self) {
        let calm = [Fate::SourceWorks, Fate::TargetWorks, Fate::ToTarget, Fate::ToSource, Fate::Saved];
        for _ in 0..200 {
            calm.into_iter().for_each(|fate| self.step(fate));
        }
    }
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        8 => Just(Fate::ToTarget),
        8 => Just(Fate::ToSource),
        8 => Just(Fate::SourceWorks),
        8 => Just(Fate::TargetWorks),
        1 => Just(Fate::SourceFails),
        1 => Just(Fate::TargetFails),
        1 => Just(Fate::Cut),
        3 => Just(Fate::Saved),
        1 => Just(Fate::Cancel),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![Just(Step::Round), Just(Step::Switchover), Just(Step::PostCopy)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// I1, I3, I4: whatever happens, at most one side runs the guest at any time, and in the end exactly one does.
    #[test]
    fn i1_i3_i4_exactly_one_side_runs_the_guest_in_the_end(
        first in step(),
        steps in prop::collection::vec(step(), 0..3),
        verify: bool,
        rejoins: bool,
        fates in prop::collection::vec(fate(), 0..120),
    ) {
        let mut world = World::new(first, steps, verify, u64::from(rejoins));
        for fate in fates {
            world.step(fate);
        }
        world.run_out();
        prop_assert!(world.source_runs != world.target_runs, "source {}, target {}, end {:?}",
            world.source_runs, world.target_runs, world.source_end);
        let end = world.source_end.clone().expect("every migration ends");
        prop_assert_eq!(end == SourceEnd::Completed, world.target_runs);
        prop_assert_eq!(world.forgotten, world.target_runs);
        prop_assert!(world.target_runs || world.target_gone || world.target_end.is_none());
    }

    /// Frames of a hostile or confused peer in any order: the source never lets go of its guest before it has
    /// permitted it, the target never runs one that it has not claimed.
    #[test]
    fn arbitrary_messages_endanger_nobody(kinds in prop::collection::vec(message(), 0..40)) {
        let (mut source, _) = Source::new(control::Hello::default(), control::Prepare::default(), Step::Round);
        let mut target = Target::new(control::Hello::default());
        for kind in kinds {
            for act in source.handle(SourceEvent::Message(kind.clone())) {
                let lets_go = matches!(act, SourceAct::Gone(_) | SourceAct::Forget | SourceAct::Send(Kind::Permit(_)));
                prop_assert!(!lets_go, "{:?}", act);
            }
            for act in target.handle(TargetEvent::Message(kind)) {
                prop_assert!(!matches!(act, TargetAct::Claim | TargetAct::Resume | TargetAct::Settle), "{:?}", act);
            }
        }
    }
}

/// The source ended all connections to ask the record; what the target had said before may still be heard. Serving what is
/// owed on connections that are gone would leave the target's guest waiting for ever.
#[test]
fn a_commit_heard_while_the_record_is_asked_is_followed_by_a_new_connection() {
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

/// The stream that broke was heard of first, and what the target had said before behind it: by then the source knows better what the
/// target has. That is no reason to end a migration.
#[test]
fn a_round_that_is_heard_to_have_landed_when_the_link_is_back_already_changes_nothing() {
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
    for (step, act) in [
        (Step::Round, SourceAct::Ship(2)),
        (Step::PostCopy, SourceAct::SendOwed),
        (Step::Switchover, SourceAct::StopGuest),
    ] {
        let mut source = back();
        assert_eq!(source.handle(SourceEvent::Decided(step)), [act]);
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

/// A link that is lost while the guest stands still, before its device state was sent: the guest runs on at once, and the migration
/// goes on as if there had been no pause. What the pause still brings comes too late.
#[test]
fn i3_a_guest_whose_pause_comes_to_nothing_runs_on_and_the_migration_goes_on() {
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
        assert_eq!(source.handle(pre.clone()), [SourceAct::StopGuest]);
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
        assert_eq!(source.handle(taken()), [SourceAct::StopGuest]);
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

/// The other side of it: what was announced is forgotten, also if it was nothing or is just being taken; what comes late of it is not
/// taken for a later announcement. A target that has a device state waits for nobody.
#[test]
fn a_target_forgets_what_it_was_to_be_owed_by_a_source_that_is_back() {
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

/// I1: a message that cannot be believed (another host's name, page sets of another VM) reaches the machine as an act that broke. If it
/// had waited in the driver's queue while the record was asked, it must not be taken for a failure before the permit.
#[test]
fn i1_what_breaks_while_the_record_is_asked_brings_no_guest_back() {
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
