//! The protocol of the shared directory over a model of one: every interleaving of two claimers with
//! everything that can go wrong, and random lives of a VM that is moved about by hosts that crash, see old
//! things and lose answers (I1).

/// A directory in which everything goes wrong.
mod model;

use model::{Fault, Model};
use ownership::{
    prune::disposable,
    record::{Entry, epoch_name},
    steps::{Claiming, Got, Offering, Op, Step, Steps},
};
use ports::{Claim, Claimed, Offer};
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, HashSet},
    fmt::{self, Write},
    hash::{DefaultHasher, Hash, Hasher},
};
use units::{Epoch, MigrationId};

const VM: &str = "vm";

/// Runs a machine without faults.
fn run<M: Steps>(model: &mut Model, mut machine: M) -> std::io::Result<M::Outcome> {
    let mut step = machine.begin();
    loop {
        match step {
            Step::Do(op) => step = machine.next(model.act(&op, Fault::None)),
            Step::End(end) => return end,
        }
    }
}

/// A VM that belongs to `a` at epoch 1.
fn owned_by_a() -> Model {
    let mut model = Model::default();
    let id = MigrationId(99);
    run(&mut model, Offering::change("it", VM, Epoch(0), id, "", "a", 1)).unwrap();
    let claim = Claim { vm: VM.into(), migration: id, expected: Epoch(0), claimer: "a".into() };
    assert_eq!(run(&mut model, Claiming::new("it", &claim)).unwrap(), Claimed::Yours(Epoch(1)));
    model
}

fn offer(id: u128, epoch: u64, from: &str, to: &str) -> Offer {
    Offer {
        vm: VM.into(),
        migration: MigrationId(id),
        expected: Epoch(epoch),
        from: from.into(),
        to: to.into(),
    }
}

fn claim(offer: &Offer, claimer: &str) -> Claim {
    let Offer { vm, migration, expected, .. } = offer.clone();
    Claim { vm, migration, expected, claimer: claimer.to_owned() }
}

/// A claimer in the middle of its claim: what it does next, how often it may still begin again, what it was
/// told.
#[derive(Clone, Debug)]
struct Claimer {
    claim: Claim,
    machine: Claiming,
    next: Option<Op>,
    again: u32,
    told: Option<Claimed>,
}

impl Claimer {
    fn new(claim: Claim, again: u32) -> Self {
        let mut claimer = Self { machine: Claiming::new("it", &claim), claim, next: None, again, told: None };
        claimer.begin();
        claimer
    }

    /// From the beginning: asked for the first time, asked again, or killed and started again.
    fn begin(&mut self) {
        self.machine = Claiming::new("it", &self.claim);
        match self.machine.begin() {
            Step::Do(op) => self.next = Some(op),
            Step::End(_) => unreachable!("a claim looks first"),
        }
    }

    fn hear(&mut self, got: Got) {
        match self.machine.next(got) {
            Step::Do(op) => self.next = Some(op),
            Step::End(Ok(answer)) => {
                if let Some(before) = &self.told {
                    assert_eq!(*before, answer, "the answer to {:?} has changed", self.claim);
                }
                self.told = Some(answer);
                self.next = None;
            }
            Step::End(Err(_)) => self.next = None,
        }
    }
}

#[derive(Debug)]
struct Walk {
    /// A flaw that the walk must find: a link over a name that is taken.
    overwrites: bool,
    /// Where it has been: what lies behind is the same, whichever way led there.
    been: HashSet<u64>,
    ends: u64,
    most: [u64; 2],
}

/// Takes what `Debug` writes.
struct Hashed(DefaultHasher);

impl fmt::Write for Hashed {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

impl Walk {
    /// Every way on from here.
    fn on(&mut self, model: &Model, claimers: &[Claimer; 2], faults: u32) {
        let mut here = Hashed(DefaultHasher::new());
        (model, faults).hash(&mut here.0);
        write!(here, "{claimers:?}").unwrap();
        if !self.been.insert(here.0.finish()) {
            return;
        }
        let mut ended = true;
        for i in 0..2 {
            let Some(op) = claimers[i].next.clone() else {
                // What it was told stays, which is checked at the end; otherwise it asks again.
                if claimers[i].again > 0 && claimers[i].told.is_none() {
                    ended = false;
                    let mut claimers = claimers.clone();
                    claimers[i].again -= 1;
                    claimers[i].begin();
                    self.on(model, &claimers, faults);
                }
                continue;
            };
            ended = false;
            for fault in Fault::ALL {
                if !fault.can_hit(&op) || (fault != Fault::None && faults == 0) {
                    continue;
                }
                let left = faults - u32::from(fault != Fault::None);
                let (mut model, mut claimers) = (model.clone(), claimers.clone());
                if let (true, Op::Link { to, .. }) = (self.overwrites, &op) {
                    model.act(&Op::Remove { name: to.clone() }, Fault::None);
                }
                let got = model.act(&op, fault);
                claimers[i].hear(got);
                self.on(&model, &claimers, left);
            }
            // Killed after this operation, or before it: nobody hears what came of it.
            if faults > 0 && claimers[i].again > 0 {
                let (mut model, mut claimers) = (model.clone(), claimers.clone());
                model.act(&op, Fault::None);
                claimers[i].again -= 1;
                claimers[i].begin();
                self.on(&model, &claimers, faults - 1);
            }
        }
        if ended {
            self.check(model, claimers);
        }
    }

    fn check(&mut self, model: &Model, claimers: &[Claimer; 2]) {
        self.ends += 1;
        let won = |claimer: &Claimer| matches!(claimer.told, Some(Claimed::Yours(_)));
        assert!(!(won(&claimers[0]) && won(&claimers[1])), "two winners (I1)");
        for (i, claimer) in claimers.iter().enumerate() {
            self.most[i] += u64::from(won(claimer));
        }
        // Whoever asks once nothing goes wrong any more is told what everybody was told before.
        let mut model = model.clone();
        let mut winners = 0;
        for claimer in claimers {
            let answer = run(&mut model, Claiming::new("it", &claimer.claim)).expect("it can be known");
            winners += u32::from(matches!(answer, Claimed::Yours(_)));
            if let Some(told) = &claimer.told {
                assert_eq!(*told, answer, "{:?}", claimer.claim);
            }
        }
        assert_eq!(winners, 1, "exactly one of those who may is the owner in the end");
    }
}

/// Everything that can happen to two claimers of one offer who each ask up to five times, with up to six
/// things that go wrong.
fn walk(overwrites: bool) -> Walk {
    let mut model = owned_by_a();
    let offer = offer(1, 1, "a", "b");
    run(&mut model, Offering::migration("it", &offer, 10)).unwrap();
    let claimers = [Claimer::new(claim(&offer, "a"), 4), Claimer::new(claim(&offer, "b"), 4)];
    let mut walk = Walk { overwrites, been: HashSet::new(), ends: 0, most: [0; 2] };
    walk.on(&model, &claimers, 6);
    walk
}

#[test]
fn a_datastore_that_gave_a_name_twice_would_be_found_out() {
    std::panic::catch_unwind(|| walk(true)).expect_err("two winners go unnoticed");
}

#[test]
fn i1_of_two_claimers_at_most_one_wins_whatever_goes_wrong() {
    let walk = walk(false);
    let (states, [source, target]) = (walk.been.len(), walk.most);
    println!("{states} states, {} ends, won by the source in {source}, by the target in {target}", walk.ends);
    assert!(states > 10_000 && source > 0 && target > 0, "it was a walk: {states} states, {:?}", walk.most);
}

#[test]
fn an_offer_whose_source_dies_cannot_be_claimed_by_halves() {
    // Each operation of the offer, with each fault: afterwards the offer is whole, or nobody can claim by it.
    for fails in 0..12 {
        for fault in Fault::ALL {
            let mut model = owned_by_a();
            let offer = offer(1, 1, "a", "b");
            let mut machine = Offering::migration("it", &offer, 10);
            let (mut step, mut n) = (machine.begin(), 0);
            let done = loop {
                match step {
                    Step::Do(op) => {
                        let hit = n == fails && fault.can_hit(&op);
                        n += 1;
                        step = machine.next(model.act(&op, if hit { fault } else { Fault::None }));
                    }
                    Step::End(end) => break end.is_ok(),
                }
            };
            let target = run(&mut model, Claiming::new("it", &claim(&offer, "b")));
            if done {
                assert_eq!(target.unwrap(), Claimed::Yours(Epoch(2)), "operation {fails}, {fault:?}");
                // And said again, it is the same.
                let again = run(&mut model, Offering::migration("it", &offer, 50));
                assert!(again.is_err(), "it has been taken by now");
            } else {
                assert!(!matches!(target, Ok(Claimed::Lost(_))), "operation {fails}, {fault:?}");
            }
        }
    }
}

#[test]
fn a_directory_from_an_old_backup_decides_nothing() {
    let mut model = owned_by_a();
    let empty = Model::default();
    let before = model.clone();
    let offer = offer(1, 1, "a", "b");
    run(&mut model, Offering::migration("it", &offer, 10)).unwrap();
    for backup in [&empty, &before] {
        let mut model = model.clone();
        model.restore(backup);
        for claimer in ["a", "b"] {
            let error = run(&mut model, Claiming::new("it", &claim(&offer, claimer))).unwrap_err();
            assert!(error.to_string().contains("old backup"), "{error}");
        }
    }
    // The offer is there, and what it starts from is not.
    let mut part = model.clone();
    part.act(&Op::Remove { name: epoch_name(1) }, Fault::None);
    let error = run(&mut part, Claiming::new("it", &claim(&offer, "b"))).unwrap_err();
    assert!(error.to_string().contains("old backup"), "{error}");
    let error = run(&mut part, Offering::migration("it", &offer, 20)).unwrap_err();
    assert!(error.to_string().contains("old backup"), "{error}");
}

#[test]
fn what_is_no_record_decides_nothing() {
    let mut model = owned_by_a();
    let offer = offer(1, 1, "a", "b");
    run(&mut model, Offering::migration("it", &offer, 10)).unwrap();
    let good = model.content(&epoch_name(1)).unwrap().to_vec();
    for bad in [vec![], vec![0; 200], good[..good.len() / 2].to_vec(), good] {
        let mut model = model.clone();
        model.act(&Op::Make { name: epoch_name(2), content: bad }, Fault::None);
        for claimer in ["a", "b"] {
            let error = run(&mut model, Claiming::new("it", &claim(&offer, claimer))).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::InvalidData, "{error}");
        }
    }
}

/// A VM's life: who moves it, what goes wrong at which operation, and whether the loser asks late.
#[derive(Clone, Debug)]
struct Migration {
    to: usize,
    faults: Vec<(u8, u8)>,
    /// The source claims it back first, and the target comes late; or the other way round.
    source_first: bool,
    /// Nobody asks for long: the other one asks only at the very end.
    late: bool,
}

fn migration() -> impl Strategy<Value = Migration> {
    let faults = proptest::collection::vec((0..12_u8, 1..5_u8), 0..4);
    (0..3_usize, faults, any::<bool>(), any::<bool>())
        .prop_map(|(to, faults, source_first, late)| Migration { to, faults, source_first, late })
}

const HOSTS: [&str; 3] = ["a", "b", "c"];

struct Life {
    model: Model,
    owner: String,
    epoch: u64,
    /// Epoch → who was told that it is theirs.
    winners: BTreeMap<u64, String>,
    number: u128,
    faults: Vec<(u8, u8)>,
    operations: u8,
}

impl Life {
    /// Runs a machine among the faults of this migration; `None` where it is not known what came of it.
    fn try_run<M: Steps>(&mut self, mut machine: M) -> Option<M::Outcome> {
        let mut step = machine.begin();
        loop {
            match step {
                Step::Do(op) => {
                    let fault = self.faults.iter().find(|(at, _)| *at == self.operations);
                    let fault = fault.map_or(Fault::None, |(_, which)| Fault::ALL[usize::from(*which)]);
                    self.operations = self.operations.wrapping_add(1);
                    step = machine
                        .next(self.model.act(&op, if fault.can_hit(&op) { fault } else { Fault::None }));
                }
                Step::End(end) => return end.ok(),
            }
        }
    }

    fn ask(&mut self, claim: &Claim) -> Option<Claimed> {
        let answer = self.try_run(Claiming::new("it", claim))?;
        if let Claimed::Yours(epoch) = answer {
            let winner = self.winners.entry(epoch.0).or_insert_with(|| claim.claimer.clone());
            assert_eq!(*winner, claim.claimer, "two winners of epoch {epoch} (I1)");
        }
        Some(answer)
    }

    fn sweep(&mut self, offering: Option<(u64, MigrationId)>, fault: bool) {
        let stale = if fault { Fault::Blind } else { Fault::None };
        let Got::Names(names) = self.model.act(&Op::List, stale) else { return };
        for name in disposable(&names, offering) {
            if self.model.act(&Op::Remove { name }, Fault::None) != Got::Done {
                return;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn i1_a_vm_moved_about_for_long_has_one_owner_each_epoch(
        migrations in proptest::collection::vec(migration(), 1..14)
    ) {
        let mut life = Life {
            model: owned_by_a(), owner: "a".into(), epoch: 1, winners: BTreeMap::new(), number: 1000,
            faults: vec![],
            operations: 0,
        };
        let mut all = vec![];
        for (n, migration) in migrations.iter().enumerate() {
            let to = HOSTS[migration.to];
            if to == life.owner {
                continue;
            }
            life.faults = migration.faults.clone();
            life.operations = 0;
            life.number += 100;
            let offer = offer(n as u128 + 1, life.epoch, &life.owner, to);
            if life.try_run(Offering::migration("it", &offer, life.number)).is_none() {
                // No fence, no authorization: the guest goes on where it is.
                life.sweep(Some((life.epoch, offer.migration)), migration.late);
                continue;
            }
            life.sweep(Some((life.epoch, offer.migration)), migration.late);
            let (source, target) = (claim(&offer, &offer.from), claim(&offer, &offer.to));
            let (first, second) = if migration.source_first { (source, target) } else { (target, source) };
            for claim in [&first, &second] {
                if migration.late && *claim == second {
                    continue;
                }
                let answer = life.ask(claim);
                // Asked until it is known.
                life.faults.clear();
                let sure = life.ask(claim).expect("nothing goes wrong any more");
                prop_assert!(answer.is_none_or(|answer| answer == sure));
            }
            all.extend([first, second]);
            let record = Entry::decode(life.model.content(&epoch_name(life.epoch + 1)).unwrap(),
                &"it").unwrap();
            life.owner = record.owner;
            life.epoch += 1;
        }
        // Whoever asks now, for the first time or again, is told; and nobody wins what somebody else has won.
        life.faults.clear();
        for claim in all {
            prop_assert!(life.ask(&claim).is_some(), "it can be known: {:?}", claim);
        }
        let left = life.model.names().count();
        prop_assert!(left < 40, "files are swept: {left}");
    }
}
