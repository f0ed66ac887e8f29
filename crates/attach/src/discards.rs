//! Memory that the process throws away while it is tracked: for a balloon, or because its guest reports free
//! pages.
//!
//! It punches a hole into the file and then gives up its mapping (`MADV_DONTNEED`). The page tables of shared
//! memory keep their protection at that, so no scan shows it, and a later read makes the page zeros unseen.
//! With `UFFD_FEATURE_EVENT_REMOVE` the kernel tells of each range, and has the process wait until that was
//! read (`admin-guide/mm/userfaultfd.rst`): so what was thrown away before the VMM says that the guest is
//! stopped is known by then. Such a page counts as written; what is sent of it is zeros.

use crate::region::Region;
use std::{
    io,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::Duration,
};
use sys::{
    pulse::{Part, Pulse},
    uffd::Uffd,
};
use units::{BlockId, Locked, MemorySet};

/// How long the thread waits for a message before it looks whether it is still wanted.
const GLANCE: Duration = Duration::from_millis(50);

/// Ranges that are kept before they are joined: a guest that reports free memory tells 32 at a time, a
/// balloon each page.
const MANY: usize = 4096;

/// What was thrown away since it was asked last.
#[derive(Debug)]
pub(crate) struct Discards {
    shared: Arc<DiscardState>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct DiscardState {
    uffd: Arc<Uffd>,
    heard: Mutex<Heard>,
    over: AtomicBool,
}

#[derive(Debug, Default)]
struct Heard {
    ranges: Vec<Range<u64>>,
    /// Why nothing is heard any more.
    failed: Option<io::Error>,
}

impl Discards {
    /// Listens from now on. The process waits for the thread that does; `pulse` shows that it gets on.
    pub(crate) fn hear(uffd: &Arc<Uffd>, pulse: &Pulse) -> io::Result<Self> {
        let shared =
            Arc::new(DiscardState { uffd: Arc::clone(uffd), heard: Mutex::default(), over: false.into() });
        let (listening, pulse) = (Arc::clone(&shared), pulse.clone());
        let thread = thread::Builder::new().name("discards".into()).spawn(move || {
            sys::urgent::become_urgent();
            if let Err(error) = listening.listen(&pulse.part()) {
                tracing::error!(%error, "memory that the VM throws away is not heard of any more");
                listening.heard().failed = Some(error);
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Adds what was thrown away.
    pub(crate) fn collect(&self, regions: &[Region], dirty: &mut MemorySet) -> io::Result<()> {
        let mut heard = self.shared.heard();
        if let Some(error) = &heard.failed {
            return Err(io::Error::new(error.kind(), error.to_string()));
        }
        for range in heard.ranges.drain(..) {
            // What was handed over loses it at both sides.
            let tracked = regions.iter().enumerate().filter(|(_, region)| !region.is_handed_over());
            for (id, region) in tracked {
                let start = range.start.max(region.addresses.start);
                let end = range.end.min(region.addresses.end);
                if start < end {
                    dirty.block_mut(BlockId(id as u16)).insert_range(region.pages_at(&(start..end)));
                }
            }
        }
        Ok(())
    }
}

impl DiscardState {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.locked()
    }

    fn listen(&self, part: &Part) -> io::Result<()> {
        while !self.over.load(SeqCst) {
            part.turn();
            if !self.uffd.waits(GLANCE)? {
                continue;
            }
            // Under the lock: the process goes on as soon as its message was read, and then it must be among
            // those that are collected.
            let mut heard = self.heard();
            while let Some(range) = self.uffd.next_discard()? {
                heard.add(range);
            }
        }
        Ok(())
    }
}

impl Heard {
    fn add(&mut self, range: Range<u64>) {
        if self.ranges.len() >= MANY && self.ranges.len().is_power_of_two() {
            join(&mut self.ranges);
        }
        self.ranges.push(range);
    }
}

/// Joins what overlaps or adjoins: as many ranges remain as the guest's memory has pieces, at most.
fn join(ranges: &mut Vec<Range<u64>>) {
    ranges.sort_by_key(|range| range.start);
    ranges.dedup_by(|next, before| {
        let joined = next.start <= before.end;
        if joined {
            before.end = before.end.max(next.end);
        }
        joined
    });
}

impl Drop for Discards {
    fn drop(&mut self) {
        self.shared.over.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            // Whoever throws away now is woken by the end of the descriptor, which follows.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_joined_where_they_touch() {
        let mut ranges = vec![8..9, 0..2, 2..4, 3..5, 7..8, 20..21];
        join(&mut ranges);
        assert_eq!(ranges, [0..5, 7..9, 20..21]);
        let mut heard = Heard::default();
        for n in 0..3 * MANY as u64 {
            heard.add(n % 16..n % 16 + 1);
        }
        assert!(heard.ranges.len() < 3 * MANY, "{}", heard.ranges.len());
    }
}
