//! The targets as ordinary tests: their seeds are good, and neither these nor the corpus nor what a short
//! mutation makes of them does any harm.

use fuzz::{TARGETS, Target, mutate::Mutator};
use std::{
    env, fs,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Mutex,
    time::{Duration, Instant},
};
use units::Locked;

/// How long each target is given mutated inputs: five seconds for all of them.
const MUTATION: Duration = Duration::from_millis(450);

/// As many of them are always run, however busy the machine is.
const LEAST: u32 = 200;

/// An input of some KiB that takes longer is a way to stop us: they take less than 10 ms. Machines may be
/// busy.
const LONGEST: Duration = Duration::from_secs(20);

/// One at a time: the memory that one may take is counted for the process.
static TURN: Mutex<()> = Mutex::new(());

fn run(target: &Target, data: &[u8], from: &str) -> bool {
    let begin = Instant::now();
    let ran = catch_unwind(AssertUnwindSafe(|| target.run(data)));
    if let (Ok(good), true) = (&ran, begin.elapsed() < LONGEST) {
        return *good;
    }
    let kept = env::temp_dir().join(format!("whimbrel-fuzz-{}-{}", target.name, std::process::id()));
    fs::write(&kept, data).unwrap();
    let how = if ran.is_ok() { "took too long" } else { "did harm" };
    panic!("{from} {how}; once more: ./dev fuzz {} {}", target.name, kept.display());
}

fn story(name: &str) {
    let _turn = TURN.locked();
    let target = fuzz::target(name).unwrap();
    let mut corpus = target.seeds();
    assert!(!corpus.is_empty());
    for (n, seed) in corpus.iter().enumerate() {
        assert!(
            run(target, seed, "a seed"),
            "seed {n} of {name} is not taken for good: {:?}",
            String::from_utf8_lossy(seed)
        );
    }
    let mut files: Vec<_> =
        fs::read_dir(target.corpus()).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for file in files {
        let data = fs::read(&file).unwrap();
        run(target, &data, &file.display().to_string());
        corpus.push(data);
    }
    let (mut mutator, begin) = (Mutator::new(name), Instant::now());
    for n in 0.. {
        if n >= LEAST && begin.elapsed() >= MUTATION {
            break;
        }
        run(target, &mutator.next_input(&corpus), &format!("mutated input {n}"));
    }
}

/// One test for each target, so that one that ends the process is known by its name.
macro_rules! stories {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            story(stringify!($name));
        })*

        #[test]
        fn each_target_has_its_test() {
            let tested = [$(stringify!($name)),*];
            assert_eq!(TARGETS.iter().map(|target| target.name).collect::<Vec<_>>(), tested);
        }
    };
}

stories!(wire land control machines others recipe opens foreign history store spool qmp vmfile config);

#[test]
fn the_corpus_is_small() {
    let size = |target: &Target| -> u64 {
        fs::read_dir(target.corpus()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
    };
    let all: u64 = TARGETS.iter().map(size).sum();
    assert!(all < 1 << 20, "{all} bytes");
}
