//! Which pages a stream takes next.

use crate::ports::Fault;
use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard},
};
use units::{BlockId, Locked, MemorySet, PageIndex, PageRange};

/// Pages in one share of a round: large enough that taking one costs nothing, small enough that the streams
/// end together, and contiguous so that reads stay sequential.
pub(crate) const SHARE: u64 = 1024;

/// All shares of which there is something in the set.
pub(crate) fn shares(set: &MemorySet) -> impl Iterator<Item = (BlockId, PageRange)> {
    set.blocks().flat_map(|(id, pages)| {
        let mut at = PageIndex(0);
        std::iter::from_fn(move || {
            // From one page to the next: the last round has few, whatever the size of the block.
            let start = pages.first_from(at)?.0 / SHARE * SHARE;
            let share = PageRange::new(PageIndex(start), SHARE.min(pages.capacity() - start));
            at = share.end();
            Some((id, share))
        })
    })
}

/// One round's dirty set, which the streams share out among themselves: they from its beginning, the spool
/// from its end.
#[derive(Debug)]
pub(crate) struct RoundQueue {
    pub(crate) number: u32,
    pub(crate) set: MemorySet,
    shares: Mutex<Shares>,
    unchanged: Mutex<MemorySet>,
    by_file: Mutex<ByFile>,
}

#[derive(Debug)]
struct Shares {
    left: VecDeque<(BlockId, PageRange)>,
    /// Which stream took what.
    taken: Vec<(u32, BlockId, PageRange)>,
}

/// What of a round the file is to bring.
#[derive(Debug)]
struct ByFile {
    /// Taken for it, and not yet known to be in the target's memory.
    unsure: MemorySet,
    /// The link was lost: nothing is taken for the file any more, and nothing that is heard of it counts.
    left: bool,
}

impl RoundQueue {
    pub(crate) fn new(number: u32, set: MemorySet) -> Self {
        let shares = Mutex::new(Shares { left: shares(&set).collect(), taken: vec![] });
        let empty = || MemorySet::empty(set.blocks().map(|(_, pages)| pages.capacity()));
        let unchanged = Mutex::new(empty());
        let by_file = Mutex::new(ByFile { unsure: empty(), left: false });
        Self { number, shares, unchanged, by_file, set }
    }

    fn shares(&self) -> MutexGuard<'_, Shares> {
        self.shares.locked()
    }

    /// The next share, for whichever stream asks first.
    pub(crate) fn take(&self, stream: u32) -> Option<(BlockId, PageRange)> {
        let mut shares = self.shares();
        let (block, share) = shares.left.pop_front()?;
        shares.taken.push((stream, block, share));
        Some((block, share))
    }

    /// All that this stream took, without what had not changed.
    pub(crate) fn taken_by(&self, stream: u32) -> MemorySet {
        let mut pages = MemorySet::empty(self.set.blocks().map(|(_, pages)| pages.capacity()));
        for (_, block, share) in self.shares().taken.iter().filter(|(taker, ..)| *taker == stream) {
            let runs = self.set.block(*block).runs_within(*share);
            runs.for_each(|run| pages.block_mut(*block).insert_range(run));
        }
        pages.subtract(&self.unchanged());
        pages
    }

    fn by_file(&self) -> MutexGuard<'_, ByFile> {
        self.by_file.locked()
    }

    /// For the file: of the last share, the last pages, at most so many; the rest of it is still to be taken.
    pub(crate) fn take_last(&self, most: u64) -> Option<(BlockId, PageRange)> {
        let mut by_file = self.by_file();
        if by_file.left {
            return None;
        }
        let mut shares = self.shares();
        let (block, share) = shares.left.pop_back()?;
        let mine = share.count.min(most);
        let rest = PageRange::new(share.start, share.count - mine);
        if self.set.block(block).runs_within(rest).next().is_some() {
            shares.left.push_back((block, rest));
        }
        let taken = PageRange::new(rest.end(), mine);
        self.set
            .block(block)
            .runs_within(taken)
            .for_each(|run| by_file.unsure.block_mut(block).insert_range(run));
        Some((block, taken))
    }

    /// These pages, which were taken for the file, are in the target's memory.
    pub(crate) fn came_by_file(&self, block: BlockId, pages: PageRange) {
        let mut by_file = self.by_file();
        if !by_file.left {
            by_file.unsure.block_mut(block).remove_range(pages);
        }
    }

    /// What was taken for the file and is not known to be in the target's memory.
    pub(crate) fn unsure(&self) -> MemorySet {
        self.by_file().unsure.clone()
    }

    /// From now on the file has no part in this round. Returns what nobody must count as arrived that went
    /// only there.
    pub(crate) fn leave_file(&self) -> MemorySet {
        let mut by_file = self.by_file();
        by_file.left = true;
        by_file.unsure.clone()
    }

    /// Whether a share of a block is all of it that there was: a part of one means that somebody else has the
    /// rest.
    pub(crate) fn is_whole(&self, block: BlockId, share: PageRange) -> bool {
        let end = (share.start.0 / SHARE + 1) * SHARE;
        share.end().0 == end.min(self.set.block(block).capacity())
    }

    /// These pages had not changed since they were sent. Told batch by batch: the lock is not felt.
    pub(crate) fn had_not_changed(&self, block: BlockId, pages: &[PageRange]) {
        let mut unchanged = self.unchanged();
        pages.iter().for_each(|run| unchanged.block_mut(block).insert_range(*run));
    }

    /// All of which that was told.
    pub(crate) fn unchanged(&self) -> MutexGuard<'_, MemorySet> {
        self.unchanged.locked()
    }

    /// Whether every share was taken.
    pub(crate) fn all_taken(&self) -> bool {
        self.shares().left.is_empty()
    }

    /// How many pages nobody has taken yet, to within a share.
    pub(crate) fn left(&self) -> u64 {
        let pages = |(block, share): &(BlockId, PageRange)| {
            self.set.block(*block).runs_within(*share).map(|run| run.count).sum::<u64>()
        };
        self.shares().left.iter().map(pages).sum()
    }
}

/// The pages that a running guest on the target still lacks, in the order in which they are best sent: on
/// from the page that it asked for last.
#[derive(Debug)]
pub(crate) struct PushQueue(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    left: MemorySet,
    focus: (BlockId, PageIndex),
}

impl PushQueue {
    pub(crate) fn new(left: MemorySet) -> Self {
        Self(Mutex::new(Inner { left, focus: (BlockId(0), PageIndex(0)) }))
    }

    /// All but these are there already.
    pub(crate) fn keep_only(&self, missing: &MemorySet) {
        let mut inner = self.0.locked();
        for (id, pages) in missing.blocks() {
            inner.left.block_mut(id).intersect(pages);
        }
    }

    /// These pages are left, too: the target's word on what it lacks may be older than the last announcement.
    pub(crate) fn refill(&self, more: &MemorySet) {
        self.0.locked().left.union(more);
    }

    /// Somebody waits for this page, and got it: go on behind it.
    pub(crate) fn asked(&self, fault: Fault) {
        let mut inner = self.0.locked();
        inner.left.block_mut(fault.block).remove(fault.page);
        inner.focus = (fault.block, fault.page);
    }

    /// How many pages nobody has taken yet.
    pub(crate) fn left(&self) -> u64 {
        self.0.locked().left.len()
    }

    /// Takes up to `limit` pages out, as runs of one block: from the focus on, then from the block's
    /// beginning, then from the other blocks. `None` when nothing is left.
    pub(crate) fn take(&self, limit: u64) -> Option<(BlockId, Vec<PageRange>)> {
        let mut inner = self.0.locked();
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
    fn shares_are_those_with_pages() {
        let set = |pages: &[u64]| {
            let mut set = MemorySet::empty([3 * SHARE + 7, 5]);
            for page in pages {
                set.block_mut(BlockId(0)).insert(PageIndex(*page));
            }
            set
        };
        for pages in [&[][..], &[0], &[SHARE - 1, SHARE], &[3 * SHARE + 6], &[5, 2 * SHARE, 2 * SHARE + 9]] {
            let found: Vec<_> =
                shares(&set(pages)).map(|(id, share)| (id.0, share.start.0, share.count)).collect();
            let mut all: Vec<u64> = pages.iter().map(|page| page / SHARE).collect();
            all.dedup();
            let size = |n: u64| if n == 3 { 7 } else { SHARE };
            let expected: Vec<_> = all.into_iter().map(|n| (0, n * SHARE, size(n))).collect();
            assert_eq!(found, expected, "{pages:?}");
        }
    }

    #[test]
    fn a_round_is_shared_out_once_and_wholly() {
        let mut set = MemorySet::empty([5000, 10]);
        set.block_mut(BlockId(0)).insert_range(PageRange::new(PageIndex(1000), 3000));
        set.block_mut(BlockId(1)).insert(PageIndex(9));
        let round = RoundQueue::new(1, set.clone());
        let mut seen = MemorySet::empty([5000, 10]);
        while let Some((block, share)) = round.take(0) {
            for run in round.set.block(block).runs_within(share) {
                assert!(seen.block(block).runs_within(run).next().is_none(), "{run} twice");
                seen.block_mut(block).insert_range(run);
            }
        }
        assert_eq!(seen, set);
    }

    #[test]
    fn a_round_taken_from_both_ends_is_shared_out_exactly_once() {
        let mut set = MemorySet::empty([5000, 10]);
        set.block_mut(BlockId(0)).insert_range(PageRange::new(PageIndex(1000), 3000));
        set.block_mut(BlockId(1)).insert(PageIndex(9));
        let round = RoundQueue::new(1, set.clone());
        let mut seen = MemorySet::empty([5000, 10]);
        let mut turn = 0;
        loop {
            turn += 1;
            let taken = if turn % 3 == 0 { round.take(0) } else { round.take_last(100) };
            let Some((block, share)) = taken else { break };
            assert!(share.count <= SHARE);
            for run in round.set.block(block).runs_within(share) {
                assert!(seen.block(block).runs_within(run).next().is_none(), "{run} twice");
                seen.block_mut(block).insert_range(run);
            }
        }
        assert_eq!(seen, set);
        assert!(round.all_taken());
    }

    #[test]
    fn i2_pages_only_in_the_file_do_not_count_once_it_is_left() {
        let round = RoundQueue::new(1, MemorySet::from_blocks(vec![PageSet::full(100)]));
        let (block, first) = round.take_last(10).unwrap();
        let (_, second) = round.take_last(10).unwrap();
        round.came_by_file(block, first);
        let unsure = round.leave_file();
        assert_eq!(unsure.block(block).runs().collect::<Vec<_>>(), [second]);
        // A word that comes late, and a thread that goes on, change nothing.
        round.came_by_file(block, second);
        assert_eq!(round.take_last(10), None);
        assert_eq!(round.leave_file(), unsure);
        assert_eq!(round.take(0).unwrap().1, PageRange::new(PageIndex(0), 80), "the streams take the rest");
    }

    #[test]
    fn a_share_of_which_somebody_has_the_end_is_not_whole() {
        let round = RoundQueue::new(1, MemorySet::from_blocks(vec![PageSet::full(SHARE + 50)]));
        let (block, last) = round.take_last(20).unwrap();
        assert_eq!(last, PageRange::new(PageIndex(SHARE + 30), 20));
        let first = round.take(0).unwrap().1;
        let rest = round.take(0).unwrap().1;
        assert!(round.is_whole(block, first) && !round.is_whole(block, rest));
        assert_eq!(rest, PageRange::new(PageIndex(SHARE), 30));
    }

    #[test]
    fn what_a_stream_took_is_known_without_what_had_not_changed() {
        let whole = |pages| PageRange::new(PageIndex(0), pages);
        let round =
            RoundQueue::new(1, MemorySet::from_blocks(vec![PageSet::full(3 * SHARE), PageSet::full(7)]));
        let first = round.take(0).unwrap();
        assert_eq!(
            (round.take(1), round.take(0)),
            (
                Some((BlockId(0), PageRange::new(PageIndex(SHARE), SHARE))),
                Some((BlockId(0), PageRange::new(PageIndex(2 * SHARE), SHARE)))
            )
        );
        assert_eq!((round.take(1), round.take(1)), (Some((BlockId(1), whole(7))), None));
        round.had_not_changed(BlockId(0), &[PageRange::new(PageIndex(3), 10)]);
        let taken = round.taken_by(0);
        assert_eq!((first, taken.len()), ((BlockId(0), whole(SHARE)), 2 * SHARE - 10));
        assert!(
            !taken.block(BlockId(0)).contains(PageIndex(5))
                && taken.block(BlockId(0)).contains(PageIndex(2 * SHARE))
        );
        assert_eq!(round.taken_by(1).len(), SHARE + 7);
        assert_eq!(round.taken_by(2).len(), 0);
    }

    #[test]
    fn pages_behind_the_last_fault_go_first() {
        let to_push = PushQueue::new(MemorySet::from_blocks(vec![PageSet::full(100), PageSet::full(100)]));
        to_push.asked(Fault { block: BlockId(1), page: PageIndex(90) });
        let range = |start, count| PageRange::new(PageIndex(start), count);
        assert_eq!(to_push.take(5), Some((BlockId(1), vec![range(91, 5)])));
        assert_eq!(to_push.take(50), Some((BlockId(1), vec![range(96, 4)])));
        assert_eq!(to_push.take(1000), Some((BlockId(1), vec![range(0, 90)])));
        assert_eq!(to_push.left(), 100);
        assert_eq!(to_push.take(1000), Some((BlockId(0), vec![range(0, 100)])));
        assert_eq!(to_push.take(1000), None);
    }
}
