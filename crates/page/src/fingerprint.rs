//! What tells two contents apart: fingerprints for this side's own knowledge, tags for what the other side
//! must verify.

use twox_hash::{XxHash3_64, XxHash3_128};

/// Bytes of a tag on the wire. 128 bits of a keyed hash: nobody without the key can do better than guess.
pub const TAG: usize = 16;

/// Bytes of XXH3's secret.
const SECRET: usize = 192;

/// A hash of a page's content under a secret of this migration. A guest that does not know the secret cannot
/// make two pages that share a print.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Fingerprint(pub(crate) u128);

impl Fingerprint {
    /// Zeros, which is also what a page is that was never sent to a target whose memory begins as holes.
    pub(crate) const ZERO: Self = Self(0);

    /// Of no content: neither zeros nor any other page has this print.
    pub(crate) const UNKNOWN: Self = Self(1);

    /// Set in the print of all content that is not zeros.
    const CONTENT: u128 = 1 << 127;
}

/// Makes fingerprints: XXH3 with 128 bits, at the speed of memory. 192 bytes of secret instead of the usual 8
/// of seed: its mixing is only as strong as what of it nobody can guess.
pub(crate) struct Fingerprinter(Box<[u8; SECRET]>);

impl Fingerprinter {
    pub(crate) fn new(random: &[u8; 32]) -> Self {
        let mut secret = Box::new([0; SECRET]);
        let mut hasher = blake3::Hasher::new_derive_key("whimbrel fingerprints of pages 1");
        hasher.update(random);
        hasher.finalize_xof().fill(&mut *secret);
        Self(secret)
    }

    #[inline]
    pub(crate) fn fingerprint(&self, page: &[u8]) -> Fingerprint {
        // Only a secret that is too short is refused.
        let hash = XxHash3_128::oneshot_with_secret(&*self.0, page).unwrap_or_default();
        Fingerprint(hash | Fingerprint::CONTENT)
    }
}

/// Seals content by a key that both sides of one migration share: BLAKE3. The target takes no content from
/// its own memory that does not match its tag (I7).
#[derive(Clone)]
pub struct Tagger([u8; 32]);

impl Tagger {
    /// With the migration's key.
    pub fn new(key: [u8; 32]) -> Self {
        Self(key)
    }

    /// The tag of this content.
    pub fn tag(&self, content: &[u8]) -> [u8; TAG] {
        let hash = blake3::keyed_hash(&self.0, content);
        *hash.as_bytes().first_chunk().expect("a hash is longer than a tag")
    }

    /// Whether the content is what was tagged.
    pub(crate) fn holds(&self, content: &[u8], tag: &[u8; TAG]) -> bool {
        self.tag(content) == *tag
    }
}

/// A hash that tells apart pages which differ by accident (XXH3, 64 bits). No defence against a chosen
/// collision.
pub fn fingerprint(page: &[u8]) -> u64 {
    XxHash3_64::oneshot(page)
}

/// Whether there is nothing but zeros. Most pages that are not show it in their first bytes.
#[inline]
pub fn is_zero(bytes: &[u8]) -> bool {
    // 64 bytes a step let the compiler use the widest registers, and a step still ends early.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|c| c.iter().fold(0, |acc, b| acc | b) == 0) && rest.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use units::PAGE_SIZE;

    #[test]
    fn one_bit_changes_every_hash() {
        let (printer, tagger) = (Fingerprinter::new(&[1; 32]), Tagger::new([2; 32]));
        let mut page = vec![0; PAGE_SIZE];
        let before = (fingerprint(&page), printer.fingerprint(&page), tagger.tag(&page));
        page[4095] ^= 1;
        let after = (fingerprint(&page), printer.fingerprint(&page), tagger.tag(&page));
        assert!(before.0 != after.0 && before.1 != after.1 && before.2 != after.2);
    }

    #[test]
    fn each_migration_hashes_in_its_own_way() {
        let page = vec![7; PAGE_SIZE];
        assert_ne!(
            Fingerprinter::new(&[1; 32]).fingerprint(&page),
            Fingerprinter::new(&[2; 32]).fingerprint(&page)
        );
        assert_ne!(Tagger::new([1; 32]).tag(&page), Tagger::new([2; 32]).tag(&page));
    }
}
