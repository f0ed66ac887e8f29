//! Larger VMs in storms that chance makes, each from one number.

use crate::{
    fault::{Again, Fault},
    guest::mix,
    link::Side,
    moves::{READER, TO_TARGET},
    outside::Outside,
    planted::PlantedBug,
    schedule::ENDLESS,
    setup::{Keeper, Setup, Spooling, Way},
    world::{Conditions, World},
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

/// Whoever is slow moves only once in so many times, as long as others can.
const LAZY: u32 = 16;

fn setup(chance: &mut Chance, spooled: bool) -> Setup {
    let way = chance.of(&[Way::PreCopy, Way::Hybrid, Way::PostCopy]);
    // With the mode that is asked for in pre-copy, strict and relaxed are the same.
    let kinds: &[Spooling] = match way {
        Way::PreCopy => &[Spooling::Relaxed],
        _ => &[Spooling::Relaxed, Spooling::Strict],
    };
    let bare = !spooled && chance.below(2) == 0;
    let spooling = if bare { Spooling::Off } else { chance.of(kinds) };
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
        rejoin: chance.below(4) > 0,
        verify: chance.below(3) == 0,
        paused: false,
        kept: false,
    }
}

/// When faults fall.
#[derive(Clone, Copy)]
enum When {
    Always,
    /// While the spool has a part in a round.
    Rounds,
    /// Once the guest was stopped.
    Stopped,
    /// Once the target owns it.
    Committed,
}

impl When {
    fn is_now(self, world: &World) -> bool {
        match self {
            Self::Always => true,
            Self::Rounds => world.spool_is_busy(),
            Self::Stopped => world.at_stop.is_some(),
            Self::Committed => world.ghost.committed,
        }
    }
}

/// From this seed on every run has a spool, and its storm is about that.
pub(crate) const SPOOLED: u64 = 1 << 32;

/// From this seed on others act on the VM, too.
pub(crate) const MEDDLED: u64 = 2 << 32;

/// From this seed on the target keeps memory of the VM, and something becomes of that.
pub(crate) const KEPT: u64 = 3 << 32;

/// What befalls a spool, and whoever writes and reads it: hosts and links that are lost, a datastore that
/// fails, damage.
const AT_SPOOL: [&[Fault]; 3] = [
    &[
        Fault::Burn(Side::Source),
        Fault::BurnTorn,
        Fault::Reboot(Side::Source),
        Fault::Crash { side: Side::Source, lucky: false, again: Again::Soon },
        Fault::Crash { side: Side::Target, lucky: false, again: Again::Soon },
        Fault::Crash { side: Side::Target, lucky: false, again: Again::Later },
        Fault::CutAll,
        Fault::LinkDown,
        Fault::SpoolFails(Side::Target),
    ],
    &[
        Fault::SpoolFails(Side::Source),
        Fault::SpoolFails(Side::Target),
        Fault::SpoolDown,
        Fault::SpoolSlow,
        Fault::CutAll,
        Fault::LinkDown,
        Fault::Cancel,
    ],
    &[
        Fault::SpoolRots,
        Fault::Burn(Side::Source),
        Fault::Crash { side: Side::Target, lucky: false, again: Again::Soon },
        Fault::Crash { side: Side::Target, lucky: false, again: Again::Later },
    ],
];

/// What befalls what is kept.
const AT_KEPT: [Fault; 2] = [Fault::KeptVanishes, Fault::KeptChanges];

/// A run from this seed, to its end.
pub fn run(seed: u64, bug: Option<PlantedBug>, trace: bool) -> World {
    let mut chance = Chance(mix(seed));
    let at_spool = (SPOOLED..MEDDLED).contains(&seed);
    let at_kept = seed >= KEPT;
    let others: Vec<Outside> =
        if (MEDDLED..KEPT).contains(&seed) { Outside::all().collect() } else { Vec::new() };
    let mut setup = setup(&mut chance, at_spool);
    setup.kept = at_kept;
    setup.paused = !others.is_empty() && chance.below(8) == 0;
    let mut world = World::new(setup, bug);
    if trace {
        world.trace.0 = Some(vec![format!("setup {setup}")]);
    }
    let mut faults = chance.of(&[0, 1, 1, 2, 2, 2, 3, 4]);
    // A storm is not spread evenly: faults come near the beginning, or all along, or about the end.
    let rarely = chance.of(&[20, 80, 200]);
    let slow = chance.of(&[0, 0, 40, 200]);
    let faults_at_spool = chance.of(&AT_SPOOL);
    let times = [When::Always, When::Rounds, When::Stopped, When::Committed];
    let when = if at_spool { chance.of(&times) } else { When::Always };
    // Some are slow all along; who reads a spool, and the first connection to the target, more
    // often than others.
    let mut lazy = chance.next() & chance.next() & chance.next();
    if at_spool && chance.below(2) == 0 {
        lazy |= 1 << READER;
        lazy |= u64::from(chance.below(2)) << TO_TARGET;
    }
    for _ in 0..ENDLESS {
        if world.breach.0.is_some() {
            return world;
        }
        if faults > 0 && when.is_now(&world) && chance.below(rarely) == 0 {
            if !others.is_empty() && chance.below(2) == 0 {
                let outside = chance.of(&others);
                if world.can_meddle(outside) {
                    faults -= 1;
                    world.meddle(outside);
                    continue;
                }
            }
            let any = Fault::common(chance.below(u32::from(Fault::COMMON)) as u8);
            let fault = match () {
                () if at_spool => chance.of(faults_at_spool),
                () if at_kept && chance.below(2) == 0 => chance.of(&AT_KEPT),
                () => any,
            };
            if world.can_strike(fault) {
                faults -= 1;
                world.strike(fault);
                continue;
            }
        }
        let can = world.movers();
        let late = slow > 0 && !world.timers.is_empty() && chance.below(slow) == 0;
        if can == 0 || late {
            if can != 0 {
                world.ghost.conditions = Conditions::Storm;
            }
            if !world.pass_time() && can == 0 {
                world.verdict();
                return world;
            }
            world.check();
            continue;
        }
        let quick = can & !lazy;
        let can = if quick != 0 && chance.below(LAZY) > 0 { quick } else { can };
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
