//! A guest whose disks are slow and at work is stopped at a moment at which they are not, if there is one in
//! time.

use super::*;
use units::{Disk, Queued, Requests};

/// A disk whose writes take two seconds each; so many are under way.
fn slow(in_flight: u64) -> Vec<Disk> {
    let writes = Requests { done: 5, took: Duration::from_secs(10) };
    vec![Disk {
        name: "d".into(),
        writes,
        queued: Some(Queued { begun: 5 + in_flight, in_flight }),
        ..Disk::default()
    }]
}

fn busy() -> (Source, Arc<Inn>) {
    let source = Source::new();
    *source.cpu.disks.lock().unwrap() = slow(1);
    source.guest(1);
    (source, Inn::new(&PAGES))
}

/// A moment is waited for: the disks are looked at again and again.
fn waits(source: &Source) {
    let before = source.cpu.looks.load(SeqCst);
    wait_until("looks at the disks", || source.cpu.looks.load(SeqCst) > before + 8);
    assert!(source.cpu.running.load(SeqCst) && source.journal.events.lock().unwrap().is_empty());
}

fn moved(source: &Source, inn: &Inn, report: &Report) {
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.error);
    assert_eq!((report.verified, inn.ram.overwritten()), (Some(true), 0), "I5");
    assert_eq!(inn.ram.content(), source.ram.content());
    assert_eq!(source.journal.events.lock().unwrap().join(","), "pausing,promise,gone 4,settled");
}

#[test]
fn a_guest_runs_on_until_its_slow_disks_are_quiet() {
    for mode in [Mode::PreCopy, Mode::Hybrid] {
        let (source, inn) = busy();
        let (report, events) = source.migrate(listen(&inn), options(mode), |_| {
            waits(&source);
            *source.cpu.disks.lock().unwrap() = slow(0);
        });
        moved(&source, &inn, &report);
        assert!(report.waited_for_disks_ms > 100.0, "{mode:?}: {report:?}");
        let told =
            |event: &&Event| matches!(event, Event::Note { text } if text.contains("its disks are at work"));
        assert_eq!(events.iter().filter(told).count(), 1, "{mode:?}: {events:?}");
    }
}

/// Where no quiet moment comes, patience ends the wait, or `--max-time`; a post-copy that was asked for waits
/// for none.
#[test]
fn nobody_waits_for_a_quiet_disk_for_ever() {
    // Two seconds of it are for the stop.
    let time = Some(Duration::from_secs(4));
    for (mode, max_time, least, most) in
        [(Mode::PreCopy, time, 500.0, 2200.0), (Mode::PostCopy, None, 0.0, 0.0)]
    {
        let (source, inn) = busy();
        let wish = MigrateOptions { max_time, ..options(mode) };
        let (report, _) = source.migrate(listen(&inn), wish, |_| {});
        moved(&source, &inn, &report);
        let waited = report.waited_for_disks_ms;
        assert!((least..=most).contains(&waited), "{mode:?} {max_time:?}: {waited} ms");
    }

    // Four requests of 200 ms at any time: five times as long as one takes.
    let (source, inn) = busy();
    let cpu = source.cpu.clone();
    let (report, _) = source.migrate(listen(&inn), options(Mode::PreCopy), |_| {
        for done in 1.. {
            let writes = Requests { done, took: Duration::from_millis(200 * done) };
            let queued = Some(Queued { begun: done + 4, in_flight: 4 });
            *cpu.disks.lock().unwrap() = vec![Disk { name: "e".into(), writes, queued, ..Disk::default() }];
            if !cpu.running.load(SeqCst) {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
    });
    moved(&source, &inn, &report);
    let waited = report.waited_for_disks_ms;
    assert!((700.0..3000.0).contains(&waited), "{waited} ms");
}

#[test]
fn i3_a_wait_for_quiet_disks_can_be_cancelled() {
    let (source, inn) = busy();
    let (report, _) = source.migrate(listen(&inn), options(Mode::PreCopy), |handle| {
        waits(&source);
        handle.cancel();
    });
    assert_eq!(report.outcome, Outcome::Cancelled, "{:?}", report.error);
    assert!(source.cpu.running.load(SeqCst) && source.journal.events.lock().unwrap().is_empty());
    wait_until("the target's end", || *inn.ended.lock().unwrap() == Some(false));

    let (source, inn) = busy();
    let (report, _) = source.migrate(listen(&inn), options(Mode::PreCopy), |_| {
        waits(&source);
        source.cpu.dies();
    });
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(report.error.is_some_and(|error| error.why.contains("its QEMU has ended")));
}

#[test]
fn i2_a_link_lost_in_a_wait_for_quiet_disks_loses_nothing() {
    for quiet in [false, true] {
        let (source, inn) = busy();
        let cable = Cable::to(listen(&inn));
        let (report, _) = source.migrate(cable.address, options(Mode::PreCopy), |_| {
            waits(&source);
            cable.cut();
            if quiet {
                *source.cpu.disks.lock().unwrap() = slow(0);
            }
            wait_until("another connection", || cable.refused.load(SeqCst) > 0);
            cable.mend();
            if !quiet {
                waits(&source);
                *source.cpu.disks.lock().unwrap() = slow(0);
            }
        });
        moved(&source, &inn, &report);
    }
}
