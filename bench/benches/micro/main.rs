//! The small parts of a migration, one by one: `cargo bench -p bench --bench micro [NAME]`.

mod batch_size; // how much content one batch should carry
mod codecs; // compression of real pages, and differences
mod frames; // headers and tables of batches
mod land; // from messages to pages
mod pages; // what a page is sent as
mod sets; // sets of pages
mod tls; // what protecting pages costs

fn main() {
    divan::main();
}

/// Bytes of pages that are alike in every run: from the programs and libraries of this system, as a guest's
/// page cache holds them.
fn programs(length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length);
    for directory in ["/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/lib"] {
        let Ok(entries) = std::fs::read_dir(directory) else { continue };
        let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(|p| p.is_file()).collect();
        files.sort();
        for content in files.iter().filter_map(|file| std::fs::read(file).ok()) {
            bytes.extend_from_slice(&content);
            bytes.resize(bytes.len().next_multiple_of(units::PAGE_SIZE), 0);
            if bytes.len() >= length {
                bytes.truncate(length);
                return bytes;
            }
        }
    }
    bytes.resize(length, 1);
    bytes
}

/// Numbers that are alike in every run and look like none.
fn noise(seed: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(seed | 1), |x| {
        let x = x ^ (x << 13);
        let x = x ^ (x >> 7);
        Some(x ^ (x << 17))
    })
}
