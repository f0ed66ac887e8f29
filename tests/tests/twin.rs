//! A moved VM and its twin stay alike; `./dev twin` tries more of their lives, and longer ones.

use lab::{
    ensure, story,
    twin::{How, Twins, all, draw, interventions_that_hold, kept},
};

/// So many lives, and so long: two minutes on a quiet machine.
const SEQUENCES: u32 = 20;
const ACTIONS: usize = 20;

/// So many pairs at a time: each of them mostly waits.
const JOBS: usize = 2;

/// The same in each run of the tests; `./dev twin --seed` tries others.
const SEED: u64 = 11;

/// Of all interventions, as many as take a quarter of a minute.
const SAMPLE: usize = 8;

#[test]
fn i9_twins_stay_alike() {
    story("twins", &["a", "b"], |lab, tools| {
        let twins = Twins::new(lab, tools)?;
        all(&twins, &kept()?, How { jobs: JOBS, ..How::default() }).held()?;
        let how = How { jobs: JOBS, smallest: true, ..How::default() };
        let found = all(&twins, &draw(SEQUENCES, ACTIONS, SEED)?, how).held()?;
        ensure!(found.went.moved > SEQUENCES, "most of them were moved: {found:?}");
        Ok(())
    });
}

#[test]
fn i1_i9_others_may_act_at_any_moment_of_a_migration() {
    story("meddling", &["a", "b"], |lab, tools| {
        let twins = Twins::new(lab, tools)?;
        let those = interventions_that_hold();
        let sample: Vec<_> = those.iter().step_by(those.len() / SAMPLE).cloned().collect();
        all(&twins, &sample, How { jobs: JOBS, ..How::default() }).held().map(drop)
    });
}
