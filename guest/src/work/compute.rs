//! Numbers and nothing else: what a vCPU gets done that writes no memory, and so has no part in what outruns
//! a link.

use crate::{content::next, job::Job, words::Compute, work::spawn};
use std::{
    hint::black_box,
    sync::{Arc, atomic::Ordering::Relaxed},
};

/// Numbers that make a loop: about a millisecond on an emulated CPU. Only the count of loops is memory.
const LOOP: u32 = 200_000;

/// Starts the threads.
pub(crate) fn start(wish: &Compute, job: &Arc<Job>) -> Result<(), String> {
    for _ in 0..wish.threads {
        let job = job.clone();
        spawn(wish.cpu, move || {
            let mut state = 1;
            loop {
                state = job.once(|| compute(state));
                job.loops.fetch_add(1, Relaxed);
            }
        })?;
    }
    Ok(())
}

fn compute(mut state: u64) -> u64 {
    for _ in 0..LOOP {
        next(&mut state);
    }
    black_box(state)
}
