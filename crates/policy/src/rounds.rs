//! After each round of pre-copy: another one, the switchover, or post-copy?

use std::time::Duration;
use units::{Bytes, Rate};

/// What the last rounds showed.
#[derive(Clone, Debug, Default)]
pub struct RoundsSoFar {
    /// What the guest wrote during each round so far, oldest first; the last entry is what is dirty now.
    pub dirtied: Vec<Bytes>,
    /// How fast memory moves.
    pub rate: Rate,
    /// What a switchover costs besides moving dirty memory: stop, device state, claim, start.
    pub fixed: Duration,
}

/// What the user wants.
#[derive(Clone, Debug)]
pub struct Budget {
    /// The longest acceptable downtime.
    pub downtime: Duration,
    /// Whether the guest may run before all its memory is there.
    pub post_copy: bool,
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// Another round will help.
    Round,
    /// Another round, although rounds have stopped paying: the user should know that there is no end in
    /// sight.
    Hopeless,
    /// Stop the guest, send the rest, start it there.
    Switchover,
    /// Stop the guest, start it there, send the rest.
    PostCopy,
}

/// A round pays when it leaves at most this share of what the one before left. 9/10 and not less, so that
/// slow convergence is still convergence; after `PATIENCE` rounds that did not pay there is none.
/// Table-tested below.
const PAYS: (u64, u64) = (9, 10);

/// One round may fail to pay because the guest had a busy moment. Three in a row are its habit.
const PATIENCE: usize = 3;

/// How long the guest would pause if it were stopped now; `None` when nothing moves.
pub fn predicted_downtime(seen: &RoundsSoFar) -> Option<Duration> {
    let dirty = seen.dirtied.last().copied().unwrap_or_default();
    let moving = if dirty == Bytes(0) { Duration::ZERO } else { dirty.time_at(seen.rate)? };
    Some(moving + seen.fixed)
}

/// With so much time left until a promised end: whether the guest has to be stopped now, for this pause.
/// Another round takes as long as it moves, and leaves something for another pause.
pub fn must_stop(left: Duration, pause: Option<Duration>) -> bool {
    pause.is_some_and(|pause| pause + pause / 2 >= left)
}

/// What to do after a round.
pub fn next(seen: &RoundsSoFar, want: &Budget) -> Next {
    let fits = predicted_downtime(seen).is_some_and(|pause| pause <= want.downtime);
    match (fits, pays(&seen.dirtied)) {
        (true, _) => Next::Switchover,
        (false, true) => Next::Round,
        (false, false) if want.post_copy => Next::PostCopy,
        (false, false) => Next::Hopeless,
    }
}

/// Whether one of the last rounds left clearly less than the best before it.
fn pays(dirtied: &[Bytes]) -> bool {
    if dirtied.len() <= PATIENCE {
        return true;
    }
    let (before, last) = dirtied.split_at(dirtied.len() - PATIENCE);
    let best = before.iter().min().map_or(0, |b| b.0);
    last.iter().any(|left| left.0 * PAYS.1 <= best * PAYS.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn after(dirtied_mib: &[u64], post_copy: bool) -> Next {
        let seen = RoundsSoFar {
            dirtied: dirtied_mib.iter().map(|m| Bytes(m * MIB)).collect(),
            rate: Rate(1000 * MIB),
            fixed: Duration::from_millis(8),
        };
        next(&seen, &Budget { downtime: Duration::from_millis(20), post_copy })
    }

    #[test]
    fn the_next_step_follows_from_what_rounds_left() {
        use Next::*;
        let table: &[(&[u64], bool, Next)] = &[
            (&[], false, Switchover),                       // nothing was ever dirty
            (&[12], false, Switchover), // 12 ms of memory and 8 ms of the rest: fits exactly
            (&[13], false, Round),      // one more does not
            (&[500, 250, 120, 60], false, Round), // shrinking
            (&[500, 400, 400, 400], false, Round), // shrank lately
            (&[500, 400, 400, 400, 400], false, Hopeless), // three rounds without gain
            (&[500, 400, 400, 400, 400], true, PostCopy), // the user allows the other way
            (&[100, 300, 200, 60], false, Round), // a busy moment, then better than ever
            (&[100, 300, 200, 95], true, PostCopy), // better than its worst, not than its best
            (&[500, 400, 400, 400, 11], false, Switchover), // a quiet moment is taken
        ];
        for (dirtied, post_copy, want) in table {
            assert_eq!(after(dirtied, *post_copy), *want, "{dirtied:?}");
        }
    }

    #[test]
    fn a_stalled_link_predicts_nothing() {
        let seen = RoundsSoFar { dirtied: vec![Bytes(1)], rate: Rate(0), fixed: Duration::ZERO };
        assert_eq!(predicted_downtime(&seen), None);
    }
}
