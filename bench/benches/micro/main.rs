//! The small parts of a migration, one by one: `cargo bench -p bench --bench micro [NAME]`.

mod batch_size; // how much content one batch should carry
mod frames; // headers and tables of batches
mod pages; // what a page is sent as
mod sets; // sets of pages

fn main() {
    divan::main();
}

/// Numbers that are alike in every run and look like none.
fn noise(seed: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(seed | 1), |x| {
        let x = x ^ (x << 13);
        let x = x ^ (x >> 7);
        Some(x ^ (x << 17))
    })
}
