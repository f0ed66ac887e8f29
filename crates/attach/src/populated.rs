//! Which parts of a RAM block have ever held something, so that looking at a block costs what it contains.
//!
//! A hole needs no protection. Its first write makes it content: of shared memory in the file (`SEEK_DATA`),
//! of private memory in the page tables. So only parts with content are protected and scanned. Each
//! collection looks for parts that were holes and are not any more, and all content of such a part counts as
//! written.
//!
//! That is looked for in the file, and not left to the scan: from Linux 6.7 on a scan skips what has no page
//! table, and kernels from the middle of 2026 on report it as written and protect it ("fix PAGEMAP_SCAN
//! written state for PMD holes"). Where there is a page table, an entry that is none counts as written in the
//! scan for just that (the fast path for `PAGE_IS_WRITTEN`), and is protected: so a part is protected as a
//! whole, or its holes would be reported.

use std::{iter, ops::Range};

/// The size of a part: what one page table maps. Less would not be skipped by any scan.
pub(crate) const PART: u64 = 2 << 20;

/// Parts of a block that have ever held something. They are at multiples of their size, as page tables are;
/// the first and the last one may be cut by the block.
#[derive(Clone, Debug)]
pub(crate) struct Populated {
    addresses: Range<u64>,
    part: u64,
    /// Ascending, none touching the next.
    runs: Vec<Range<u64>>,
}

impl Populated {
    /// Nothing of what is at `addresses`, in parts of `part` bytes.
    pub(crate) fn none(addresses: Range<u64>, part: u64) -> Self {
        Self { addresses, part, runs: Vec::new() }
    }

    /// All of it.
    pub(crate) fn all(addresses: Range<u64>, part: u64) -> Self {
        Self { runs: vec![addresses.clone()], addresses, part }
    }

    /// The size of a part.
    pub(crate) fn part(&self) -> u64 {
        self.part
    }

    /// What has held something, ascending.
    pub(crate) fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// How much that is, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }

    /// What never has, ascending.
    pub(crate) fn gaps(&self) -> Vec<Range<u64>> {
        let mut gaps = Vec::with_capacity(self.runs.len() + 1);
        let mut at = self.addresses.start;
        for run in &self.runs {
            if at < run.start {
                gaps.push(at..run.start);
            }
            at = run.end;
        }
        if at < self.addresses.end {
            gaps.push(at..self.addresses.end);
        }
        gaps
    }

    /// What of it `others`, of the same block, has not.
    pub(crate) fn without(&self, others: &Self) -> Vec<Range<u64>> {
        let mut left = Vec::new();
        let gaps = others.gaps();
        for run in &self.runs {
            let first = gaps.partition_point(|gap| gap.end <= run.start);
            for gap in gaps[first..].iter().take_while(|gap| gap.start < run.end) {
                left.push(run.start.max(gap.start)..run.end.min(gap.end));
            }
        }
        left
    }

    /// The part in which this address lies, which is one of the block's.
    pub(crate) fn part_at(&self, address: u64) -> Range<u64> {
        self.parts_of(&(address..address + 1))
    }

    /// These addresses, not empty and within the block, hold something: so do the parts in which they lie.
    pub(crate) fn add(&mut self, addresses: &Range<u64>) {
        let Range { mut start, mut end } = self.parts_of(addresses);
        let first = self.runs.partition_point(|run| run.end < start);
        let after = self.runs.partition_point(|run| run.start <= end);
        if first < after {
            start = start.min(self.runs[first].start);
            end = end.max(self.runs[after - 1].end);
        }
        self.runs.splice(first..after, iter::once(start..end));
    }

    fn parts_of(&self, addresses: &Range<u64>) -> Range<u64> {
        let start = addresses.start / self.part * self.part;
        let end = addresses.end.div_ceil(self.part).saturating_mul(self.part);
        start.max(self.addresses.start)..end.min(self.addresses.end)
    }
}

/// Part of the work of looking at a VM's memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Piece {
    /// The number of the block.
    pub(crate) block: usize,
    /// What to look at.
    pub(crate) addresses: Range<u64>,
}

/// The runs of all blocks, divided among at most `workers`: none gets more than its share and a part. Pieces
/// are cut between parts only.
pub(crate) fn divide(blocks: &[Populated], workers: u64) -> Vec<Vec<Piece>> {
    let total: u64 = blocks.iter().map(Populated::bytes).sum();
    let share = total.div_ceil(workers.max(1)).max(1);
    let (mut shares, mut room) = (vec![Vec::new()], share);
    for (block, populated) in blocks.iter().enumerate() {
        for run in &populated.runs {
            let mut at = run.start;
            while at < run.end {
                if room == 0 {
                    shares.push(Vec::new());
                    room = share;
                }
                let end = (at + room).div_ceil(populated.part).saturating_mul(populated.part).min(run.end);
                if let Some(last) = shares.last_mut() {
                    last.push(Piece { block, addresses: at..end });
                }
                room = room.saturating_sub(end - at);
                at = end;
            }
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As slow as obvious: each address for itself.
    fn members(populated: &Populated) -> Vec<bool> {
        let Range { start, end } = populated.addresses;
        (start..end).map(|at| populated.runs.iter().any(|run| run.contains(&at))).collect()
    }

    proptest! {
        #[test]
        fn parts_are_those_that_were_added(
            start in 0_u64..40,
            size in 1_u64..200,
            part in prop::sample::select(vec![1_u64, 4, 16]),
            added in prop::collection::vec((0_u64..200, 1_u64..30), 0..12),
        ) {
            let addresses = start..start + size;
            let mut populated = Populated::none(addresses.clone(), part);
            let mut model = vec![false; size as usize];
            for (at, count) in added {
                let range = start + at % size..(start + at % size + count).min(addresses.end);
                populated.add(&range);
                for at in addresses.clone() {
                    let part_of = |at: u64| at / part;
                    if (part_of(range.start)..=part_of(range.end - 1)).contains(&part_of(at)) {
                        model[(at - start) as usize] = true;
                    }
                }
                prop_assert_eq!(&members(&populated), &model);
            }
            let mut others = Populated::none(addresses.clone(), part);
            others.add(&(start..start + size.div_ceil(3)));
            let left: Vec<bool> = {
                let left = populated.without(&others);
                addresses.clone().map(|at| left.iter().any(|run| run.contains(&at))).collect()
            };
            let theirs = members(&others);
            prop_assert!(left.iter().zip(&model).zip(&theirs).all(|((l, m), t)| *l == (*m && !*t)));
            // Maximal runs, and gaps are all the rest.
            let runs = populated.runs();
            prop_assert!(runs.iter().all(|run| run.start < run.end));
            prop_assert!(runs.windows(2).all(|two| two[0].end < two[1].start), "{:?}", runs);
            let mut rest = vec![true; size as usize];
            for gap in populated.gaps() {
                gap.for_each(|at| rest[(at - start) as usize] = false);
            }
            prop_assert_eq!(rest, model);
        }

        #[test]
        fn work_is_divided_evenly_and_none_is_left_out(
            blocks in prop::collection::vec(
                (prop::collection::vec((0_u64..300, 1_u64..60), 0..6), prop::sample::select(vec![2_u64, 8])),
                0..4,
            ),
            workers in 0_u64..6,
        ) {
            let populated = |(added, part): &(Vec<(u64, u64)>, u64)| {
                let mut populated = Populated::none(3..303, *part);
                added.iter().for_each(|(at, n)| populated.add(&(3 + at % 300..(3 + at % 300 + n).min(303))));
                populated
            };
            let blocks: Vec<Populated> = blocks.iter().map(populated).collect();
            let shares = divide(&blocks, workers);
            prop_assert!(shares.len() as u64 <= workers.max(1));
            let flat = |list: Vec<(usize, Range<u64>)>| -> Vec<(usize, u64)> {
                list.into_iter().flat_map(|(block, range)| range.map(move |at| (block, at))).collect()
            };
            let all = blocks.iter().enumerate();
            let all = all.flat_map(|(n, block)| block.runs.iter().map(move |run| (n, run.clone()))).collect();
            let all = flat(all);
            let given = shares.iter().flatten().map(|piece| (piece.block, piece.addresses.clone())).collect();
            prop_assert_eq!(flat(given), all.clone());
            for share in &shares {
                let bytes: u64 = share.iter().map(|piece| piece.addresses.end - piece.addresses.start).sum();
                let most = (all.len() as u64).div_ceil(workers.max(1)) + 8;
                prop_assert!(bytes <= most, "{} of {}", bytes, most);
            }
            for piece in shares.iter().flatten() {
                let Populated { part, runs, .. } = &blocks[piece.block];
                let whole = |at: u64| {
                    at.is_multiple_of(*part) || runs.iter().any(|run| run.start == at || run.end == at)
                };
                prop_assert!(whole(piece.addresses.start) && whole(piece.addresses.end));
            }
        }
    }
}
