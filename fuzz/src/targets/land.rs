use crate::input::Input;
use engine::fuzz::{Guest, land};
use page::{Batch, Codec, Encoder, Kept, NOTHING_KEPT, References, Sent, Tagger};
use ports::{Block, Fault, GuestMemory, KeptCopy, MissingPages, Placed};
use proto::{Frame, write_batch};
use std::{
    cell::RefCell,
    collections::HashSet,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};
use units::{BlockId, MemorySet, PAGE_SIZE, PageIndex, PageRange, PageSet};

/// Pages of each block.
const PAGES: [u64; 2] = [24, 3];

/// Both sides know it.
const KEY: [u8; 32] = [2; 32];

/// A guest's memory, which watches over I5: before the guest may run anything may be overwritten, afterwards
/// only what is missing is put where holes are, and once.
struct Memory {
    blocks: Vec<Block>,
    content: Mutex<Vec<Vec<u8>>>,
    /// What may be placed still; none for a guest that stands.
    lacks: Option<Mutex<MemorySet>>,
    complete: bool,
}

impl Memory {
    fn new(guest: &Guest) -> Self {
        let lacks = match guest {
            Guest::Lacks(missing) => Some(Mutex::new(missing.clone())),
            Guest::Stands | Guest::Complete => None,
        };
        Self {
            blocks: PAGES
                .iter()
                .zip(0..)
                .map(|(pages, n)| Block { name: format!("ram{n}"), pages: *pages })
                .collect(),
            content: Mutex::new(PAGES.iter().map(|pages| vec![0; *pages as usize * PAGE_SIZE]).collect()),
            lacks,
            complete: matches!(guest, Guest::Complete),
        }
    }

    fn with<T>(&self, block: BlockId, range: PageRange, body: impl FnOnce(&mut [u8]) -> T) -> T {
        assert!(range.fits(PAGES[usize::from(block.0)]), "{range} of block {}", block.0);
        let (start, length) = (range.start.offset() as usize, range.bytes().0 as usize);
        body(&mut self.content.lock().unwrap()[usize::from(block.0)][start..start + length])
    }

    fn lands(&self, block: BlockId, range: PageRange) {
        assert!(!self.complete, "I5: pages for a guest that has all its memory");
        let Some(lacks) = &self.lacks else { panic!("pages are placed for a guest that stands") };
        let mut lacks = lacks.lock().unwrap();
        for page in range.pieces(1) {
            assert!(lacks.block_mut(block).remove(page.start), "I5: page {} is not missing", page.start.0);
        }
    }

    fn is_overwritten(&self) {
        assert!(self.lacks.is_none() && !self.complete, "I5: memory of a guest that may run is written over");
    }
}

impl GuestMemory for Memory {
    fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    fn present(&self, block: BlockId) -> io::Result<PageSet> {
        Ok(PageSet::full(PAGES[usize::from(block.0)]))
    }

    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        self.with(block, range, |memory| into.copy_from_slice(memory));
        Ok(())
    }

    fn write(&self, block: BlockId, range: PageRange, from: &[u8]) -> io::Result<()> {
        self.is_overwritten();
        self.with(block, range, |memory| memory.copy_from_slice(from));
        Ok(())
    }

    fn discard(&self, block: BlockId, range: PageRange) -> io::Result<()> {
        self.is_overwritten();
        self.with(block, range, |memory| memory.fill(0));
        Ok(())
    }
}

impl MissingPages for Memory {
    fn next(&self, _: Duration) -> io::Result<Option<Fault>> {
        Ok(None)
    }

    fn place(&self, block: BlockId, range: PageRange, from: &[u8]) -> io::Result<u64> {
        self.lands(block, range);
        self.with(block, range, |memory| memory.copy_from_slice(from));
        Ok(range.count)
    }

    fn place_zero(&self, Fault { block, page }: Fault) -> io::Result<Placed> {
        self.lands(block, PageRange::new(page, 1));
        Ok(Placed::Now)
    }

    fn finish(&self) -> io::Result<()> {
        Ok(())
    }
}

/// What is kept from before: in each block, pages whose content is that of this kind.
struct Copy;

const KEPT: [(u16, u64, u8); 4] = [(0, 1, 3), (0, 2, 5), (0, 9, 7), (1, 1, 6)];

fn kept(block: BlockId, page: PageIndex) -> Option<u8> {
    KEPT.iter().find(|(b, p, _)| (*b, *p) == (block.0, page.0)).map(|(_, _, kind)| *kind)
}

impl KeptCopy for Copy {
    fn first_present(&self, block: BlockId, from: PageIndex) -> io::Result<Option<PageIndex>> {
        Ok(Some(from).filter(|from| from.0 < PAGES[usize::from(block.0)]))
    }

    fn read(&self, block: BlockId, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        assert!(range.fits(PAGES[usize::from(block.0)]), "{range} of block {}", block.0);
        for (page, into) in range.pieces(1).zip(into.chunks_mut(PAGE_SIZE)) {
            into.copy_from_slice(&content(kept(block, page.start).unwrap_or(0)));
        }
        Ok(())
    }

    fn release(&self, block: BlockId, range: PageRange) {
        assert!(range.fits(PAGES[usize::from(block.0)]), "{range} of block {}", block.0);
    }
}

/// A byte for the guest and what was agreed, one for what it lacks, then a data connection.
pub(crate) fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let (mode, outdated) = (input.u8(), input.u8());
    let guest = match mode & 3 {
        0 | 1 => Guest::Stands,
        2 => {
            let mut missing = MemorySet::empty(PAGES);
            for (block, pages) in PAGES.into_iter().enumerate() {
                // All of them, each second, each third …
                for page in (0..pages).step_by(1 + usize::from(outdated % 4)) {
                    missing.block_mut(BlockId(block as u16)).insert(PageIndex(page));
                }
            }
            Guest::Lacks(missing)
        }
        _ => Guest::Complete,
    };
    let (key, post_copy) = ((mode & 4 == 0).then_some(KEY), mode & 8 == 0);
    let memory = Arc::new(Memory::new(&guest));
    let missing = post_copy.then(|| memory.clone() as Arc<dyn MissingPages>);
    let kept = (mode & 16 != 0).then(|| Arc::new(Copy) as Arc<dyn KeptCopy>);
    let (end, missing) = land(memory.clone(), missing, kept, key, guest, input.rest());
    if let Some(lacks) = &memory.lacks {
        assert_eq!(
            *lacks.lock().unwrap(),
            missing,
            "I2: a page that is not there is missing, one that is there is not"
        );
    }
    end.kind() == io::ErrorKind::UnexpectedEof
}

/// What some pages hold: little that compresses, because seeds are to be small.
fn content(kind: u8) -> Vec<u8> {
    match kind {
        0 => vec![0; PAGE_SIZE],
        kind => (0..PAGE_SIZE).map(|at| kind.wrapping_mul((at / 64) as u8)).collect(),
    }
}

/// What the guest writes: in which block, to which page, which content, and which of its bytes is another.
type Write = (usize, u64, u8, Option<usize>);

/// The batches of some rounds, as a source sends them, which may know what is kept.
fn sent(codec: Option<Codec>, refers: bool, knows: bool) -> Vec<u8> {
    let guest = RefCell::new(PAGES.map(|pages| vec![0; pages as usize * PAGE_SIZE]));
    let sent = Sent::new(&PAGES, PAGES[0], &[1; 32], Tagger::new(KEY));
    let (mut batch, mut encoder, mut out) = (Batch::new(8 * PAGE_SIZE), Encoder::default(), vec![]);
    // Content; the same and other content elsewhere; a word of it changed, twice; zeros.
    let rounds: [&[Write]; 5] = [
        &[(0, 1, 3, None), (0, 2, 5, None), (0, 9, 7, None)],
        &[(1, 0, 3, None), (1, 1, 5, None), (0, 10, 7, None), (0, 11, 9, None)],
        &[(0, 2, 5, Some(100))],
        &[(0, 2, 5, Some(200))],
        &[(0, 9, 0, None), (0, 10, 0, None)],
    ];
    for (writes, round) in rounds.into_iter().zip(1..) {
        let mut dirty: HashSet<(usize, u64)> = HashSet::new();
        for (block, page, kind, word) in writes {
            let mut new = content(*kind);
            if let Some(word) = word {
                new[*word] ^= 0x55;
            }
            let at = *page as usize * PAGE_SIZE;
            guest.borrow_mut()[*block][at..at + PAGE_SIZE].copy_from_slice(&new);
            dirty.insert((*block, *page));
        }
        sent.turn(round);
        let may_refer = |block: BlockId, page: PageIndex| !dirty.contains(&(usize::from(block.0), page.0));
        let references = References { sent: &sent, round, may_refer };
        for (block, pages) in PAGES.into_iter().enumerate() {
            let id = BlockId(block as u16);
            for page in (0..pages).filter(|page| dirty.contains(&(block, *page))) {
                let range = PageRange::new(PageIndex(page), 1);
                let read = |into: &mut [u8]| -> Result<(), io::Error> {
                    let at = page as usize * PAGE_SIZE;
                    into.copy_from_slice(&guest.borrow()[block][at..at + PAGE_SIZE]);
                    Ok(())
                };
                let kind = kept(id, range.start).filter(|_| knows);
                let tags = [kind.map_or(NOTHING_KEPT, |kind| sent.tagger().short(&content(kind)))];
                let kept = Kept { tagger: sent.tagger(), first: range.start, tags: &tags };
                batch
                    .add(id, range, refers.then_some(&references), Some(kept), read)
                    .expect("memory can be read");
            }
            batch.tag(&sent);
            if let Some(codec) = codec {
                batch.compress(&mut encoder, codec, |_| true);
            }
            let (runs, codec, bytes) = batch.runs();
            if !runs.is_empty() {
                write_batch(id, runs, codec.map(|codec| (codec, bytes)), &mut out);
                batch.parts().for_each(|part| out.extend_from_slice(part));
            }
            batch.clear();
        }
        out.extend_from_slice(&Frame::RoundEnd(round).header());
    }
    out
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let with = |mode: u8, outdated: u8, stream: &[u8]| [&[mode, outdated], stream].concat();
    let mut seeds = vec![with(0, 0, &sent(None, true, false)), with(2, 2, &sent(None, false, false))];
    for codec in [Codec::Lz4, Codec::Zstd(1)] {
        seeds.push(with(0, 0, &sent(Some(codec), true, false)));
        seeds.push(with(2, 0, &sent(Some(codec), false, false)));
        seeds.push(with(2, 1, &sent(Some(codec), false, false)));
        seeds.push(with(0b1100, 0, &sent(Some(codec), false, false)));
    }
    seeds.push(with(16, 0, &sent(None, true, true)));
    seeds.push(with(16 | 2, 0, &sent(Some(Codec::Lz4), false, true)));
    seeds
}
