use crate::input::Input;
use page::{Class, Codec};
use proto::{
    BATCH_PAGES, Frame, HEADER, MAX_PAYLOAD, MAX_RUNS, Preamble, Purpose, REPLY, RUN, Reply, Run, Shape,
    Status, Token, parse_runs, write_batch,
};
use units::{BlockId, MigrationId, PageIndex, PageRange};

fn shape() -> Shape {
    Shape(vec![1000, 1, 1 << 34])
}

/// A byte says what follows: a preamble, an answer to one, a token, or a frame without its content.
pub(crate) fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    match input.u8() % 4 {
        0 => preamble(input.rest()),
        1 => reply(input.rest()),
        2 => Token::read(input.rest()).is_some_and(|token| token.is(&token)),
        _ => frame(input.rest()).is_some(),
    }
}

fn preamble(bytes: &[u8]) -> bool {
    let Some(Ok(preamble)) = bytes.first_chunk().map(Preamble::parse) else { return false };
    assert_eq!(Preamble::parse(&preamble.to_bytes()), Ok(preamble));
    true
}

fn reply(bytes: &[u8]) -> bool {
    let Some(Ok(reply)) = bytes.first_chunk::<REPLY>().map(Reply::parse) else { return false };
    assert_eq!(Reply::parse(&reply.to_bytes()), Ok(reply));
    true
}

fn frame(bytes: &[u8]) -> Option<()> {
    let (header, rest) = bytes.split_first_chunk::<HEADER>()?;
    let frame = Frame::parse(header, &shape()).ok()?;
    assert_eq!(Frame::parse(&frame.header(), &shape()).as_ref(), Ok(&frame));
    let Frame::Batch { block, runs, payload, codec } = frame else { return Some(()) };
    assert!((1..=MAX_RUNS).contains(&runs) && payload <= MAX_PAYLOAD);
    let pages = shape().pages(block).expect("a block that there is");
    let table = parse_runs(rest.get(..runs * RUN)?, block, payload, codec, &shape()).ok()?;
    assert_eq!(table.runs.len(), runs);
    assert!(table.runs.iter().all(|run| run.range.fits(pages) && !run.range.is_empty() && run.is_sound()));
    assert!(table.runs.iter().map(|run| run.range.count).sum::<u64>() <= BATCH_PAGES);
    assert_eq!(table.runs.iter().map(Run::payload).sum::<usize>(), table.own);
    assert!(table.own <= payload && table.raw <= MAX_PAYLOAD && codec.is_some() == (table.raw > 0));
    // What was understood is what would be said.
    let mut again = Vec::new();
    write_batch(block, &table.runs, codec.map(|codec| (codec, payload - table.own)), &mut again);
    assert_eq!(Frame::parse(again.first_chunk()?, &shape()), Ok(frame));
    assert_eq!(parse_runs(&again[HEADER..], block, payload, codec, &shape()).as_ref(), Ok(&table));
    Some(())
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    let mut add = |what: u8, bytes: &[u8]| seeds.push([&[what], bytes].concat());
    for kind in
        [Purpose::Control, Purpose::Data(7), Purpose::Fault, Purpose::Resume, Purpose::Record, Purpose::Probe]
    {
        add(0, &Preamble::new(kind, MigrationId(0x1234_5678_9abc_def0)).to_bytes());
    }
    for status in
        [Status::Welcome, Status::Unknown, Status::Busy, Status::Stranger, Status::Secured, Status::Unsecured]
    {
        add(1, &Reply::new(status).to_bytes());
    }
    add(2, &[9; Token::SIZE]);
    add(3, &Frame::RoundEnd(3).header());
    add(3, &Frame::Want { block: BlockId(2), page: PageIndex((1 << 34) - 1) }.header());
    let run = |start, count, class| Run::new(PageRange::new(PageIndex(start), count), class);
    let own = [
        run(0, 3, Class::Zero),
        run(5, 1, Class::Raw),
        run(6, 20, Class::Duplicate),
        run(30, 40, Class::Kept),
        run(990, 2, Class::Delta),
    ];
    let shared = [run(0, 30, Class::Compressed), run(40, 1, Class::Zero)];
    for (runs, compressed) in [
        (&own[..], None),
        (&shared[..], Some((Codec::Lz4, 4000))),
        (&shared[..], Some((Codec::Zstd(1), 300))),
    ] {
        let mut bytes = Vec::new();
        write_batch(BlockId(0), runs, compressed, &mut bytes);
        add(3, &bytes);
    }
    seeds
}
