//! Random sequences, the smallest one of those that fail, and those that have failed before.

use super::{
    action::{Action, Deed, Mode, from_words, in_words},
    listed::OPEN_IN_PAUSE,
    pair::{Twins, Went},
};
use crate::{Error, Result, storm::Moment};
use proptest::{
    collection::vec,
    prelude::{Just, Strategy, prop_oneof},
    sample::select,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, RngSeed, TestRunner},
};

/// Sequences that have failed once, a line each: they are tried before any other.
const KEPT: &str = include_str!("kept.txt");

/// What came of a search.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// How many sequences were tried.
    pub sequences: u32,
    /// How often the VM was moved in them, and how often that was refused.
    pub went: Went,
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
            let before = deed.needs().map(Action::Both);
            let after = [Deed::Resume, Deed::Write, Deed::Sum].map(Action::Both);
            let during = [Action::Both(Deed::Write), Action::MoveWhile(mode, at, deed)];
            all.push(before.into_iter().chain(during).chain(after).collect());
        }
    }
    all
}

/// Whether the guest may stand still then: a round takes most of a second, and what comes before it a quarter of one.
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

/// Interventions that are known to hold.
pub fn interventions_that_hold() -> Vec<Vec<Action>> {
    let open =
        |action: &Action| matches!(*action, Action::MoveWhile(mode, at, deed) if is_open(mode, at, deed));
    interventions().into_iter().filter(|all| !all.iter().any(open)).collect()
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

/// Tries so many sequences of so many actions, from this seed on. The error names the smallest sequence that
/// fails.
pub fn search(twins: &mut Twins<'_>, sequences: u32, actions: usize, seed: u64) -> Result<Found> {
    let config =
        Config { rng_algorithm: RngAlgorithm::ChaCha, rng_seed: RngSeed::Fixed(seed), ..Config::default() };
    let mut runner = TestRunner::new(config);
    let mut found = Found::default();
    for _ in 0..sequences {
        let sequence = vec(action(), actions).new_tree(&mut runner);
        let sequence = sequence.map_err(|why| Error::new("draw a sequence", why))?.current();
        match twins.live(&sequence) {
            Ok(went) => {
                found.sequences += 1;
                found.went.moved += went.moved;
                found.went.refused += went.refused;
            }
            Err(error) => return Err(smallest(twins, sequence, error, seed)),
        }
    }
    Ok(found)
}

/// Takes away what the failure does not need: what comes after it, and then one action after the other.
/// (Proptest's own way would try smaller moments first, each of which takes seconds.)
fn smallest(twins: &mut Twins<'_>, mut sequence: Vec<Action>, mut error: Error, seed: u64) -> Error {
    eprintln!("twin: fails: {}\n  {error}", in_words(&sequence));
    let mut at = sequence.len();
    while at > 0 {
        at -= 1;
        let mut fewer = sequence.clone();
        fewer.remove(at);
        if let Err(still) = twins.live(&fewer) {
            (sequence, error) = (fewer, still);
        }
    }
    Error::new(format!("seed {seed}: ./dev twin --only '{}'", in_words(&sequence)), error)
}
