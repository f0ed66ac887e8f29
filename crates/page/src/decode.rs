//! The target's side of refining: from messages back to pages, nothing unverified.

use crate::{
    compress::{Codec, Decoder, NotPages},
    delta,
    encode::REFERENCE,
    fingerprint::{TAG, Tagger},
    repeats::Repeats,
    run::{Class, Run},
};
use units::{BlockId, PAGE_SIZE, PageIndex, PageRange};

/// The memory that pages arrive in.
pub trait TargetMemory {
    /// What reading can fail of.
    type Error;

    /// How many pages a block has; `None` for a block that the VM has not.
    fn pages(&self, block: BlockId) -> Option<u64>;

    /// Copies pages out, for which `pages` was asked.
    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> Result<(), Self::Error>;

    /// Copies out what is kept of these pages from when the VM was here before. False where it cannot be had.
    fn read_kept(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> bool;
}

/// A message that no page can be made of. Whoever gets one ends the connection.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Undecodable<E> {
    /// Refers to pages that the VM has not.
    #[error("{count} pages from {start} of RAM block {block} are referred to, which do not exist")]
    Nowhere {
        /// The block.
        block: u16,
        /// The first page.
        start: u64,
        /// How many.
        count: u64,
    },
    /// The content here is not what the source believes it to be (I7).
    #[error("{0} would not be what the source tagged; nothing was taken over")]
    Tag(PageRange),
    /// What is kept here is not what the source takes it for, or is gone. The pages must come another way.
    #[error("{0} is not kept here as the source believes; nothing was taken over")]
    NotKept(PageRange),
    /// The bytes are none of this version's.
    #[error("{0}: the message cannot be read")]
    Malformed(PageRange),
    /// References were not agreed on.
    #[error("content is referred to, but no key for its tags was agreed on")]
    NoKey,
    /// What was compressed.
    #[error(transparent)]
    Compressed(#[from] NotPages),
    /// This side's memory cannot be read.
    #[error("cannot read this VM's memory")]
    Read(E),
}

/// Makes pages of messages; one for each stream. Holds memory for two batches.
pub struct PageDecoder {
    tagger: Option<Tagger>,
    decoder: Decoder,
    unpacked: Vec<u8>,
    taken: usize,
    scratch: Vec<u8>,
    /// What was verified here, by its tag.
    repeats: Repeats,
    capacity: usize,
}

impl PageDecoder {
    /// For batches of at most `capacity` bytes of pages. Without a tagger nothing may refer to memory here.
    pub fn new(tagger: Option<Tagger>, capacity: usize) -> Self {
        let (decoder, repeats) = (Decoder::default(), Repeats::default());
        Self { tagger, decoder, unpacked: vec![], taken: 0, scratch: vec![], repeats, capacity }
    }

    /// Begins a batch: unpacks what its compressed runs share. `raw`: how many bytes of pages these are.
    pub fn begin(&mut self, codec: Option<Codec>, compressed: &[u8], raw: usize) -> Result<(), NotPages> {
        self.taken = 0;
        if raw > self.capacity {
            return Err(NotPages { pages: raw / PAGE_SIZE });
        }
        // Not shrunk, so that it is not cleared anew for each batch.
        if self.unpacked.len() < raw {
            self.unpacked.resize(raw, 0);
        }
        match codec {
            Some(codec) => self.decoder.decode(codec, compressed, &mut self.unpacked[..raw]),
            None if raw == 0 => Ok(()),
            None => Err(NotPages { pages: raw / PAGE_SIZE }),
        }
    }

    /// The content of a run, in the order of the batch; `own` are the bytes that travelled for it alone.
    /// `None`: zeros.
    pub fn decode<'a, M: TargetMemory>(
        &'a mut self,
        block: BlockId,
        run: &Run,
        own: &'a [u8],
        memory: &M,
    ) -> Result<Option<&'a [u8]>, Undecodable<M::Error>> {
        let malformed = || Undecodable::Malformed(run.range);
        if !run.is_sound() || own.len() != run.payload() {
            return Err(malformed());
        }
        match run.class {
            Class::Zero => Ok(None),
            Class::Raw => Ok(Some(own)),
            Class::Compressed => {
                let begin = self.taken;
                self.taken += run.raw();
                self.unpacked.get(begin..self.taken).map(Some).ok_or_else(malformed)
            }
            Class::Kept => {
                let tag = own.first_chunk::<TAG>().ok_or_else(malformed)?;
                let length = self.reach(block, run.range, memory)?;
                self.scratch.resize(length, 0);
                let tagger = self.tagger.as_ref().ok_or(Undecodable::NoKey)?;
                let there = memory.read_kept(block, run.range, &mut self.scratch);
                // I7: it was never verified that this is what was tagged when the source was told of it.
                if !there || tagger.tag_of_run(&self.scratch) != *tag {
                    return Err(Undecodable::NotKept(run.range));
                }
                Ok(Some(&self.scratch))
            }
            Class::Duplicate => {
                let (reference, tag) = own.split_first_chunk::<REFERENCE>().ok_or_else(malformed)?;
                let (from, first) = reference.split_first_chunk::<2>().ok_or_else(malformed)?;
                let first = first.first_chunk::<8>().ok_or_else(malformed)?;
                let from = BlockId(u16::from_le_bytes(*from));
                let range = PageRange::new(PageIndex(u64::from_le_bytes(*first)), run.range.count);
                let tag = tag.first_chunk::<TAG>().ok_or_else(malformed)?;
                let length = self.reach(from, range, memory)?;
                // The same tag, the same content, and that was verified.
                let key = u128::from_le_bytes(*tag);
                if self.repeats.get(key).is_some_and(|(content, _)| content.len() == length) {
                    return Ok(self.repeats.get(key).map(|(content, _)| content));
                }
                self.read(from, range, memory)?;
                self.verify(run, tag)?;
                self.repeats.came(key, &self.scratch, tag);
                Ok(Some(&self.scratch))
            }
            Class::Delta => {
                let (tag, mut rest) = own.split_first_chunk::<TAG>().ok_or_else(malformed)?;
                self.read(block, run.range, memory)?;
                for page in self.scratch.chunks_exact_mut(PAGE_SIZE) {
                    let (length, after) = rest.split_first_chunk().ok_or_else(malformed)?;
                    let length = usize::from(u16::from_le_bytes(*length));
                    let (code, after) = after.split_at_checked(length).ok_or_else(malformed)?;
                    delta::apply(code, page).ok_or_else(malformed)?;
                    rest = after;
                }
                if !rest.is_empty() {
                    return Err(malformed());
                }
                self.verify(run, tag)?;
                Ok(Some(&self.scratch))
            }
        }
    }

    /// Whether pages can be referred to; how many bytes they are.
    fn reach<M: TargetMemory>(
        &self,
        block: BlockId,
        range: PageRange,
        memory: &M,
    ) -> Result<usize, Undecodable<M::Error>> {
        if self.tagger.is_none() {
            return Err(Undecodable::NoKey);
        }
        let length = range.count as usize * PAGE_SIZE;
        if !memory.pages(block).is_some_and(|pages| range.fits(pages)) || length > self.capacity {
            let (start, count) = (range.start.0, range.count);
            return Err(Undecodable::Nowhere { block: block.0, start, count });
        }
        Ok(length)
    }

    fn read<M: TargetMemory>(
        &mut self,
        block: BlockId,
        range: PageRange,
        memory: &M,
    ) -> Result<(), Undecodable<M::Error>> {
        let length = self.reach(block, range, memory)?;
        self.scratch.resize(length, 0);
        memory.read(block, range, &mut self.scratch).map_err(Undecodable::Read)
    }

    /// Whether what was made of this side's memory is what the source meant (I7).
    fn verify<E>(&self, run: &Run, tag: &[u8; TAG]) -> Result<(), Undecodable<E>> {
        let tagger = self.tagger.as_ref().ok_or(Undecodable::NoKey)?;
        if tagger.holds(&self.scratch, tag) { Ok(()) } else { Err(Undecodable::Tag(run.range)) }
    }
}
