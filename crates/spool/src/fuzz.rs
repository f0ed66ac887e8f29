//! What another agent could write that has the key and has been broken into: for the crate `fuzz`, and for
//! nothing else.

use crate::{Extent, ExtentKind, Header, Secret};
use units::{BlockId, PageIndex, PageRange};

/// An extent, whatever it claims, as it would have to stand at `offset` of the file that begins with `begin`.
pub fn tagged(begin: &[u8], secret: &Secret, claims: &Claims, stored: &[u8]) -> Vec<u8> {
    let key = Header::key(begin, secret);
    let extent = Extent {
        sequence: claims.sequence,
        round: 1,
        kind: claims.kind,
        block: BlockId(claims.block),
        pages: PageRange::new(PageIndex(claims.start), u64::from(claims.count)),
        offset: claims.offset,
        length: claims.length,
        tag: Extent::tag(stored, &key),
    };
    [&extent.to_bytes(&key), stored].concat()
}

/// What it claims.
#[derive(Clone, Copy, Debug)]
pub struct Claims {
    /// Its number.
    pub sequence: u64,
    /// Where it is.
    pub offset: u64,
    /// What its pages are.
    pub kind: ExtentKind,
    /// Their block.
    pub block: u16,
    /// The first of them.
    pub start: u64,
    /// How many.
    pub count: u32,
    /// Bytes that follow.
    pub length: u32,
}
