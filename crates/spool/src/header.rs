use std::fmt;
use units::MigrationId;

/// What every file begins with. Its last digit is the version of the whole format.
const MAGIC: [u8; 8] = *b"wh-spool";

/// The version that this reads and writes.
const VERSION: u32 = 1;

/// Bytes of magic, version and length.
const FIXED: usize = 16;

/// Bytes of the hash after the body.
const HASH: usize = 32;

/// RAM blocks and bytes of a name, at most: as a migration has them. A header within these bounds fits into
/// `MOST_BYTES`.
const MOST_BLOCKS: usize = 256;
const MOST_NAME: usize = 255;

/// Pages of one RAM block, at most: 64 TiB, as in a migration's request.
const MOST_BLOCK_PAGES: u64 = 1 << 34;

/// Bytes of a header, at most: 256 blocks with the longest names are 68 KiB. Bounds what is read of a file
/// that nobody vouches for.
pub(crate) const MOST_BYTES: usize = 128 << 10;

/// 32 random bytes that the two agents of a migration share, and nobody else has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Secret(pub [u8; 32]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What tags the extents of one file: made of the secret and all of the header, so that neither an extent of
/// another file nor one under a changed header is believed.
#[derive(Clone)]
pub struct Key(pub(crate) [u8; 32]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(…)")
    }
}

/// Which side of a migration writes a file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Side {
    /// The host that the VM leaves: pages.
    Source,
    /// The host that it comes to: what has arrived.
    Target,
}

/// One RAM block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockShape {
    /// QEMU's name for it.
    pub name: String,
    /// Its size.
    pub pages: u64,
}

/// Whose a file is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// Of which migration.
    pub migration: MigrationId,
    /// Who writes it.
    pub side: Side,
    /// The host that made it.
    pub host: String,
    /// The VM.
    pub vm: String,
    /// When it was made, in seconds since 1970 by that host's clock.
    pub created: u64,
    /// The VM's memory.
    pub blocks: Vec<BlockShape>,
}

impl Header {
    /// As it stands in a file, filled up to the next place for an extent. `None` for names or memory beyond
    /// all bounds.
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        let names = [&self.host, &self.vm].into_iter().chain(self.blocks.iter().map(|b| &b.name));
        let fits = self.blocks.len() <= MOST_BLOCKS
            && self.blocks.iter().all(|b| b.pages <= MOST_BLOCK_PAGES)
            && names.into_iter().all(|name| name.len() <= MOST_NAME);
        if !fits {
            return None;
        }
        let mut body = Vec::new();
        body.extend_from_slice(&self.migration.0.to_le_bytes());
        body.push(match self.side {
            Side::Source => 0,
            Side::Target => 1,
        });
        body.extend_from_slice(&self.created.to_le_bytes());
        put(&mut body, &self.host);
        put(&mut body, &self.vm);
        body.extend_from_slice(&(self.blocks.len() as u16).to_le_bytes());
        for block in &self.blocks {
            body.extend_from_slice(&block.pages.to_le_bytes());
            put(&mut body, &block.name);
        }
        let mut bytes = Vec::with_capacity(FIXED + body.len() + HASH + crate::ALIGN as usize);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&body);
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(crate::ALIGN as usize), 0);
        Some(bytes)
    }

    /// Reads the first bytes of a file. With how many of them are the header's, or what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<(Self, usize), String> {
        let (fixed, rest) = bytes.split_first_chunk::<FIXED>().ok_or("it is too short to be a spool file")?;
        let (magic, numbers) = fixed.split_first_chunk::<8>().ok_or("it is too short")?;
        if *magic != MAGIC {
            return Err("it is no spool file".to_owned());
        }
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| numbers[at + i]));
        let (version, length) = (number(0), number(4) as usize);
        if version != VERSION {
            return Err(format!("it is of version {version} of the format; this one reads {VERSION}"));
        }
        if length > MOST_BYTES {
            return Err(format!("its header claims {length} bytes; at most {MOST_BYTES} are acceptable"));
        }
        let torn = "its header is incomplete";
        let body = rest.get(..length).ok_or(torn)?;
        let hash = rest.get(length..length + HASH).ok_or(torn)?;
        if *hash != blake3::hash(&bytes[..FIXED + length]).as_bytes()[..] {
            return Err("its header is damaged".to_owned());
        }
        let header = Self::body(body).ok_or("its header makes no sense")?;
        Ok((header, (FIXED + length + HASH).next_multiple_of(crate::ALIGN as usize)))
    }

    fn body(mut bytes: &[u8]) -> Option<Self> {
        let from = &mut bytes;
        let migration = MigrationId(u128::from_le_bytes(take(from)?));
        let side = match take::<1>(from)? {
            [0] => Side::Source,
            [1] => Side::Target,
            _ => return None,
        };
        let created = u64::from_le_bytes(take(from)?);
        let (host, vm) = (name(from)?, name(from)?);
        let count = usize::from(u16::from_le_bytes(take(from)?));
        if count > MOST_BLOCKS {
            return None;
        }
        let mut blocks = Vec::with_capacity(count);
        for _ in 0..count {
            let pages = u64::from_le_bytes(take(from)?);
            if pages > MOST_BLOCK_PAGES {
                return None;
            }
            blocks.push(BlockShape { name: name(from)?, pages });
        }
        from.is_empty().then_some(Self { migration, side, host, vm, created, blocks })
    }

    /// What tags the extents of a file that begins with these bytes.
    pub(crate) fn key(bytes: &[u8], secret: &Secret) -> Key {
        let mut hasher = blake3::Hasher::new_derive_key("whimbrel spool extents 1");
        hasher.update(&secret.0);
        hasher.update(bytes);
        Key(*hasher.finalize().as_bytes())
    }
}

fn put(bytes: &mut Vec<u8>, name: &str) {
    bytes.push(name.len() as u8);
    bytes.extend_from_slice(name.as_bytes());
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*first)
}

fn name(bytes: &mut &[u8]) -> Option<String> {
    let [length] = take::<1>(bytes)?;
    let (name, rest) = bytes.split_at_checked(usize::from(length))?;
    *bytes = rest;
    String::from_utf8(name.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(blocks: Vec<(String, u64)>) -> Header {
        let blocks = blocks.into_iter().map(|(name, pages)| BlockShape { name, pages }).collect();
        let (host, vm) = ("hosta".to_owned(), "web1".to_owned());
        Header { migration: MigrationId(7), side: Side::Target, host, vm, created: 1_700_000_000, blocks }
    }

    proptest! {
        #[test]
        fn a_header_survives_being_written_and_read(
            blocks in prop::collection::vec(("[a-z/]{0,40}", 0u64..1 << 34), 0..20),
        ) {
            let header = header(blocks);
            let bytes = header.to_bytes().unwrap();
            prop_assert_eq!(Header::parse(&bytes), Ok((header, bytes.len())));
        }

        #[test]
        fn a_damaged_header_is_refused(at in 0usize..200, bit in 0u8..8) {
            let mut bytes = header(vec![("pc.ram".to_owned(), 1 << 18)]).to_bytes().unwrap();
            let meant = FIXED + u32::from_le_bytes([12, 13, 14, 15].map(|i| bytes[i])) as usize + HASH;
            let at = at % meant;
            bytes[at] ^= 1 << bit;
            prop_assert!(Header::parse(&bytes).is_err());
            prop_assert!(Header::parse(&bytes[..at]).is_err());
        }

        #[test]
        fn any_bytes_are_refused_without_harm(bytes: Vec<u8>) {
            prop_assert!(Header::parse(&bytes).is_err());
        }
    }

    #[test]
    fn what_is_beyond_all_bounds_is_not_written() {
        assert_eq!(header(vec![("x".repeat(256), 1)]).to_bytes(), None);
        assert_eq!(header(vec![("x".to_owned(), u64::MAX)]).to_bytes(), None);
        assert_eq!(header(vec![(String::new(), 1); 257]).to_bytes(), None);
    }
}
