//! A source that has promised and lost its target for good: nobody can know who owns the VM, and no timeout
//! decides it.

use super::*;
use engine::{Conn, Traffic};
use proto::{Purpose, Token};
use std::{io, sync::atomic::AtomicU64};

/// Counts how often a source says that it is back.
struct Counting(TcpDial, Arc<AtomicU64>);

impl Dial for Counting {
    fn dial(&self, kind: Purpose, token: Option<&Token>) -> io::Result<Conn> {
        self.1.fetch_add(u64::from(kind == Purpose::Resume), SeqCst);
        self.0.dial(kind, token)
    }

    fn dial_soon(&self, kind: Purpose, token: Option<&Token>, _: Duration) -> io::Result<Conn> {
        self.dial(kind, token)
    }

    fn is_plaintext(&self) -> bool {
        self.0.is_plaintext()
    }

    fn traffic(&self) -> &Arc<Traffic> {
        self.0.traffic()
    }
}

/// Lost in the moment between the promise and the authorization.
fn lost_for_good() -> (Source, Arc<Inn>, Cable) {
    let (mut source, inn) = (Source::new(), Inn::new(&PAGES));
    let cable = Cable::to(listen(&inn));
    source.journal.cut_at_fence = Some(cable.clone());
    (source, inn, cable)
}

#[test]
fn i1_a_target_lost_for_good_leaves_the_vm_stopped_in_doubt() {
    let (mut source, inn, cable) = lost_for_good();
    source.doubt = Some(Duration::from_millis(1));
    let (report, events) = source.migrate(cable.address, options(Mode::PreCopy), |_| {});
    assert_eq!(report.outcome, Outcome::InDoubt);
    let error = report.error.unwrap();
    assert_eq!(error.vm_runs_on, None, "nobody knows");
    assert!(error.why.contains("whimbrel resolve vm --here --i-have-fenced target"), "{}", error.why);
    assert_eq!(*source.journal.events.lock().unwrap(), ["pausing", "promise"], "the promise stands");
    assert!(!source.cpu.running.load(SeqCst) && !source.cpu.destroyed.load(SeqCst));
    assert!(!inn.cpu.running.load(SeqCst), "the authorization never came");
    assert!(cable.refused.load(SeqCst) > 0, "it was asked");
    assert!(matches!(events.last(), Some(Event::Done(report)) if report.outcome == Outcome::InDoubt));
}

#[test]
fn a_person_who_fenced_the_target_is_heard_between_claims() {
    let (source, inn, cable) = lost_for_good();
    let refused = cable.refused.clone();
    let (report, _) = source.migrate(cable.address, options(Mode::PreCopy), |handle| {
        wait_until("the second claim", || refused.load(SeqCst) >= 2);
        assert!(!source.cpu.running.load(SeqCst), "no answer is no permission");
        handle.resolve_here();
    });
    assert_eq!(report.outcome, Outcome::Failed, "the migration failed, and is over");
    assert_eq!(report.error.unwrap().vm_runs_on.as_deref(), Some("source"));
    assert_eq!(*source.journal.events.lock().unwrap(), ["pausing", "promise", "back"]);
    assert!(source.cpu.running.load(SeqCst) && !inn.cpu.running.load(SeqCst));
    // What it writes from now on is nobody's business any more, and nothing of it is missing.
    source.ram.guest_writes(0, 5999, 1);
    assert_eq!(source.ram.guest_reads(0, 5999), 1);
}

#[test]
fn a_target_that_comes_back_in_time_answers_instead_of_a_person() {
    let (source, inn, cable) = lost_for_good();
    let (report, _) = source.migrate(cable.address, options(Mode::PreCopy), |_| {
        wait_until("the second claim", || cable.refused.load(SeqCst) >= 2);
        cable.mend();
    });
    assert_eq!(report.outcome, Outcome::Failed, "{:?}", report.error);
    assert_eq!(*source.journal.events.lock().unwrap(), ["pausing", "promise", "back"]);
    assert!(source.cpu.running.load(SeqCst) && !inn.cpu.running.load(SeqCst));
}

/// The record has said that the guest may go on here, and QEMU does not let it. A target that were told that
/// the guest is back would forget the record, which the recovery asks again.
#[test]
fn i1_a_guest_that_would_not_go_on_is_not_said_to_be_back() {
    for refuses in [true, false] {
        let (source, inn, cable) = lost_for_good();
        source.cpu.refuses.store(refuses, SeqCst);
        let back = Arc::new(AtomicU64::new(0));
        let dial = TcpDial::new(vec![cable.address], "here", MIGRATION, Security::Plaintext);
        let dial = Arc::new(Counting(dial, back.clone()));
        let (report, _) = source.migrate_by(dial, options(Mode::PreCopy), |_| {
            wait_until("the second claim", || cable.refused.load(SeqCst) >= 2);
            cable.mend();
        });
        assert_eq!(report.outcome, Outcome::Failed, "{:?}", report.error);
        assert_eq!(source.cpu.running.load(SeqCst), !refuses);
        assert!(!inn.cpu.running.load(SeqCst));
        if refuses {
            // What must not come is waited for as long as it took where it comes.
            thread::sleep(Duration::from_millis(300));
            assert_eq!(back.load(SeqCst), 0, "the target was called");
        } else {
            wait_until("the call", || back.load(SeqCst) > 0);
        }
    }
}
