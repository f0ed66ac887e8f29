//! A whole migration in virtual time (`crates/sim`): the bytes say who moves next, what befalls the two
//! sides, and what others do to the VM meanwhile, through a monitor of their own or inside the guest.

use crate::input::Input;
use sim::{End, Keeper, Setup, Side, Spooling, Turn, Way, World};

/// A migration in which everybody takes turns comes to its end in a tenth of so many moves.
const MOVES: u32 = 4000;

/// Departures from what is usual: what takes more than so many at once is not found by chance either.
const TURNS: u8 = 6;

/// Of a byte's values, those from here on are turns; those below say who moves.
const A_TURN: u8 = 200;

/// Three bytes for the VM and its way, then one for each move, two for each turn; the usual order when they
/// have come to their end.
pub(crate) fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let mut world = World::new(setup(&mut input), None);
    let turns: Vec<Turn> = Turn::all().chain(Turn::others()).collect();
    let mut left = TURNS;
    for _ in 0..MOVES {
        if let Some(what) = &world.breach.0 {
            panic!("{what}");
        }
        if input.is_empty() {
            if world.step() {
                continue;
            }
            let end = world.verdict();
            assert!(world.breach.0.is_none(), "{:?}", world.breach.0);
            return end == Some(End::Runs(Side::Target));
        }
        let byte = input.u8();
        if byte >= A_TURN {
            let turn = input.one_of(&turns);
            if left > 0 && world.can_take(turn) {
                left -= 1;
                world.take(turn);
            }
            continue;
        }
        let mut can = world.movers();
        if can == 0 {
            world.step();
            continue;
        }
        for _ in 0..u32::from(byte) % can.count_ones() {
            can &= can - 1;
        }
        world.step_by(can.trailing_zeros() as u8);
    }
    false
}

fn setup(input: &mut Input<'_>) -> Setup {
    let way = input.one_of(&[Way::PreCopy, Way::Hybrid, Way::PostCopy]);
    let keeper = input.one_of(&[Keeper::Target, Keeper::File, Keeper::Etcd]);
    let byte = input.u8();
    let bit = |n: u8| byte >> n & 1 == 1;
    Setup {
        rejoin: bit(0),
        verify: bit(1),
        paused: bit(2),
        pages: if bit(3) { 5 } else { 3 },
        streams: if bit(4) { 2 } else { 1 },
        guest: u16::from(byte >> 5),
        ..Setup::small(way, keeper, Spooling::Off)
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let ways = (0..3).flat_map(|way| (0..3).map(move |keeper| vec![way, keeper, 0]));
    // Somebody pauses the guest, here and there.
    let turns = Turn::all().count() as u8;
    let paused = (0..8).map(|n| {
        let mut bytes = vec![n % 3, 0, 8];
        bytes.extend(std::iter::repeat_n(0, usize::from(n) * 9));
        bytes.extend([A_TURN, turns]);
        bytes
    });
    ways.chain(paused).collect()
}
