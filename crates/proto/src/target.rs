//! The target's side of a migration: what it has seen goes in, what it must do comes out.
//!
//! ```text
//! Greeting → Waiting → Preparing → Receiving → Claiming → Starting → PostCopy → Ended
//! ```
//!
//! It claims only when everything is there or missing durably, the device state is loaded, and the source
//! permits it. The guest runs only after the claim is won (I1).

use crate::{
    Brief,
    control::{self, Kind},
};

/// What the target has seen.
#[derive(Clone, PartialEq, Debug)]
#[expect(clippy::large_enum_variant, reason = "there are few at a time")]
pub enum TargetEvent {
    /// The source said something.
    Message(Kind),
    /// A connection of the migration broke, or has been silent for too long.
    LinkLost(String),
    /// An act of this side failed.
    Broke {
        /// What was tried.
        what: String,
        /// Why it failed.
        why: String,
    },
    /// `Prepare` is done: a QEMU waits. Or it cannot work, for these reasons.
    Prepared(Result<(), Vec<String>>),
    /// Every stream has delivered this round, and all of it is in memory.
    Received(u32),
    /// `TakeMissing` is done.
    MissingRecorded,
    /// `Compare` is done.
    Compared(Result<(), String>),
    /// `Load` is done.
    Loaded,
    /// The record says: the VM is ours, at this epoch.
    ClaimWon(u64),
    /// The record says: the VM is somebody else's.
    ClaimLost(String),
    /// The record could not be asked.
    ClaimUnknown(String),
    /// `Resume` is done; by this side's clock.
    Resumed {
        /// When QEMU said so.
        at_ns: u64,
    },
    /// The guest would not run. The VM is owned all the same.
    ResumeFailed(String),
    /// Every missing page is in memory.
    AllPlaced,
    /// The source is back, on new connections.
    Reconnected,
    /// The source was waited for long enough, or this side's agent ends.
    GiveUp(String),
}

/// What the target must do. Acts are done in order; all but `Send` report by an event.
#[derive(Clone, PartialEq, Debug)]
pub enum TargetEffect {
    /// Say this to the source.
    Send(Kind),
    /// Look whether it can work, and start a QEMU that waits.
    Prepare(control::Prepare),
    /// Make holes of these pages, verify them, and record that they are missing: durably before `Load` is
    /// done.
    TakeMissing(Vec<control::Bitmap>),
    /// The source's guest runs on: what was announced as missing is not, and comes as any other page; and
    /// hashes are of no use. Recorded durably before `Load` is done, too. Reports nothing.
    ForgetAnnounced,
    /// Keep these hashes for `Compare`. Reports nothing.
    KeepHashes(control::Hashes),
    /// Compare memory with the hashes.
    Compare,
    /// Load this device state.
    Load(control::State),
    /// Claim the VM.
    Claim,
    /// Let the guest run, tell the network.
    Resume,
    /// Tell the source what has arrived. Reports nothing.
    SendReceived,
    /// Tell the source what is still missing. Reports nothing.
    SendStillMissing,
    /// Record that nothing is missing, and tell the source. Reports nothing.
    Settle,
    /// Destroy this side's QEMU: no trace. Reports nothing.
    Destroy,
    /// It is over.
    End(TargetEnd),
}

/// How it ended.
#[derive(Clone, PartialEq, Debug)]
pub enum TargetEnd {
    /// The VM runs here.
    Completed,
    /// The VM does not run here.
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
    Waiting,
    Preparing,
    Receiving,
    Claiming,
    Starting { epoch: u64 },
    PostCopy,
    Ended,
}

/// How far the device state is.
#[derive(Clone, PartialEq, Debug)]
enum Device {
    Awaited,
    Here(control::State),
    Comparing(control::State),
    Loading,
    Loaded,
}

/// The target as a state machine.
#[derive(Clone, Debug)]
pub struct Target {
    state: State,
    hello: control::Hello,
    verify: bool,
    verified: bool,
    /// Whether a source that was lost while its guest runs there may come back.
    rejoins: bool,
    received: u32,
    missing_pending: u32,
    /// How many of the next `MissingRecorded` are of announcements that were forgotten.
    missing_forgotten: u32,
    /// Whether the source has announced what it will owe, be it nothing, or hashes, and not taken that back.
    announced: bool,
    owes: bool,
    device: Device,
    authorized: bool,
}

impl Target {
    /// A side that waits for a source; `hello` is what it will answer.
    pub fn new(hello: control::Hello) -> Self {
        Self {
            state: State::Greeting,
            hello,
            verify: false,
            verified: false,
            rejoins: false,
            received: 0,
            missing_pending: 0,
            missing_forgotten: 0,
            announced: false,
            owes: false,
            device: Device::Awaited,
            authorized: false,
        }
    }

    /// A side whose agent was restarted after the claim, and whose guest still lacks pages.
    pub fn after_claim(hello: control::Hello) -> Self {
        Self { state: State::PostCopy, owes: true, ..Self::new(hello) }
    }

    /// What must be done about an event.
    pub fn handle(&mut self, event: TargetEvent) -> Vec<TargetEffect> {
        use TargetEffect as A;
        use TargetEvent as E;
        match (self.state.clone(), event) {
            (State::Ended, _) => vec![],
            (_, E::Message(Kind::Ping(_) | Kind::Pong(_))) => vec![],

            // After the claim there is no way back: failures of the link are waited out.
            (
                State::Claiming | State::Starting { .. } | State::PostCopy,
                E::LinkLost(_) | E::GiveUp(_) | E::Message(Kind::Failed(_)),
            ) => {
                vec![]
            }
            (State::Receiving, E::LinkLost(why) | E::GiveUp(why)) if self.complete() => {
                // Authorized, and nothing more is needed from the source: the record decides, not the link.
                let _ = why;
                vec![]
            }
            (State::Receiving, E::LinkLost(_)) if self.may_rejoin() => vec![],
            (State::Receiving, E::Reconnected) if self.may_rejoin() => {
                let forget = if self.announced { vec![A::ForgetAnnounced] } else { vec![] };
                (self.announced, self.owes) = (false, false);
                self.missing_forgotten += std::mem::take(&mut self.missing_pending);
                [forget, vec![A::SendReceived]].concat()
            }
            // It had sent its device state, by its own mistake or over a link that it took for lost since:
            // that cannot be undone.
            (State::Receiving, E::Reconnected) if !self.authorized => {
                self.fail("the source", "it is back in the middle of its switchover".into(), true)
            }
            (State::Receiving, E::Message(Kind::Failed(_))) if self.complete() => vec![],
            (State::PostCopy, E::Broke { .. }) => vec![],
            (State::Claiming, E::Broke { why, .. }) | (State::Claiming, E::ClaimUnknown(why)) => {
                let _ = why;
                vec![A::Claim]
            }
            (State::Starting { epoch }, E::Broke { why, .. }) => self.started(epoch, 0, why),
            (_, E::LinkLost(why) | E::GiveUp(why)) => self.fail("the connection to the source", why, false),
            (_, E::Message(Kind::Failed(failed))) => self.fail(&failed.what, failed.why, false),
            (_, E::Broke { what, why }) => self.fail(&what, why, true),

            // The way of a migration.
            (State::Greeting, E::Message(Kind::Hello(_))) => {
                self.state = State::Waiting;
                vec![A::Send(Kind::Hello(self.hello.clone()))]
            }
            (State::Waiting, E::Message(Kind::Prepare(prepare))) => {
                self.state = State::Preparing;
                self.verify = prepare.verify;
                self.rejoins = prepare.give_up_ms > 0;
                vec![A::Prepare(prepare)]
            }
            (State::Preparing, E::Prepared(Ok(()))) => {
                self.state = State::Receiving;
                vec![A::Send(Kind::Ready(control::Ready::default()))]
            }
            (State::Preparing, E::Prepared(Err(reasons))) => {
                let why = reasons.join("\n");
                self.state = State::Ended;
                vec![
                    A::Destroy,
                    A::Send(Kind::Refused(control::Refused { reasons })),
                    A::End(TargetEnd::Failed { what: "preflight".into(), why }),
                ]
            }
            (State::Receiving, E::Received(round)) if round > self.received => {
                self.received = round;
                let answer = A::Send(Kind::RoundReceived(control::RoundReceived { round }));
                [vec![answer], self.advance()].concat()
            }
            (State::Receiving, E::Message(Kind::Missing(missing))) if self.device == Device::Awaited => {
                self.missing_pending += 1;
                (self.announced, self.owes) = (true, true);
                vec![A::TakeMissing(missing.blocks)]
            }
            (State::Receiving, E::MissingRecorded) if self.missing_forgotten > 0 => {
                self.missing_forgotten -= 1;
                self.advance()
            }
            (State::Receiving, E::MissingRecorded) if self.missing_pending > 0 => {
                self.missing_pending -= 1;
                let answer = A::Send(Kind::MissingRecorded(control::MissingRecorded {}));
                [vec![answer], self.advance()].concat()
            }
            (State::Receiving, E::Message(Kind::Hashes(hashes)))
                if self.device == Device::Awaited && self.verify =>
            {
                self.announced = true;
                vec![A::KeepHashes(hashes)]
            }
            (State::Receiving, E::Message(Kind::State(state))) if self.device == Device::Awaited => {
                self.device = Device::Here(state);
                self.advance()
            }
            (State::Receiving, E::Compared(result)) => match (self.device.clone(), result) {
                (Device::Comparing(state), Ok(())) => {
                    self.verified = true;
                    self.device = Device::Loading;
                    vec![A::Load(state)]
                }
                (Device::Comparing(_), Err(why)) => self.fail("verification", why, true),
                _ => vec![],
            },
            (State::Receiving, E::Loaded) if self.device == Device::Loading => {
                self.device = Device::Loaded;
                self.advance()
            }
            (State::Receiving, E::Message(Kind::Authorize(_))) if self.device != Device::Awaited => {
                self.authorized = true;
                self.advance()
            }
            (State::Claiming, E::ClaimWon(epoch)) => {
                self.state = State::Starting { epoch };
                vec![A::Resume]
            }
            (State::Claiming, E::ClaimLost(owner)) => {
                let why = format!("the VM belongs to {owner}");
                self.fail("the claim", why, true)
            }
            (State::Starting { epoch }, E::Resumed { at_ns }) => self.started(epoch, at_ns, String::new()),
            (State::Starting { epoch }, E::ResumeFailed(why)) => self.started(epoch, 0, why),
            (State::Starting { .. } | State::Claiming, E::AllPlaced) => {
                self.owes = false;
                vec![]
            }
            (State::Receiving, E::AllPlaced) => {
                self.owes = false;
                vec![]
            }
            (State::PostCopy, E::AllPlaced) => {
                self.state = State::Ended;
                vec![A::Settle, A::End(TargetEnd::Completed)]
            }
            (State::PostCopy, E::Reconnected) => vec![A::SendStillMissing],

            // Results that no longer matter.
            (_, E::ClaimUnknown(_) | E::ClaimWon(_) | E::ClaimLost(_) | E::Reconnected | E::AllPlaced) => {
                vec![]
            }
            (State::Claiming | State::Starting { .. } | State::PostCopy, _) => vec![],

            // Anything else is a peer out of step.
            (state, event) => {
                let why = format!("{} in {}", Brief(&event), Brief(&state));
                self.fail("the protocol", why, true)
            }
        }
    }

    /// Whether the source may still be back with a guest that runs there: one that has sent a device state
    /// never is.
    fn may_rejoin(&self) -> bool {
        self.rejoins && self.device == Device::Awaited && !self.authorized
    }

    /// Whether the record may decide without another word from the source.
    fn complete(&self) -> bool {
        let here = match &self.device {
            Device::Awaited => false,
            Device::Here(state) => self.received >= state.after_round,
            Device::Comparing(_) | Device::Loading | Device::Loaded => true,
        };
        self.authorized && here
    }

    fn advance(&mut self) -> Vec<TargetEffect> {
        match self.device.clone() {
            Device::Here(state)
                if self.received >= state.after_round
                    && self.missing_pending + self.missing_forgotten == 0 =>
            {
                if self.verify {
                    self.device = Device::Comparing(state);
                    vec![TargetEffect::Compare]
                } else {
                    self.device = Device::Loading;
                    vec![TargetEffect::Load(state)]
                }
            }
            Device::Loaded if self.authorized => {
                self.state = State::Claiming;
                vec![TargetEffect::Claim]
            }
            _ => vec![],
        }
    }

    fn started(&mut self, epoch: u64, resumed_ns: u64, paused_because: String) -> Vec<TargetEffect> {
        let steps = vec![];
        let committed =
            control::Committed { epoch, resumed_ns, verified: self.verified, paused_because, steps };
        let say = TargetEffect::Send(Kind::Committed(committed));
        if self.owes {
            self.state = State::PostCopy;
            return vec![say];
        }
        self.state = State::Ended;
        vec![say, TargetEffect::Settle, TargetEffect::End(TargetEnd::Completed)]
    }

    /// Only while the guest does not run here and the claim is not won.
    fn fail(&mut self, what: &str, why: String, tell: bool) -> Vec<TargetEffect> {
        self.state = State::Ended;
        let mut effects = vec![TargetEffect::Destroy];
        if tell {
            let failed = control::Failed { what: what.into(), why: why.clone(), cancelled: false };
            effects.push(TargetEffect::Send(Kind::Failed(failed)));
        }
        effects.push(TargetEffect::End(TargetEnd::Failed { what: what.into(), why }));
        effects
    }
}
