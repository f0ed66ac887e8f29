//! Files of a disk in the page cache: read once, then read there again and again.

use crate::{
    content::{mix, next},
    job::{Job, Jobs},
    pace::Pace,
    words::PageCache,
};
use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Arc, atomic::Ordering::Relaxed},
    thread,
};
use units::PAGE_SIZE;

/// What is read, and summed up, at a time.
const PIECE: usize = 1 << 20;
/// Pages a second that are read again: some life, that leaves the processors to others.
const RATE: u64 = 4096;

/// What the disk held when it was read first.
pub(crate) struct Cached {
    path: String,
    disk: File,
    sums: Vec<u64>,
}

/// Reads the disk from its beginning on. Nobody may write to it.
pub(crate) fn start(wish: &PageCache, jobs: &Arc<Jobs>) -> Result<Arc<Cached>, String> {
    let path = format!("/dev/{}", wish.name);
    let failed = |e: io::Error| format!("{path}: {e}; has the machine such a disk, and is it large enough?");
    let disk = File::open(&path).map_err(failed)?;
    let mut buffer = vec![0; PIECE];
    let mut sums = Vec::new();
    for piece in 0..wish.set.0 / PIECE as u64 {
        sums.push(sum(&disk, piece, &mut buffer).map_err(failed)?);
    }
    let cached = Arc::new(Cached { path, disk, sums });
    let (job, reader) = (jobs.add("page-cache"), cached.clone());
    job.loops.store(1, Relaxed);
    thread::spawn(move || reader.read(&job));
    Ok(cached)
}

fn sum(disk: &File, piece: u64, buffer: &mut [u8]) -> io::Result<u64> {
    disk.read_exact_at(buffer, piece * PIECE as u64)?;
    let words = buffer.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
    Ok(words.fold(0, |sum: u64, word| (sum ^ word).rotate_left(23).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

impl Cached {
    fn read(&self, job: &Job) -> ! {
        let (mut seed, mut page) = (mix(7), vec![0; PAGE_SIZE]);
        let pages = (self.sums.len() * (PIECE / PAGE_SIZE)).max(1) as u64;
        job.run(Pace::new(Some(RATE), 1), |batch| {
            for _ in 0..batch {
                // What cannot be read is found when it is verified.
                let _ = self.disk.read_at(&mut page, next(&mut seed) % pages * PAGE_SIZE as u64);
            }
        })
    }

    /// Reads everything again: the same as at first?
    pub(crate) fn verify(&self, jobs: &Jobs) -> u64 {
        let mut buffer = vec![0; PIECE];
        for (piece, want) in self.sums.iter().enumerate() {
            match sum(&self.disk, piece as u64, &mut buffer) {
                Ok(found) if found == *want => {}
                Ok(_) => jobs.corrupt(format_args!("page-cache MiB {piece} of {} differs", self.path)),
                Err(e) => jobs.corrupt(format_args!("page-cache MiB {piece} of {}: {e}", self.path)),
            }
        }
        (self.sums.len() * (PIECE / PAGE_SIZE)) as u64
    }
}
