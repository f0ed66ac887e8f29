//! Blocks that the target reaches by itself: not sent, not tracked, not written by anybody but the guest.

use super::*;
use ports::{Reach, Reached};

const BIG: BlockId = BlockId(0);
const SMALL: BlockId = BlockId(1);

fn offer(block: BlockId, nonce: u64) -> (Handover, Nonce) {
    (Handover { block, reach: Reach::Host, place: vec![7; 16] }, Nonce::new(nonce))
}

/// A source that offers both blocks, and a target that reaches these, with these nonces.
fn pair(reached: &[(BlockId, u64)]) -> (Source, Arc<Inn>, Reaches) {
    let source = Source { offers: vec![offer(BIG, 11), offer(SMALL, 22)], ..Source::new() };
    let reached = reached.iter().map(|(block, nonce)| Reached { block: *block, nonce: Nonce::new(*nonce) });
    let reaches =
        Reaches { of_source: source.ram.clone(), own: Ram::new(&PAGES), reached: reached.collect() };
    let inn = Inn::usual(&PAGES);
    // The device state reads the block that is reached.
    let mut cpu = inn.cpu.clone();
    cpu.ram = source.ram.clone();
    let inn = Arc::new(Inn { cpu, reaches: Some(reaches.clone()), ..inn });
    (source, inn, reaches)
}

#[test]
fn what_the_target_reaches_does_not_travel_and_the_rest_does() {
    for mode in [Mode::PreCopy, Mode::Hybrid, Mode::PostCopy] {
        let (source, inn, reaches) = pair(&[(BIG, 11)]);
        source.guest(1);
        let (report, _) = source.migrate(listen(&inn), options(mode), |_| {});
        assert_eq!(report.outcome, Outcome::Completed, "{mode:?} {:?}", report.error);
        assert_eq!(report.verified, Some(true), "{mode:?}");
        assert_eq!(report.handed_over, PAGES[0] * 4096, "{mode:?}");
        assert!(inn.cpu.running.load(SeqCst) && source.cpu.destroyed.load(SeqCst), "{mode:?}");
        let own = reaches.own.content();
        assert!(own[0].is_empty(), "{mode:?}: a block that was handed over was sent");
        assert_eq!(own[1], source.ram.content()[1], "{mode:?}");
        assert_eq!(*source.ram.left_out.lock().unwrap(), [BIG], "{mode:?}");
        assert!(report.wire_bytes < 1 << 20, "{mode:?}: {} bytes", report.wire_bytes);
        let offered: Vec<_> = inn.offered.lock().unwrap().iter().map(|offered| offered.block).collect();
        assert_eq!(offered, [BIG, SMALL]);
    }
}

#[test]
fn a_target_that_reaches_all_is_sent_nothing() {
    let (source, inn, reaches) = pair(&[(SMALL, 22), (BIG, 11)]);
    source.guest(50);
    let (report, _) = source.migrate(listen(&inn), options(Mode::Auto), |_| {});
    assert_eq!((report.outcome, report.verified), (Outcome::Completed, Some(true)), "{:?}", report.error);
    assert_eq!(report.handed_over, report.guest_bytes);
    assert_eq!(report.rounds.iter().map(|round| round.pages).sum::<u64>(), 0, "{:?}", report.rounds);
    assert!(reaches.own.content().iter().all(|block| block.is_empty()));
    assert!(inn.cpu.running.load(SeqCst) && !source.cpu.running.load(SeqCst));
}

#[test]
fn a_target_that_reaches_nothing_is_sent_all() {
    let source = Source { offers: vec![offer(BIG, 11)], ..Source::new() };
    let inn = Inn::new(&PAGES);
    let (report, _) = source.migrate(listen(&inn), options(Mode::PreCopy), |_| {});
    assert_eq!((report.outcome, report.handed_over), (Outcome::Completed, 0), "{:?}", report.error);
    assert_eq!(inn.ram.content(), source.ram.content());
}

#[test]
fn i3_other_memory_of_the_same_name_is_refused_before_a_stop() {
    for reached in
        [vec![(BIG, 12)], vec![(BIG, 22)], vec![(BIG, 11), (SMALL, 11)], vec![(BIG, 11), (BIG, 11)]]
    {
        let (source, inn, reaches) = pair(&reached);
        let before = source.ram.content();
        let (report, _) = source.migrate(listen(&inn), options(Mode::PreCopy), |_| {});
        let error = report.error.unwrap();
        assert_eq!(error.what, "hand memory over to the target", "{}", error.why);
        assert!(source.cpu.running.load(SeqCst) && source.journal.events.lock().unwrap().is_empty());
        assert_eq!(source.ram.content(), before);
        assert!(reaches.own.content().iter().all(|block| block.is_empty()));
    }
}

#[test]
fn i3_a_rollback_finds_memory_that_was_handed_over_as_it_was() {
    let (source, inn, _) = pair(&[(BIG, 11), (SMALL, 22)]);
    inn.cpu.refuses.store(true, SeqCst);
    let (report, _) = source.migrate(listen(&inn), options(Mode::PreCopy), |_| {});
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(source.cpu.running.load(SeqCst) && !source.cpu.destroyed.load(SeqCst));
    assert_eq!(source.ram.guest_reads(0, 3), 3001);
    wait_until("the target's end", || inn.cpu.destroyed.load(SeqCst));
}
