//! Sets of pages of a block of 1 GiB.

use crate::noise;
use divan::{Bencher, black_box};
use units::{PageIndex, PageRange, PageSet};

const PAGES: u64 = 1 << 18;

/// One page in `sparse`, at random.
fn set(sparse: u64) -> PageSet {
    let mut set = PageSet::empty(PAGES);
    for number in noise(7).take((PAGES / sparse) as usize) {
        set.insert(PageIndex(number % PAGES));
    }
    set
}

#[divan::bench(args = [2, 16, 256, 4096], sample_count = 50)]
fn runs(bencher: Bencher, sparse: u64) {
    let set = set(sparse);
    bencher.bench(|| black_box(&set).runs().map(|run| run.count).sum::<u64>());
}

#[divan::bench(sample_count = 50)]
fn one_run(bencher: Bencher) {
    let set = PageSet::full(PAGES);
    bencher.bench(|| black_box(&set).runs().count());
}

#[divan::bench(sample_count = 50)]
fn len(bencher: Bencher) {
    let set = set(16);
    bencher.bench(|| black_box(&set).len());
}

#[divan::bench(sample_count = 50)]
fn union(bencher: Bencher) {
    let (a, b) = (set(16), set(256));
    bencher.with_inputs(|| a.clone()).bench_local_refs(|a| a.union(black_box(&b)));
}

#[divan::bench(args = [1, 64, 4096])]
fn insert_ranges(bencher: Bencher, count: u64) {
    let mut set = PageSet::empty(PAGES);
    bencher.bench_local(|| {
        for start in (0..PAGES - count).step_by(16 << 10) {
            set.insert_range(PageRange::new(PageIndex(start), count));
        }
    });
}
