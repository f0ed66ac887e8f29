//! Blocks of RAM that the target reaches by itself: offered in Prepare, answered in Ready, and left out from
//! then on.

use super::SourceDriver;
use crate::{
    Broken,
    ports::{Handover, Nonce, Reach},
    why,
};
use proto::control;
use std::collections::BTreeSet;
use units::BlockId;

/// What a migration offers to hand over.
#[derive(Default)]
pub struct Offered {
    /// The blocks, each with what was written where only its memory shows it.
    pub blocks: Vec<(Handover, Nonce)>,
    /// What keeps them reachable until the migration is over.
    pub keeps: Option<Box<dyn Send>>,
}

impl Offered {
    /// Which blocks.
    pub(super) fn ids(&self) -> BTreeSet<BlockId> {
        self.blocks.iter().map(|(handover, _)| handover.block).collect()
    }
}

impl SourceDriver {
    /// What is offered, as it travels.
    pub(super) fn handovers(&self) -> Vec<control::Handover> {
        let one = |(handover, _): &(Handover, Nonce)| control::Handover {
            block: handover.block.0.into(),
            reach: match handover.reach {
                Reach::Host => 1,
            },
            place: handover.place.clone(),
        };
        self.parts.offered.blocks.iter().map(one).collect()
    }

    /// The target's answer. What it reaches is neither sent nor tracked any more; a block that it does not
    /// reach travels as always.
    pub(super) fn hand_over(&mut self, reached: &[control::Reached]) -> Result<(), Broken> {
        let blocks = reached_of(&self.parts.offered.blocks, reached)
            .map_err(|told| Broken::new("hand memory over to the target", told))?;
        if blocks.is_empty() {
            return Ok(());
        }
        if let Some(tracker) = &mut self.parts.tracker {
            let blocks: Vec<BlockId> = blocks.iter().copied().collect();
            tracker.leave_out(&blocks).map_err(why("leave out what the target reaches"))?;
        }
        self.handed_over = blocks;
        for block in &self.handed_over {
            self.dirty.block_mut(*block).clear();
        }
        let pages = self.handed_over.iter().map(|block| self.shape.0[usize::from(block.0)]).sum();
        self.reporter.handed_over(pages);
        Ok(())
    }
}

/// Which blocks the target reaches, by its answer; or why that cannot be true. A wrong nonce is another
/// memory of the same name, whose bytes the guest must never get.
fn reached_of(
    offered: &[(Handover, Nonce)],
    reached: &[control::Reached],
) -> Result<BTreeSet<BlockId>, String> {
    let mut blocks = BTreeSet::new();
    for control::Reached { block, nonce } in reached {
        let is_it = |(handover, _): &&(Handover, Nonce)| u32::from(handover.block.0) == *block;
        let Some((handover, written)) = offered.iter().find(is_it) else {
            return Err(format!("it says that it reaches RAM block {block}, which was not offered"));
        };
        if Nonce::read(*nonce) != Some(*written) {
            return Err(format!(
                "what it takes for RAM block {block} is other memory: it does not show what was written here"
            ));
        }
        if !blocks.insert(handover.block) {
            return Err(format!("it says twice that it reaches RAM block {block}"));
        }
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a target answers, and the blocks that are handed over then, or a part of what is said.
    type Row<'a> = (&'a [(u32, u64)], Result<&'a [u16], &'a str>);

    #[test]
    fn only_what_was_offered_and_is_proven_is_handed_over() {
        let offer = |block| Handover { block: BlockId(block), reach: Reach::Host, place: vec![] };
        let offered = [(offer(0), Nonce::new(7)), (offer(2), Nonce::new(9))];
        let table: &[Row<'_>] = &[
            (&[], Ok(&[])),
            (&[(0, 7)], Ok(&[0])),
            (&[(2, 9), (0, 7)], Ok(&[0, 2])),
            (&[(0, 9)], Err("other memory")),
            (&[(0, 7), (2, 7)], Err("other memory")),
            (&[(0, 7 + Nonce::END)], Err("other memory")),
            (&[(0, u64::MAX)], Err("other memory")),
            (&[(1, 7)], Err("was not offered")),
            (&[(65_536, 7)], Err("was not offered")),
            (&[(0, 7), (0, 7)], Err("twice")),
        ];
        for (answer, wanted) in table {
            let answer: Vec<_> = answer
                .iter()
                .map(|(block, nonce)| control::Reached { block: *block, nonce: *nonce })
                .collect();
            match (reached_of(&offered, &answer), wanted) {
                (Ok(blocks), Ok(wanted)) => {
                    assert_eq!(blocks.iter().map(|block| block.0).collect::<Vec<_>>(), *wanted);
                }
                (Err(told), Err(wanted)) => assert!(told.contains(wanted), "{told}"),
                (found, wanted) => panic!("{answer:?}: {found:?} instead of {wanted:?}"),
            }
        }
    }
}
