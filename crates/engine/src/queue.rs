//! Which pages a stream takes next.

use crate::ports::Fault;
use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicUsize, Ordering::Relaxed},
};
use units::{BlockId, MemorySet, PageIndex, PageRange};

/// Pages in one share of a round: large enough that taking one costs nothing, small enough that the streams end
/// together, and contiguous so that reads stay sequential.
pub(crate) const SHARE: u64 = 1024;

/// One round's dirty set, which the streams share out among themselves.
#[derive(Debug)]
pub(crate) struct Round {
    pub(crate) number: u32,
    pub(crate) set: MemorySet,
    shares: Vec<(BlockId, PageRange)>,
    taken: AtomicUsize,
    unchanged: Mutex<MemorySet>,
}

impl Round {
    pub(crate) fn new(number: u32, set: MemorySet) -> Self {
        let whole = |pages| PageRange::new(PageIndex(0), pages);
        let shares = set
            .blocks()
            .flat_map(|(id, pages)| whole(pages.capacity()).pieces(SHARE).map(move |share| (id, share)))
            .filter(|(id, share)| set.block(*id).runs_within(*share).next().is_some())
            .collect();
        let unchanged = MemorySet::empty(set.blocks().map(|(_, pages)| pages.capacity()));
        Self { number, set, shares, taken: AtomicUsize::new(0), unchanged: Mutex::new(unchanged) }
    }

    /// The next share, for whichever stream asks first.
    pub(crate) fn take(&self) -> Option<(BlockId, PageRange)> {
        self.shares.get(self.taken.fetch_add(1, Relaxed)).copied()
    }

    /// These pages had not changed since they were sent. Told batch by batch: the lock is not felt.
    pub(crate) fn had_not_changed(&self, block: BlockId, pages: &[PageRange]) {
        let mut unchanged = self.unchanged();
        pages.iter().for_each(|run| unchanged.block_mut(block).insert_range(*run));
    }

    /// All of which that was told.
    pub(crate) fn unchanged(&self) -> MutexGuard<'_, MemorySet> {
        self.unchanged.lock().expect("no one panics here")
    }

    /// Whether every share was taken.
    pub(crate) fn all_taken(&self) -> bool {
        self.taken.load(Relaxed) >= self.shares.len()
    }

    /// How many pages no stream has taken yet, to within a share.
    pub(crate) fn left(&self) -> u64 {
        let taken = self.taken.load(Relaxed).min(self.shares.len());
        let pages = |(block, share): &(BlockId, PageRange)| {
            self.set.block(*block).runs_within(*share).map(|run| run.count).sum::<u64>()
        };
        self.shares[taken..].iter().map(pages).sum()
    }
}

/// The pages that a running guest on the target still lacks, in the order in which they are best sent: on from the
/// page that it asked for last.
#[derive(Debug)]
pub(crate) struct Owing(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    left: MemorySet,
    focus: (BlockId, PageIndex),
}

impl Owing {
    pub(crate) fn new(left: MemorySet) -> Self {
        Self(Mutex::new(Inner { left, focus: (BlockId(0), PageIndex(0)) }))
    }

    /// These pages are left now.
    pub(crate) fn refill(&self, left: MemorySet) {
        self.0.lock().expect("no one panics here").left = left;
    }

    /// Somebody waits for this page, and got it: go on behind it.
    pub(crate) fn asked(&self, fault: Fault) {
        let mut inner = self.0.lock().expect("no one panics here");
        inner.left.block_mut(fault.block).remove(fault.page);
        inner.focus = (fault.block, fault.page);
    }

    /// How many pages nobody has taken yet.
    pub(crate) fn left(&self) -> u64 {
        self.0.lock().expect("no one panics here").left.len()
    }

    /// Takes up to `limit` pages out, as runs of one block: from the focus on, then from the block's beginning, then from
    /// the other blocks. `None` when nothing is left.
    pub(crate) fn take(&self, limit: u64) -> Option<(BlockId, Vec<PageRange>)> {
        let mut inner = self.0.lock().expect("no one panics here");
        let (block, from) = inner.focus;
        let here = inner.left.block(block);
        let ahead = PageRange::new(from, here.capacity() - from.0);
        let (block, within) = if here.runs_within(ahead).next().is_some() {
            (block, ahead)
        } else {
            let (block, set) = inner
                .left
                .blocks()
                .find(|(id, set)| *id == block && !set.is_empty())
                .or_else(|| inner.left.blocks().find(|(_, set)| !set.is_empty()))?;
            (block, PageRange::new(PageIndex(0), set.capacity()))
        };
        let mut room = limit;
        let mut runs = Vec::new();
        for run in inner.left.block(block).runs_within(within) {
            if room == 0 {
                break;
            }
            let run = PageRange::new(run.start, run.count.min(room));
            room -= run.count;
            runs.push(run);
        }
        let set = inner.left.block_mut(block);
        runs.iter().for_each(|run| set.remove_range(*run));
        if let Some(last) = runs.last() {
            let end = last.end().0.min(set.capacity() - 1);
            inner.focus = (block, PageIndex(end));
        }
        Some((block, runs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use units::PageSet;

    #[test]
    fn a_round_is_shared_out_once_and_wholly() {
        let mut set = MemorySet::empty([5000, 10]);
        set.block_mut(BlockId(0)).insert_range(PageRange::new(PageIndex(1000), 3000));
        set.block_mut(BlockId(1)).insert(PageIndex(9));
        let round = Round::new(1, set.clone());
        let mut seen = MemorySet::empty([5000, 10]);
        while let Some((block, share)) = round.take() {
            for run in round.set.block(block).runs_within(share) {
                assert!(seen.block(block).runs_within(run).next().is_none(), "{run} twice");
                seen.block_mut(block).insert_range(run);
            }
        }
        assert_eq!(seen, set);
    }

    #[test]
    fn pages_behind_the_last_fault_go_first() {
        let owing = Owing::new(MemorySet::from_blocks(vec![PageSet::full(100), PageSet::full(100)]));
        owing.asked(Fault { block: BlockId(1), page: PageIndex(90) });
        let range = |start, count| PageRange::new(PageIndex(start), count);
        assert_eq!(owing.take(5), Some((BlockId(1), vec![range(91, 5)])));
        assert_eq!(owing.take(50), Some((BlockId(1), vec![range(96, 4)])));
        assert_eq!(owing.take(1000), Some((BlockId(1), vec![range(0, 90)])));
        assert_eq!(owing.left(), 100);
        assert_eq!(owing.take(1000), Some((BlockId(0), vec![range(0, 100)])));
        assert_eq!(owing.take(1000), None);
    }
}
