//! What the guest does is what it did before, wherever it is; and nobody but us has it run on.

use super::*;
use api::Fate;
use ports::RunState;

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
fn i1_a_guest_continued_behind_our_back_never_runs_twice() {
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        for paused in [false, true] {
            let (source, inn) = (Source::new(), Inn::new(&PAGES));
            source.cpu.running.store(!paused, SeqCst);
            let running = source.cpu.running.clone();
            // All is sent, and nothing promised yet.
            *source.cpu.on_hold.lock().unwrap() = Some(Box::new(move || running.store(true, SeqCst)));
            let (report, _) = source.migrate(listen(&inn), options(mode), |_| {});
            assert_eq!(report.outcome, Outcome::Failed, "{mode:?}");
            assert_eq!(report.fate(), on("source", RunState::Running), "{mode:?}");
            assert!(report.error.unwrap().why.contains("somebody let the guest run on"));
            assert!(source.cpu.running.load(SeqCst) && !inn.cpu.running.load(SeqCst), "I1 {mode:?}");
        }
    }
}

#[test]
fn i3_a_guest_found_off_at_stop_leaves_no_pause_behind() {
    let (source, inn) = (Source::new(), Inn::new(&PAGES));
    *source.cpu.other_state.lock().unwrap() = Some(RunState::Shutdown);
    let (report, _) = source.migrate(listen(&inn), options(Mode::PreCopy), |_| {});
    assert_eq!(report.outcome, Outcome::Failed);
    assert_eq!(report.fate(), on("source", RunState::Shutdown));
    let error = report.error.unwrap().why;
    assert!(error.contains("has powered off"), "{error}");
    // The watchdog hears the same words: it lets nothing run, and has nothing more to watch.
    let said = source.journal.events.lock().unwrap().clone();
    assert_eq!(said, ["pausing", "pausing a paused one", "back"]);
    assert!(!source.cpu.running.load(SeqCst) && !inn.cpu.running.load(SeqCst));
}

#[test]
fn i3_a_guest_that_ends_while_its_memory_moves_ends_the_move() {
    for state in [RunState::Shutdown, RunState::Suspended, RunState::GuestPanicked, RunState::IoError] {
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        // Slow enough for a look to come first.
        let slow = MigrateOptions { bandwidth: Some(Rate(4 << 20)), ..options(Mode::PreCopy) };
        let mut since = Instant::now();
        let (report, _) = source.migrate(listen(&inn), slow, |_| {
            wait_until("memory moves", || inn.ram.content()[0].len() > 10);
            *source.cpu.other_state.lock().unwrap() = Some(state);
            source.cpu.running.store(false, SeqCst);
            since = Instant::now();
        });
        let ended = since.elapsed();
        assert_eq!(report.outcome, Outcome::Failed, "{state}");
        assert_eq!(report.fate(), on("source", state));
        assert!(report.error.unwrap().why.contains(&format!("it is in state {state}")));
        assert!(ended < Duration::from_secs(3), "{state}: {ended:?}");
        assert!(source.journal.events.lock().unwrap().is_empty(), "{state}: it was never stopped");
    }
}
