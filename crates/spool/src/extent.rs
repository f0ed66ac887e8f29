use crate::Key;
use units::{BlockId, PAGE_SIZE, PageIndex, PageRange};

/// Extents begin at multiples of this, and so many bytes are the header of one.
pub const ALIGN: u64 = 128;

/// Pages with content in one extent, at most: 512 KiB, as in a batch on the wire. A page is verified with all
/// of its extent, so this also bounds what a guest waits for.
pub const MOST_PAGES: u64 = 128;

/// Zero pages in one extent, at most: 256 MiB of the guest, at the cost of a header.
pub const MOST_ZEROS: u64 = 1 << 16;

/// Not the whole of what tells an extent, but what a search can look for cheaply.
const MAGIC: [u8; 8] = *b"extent\x01\n";

/// Bytes of a header that its own tag is for.
const TAGGED: usize = 96;

/// What an extent says of its pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ExtentKind {
    /// They are zeros.
    Zero,
    /// This is what they hold.
    Raw,
    /// The same, compressed.
    Lz4,
    /// They are in the target's memory. Only in the target's file.
    Here,
    /// All pages are in the target's memory, and that is recorded there. Only in the target's file; stands
    /// for no pages.
    Complete,
}

/// What pages hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// Zeros, or nothing to tell.
    Nothing,
    /// So many pages.
    Pages(Vec<u8>),
}

/// A run of pages in a file: what its header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Grows by one with each extent of a file: of two versions of a page, the one with the greater number is
    /// newer.
    pub sequence: u64,
    /// The round that it was written in; for people.
    pub round: u32,
    /// What it says of its pages.
    pub kind: ExtentKind,
    /// Their block.
    pub block: BlockId,
    /// Their places in it.
    pub pages: PageRange,
    /// Where in the file its header begins.
    pub offset: u64,
    /// Bytes of content that follow the header.
    pub length: u32,
    /// The tag of these bytes.
    pub(crate) tag: [u8; 32],
}

impl Extent {
    /// The header as it stands in the file.
    pub(crate) fn to_bytes(self, key: &Key) -> [u8; ALIGN as usize] {
        let mut bytes = [0; ALIGN as usize];
        let mut at = 0;
        let mut put = |part: &[u8]| {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        };
        put(&MAGIC);
        put(&self.sequence.to_le_bytes());
        put(&self.offset.to_le_bytes());
        put(&self.pages.start.0.to_le_bytes());
        put(&(self.pages.count as u32).to_le_bytes());
        put(&self.length.to_le_bytes());
        put(&self.round.to_le_bytes());
        put(&self.block.0.to_le_bytes());
        put(&[match self.kind {
            ExtentKind::Zero => 0,
            ExtentKind::Raw => 1,
            ExtentKind::Lz4 => 2,
            ExtentKind::Here => 3,
            ExtentKind::Complete => 4,
        }]);
        put(&[0]);
        put(&self.tag);
        let tag = blake3::keyed_hash(&key.0, &bytes[..TAGGED]);
        bytes[TAGGED..].copy_from_slice(tag.as_bytes());
        bytes
    }

    /// The header that stands at this place of a file for memory of this shape (the blocks' sizes in pages),
    /// if one does that was written with this key, for this place.
    pub(crate) fn parse(bytes: &[u8; ALIGN as usize], offset: u64, shape: &[u64], key: &Key) -> Option<Self> {
        if bytes[..8] != MAGIC {
            return None;
        }
        if blake3::keyed_hash(&key.0, &bytes[..TAGGED]) != bytes[TAGGED..] {
            return None;
        }
        let long = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| bytes[at + i]));
        let int = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        let kind = match bytes[46] {
            0 => ExtentKind::Zero,
            1 => ExtentKind::Raw,
            2 => ExtentKind::Lz4,
            3 => ExtentKind::Here,
            4 => ExtentKind::Complete,
            _ => return None,
        };
        let extent = Self {
            sequence: long(8),
            offset: long(16),
            pages: PageRange::new(PageIndex(long(24)), u64::from(int(32))),
            length: int(36),
            round: int(40),
            block: BlockId(u16::from_le_bytes([bytes[44], bytes[45]])),
            kind,
            tag: std::array::from_fn(|i| bytes[48 + i]),
        };
        // Sealed by the other agent, which may have been broken into: bounds all the same.
        (extent.offset == offset && extent.is_sound(shape)).then_some(extent)
    }

    fn is_sound(&self, shape: &[u64]) -> bool {
        let pages = shape.get(usize::from(self.block.0)).copied();
        let fits = pages.is_some_and(|pages| self.pages.fits(pages)) && !self.pages.is_empty();
        let (count, length) = (self.pages.count, u64::from(self.length));
        match self.kind {
            ExtentKind::Zero | ExtentKind::Here => fits && count <= MOST_ZEROS && length == 0,
            ExtentKind::Raw => fits && count <= MOST_PAGES && length == self.pages.bytes().0,
            ExtentKind::Lz4 => fits && count <= MOST_PAGES && length > 0 && length < self.pages.bytes().0,
            ExtentKind::Complete => self.pages.is_empty() && length == 0,
        }
    }

    /// Where the next extent begins.
    pub fn end(&self) -> u64 {
        (self.offset + ALIGN + u64::from(self.length)).next_multiple_of(ALIGN)
    }

    /// Makes pages of what follows the header, if that is what was written.
    pub(crate) fn open(&self, stored: &[u8], key: &Key) -> Option<Content> {
        if matches!(self.kind, ExtentKind::Zero | ExtentKind::Here | ExtentKind::Complete) {
            return Some(Content::Nothing);
        }
        if blake3::keyed_hash(&key.0, stored) != self.tag {
            return None;
        }
        let length = self.pages.bytes().0;
        match self.kind {
            ExtentKind::Lz4 => {
                page::decompress(stored, length, MOST_PAGES * PAGE_SIZE as u64).ok().map(Content::Pages)
            }
            _ => Some(Content::Pages(stored.to_vec())),
        }
    }

    /// The tag of stored content.
    pub(crate) fn tag(stored: &[u8], key: &Key) -> [u8; 32] {
        if stored.is_empty() { [0; 32] } else { *blake3::keyed_hash(&key.0, stored).as_bytes() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: Key = Key([9; 32]);

    fn extent() -> Extent {
        let pages = PageRange::new(PageIndex(40), 2);
        let (kind, block, length) = (ExtentKind::Raw, BlockId(1), 2 * PAGE_SIZE as u32);
        Extent { sequence: 5, round: 2, kind, block, pages, offset: 1280, length, tag: [3; 32] }
    }

    #[test]
    fn a_header_survives_being_written_and_read() {
        let bytes = extent().to_bytes(&KEY);
        assert_eq!(Extent::parse(&bytes, 1280, &[1, 42], &KEY), Some(extent()));
    }

    #[test]
    fn a_header_counts_only_in_its_place_and_under_its_key() {
        let bytes = extent().to_bytes(&KEY);
        assert_eq!(Extent::parse(&bytes, 1408, &[1, 42], &KEY), None, "copied to another place");
        assert_eq!(Extent::parse(&bytes, 1280, &[1, 42], &Key([8; 32])), None, "of another file");
        assert_eq!(Extent::parse(&bytes, 1280, &[1, 41], &KEY), None, "beyond the block");
        assert_eq!(Extent::parse(&bytes, 1280, &[1], &KEY), None, "of no block");
        let long = Extent { length: u32::MAX, ..extent() };
        assert_eq!(Extent::parse(&long.to_bytes(&KEY), 1280, &[1, 42], &KEY), None, "longer than its pages");
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_seen(at in 0usize..128, bit in 0u8..8) {
            let mut bytes = extent().to_bytes(&KEY);
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(Extent::parse(&bytes, 1280, &[1, 42], &KEY), None);
        }
    }
}
