//! Source: what can be known of a guest and of the way to its target before anything moves.

use crate::{
    conn::{Conn, Dial, GREETING},
    ports::{Block, GuestMemory},
};
use page::{Codec, Encoder};
use proto::Purpose;
use std::{
    collections::{BTreeSet, HashSet},
    io::{self, Read, Write},
    thread,
    time::{Duration, Instant},
};
use units::{BlockId, MemorySet, PAGE_SIZE, PageSet, Rate};

/// So many runs of so many pages are looked at, evenly spread: 4 MiB, in 20 ms. Pages are compressed with
/// their neighbours.
const RUNS: u64 = 32;
const RUN: u64 = 32;

/// Bytes that one probe sends, at most: what a link of 10 Gbit/s carries in 25 ms.
const MOST_PROBED: u64 = 32 << 20;

/// What waits to be sent is kept above this, and looked at so often.
const AHEAD: u64 = 256 << 10;
const MOMENT: Duration = Duration::from_micros(300);

/// A link that carries less than so many bytes a second was not seen, but disturbed.
const LEAST: f64 = 1e5;

/// Bytes that one call sends, and into how many parts of time a probe is divided.
const PART: usize = 64 << 10;
const PARTS: u32 = 8;

/// What a guest's memory is like.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Sample {
    /// Which part of its pages travels: not the zeros, nor what the target has by then.
    pub(crate) travels: f64,
    /// To which part zstd 1 shrinks the rest, and what it takes for a byte, in nanoseconds.
    pub(crate) shrinks_to: f64,
    pub(crate) cost: f64,
}

/// The pages that the guest ever wrote, but for these blocks.
pub(crate) fn present(memory: &dyn GuestMemory, without: &BTreeSet<BlockId>) -> io::Result<MemorySet> {
    let present = |(id, block): (u16, &Block)| match without.contains(&BlockId(id)) {
        true => Ok(PageSet::empty(block.pages)),
        false => memory.present(BlockId(id)),
    };
    let sets = (0..).zip(memory.blocks()).map(present);
    Ok(MemorySet::from_blocks(sets.collect::<io::Result<_>>()?))
}

/// Looks at some of the pages in `present`.
pub(crate) fn sample(memory: &dyn GuestMemory, present: &MemorySet) -> io::Result<Sample> {
    let runs: Vec<_> = present
        .blocks()
        .flat_map(|(id, set)| set.runs().flat_map(|run| run.pieces(RUN)).map(move |run| (id, run)))
        .collect();
    let step = (runs.len() as u64 / RUNS).max(1) as usize;
    let (mut looked, mut seen, mut raw, mut compressed) = (0u64, HashSet::new(), 0, 0);
    let (mut encoder, mut out, mut costs) = (Encoder::default(), vec![], vec![]);
    // From the middle of each part: the first pages of a guest are like no others.
    for (id, run) in runs.iter().skip(step / 2).step_by(step).map(|(id, run)| (*id, *run)) {
        let mut content = vec![0; run.bytes().0 as usize];
        memory.read(id, run, &mut content)?;
        looked += run.count;
        let new: Vec<&[u8]> = content
            .chunks_exact(PAGE_SIZE)
            .filter(|page| !page::is_zero(page) && seen.insert(page::fingerprint(page)))
            .collect();
        if new.is_empty() {
            continue;
        }
        let begin = Instant::now();
        encoder.encode(Codec::Zstd(1), &new, &mut out);
        costs.push(begin.elapsed().as_secs_f64() * 1e9 / (new.len() * PAGE_SIZE) as f64);
        raw += new.len() * PAGE_SIZE;
        compressed += out.len();
    }
    costs.sort_by(f64::total_cmp);
    let bytes = raw.max(1) as f64;
    Ok(Sample {
        travels: bytes / (looked.max(1) * PAGE_SIZE as u64) as f64,
        shrinks_to: if raw == 0 { 1.0 } else { compressed as f64 / bytes },
        // What it takes undisturbed, once the encoder is warm.
        cost: costs.get(costs.len() / 4).copied().unwrap_or_default(),
    })
}

/// Sends zeros for so long, and says how fast they went: by what the target's kernel confirmed, once what a
/// bucket on the way had saved up is used.
pub(crate) fn probe(dial: &dyn Dial, time: Duration) -> io::Result<Rate> {
    let mut conn = dial.dial(Purpose::Probe, None)?;
    let (begin, part) = (Instant::now(), vec![0; PART]);
    let (mut given, mut marks) = (0, vec![]);
    while begin.elapsed() < time && given < MOST_PROBED {
        let queue = conn.queue()?;
        // What waits is counted with what TLS adds to it, what was given is not: nothing becomes unconfirmed
        // again because of that.
        let carried =
            given.saturating_sub(queue.unconfirmed).max(marks.last().map_or(0, |(_, before)| *before));
        marks.push((begin.elapsed(), carried));
        if queue.unsent > AHEAD {
            // Never blocked by a full buffer: what it hides could not be seen.
            thread::sleep(MOMENT);
        } else {
            conn.write_all(&part)?;
            given += PART as u64;
        }
    }
    let end = marks.last().map_or(Duration::ZERO, |(at, _)| *at);
    let at = |part: u32| marks.iter().copied().find(|(at, _)| *at >= end * part / PARTS).unwrap_or_default();
    // The second half, in parts: the quickest may have caught up after a stop of ours, the others may be
    // disturbed.
    let mut rates: Vec<f64> = (PARTS / 2..PARTS)
        .map(|part| (at(part), at(part + 1)))
        .filter(|((since, _), (until, _))| until > since)
        .map(|((since, before), (until, after))| (after - before) as f64 / (until - since).as_secs_f64())
        .collect();
    rates.sort_by(f64::total_cmp);
    match rates.get(rates.len().saturating_sub(2)) {
        Some(rate) if *rate >= LEAST => Ok(Rate(*rate as u64)),
        _ => Err(io::Error::new(io::ErrorKind::TimedOut, "the link carried next to nothing")),
    }
}

/// Target: takes in what a probe sends, and forgets it.
pub(crate) fn swallow(mut conn: Conn) -> io::Result<()> {
    conn.silence(Some(GREETING))?;
    let mut buffer = vec![0; PART];
    let mut left = MOST_PROBED * 2;
    while left > 0 {
        match conn.read(&mut buffer)? {
            0 => return Ok(()),
            n => left = left.saturating_sub(n as u64),
        }
    }
    Ok(())
}
