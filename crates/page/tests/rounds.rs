//! What was encoded at the source, round by round, is decoded at the target; and what is not right is
//! refused.

use page::{
    Batch, Class, Codec, Encoder, PageDecoder, References, Run, Sent, Tagger, TargetMemory, Undecodable,
};
use proptest::prelude::*;
use std::{cell::RefCell, collections::HashSet, convert::Infallible};
use units::{BlockId, PAGE_SIZE, PageIndex, PageRange};

const PAGES: u64 = 40;
const BATCH: u64 = 8;
const BLOCKS: [BlockId; 2] = [BlockId(0), BlockId(1)];

/// The target's memory, and the obvious way to keep it.
struct Memory(RefCell<Vec<Vec<u8>>>);

impl Memory {
    fn new() -> Self {
        Self(RefCell::new(vec![vec![0; PAGES as usize * PAGE_SIZE]; BLOCKS.len()]))
    }

    fn write(&self, block: BlockId, range: PageRange, content: Option<&[u8]>) {
        let (at, length) = (range.start.offset() as usize, range.count as usize * PAGE_SIZE);
        let into = &mut self.0.borrow_mut()[usize::from(block.0)][at..at + length];
        match content {
            Some(content) => into.copy_from_slice(content),
            None => into.fill(0),
        }
    }
}

impl TargetMemory for Memory {
    type Error = Infallible;

    fn pages(&self, block: BlockId) -> Option<u64> {
        BLOCKS.contains(&block).then_some(PAGES)
    }

    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> Result<(), Infallible> {
        let at = range.start.offset() as usize;
        into.copy_from_slice(&self.0.borrow()[usize::from(block.0)][at..at + into.len()]);
        Ok(())
    }

    fn read_kept(&self, _: BlockId, _: PageRange, _: &mut [u8]) -> bool {
        false
    }
}

/// A batch as it arrives.
#[derive(Clone, Debug)]
struct Arrived {
    block: BlockId,
    runs: Vec<Run>,
    own: Vec<Vec<u8>>,
    codec: Option<Codec>,
    compressed: Vec<u8>,
}

fn arrived(block: BlockId, batch: &mut Batch) -> Arrived {
    let mut parts: std::collections::VecDeque<Vec<u8>> = batch.parts().map(<[u8]>::to_vec).collect();
    let (runs, codec, compressed) = batch.runs();
    let own =
        runs.iter().map(|run| if run.payload() > 0 { parts.pop_front().unwrap() } else { vec![] }).collect();
    let compressed = if compressed > 0 { parts.pop_front().unwrap() } else { vec![] };
    assert!(parts.is_empty());
    Arrived { block, runs: runs.to_vec(), own, codec, compressed }
}

fn land(
    memory: &Memory,
    page_decoder: &mut PageDecoder,
    batch: &Arrived,
) -> Result<(), Undecodable<Infallible>> {
    let compressed = batch.runs.iter().filter(|run| run.class == Class::Compressed);
    page_decoder.begin(batch.codec, &batch.compressed, compressed.map(Run::raw).sum())?;
    for (run, own) in batch.runs.iter().zip(&batch.own) {
        let content = page_decoder.decode(batch.block, run, own, memory)?;
        memory.write(batch.block, run.range, content);
    }
    Ok(())
}

/// What the guest writes to a page: whole content, of which there are few kinds, or a word.
#[derive(Clone, Debug)]
enum Write {
    Content(u8),
    Word(usize, u8),
}

fn content(kind: u8) -> Vec<u8> {
    match kind {
        0 => vec![0; PAGE_SIZE],
        // Does not compress.
        kind if kind % 2 == 0 => blake_noise(kind),
        kind => (0..PAGE_SIZE).map(|i| kind.wrapping_mul((i / 16) as u8)).collect(),
    }
}

fn blake_noise(seed: u8) -> Vec<u8> {
    let mut x = u64::from(seed) << 32 | 0x9e37_79b9;
    std::iter::repeat_with(move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    })
    .take(PAGE_SIZE / 8)
    .flatten()
    .collect()
}

fn writes() -> impl Strategy<Value = Vec<(bool, u64, Write)>> {
    let write = prop_oneof![
        (0u8..12).prop_map(Write::Content),
        (0..PAGE_SIZE, any::<u8>()).prop_map(|(at, byte)| Write::Word(at, byte)),
    ];
    prop::collection::vec((any::<bool>(), 0..PAGES, write), 0..60)
}

fn apply(guest: &Memory, dirty: &mut HashSet<(BlockId, u64)>, writes: &[(bool, u64, Write)]) {
    for (second, page, write) in writes {
        let block = BLOCKS[usize::from(*second)];
        let at = *page as usize * PAGE_SIZE;
        let memory = &mut guest.0.borrow_mut()[usize::from(block.0)][at..at + PAGE_SIZE];
        match write {
            Write::Content(kind) => memory.copy_from_slice(&content(*kind)),
            Write::Word(at, byte) => memory[*at] = *byte,
        }
        dirty.insert((block, *page));
    }
}

/// One round of one stream: the batches of the dirty pages.
fn encode(
    guest: &Memory,
    sent: &Sent,
    round: u32,
    dirty: &HashSet<(BlockId, u64)>,
    codec: Option<Codec>,
) -> (Vec<Arrived>, page::Counts) {
    let (mut batch, mut encoder, mut out) =
        (Batch::new(BATCH as usize * PAGE_SIZE), Encoder::default(), vec![]);
    let done = RefCell::new(HashSet::new());
    let references = References {
        sent,
        round,
        may_refer: |block, page: PageIndex| {
            !dirty.contains(&(block, page.0)) || done.borrow().contains(&(block, page.0))
        },
    };
    for block in BLOCKS {
        let mut flush = |batch: &mut Batch| {
            batch.tag(sent);
            codec.map(|codec| batch.compress(&mut encoder, codec, |range| range.start.0 % 7 != 0));
            if !batch.runs().0.is_empty() {
                out.push(arrived(block, batch));
            }
            batch.clear();
        };
        // Neighbours together, as streams take them.
        let mut page = 0;
        while page < PAGES {
            let count = (page..PAGES).take_while(|page| dirty.contains(&(block, *page))).count() as u64;
            if count == 0 {
                page += 1;
                continue;
            }
            if batch.room() == 0 {
                flush(&mut batch);
            }
            let range = PageRange::new(PageIndex(page), count.min(batch.room()));
            batch.add(block, range, Some(&references), None, |into| guest.read(block, range, into)).unwrap();
            done.borrow_mut().extend((page..page + range.count).map(|page| (block, page)));
            page += range.count;
        }
        flush(&mut batch);
    }
    (out, batch.take_counts())
}

const CODECS: [Option<Codec>; 3] = [None, Some(Codec::Lz4), Some(Codec::Zstd(1))];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    #[test]
    fn what_is_refined_is_restored_round_after_round(rounds in prop::collection::vec(writes(), 1..6),
        codec in 0usize..3) {
        let (guest, target) = (Memory::new(), Memory::new());
        let sent = Sent::new(&[PAGES; 2], PAGES, &[1; 32], Tagger::new([2; 32]));
        let mut page_decoder = PageDecoder::new(Some(Tagger::new([2; 32])), BATCH as usize * PAGE_SIZE);
        for (writes, round) in rounds.iter().zip(1..) {
            let mut dirty = HashSet::new();
            apply(&guest, &mut dirty, writes);
            sent.turn(round);
            let (batches, counts) = encode(&guest, &sent, round, &dirty, CODECS[codec]);
            let all = counts.zero + counts.unchanged + counts.duplicate + counts.delta;
            let all = all + counts.compressed + counts.raw;
            prop_assert_eq!(all, dirty.len() as u64);
            for batch in &batches {
                prop_assert_eq!(land(&target, &mut page_decoder, batch), Ok(()));
            }
            prop_assert!(*guest.0.borrow() == *target.0.borrow());
        }
    }

    /// Batches lost, swapped or spoilt on the way: either the tag tells, or what is arrived does not depend
    /// on it. In no case does anything panic, and a reference never yields anything but what was tagged.
    #[test]
    fn what_refers_to_other_content_than_was_meant_is_refused(
        first in writes(), second in writes(), lose in any::<prop::sample::Index>(),
        spoil: (prop::sample::Index, u8),
    ) {
        let (guest, target) = (Memory::new(), Memory::new());
        let sent = Sent::new(&[PAGES; 2], PAGES, &[1; 32], Tagger::new([2; 32]));
        let mut page_decoder = PageDecoder::new(Some(Tagger::new([2; 32])), BATCH as usize * PAGE_SIZE);
        let mut all = vec![];
        let mut meant = vec![];
        for (writes, round) in [(&first, 1), (&second, 2)] {
            let mut dirty = HashSet::new();
            apply(&guest, &mut dirty, writes);
            sent.turn(round);
            let batches = encode(&guest, &sent, round, &dirty, Some(Codec::Lz4)).0;
            meant.resize(meant.len() + batches.len(), guest.0.borrow().clone());
            all.extend(batches);
        }
        prop_assume!(!all.is_empty());
        let lost = lose.index(all.len());
        for (i, (batch, meant)) in all.iter().zip(&meant).enumerate().filter(|(i, _)| *i != lost) {
            let mut batch = batch.clone();
            let spoilt = spoil.0.index(all.len()) == i && spoil.1 != 0;
            if spoilt && let Some(own) = batch.own.iter_mut().find(|own| !own.is_empty()) {
                let at = spoil.0.index(own.len());
                own[at] ^= spoil.1;
            }
            let compressed = batch.runs.iter().filter(|run| run.class == Class::Compressed);
            if page_decoder.begin(batch.codec, &batch.compressed, compressed.map(Run::raw).sum()).is_err() {
                continue;
            }
            for (run, own) in batch.runs.iter().zip(&batch.own) {
                let Ok(content) = page_decoder.decode(batch.block, run, own, &target) else { continue };
                if matches!(run.class, Class::Duplicate | Class::Delta) {
                    let at = run.range.start.offset() as usize;
                    let meant = &meant[usize::from(batch.block.0)][at..at + run.raw()];
                    prop_assert!(content == Some(meant), "{run:?} passed as something else");
                }
                target.write(batch.block, run.range, content);
            }
        }
    }

    #[test]
    fn hostile_messages_are_refused_without_harm(
        start in prop_oneof![0..PAGES, any::<u64>()], count in prop_oneof![0u64..200, any::<u64>()],
        class in 0usize..6,
        bytes in any::<u32>(), own in prop::collection::vec(any::<u8>(), 0..300), key: bool,
    ) {
        let class =
            [Class::Zero, Class::Kept, Class::Duplicate, Class::Delta, Class::Compressed, Class::Raw][class];
        let memory = Memory::new();
        let tagger = key.then(|| Tagger::new([0; 32]));
        let mut page_decoder = PageDecoder::new(tagger, BATCH as usize * PAGE_SIZE);
        prop_assert!(page_decoder.begin(Some(Codec::Lz4), &own, usize::MAX / 2).is_err());
        for bytes in [bytes, own.len() as u32] {
            // Whoever reads the table has checked that the pages exist.
            let range = PageRange::new(PageIndex(start), count);
            if !range.fits(PAGES) {
                continue;
            }
            let run = Run { range, class, bytes };
            let restored = page_decoder.decode(BlockId(0), &run, &own, &memory);
            let harmless = matches!(class, Class::Zero | Class::Raw)
            || (class == Class::Compressed && count == 0);
            prop_assert!(restored.is_err() || harmless);
        }
    }
}

#[test]
fn each_page_takes_the_cheapest_way() {
    let (guest, target) = (Memory::new(), Memory::new());
    let sent = Sent::new(&[PAGES; 2], PAGES, &[1; 32], Tagger::new([2; 32]));
    let mut page_decoder = PageDecoder::new(Some(Tagger::new([2; 32])), BATCH as usize * PAGE_SIZE);
    let mut go = |round: u32, writes: &[(bool, u64, Write)]| {
        let mut dirty = HashSet::new();
        apply(&guest, &mut dirty, writes);
        sent.turn(round);
        let (batches, counts) = encode(&guest, &sent, round, &dirty, None);
        batches.iter().for_each(|batch| land(&target, &mut page_decoder, batch).unwrap());
        assert_eq!(*guest.0.borrow(), *target.0.borrow());
        let runs: Vec<(Class, u64)> =
            batches.iter().flat_map(|b| &b.runs).map(|run| (run.class, run.range.count)).collect();
        (counts, runs)
    };
    let kinds: Vec<_> = (1..6).map(|page| (false, page, Write::Content(page as u8))).collect();
    assert_eq!(go(1, &kinds).1, [(Class::Raw, 5)]);
    // The same again: nothing travels. Zeros where zeros are: nothing either.
    let (counts, runs) = go(2, &[kinds.clone(), vec![(true, 9, Write::Content(0))]].concat());
    assert_eq!((counts.unchanged, counts.zero, runs), (5, 1, vec![]));
    // The same elsewhere: one reference for all of it.
    let copies: Vec<_> = (1..6).map(|page| (true, page, Write::Content(page as u8))).collect();
    assert_eq!(go(3, &copies).1, [(Class::Duplicate, 5)]);
    // What repeats itself refers to what goes before it, but never to itself.
    let again: Vec<_> = (20..40).map(|page| (false, page, Write::Content(101 + (page % 3) as u8))).collect();
    let (counts, runs) = go(3, &again);
    assert_eq!((counts.raw, counts.duplicate), (3, 17), "{runs:?}");
    // A word, twice: the first time there is no older version yet.
    assert_eq!(go(4, &[(false, 1, Write::Word(5, 77))]).1, [(Class::Raw, 1)]);
    assert_eq!(go(5, &[(false, 1, Write::Word(5, 78))]).1, [(Class::Delta, 1)]);
    assert_eq!(go(6, &[(false, 1, Write::Content(0))]).1, [(Class::Zero, 1)]);
}

#[test]
fn a_target_with_unknown_content_gets_zeros_too() {
    let (guest, target) = (Memory::new(), Memory::new());
    for (page, stale) in (0..8).map(|page| (page, Write::Content(page as u8 + 1))) {
        apply(&target, &mut HashSet::new(), &[(false, page, stale)]);
    }
    let sent = Sent::new(&[PAGES; 2], PAGES, &[1; 32], Tagger::new([2; 32])).to_a_target_with_content();
    let mut page_decoder = PageDecoder::new(Some(Tagger::new([2; 32])), BATCH as usize * PAGE_SIZE);
    // The first page of content makes fingerprints for all pages around it: of nothing, not of zeros.
    for (round, pages) in [(1, 7..8), (2, 0..7), (3, 0..8)] {
        let mut dirty = HashSet::new();
        let writes: Vec<_> = pages.map(|page| (false, page, Write::Content((page == 7) as u8))).collect();
        apply(&guest, &mut dirty, &writes);
        sent.turn(round);
        let (batches, counts) = encode(&guest, &sent, round, &dirty, None);
        batches.iter().for_each(|batch| land(&target, &mut page_decoder, batch).unwrap());
        // Once it is known, it does not travel again.
        assert_eq!(batches.iter().any(|batch| !batch.runs.is_empty()), round < 3, "{counts:?}");
    }
    assert_eq!(*guest.0.borrow(), *target.0.borrow());
}
