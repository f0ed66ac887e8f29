//! Compression of a guest's page cache in batches, and differences between versions of a page. It made the
//! ladder of `policy::Compressor`; `codecs_ratio` fingerprints how much smaller things get.

use crate::{noise, programs};
use divan::{Bencher, black_box, counter::BytesCount};
use page::{Codec, Decoder, Encoder};
use units::PAGE_SIZE;

const BATCH: usize = proto::MAX_PAYLOAD;
const TOTAL: usize = 64 << 20;
const CODECS: [(&str, Codec); 7] = [
    ("lz4", Codec::Lz4),
    ("zstd-3", Codec::Zstd(-3)),
    ("zstd1", Codec::Zstd(1)),
    ("zstd3", Codec::Zstd(3)),
    ("zstd6", Codec::Zstd(6)),
    ("zstd9", Codec::Zstd(9)),
    ("zstd12", Codec::Zstd(12)),
];
const NAMES: [&str; 7] = ["lz4", "zstd-3", "zstd1", "zstd3", "zstd6", "zstd9", "zstd12"];

fn codec(name: &str) -> Codec {
    CODECS.iter().find(|(known, _)| *known == name).expect("one of the names").1
}

#[divan::bench(args = NAMES, sample_count = 3, sample_size = 1)]
fn codecs_encode(bencher: Bencher, name: &str) {
    let (memory, mut encoder, mut out) = (programs(TOTAL), Encoder::default(), vec![]);
    let mut compressed = 0;
    bencher.counter(BytesCount::new(memory.len())).bench_local(|| {
        compressed = 0;
        for batch in black_box(&memory).chunks(BATCH) {
            encoder.encode(codec(name), &[batch], &mut out);
            compressed += out.len();
        }
    });
    if compressed > 0 {
        println!("{name}: {:.2} times smaller", memory.len() as f64 / compressed as f64);
    }
}

#[divan::bench(args = NAMES, sample_count = 3, sample_size = 1)]
fn codecs_encode_noise(bencher: Bencher, name: &str) {
    let memory: Vec<u8> = noise(1).take(TOTAL / 8).flat_map(u64::to_le_bytes).collect();
    let (mut encoder, mut out) = (Encoder::default(), vec![]);
    bencher.counter(BytesCount::new(memory.len())).bench_local(|| {
        black_box(&memory).chunks(BATCH).for_each(|batch| encoder.encode(codec(name), &[batch], &mut out));
    });
}

#[divan::bench(args = NAMES, sample_count = 3, sample_size = 1)]
fn codecs_decode(bencher: Bencher, name: &str) {
    let (memory, mut encoder, mut decoder) = (programs(TOTAL), Encoder::default(), Decoder::default());
    let compressed: Vec<Vec<u8>> = memory
        .chunks(BATCH)
        .map(|batch| {
            let mut out = vec![];
            encoder.encode(codec(name), &[batch], &mut out);
            out
        })
        .filter(|compressed| compressed.len() < BATCH)
        .collect();
    let mut into = vec![0; BATCH];
    bencher.counter(BytesCount::new(compressed.len() * BATCH)).bench_local(|| {
        compressed
            .iter()
            .for_each(|compressed| decoder.decode(codec(name), compressed, &mut into).expect("as encoded"));
    });
}

/// Versions of a page that differ in so many places of eight bytes.
fn versions(places: usize) -> (Vec<u8>, Vec<u8>) {
    let base = programs(PAGE_SIZE * 64)[PAGE_SIZE * 20..PAGE_SIZE * 21].to_vec();
    let mut page = base.clone();
    for place in noise(3).take(places) {
        let at = place as usize % (PAGE_SIZE / 8) * 8;
        page[at..at + 8].copy_from_slice(&place.to_le_bytes());
    }
    (base, page)
}

#[divan::bench(args = [1, 16, 64])]
fn delta_words(bencher: Bencher, places: usize) {
    let ((base, page), mut out) = (versions(places), vec![]);
    bencher.counter(BytesCount::new(PAGE_SIZE)).bench_local(|| {
        out.clear();
        page::measured::delta(black_box(&base), black_box(&page), &mut out)
    });
    println!("{places} places: {} bytes", out.len());
}

/// The alternative: zstd with the older version as prefix.
#[divan::bench(args = [1, 16, 64])]
fn delta_zstd(bencher: Bencher, places: usize) {
    let ((base, page), mut out) = (versions(places), vec![0; PAGE_SIZE]);
    let mut zstd = zstd_safe::CCtx::create();
    let mut length = 0;
    bencher.counter(BytesCount::new(PAGE_SIZE)).bench_local(|| {
        zstd.ref_prefix(black_box(&base)).expect("a prefix");
        length = zstd.compress2(&mut out[..], black_box(&page)).expect("it fits");
    });
    println!("{places} places: {length} bytes");
}
