//! Control messages to bytes and back, with bounds first.

use crate::{Shape, control};
use page::Unpack;
use prost::Message as _;
use units::{BlockId, MemorySet, PageSet};

/// A control message's length, at most: a device state with video memory fits, and a hostile length costs no more.
pub const MAX_CONTROL: usize = 128 << 20;

/// A control message that cannot be right. Whoever gets one ends the connection.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ControlError {
    /// Not a message.
    #[error("it is no control message: {0}")]
    Broken(String),
    /// A message of a kind that this version does not know.
    #[error("it carries nothing that this version knows")]
    Unknown,
    /// Packed content that lies about itself.
    #[error("its packed content is broken: {0}")]
    Packed(#[from] Unpack),
    /// Page sets of another VM.
    #[error("its page sets do not match the VM's RAM blocks")]
    Shape,
}

/// The message with its length before it.
pub fn encode(kind: control::Kind) -> Vec<u8> {
    let message = control::Message { kind: Some(kind) };
    let length = message.encoded_len();
    let mut bytes = Vec::with_capacity(4 + length);
    bytes.extend_from_slice(&(length as u32).to_le_bytes());
    message.encode_raw(&mut bytes);
    bytes
}

/// Reads a message without its length.
pub fn decode(bytes: &[u8]) -> Result<control::Kind, ControlError> {
    let message = control::Message::decode(bytes).map_err(|e| ControlError::Broken(e.to_string()))?;
    message.kind.ok_or(ControlError::Unknown)
}

/// Compresses bytes for a message.
pub fn packed(raw: &[u8]) -> control::Packed {
    control::Packed { raw: raw.len() as u64, lz4: page::pack(raw) }
}

/// The bytes of a message; at most `limit`.
pub fn unpacked(packed: &control::Packed, limit: u64) -> Result<Vec<u8>, ControlError> {
    Ok(page::unpack(&packed.lz4, packed.raw, limit)?)
}

/// Page sets for a message.
pub fn bitmaps(sets: &MemorySet) -> Vec<control::Bitmap> {
    let bitmap =
        |set: &PageSet| control::Bitmap { pages: set.capacity(), packed: page::pack(&set.to_bytes()) };
    sets.blocks().map(|(_, set)| bitmap(set)).collect()
}

/// The page sets of a message about a VM of this shape.
pub fn page_sets(bitmaps: &[control::Bitmap], shape: &Shape) -> Result<MemorySet, ControlError> {
    if bitmaps.len() != shape.0.len() {
        return Err(ControlError::Shape);
    }
    let mut sets = Vec::with_capacity(bitmaps.len());
    for (i, bitmap) in bitmaps.iter().enumerate() {
        let pages =
            shape.pages(BlockId(i as u16)).filter(|p| *p == bitmap.pages).ok_or(ControlError::Shape)?;
        let size = pages.div_ceil(8);
        let raw = page::unpack(&bitmap.packed, size, size)?;
        sets.push(PageSet::from_bytes(pages, &raw).ok_or(ControlError::Shape)?);
    }
    Ok(MemorySet::from_blocks(sets))
}
