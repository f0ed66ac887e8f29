//! What the target keeps of a VM that was there before, told by the target and looked up by the source.
//!
//! Both sides bound it by the VM's shape: 8 bytes a page at most, in messages of one share. What is told is a
//! hint. A page counts as known only once the target has copied and verified it (I7).

use crate::{
    conn::{Conn, Speaker, invalid},
    ports::KeptCopy,
    queue::SHARE,
};
use page::{NOTHING_KEPT, Tagger, is_zero};
use proto::{Shape, control};
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Condvar, Mutex, Weak},
    thread,
    time::Duration,
};
use units::{BlockId, Locked, PAGE_SIZE, PageIndex, PageRange};

/// How long a stream waits for the next word of what is kept. A share takes 2 ms to be tagged; a target that
/// takes this long is not worth waiting for, and pages travel as they would without it.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is told may be so far on its way: the pings go over the same connection, and 64 KiB take 50 ms at 10
/// Mbit/s. They stand for 32 MiB of memory.
const ON_THE_WAY: u64 = 64 << 10;

/// After so many shares in which nothing is to be told, it is told that they were looked at: zeros are read
/// at 2 GiB/s at least, so a source hears of them eight times a second and does not lose its patience.
const UNTOLD: u32 = 64;

/// How often it is looked whether there is less; there is no event for it.
const LOOK: Duration = Duration::from_millis(1);

/// Tells the source what is kept, for as long as somebody keeps it and the connection lives.
pub(crate) fn tell(
    kept: &Weak<dyn KeptCopy>,
    shape: &Shape,
    tagger: &Tagger,
    control: &Conn,
    speaker: &Speaker,
) {
    let say = |message| {
        while control.queue()?.unconfirmed > ON_THE_WAY {
            thread::sleep(LOOK);
        }
        speaker.say(control::Kind::Kept(message)).map(drop)
    };
    if let Err(e) = tell_all(kept, shape, tagger, say) {
        tracing::debug!(%e, "not all that is kept was told");
    }
}

/// The same, by way of `say`. What cannot be read is not told.
fn tell_all(
    kept: &Weak<dyn KeptCopy>,
    shape: &Shape,
    tagger: &Tagger,
    mut say: impl FnMut(control::Kept) -> io::Result<()>,
) -> io::Result<()> {
    let mut content = vec![0; SHARE as usize * PAGE_SIZE];
    let mut untold = 0;
    for (id, pages) in (0..).map(BlockId).zip(&shape.0) {
        let mut at = PageIndex(0);
        loop {
            let Some(kept) = kept.upgrade() else { return Ok(()) };
            let Ok(Some(first)) = kept.first_present(id, at) else { break };
            let start = PageIndex(first.0 / SHARE * SHARE);
            let share = PageRange::new(start, SHARE.min(pages - start.0));
            at = share.end();
            let content = &mut content[..share.bytes().0 as usize];
            if kept.read(id, share, content).is_err() {
                break;
            }
            drop(kept);
            let tag = |page: &[u8]| if is_zero(page) { NOTHING_KEPT } else { tagger.short(page) };
            let mut tags: Vec<u64> = content.chunks(PAGE_SIZE).map(tag).collect();
            let told = tags.iter().rposition(|tag| *tag != NOTHING_KEPT).map_or(0, |last| last + 1);
            untold = if told > 0 { 0 } else { untold + 1 };
            if told > 0 || untold % UNTOLD == 0 {
                tags.truncate(told.max(1));
                say(control::Kept { block: id.0.into(), start: start.0, tags, end: false })?;
            }
        }
    }
    say(control::Kept { end: true, ..Default::default() })
}

/// What the source was told.
#[derive(Debug)]
pub(crate) struct KeptTable {
    shape: Shape,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    shares: HashMap<(BlockId, u64), Arc<[u64]>>,
    /// Of everything before this page of this block, all was told.
    told: (u16, u64),
    /// All was told.
    complete: bool,
    /// Nothing of it may be named any more.
    closed: bool,
}

impl KeptTable {
    /// Nothing was told yet of a VM of this shape.
    pub(crate) fn new(shape: Shape) -> Self {
        Self { shape, inner: Mutex::default(), changed: Condvar::new() }
    }

    /// The target's word. An error is one that it must not say.
    pub(crate) fn hear(&self, message: &control::Kept) -> io::Result<()> {
        let mut inner = self.inner.locked();
        if inner.complete {
            return Err(invalid("the target tells more of what it keeps than all"));
        }
        if message.end {
            inner.complete = true;
        } else {
            let block = u16::try_from(message.block).map(BlockId).ok();
            let pages = block.and_then(|block| self.shape.pages(block));
            let (Some(block), Some(pages)) = (block, pages) else {
                return Err(invalid("the target keeps a RAM block that the VM does not have"));
            };
            let start = PageIndex(message.start);
            let range = PageRange::new(start, message.tags.len() as u64);
            if !(1..=SHARE).contains(&range.count) || !start.0.is_multiple_of(SHARE) || !range.fits(pages) {
                return Err(invalid("the target tells what it keeps in other parts than agreed"));
            }
            // Each share once: what is heard is bounded by the VM's shape.
            if (block.0, start.0) < inner.told {
                return Err(invalid("what the target keeps does not follow what it told before"));
            }
            inner.told = (block.0, start.0 + SHARE);
            if !inner.closed {
                inner.shares.insert((block, start.0 / SHARE), message.tags.as_slice().into());
            }
        }
        self.changed.notify_all();
        Ok(())
    }

    /// The same as [`Self::of`] for a share that is asked for only once: it is forgotten.
    pub(crate) fn take(&self, block: BlockId, page: PageIndex) -> Option<Arc<[u64]>> {
        let tags = self.of(block, page)?;
        self.inner.locked().shares.remove(&(block, page.0 / SHARE));
        Some(tags)
    }

    /// The short tags of a share, from its first page on; waits until that share was told of. `None`: nothing
    /// of it is kept, or nobody knows.
    pub(crate) fn of(&self, block: BlockId, page: PageIndex) -> Option<Arc<[u64]>> {
        let share = page.0 / SHARE;
        let mut inner = self.inner.locked();
        loop {
            if inner.closed {
                return None;
            }
            if let Some(tags) = inner.shares.get(&(block, share)) {
                return Some(tags.clone());
            }
            if inner.complete || inner.told > (block.0, share * SHARE) {
                return None;
            }
            let before = inner.told;
            let (later, waited) =
                self.changed.wait_timeout(inner, PATIENCE).unwrap_or_else(std::sync::PoisonError::into_inner);
            inner = later;
            if waited.timed_out() && inner.told == before && !inner.complete {
                tracing::info!("the target does not say what it keeps; pages travel as usual");
                inner.close();
                self.changed.notify_all();
            }
        }
    }

    /// How many tags it holds.
    pub(crate) fn tags(&self) -> usize {
        self.inner.locked().shares.values().map(|tags| tags.len()).sum()
    }

    /// From now on nothing of it is named.
    pub(crate) fn close(&self) {
        self.inner.locked().close();
        self.changed.notify_all();
    }
}

impl Inner {
    fn close(&mut self) {
        self.closed = true;
        self.shares = HashMap::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    const SHAPE: [u64; 2] = [3 * SHARE + 10, 5];

    /// Keeps some pages, each full of its own number.
    struct Copy(Vec<Vec<u64>>);

    impl Copy {
        fn has(&self, block: BlockId, page: u64) -> bool {
            self.0[usize::from(block.0)].contains(&page)
        }
    }

    impl KeptCopy for Copy {
        fn first_present(&self, block: BlockId, from: PageIndex) -> io::Result<Option<PageIndex>> {
            let pages = self.0[usize::from(block.0)].iter().copied();
            Ok(pages.filter(|page| *page >= from.0).min().map(PageIndex))
        }

        fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()> {
            for (page, n) in into.chunks_mut(PAGE_SIZE).zip(range.start.0..) {
                page.fill(if self.has(block, n) { n as u8 } else { 0 });
            }
            Ok(())
        }

        fn release(&self, _: BlockId, _: PageRange) {}
    }

    fn shape() -> Shape {
        Shape(SHAPE.to_vec())
    }

    #[test]
    fn what_is_told_is_what_is_kept() {
        let tagger = Tagger::new([1; 32]);
        // The third share has nothing, and a page of zeros is nothing.
        let copy = Copy(vec![vec![0, 7, SHARE + 3, 3 * SHARE + 9], vec![4]]);
        let has = Copy(copy.0.clone());
        let copy: Arc<dyn KeptCopy> = Arc::new(copy);
        let table = KeptTable::new(shape());
        let mut messages = 0;
        let say = |message: control::Kept| {
            messages += 1;
            table.hear(&message)
        };
        tell_all(&Arc::downgrade(&copy), &shape(), &tagger, say).unwrap();
        assert_eq!(messages, 5);
        for (id, pages) in (0..).map(BlockId).zip(SHAPE) {
            for page in 0..pages {
                let told = table.of(id, PageIndex(page));
                let told = told.and_then(|tags| tags.get((page % SHARE) as usize).copied());
                let is_kept = has.has(id, page) && page as u8 != 0;
                let tag = if is_kept { tagger.short(&[page as u8; PAGE_SIZE]) } else { NOTHING_KEPT };
                assert_eq!(told.unwrap_or(NOTHING_KEPT), tag, "page {page} of block {}", id.0);
            }
        }
        drop(copy);
    }

    /// A page of zeros in each share: there is nothing to be told of a large VM for long.
    struct Zeros;

    const ZEROS: u64 = 5 * UNTOLD as u64 * SHARE;

    impl KeptCopy for Zeros {
        fn first_present(&self, _: BlockId, from: PageIndex) -> io::Result<Option<PageIndex>> {
            Ok(Some(from).filter(|from| from.0 < ZEROS))
        }

        fn read(&self, _: BlockId, _: PageRange, into: &mut [u8]) -> io::Result<()> {
            into.fill(0);
            Ok(())
        }

        fn release(&self, _: BlockId, _: PageRange) {}
    }

    #[test]
    fn a_source_hears_how_far_it_is_where_all_is_zeros() {
        let copy: Arc<dyn KeptCopy> = Arc::new(Zeros);
        let (shape, mut told) = (Shape(vec![ZEROS]), vec![]);
        let table = KeptTable::new(shape.clone());
        let say = |message: control::Kept| {
            told.extend((!message.end).then_some(message.start / SHARE));
            table.hear(&message)
        };
        tell_all(&Arc::downgrade(&copy), &shape, &Tagger::new([1; 32]), say).unwrap();
        assert_eq!(told, [63, 127, 191, 255, 319]);
        assert_eq!(table.of(BlockId(0), PageIndex(ZEROS - 1)).as_deref(), Some(&[NOTHING_KEPT][..]));
    }

    /// Memory that is given back while it is told of.
    struct Abandoned;

    impl KeptCopy for Abandoned {
        fn first_present(&self, block: BlockId, from: PageIndex) -> io::Result<Option<PageIndex>> {
            Ok(Some(from).filter(|from| from.0 < SHAPE[usize::from(block.0)]))
        }

        fn read(&self, _: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()> {
            into.fill(1);
            if range.start.0 < SHARE { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
        }

        fn release(&self, _: BlockId, _: PageRange) {}
    }

    #[test]
    fn who_is_told_of_memory_that_is_gone_does_not_wait_for_more() {
        let copy: Arc<dyn KeptCopy> = Arc::new(Abandoned);
        let table = KeptTable::new(shape());
        tell_all(&Arc::downgrade(&copy), &shape(), &Tagger::new([1; 32]), |m| table.hear(&m)).unwrap();
        let since = Instant::now();
        assert!(table.of(BlockId(0), PageIndex(0)).is_some());
        assert_eq!(table.of(BlockId(0), PageIndex(SHARE)), None);
        assert!(since.elapsed() < PATIENCE / 2);
    }

    #[test]
    fn a_share_that_was_taken_is_not_held_any_longer() {
        let table = KeptTable::new(shape());
        table.hear(&control::Kept { block: 0, start: 0, tags: vec![9; 4], end: false }).unwrap();
        assert_eq!((table.of(BlockId(0), PageIndex(1)).map(|tags| tags.len()), table.tags()), (Some(4), 4));
        assert_eq!((table.take(BlockId(0), PageIndex(1)).map(|tags| tags.len()), table.tags()), (Some(4), 0));
    }

    #[test]
    fn what_must_not_be_told_is_refused() {
        let kept = |block, start, tags: u64| control::Kept {
            block,
            start,
            tags: vec![1; tags as usize],
            end: false,
        };
        let end = || control::Kept { end: true, ..Default::default() };
        let table: [(&[control::Kept], bool); 12] = [
            (&[kept(0, 0, 1), kept(0, SHARE, SHARE), kept(1, 0, 5), end()], true),
            (&[kept(0, 3 * SHARE, 10)], true),
            (&[kept(0, 3 * SHARE, 11)], false),
            (&[kept(2, 0, 1)], false),
            (&[kept(1 << 16, 0, 1)], false),
            (&[kept(0, 1, 1)], false),
            (&[kept(0, 0, 0)], false),
            (&[kept(0, 0, SHARE + 1)], false),
            (&[kept(0, SHARE, 1), kept(0, SHARE, 1)], false),
            (&[kept(1, 0, 1), kept(0, 0, 1)], false),
            (&[kept(0, u64::MAX / SHARE * SHARE, 1)], false),
            (&[end(), end()], false),
        ];
        for (messages, good) in table {
            let table = KeptTable::new(shape());
            let heard: io::Result<()> = messages.iter().try_for_each(|message| table.hear(message));
            assert_eq!(heard.is_ok(), good, "{messages:?}");
        }
    }

    #[test]
    fn who_waits_for_a_share_goes_on_once_it_is_told_or_closed() {
        let kept = |start| control::Kept { block: 0, start, tags: vec![9], end: false };
        for closes in [false, true] {
            let table = KeptTable::new(shape());
            let told = thread::scope(|scope| {
                let waits = scope.spawn(|| table.of(BlockId(0), PageIndex(SHARE + 1)));
                table.hear(&kept(0)).unwrap();
                if closes {
                    table.close()
                } else {
                    table.hear(&kept(SHARE)).unwrap()
                }
                waits.join().unwrap()
            });
            assert_eq!(told.as_deref(), (!closes).then_some(&[9][..]));
        }
    }

    #[test]
    fn a_target_that_tells_nothing_is_not_waited_for_twice() {
        let table = KeptTable::new(shape());
        assert_eq!(table.of(BlockId(0), PageIndex(0)), None);
        let since = Instant::now();
        assert_eq!(table.of(BlockId(0), PageIndex(SHARE)), None);
        assert!(since.elapsed() < PATIENCE / 2);
        table.hear(&control::Kept { block: 0, start: 0, tags: vec![1], end: false }).unwrap();
        assert_eq!(table.of(BlockId(0), PageIndex(0)), None, "too late");
    }
}
