//! What a run of pages is sent as.

use crate::{PAYLOAD_OF_DUPLICATE, TAG};
use units::{PAGE_SIZE, PageRange};

/// How pages travel, from the cheapest to the dearest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Class {
    /// Full of zeros: no content travels.
    Zero,
    /// The target keeps this content, from when the VM was there before: a tag travels.
    Kept,
    /// The target has this content in other pages: their place and a tag travel.
    Duplicate,
    /// As what differs from the version that was sent before, with a tag.
    Delta,
    /// In the batch's common part, compressed with its neighbours.
    Compressed,
    /// As it is.
    Raw,
}

/// Neighbouring pages of the same class.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Which pages.
    pub range: PageRange,
    /// What they are sent as.
    pub class: Class,
    /// Bytes that travel for this run alone; what is compressed travels in the batch's common part.
    pub bytes: u32,
}

impl Run {
    /// A run whose class alone says how many bytes travel: any but `Delta`.
    pub fn new(range: PageRange, class: Class) -> Self {
        let pages = range.count as usize;
        let bytes = match class {
            Class::Zero | Class::Compressed => 0,
            Class::Kept => TAG,
            Class::Duplicate => PAYLOAD_OF_DUPLICATE,
            Class::Delta => TAG + pages * crate::delta::LENGTH,
            Class::Raw => pages * PAGE_SIZE,
        };
        Self { range, class, bytes: bytes as u32 }
    }

    /// Bytes that travel for this run alone.
    pub fn payload(&self) -> usize {
        self.bytes as usize
    }

    /// Bytes of memory that it fills.
    pub fn raw(&self) -> usize {
        self.range.count as usize * PAGE_SIZE
    }

    /// Whether so many bytes can be right for this class and number of pages. Safe for any values: the check
    /// for what a peer sends.
    pub fn is_sound(&self) -> bool {
        let (pages, bytes) = (self.range.count, u64::from(self.bytes));
        match self.class {
            Class::Zero | Class::Compressed => bytes == 0,
            Class::Kept => bytes == TAG as u64,
            Class::Duplicate => bytes == PAYLOAD_OF_DUPLICATE as u64,
            Class::Delta => {
                let least = (TAG as u64).saturating_add(pages.saturating_mul(crate::delta::LENGTH as u64));
                pages > 0 && (least..=pages.saturating_mul(PAGE_SIZE as u64)).contains(&bytes)
            }
            Class::Raw => pages.checked_mul(PAGE_SIZE as u64) == Some(bytes),
        }
    }
}
