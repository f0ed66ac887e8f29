//! Random sequences, the smallest one of those that fail, and those that have failed before.

use super::{
    action::{Action, Deed, Mode, from_words, in_words},
    listed::OPEN_IN_PAUSE,
    pair::{Broken, IN_WHAT_WAS_SET, IN_WHETHER_IT_RUNS, Twins, Went},
};
use crate::{Error, Result, storm::Moment};
use proptest::{
    collection::vec,
    prelude::{Just, Strategy, prop_oneof},
    sample::select,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, RngSeed, TestRunner},
};
use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Instant,
};

/// Sequences that have failed once, a line each: they are tried before any other.
const KEPT: &str = include_str!("kept.txt");

/// What came of a search.
#[derive(Debug, Default)]
pub struct Found {
    /// How many sequences made no difference that is not listed.
    pub sequences: u32,
    /// How often the VM was moved in them, and how often that was refused.
    pub went: Went,
    /// How many did where that is known ([`OPEN_IN_PAUSE`]).
    pub open: u32,
    /// Those that did elsewhere, each with how to try it again.
    pub broken: Vec<Error>,
}

/// Those that have failed before.
pub fn kept() -> Result<Vec<Vec<Action>>> {
    let lines = KEPT.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(from_words).collect()
}

/// Each of what others do, at each moment of a migration in each mode that has it; and what is left to be
/// seen thereafter.
pub fn interventions() -> Vec<Vec<Action>> {
    let mut all = Vec::new();
    let wanted = |deed: &Deed| !matches!(deed, Deed::Write | Deed::Sum);
    for deed in Deed::all().filter(wanted) {
        for (mode, at) in Mode::all().flat_map(|mode| Moment::all().map(move |at| (mode, at))) {
            let post_copy = matches!(at, Moment::PostCopy(_));
            let rounds = matches!(at, Moment::Round(_) | Moment::Moving(_));
            if (mode == Mode::PreCopy && post_copy) || (mode == Mode::PostCopy && rounds) {
                continue;
            }
            let after = [Deed::Resume, Deed::Write, Deed::Sum].map(Action::Both);
            let during = [Action::Both(Deed::Write), Action::MoveWhile(mode, at, deed)];
            let with = |before: Option<Action>| before.into_iter().chain(during).chain(after).collect();
            all.push(with(deed.needs().map(Action::Both)));
            if deed == Deed::Resume {
                // Of a guest that only we have stopped.
                all.push(with(None));
            }
        }
    }
    all
}

/// Whether the guest may stand still then: a round takes most of a second, and what comes before it a quarter
/// of one.
fn may_be_in_the_pause(mode: Mode, at: Moment) -> bool {
    match at {
        Moment::Asked(ms) => mode == Mode::PostCopy && ms > 100,
        Moment::Moving(ms) => mode == Mode::PostCopy || ms > 300,
        Moment::Round(_) | Moment::Switchover(_) => true,
        Moment::PostCopy(_) => false,
    }
}

/// Whether it is known not to hold then.
fn is_open(mode: Mode, at: Moment, deed: Deed) -> bool {
    may_be_in_the_pause(mode, at) && OPEN_IN_PAUSE.contains(&deed)
}

/// Whether an action is one of those.
fn opens(action: &Action) -> bool {
    matches!(*action, Action::MoveWhile(mode, at, deed) if is_open(mode, at, deed))
}

/// Whether a sequence broke no more than what is known: in such an action what was set there was lost, and
/// nothing else; or QEMU's own migration, and the guest runs at our target alone.
fn is_known(sequence: &[Action], broken: &Broken) -> bool {
    let last = broken.actions.checked_sub(1).and_then(|n| sequence.get(n));
    let own = matches!(last, Some(Action::MoveWhile(_, _, Deed::Migrate)));
    let what = &broken.error.what;
    last.is_some_and(opens)
        && (what.ends_with(IN_WHAT_WAS_SET) || (own && what.ends_with(IN_WHETHER_IT_RUNS)))
}

/// Interventions that are known to hold.
pub fn interventions_that_hold() -> Vec<Vec<Action>> {
    interventions().into_iter().filter(|all| !all.iter().any(opens)).collect()
}

/// One action: every other one moves the VM, and most of the rest leave it able to be moved.
fn action() -> impl Strategy<Value = Action> {
    let mode = || select(Mode::all().collect::<Vec<_>>());
    // After its end nothing happens to a VM.
    let deed = || select(Deed::all().filter(|deed| *deed != Deed::Quit).collect::<Vec<_>>());
    let moment = || select(Moment::all().collect::<Vec<_>>());
    prop_oneof![
        6 => deed().prop_map(Action::Both),
        1 => Just(Action::Both(Deed::Resume)),
        1 => Just(Action::Both(Deed::Write)),
        1 => Just(Action::Both(Deed::Sum)),
        3 => mode().prop_map(Action::Move),
        2 => (mode(), moment(), deed())
            .prop_filter("one that holds", |(mode, at, deed)| !is_open(*mode, *at, *deed))
            .prop_map(|(mode, at, deed)| Action::MoveWhile(mode, at, deed)),
    ]
}

/// So many random sequences of so many actions, the same from each seed.
pub fn draw(sequences: u32, actions: usize, seed: u64) -> Result<Vec<Vec<Action>>> {
    let config =
        Config { rng_algorithm: RngAlgorithm::ChaCha, rng_seed: RngSeed::Fixed(seed), ..Config::default() };
    let mut runner = TestRunner::new(config);
    let mut one = || vec(action(), actions).new_tree(&mut runner).map(|tree| tree.current());
    (0..sequences).map(|_| one().map_err(|why| Error::new("draw a sequence", why))).collect()
}

/// How sequences are tried.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    /// So many at a time: each of them mostly waits.
    pub jobs: usize,
    /// What QEMU refuses is told.
    pub told: bool,
    /// Of one that fails the smallest is looked for that does, too.
    pub smallest: bool,
}

/// Lets pairs live through all of them, whatever becomes of the others. What breaks a promise is told at
/// once, and how far it has come now and then.
pub fn all(twins: &Twins<'_>, sequences: &[Vec<Action>], how: How) -> Found {
    /// So often it is said how far it has come.
    const EACH: u32 = 24;
    let (begin, next) = (Instant::now(), AtomicUsize::new(0));
    let found = Mutex::new(Found::default());
    let work = || {
        while let Some(sequence) = sequences.get(next.fetch_add(1, Relaxed)) {
            let lived = twins.tell(sequence, how.told);
            let lived = lived.map_err(|broken| {
                eprintln!("twin: fails: {}\n  {}", in_words(sequence), broken.error);
                let known = is_known(sequence, &broken);
                let error = match how.smallest && !known {
                    true => smallest(twins, sequence.clone(), broken),
                    false => named(sequence, broken),
                };
                (error, known)
            });
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            match lived {
                Ok(went) => found.add(went),
                Err((error, true)) => {
                    eprintln!("OPEN IN THE PAUSE: {error}");
                    found.open += 1;
                }
                Err((error, false)) => {
                    eprintln!("BROKEN: {error}");
                    found.broken.push(error);
                }
            }
            let tried = found.tried();
            if tried.is_multiple_of(EACH) {
                let (spent, broken) = (begin.elapsed().as_secs(), found.broken.len());
                eprintln!("[{spent} s] {tried}/{}: {broken} broke a promise", sequences.len());
            }
        }
    };
    thread::scope(|scope| (0..how.jobs.max(1)).for_each(|_| drop(scope.spawn(work))));
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn named(sequence: &[Action], broken: Broken) -> Error {
    Error::new(format!("./dev twin --only '{}'", in_words(sequence)), broken.error)
}

/// Takes away what the failure does not need: what comes after it, then halves of the rest, quarters, and so
/// on. (Proptest's own way would try smaller moments first, each of which takes seconds.)
fn smallest(twins: &Twins<'_>, mut sequence: Vec<Action>, mut broken: Broken) -> Error {
    /// Each takes as long as the failure did; a person can go on from there.
    const TRIES: usize = 24;
    sequence.truncate(broken.actions);
    let (mut tries, mut size) = (0, sequence.len() / 2);
    while size > 0 {
        // The last one is what fails.
        let mut end = sequence.len().saturating_sub(1);
        while end > 0 && tries < TRIES {
            let begin = end.saturating_sub(size);
            let mut fewer = sequence.clone();
            fewer.drain(begin..end);
            tries += 1;
            if let Err(still) = twins.live(&fewer) {
                fewer.truncate(still.actions);
                (sequence, broken) = (fewer, still);
            }
            end = begin.min(sequence.len().saturating_sub(1));
        }
        size /= 2;
    }
    named(&sequence, broken)
}

impl Found {
    fn add(&mut self, went: Went) {
        self.sequences += 1;
        self.went.moved += went.moved;
        self.went.refused += went.refused;
    }

    fn tried(&self) -> u32 {
        self.sequences + self.open + self.broken.len() as u32
    }

    /// The first of them, as an error.
    pub fn held(self) -> Result<Self> {
        match self.broken.first() {
            None => Ok(self),
            Some(first) => {
                let how_many = format!("{} of {} sequences broke a promise", self.broken.len(), self.tried());
                Err(Error::new(how_many, first))
            }
        }
    }
}
