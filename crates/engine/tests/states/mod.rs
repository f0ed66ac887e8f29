//! What the guest does is what it did before, wherever it is; and nobody but us has it run on.

use super::*;
use engine::{ports::RunState, report::Fate};

fn on(host: &str, state: RunState) -> Fate {
    Fate::On { host: host.to_owned(), state }
}

#[test]
fn i9_a_paused_guest_arrives_paused_in_each_mode() {
    for mode in [Mode::PreCopy, Mode::Hybrid, Mode::PostCopy] {
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        source.cpu.running.store(false, SeqCst);
        let (report, _) = source.migrate(listen(&inn), options(mode), |_| {});
        assert_eq!((report.outcome, &report.error), (Outcome::Completed, &None), "{mode:?}");
        assert_eq!(report.fate(), on("target", RunState::Paused), "{mode:?}");
        assert!(!inn.cpu.running.load(SeqCst) && !source.cpu.running.load(SeqCst), "{mode:?}");
        let recorded = inn.journal.events.lock().unwrap().contains(&"goes on paused".to_owned());
        assert!(recorded, "{mode:?}: before the claim");
        assert_eq!(source.journal.events.lock().unwrap()[0], "pausing a paused one");
    }
}

#[test]
fn i1_a_guest_that_is_continued_behind_our_back_never_runs_twice() {
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        for paused in [false, true] {
            let (source, inn) = (Source::new(), Inn::new(&PAGES));
            source.cpu.running.store(!paused, SeqCst);
            let running = source.cpu.running.clone();
            // Promised, and nothing permitted yet.
            *source.cpu.on_freeze.lock().unwrap() = Some(Box::new(move || running.store(true, SeqCst)));
            let (report, _) = source.migrate(listen(&inn), options(mode), |_| {});
            assert_eq!(report.outcome, Outcome::Failed, "{mode:?}");
            assert_eq!(report.fate(), on("source", RunState::Running), "{mode:?}");
            assert!(report.error.unwrap().why.contains("somebody let the guest run on"));
            assert!(source.cpu.running.load(SeqCst) && !inn.cpu.running.load(SeqCst), "I1 {mode:?}");
        }
    }
}
