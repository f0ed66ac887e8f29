use crate::fingerprint::TAG;
use std::collections::{HashMap, HashSet, VecDeque};

/// Bytes of content that one stream keeps on either side: what comes again and again is little, or it would
/// not come again.
const KEPT: usize = 2 << 20;

/// How many keys are remembered that came once.
const ONCE: usize = 1024;

/// Content that came more than once lately, tagged, so that it need not be tagged again: sealing is five
/// times as slow as comparing or copying. Only what comes for the second time is kept.
#[derive(Default)]
pub(crate) struct Repeats {
    once: HashSet<u128>,
    kept: HashMap<u128, (Box<[u8]>, [u8; TAG])>,
    /// The keys of `kept`, oldest first.
    order: VecDeque<u128>,
    bytes: usize,
}

impl Repeats {
    /// The content of this key and its tag, if it is kept.
    pub(crate) fn get(&self, key: u128) -> Option<(&[u8], &[u8; TAG])> {
        self.kept.get(&key).map(|(content, tag)| (&**content, tag))
    }

    /// This content came, and was tagged.
    pub(crate) fn came(&mut self, key: u128, content: &[u8], tag: &[u8; TAG]) {
        if content.len() > KEPT / 2 {
            return;
        }
        if !self.once.remove(&key) {
            if self.once.len() == ONCE {
                self.once.clear();
            }
            self.once.insert(key);
            return;
        }
        while self.bytes + content.len() > KEPT {
            let Some((old, _)) = self.order.pop_front().and_then(|key| self.kept.remove(&key)) else { break };
            self.bytes -= old.len();
        }
        if let Some((old, _)) = self.kept.insert(key, (content.into(), *tag)) {
            self.bytes -= old.len();
        } else {
            self.order.push_back(key);
        }
        self.bytes += content.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use units::PAGE_SIZE;

    #[test]
    fn what_came_twice_is_kept_until_there_is_newer() {
        let mut repeats = Repeats::default();
        let page = |n: u8| [n; PAGE_SIZE];
        repeats.came(1, &page(1), &[1; TAG]);
        assert!(repeats.get(1).is_none(), "once");
        repeats.came(1, &page(1), &[1; TAG]);
        assert_eq!(repeats.get(1).unwrap(), (&page(1)[..], &[1; TAG]));
        for n in 2..KEPT as u128 {
            repeats.came(n, &page(2), &[2; TAG]);
            repeats.came(n, &page(2), &[2; TAG]);
            assert!(repeats.bytes <= KEPT && repeats.bytes == repeats.kept.len() * PAGE_SIZE);
            assert_eq!(repeats.order.len(), repeats.kept.len());
            if repeats.get(1).is_none() {
                assert_eq!(n as usize, KEPT / PAGE_SIZE + 1, "the oldest goes when there is no room");
                return;
            }
        }
        panic!("it was never forgotten");
    }

    #[test]
    fn another_content_of_the_same_key_takes_its_place() {
        let mut repeats = Repeats::default();
        repeats.came(1, &[1; PAGE_SIZE], &[1; TAG]);
        repeats.came(1, &[1; PAGE_SIZE], &[1; TAG]);
        repeats.came(1, &[2; 2 * PAGE_SIZE], &[2; TAG]);
        repeats.came(1, &[2; 2 * PAGE_SIZE], &[2; TAG]);
        assert_eq!(repeats.get(1).unwrap(), (&[2; 2 * PAGE_SIZE][..], &[2; TAG]));
        assert_eq!((repeats.bytes, repeats.order.len()), (2 * PAGE_SIZE, 1));
    }
}
