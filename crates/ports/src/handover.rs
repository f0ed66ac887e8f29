//! RAM that the target reaches by itself: it is handed over instead of sent.
//!
//! The source offers a block, and has written a nonce where only the block's own memory shows it. A target
//! whose waiting QEMU maps that memory reads the nonce there, and answers with it. Names, paths and sizes
//! prove nothing: two pools can have one name, and a mount can be stale.

use units::BlockId;

/// How two QEMUs reach the same memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// One kernel has it: a memfd, or a file on tmpfs. Coherent: what one writes the other reads.
    Host,
}

/// A RAM block that the target may reach by itself, as its source offers it. Comes from a peer: whoever acts
/// on it checks it first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Handover {
    /// The block.
    pub block: BlockId,
    /// How it would be reached.
    pub reach: Reach,
    /// Where the target finds it: what this means depends on `reach`, and proves nothing.
    pub place: Vec<u8>,
}

/// What the source wrote to show which memory is meant. Drawn at random for each block and migration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Nonce(u64);

impl Nonce {
    /// Nonces are less than this: each is a place in a file, whose size is a signed number.
    pub const END: u64 = 1 << 61;

    /// From a random number.
    pub fn new(random: u64) -> Self {
        Self(random % Self::END)
    }

    /// What was read somewhere; none if it cannot be a nonce.
    pub fn read(number: u64) -> Option<Self> {
        (number < Self::END).then_some(Self(number))
    }

    /// Its number.
    pub fn number(self) -> u64 {
        self.0
    }
}

/// A block that the waiting QEMU maps, with the nonce that was read through that mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reached {
    /// The block.
    pub block: BlockId,
    /// What its memory shows.
    pub nonce: Nonce,
}
