//! Headers and tables of batches.

use divan::{Bencher, black_box, counter::ItemsCount};
use page::Class;
use proto::{BATCH_PAGES, Frame, HEADER, Run, Shape, parse_runs, write_batch};
use units::{BlockId, PageIndex, PageRange};

const BLOCK: BlockId = BlockId(0);

fn shape() -> Shape {
    Shape(vec![1 << 18])
}

/// A batch's table of this many runs.
fn runs(count: u64) -> Vec<Run> {
    let pages = BATCH_PAGES / count;
    let run = |i| Run::new(PageRange::new(PageIndex(i * 2 * pages), pages), Class::Raw);
    (0..count).map(run).collect()
}

#[divan::bench(args = [1, 16, BATCH_PAGES])]
fn encode(bencher: Bencher, count: u64) {
    let (runs, mut out) = (runs(count), Vec::new());
    bencher.counter(ItemsCount::new(count)).bench_local(|| {
        out.clear();
        write_batch(BLOCK, black_box(&runs), None, &mut out);
        out.len()
    });
}

#[divan::bench(args = [1, 16, BATCH_PAGES])]
fn parse(bencher: Bencher, count: u64) {
    let (shape, mut bytes) = (shape(), Vec::new());
    write_batch(BLOCK, &runs(count), None, &mut bytes);
    bencher.counter(ItemsCount::new(count)).bench(|| {
        let (header, table) = black_box(&bytes).split_first_chunk::<HEADER>()?;
        match Frame::parse(header, &shape) {
            Ok(Frame::Batch { block, payload, codec, .. }) => {
                parse_runs(table, block, payload, codec, &shape).ok()
            }
            _ => None,
        }
    });
}
