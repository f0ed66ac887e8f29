//! Somebody else changes the VM while it is moved.

use super::*;

/// When it is changed.
#[derive(Clone, Copy, PartialEq, Debug)]
enum When {
    /// While the guest runs.
    Running,
    /// The guest has just been stopped: no device state is saved any more.
    Stopped,
    /// The device state has just been saved.
    Saved,
}

#[test]
fn i3_a_vm_that_is_changed_while_it_is_moved_stays() {
    let table = [When::Running, When::Stopped, When::Saved];
    for (mode, when) in
        [Mode::PreCopy, Mode::PostCopy].into_iter().flat_map(|mode| table.map(|when| (mode, when)))
    {
        let (source, inn) = (Source::new(), Inn::new(&PAGES));
        source.guest(1);
        let differs = source.cpu.differs.clone();
        let change = move || differs.lock().unwrap().push("job backup0 runs".to_owned());
        match when {
            When::Running => change(),
            When::Stopped => source.cpu.on_stop.lock().unwrap().push_back(Box::new(change)),
            When::Saved => source.cpu.on_save.lock().unwrap().push_back(Box::new(change)),
        }
        let (report, _) = source.migrate(listen(&inn), options(mode), |_| {});
        let story = format!("{mode:?} {when:?}: {report:?}");
        let error = report.error.as_ref().expect(&story);
        assert_eq!((report.outcome, error.why.as_str()), (Outcome::Failed, "job backup0 runs"), "{story}");
        assert_eq!(error.vm_runs_on.as_deref(), Some("source"), "{story}");
        assert!(source.cpu.running.load(SeqCst) && !inn.cpu.running.load(SeqCst), "{story}");
        let saves = source.cpu.saves.load(SeqCst);
        assert_eq!(saves, u8::from(when == When::Saved), "nothing takes the disks of a VM in use: {story}");
        assert!(!source.journal.events.lock().unwrap().iter().any(|said| said == "promise"), "{story}");
    }
}
