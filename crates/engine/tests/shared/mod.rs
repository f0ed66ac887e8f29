//! A record that both sides ask: the source's word to it comes before the promise, and never holds a guest up
//! for long.

use super::*;
use ports::{Claim, Claimed, Offer};
use std::io;

/// Both sides' record, in memory. What becomes of an offer is the story's business.
struct OneRecord {
    claims: Arc<Record>,
    journal: Journal,
    offer: fn() -> io::Result<()>,
}

impl Ownership for OneRecord {
    fn identity(&self) -> io::Result<String> {
        Ok("model 1".to_owned())
    }

    fn offer(&self, offer: &Offer) -> io::Result<()> {
        assert_eq!((offer.from.as_str(), offer.to.as_str(), offer.expected), ("source", "target", Epoch(3)));
        (self.offer)()?;
        self.journal.events.lock().unwrap().push("offered".to_owned());
        Ok(())
    }

    fn claim(&self, claim: &Claim) -> io::Result<Claimed> {
        self.claims.claim(claim)
    }
}

fn with(offer: fn() -> io::Result<()>) -> (Source, Arc<Inn>) {
    let (mut source, inn) = (Source::new(), Inn::new(&PAGES));
    let (claims, journal) = (inn.record.clone(), source.journal.clone());
    source.record = Some(Arc::new(OneRecord { claims, journal, offer }));
    (source, inn)
}

#[test]
fn offer_then_promise_then_claim_in_this_order() {
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        // Slower than everything else that happens meanwhile.
        let (source, inn) = with(|| {
            thread::sleep(Duration::from_millis(300));
            Ok(())
        });
        let (report, _) = source.migrate(listen(&inn), options(mode), |_| {});
        assert_eq!(report.outcome, Outcome::Completed, "{mode:?} {:?}", report.error);
        let events = source.journal.events.lock().unwrap().clone();
        assert_eq!(events[..3], ["pausing", "offered", "promise"], "{mode:?}");
        assert!(inn.cpu.running.load(SeqCst) && !source.cpu.running.load(SeqCst));
    }
}

#[test]
fn i3_a_record_that_fails_at_the_offer_leaves_the_guest_here() {
    let fails = || Err(io::Error::other("no space left"));
    let silent = || {
        thread::sleep(Duration::from_secs(20));
        Ok(())
    };
    for (offer, says) in [(fails as fn() -> io::Result<()>, "no space left"), (silent, "does not answer")] {
        let (source, inn) = with(offer);
        let (report, _) = source.migrate(listen(&inn), options(Mode::PreCopy), |_| {});
        assert_eq!(report.outcome, Outcome::Failed);
        let error = report.error.unwrap();
        assert_eq!(error.vm_runs_on.as_deref(), Some("source"));
        assert!(error.why.contains(says), "{}", error.why);
        assert_eq!(*source.journal.events.lock().unwrap(), ["pausing", "back"], "nothing was promised");
        assert!(source.cpu.running.load(SeqCst) && !inn.cpu.running.load(SeqCst));
    }
}

#[test]
fn a_source_that_cannot_ask_its_record_does_not_begin() {
    struct Away;
    impl Ownership for Away {
        fn identity(&self) -> io::Result<String> {
            Err(io::Error::other("the datastore is not mounted"))
        }
        fn offer(&self, _: &Offer) -> io::Result<()> {
            panic!("nothing is offered")
        }
        fn claim(&self, _: &Claim) -> io::Result<Claimed> {
            panic!("nobody claims")
        }
    }
    let (mut source, inn) = (Source::new(), Inn::new(&PAGES));
    source.record = Some(Arc::new(Away));
    let (report, _) = source.migrate(listen(&inn), options(Mode::PreCopy), |_| {});
    assert_eq!(report.outcome, Outcome::Failed);
    let error = report.error.unwrap();
    assert!(
        error.why.contains("not mounted") && error.vm_runs_on.as_deref() == Some("source"),
        "{}",
        error.why
    );
    assert!(source.journal.events.lock().unwrap().is_empty());
}
