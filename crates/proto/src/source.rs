//! The source's side of a migration: what it has seen goes in, what it must do comes out.
//!
//! ```text
//! Greeting → Preparing → Opening → Copying ⟲ (⇄ Rejoining) →
//!     (Announcing) → Pausing → Draining → Sending → Fencing → Authorized → PostCopy → Ended
//!          └────────────┴──────────┴─────────┘ link lost: the guest runs on, back to Copying
//! ```
//!
//! A link that is lost is waited for while the guest runs on. Where it stood still already, it runs on at
//! once, and the migration is where it was before the switchover; the next one begins from its beginning.
//! That ends when the device state is sent: then a lost link ends the migration. Until the authorization is
//! sent, every failure leads back to a running guest (I3). After it, only the ownership record decides (I1,
//! I4): no timeout does.

use crate::{
    Brief, Phase,
    control::{self, Kind},
};

/// A guest that was stopped so often in vain is not stopped once more: a link that breaks whenever the guest
/// stands still costs it a pause each time, of up to two seconds until that is noticed.
const MOST_ABORTED: u32 = 3;

/// How memory travels. The driver maps its user's wish to this.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NextStep {
    /// Another round while the guest runs.
    Round,
    /// Stop the guest and send the rest before it runs on the target.
    Switchover,
    /// Stop the guest and send the rest after it runs on the target.
    PostCopy,
}

/// What the source has seen.
#[derive(Clone, PartialEq, Debug)]
#[expect(clippy::large_enum_variant, reason = "there are few at a time")]
pub enum SourceEvent {
    /// The target said something.
    Message(Kind),
    /// A connection of the migration broke, or has been silent for too long.
    LinkLost(String),
    /// The user wants it to end.
    Cancel,
    /// An act of this side failed.
    Broke {
        /// What was tried.
        what: String,
        /// Why it failed.
        why: String,
    },
    /// `AbortPause` is done; whether the guest had stood still.
    RanOn(bool),
    /// `Rejoin` is done: the target has all of this round and of those before it.
    Rejoined(u32),
    /// `OpenStreams` is done.
    StreamsOpen,
    /// Every stream has sent its share of this round.
    Sent(u32),
    /// `Decide` is done.
    Decided(NextStep),
    /// `StopGuest` is done: the guest stands still and its disks are drained.
    Stopped,
    /// `Save` is done; `more`: pages were written meanwhile that no round has carried.
    Saved {
        /// Whether another pass over memory is needed.
        more: bool,
    },
    /// `SendState` is done.
    StateSent,
    /// `Fence` is done.
    Fenced,
    /// The record says: the VM is ours.
    ClaimWon,
    /// The record says: the VM is somebody else's, at this epoch.
    ClaimLost(u64),
    /// The record could not be asked.
    ClaimUnknown(String),
    /// A person has fenced the target and says that the VM is ours.
    Resolved,
}

/// What the source must do. Acts are done in order; those marked *async* report by an event.
#[derive(Clone, PartialEq, Debug)]
#[expect(clippy::large_enum_variant, reason = "there are few at a time")]
pub enum SourceEffect {
    /// Say this to the target.
    Send(Kind),
    /// Connect the streams and begin tracking. *async*
    OpenStreams,
    /// Send everything that is dirty as this round, while acts go on. *async*
    SendRound(u32),
    /// Send what the target does not have yet of this round, over the new connections. *async*
    SendRest(u32),
    /// Connect again while the guest runs on here, and learn what the target has; for as long as the user
    /// wants. *async*
    Rejoin,
    /// The switchover that was begun does not take place, and the migration goes on: the guest runs here at
    /// once, its writes are followed as before, and what was announced as missing is dirty again (I2). What
    /// `Save` has not reported yet is never reported. *async*
    AbortPause,
    /// Collect what was written and choose the next step. *async*
    Decide,
    /// Look what the guest does, and journal that the pause that follows is ours: whoever finds the journal
    /// may end it.
    JournalPause,
    /// Stop the guest. *async*
    StopGuest,
    /// Collect what was written, and tell the target that it will lack it.
    SendMissing,
    /// Save the device state while acts go on, then collect what was written meanwhile. *async*
    Save,
    /// Send hashes, if asked for, and the device state: to be loaded after this round. *async*; a link that
    /// is found to be lost before the state was sent is told instead.
    SendState(u32),
    /// See to it that nobody lets the guest run here from now on.
    HoldGuest,
    /// Make the fence durable: from now on only the record says that the guest may run here. *async*
    Fence,
    /// The guest runs here again, as if nothing had happened (I3). Harmless when it was never stopped.
    ResumeGuest,
    /// Ask the record for the VM. *async*
    Claim,
    /// Journal that the VM is gone, at this epoch (I4).
    Gone(u64),
    /// Serve faults and push what is missing. Messages report its end.
    ServeMissing,
    /// Connect again and learn what is still missing: `Message(StillMissing)`. *async*
    Reconnect,
    /// Journal that nothing is missing, and destroy this copy.
    Forget,
    /// It is over.
    End(SourceEnd),
}

/// How it ended.
#[derive(Clone, PartialEq, Debug)]
pub enum SourceEnd {
    /// The VM runs on the target.
    Completed,
    /// The user ended it; the VM runs here.
    Cancelled,
    /// It failed; the VM runs here.
    Failed {
        /// What failed.
        what: String,
        /// Why.
        why: String,
    },
}

#[derive(Clone, PartialEq, Debug)]
enum State {
    Greeting,
    Preparing,
    Opening,
    Copying {
        round: u32,
        sent: bool,
        received: bool,
    },
    /// As `Copying`, or as `Opening` in round 0.
    Rejoining {
        round: u32,
    },
    Deciding {
        round: u32,
    },
    Announcing {
        round: u32,
    },
    Pausing {
        round: u32,
        post_copy: bool,
    },
    Draining {
        round: u32,
        sent: bool,
        received: bool,
        saved: Option<bool>,
    },
    SavingMissing {
        round: u32,
    },
    Sending {
        round: u32,
    },
    Fencing,
    Authorized,
    Claiming {
        why: SourceEnd,
    },
    PostCopy,
    Ended,
}

/// The source as a state machine.
#[derive(Clone, Debug)]
pub struct Source {
    state: State,
    prepare: control::Prepare,
    first: NextStep,
    post_copy: bool,
    /// A switchover was undone.
    ran_on: bool,
    /// How many pauses came to nothing, after which the migration went on.
    aborted_pauses: u32,
}

impl Source {
    /// A migration of what `prepare` describes, beginning with `first`; with the acts that begin it.
    pub fn new(
        hello: control::Hello,
        prepare: control::Prepare,
        first: NextStep,
    ) -> (Self, Vec<SourceEffect>) {
        let source = Self::at(State::Greeting, prepare, first);
        (source, vec![SourceEffect::Send(Kind::Hello(hello))])
    }

    /// A migration whose source agent was restarted after the commit: the target may still want pages.
    pub fn after_commit() -> (Self, Vec<SourceEffect>) {
        let source = Self::at(State::PostCopy, control::Prepare::default(), NextStep::PostCopy);
        (Self { post_copy: true, ..source }, vec![SourceEffect::Reconnect])
    }

    fn at(state: State, prepare: control::Prepare, first: NextStep) -> Self {
        Self { state, prepare, first, post_copy: false, ran_on: false, aborted_pauses: 0 }
    }

    /// Whether the user can still end it.
    pub fn cancellable(&self) -> bool {
        !matches!(self.state, State::Authorized | State::Claiming { .. } | State::PostCopy | State::Ended)
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Announcing { round: 0 } | State::Rejoining { round: 0 } if !self.ran_on => {
                Phase::Preflight
            }
            State::Greeting | State::Preparing | State::Opening => Phase::Preflight,
            State::Copying { .. }
            | State::Rejoining { .. }
            | State::Deciding { .. }
            | State::Announcing { .. } => Phase::PreCopy,
            State::Pausing { .. }
            | State::Draining { .. }
            | State::SavingMissing { .. }
            | State::Sending { .. }
            | State::Fencing
            | State::Authorized
            | State::Claiming { .. } => Phase::Switchover,
            State::PostCopy => Phase::PostCopy,
            State::Ended => Phase::Done,
        }
    }

    /// What must be done about an event.
    pub fn handle(&mut self, event: SourceEvent) -> Vec<SourceEffect> {
        use SourceEffect as A;
        use SourceEvent as E;
        match (self.state.clone(), event) {
            (State::Ended, _) => vec![],

            // What may come at any time.
            (
                _,
                E::Message(
                    Kind::Ping(_)
                    | Kind::Pong(_)
                    | Kind::Received(_)
                    | Kind::StreamLost(_)
                    | Kind::StreamReopened(_),
                ),
            ) => vec![],
            (State::PostCopy, E::LinkLost(_) | E::Broke { .. } | E::Message(Kind::Failed(_))) => {
                vec![A::Reconnect]
            }
            (State::Claiming { .. }, E::LinkLost(_) | E::Message(Kind::Failed(_))) => vec![],
            // the authorization is out: whatever breaks now, also what the target said before, leaves it to
            // the record (I1).
            (State::Claiming { .. }, E::Broke { .. }) => vec![A::Claim],
            (State::Authorized, E::LinkLost(why)) => self.ask_record("the connection to the target", why),
            (State::Authorized, E::Broke { what, why }) => self.ask_record(&what, why),
            (State::Authorized, E::Message(Kind::Failed(failed))) => {
                self.ask_record(&failed.what, failed.why)
            }
            (State::Opening, E::LinkLost(_)) if self.rejoins() => self.rejoin(0),
            (State::Copying { round, .. } | State::Deciding { round }, E::LinkLost(_)) if self.rejoins() => {
                self.rejoin(round)
            }
            (
                State::Announcing { round }
                | State::Pausing { round, .. }
                | State::Draining { round, .. }
                | State::SavingMissing { round }
                | State::Sending { round },
                E::LinkLost(_),
            ) if self.rejoins() => {
                self.ran_on = true;
                self.state = State::Rejoining { round };
                vec![A::AbortPause]
            }
            (State::Rejoining { .. }, E::RanOn(stood)) => self.pause_is_aborted(stood),
            (State::Rejoining { .. }, E::LinkLost(_)) => vec![A::Rejoin],
            (_, E::LinkLost(why)) => self.back("the connection to the target", why),
            (_, E::Broke { what, why }) => self.back(&what, why),
            (_, E::Message(Kind::Failed(failed))) => self.back(&failed.what, failed.why),
            (_, E::Cancel) if self.cancellable() => self.cancel(),
            (_, E::Cancel) => vec![],

            // The way of a migration.
            (State::Greeting, E::Message(Kind::Hello(_))) => {
                self.state = State::Preparing;
                vec![A::Send(Kind::Prepare(self.prepare.clone()))]
            }
            (State::Preparing, E::Message(Kind::Refused(refused))) => {
                self.back("preflight", refused.reasons.join("\n"))
            }
            (State::Preparing, E::Message(Kind::Ready(_))) => {
                self.state = State::Opening;
                vec![A::OpenStreams]
            }
            (State::Opening, E::StreamsOpen) => self.begin(),
            (State::Rejoining { round: 0 }, E::Rejoined(_)) => self.begin(),
            (State::Rejoining { round }, E::Rejoined(received)) if received >= round => {
                self.state = State::Deciding { round };
                vec![A::Decide]
            }
            (State::Rejoining { round }, E::Rejoined(_)) => {
                self.state = State::Copying { round, sent: false, received: false };
                vec![A::SendRest(round)]
            }
            (
                State::Rejoining { .. },
                E::Sent(_)
                | E::Decided(_)
                | E::StreamsOpen
                | E::Stopped
                | E::Saved { .. }
                | E::StateSent
                | E::Message(Kind::RoundReceived(_)),
            ) => vec![],
            (State::Copying { round, received, .. }, E::Sent(n)) if n == round => {
                self.copied(State::Copying { round, sent: true, received })
            }
            (State::Copying { round, sent, .. }, E::Message(Kind::RoundReceived(l))) if l.round == round => {
                self.copied(State::Copying { round, sent, received: true })
            }
            (State::Deciding { round }, E::Decided(NextStep::Round)) => self.send_round(round + 1),
            (State::Deciding { round }, E::Decided(step)) => self.pause(round, step),
            (State::Announcing { round }, E::Message(Kind::MissingRecorded(_))) => {
                self.state = State::Pausing { round, post_copy: true };
                vec![A::JournalPause, A::StopGuest]
            }
            (
                State::SavingMissing { .. } | State::Sending { .. } | State::Fencing | State::Authorized,
                E::Message(Kind::MissingRecorded(_)),
            ) => vec![],
            // Of an announcement that a lost link has undone. Taken for that of a later one, it stops the
            // guest a little early, and that is all: the target loads no device state before it has taken
            // what is missing.
            (
                State::Rejoining { .. }
                | State::Copying { .. }
                | State::Deciding { .. }
                | State::Pausing { .. }
                | State::Draining { .. },
                E::Message(Kind::MissingRecorded(_)),
            ) if self.rejoins() => vec![],
            (State::Pausing { round, post_copy: true }, E::Stopped) => {
                self.state = State::SavingMissing { round };
                vec![A::Save, A::SendMissing]
            }
            (State::Pausing { round, post_copy: false }, E::Stopped) => {
                let round = round + 1;
                self.state = State::Draining { round, sent: false, received: false, saved: None };
                vec![A::Save, A::SendRound(round)]
            }
            (State::SavingMissing { round }, E::Saved { more }) => {
                self.state = State::Sending { round };
                let again = if more { vec![A::SendMissing] } else { vec![] };
                [again, vec![A::SendState(round)]].concat()
            }
            (State::Draining { round, received, saved, .. }, E::Sent(n)) if n == round => {
                self.drained(State::Draining { round, sent: true, received, saved })
            }
            (State::Draining { round, sent, saved, .. }, E::Message(Kind::RoundReceived(l)))
                if l.round == round =>
            {
                self.drained(State::Draining { round, sent, received: true, saved })
            }
            (State::Draining { round, sent, received, saved: None }, E::Saved { more }) => {
                self.drained(State::Draining { round, sent, received, saved: Some(more) })
            }
            (State::Sending { .. }, E::StateSent) => {
                self.state = State::Fencing;
                vec![A::HoldGuest, A::Fence]
            }
            (State::Fencing, E::Fenced) => {
                self.state = State::Authorized;
                vec![A::Send(Kind::Authorize(control::Authorize {}))]
            }
            // The last barrier's answer may arrive after everything was sent.
            (
                State::Sending { .. } | State::Fencing | State::Authorized,
                E::Message(Kind::RoundReceived(_)),
            ) => vec![],
            (State::Authorized, E::Message(Kind::Committed(c))) => self.gone(c.epoch, A::ServeMissing),
            // Said before the connections were ended to ask the record, and heard after: nobody is listening
            // on them.
            (State::Claiming { .. }, E::Message(Kind::Committed(c))) => self.gone(c.epoch, A::Reconnect),

            // The record decides.
            (State::Claiming { why }, E::ClaimWon | E::Resolved) => self.end(vec![A::ResumeGuest], why),
            (State::Claiming { .. }, E::ClaimLost(epoch)) => self.gone(epoch, A::Reconnect),
            (State::Claiming { .. }, E::ClaimUnknown(_)) => vec![A::Claim],

            // The guest runs there.
            (State::PostCopy, E::Message(Kind::StillMissing(_))) => vec![A::ServeMissing],
            (State::PostCopy, E::Message(Kind::Settled(_))) => {
                self.end(vec![A::Forget], SourceEnd::Completed)
            }

            // Said before the link was lost, and heard only now: what the target had was asked again since.
            (
                State::Copying { round, .. }
                | State::Deciding { round }
                | State::Announcing { round }
                | State::Pausing { round, .. }
                | State::Draining { round, .. }
                | State::SavingMissing { round },
                E::Message(Kind::RoundReceived(l)),
            ) if self.rejoins() && l.round <= round => vec![],

            // Results of acts that no longer matter.
            (
                _,
                E::Resolved
                | E::ClaimWon
                | E::ClaimLost(_)
                | E::ClaimUnknown(_)
                | E::Rejoined(_)
                | E::RanOn(_),
            ) => vec![],
            (
                State::PostCopy | State::Claiming { .. } | State::Authorized,
                E::Sent(_)
                | E::Decided(_)
                | E::Stopped
                | E::Saved { .. }
                | E::StateSent
                | E::StreamsOpen
                | E::Fenced,
            ) => vec![],

            // Anything else is a peer or a driver out of step.
            (State::Authorized, E::Message(_)) => {
                self.ask_record("the target", "it spoke out of turn".into())
            }
            (State::PostCopy | State::Claiming { .. }, E::Message(_)) => vec![],
            (state, event) => self.back("the protocol", format!("{} in {}", Brief(&event), Brief(&state))),
        }
    }

    /// Whether a lost link is waited for.
    fn rejoins(&self) -> bool {
        self.prepare.give_up_ms > 0
    }

    fn rejoin(&mut self, round: u32) -> Vec<SourceEffect> {
        self.state = State::Rejoining { round };
        vec![SourceEffect::Rejoin]
    }

    fn pause_is_aborted(&mut self, stood: bool) -> Vec<SourceEffect> {
        self.aborted_pauses += u32::from(stood);
        if stood && self.aborted_pauses > MOST_ABORTED {
            let why =
                format!("it was lost in {} pauses; the guest is not stopped again", self.aborted_pauses);
            return self.back("the connection to the target", why);
        }
        vec![SourceEffect::Rejoin]
    }

    fn begin(&mut self) -> Vec<SourceEffect> {
        match self.first {
            NextStep::Round => self.send_round(1),
            step => self.pause(0, step),
        }
    }

    fn send_round(&mut self, round: u32) -> Vec<SourceEffect> {
        self.state = State::Copying { round, sent: false, received: false };
        vec![SourceEffect::SendRound(round)]
    }

    fn copied(&mut self, next: State) -> Vec<SourceEffect> {
        self.state = next;
        let State::Copying { round, sent: true, received: true } = self.state else { return vec![] };
        self.state = State::Deciding { round };
        vec![SourceEffect::Decide]
    }

    /// What is dirty before a post-copy will be missing whatever the guest does until it is stopped: the
    /// target makes its holes while the guest still runs.
    fn pause(&mut self, round: u32, step: NextStep) -> Vec<SourceEffect> {
        self.post_copy = step == NextStep::PostCopy;
        if self.post_copy {
            self.state = State::Announcing { round };
            return vec![SourceEffect::SendMissing];
        }
        self.state = State::Pausing { round, post_copy: false };
        vec![SourceEffect::JournalPause, SourceEffect::StopGuest]
    }

    /// A page that was written again while the device state was saved must not overtake its older version
    /// (I5): it waits for the barrier.
    fn drained(&mut self, next: State) -> Vec<SourceEffect> {
        self.state = next;
        match self.state {
            State::Draining { round, sent: true, received: true, saved: Some(true) } => {
                let round = round + 1;
                self.state = State::Draining { round, sent: false, received: false, saved: Some(false) };
                vec![SourceEffect::SendRound(round)]
            }
            State::Draining { round, sent: true, saved: Some(false), .. } => {
                self.state = State::Sending { round };
                vec![SourceEffect::SendState(round)]
            }
            _ => vec![],
        }
    }

    fn gone(&mut self, epoch: u64, then: SourceEffect) -> Vec<SourceEffect> {
        if self.post_copy {
            self.state = State::PostCopy;
            return vec![SourceEffect::Gone(epoch), then];
        }
        self.end(vec![SourceEffect::Gone(epoch), SourceEffect::Forget], SourceEnd::Completed)
    }

    fn ask_record(&mut self, what: &str, why: String) -> Vec<SourceEffect> {
        self.state = State::Claiming { why: SourceEnd::Failed { what: what.into(), why } };
        vec![SourceEffect::Claim]
    }

    /// Only before the authorization was sent.
    fn back(&mut self, what: &str, why: String) -> Vec<SourceEffect> {
        let failed = control::Failed { what: what.into(), why: why.clone(), cancelled: false };
        let effects = vec![SourceEffect::ResumeGuest, SourceEffect::Send(Kind::Failed(failed))];
        self.end(effects, SourceEnd::Failed { what: what.into(), why })
    }

    fn cancel(&mut self) -> Vec<SourceEffect> {
        let failed = control::Failed {
            what: "the migration".into(),
            why: "the user cancelled it".into(),
            cancelled: true,
        };
        let effects = vec![SourceEffect::ResumeGuest, SourceEffect::Send(Kind::Failed(failed))];
        self.end(effects, SourceEnd::Cancelled)
    }

    fn end(&mut self, mut effects: Vec<SourceEffect>, how: SourceEnd) -> Vec<SourceEffect> {
        self.state = State::Ended;
        effects.push(SourceEffect::End(how));
        effects
    }
}
