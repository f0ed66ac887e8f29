//! Inputs from inputs: the same ones each time, so that a test that fails fails again.

/// Makes new inputs of old ones.
pub struct Mutator(u64);

/// Numbers at which things change.
const EDGES: [u64; 12] =
    [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 52, u64::MAX / 2, u64::MAX];

/// Longer inputs are cut: they take time and show nothing new.
const LONGEST: usize = 64 << 10;

impl Mutator {
    /// One for each name.
    pub fn new(name: &str) -> Self {
        // FNV-1a: any hash that is the same everywhere.
        Self(
            name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
            }) | 1,
        )
    }

    /// Xorshift: quick, and good enough.
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 11) as usize % bound.max(1)
    }

    fn pick<'a>(&mut self, corpus: &'a [Vec<u8>]) -> &'a [u8] {
        corpus.get(self.below(corpus.len())).map_or(&[], Vec::as_slice)
    }

    /// One of `corpus`, changed in a few places.
    pub fn next_input(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut data = self.pick(corpus).to_vec();
        for _ in 0..=self.below(4) {
            self.change(&mut data, corpus);
        }
        data.truncate(LONGEST);
        data
    }

    fn change(&mut self, data: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        let at = self.below(data.len() + 1);
        let length = 1 + self.below(16).min(data.len().saturating_sub(at));
        let end = (at + length).min(data.len());
        match self.below(8) {
            0 => data.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (length % 8)),
            1 => {
                let byte = self.next() as u8;
                data.iter_mut().skip(at).take(1).for_each(|old| *old = byte);
            }
            2 => {
                let edge = EDGES[self.below(EDGES.len())].wrapping_add(self.below(3) as u64).to_le_bytes();
                let width = 1 << self.below(4);
                data.iter_mut().skip(at).zip(&edge[..width]).for_each(|(old, new)| *old = *new);
            }
            3 => drop(data.drain(at..end)),
            4 => data.truncate(at),
            5 => {
                let again = data[at..end].repeat(1 + self.below(8));
                data.splice(at..at, again);
            }
            6 => {
                let other = self.pick(corpus);
                let from = self.below(other.len());
                let piece = &other[from..(from + 1 + self.below(64)).min(other.len())];
                data.splice(at..at, piece.iter().copied());
            }
            _ => {
                let other = self.pick(corpus);
                let from = self.below(other.len());
                data.truncate(at);
                data.extend_from_slice(&other[from..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mutation_finds_what_is_wrong_and_finds_it_again() {
        // Wrong for what no input of the corpus is: the end of one after the beginning of the other, and a
        // number at its edge.
        let corpus = [b"begin:12345678".to_vec(), b"other:\0\0\0\0\0\0\0\0:end".to_vec()];
        let wrong =
            |data: &[u8]| data.starts_with(b"begin:") && data.ends_with(b":end") && data.contains(&0xff);
        let found = || {
            let mut mutator = Mutator::new("test");
            (0..1_000_000).find_map(|_| Some(mutator.next_input(&corpus)).filter(|data| wrong(data)))
        };
        assert!(found().is_some());
        assert_eq!(found(), found());
    }

    #[test]
    fn nothing_is_a_corpus_too() {
        let mut mutator = Mutator::new("nothing");
        for corpus in [vec![], vec![vec![]], vec![vec![1]]] {
            assert!((0..1000).all(|_| mutator.next_input(&corpus).len() <= LONGEST));
        }
    }
}
