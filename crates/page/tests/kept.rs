//! What the target keeps of the VM from before: named by the source, copied only once it was verified.

use page::{
    Batch, Class, Counts, Kept, NOTHING_KEPT, PageDecoder, References, Run, Sent, Tagger, TargetMemory,
    Undecodable,
};
use proptest::prelude::*;
use std::{cell::RefCell, convert::Infallible};
use units::{BlockId, PAGE_SIZE, PageIndex, PageRange};

const PAGES: usize = 24;
const BLOCK: BlockId = BlockId(0);
const KEY: [u8; 32] = [2; 32];

/// One byte stands for a page's content; 0 for zeros.
type Contents = [u8; PAGES];

fn page(content: u8) -> Vec<u8> {
    (0..PAGE_SIZE).map(|at| content.wrapping_mul((at / 100) as u8 | 1)).collect()
}

/// The target: what is in its memory, and what it keeps.
struct Target {
    memory: RefCell<Vec<Vec<u8>>>,
    kept: Option<Contents>,
}

impl TargetMemory for Target {
    type Error = Infallible;

    fn pages(&self, block: BlockId) -> Option<u64> {
        (block == BLOCK).then_some(PAGES as u64)
    }

    fn read(&self, _: BlockId, range: PageRange, into: &mut [u8]) -> Result<(), Infallible> {
        let pages = self.memory.borrow()[range.start.0 as usize..range.end().0 as usize].concat();
        into.copy_from_slice(&pages);
        Ok(())
    }

    fn read_kept(&self, _: BlockId, range: PageRange, into: &mut [u8]) -> bool {
        let Some(kept) = self.kept else { return false };
        let pages = kept[range.start.0 as usize..range.end().0 as usize].iter().map(|content| page(*content));
        into.copy_from_slice(&pages.collect::<Vec<_>>().concat());
        true
    }
}

/// What is sent of the guest's memory, whose references are known or not, to a target that told this.
fn encode(guest: &Contents, told: &[u64], refers: bool) -> (Vec<(Run, Vec<u8>)>, Counts) {
    let sent = Sent::new(&[PAGES as u64], PAGES as u64, &[1; 32], Tagger::new(KEY));
    let mut batch = Batch::new(PAGES * PAGE_SIZE);
    let references = References { sent: &sent, round: 1, may_refer: |_, _| false };
    let kept = Kept { tagger: sent.tagger(), first: PageIndex(0), tags: told };
    let read = |into: &mut [u8]| {
        into.chunks_exact_mut(PAGE_SIZE)
            .zip(guest)
            .for_each(|(into, kind)| into.copy_from_slice(&page(*kind)));
        Ok::<(), Infallible>(())
    };
    let all = PageRange::new(PageIndex(0), PAGES as u64);
    batch.add(BLOCK, all, refers.then_some(&references), Some(kept), read).unwrap();
    batch.tag(&sent);
    let runs = batch.runs().0.to_vec();
    let mut parts = batch.parts();
    let mut own = |run: &Run| if run.payload() > 0 { parts.next().unwrap().to_vec() } else { vec![] };
    let sent = runs.iter().map(|run| (*run, own(run))).collect();
    drop(parts);
    (sent, batch.take_counts())
}

fn told(kept: &Contents) -> Vec<u64> {
    let tagger = Tagger::new(KEY);
    kept.iter().map(|kind| if *kind == 0 { NOTHING_KEPT } else { tagger.short(&page(*kind)) }).collect()
}

fn land(target: &Target, sent: &[(Run, Vec<u8>)]) -> Result<(), Undecodable<Infallible>> {
    let mut decoder = PageDecoder::new(Some(Tagger::new(KEY)), PAGES * PAGE_SIZE);
    for (run, own) in sent {
        let content = decoder.decode(BLOCK, run, own, target)?;
        let content = content.map_or_else(|| vec![0; run.raw()], <[u8]>::to_vec);
        let into = &mut target.memory.borrow_mut()[run.range.start.0 as usize..run.range.end().0 as usize];
        into.iter_mut().zip(content.chunks(PAGE_SIZE)).for_each(|(into, page)| *into = page.to_vec());
    }
    Ok(())
}

fn target(kept: Option<Contents>) -> Target {
    Target { memory: RefCell::new(vec![page(0); PAGES]), kept }
}

fn contents() -> impl Strategy<Value = Contents> {
    prop::array::uniform24(0u8..5)
}

proptest! {
    #[test]
    fn what_is_kept_is_restored_with_all_else(guest in contents(), kept in contents(), refers: bool) {
        let (sent, counts) = encode(&guest, &told(&kept), refers);
        let target = target(Some(kept));
        prop_assert_eq!(land(&target, &sent), Ok(()));
        prop_assert!(target.memory.borrow().iter().zip(&guest).all(|(memory, kind)| *memory == page(*kind)));
        let same = guest.iter().zip(&kept).filter(|(guest, kept)| guest == kept && **kept != 0).count();
        prop_assert_eq!(counts.kept, same as u64);
    }

    /// What is kept has become something else since it was told, or the source names what nobody told.
    #[test]
    fn i7_a_kept_page_is_copied_only_if_it_is_what_was_tagged(
        guest in contents(), kept in contents(), now in contents(), refers: bool,
    ) {
        let (sent, _) = encode(&guest, &told(&kept), refers);
        let target = target(Some(now));
        match land(&target, &sent) {
            Ok(()) => {
                let all = target.memory.borrow();
                prop_assert!(all.iter().zip(&guest).all(|(memory, kind)| *memory == page(*kind)));
            }
            Err(Undecodable::NotKept(range)) => {
                let range = range.start.0 as usize..range.end().0 as usize;
                prop_assert!(now[range.clone()] != guest[range]);
            }
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}

#[test]
fn neighbours_that_are_kept_travel_as_one_tag() {
    let kept = [3; PAGES];
    let mut guest = kept;
    guest[10] = 0;
    let (sent, counts) = encode(&guest, &told(&kept), true);
    let runs: Vec<_> = sent.iter().map(|(run, own)| (run.class, run.range.count, own.len())).collect();
    // Zeros are there already.
    assert_eq!(runs, [(Class::Kept, 10, 16), (Class::Kept, 13, 16)]);
    assert_eq!((counts.kept, counts.zero), (23, 1));
}

#[test]
fn what_is_gone_is_refused_and_not_made_up() {
    let kept = [4; PAGES];
    let (sent, _) = encode(&kept, &told(&kept), true);
    assert!(matches!(land(&target(None), &sent), Err(Undecodable::NotKept(_))));
}
