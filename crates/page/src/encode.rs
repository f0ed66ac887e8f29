//! For each page the cheapest message that is true.

use crate::{
    Sent,
    compress::{Codec, Encoder},
    delta,
    fingerprint::{Fingerprint, TAG, is_zero},
    kept::Kept,
    repeats::Repeats,
    run::{Class, Run},
};
use std::ops::Range;
use units::{BlockId, PAGE_SIZE, PageIndex, PageRange};

/// Bytes that travel for a run of known pages: where they are, and their tag.
pub const PAYLOAD_OF_DUPLICATE: usize = REFERENCE + TAG;

/// Bytes of a reference: a block and its first page.
pub(crate) const REFERENCE: usize = 2 + 8;

/// Compression that saves less than one part in so many is undone: decompressing would cost the target more
/// than it saves the link.
const WORTH: usize = 16;

/// How many pages travelled as what.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counts {
    /// Full of zeros.
    pub zero: u64,
    /// The same as what was sent of them before: nothing travelled.
    pub unchanged: u64,
    /// As what the target keeps from before.
    pub kept: u64,
    /// As a reference to other pages.
    pub duplicate: u64,
    /// As a difference.
    pub delta: u64,
    /// Compressed.
    pub compressed: u64,
    /// As they are.
    pub raw: u64,
}

/// What may be referred to. Nothing may while the guest runs on the target: it writes there.
pub struct References<'a, F> {
    /// What was sent over this connection.
    pub sent: &'a Sent,
    /// The round, from 1 on.
    pub round: u32,
    /// Whether the latest version of a page is at the target before what is added now: sent earlier by this
    /// very stream, or in an earlier round and not again in this one.
    pub may_refer: F,
}

/// What compressing a batch came to.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Compressed {
    /// Bytes of content that were tried.
    pub raw: usize,
    /// What they shrank to.
    pub wire: usize,
    /// Whether they travel like that.
    pub used: bool,
}

/// Pages on their way to the wire: read, encoded, compressed, and handed out to whoever owns the socket.
#[derive(Default)]
pub struct Batch {
    /// The pages as they were read, those that do not travel included.
    pages: Vec<u8>,
    filled: usize,
    pieces: Vec<Piece>,
    runs: Vec<Run>,
    /// References and differences; of what is kept the tags of its pages, until `tag` makes one of them.
    side: Vec<u8>,
    compressed: Vec<u8>,
    codec: Option<Codec>,
    counts: Counts,
    /// What need not travel, because it has not changed.
    unchanged: Vec<PageRange>,
    /// Where the run of known pages goes on if the next page is known too.
    next: Option<(BlockId, PageIndex)>,
    /// Of what is tagged, batch after batch.
    repeats: Repeats,
}

/// A run and where what belongs to it is.
struct Piece {
    run: Run,
    /// Where its content begins in `pages`.
    at: usize,
    side: Range<usize>,
    /// For known pages: from their fingerprints, to find their content again.
    key: u128,
}

impl Batch {
    /// Room for so many bytes of pages.
    pub fn new(capacity: usize) -> Self {
        Self { pages: vec![0; capacity], ..Self::default() }
    }

    /// How many pages still fit.
    pub fn room(&self) -> u64 {
        ((self.pages.len() - self.filled) / PAGE_SIZE) as u64
    }

    /// Takes pages in, for which there is room; `read` fills in their content. With `references`, what the
    /// target has already does not travel, or travels as a reference or a difference; with `kept`, what it
    /// keeps from before travels as a tag. All pages of a batch are of one block.
    pub fn add<E, F: Fn(BlockId, PageIndex) -> bool>(
        &mut self,
        block: BlockId,
        range: PageRange,
        references: Option<&References<'_, F>>,
        kept: Option<Kept<'_>>,
        read: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = self.filled;
        let end = start + range.count as usize * PAGE_SIZE;
        // Out of `self` for as long as the rest of it changes.
        let mut pages = std::mem::take(&mut self.pages);
        let result = read(&mut pages[start..end]);
        if result.is_ok() {
            self.filled = end;
            match references {
                Some(references) => self.refer(block, range.start, &pages[..end], start, references, kept),
                None => self.look(range.start, &pages[..end], start, kept),
            }
        }
        self.pages = pages;
        result
    }

    /// Zeros or not, and kept or not: all that is asked while the guest runs on the target. It does not write
    /// to what is kept.
    fn look(&mut self, start: PageIndex, pages: &[u8], from: usize, kept: Option<Kept<'_>>) {
        for (index, at) in (start.0..).zip((from..pages.len()).step_by(PAGE_SIZE)) {
            let page = &pages[at..at + PAGE_SIZE];
            if is_zero(page) {
                self.counts.zero += 1;
                self.push(PageIndex(index), Class::Zero, at);
            } else if let Some(tag) = kept.and_then(|kept| kept.find(PageIndex(index), page)) {
                self.push_kept(PageIndex(index), at, &tag);
            } else {
                self.counts.raw += 1;
                self.push(PageIndex(index), Class::Raw, at);
            }
        }
    }

    fn refer<F: Fn(BlockId, PageIndex) -> bool>(
        &mut self,
        block: BlockId,
        start: PageIndex,
        pages: &[u8],
        from: usize,
        references: &References<'_, F>,
        kept: Option<Kept<'_>>,
    ) {
        let References { sent, round, may_refer } = references;
        let all = start..PageIndex(start.0 + ((pages.len() - from) / PAGE_SIZE) as u64);
        for (index, at) in (start.0..).zip((from..pages.len()).step_by(PAGE_SIZE)) {
            let (index, page) = (PageIndex(index), &pages[at..at + PAGE_SIZE]);
            let number = sent.number(block, index);
            let last = sent.last(block, index);
            let fingerprint = if is_zero(page) { Fingerprint::ZERO } else { sent.fingerprint(page) };
            let expected = self.next.take();
            if fingerprint == last {
                match fingerprint {
                    Fingerprint::ZERO => self.counts.zero += 1,
                    _ => self.counts.unchanged += 1,
                }
                match self.unchanged.last_mut() {
                    Some(run) if run.end() == index => run.count += 1,
                    _ => self.unchanged.push(PageRange::new(index, 1)),
                }
                continue;
            }
            if fingerprint == Fingerprint::ZERO {
                self.counts.zero += 1;
                sent.versions.forget(number);
                sent.set(block, index, fingerprint);
                self.push(index, Class::Zero, at);
                continue;
            }
            if let Some(tag) = kept.and_then(|kept| kept.find(index, page)) {
                self.push_kept(index, at, &tag);
                sent.versions.forget(number);
                sent.offer(number, fingerprint);
                sent.set(block, index, fingerprint);
                continue;
            }
            // Of what is added now, the pages before this one go before it, too.
            let may_refer = |b, p: PageIndex| match b == block && all.contains(&p) {
                true => p < index,
                false => may_refer(b, p),
            };
            let goes_on = expected.filter(|(b, p)| {
                self.goes_on(block, index, at, *b, *p) && sent.has(*b, *p, fingerprint) && may_refer(*b, *p)
            });
            let duplicate = goes_on.or_else(|| sent.find(fingerprint, may_refer));
            let mut used = false;
            if let Some((from, first)) = duplicate {
                self.counts.duplicate += 1;
                if goes_on.is_none() {
                    let begin = self.side.len();
                    self.side.extend_from_slice(&from.0.to_le_bytes());
                    self.side.extend_from_slice(&first.0.to_le_bytes());
                    self.side.extend_from_slice(&[0; TAG]);
                    self.begin(index, Class::Duplicate, at, begin..self.side.len());
                } else {
                    self.push(index, Class::Duplicate, at);
                }
                if let Some(piece) = self.pieces.last_mut() {
                    piece.key = piece.key.rotate_left(1) ^ fingerprint.0;
                }
                self.next = Some((from, PageIndex(first.0 + 1)));
            } else {
                used = *round > 1 && self.differ(index, at, |side| sent.versions.delta(number, page, side));
                if !used {
                    self.counts.raw += 1;
                    self.push(index, Class::Raw, at);
                }
                sent.offer(number, fingerprint);
            }
            sent.set(block, index, fingerprint);
            // Most of what was sent once is never written again; what was written between two rounds may well
            // be.
            if *round > 1 {
                sent.versions.keep(number, page, *round, used);
            }
        }
    }

    /// Whether the run of known pages that ends before this page can go on with a reference to page `p` of
    /// block `b`. Not when that is a page of the run itself: all that a run refers to is read before anything
    /// of it is written.
    fn goes_on(&self, block: BlockId, index: PageIndex, at: usize, b: BlockId, p: PageIndex) -> bool {
        let Some(Piece { run, .. }) = self.pieces.last() else { return false };
        self.grows(index, Class::Duplicate, at) && (b != block || p < run.range.start || p > index)
    }

    /// Sends a page as a difference, if `encode` finds one that is short enough.
    fn differ(&mut self, index: PageIndex, at: usize, encode: impl FnOnce(&mut Vec<u8>) -> bool) -> bool {
        let begin = self.side.len();
        let grows = self.grows(index, Class::Delta, at);
        if !grows {
            self.side.extend_from_slice(&[0; TAG]);
        }
        let length = self.side.len();
        self.side.extend_from_slice(&[0; delta::LENGTH]);
        if !encode(&mut self.side) {
            self.side.truncate(begin);
            return false;
        }
        let end = self.side.len();
        let code = (end - length - delta::LENGTH) as u16;
        self.side[length..length + delta::LENGTH].copy_from_slice(&code.to_le_bytes());
        self.counts.delta += 1;
        if grows {
            self.push(index, Class::Delta, at);
            if let Some(piece) = self.pieces.last_mut() {
                piece.side.end = end;
            }
        } else {
            self.begin(index, Class::Delta, at, begin..end);
        }
        true
    }

    /// A page that has this tag, and that the target keeps.
    fn push_kept(&mut self, index: PageIndex, at: usize, tag: &[u8; TAG]) {
        self.counts.kept += 1;
        let begin = self.side.len();
        self.side.extend_from_slice(tag);
        let end = self.side.len();
        if self.grows(index, Class::Kept, at) {
            self.push(index, Class::Kept, at);
            if let Some(piece) = self.pieces.last_mut() {
                piece.side.end = end;
            }
        } else {
            self.begin(index, Class::Kept, at, begin..end);
        }
    }

    fn grows(&self, index: PageIndex, class: Class, at: usize) -> bool {
        self.pieces.last().is_some_and(|Piece { run, at: from, .. }| {
            run.class == class && run.range.end() == index && from + run.raw() == at
        })
    }

    /// Lets the last run go on with this page if it can, and begins a new one if not.
    fn push(&mut self, index: PageIndex, class: Class, at: usize) {
        if self.grows(index, class, at) {
            if let Some(piece) = self.pieces.last_mut() {
                piece.run.range.count += 1;
            }
        } else {
            self.begin(index, class, at, 0..0);
        }
    }

    fn begin(&mut self, index: PageIndex, class: Class, at: usize, side: Range<usize>) {
        self.pieces.push(Piece { run: Run::new(PageRange::new(index, 1), class), at, side, key: 0 });
    }

    /// Seals what refers to the target's own memory; nothing can be added after that.
    pub fn tag(&mut self, sent: &Sent) {
        for Piece { run, at, side, key } in &mut self.pieces {
            let content = &self.pages[*at..*at + run.raw()];
            let (place, tag) = match run.class {
                Class::Kept => {
                    let tag = sent.tagger.tag(&self.side[side.clone()]);
                    side.end = side.start + TAG;
                    (side.clone(), tag)
                }
                Class::Duplicate => {
                    // Compared byte by byte: fingerprints alone do not make two contents the same (I7).
                    let sealed = self.repeats.get(*key).filter(|(same, _)| *same == content);
                    let tag = sealed.map(|(_, tag)| *tag).unwrap_or_else(|| {
                        let tag = sent.tagger.tag(content);
                        self.repeats.came(*key, content, &tag);
                        tag
                    });
                    (side.start + REFERENCE..side.end, tag)
                }
                Class::Delta => (side.start..side.start + TAG, sent.tagger.tag(content)),
                Class::Zero | Class::Compressed | Class::Raw => continue,
            };
            self.side[place].copy_from_slice(&tag);
        }
    }

    /// Packs what would travel as it is and is `worth` it, all together. `None` when there is nothing.
    pub fn compress(
        &mut self,
        encoder: &mut Encoder,
        codec: Codec,
        worth: impl Fn(PageRange) -> bool,
    ) -> Option<Compressed> {
        let chosen: Vec<bool> =
            self.pieces.iter().map(|p| p.run.class == Class::Raw && worth(p.run.range)).collect();
        let pieces = self.pieces.iter().zip(&chosen).filter(|(_, chosen)| **chosen).map(|(piece, _)| piece);
        let parts: Vec<&[u8]> = pieces.map(|p| &self.pages[p.at..p.at + p.run.raw()]).collect();
        let raw: usize = parts.iter().map(|part| part.len()).sum();
        if raw == 0 {
            return None;
        }
        encoder.encode(codec, &parts, &mut self.compressed);
        let compressed =
            Compressed { raw, wire: self.compressed.len(), used: self.compressed.len() + raw / WORTH <= raw };
        if !compressed.used {
            self.compressed.clear();
            return Some(compressed);
        }
        self.codec = Some(codec);
        for (piece, _) in self.pieces.iter_mut().zip(&chosen).filter(|(_, chosen)| **chosen) {
            piece.run.class = Class::Compressed;
            self.counts.raw -= piece.run.range.count;
            self.counts.compressed += piece.run.range.count;
        }
        Some(compressed)
    }

    /// The runs as they travel, and how their compressed content is compressed; none when nothing travels.
    pub fn runs(&mut self) -> (&[Run], Option<Codec>, usize) {
        self.runs.clear();
        for Piece { run: Run { range, class, .. }, side, .. } in &self.pieces {
            let mut run = Run::new(*range, *class);
            if *class == Class::Delta {
                run.bytes = side.len() as u32;
            }
            self.runs.push(run);
        }
        (&self.runs, self.codec, self.compressed.len())
    }

    /// What travels behind the table of runs, in order.
    pub fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let own = self.pieces.iter().filter_map(|Piece { run, at, side, .. }| match run.class {
            Class::Zero | Class::Compressed => None,
            Class::Kept | Class::Duplicate | Class::Delta => Some(&self.side[side.clone()]),
            Class::Raw => Some(&self.pages[*at..*at + run.raw()]),
        });
        own.chain((!self.compressed.is_empty()).then_some(&*self.compressed))
    }

    /// The pages that would travel as they are, if they are not compressed.
    pub fn raw_ranges(&self) -> impl Iterator<Item = PageRange> {
        self.pieces.iter().map(|p| p.run).filter(|run| run.class == Class::Raw).map(|run| run.range)
    }

    /// Empties it, for the next pages.
    pub fn clear(&mut self) {
        self.filled = 0;
        self.pieces.clear();
        self.side.clear();
        self.compressed.clear();
        self.codec = None;
        self.next = None;
        self.unchanged.clear();
    }

    /// The pages of this batch that had not changed since they were sent.
    pub fn unchanged(&self) -> &[PageRange] {
        &self.unchanged
    }

    /// How the pages travelled that were added since this was asked last.
    pub fn take_counts(&mut self) -> Counts {
        std::mem::take(&mut self.counts)
    }
}
