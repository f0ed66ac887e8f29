//! A page as what differs from an older version of it.
//!
//! Pairs of numbers follow one another, each one or two bytes: so many words stay as they are, so many are
//! replaced by the content that follows. A guest that changes a few words of a page, which is what most
//! rewriting is, costs a few bytes at the speed of a comparison; zstd with the old version as its prefix
//! takes 20 times as long for that, and saves only where content moved within the page (`cargo bench -p bench
//! --bench micro delta`).

use units::PAGE_SIZE;

/// Bytes of the length that precedes each page's code.
pub(crate) const LENGTH: usize = 2;

/// What is compared and replaced at once: eight bytes.
const WORD: usize = 8;
const WORDS: usize = PAGE_SIZE / WORD;

/// A code longer than this is not used: what changed that much usually compresses as well as it differs, and
/// need not be verified.
pub(crate) const LONGEST: usize = PAGE_SIZE / 4;

/// Appends what `page` has that `base` has not. False, with `out` as it was, when that is too much.
pub(crate) fn encode(base: &[u8], page: &[u8], out: &mut Vec<u8>) -> bool {
    let (base, _) = base.as_chunks::<WORD>();
    let (page, _) = page.as_chunks::<WORD>();
    let begin = out.len();
    let mut at = 0;
    while at < WORDS {
        let same = alike(&base[at..], &page[at..]);
        if at + same == WORDS {
            break;
        }
        let start = at + same;
        // A single word that stayed the same costs as little as the numbers that would skip it.
        let mut end = start + 1;
        while end < WORDS && (base[end] != page[end] || base.get(end + 1) != page.get(end + 1)) {
            end += 1;
        }
        if out.len() - begin + (end - start) * WORD + 4 > LONGEST {
            out.truncate(begin);
            return false;
        }
        number(same, out);
        number(end - start, out);
        page[start..end].iter().for_each(|word| out.extend_from_slice(word));
        at = end;
    }
    true
}

/// How many words at the beginning are the same.
fn alike(a: &[[u8; WORD]], b: &[[u8; WORD]]) -> usize {
    const STEP: usize = 8;
    let (a8, _) = a.as_chunks::<STEP>();
    let (b8, _) = b.as_chunks::<STEP>();
    let whole = a8.iter().zip(b8).take_while(|(a, b)| a == b).count() * STEP;
    whole + a[whole..].iter().zip(&b[whole..]).take_while(|(a, b)| a == b).count()
}

fn number(n: usize, out: &mut Vec<u8>) {
    if n < 0x80 {
        out.push(n as u8);
    } else {
        out.extend_from_slice(&[n as u8 | 0x80, (n >> 7) as u8]);
    }
}

fn read_number(code: &mut &[u8]) -> Option<usize> {
    let (&low, rest) = code.split_first()?;
    *code = rest;
    if low < 0x80 {
        return Some(usize::from(low));
    }
    let (&high, rest) = code.split_first()?;
    *code = rest;
    Some(usize::from(low & 0x7f) | usize::from(high) << 7)
}

/// Turns `page` from the older version into the newer one. `None` for a code that cannot be right; what
/// `page` holds then is of no use.
pub(crate) fn apply(mut code: &[u8], page: &mut [u8]) -> Option<()> {
    let mut at = 0;
    while !code.is_empty() {
        at += read_number(&mut code)? * WORD;
        let length = read_number(&mut code)? * WORD;
        let (words, rest) = code.split_at_checked(length)?;
        page.get_mut(at..at + length)?.copy_from_slice(words);
        at += length;
        code = rest;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn apply_undoes_encode(changes in prop::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..100)) {
            let base: Vec<u8> = (0..PAGE_SIZE).map(|i| (i / 7) as u8).collect();
            let mut page = base.clone();
            for (at, byte) in changes {
                page[at] = byte;
            }
            let mut code = vec![9];
            let fits = encode(&base, &page, &mut code);
            if fits {
                prop_assert!(code.len() - 1 <= LONGEST);
                let mut back = base;
                prop_assert_eq!(apply(&code[1..], &mut back), Some(()));
                prop_assert!(back == page);
            } else {
                prop_assert_eq!(code, vec![9]);
            }
        }

        #[test]
        fn hostile_codes_are_refused_without_harm(code: Vec<u8>) {
            let mut page = vec![0; PAGE_SIZE];
            let _ = apply(&code, &mut page);
            prop_assert_eq!(page.len(), PAGE_SIZE);
        }
    }

    #[test]
    fn a_counter_costs_little() {
        let base = vec![3; PAGE_SIZE];
        let mut page = base.clone();
        page[1000] = 4;
        let mut code = vec![];
        assert!(encode(&base, &page, &mut code));
        assert_eq!(code.len(), 2 + WORD);
        assert!(!encode(&base, &[5; PAGE_SIZE], &mut code));
    }
}
