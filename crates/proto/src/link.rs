//! The source's link to the target: which of its connections are opened again when, and when it is given up.
//!
//! A stream that is lost alone is opened again while the others go on. A control connection that is lost
//! takes the link with it. Then the machine of the migration says whether the link is wanted again: while the
//! guest runs here, for as long as the user wants, or, while the target's guest waits for pages, until it
//! works.

use crate::{
    SourceEvent,
    control::{self, Kind},
};
use std::{collections::BTreeMap, time::Duration};

/// How long to wait before the target is called again: at first, and at most. Each call is short, so that a
/// link that is back is noticed within a second (`tests/tests/interrupted.rs`).
const SOON: Duration = Duration::from_millis(50);
const LATER: Duration = Duration::from_millis(300);

/// A host that says that nobody listens there, or that its agent knows of no such migration, is called every
/// `SOON`: an agent that is started again is there at any moment, its guest waits, and such a call costs a
/// packet or two. After so many (20 s) it will be longer.
const EAGER: u32 = 400;

/// More reconnects than this in a row without a page having arrived in between mean that the link is of no
/// use.
const STUCK: u32 = 3;

/// More lost streams than this on one link mean that the link itself is bad.
const OFTEN: u32 = 8;

/// What the target's host says to a call that fails.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Answer {
    /// Nothing that is of use.
    None,
    /// Nobody listens there.
    Refused,
    /// Its agent knows of no such migration.
    Unknown,
}

/// What has happened to the link.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LinkEvent {
    /// It is lost, and wanted again while the guest runs here.
    Rejoin,
    /// It is lost, and wanted again because the target's guest waits for pages.
    Reconnect,
    /// The target was called in vain.
    Unreached(Answer, String),
    /// The control connection is welcome.
    Reached,
    /// The target's first word: its guest does not run; it has all of this round, and so many pages of the
    /// next one.
    Received(u32, u64),
    /// … or its guest lacks pages.
    NowMissing,
    /// … or it has everything.
    Settled,
    /// The control connection has ended, or says nothing that is waited for.
    Silent(String),
    /// All that carries pages is open.
    Opened,
    /// Not all of it could be opened.
    NotOpened(String),
    /// The datastore says that the target has everything.
    Complete,
    /// `Wait` is over.
    Again,
    /// The link was waited for as long as the user wants.
    GaveUp,
    /// A stream was lost.
    StreamLost(u32, String),
    /// Its new connection is welcome at the target.
    StreamOpened(u32),
    /// It could not be opened.
    StreamNotOpened(u32, String),
    /// The target says what it has of a stream that it welcomed again.
    StreamReopened(u32),
}

/// What is to be done about it, in order.
#[derive(Clone, PartialEq, Debug)]
#[expect(clippy::large_enum_variant, reason = "there are few at a time")]
pub enum LinkEffect {
    /// Ends all connections; whatever they still report does not matter any more.
    HangUp,
    /// Calls the target: `Unreached` or `Reached`.
    Dial,
    /// Sees to it that `Silent` follows if the target's first word does not come.
    AwaitWord,
    /// Sees to it that `GaveUp` follows when the user does not want to wait any longer.
    AwaitGiveUp,
    /// Sees to it that `Again` follows after so long.
    Wait(Duration),
    /// Looks whether the datastore says that the target has everything: `Complete`.
    LookAtFile,
    /// Opens all that carries pages: `Opened` or `NotOpened`.
    Open,
    /// The migration hears of it. Nothing of the above is waited for any more.
    Tell(SourceEvent),
    /// The migration hears that the link is given up.
    GiveUp(NoLink),
    /// Writes nothing more to this stream.
    EndStream(u32),
    /// Opens it again: `StreamOpened` or `StreamNotOpened`.
    OpenStream(u32),
    /// Goes on with it, by what the target said that it has.
    GoOn(u32),
}

/// Why a link is given up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NoLink {
    /// The target has given up meanwhile.
    Unknown,
    /// It was not back in time; why the last call failed.
    Late(String),
    /// It is lost again and again, at the same place.
    Stuck,
}

/// What of the round that was under way when the link was lost has to be sent again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rest {
    /// Nothing that went over the streams; what only a file was to bring is dirty again (I2).
    OfFile,
    /// All but what the target has of it.
    Part,
    /// All of it.
    Whole,
}

impl Rest {
    /// Of this round, when the target has all rounds up to `received`.
    pub fn of(round: u32, received: u32) -> Self {
        match round {
            _ if round <= received => Self::OfFile,
            _ if round == received + 1 => Self::Part,
            _ => Self::Whole,
        }
    }
}

/// Whether a word holds whatever has become of the connection on which it was said. All others are only true
/// of their own connection: what the target has is asked again on the next one.
pub fn outlives_link(kind: &Kind) -> bool {
    matches!(kind, Kind::Committed(_) | Kind::Settled(_) | Kind::Failed(_) | Kind::Note(_))
}

/// What a lost link is wanted for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Wanted {
    /// The guest runs here.
    ToRejoin,
    /// The target's guest waits for pages, and nobody else has them.
    ToServe,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
enum State {
    /// Open, or lost and not wanted again.
    #[default]
    Up,
    Waiting(Wanted),
    Dialling(Wanted),
    /// For the target's first word.
    Listening(Wanted),
    /// The target has all of this round, and so many pages of the next one; none: its guest lacks pages.
    Opening(Wanted, Option<(u32, u64)>),
}

/// What is there of a stream that is opened again: it comes in any order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
struct Pieces {
    open: bool,
    back: bool,
}

/// The link as a state machine.
#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
pub struct Link {
    state: State,
    /// Calls in vain since it was lost, and why the last one was.
    calls: u32,
    why: String,
    gave_up: bool,
    /// What the target had when the link was opened again last, and how often in a row it had no more than
    /// that.
    lost_at: Option<(u32, u64)>,
    stuck: u32,
    /// Streams that are being opened again, and how many were lost.
    streams: BTreeMap<u32, Pieces>,
    lost_streams: u32,
}

impl Link {
    /// Whether nothing is being done to open it again as a whole.
    pub fn is_up(&self) -> bool {
        self.state == State::Up
    }

    /// Whether the target was called, and has not answered yet.
    pub fn is_dialling(&self) -> bool {
        matches!(self.state, State::Dialling(_))
    }

    /// Whether the target's next word says what it lacks.
    pub fn awaits_word(&self) -> bool {
        matches!(self.state, State::Listening(_))
    }

    /// All connections were ended, for whatever reason.
    pub fn hung_up(&mut self) {
        self.streams.clear();
        self.lost_streams = 0;
    }

    /// What must be done about an event.
    pub fn handle(&mut self, event: LinkEvent) -> Vec<LinkEffect> {
        use LinkEffect as A;
        use LinkEvent as E;
        match (self.state, event) {
            (_, E::Rejoin) => self.begin(Wanted::ToRejoin),
            (_, E::Reconnect) => self.begin(Wanted::ToServe),

            // The whole of it.
            (State::Up, E::Silent(why)) => self.lose(why),
            (State::Waiting(wanted), E::Again) => {
                self.state = State::Dialling(wanted);
                vec![A::Dial]
            }
            (State::Waiting(Wanted::ToServe), E::Complete) => self.settled(),
            (State::Waiting(Wanted::ToRejoin), E::GaveUp) => {
                let why = std::mem::take(&mut self.why);
                self.give_up(NoLink::Late(why))
            }
            (State::Dialling(Wanted::ToRejoin), E::Unreached(Answer::Unknown, _)) => {
                self.give_up(NoLink::Unknown)
            }
            (State::Dialling(wanted), E::Unreached(answer, why)) => self.failed(wanted, answer, why),
            (State::Dialling(wanted), E::Reached) => {
                self.state = State::Listening(wanted);
                vec![A::AwaitWord]
            }
            (State::Listening(Wanted::ToRejoin), E::Received(round, pages)) => {
                self.state = State::Opening(Wanted::ToRejoin, Some((round, pages)));
                vec![A::Open]
            }
            (State::Listening(Wanted::ToServe), E::NowMissing) => {
                self.state = State::Opening(Wanted::ToServe, None);
                vec![A::Open]
            }
            (State::Listening(Wanted::ToServe), E::Settled) => self.settled(),
            (State::Listening(wanted), E::Received(..) | E::NowMissing | E::Settled) => {
                self.failed(wanted, Answer::None, "it speaks of a VM that is not where it should be".into())
            }
            (
                State::Dialling(wanted) | State::Listening(wanted) | State::Opening(wanted, _),
                E::Silent(why) | E::NotOpened(why),
            ) => self.failed(wanted, Answer::None, why),
            (State::Opening(_, has), E::Opened) => self.opened(has),
            (_, E::GaveUp) => {
                self.gave_up = true;
                vec![]
            }

            // One stream of it.
            (State::Up, E::StreamLost(stream, why)) => self.stream_lost(stream, &why),
            (State::Up, E::StreamNotOpened(stream, why)) if self.streams.contains_key(&stream) => {
                self.lose(why)
            }
            (State::Up, E::StreamOpened(stream)) => self.piece(stream, |pieces| pieces.open = true),
            (State::Up, E::StreamReopened(stream)) => self.piece(stream, |pieces| pieces.back = true),

            // Of attempts and connections that are over.
            _ => vec![],
        }
    }

    fn begin(&mut self, wanted: Wanted) -> Vec<LinkEffect> {
        let anew = self.is_up();
        self.state = State::Dialling(wanted);
        let mut effects = vec![LinkEffect::HangUp];
        if anew {
            (self.calls, self.gave_up) = (0, false);
            effects.extend((wanted == Wanted::ToRejoin).then_some(LinkEffect::AwaitGiveUp));
        }
        effects.push(LinkEffect::Dial);
        effects
    }

    /// An attempt came to nothing.
    fn failed(&mut self, wanted: Wanted, answer: Answer, why: String) -> Vec<LinkEffect> {
        if self.gave_up {
            return self.give_up(NoLink::Late(why));
        }
        (self.calls, self.why) = (self.calls.saturating_add(1), why);
        self.state = State::Waiting(wanted);
        let mut effects = vec![LinkEffect::HangUp, LinkEffect::Wait(pause(self.calls, answer))];
        effects.extend((wanted == Wanted::ToServe).then_some(LinkEffect::LookAtFile));
        effects
    }

    fn opened(&mut self, has: Option<(u32, u64)>) -> Vec<LinkEffect> {
        self.rest();
        let Some((round, pages)) = has else {
            let still = control::StillMissing::default();
            return vec![LinkEffect::Tell(SourceEvent::Message(Kind::StillMissing(still)))];
        };
        self.stuck = if self.lost_at.replace((round, pages)) == has { self.stuck + 1 } else { 0 };
        if self.stuck >= STUCK {
            return self.give_up(NoLink::Stuck);
        }
        vec![LinkEffect::Tell(SourceEvent::Rejoined(round))]
    }

    fn settled(&mut self) -> Vec<LinkEffect> {
        self.rest();
        vec![LinkEffect::Tell(SourceEvent::Message(Kind::Settled(control::Settled::default())))]
    }

    fn give_up(&mut self, why: NoLink) -> Vec<LinkEffect> {
        self.rest();
        vec![LinkEffect::HangUp, LinkEffect::GiveUp(why)]
    }

    fn lose(&mut self, why: String) -> Vec<LinkEffect> {
        self.rest();
        vec![LinkEffect::HangUp, LinkEffect::Tell(SourceEvent::LinkLost(why))]
    }

    fn rest(&mut self) {
        (self.state, self.calls, self.gave_up) = (State::Up, 0, false);
        self.why.clear();
    }

    fn stream_lost(&mut self, stream: u32, why: &str) -> Vec<LinkEffect> {
        if self.streams.contains_key(&stream) {
            return vec![];
        }
        self.lost_streams += 1;
        if self.lost_streams > OFTEN {
            return self.lose(format!("its connections end again and again: {why}"));
        }
        self.streams.insert(stream, Pieces::default());
        vec![LinkEffect::EndStream(stream), LinkEffect::OpenStream(stream)]
    }

    fn piece(&mut self, stream: u32, is_there: impl Fn(&mut Pieces)) -> Vec<LinkEffect> {
        let Some(pieces) = self.streams.get_mut(&stream) else { return vec![] };
        is_there(pieces);
        if *pieces != (Pieces { open: true, back: true }) {
            return vec![];
        }
        self.streams.remove(&stream);
        vec![LinkEffect::GoOn(stream)]
    }
}

/// How long to wait after the last of so many calls failed like this.
fn pause(calls: u32, answer: Answer) -> Duration {
    match calls {
        ..=EAGER if answer != Answer::None => SOON,
        calls => LATER.min(SOON * 2_u32.saturating_pow(calls.saturating_sub(1))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use LinkEffect as A;
    use LinkEvent as E;

    fn silent() -> LinkEvent {
        E::Silent("cut".into())
    }

    fn told(effects: &[LinkEffect]) -> Option<&SourceEvent> {
        effects.iter().find_map(|effect| if let A::Tell(event) = effect { Some(event) } else { None })
    }

    /// A link that was opened again, so far.
    fn after(events: &[LinkEvent]) -> (Link, Vec<LinkEffect>) {
        let mut link = Link::default();
        let mut effects = vec![];
        for event in events {
            effects = link.handle(event.clone());
        }
        (link, effects)
    }

    #[test]
    fn a_link_is_opened_again_step_by_step() {
        let late = || E::Unreached(Answer::None, "late".into());
        let settled = SourceEvent::Message(Kind::Settled(control::Settled::default()));
        let outdated = SourceEvent::Message(Kind::StillMissing(control::StillMissing::default()));
        let table = [
            // While the guest runs here.
            (vec![silent()], vec![A::HangUp, A::Tell(SourceEvent::LinkLost("cut".into()))]),
            (vec![E::Rejoin], vec![A::HangUp, A::AwaitGiveUp, A::Dial]),
            (vec![E::Rejoin, late()], vec![A::HangUp, A::Wait(SOON)]),
            (vec![E::Rejoin, late(), E::Again], vec![A::Dial]),
            (vec![E::Rejoin, E::Reached], vec![A::AwaitWord]),
            (vec![E::Rejoin, E::Reached, E::Received(2, 7)], vec![A::Open]),
            (
                vec![E::Rejoin, E::Reached, E::Received(2, 7), E::Opened],
                vec![A::Tell(SourceEvent::Rejoined(2))],
            ),
            (vec![E::Rejoin, E::Reached, E::NowMissing], vec![A::HangUp, A::Wait(SOON)]),
            (vec![E::Rejoin, E::Reached, silent()], vec![A::HangUp, A::Wait(SOON)]),
            (
                vec![E::Rejoin, E::Reached, E::Received(2, 7), E::NotOpened("no".into())],
                vec![A::HangUp, A::Wait(SOON)],
            ),
            (
                vec![E::Rejoin, E::Unreached(Answer::Unknown, "no".into())],
                vec![A::HangUp, A::GiveUp(NoLink::Unknown)],
            ),
            // The attempt that is under way is the last.
            (vec![E::Rejoin, E::GaveUp], vec![]),
            (vec![E::Rejoin, E::GaveUp, late()], vec![A::HangUp, A::GiveUp(NoLink::Late("late".into()))]),
            // While the target's guest waits: for ever.
            (vec![E::Reconnect], vec![A::HangUp, A::Dial]),
            (vec![E::Reconnect, late()], vec![A::HangUp, A::Wait(SOON), A::LookAtFile]),
            (vec![E::Reconnect, late(), E::Complete], vec![A::Tell(settled.clone())]),
            (
                vec![E::Reconnect, E::Unreached(Answer::Unknown, "no".into())],
                vec![A::HangUp, A::Wait(SOON), A::LookAtFile],
            ),
            (vec![E::Reconnect, E::Reached, E::Settled], vec![A::Tell(settled)]),
            (vec![E::Reconnect, E::Reached, E::NowMissing, E::Opened], vec![A::Tell(outdated)]),
            // What comes too late.
            (vec![E::Again], vec![]),
            (vec![E::Reached], vec![]),
            (vec![E::Rejoin, E::Again], vec![]),
            (vec![E::Rejoin, E::StreamLost(0, "cut".into())], vec![]),
        ];
        for (events, effects) in table {
            assert_eq!(after(&events).1, effects, "{events:?}");
        }
    }

    #[test]
    fn a_link_that_is_late_or_stuck_is_given_up() {
        let (mut link, _) = after(&[E::Rejoin, E::Unreached(Answer::None, "late".into())]);
        assert_eq!(link.handle(E::GaveUp), [A::HangUp, A::GiveUp(NoLink::Late("late".into()))]);
        // At the same place each time.
        let mut link = Link::default();
        let mut again = |pages| {
            for event in [E::Rejoin, E::Reached, E::Received(1, pages)] {
                link.handle(event);
            }
            link.handle(E::Opened)
        };
        for _ in 0..STUCK {
            assert!(told(&again(5)).is_some());
        }
        assert_eq!(again(5), [A::HangUp, A::GiveUp(NoLink::Stuck)]);
        assert!(told(&again(6)).is_some(), "another page has arrived");
    }

    #[test]
    fn a_stream_goes_on_when_both_sides_are_ready() {
        for pieces in [[E::StreamOpened(1), E::StreamReopened(1)], [E::StreamReopened(1), E::StreamOpened(1)]]
        {
            let (mut link, effects) = after(&[E::StreamLost(1, "cut".into())]);
            assert_eq!(effects, [A::EndStream(1), A::OpenStream(1)]);
            assert_eq!(link.handle(E::StreamLost(1, "cut".into())), [], "the target has lost it, too");
            let [first, second] = pieces;
            assert_eq!(link.handle(first), []);
            assert_eq!(link.handle(second), [A::GoOn(1)]);
        }
        let (mut link, _) = after(&[E::StreamLost(1, "cut".into())]);
        assert!(told(&link.handle(E::StreamNotOpened(1, "no".into()))).is_some());
    }

    #[test]
    fn streams_that_end_again_and_again_end_the_link() {
        let mut link = Link::default();
        for _ in 0..OFTEN {
            assert_eq!(link.handle(E::StreamLost(0, "cut".into())).len(), 2);
            assert_eq!(link.handle(E::StreamOpened(0)), []);
            assert_eq!(link.handle(E::StreamReopened(0)), [A::GoOn(0)]);
        }
        assert!(told(&link.handle(E::StreamLost(0, "cut".into()))).is_some());
        link.hung_up();
        assert_eq!(link.handle(E::StreamLost(0, "cut".into())).len(), 2, "another link");
    }

    #[test]
    fn a_host_that_answers_is_called_sooner_than_a_silent_one() {
        let ms = |calls, answer| pause(calls, answer).as_millis();
        let silent = [1, 2, 3, 4, 99].map(|calls| ms(calls, Answer::None));
        assert_eq!(silent, [50, 100, 200, 300, 300]);
        for answer in [Answer::Refused, Answer::Unknown] {
            let waits = [1, 99, EAGER, EAGER + 1, u32::MAX].map(|calls| ms(calls, answer));
            assert_eq!(waits, [50, 50, 50, 300, 300]);
        }
    }

    #[test]
    fn i2_what_the_target_lacks_of_a_round_is_sent_again() {
        for (round, received, rest) in [(2, 2, Rest::OfFile), (2, 3, Rest::OfFile), (3, 2, Rest::Part)] {
            assert_eq!(Rest::of(round, received), rest);
        }
        assert_eq!(Rest::of(4, 2), Rest::Whole);
    }
}
