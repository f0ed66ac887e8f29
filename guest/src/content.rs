//! What pages are filled with: the same content for the same seed, so that it can be compared later.

use units::PAGE_SIZE;

/// A page of guest memory, where the hardware has its pages.
#[derive(Clone)]
#[repr(align(4096))]
pub(crate) struct Page(pub(crate) [u8; PAGE_SIZE]);

const _: () = assert!(align_of::<Page>() == PAGE_SIZE && size_of::<Page>() == PAGE_SIZE);

impl Page {
    pub(crate) const ZERO: Page = Page([0; PAGE_SIZE]);
}

/// So many different pages there are where pages repeat.
const DIFFERENT: u64 = 64;

/// How compressible.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Content {
    /// Not at all.
    Random,
    /// Like log files: about five to one.
    Text,
    /// All zeros.
    Zero,
    /// One word of what was there before changes.
    Word,
    /// One of a few pages of random numbers.
    Repeat,
    /// Some of each page random, the rest text.
    Mixed {
        /// How much, in percent.
        random_percent: u8,
    },
}

impl Content {
    /// `random`, `text`, `zero`, `word`, `repeat` or `40%`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        match text {
            "random" => Ok(Self::Random),
            "text" => Ok(Self::Text),
            "zero" => Ok(Self::Zero),
            "word" => Ok(Self::Word),
            "repeat" => Ok(Self::Repeat),
            _ => match text.strip_suffix('%').and_then(|n| n.parse().ok()) {
                Some(random_percent @ 0..=100) => Ok(Self::Mixed { random_percent }),
                _ => Err("there are random, text, zero, word, repeat, or a percentage like 40%".to_owned()),
            },
        }
    }

    /// Writes the page that belongs to `seed`.
    pub(crate) fn write(self, seed: u64, page: &mut Page) {
        match self {
            Self::Random => random(seed, &mut page.0),
            Self::Text => text(seed, &mut page.0),
            Self::Zero => page.0.fill(0),
            Self::Word => {
                let at = (mix(seed) as usize % (PAGE_SIZE / 8)) * 8;
                page.0[at..at + 8].copy_from_slice(&seed.to_le_bytes());
            }
            Self::Repeat => random(seed % DIFFERENT, &mut page.0),
            Self::Mixed { random_percent } => {
                let words = PAGE_SIZE / 8 * usize::from(random_percent) / 100;
                let (noise, rest) = page.0.split_at_mut(words * 8);
                random(seed, noise);
                text(seed, rest);
            }
        }
    }
}

/// A good mixture of 64 bits (the finisher of SplitMix64).
pub(crate) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The next number of a xorshift generator, whose state must not be zero.
pub(crate) fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn random(seed: u64, out: &mut [u8]) {
    let mut state = mix(seed) | 1;
    for word in out.chunks_exact_mut(8) {
        word.copy_from_slice(&next(&mut state).to_le_bytes());
    }
}

/// Eight-letter words, so that a page costs no more than random numbers do.
fn text(seed: u64, out: &mut [u8]) {
    const WORDS: [&[u8; 8]; 16] = [
        b" request",
        b" from 10",
        b".0.0.17 ",
        b"took 12 ",
        b"ms, stat",
        b"us 200, ",
        b"bytes 51",
        b"2, agent",
        b" \"curl\"\n",
        b"INFO web",
        b"1: serve",
        b"d /index",
        b".html to",
        b" a clien",
        b"t at por",
        b"t 44321\n",
    ];
    let mut state = mix(seed) | 1;
    let mut bits = 0;
    for (place, word) in out.chunks_exact_mut(8).enumerate() {
        if place % 16 == 0 {
            bits = next(&mut state);
        }
        word.copy_from_slice(WORDS[(bits & 15) as usize]);
        bits >>= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_page_and_another_seed_another() {
        for content in [Content::Random, Content::Text, Content::Mixed { random_percent: 40 }] {
            let [mut a, mut b, mut c] = [Page([1; PAGE_SIZE]), Page([2; PAGE_SIZE]), Page([3; PAGE_SIZE])];
            content.write(7, &mut a);
            content.write(7, &mut b);
            content.write(8, &mut c);
            assert!(a.0 == b.0 && a.0 != c.0, "{content:?}");
        }
    }

    #[test]
    fn a_word_changes_one_word_and_zero_is_zero() {
        let mut page = Page([9; PAGE_SIZE]);
        Content::Word.write(1234, &mut page);
        assert_eq!(page.0.chunks(8).filter(|w| **w != [9; 8]).count(), 1);
        Content::Zero.write(1, &mut page);
        assert!(page.0.iter().all(|&b| b == 0));
    }

    #[test]
    fn the_random_part_is_as_large_as_asked() {
        let mut page = Page::ZERO;
        Content::Mixed { random_percent: 25 }.write(5, &mut page);
        assert!(page.0[PAGE_SIZE / 4..].is_ascii());
        assert!(!page.0[..PAGE_SIZE / 4].is_ascii());
    }
}
