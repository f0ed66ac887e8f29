//! What a page is sent as. Beside it the limit: reading memory, and copying it, which each page pays anyway.

use crate::noise;
use divan::{Bencher, black_box, counter::BytesCount};
use page::{Batch, References, Sent, Tagger};
use std::convert::Infallible;
use units::{BlockId, PAGE_SIZE, PageIndex, PageRange};

/// Larger than a core's second-level cache: a migration finds no page in it.
const PAGES: usize = 8192;

/// Pages of a batch.
const BATCH: usize = proto::BATCH_PAGES as usize;

fn pages(content: bool) -> Vec<u8> {
    if !content {
        return vec![0; PAGES * PAGE_SIZE];
    }
    noise(1).take(PAGES * PAGE_SIZE / 8).flat_map(u64::to_le_bytes).collect()
}

#[divan::bench(sample_count = 20)]
fn limit_read(bencher: Bencher) {
    let memory = pages(true);
    bencher.counter(BytesCount::new(memory.len())).bench(|| {
        let (words, _) = black_box(&memory).as_chunks::<64>();
        words.iter().fold([0u8; 64], |mut all, word| {
            all.iter_mut().zip(word).for_each(|(a, b)| *a ^= b);
            all
        })
    });
}

#[divan::bench(sample_count = 20)]
fn limit_copy(bencher: Bencher) {
    let (memory, mut batch) = (pages(true), vec![0; BATCH * PAGE_SIZE]);
    bencher.counter(BytesCount::new(memory.len())).bench_local(|| {
        black_box(&memory)
            .chunks_exact(batch.len())
            .for_each(|part| black_box(&mut batch).copy_from_slice(part));
    });
}

#[divan::bench(args = [false, true], sample_count = 20)]
fn zero_check(bencher: Bencher, content: bool) {
    let memory = pages(content);
    bencher
        .counter(BytesCount::new(memory.len()))
        .bench(|| black_box(&memory).chunks_exact(PAGE_SIZE).filter(|page| page::is_zero(page)).count());
}

#[divan::bench(sample_count = 20)]
fn fingerprint(bencher: Bencher) {
    let memory = pages(true);
    bencher.counter(BytesCount::new(memory.len())).bench(|| {
        let fingerprints = black_box(&memory).chunks_exact(PAGE_SIZE).map(page::fingerprint);
        fingerprints.fold(0, |all, fingerprint| all ^ fingerprint)
    });
}

/// One hash for so many pages.
#[divan::bench(args = [1, 8, 128], sample_count = 20)]
fn tag(bencher: Bencher, pages_a_run: usize) {
    let (memory, tagger) = (pages(true), Tagger::new([1; 32]));
    bencher.counter(BytesCount::new(memory.len())).bench(|| {
        let runs = black_box(&memory).chunks_exact(pages_a_run * PAGE_SIZE);
        runs.fold(0, |all, run| all ^ tagger.tag(run)[0])
    });
}

/// Refines all of memory, with the copy into the batch that reading guest memory is.
fn encode(memory: &[u8], sent: &Sent, round: u32, batch: &mut Batch) {
    let references = References { sent, round, may_refer: |_, page: PageIndex| page.0 >= PAGES as u64 };
    for (content, at) in memory.chunks_exact(BATCH * PAGE_SIZE).zip((0..).step_by(BATCH)) {
        let range = PageRange::new(PageIndex(at), BATCH as u64);
        let read = |into: &mut [u8]| {
            into.copy_from_slice(content);
            Ok::<(), Infallible>(())
        };
        let _ = batch.add(BlockId(0), range, Some(&references), None, read);
        batch.tag(sent);
        black_box(batch.runs());
        batch.clear();
    }
}

/// Kinds of memory, and what was sent before.
#[divan::bench(
    args = ["zero", "new", "unchanged", "known", "known in order", "delta", "stripes"],
    sample_count = 10,
    sample_size = 1
)]
fn encode_kind(bencher: Bencher, kind: &str) {
    let mut memory = pages(kind != "zero");
    if kind == "stripes" {
        memory.chunks_exact_mut(PAGE_SIZE).step_by(2).for_each(|page| page.fill(0));
    }
    let changed = match kind {
        "known" => {
            // The same pages, but no two neighbours are neighbours again.
            let page = |i: usize| &memory[i * PAGE_SIZE..(i + 1) * PAGE_SIZE];
            (0..PAGES).flat_map(|i| page(i * 4999 % PAGES)).copied().collect()
        }
        "delta" => {
            let mut changed = memory.clone();
            changed.chunks_exact_mut(PAGE_SIZE).for_each(|page| page[500..540].fill(7));
            changed
        }
        _ => memory.clone(),
    };
    let mut batch = Batch::new(BATCH * PAGE_SIZE);
    bencher
        .counter(BytesCount::new(memory.len()))
        .with_inputs(|| {
            let sent = Sent::new(&[2 * PAGES as u64], 2 * PAGES as u64, &[1; 32], Tagger::new([2; 32]));
            // The second half of the block is where others find what is known.
            let references = References { sent: &sent, round: 2, may_refer: |_, _| false };
            let mut batch = Batch::new(BATCH * PAGE_SIZE);
            let first = match kind {
                "unchanged" => 0..1,
                "delta" => 0..3,
                "known" | "known in order" => 1..2,
                _ => 0..0,
            };
            for (round, half) in first.enumerate() {
                let half = if kind == "delta" { 0 } else { half };
                sent.turn(2 + round as u32);
                for (content, at) in memory.chunks_exact(BATCH * PAGE_SIZE).zip((0..).step_by(BATCH)) {
                    let range = PageRange::new(PageIndex(at + half * PAGES as u64), BATCH as u64);
                    let mut content = content.to_vec();
                    content.chunks_exact_mut(PAGE_SIZE).for_each(|page| page[8] ^= 2 * round as u8);
                    let read = |into: &mut [u8]| {
                        into.copy_from_slice(&content);
                        Ok::<(), Infallible>(())
                    };
                    let _ = batch.add(BlockId(0), range, Some(&references), None, read);
                    batch.clear();
                }
            }
            sent
        })
        .bench_local_values(|sent| encode(&changed, &sent, if kind == "delta" { 5 } else { 1 }, &mut batch));
}
