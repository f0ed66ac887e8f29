//! Control messages to bytes and back, with bounds first.

use crate::{Shape, control};
use page::DecompressError;
use prost::Message as _;
use units::{BlockId, MemorySet, PageSet};

/// A control message's length, at most: a device state with video memory fits, and a hostile length costs no
/// more.
pub const MAX_CONTROL: usize = 128 << 20;

/// A message's length, at most, where it carries neither a device state nor page sets nor hashes nor a recipe
/// but sentences, some of which are kept and shown.
const MAX_WORDS: usize = 1 << 20;

/// Parts of a message, at most: RAM blocks, reasons, pieces of a device state; QEMU itself stops at 256
/// memory slots. An empty part takes two bytes on the wire and up to 56 in memory, so that without a bound
/// 128 MiB would become several GiB.
const MAX_PARTS: usize = 4096;

/// A Spooled's manifest, by their numbers in `control.proto`.
const MANIFEST: (u64, u64) = (30, 4);

/// A control message that cannot be right. Whoever gets one ends the connection.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ControlError {
    /// Not a message.
    #[error("it is no control message: {0}")]
    Broken(String),
    /// Longer than anything that has to be said.
    #[error("{bytes} bytes of a message of kind {kind}; at most {limit} are agreed")]
    TooLong {
        /// Its number in `control.proto`.
        kind: u64,
        /// How long it is.
        bytes: usize,
        /// How long it may be.
        limit: usize,
    },
    /// More parts than any VM has.
    #[error("it has more than {MAX_PARTS} parts")]
    Parts,
    /// A message of a kind that this version does not know.
    #[error("it carries nothing that this version knows")]
    Unknown,
    /// Compressed content that lies about itself.
    #[error("its compressed content is broken: {0}")]
    Compressed(#[from] DecompressError),
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

/// Reads a message without its length. Costs memory in proportion to what came, a few times as much.
pub fn decode(bytes: &[u8]) -> Result<control::Kind, ControlError> {
    check(bytes)?;
    let message = control::Message::decode(bytes).map_err(|e| ControlError::Broken(e.to_string()))?;
    let mut kind = message.kind.ok_or(ControlError::Unknown)?;
    words(&mut kind).into_iter().for_each(harmless);
    Ok(kind)
}

/// What of a message is shown to people.
fn words(kind: &mut control::Kind) -> Vec<&mut String> {
    use control::Kind;
    match kind {
        Kind::Hello(hello) => vec![&mut hello.host, &mut hello.software],
        Kind::Failed(failed) => vec![&mut failed.what, &mut failed.why],
        Kind::Refused(refused) => refused.reasons.iter_mut().collect(),
        Kind::Committed(committed) => vec![&mut committed.paused_because],
        Kind::Ready(ready) => vec![&mut ready.no_spool],
        Kind::SpoolFailed(failed) => vec![&mut failed.why],
        Kind::Note(note) => vec![&mut note.text],
        Kind::Claimed(claimed) => vec![&mut claimed.owner],
        _ => vec![],
    }
}

/// Leaves nothing in it that a terminal would obey.
fn harmless(text: &mut String) {
    let order = |c: char| c.is_control() && c != '\n';
    if text.contains(order) {
        *text = text.replace(order, "?");
    }
}

/// Looks at a message's outer fields before anything is made of them. What is no message at all is left to
/// the decoder to refuse.
fn check(mut bytes: &[u8]) -> Result<(), ControlError> {
    let mut parts = 0;
    while let Some((kind, content)) = field(&mut bytes) {
        parts += 1;
        let Some(mut content) = content else { continue };
        let limit = match kind {
            // Hello, Failed, Claim, Ready, Refused, Committed, Claimed, SpoolFailed, Note, Kept.
            1 | 4 | 15 | 20 | 21 | 23 | 26 | 42 | 44 | 45 => MAX_WORDS,
            // Prepare, with a recipe.
            10 => 8 * MAX_WORDS,
            _ => MAX_CONTROL,
        };
        if content.len() > limit {
            return Err(ControlError::TooLong { kind, bytes: content.len(), limit });
        }
        while parts <= MAX_PARTS
            && let Some((part, inside)) = field(&mut content)
        {
            parts += 1;
            // Of the messages within messages, a Spooled's manifest has parts of its own.
            let mut inside = inside.filter(|_| (kind, part) == MANIFEST).unwrap_or_default();
            while parts <= MAX_PARTS && field(&mut inside).is_some() {
                parts += 1;
            }
        }
        if parts > MAX_PARTS {
            return Err(ControlError::Parts);
        }
    }
    Ok(())
}

/// The next field of a protobuf message: its number, and its bytes if it consists of bytes. `None` at the
/// end, or at what is no field.
fn field<'a>(from: &mut &'a [u8]) -> Option<(u64, Option<&'a [u8]>)> {
    let key = varint(from)?;
    let mut bytes = None;
    match key & 7 {
        0 => drop(varint(from)?),
        1 => drop(take(from, 8)?),
        2 => {
            let length = varint(from)?;
            bytes = Some(take(from, length)?);
        }
        // Groups begin and end: what is between them is fields like any other.
        3 | 4 => {}
        5 => drop(take(from, 4)?),
        _ => return None,
    }
    Some((key >> 3, bytes))
}

fn take<'a>(from: &mut &'a [u8], length: u64) -> Option<&'a [u8]> {
    let (taken, rest) = from.split_at_checked(usize::try_from(length).ok()?)?;
    *from = rest;
    Some(taken)
}

fn varint(from: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *take(from, 1)?.first()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// Compresses bytes for a message.
pub fn compressed(raw: &[u8]) -> control::Compressed {
    control::Compressed { raw: raw.len() as u64, lz4: page::compress(raw) }
}

/// The bytes of a message; at most `limit`.
pub fn decompressed(compressed: &control::Compressed, limit: u64) -> Result<Vec<u8>, ControlError> {
    Ok(page::decompress(&compressed.lz4, compressed.raw, limit)?)
}

/// Page sets for a message.
pub fn bitmaps(sets: &MemorySet) -> Vec<control::Bitmap> {
    let bitmap = |set: &PageSet| control::Bitmap {
        pages: set.capacity(),
        compressed: page::compress(&set.to_bytes()),
    };
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
        let raw = page::decompress(&bitmap.compressed, size, size)?;
        sets.push(PageSet::from_bytes(pages, &raw).ok_or(ControlError::Shape)?);
    }
    Ok(MemorySet::from_blocks(sets))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without its length.
    fn wire(kind: control::Kind) -> Vec<u8> {
        encode(kind).split_off(4)
    }

    #[test]
    fn many_tiny_parts_are_refused_before_they_cost_memory() {
        let reasons =
            |count| wire(control::Kind::Refused(control::Refused { reasons: vec![String::new(); count] }));
        assert!(decode(&reasons(MAX_PARTS - 1)).is_ok());
        assert_eq!(decode(&reasons(MAX_PARTS)), Err(ControlError::Parts));
        // The same, as many messages of one reason each: protobuf adds them up.
        let one = reasons(1);
        assert_eq!(decode(&one.repeat(MAX_PARTS / 2)).map(drop), Ok(()));
        assert_eq!(decode(&one.repeat(MAX_PARTS)), Err(ControlError::Parts));
    }

    #[test]
    fn many_tiny_parts_of_a_manifest_are_refused_too() {
        let spooled = |count| {
            let outdated = vec![control::Bitmap::default(); count];
            let manifest = Some(control::Manifest { outdated, ..Default::default() });
            wire(control::Kind::Spooled(control::Spooled { manifest, ..Default::default() }))
        };
        assert!(decode(&spooled(256)).is_ok());
        assert_eq!(decode(&spooled(MAX_PARTS)), Err(ControlError::Parts));
        // Protobuf adds up manifests as well, wherever they stand.
        assert_eq!(decode(&spooled(256).repeat(MAX_PARTS / 256)), Err(ControlError::Parts));
    }

    #[test]
    fn what_is_said_in_words_is_no_order_to_a_terminal() {
        let why = "line one\nline \u{1b}]0;two\u{7}".to_owned();
        let failed = control::Failed { what: "\r".into(), why, cancelled: false };
        let Ok(control::Kind::Failed(heard)) = decode(&wire(control::Kind::Failed(failed))) else { panic!() };
        assert_eq!((heard.what.as_str(), heard.why.as_str()), ("?", "line one\nline ?]0;two?"));
    }

    #[test]
    fn what_is_said_in_words_is_short() {
        let failed = |length| {
            let why = "x".repeat(length);
            wire(control::Kind::Failed(control::Failed { why, ..Default::default() }))
        };
        assert!(decode(&failed(MAX_WORDS - 8)).is_ok());
        assert!(matches!(decode(&failed(MAX_WORDS)), Err(ControlError::TooLong { kind: 4, .. })));
        let stream = Some(control::Compressed { raw: 1, lz4: vec![0; 4 * MAX_WORDS] });
        assert!(decode(&wire(control::Kind::State(control::State { stream, ..Default::default() }))).is_ok());
    }
}
