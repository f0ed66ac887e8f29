//! Larger VMs in storms that chance makes, each from one number.

use crate::{
    blow::Blow,
    fault::Fault,
    guest::mix,
    schedule::ENDLESS,
    setup::{Keeper, Setup, Spooling, Way},
    world::World,
};

/// Numbers from a seed (splitmix64).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    fn below(&mut self, n: u32) -> u32 {
        (((self.next() >> 32) * u64::from(n)) >> 32) as u32
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u32) as usize]
    }
}

fn setup(chance: &mut Chance) -> Setup {
    let way = chance.of(&[Way::PreCopy, Way::Hybrid, Way::PostCopy]);
    let spooling = match way {
        Way::PreCopy => Spooling::Off,
        _ => chance.of(&[Spooling::Off, Spooling::Relaxed, Spooling::Strict]),
    };
    Setup {
        way,
        keeper: chance.of(&[Keeper::Target, Keeper::File, Keeper::Etcd]),
        spooling,
        streams: 1 + chance.below(4) as u8,
        pages: chance.of(&[3, 5, 8, 16, 32, 48]),
        rounds: 1 + chance.below(4) as u8,
        guest: chance.below(1 << 16) as u16,
        busy: 5 + chance.below(60) as u16,
        eager: chance.below(8) == 0,
    }
}

/// A run from this seed, to its end.
pub fn run(seed: u64, fault: Option<Fault>, trace: bool) -> World {
    let mut chance = Chance(mix(seed));
    let setup = setup(&mut chance);
    let mut world = World::new(setup, fault);
    if trace {
        world.trace.0 = Some(vec![format!("setup {setup}")]);
    }
    let mut blows = chance.of(&[0, 1, 1, 2, 2, 2, 3, 4]);
    // A storm is not spread evenly: blows come near the beginning, or all along, or about the end.
    let rarely = chance.of(&[20, 80, 200]);
    let slow = chance.of(&[0, 0, 40, 200]);
    for _ in 0..ENDLESS {
        if world.breach.0.is_some() {
            return world;
        }
        if blows > 0 && chance.below(rarely) == 0 {
            let blow = Blow::of(chance.below(u32::from(Blow::COUNT)) as u8);
            if world.can_strike(blow) {
                blows -= 1;
                world.strike(blow);
                continue;
            }
        }
        let can = world.movers();
        let late = slow > 0 && !world.timers.is_empty() && chance.below(slow) == 0;
        if can == 0 || late {
            if !world.pass_time() && can == 0 {
                world.verdict();
                return world;
            }
            world.check();
            continue;
        }
        let mut pick = chance.below(can.count_ones());
        let mut left = can;
        while pick > 0 {
            left &= left - 1;
            pick -= 1;
        }
        world.step_by(left.trailing_zeros() as u8);
    }
    world.breach(|| "it never ends".into());
    world
}
