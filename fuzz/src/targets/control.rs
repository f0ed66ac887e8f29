use crate::input::Input;
use proto::{
    Brief, Shape, bitmaps, compressed,
    control::{self, Kind},
    decode, encode, page_sets,
};
use units::{BlockId, MemorySet, PageIndex, PageRange};

fn shape() -> Shape {
    Shape(vec![1000, 64, 1])
}

/// A byte says whether one message follows, or a connection with several.
pub(crate) fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    if input.u8().is_multiple_of(2) {
        return decode(input.rest()).is_ok_and(|kind| message(&kind));
    }
    let mut connection = input.rest();
    let mut heard = 0;
    let mut told = vec![];
    while let Ok(kind) = engine::fuzz::read_control(&mut connection) {
        message(&kind);
        heard += 1;
        if let Kind::Kept(kept) = kind {
            told.push(kept);
        }
    }
    hear_kept(&told);
    heard > 0
}

/// A source takes in no more than one tag a page, whatever it is told. Says whether all of it is good.
fn hear_kept(told: &[control::Kept]) -> bool {
    let (good, tags) = engine::fuzz::hear_kept(&shape(), told);
    assert!(tags as u64 <= shape().0.iter().sum::<u64>(), "{tags} tags");
    good
}

/// What is done with a message beside taking it to the machines. Says whether what is in it is good.
fn message(kind: &Kind) -> bool {
    let again = encode(kind.clone());
    assert_eq!(decode(&again[4..]).as_ref(), Ok(kind));
    assert!(Brief(kind).to_string().len() < 64);
    match kind {
        Kind::Missing(control::Missing { blocks })
        | Kind::StillMissing(control::StillMissing { blocks, .. })
        | Kind::NowMissing(control::NowMissing { blocks }) => {
            let Ok(sets) = page_sets(blocks, &shape()) else { return false };
            assert_eq!(page_sets(&bitmaps(&sets), &shape()), Ok(sets));
            true
        }
        Kind::State(state) => engine::fuzz::decompress(state).is_ok(),
        Kind::Kept(kept) => hear_kept(std::slice::from_ref(kept)),
        _ => true,
    }
}

fn kept(block: u32, tags: &[u64]) -> control::Kept {
    control::Kept { block, start: 0, tags: tags.to_vec(), end: false }
}

pub(crate) fn kinds() -> Vec<Kind> {
    let mut missing = MemorySet::empty(shape().0);
    missing.block_mut(BlockId(0)).insert_range(PageRange::new(PageIndex(10), 500));
    missing.block_mut(BlockId(2)).insert(PageIndex(0));
    let private = control::PrivateBlock { name: "vga.vram".into(), content: Some(compressed(&[0; 5000])) };
    let block = control::Block { name: "ram0".into(), pages: 1000 };
    vec![
        Kind::Hello(control::Hello { host: "hosta".into(), software: "whimbrel 0.1.0".into() }),
        Kind::Ping(control::Ping { sent_ns: 1 << 40 }),
        Kind::Pong(control::Pong { sent_ns: 1 << 40, here_ns: 7 }),
        Kind::Failed(control::Failed { what: "the migration".into(), why: "no".into(), cancelled: true }),
        Kind::Prepare(control::Prepare {
            vm: "web1".into(),
            recipe: b"{}".to_vec(),
            blocks: vec![block.clone(), block],
            streams: 2,
            post_copy: true,
            verify: true,
            epoch: 4,
            give_up_ms: 60_000,
            tag_key: vec![2; 32],
            spool: Some(control::Spool { directory: "/shared/spool".into(), secret: vec![4; 32] }),
            record: "0123456789abcdef".into(),
            private: vec![private.clone()],
            handovers: vec![control::Handover { block: 1, reach: 1, place: vec![5; 16] }],
            came_by: vec![6; 16],
        }),
        Kind::Missing(control::Missing { blocks: bitmaps(&missing) }),
        Kind::Hashes(control::Hashes { block: 0, start: 0, hashes: (0..20).collect(), holes: 0 }),
        Kind::Hashes(control::Hashes { block: 0, start: 0, hashes: vec![], holes: 1 << 20 }),
        Kind::State(control::State {
            after_round: 3,
            stream: Some(compressed(b"QEVM QEVM QEVM QEVM QEVM")),
            private: vec![private],
            history: b"[]".to_vec(),
            paused: true,
        }),
        Kind::Authorize(control::Authorize {}),
        Kind::Claim(control::Claim { vm: "web1".into(), expected: 4, claimer: "hosta".into() }),
        Kind::Ready(control::Ready {
            token: vec![7; 32],
            record: String::new(),
            spool: false,
            no_spool: "it is not there".into(),
            private: true,
            reached: vec![control::Reached { block: 1, nonce: 1 << 60 }],
            kept: true,
        }),
        Kind::Kept(kept(0, &[1, 0, 3])),
        Kind::Kept(kept(2, &[u64::MAX])),
        Kind::Kept(control::Kept { end: true, ..Default::default() }),
        Kind::Refused(control::Refused { reasons: vec!["no bridge br0".into(), "no disk".into()] }),
        Kind::RoundReceived(control::RoundReceived { round: 3 }),
        Kind::Committed(control::Committed {
            epoch: 5,
            resumed_ns: 1 << 41,
            verified: true,
            paused_because: String::new(),
            steps: vec![control::Step {
                part: control::step::Part::Load.into(),
                began_ns: 1,
                ended_ns: 1 << 41,
            }],
        }),
        Kind::StillMissing(control::StillMissing { blocks: bitmaps(&missing), token: vec![7; 32] }),
        Kind::Settled(control::Settled {
            faults: 3,
            p50_us: 100,
            p99_us: 900,
            max_us: 1000,
            differing: 0,
            qemu_ended: true,
        }),
        Kind::Claimed(control::Claimed { yours: false, owner: "hostb".into(), epoch: 5 }),
        Kind::MissingRecorded(control::MissingRecorded {}),
        Kind::Received(control::Received { round: 3, blocks: bitmaps(&missing), token: vec![7; 32] }),
        Kind::Spooled(control::Spooled {
            extents: 40,
            bytes: 9000,
            receive: true,
            receive_from: 30,
            manifest: Some(control::Manifest { floor: 7, outdated: bitmaps(&missing), end: 40 }),
        }),
        Kind::SpoolStop(control::SpoolStop {}),
        Kind::SpoolTaken(control::SpoolTaken { extents: 40 }),
        Kind::SpoolStopped(control::SpoolStopped {}),
        Kind::SpoolFailed(control::SpoolFailed { why: "the datastore has not answered".into() }),
        Kind::NowMissing(control::NowMissing { blocks: bitmaps(&missing) }),
        Kind::StreamLost(control::StreamLost { stream: 1 }),
        Kind::StreamReopened(control::StreamReopened {
            stream: 1,
            round: 3,
            blocks: bitmaps(&missing),
            missing: true,
        }),
    ]
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let messages: Vec<_> = kinds().into_iter().map(encode).collect();
    let one = messages.iter().map(|message| [&[0], &message[4..]].concat());
    let all = [&[1], &*messages.concat()].concat();
    one.chain([all]).collect()
}
