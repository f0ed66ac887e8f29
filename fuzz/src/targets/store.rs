use crate::input::Input;
use agent::{
    fuzz::{MIGRATION, NAME, TABLES, read_missing, read_row, store, write_missing},
    store::{DepartureState, Store},
};
use ports::{Claim, Claimed, Ownership, RunState, SourceJournal, TargetJournal};
use std::collections::BTreeSet;
use units::{BlockId, Epoch, MemorySet, PageIndex, PageRange};

/// Pages of a missing set, at most: enough to have shapes, few enough for a bitmap.
const MOST_PAGES: u64 = 1 << 20;

/// A byte says whether a missing set follows alone, a store (how many steps, the steps, then rows), or a row
/// alone: a store takes twenty milliseconds.
pub(crate) fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    match input.u8() % 4 {
        0 => return missing(input.rest()),
        1 => {}
        _ => {
            let table = input.one_of(&TABLES);
            return read_row(table, input.rest());
        }
    }
    let steps = input.u8() % 16;
    let steps = input.bytes(usize::from(steps));
    let mut rows = Vec::new();
    while !input.is_empty() {
        let table = input.one_of(&TABLES);
        let length = usize::from(input.u16());
        rows.push((table, input.bytes(length)));
    }
    // A set for 64 TiB is a damaged one that is believed: it takes 2 GiB, which this has not.
    rows.retain(|(table, row)| *table != "missing" || read_missing(row, MOST_PAGES).is_some());
    let store = store("here", &rows).expect("rows of any content can be written");
    let good = look(&store);
    let mut owners = BTreeSet::new();
    for step in steps {
        walk(&store, *step, &mut owners);
    }
    look(&store);
    good
}

fn missing(row: &[u8]) -> bool {
    let Some(set) = read_missing(row, MOST_PAGES) else { return false };
    assert_eq!(read_missing(&write_missing(&set), MOST_PAGES), Some(set));
    true
}

/// Reads all there is. Says whether it could all be read.
fn look(store: &Store) -> bool {
    let _ = (store.history(NAME), store.link_history(NAME).link(), store.link_history(NAME).switchover());
    [
        store.vms().is_ok(),
        store.vm(NAME).is_ok(),
        store.owner(NAME).is_ok(),
        store.departures().is_ok(),
        store.arrivals().is_ok(),
        store.arrival(NAME).is_ok(),
        store.missing(NAME).is_ok(),
        store.last_report(NAME).is_ok(),
        store.has_arrived(MIGRATION).is_ok(),
    ]
    .iter()
    .all(|good| *good)
}

/// What a driver or a peer does next. Whatever the rows say, a VM has no two owners (I1), and what is gone
/// stays gone (I4).
fn walk(store: &Store, step: u8, owners: &mut BTreeSet<&'static str>) {
    let before = store.departure_of(NAME).ok().flatten();
    let mut journal = store.departure(NAME, MIGRATION, "there", "10.0.0.2:7471");
    let ours = before.as_ref().filter(|entry| entry.migration == MIGRATION).map(|entry| entry.state);
    let gone = matches!(ours, Some(DepartureState::Gone { .. }));
    let expected = match ours {
        Some(DepartureState::Fenced { expected }) => expected,
        _ => Epoch(u64::from(step >> 4)),
    };
    let arrival = || store.arrival(NAME).ok().flatten();
    match step % 10 {
        0 => assert!(
            journal.pausing(RunState::Running).is_err()
                || matches!(ours, None | Some(DepartureState::Pausing))
        ),
        1 => assert!(journal.fence(expected).is_err() || !gone, "I4: promised again"),
        2 => assert!(journal.back().is_err() || !gone, "I4: back although it is gone"),
        3 => {
            let is_fenced = matches!(ours, Some(DepartureState::Fenced { .. } | DepartureState::Gone { .. }));
            assert!(journal.gone(expected.next()).is_err() || is_fenced, "gone without a fence");
        }
        4 => assert!(journal.settled().is_err() || gone || ours.is_none() || before.is_none()),
        5 => claim(store, "here", step, owners),
        6 => claim(store, "there", step, owners),
        7 => {
            if let Some((arrival, entry)) = arrival() {
                let given_up = arrival.abandon();
                assert!(!entry.claimed || !matches!(given_up, Ok(true)), "I4: what was claimed is given up");
            }
        }
        8 => {
            if let Some((mut arrival, _)) = arrival() {
                let mut pages = MemorySet::empty([100]);
                pages.block_mut(BlockId(0)).insert_range(PageRange::new(PageIndex(3), 9));
                if arrival.missing(&pages).is_ok() {
                    assert_eq!(store.missing(NAME).expect("it was just written"), Some(pages));
                }
            }
        }
        _ => {
            if let Some((mut arrival, _)) = arrival() {
                let _ = arrival.settled();
            }
        }
    }
    if gone {
        let after = store.departure_of(NAME).expect("it was read before").map(|entry| entry.state);
        assert!(matches!(after, None | Some(DepartureState::Gone { .. })), "I4: {ours:?} became {after:?}");
    }
}

fn claim(store: &Store, claimer: &'static str, step: u8, owners: &mut BTreeSet<&'static str>) {
    let claim = Claim {
        vm: NAME.to_owned(),
        migration: MIGRATION,
        expected: Epoch(u64::from(step >> 4)),
        claimer: claimer.to_owned(),
    };
    let Ok(first) = store.claim(&claim) else { return };
    assert_eq!(store.claim(&claim).expect("it was answered before"), first, "a claim asked again");
    if matches!(first, Claimed::Yours(_)) {
        owners.insert(claimer);
        assert!(owners.len() < 2, "I1: both own it");
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut set = MemorySet::empty([70_000, 0, 3]);
    for (block, start, count) in [(0, 0, 1), (0, 5, 60_000), (2, 1, 1)] {
        set.block_mut(BlockId(block)).insert_range(PageRange::new(PageIndex(start), count));
    }
    let mut seeds = vec![[&[0], &*write_missing(&set)].concat()];
    let id = MIGRATION.to_string();
    let vm = |standing: &str| {
        format!(
            "{{\"name\":\"vm\",\"recipe\":{{\"vcpus\":2}},\"process\":{{\"pid\":4711,\"start_time\":99}},\
             \"qmp\":\"/run/q\",\"belongings\":null,\"origin\":\"migrated\",\"standing\":{standing}}}"
        )
    };
    let here = vm("{\"is\":\"here\"}");
    let arriving = vm(&format!("{{\"is\":\"arriving\",\"migration\":\"{id}\",\"from\":\"there\"}}"));
    let departure = |state: &str| {
        format!("{{\"migration\":\"{id}\",\"to\":\"there\",\"address\":\"10.0.0.2:7471\",{state}}}")
    };
    let arrival = |claimed: bool, incomplete: bool| {
        format!(
            "{{\"migration\":\"{id}\",\"from\":\"there\",\"claimed\":{claimed},\"incomplete\":{incomplete}}}"
        )
    };
    let offer = |migration: &str, open: bool| {
        format!("{{\"vm\":\"vm\",\"owner\":\"there\",\"epoch\":4,\"migration\":{migration},\"open\":{open}}}")
    };
    let owner = "{\"owner\":\"here\",\"epoch\":4,\"migration\":null}".to_owned();
    let missing_row = write_missing(&set);
    let mut alone = Vec::new();
    let mut add = |steps: &[u8], rows: &[(&'static str, &[u8])]| {
        let mut seed = vec![1, steps.len() as u8];
        seed.extend_from_slice(steps);
        for (table, row) in rows {
            let at = TABLES.iter().position(|name| name == table).expect("a table");
            if *table != "missing" && !alone.contains(table) {
                alone.push(*table);
                seeds.push([&[2, at as u8], *row].concat());
            }
            seed.push(at as u8);
            seed.extend_from_slice(&(row.len() as u16).to_le_bytes());
            seed.extend_from_slice(row);
        }
        seeds.push(seed);
    };
    let pausing = departure("\"state\":\"pausing\"");
    let is_fenced = departure("\"state\":\"fenced\",\"expected\":4");
    let gone = departure("\"state\":\"gone\",\"epoch\":5");
    let (vms, owners) = (("vms", here.as_bytes()), ("owners", owner.as_bytes()));
    for (steps, departure) in
        [(&[0, 1, 2, 0, 1, 3, 2, 4][..], &pausing), (&[0, 2, 4, 3, 2], &is_fenced), (&[2, 1, 0, 3, 4], &gone)]
    {
        add(steps, &[vms, owners, ("departures", departure.as_bytes())]);
    }
    let history = super::history::seeds().remove(2).split_off(3);
    let link_history = "{\"probed\":[125000000,1700000000],\"switchovers_ms\":[8.5,9.0]}";
    add(&[0, 1, 3, 4], &[vms, owners, ("history", &history[..]), ("links", link_history.as_bytes())]);
    // At epoch 4, which the upper half of a step's byte says.
    let (claim_here, claim_there) = (4 * 16 + 1, 4 * 16 + 2);
    debug_assert!(claim_here % 10 == 5 && claim_there % 10 == 6);
    for (offer, arrival) in [
        (offer("null", true), arrival(false, true)),
        (offer("null", false), arrival(false, false)),
        (offer(&format!("\"{id}\""), false), arrival(true, true)),
    ] {
        let rows = [
            ("vms", arriving.as_bytes()),
            ("offers", offer.as_bytes()),
            ("arrivals", arrival.as_bytes()),
            ("missing", &*missing_row),
        ];
        add(&[8, claim_here, claim_there, 7, 9, 7], &rows);
        add(&[7, claim_there, claim_here], &rows);
    }
    seeds
}
