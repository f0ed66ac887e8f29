use crate::input::Input;
use spool::{
    ALIGN, BlockShape, Content, Extent, ExtentKind, FileName, Header, Index, Reader, Secret, Side, Writer,
    fuzz::{Claims, tagged},
};
use std::{fs, path::PathBuf, sync::LazyLock, time::Duration};
use units::{BlockId, MigrationId, PAGE_SIZE, PageIndex, PageRange};

/// Pages of each block.
const PAGES: [u64; 3] = [100_000, 40, 1];

const SECRET: Secret = Secret([9; 32]);

/// Extents of one file, at most: enough for several versions and gaps, and each is read by way of another
/// thread.
const MOST: usize = 24;

/// Bytes of one file, at most: damage at any place of it is still within a few numbers.
const LONGEST: usize = 1 << 20;

/// In memory, where there is such a place: thousands are written in a second.
static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let shm = PathBuf::from("/dev/shm");
    let dir = if shm.is_dir() { shm } else { std::env::temp_dir() };
    dir.join(format!("whimbrel-fuzz-spool-{}", std::process::id()))
});

fn header() -> Header {
    let blocks =
        PAGES.iter().zip(0..).map(|(pages, n)| BlockShape { name: format!("ram{n}"), pages: *pages });
    Header {
        migration: MigrationId(7),
        side: Side::Source,
        host: "hosta".into(),
        vm: "web1".into(),
        created: 1_700_000_000,
        blocks: blocks.collect(),
    }
}

/// A byte says whether a file follows as it is, or how one is made by somebody who has the key: extents that
/// claim what they like, then damage.
pub(crate) fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    if input.u8().is_multiple_of(2) {
        return any_file(input.rest());
    }
    let begin = header().to_bytes().expect("it is within all bounds");
    let mut made = Made { file: begin.clone(), begin, written: vec![], next: 0, damaged: false };
    let (floor, end) = (u64::from(input.u8()), u64::from(input.u8()));
    while !input.is_empty() && made.written.len() < MOST && made.file.len() < LONGEST {
        made.step(&mut input);
    }
    made.look(floor, floor.max(end))
}

/// A file that may be anything.
fn any_file(bytes: &[u8]) -> bool {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(name) = text.parse::<FileName>()
    {
        assert_eq!(name.to_string().parse(), Ok(name));
    }
    match (Header::parse(bytes), read(bytes)) {
        (Ok((header, length)), Some((reader, index))) => {
            assert_eq!((reader.header(), reader.begin()), (&header, length as u64));
            index.extents().iter().for_each(|extent| drop(reader.content(extent)));
            true
        }
        (Err(_), Some(_)) => panic!("it is read although its header is none"),
        (_, None) => false,
    }
}

fn read(bytes: &[u8]) -> Option<(Reader, Index)> {
    fs::write(&*FILE, bytes).expect("there is room for a file");
    let reader = Reader::open(&FILE, &SECRET).ok()?;
    let index = reader.scan().expect("it can be read");
    Some((reader, index))
}

/// A file in the making.
struct Made {
    begin: Vec<u8>,
    file: Vec<u8>,
    written: Vec<Written>,
    next: u64,
    damaged: bool,
}

/// What was written, and what it is to be read as; none: as nothing at all.
struct Written {
    claims: Claims,
    content: Option<Content>,
}

impl Made {
    fn step(&mut self, input: &mut Input<'_>) {
        let step = input.u8();
        self.damaged |= step % 8 > 4;
        let length = self.file.len();
        let place = |input: &mut Input<'_>| (usize::from(input.u16()) * 16).min(length);
        match step % 8 {
            // What a writer writes.
            0..=3 => self.append(input, false),
            // What only the other agent's keeper could.
            4 => self.append(input, true),
            // Torn, overwritten, or not there any more.
            5 => {
                let (at, count, with) = (place(input), usize::from(input.u8()), input.u8());
                self.file[at..(at + count).min(length)].fill(with);
            }
            6 => {
                let at = place(input).max(self.begin.len());
                self.file.truncate(at);
            }
            // A hole, or a part of the file once more.
            _ if step >= 128 => self.file.resize(length + place(input), 0),
            _ => {
                let (at, count) = (place(input), place(input));
                self.file.extend_from_within(at..(at + count).min(length));
                self.file.resize(self.file.len().next_multiple_of(ALIGN as usize), 0);
            }
        }
    }

    fn append(&mut self, input: &mut Input<'_>, lies: bool) {
        let kind = input.one_of(&[
            ExtentKind::Raw,
            ExtentKind::Zero,
            ExtentKind::Lz4,
            ExtentKind::Here,
            ExtentKind::Complete,
        ]);
        let (block, start, seed) = (u16::from(input.u8()) % 3, u64::from(input.u16()), input.u8());
        let start = start % PAGES[usize::from(block)];
        let most = if matches!(kind, ExtentKind::Zero | ExtentKind::Here) { 70_000 } else { 4 };
        let count = (u64::from(input.u16()) % most + 1).min(PAGES[usize::from(block)] - start);
        let raw = seed.wrapping_add(1);
        let raw = vec![raw; if most == 4 { count as usize * PAGE_SIZE } else { 0 }];
        let stored = match kind {
            ExtentKind::Raw => raw.clone(),
            ExtentKind::Lz4 => page::compress(&raw),
            _ => vec![],
        };
        let offset = self.file.len() as u64;
        let count = if kind == ExtentKind::Complete { 0 } else { count as u32 };
        let sequence = self.next;
        let mut claims = Claims { sequence, offset, kind, block, start, count, length: stored.len() as u32 };
        let mut stored = stored;
        if lies {
            self.damaged = true;
            match input.u8() % 7 {
                0 => claims.sequence = u64::from(input.u8()),
                1 => claims.offset = u64::from(input.u16()),
                2 => claims.block = input.u16(),
                3 => claims.start = u64::MAX - u64::from(input.u16()),
                4 => claims.count = u32::MAX - u32::from(input.u16()),
                5 => claims.length = u32::from(input.u16()) << 8,
                _ => {
                    let length = usize::from(input.u8());
                    stored = input.bytes(length).to_vec();
                    claims.length = stored.len() as u32;
                }
            }
        }
        self.next = self.next.max(claims.sequence) + 1;
        self.file.extend(tagged(&self.begin, &SECRET, &claims, &stored));
        self.file.resize(self.file.len().next_multiple_of(ALIGN as usize), 0);
        let content = match kind {
            ExtentKind::Raw | ExtentKind::Lz4 => Content::Pages(raw),
            _ => Content::Nothing,
        };
        self.written.push(Written { claims, content: (!lies).then_some(content) });
    }

    /// Reads it as both hosts would. Says whether all that was written is there.
    fn look(&self, floor: u64, end: u64) -> bool {
        let Some((reader, index)) = read(&self.file) else {
            assert!(self.damaged, "it is not read");
            return false;
        };
        for extent in index.extents() {
            self.is_as_written(&reader, extent);
        }
        // I5: of a page's versions the newest counts.
        for probe in [0, 1, 39, 1023, 1024, 65_535, 99_999].map(PageIndex) {
            for block in [0, 1, 2].map(BlockId) {
                let has = |e: &&Extent| e.block == block && e.pages.start <= probe && probe < e.pages.end();
                let newest = index.extents().iter().filter(has).map(|e| e.sequence).max();
                assert_eq!(index.newest(block, probe).map(|e| e.sequence), newest, "I5");
            }
        }
        let from = index.whole_from(floor, end);
        let there = |n: u64| index.extents().iter().any(|e| e.sequence == n);
        assert!(from >= floor && (from..end).all(there), "trusted from {from} to {end}");
        // Whoever follows the file finds what a scan finds, up to the first damage.
        let (mut at, mut followed) = (reader.begin(), 0);
        while let Ok(piece) = reader.next(at) {
            assert_eq!(index.extents()[followed], piece.extent);
            (at, followed) = (piece.extent.end(), followed + 1);
        }
        let all = index.extents().len() == self.written.len() && followed == self.written.len();
        assert!(all || self.damaged, "{followed} and {} of {}", index.extents().len(), self.written.len());
        all && !self.damaged
    }

    fn is_as_written(&self, reader: &Reader, extent: &Extent) {
        // One that stands for no pages names no block.
        let fits = |pages: &u64| extent.pages.fits(*pages);
        let fits = PAGES.get(usize::from(extent.block.0)).is_some_and(fits);
        assert!(extent.kind == ExtentKind::Complete || fits, "{extent:?}");
        let is_it = |written: &&Written| {
            let claims = &written.claims;
            let place = PageRange::new(PageIndex(claims.start), u64::from(claims.count));
            (claims.sequence, claims.offset, claims.kind, claims.length, claims.block, place)
                == (extent.sequence, extent.offset, extent.kind, extent.length, extent.block.0, extent.pages)
        };
        assert!(self.written.iter().any(|written| is_it(&written)), "nobody wrote {extent:?}");
        let Ok(content) = reader.content(extent) else {
            assert!(self.damaged, "{extent:?} cannot be read");
            return;
        };
        if let Content::Pages(content) = &content {
            assert_eq!(content.len() as u64, extent.pages.bytes().0);
        }
        let same = |written: &Written| written.content.as_ref().is_none_or(|wrote| *wrote == content);
        assert!(self.written.iter().filter(is_it).any(same), "another content of {extent:?}");
    }
}

/// As a source writes it.
fn written() -> Vec<u8> {
    let directory = FILE.with_extension("d");
    fs::create_dir_all(&directory).expect("there is room for a directory");
    let patience = Duration::from_secs(60);
    let writer = Writer::create(&directory, &header(), &SECRET, patience).expect("a file is made");
    let pages = |start, count| PageRange::new(PageIndex(start), count);
    let content = |pages: usize| Content::Pages((0..pages * PAGE_SIZE).map(|i| (i / 99) as u8).collect());
    for (range, content) in
        [(pages(7, 2), content(2)), (pages(900, 3000), Content::Nothing), (pages(8, 1), content(1))]
    {
        writer.append(1, BlockId(0), range, content, true).expect("there is room for it");
    }
    writer.sync(patience).expect("it becomes durable");
    let file = fs::read(writer.path()).expect("it is there");
    writer.remove(patience);
    fs::remove_dir_all(&directory).expect("it is empty");
    file
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let extent = |kind: u8, block: u8, start: u16, count: u16| {
        let ([a, b], [c, d]) = (start.to_le_bytes(), count.to_le_bytes());
        vec![0, kind, block, a, b, 5, c, d]
    };
    let made = |extents: &[Vec<u8>]| [&[1, 0, extents.len() as u8], &*extents.concat()].concat();
    let begin = header().to_bytes().expect("it is within all bounds");
    vec![
        [&[0], &*begin].concat(),
        [&[0], &*written()].concat(),
        made(&[extent(0, 0, 39, 0)]),
        made(&[extent(0, 0, 1023, 3), extent(2, 0, 1024, 1), extent(1, 0, 0, 60_000), extent(2, 1, 39, 0)]),
        made(&[extent(3, 2, 0, 0), extent(3, 0, 65_000, 9), extent(4, 0, 0, 0)]),
    ]
}
