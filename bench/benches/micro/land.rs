//! From messages to pages in a memfd, as on the target; beside it the limit, which is writing the same pages.

use crate::{noise, programs};
use divan::{Bencher, counter::BytesCount};
use page::{Batch, Codec, Encoder, PageDecoder, References, Sent, Tagger, TargetMemory};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::{convert::Infallible, fs::File, io, os::unix::fs::FileExt};
use units::{BlockId, PAGE_SIZE, PageIndex, PageRange};

const BATCH: usize = proto::BATCH_PAGES as usize;
const BYTES: usize = BATCH * PAGE_SIZE;
/// What lands in one sample, in the first part of the block; what is referred to is in the second.
const BATCHES: usize = 64;

struct Memory(File);

impl TargetMemory for Memory {
    type Error = io::Error;

    fn pages(&self, _: BlockId) -> Option<u64> {
        Some(2 * (BATCHES * BATCH) as u64)
    }

    fn read(&self, _: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(into, range.start.offset())
    }

    fn read_kept(&self, _: BlockId, _: PageRange, _: &mut [u8]) -> bool {
        false
    }
}

#[divan::bench(
    args = ["limit", "plain", "lz4", "zstd1", "known", "known in order", "delta"],
    sample_count = 10,
    sample_size = 1
)]
fn land(bencher: Bencher, kind: &str) {
    let memory = Memory(File::from(memfd_create("land", MemfdFlags::CLOEXEC).expect("a memfd")));
    let half = BATCHES * BYTES;
    ftruncate(&memory.0, 2 * half as u64).expect("memory");
    let mut old: Vec<u8> = noise(1).take(half / 8).flat_map(u64::to_le_bytes).collect();
    if kind == "lz4" || kind == "zstd1" {
        old = programs(half);
    }
    memory.0.write_all_at(&old, 0).expect("memory");
    memory.0.write_all_at(&old, half as u64).expect("memory");
    let messages = messages(kind, &old);
    let mut page_decoder = PageDecoder::new(Some(Tagger::new([2; 32])), BYTES);
    bencher.counter(BytesCount::new(half)).bench_local(|| {
        for (at, message) in messages.iter().enumerate() {
            if kind == "limit" {
                memory
                    .0
                    .write_all_at(&old[at * BYTES..(at + 1) * BYTES], (at * BYTES) as u64)
                    .expect("memory");
                continue;
            }
            let (own, compressed) = message.content.split_at(message.own);
            page_decoder.begin(message.codec, compressed, message.raw).expect("as compressed");
            let mut rest = own;
            for run in &message.runs {
                let (own, after) = rest.split_at(run.payload());
                rest = after;
                let content = page_decoder.decode(BlockId(0), run, own, &memory).expect("as encoded");
                memory.0.write_all_at(content.expect("content"), run.range.start.offset()).expect("memory");
            }
            if kind == "delta" {
                // The older version again, for the next sample.
                memory
                    .0
                    .write_all_at(&old[at * BYTES..(at + 1) * BYTES], (at * BYTES) as u64)
                    .expect("memory");
            }
        }
    });
}

struct Message {
    runs: Vec<page::Run>,
    codec: Option<Codec>,
    content: Vec<u8>,
    own: usize,
    raw: usize,
}

fn messages(kind: &str, old: &[u8]) -> Vec<Message> {
    let half = (BATCHES * BATCH) as u64;
    let sent = Sent::new(&[2 * half], 2 * half, &[1; 32], Tagger::new([2; 32]));
    let (mut batch, mut encoder) = (Batch::new(BYTES), Encoder::default());
    let add = |batch: &mut Batch, at: u64, content: &[u8], round: u32| {
        let references = References { sent: &sent, round, may_refer: |_, page: PageIndex| page.0 >= half };
        let read = |into: &mut [u8]| {
            into.copy_from_slice(content);
            Ok::<(), Infallible>(())
        };
        let range = PageRange::new(PageIndex(at), BATCH as u64);
        let _ = batch.add(BlockId(0), range, Some(&references), None, read);
        batch.tag(&sent);
    };
    let place = if kind == "delta" { 0 } else { half };
    if kind == "delta" || kind.starts_with("known") {
        for round in 2..5 {
            sent.turn(round);
            for (content, at) in old.chunks_exact(BYTES).zip((place..).step_by(BATCH)) {
                let mut content = content.to_vec();
                if round < 4 && kind == "delta" {
                    content.chunks_exact_mut(PAGE_SIZE).for_each(|page| page[9] ^= round as u8);
                }
                add(&mut batch, at, &content, round);
                batch.clear();
            }
        }
    }
    let mut messages = vec![];
    for (content, at) in old.chunks_exact(BYTES).zip((0u64..).step_by(BATCH)) {
        let mut content = content.to_vec();
        match kind {
            "delta" => content.chunks_exact_mut(PAGE_SIZE).for_each(|page| page[500..540].fill(7)),
            // Backwards: no two neighbours are neighbours again.
            "known" => content = content.chunks_exact(PAGE_SIZE).rev().flatten().copied().collect(),
            _ => {}
        }
        add(&mut batch, at, &content, 5);
        match kind {
            "lz4" => drop(batch.compress(&mut encoder, Codec::Lz4, |_| true)),
            "zstd1" => drop(batch.compress(&mut encoder, Codec::Zstd(1), |_| true)),
            _ => {}
        }
        let content: Vec<u8> = batch.parts().flatten().copied().collect();
        let (runs, codec, _) = batch.runs();
        let own = runs.iter().map(page::Run::payload).sum();
        let compressed = runs.iter().filter(|run| run.class == page::Class::Compressed);
        messages.push(Message {
            runs: runs.to_vec(),
            codec,
            own,
            raw: compressed.map(page::Run::raw).sum(),
            content,
        });
        batch.clear();
    }
    messages
}
