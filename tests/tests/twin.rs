//! A moved VM and its twin stay alike; `./dev twin` tries more of their lives, and longer ones.

use lab::{
    ensure, story,
    twin::{Twins, interventions_that_hold, kept, search},
};

/// So many lives, and so long: half a minute on a quiet machine.
const SEQUENCES: u32 = 12;
const ACTIONS: usize = 8;

/// The same in each run of the tests; `./dev twin --seed` tries others.
const SEED: u64 = 11;

/// Of all interventions, as many as take a quarter of a minute.
const SAMPLE: usize = 8;

#[test]
fn i9_twins_stay_alike() {
    story("twins", &["a", "b"], |lab, tools| {
        let mut twins = Twins::new(lab, tools)?;
        for sequence in kept()? {
            twins.live(&sequence)?;
        }
        let found = search(&mut twins, SEQUENCES, ACTIONS, SEED)?;
        ensure!(found.went.moved > SEQUENCES, "most of them were moved: {found:?}");
        Ok(())
    });
}

#[test]
fn i1_i9_others_may_act_at_any_moment_of_a_migration() {
    story("meddling", &["a", "b"], |lab, tools| {
        let mut twins = Twins::new(lab, tools)?;
        let all = interventions_that_hold();
        let every = all.len() / SAMPLE;
        for sequence in all.iter().step_by(every) {
            twins.live(sequence)?;
        }
        Ok(())
    });
}
