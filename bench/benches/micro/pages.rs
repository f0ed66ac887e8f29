//! What a page is sent as.

use crate::noise;
use divan::{Bencher, black_box, counter::BytesCount};
use units::{PAGE_SIZE, PageIndex};

/// Larger than a core's second-level cache: a migration finds no page in it.
const PAGES: usize = 4096;

fn pages(content: bool) -> Vec<u8> {
    if !content {
        return vec![0; PAGES * PAGE_SIZE];
    }
    noise(1).take(PAGES * PAGE_SIZE / 8).flat_map(u64::to_le_bytes).collect()
}

#[divan::bench(args = [false, true], sample_count = 20)]
fn zero_check(bencher: Bencher, content: bool) {
    let memory = pages(content);
    bencher
        .counter(BytesCount::new(memory.len()))
        .bench(|| black_box(&memory).chunks_exact(PAGE_SIZE).filter(|page| page::is_zero(page)).count());
}

#[divan::bench(args = [false, true], sample_count = 20)]
fn refine(bencher: Bencher, content: bool) {
    let memory = pages(content);
    bencher.counter(BytesCount::new(memory.len())).bench(|| page::refine(PageIndex(0), black_box(&memory)));
}

/// The worst for runs: every other page is empty.
#[divan::bench(sample_count = 20)]
fn refine_in_stripes(bencher: Bencher) {
    let mut memory = pages(true);
    memory.chunks_exact_mut(PAGE_SIZE).step_by(2).for_each(|page| page.fill(0));
    bencher.counter(BytesCount::new(memory.len())).bench(|| page::refine(PageIndex(0), black_box(&memory)));
}

#[divan::bench(sample_count = 20)]
fn fingerprint(bencher: Bencher) {
    let memory = pages(true);
    bencher.counter(BytesCount::new(memory.len())).bench(|| {
        let prints = black_box(&memory).chunks_exact(PAGE_SIZE).map(page::fingerprint);
        prints.fold(0, |all, print| all ^ print)
    });
}
