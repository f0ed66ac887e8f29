//! Where compressing is of no use.

use units::{BlockId, PageIndex, PageRange};

/// Pages of a region: 2 MiB, what a guest with huge pages hands out at once.
const REGION: u64 = 512;

/// Saved less than one part in so many: not worth it.
const WORTH: u64 = 16;

/// After so many poor regions one after the other, only every eighth new one is tried: a VM full of films or
/// of encrypted data is like that everywhere.
const STREAK: u32 = 8;
const SAMPLE: u64 = 8;

/// Remembers regions whose content did not shrink. They are tried again after 2, 4, 8 … rounds. Two bytes a
/// region, so a 64 GiB guest costs 64 KiB.
#[derive(Clone, Debug)]
pub struct Regions {
    blocks: Vec<Vec<Poor>>,
    round: u8,
    streak: u32,
}

#[derive(Clone, Copy, Default, Debug)]
struct Poor {
    /// How many times.
    times: u8,
    /// The round from which on it is worth another try.
    again: u8,
}

impl Regions {
    /// For blocks of so many pages.
    pub fn new(pages: &[u64]) -> Self {
        let regions = |pages: &u64| vec![Poor::default(); pages.div_ceil(REGION) as usize];
        Self { blocks: pages.iter().map(regions).collect(), round: 0, streak: 0 }
    }

    /// A round begins.
    pub fn turn(&mut self, round: u32) {
        // What comes after 255 rounds is treated like the 255th.
        self.round = round.min(u32::from(u8::MAX)) as u8;
    }

    fn region(&mut self, block: BlockId, page: PageIndex) -> Option<&mut Poor> {
        self.blocks.get_mut(usize::from(block.0))?.get_mut((page.0 / REGION) as usize)
    }

    /// Whether to compress what begins here.
    pub fn worth(&self, block: BlockId, page: PageIndex) -> bool {
        let region = page.0 / REGION;
        let poor = self.blocks.get(usize::from(block.0)).and_then(|block| block.get(region as usize));
        match poor {
            Some(Poor { times: 0, .. }) => self.streak < STREAK || region.is_multiple_of(SAMPLE),
            Some(poor) => self.round >= poor.again,
            None => true,
        }
    }

    /// These pages, so many bytes, shrank to so many.
    pub fn tried(&mut self, block: BlockId, pages: &[PageRange], raw: u64, compressed: u64) {
        let poor = compressed + raw / WORTH > raw;
        let round = self.round;
        self.streak = if poor { self.streak + 1 } else { 0 };
        let mut before = None;
        for page in pages.iter().map(|range| range.start) {
            // Once for each region.
            if before.replace(page.0 / REGION) == Some(page.0 / REGION) {
                continue;
            }
            let Some(region) = self.region(block, page) else { continue };
            if poor {
                region.times = (region.times + 1).min(7);
                region.again = round.saturating_add(1 << region.times);
            } else {
                *region = Poor::default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: BlockId = BlockId(0);

    fn at(page: u64) -> PageRange {
        PageRange::new(PageIndex(page), 1)
    }

    #[test]
    fn a_poor_region_is_left_alone_for_longer_and_longer() {
        let mut regions = Regions::new(&[REGION * 4]);
        let mut tried = vec![];
        for round in 1..40 {
            regions.turn(round);
            if regions.worth(BLOCK, PageIndex(REGION + 3)) {
                tried.push(round);
                regions.tried(BLOCK, &[at(REGION)], 4096, 4000);
            }
        }
        assert_eq!(tried, [1, 3, 7, 15, 31]);
        assert!(regions.worth(BLOCK, PageIndex(0)), "others are not concerned");
        regions.tried(BLOCK, &[at(REGION)], 4096, 1000);
        assert!(regions.worth(BLOCK, PageIndex(REGION)));
    }

    #[test]
    fn where_nothing_shrinks_little_is_tried() {
        let mut regions = Regions::new(&[REGION * 100]);
        let mut tried = 0;
        for region in 0..100 {
            if regions.worth(BLOCK, PageIndex(region * REGION)) {
                tried += 1;
                regions.tried(BLOCK, &[at(region * REGION)], 4096, 4096);
            }
        }
        assert!(tried <= 20, "{tried}");
        regions.tried(BLOCK, &[at(0)], 4096, 2000);
        assert!(regions.worth(BLOCK, PageIndex(99 * REGION)), "it found something again");
    }

    #[test]
    fn pages_of_nowhere_do_no_harm() {
        let mut regions = Regions::new(&[10]);
        regions.tried(BlockId(9), &[at(u64::MAX)], 1, 1);
        assert!(regions.worth(BlockId(9), PageIndex(0)));
    }
}
