//! Frames survive the way, and hostile bytes are refused before anything is done with them.

use page::{Class, Codec};
use proptest::prelude::*;
use proto::{
    BATCH_PAGES, Frame, FrameError, HEADER, MAX_PAYLOAD, MAX_RUNS, Preamble, PreambleError, Purpose, REPLY,
    RUN, Reply, Run, Shape, Status, Table, bitmaps, decode, encode, page_sets, parse_runs, write_batch,
};
use units::{BlockId, MemorySet, MigrationId, PAGE_SIZE, PageIndex, PageRange, PageSet};

const PAGES: u64 = 1000;

fn shape() -> Shape {
    Shape(vec![PAGES, 1])
}

const CLASSES: [Class; 6] =
    [Class::Zero, Class::Kept, Class::Duplicate, Class::Delta, Class::Compressed, Class::Raw];

fn run() -> impl Strategy<Value = Run> {
    (0..PAGES, 1u64..8, 0usize..6, 0u32..1000).prop_map(|(start, count, class, more)| {
        let range = PageRange::new(PageIndex(start), count.min(PAGES - start));
        let mut run = Run::new(range, CLASSES[class]);
        run.bytes += if run.class == Class::Delta { more } else { 0 };
        run
    })
}

fn codec() -> impl Strategy<Value = Option<Codec>> {
    prop_oneof![Just(None), Just(Some(Codec::Lz4)), Just(Some(Codec::Zstd(0)))]
}

fn first<const N: usize>(bytes: &[u8]) -> &[u8; N] {
    bytes.first_chunk().expect("long enough")
}

proptest! {
    #[test]
    fn a_batch_survives_the_way(runs in prop::collection::vec(run(), 1..16), shared in 1usize..5000,
        zstd: bool) {
        let raw = runs.iter().filter(|run| run.class == Class::Compressed).map(Run::raw).sum::<usize>();
        let codec = (raw > 0).then_some(if zstd { Codec::Zstd(0) } else { Codec::Lz4 });
        let mut bytes = Vec::new();
        write_batch(BlockId(0), &runs, codec.map(|codec| (codec, shared)), &mut bytes);
        let own = runs.iter().map(Run::payload).sum::<usize>();
        let payload = own + codec.map_or(0, |_| shared);
        let frame = Frame::parse(first::<HEADER>(&bytes), &shape());
        prop_assert_eq!(frame, Ok(Frame::Batch { block: BlockId(0), runs: runs.len(), payload, codec }));
        let table = &bytes[HEADER..];
        prop_assert_eq!(table.len(), runs.len() * RUN);
        prop_assert_eq!(parse_runs(table, BlockId(0), payload, codec, &shape()),
            Ok(Table { runs, own, raw }));
        prop_assert!(parse_runs(table, BlockId(0), payload + 1, None, &shape()).is_err());
    }

    #[test]
    fn small_frames_survive_the_way(round: u32, page in 0..PAGES) {
        for frame in [Frame::RoundEnd(round), Frame::Want { block: BlockId(0), page: PageIndex(page) }] {
            prop_assert_eq!(Frame::parse(&frame.header(), &shape()), Ok(frame));
        }
    }

    #[test]
    fn whatever_a_header_says_is_within_bounds(bytes: [u8; HEADER]) {
        match Frame::parse(&bytes, &shape()) {
            Ok(Frame::Batch { block, runs, payload, .. }) => {
                prop_assert!(block.0 < 2 && runs <= MAX_RUNS && payload <= MAX_PAYLOAD && runs > 0);
            }
            Ok(Frame::Want { block, page }) => prop_assert!(page.0 < shape().pages(block).unwrap()),
            Ok(Frame::RoundEnd(_)) | Err(_) => {}
        }
    }

    #[test]
    fn whatever_a_table_says_lies_in_the_block(
        noise in prop::collection::vec(any::<u8>(), 0..80), runs in prop::collection::vec(run(), 1..5),
        at: prop::sample::Index,
        byte: u8, payload in 0usize..20_000, codec in codec(),
    ) {
        // Noise is seldom close to a table: a good one with one wrong byte is.
        let mut table = vec![];
        write_batch(BlockId(0), &runs, None, &mut table);
        table.drain(..HEADER);
        let at = at.index(table.len());
        table[at] = byte;
        let own = runs.iter().map(Run::payload).sum::<usize>();
        for (table, payload) in [(&noise, payload), (&table, own), (&table, own + payload)] {
            if let Ok(Table { runs, own, raw }) = parse_runs(table, BlockId(0), payload, codec, &shape()) {
                prop_assert!(runs.iter().all(|r| !r.range.is_empty() && r.range.fits(PAGES) && r.is_sound()));
                prop_assert!(runs.iter().map(|r| r.range.count).sum::<u64>() <= BATCH_PAGES);
                prop_assert_eq!(runs.iter().map(Run::payload).sum::<usize>(), own);
                prop_assert!(own <= payload && (raw > 0) == codec.is_some() && (raw > 0) == (payload > own));
            }
        }
    }

    #[test]
    fn hostile_control_bytes_are_refused_without_harm(bytes: Vec<u8>) {
        let _ = decode(&bytes);
    }

    #[test]
    fn page_sets_survive_the_way(members in prop::collection::vec(0..PAGES, 0..100)) {
        let mut set = PageSet::empty(PAGES);
        for page in members {
            set.insert(PageIndex(page));
        }
        let sets = MemorySet::from_blocks(vec![set, PageSet::full(1)]);
        prop_assert_eq!(page_sets(&bitmaps(&sets), &shape()), Ok(sets.clone()));
        prop_assert!(page_sets(&bitmaps(&sets), &Shape(vec![PAGES])).is_err());
        prop_assert!(page_sets(&bitmaps(&sets), &Shape(vec![PAGES + 1, 1])).is_err());
    }

    #[test]
    fn a_preamble_survives_the_way(id: u128, stream: u16) {
        use Purpose as P;
        for kind in [P::Control, P::Data(stream), P::Fault, P::Resume, P::Record] {
            let preamble = Preamble::new(kind, MigrationId(id));
            prop_assert_eq!(Preamble::parse(&preamble.to_bytes()), Ok(preamble));
        }
    }

    #[test]
    fn noise_is_no_preamble(bytes: [u8; Preamble::SIZE]) {
        prop_assume!(bytes[..8] != *b"WHIMBREL");
        prop_assert_eq!(Preamble::parse(&bytes), Err(PreambleError::NotWhimbrel));
    }
}

#[test]
fn a_run_of_no_pages_is_refused() {
    for class in CLASSES {
        let run = Run::new(PageRange::new(PageIndex(3), 0), class);
        let mut bytes = Vec::new();
        write_batch(BlockId(0), &[run], None, &mut bytes);
        let parsed = parse_runs(&bytes[HEADER..], BlockId(0), run.payload(), None, &shape());
        assert!(matches!(parsed, Err(FrameError::Run { count: 0, .. })), "{class:?}: {parsed:?}");
    }
}

#[test]
fn a_page_beyond_the_block_is_named() {
    let run = Run { range: PageRange::new(PageIndex(PAGES - 1), 2), class: Class::Zero, bytes: 0 };
    let mut bytes = Vec::new();
    write_batch(BlockId(0), &[run], None, &mut bytes);
    assert_eq!(
        parse_runs(&bytes[HEADER..], BlockId(0), 0, None, &shape()).unwrap_err().to_string(),
        "2 pages from 999 on reach beyond RAM block 0, which has 1000"
    );
    let want = Frame::Want { block: BlockId(7), page: PageIndex(0) }.header();
    assert_eq!(Frame::parse(&want, &shape()), Err(FrameError::Block(7)));
}

#[test]
fn a_batch_that_lies_about_its_content_is_refused() {
    let run = Run::new(PageRange::new(PageIndex(0), 1), Class::Raw);
    let mut bytes = Vec::new();
    write_batch(BlockId(0), &[run], None, &mut bytes);
    let lie = parse_runs(&bytes[HEADER..], BlockId(0), 2 * PAGE_SIZE, None, &shape());
    assert_eq!(lie, Err(FrameError::Content { runs: 4096, payload: 8192 }));
}

#[test]
fn an_older_or_newer_peer_is_told_so() {
    let mut bytes = Preamble::new(Purpose::Control, MigrationId(1)).to_bytes();
    bytes[8..12].copy_from_slice(&[9, 0, 12, 0]);
    let error = Preamble::parse(&bytes).unwrap_err();
    assert_eq!(error, PreambleError::Version { oldest: 9, newest: 12 });
    assert!(error.to_string().contains("upgrade the older side"));
    let reply = Reply { version: proto::VERSION + 1, status: Status::Version }.to_bytes();
    assert!(matches!(Reply::parse(first::<REPLY>(&reply)), Err(PreambleError::Version { .. })));
    // The same version refused: whoever says so is none of us.
    let echo = Reply::new(Status::Version).to_bytes();
    assert_eq!(Reply::parse(first::<REPLY>(&echo)), Err(PreambleError::NotWhimbrel));
}

#[test]
fn control_messages_survive_the_way() {
    let message = proto::control::Kind::RoundReceived(proto::control::RoundReceived { round: 3 });
    let bytes = encode(message.clone());
    let (length, body) = bytes.split_at(4);
    assert_eq!(u32::from_le_bytes(*first::<4>(length)) as usize, body.len());
    assert_eq!(decode(body), Ok(message));
}
