//! Where the downtime went: what this side did and what the target says that it did, by this side's clock.

use crate::pause::{MAX_STEPS, PauseLog, Timed};
use policy::{DowntimePart, PausePart, PauseStep, Side, divide};
use proto::control::{Step, step::Part};
use std::ops::Range;

/// The target's steps; the marks among them end what began here.
fn name(part: Part) -> Option<PausePart> {
    Some(match part {
        Part::Unknown | Part::RoundReceived | Part::StateHeard | Part::AuthorizeHeard => return None,
        Part::Missing => PausePart::Missing,
        Part::Compare => PausePart::Compare,
        Part::Load => PausePart::Load,
        Part::Record => PausePart::Record,
        Part::Claim => PausePart::Claim,
        Part::Resume => PausePart::Resume,
        Part::Announce => PausePart::Announce,
    })
}

/// By which word of the target something is over that began here.
fn ends_there(part: PausePart) -> Option<Part> {
    match part {
        PausePart::LastPages => Some(Part::RoundReceived),
        PausePart::SendState => Some(Part::StateHeard),
        PausePart::Authorize => Some(Part::AuthorizeHeard),
        _ => None,
    }
}

/// The parts of a downtime. `theirs` comes from the peer: what is not known of it, or cannot be, counts for
/// nothing. `to_here`: an instant of its clock on this side's.
pub(super) fn parts(
    ours: &PauseLog<PausePart>,
    theirs: &[Step],
    to_here: impl Fn(u64) -> Option<i128>,
    downtime: Range<i128>,
) -> Vec<DowntimePart> {
    let theirs = &theirs[..theirs.len().min(MAX_STEPS)];
    let last = |part: Part| {
        let step = theirs.iter().rfind(|step| step.part() == part)?;
        to_here(step.ended_ns)
    };
    let here = |(n, step): (usize, &Timed<PausePart>)| {
        let (part, began, ended) = (step.part, i128::from(step.began), i128::from(step.ended));
        // What was done several times ended there the last time only.
        let is_last = !ours.steps()[n + 1..].iter().any(|later| later.part == part);
        let there = ends_there(part).filter(|_| is_last).and_then(&last);
        let side = if there.is_some() { Side::Both } else { Side::Source };
        // Clocks are related as well as half a round trip: nothing is heard before it is said.
        PauseStep { part, side, began, ended: there.map_or(ended, |there| there.max(began)) }
    };
    let there = |step: &Step| {
        let (part, began, ended) = (name(step.part())?, to_here(step.began_ns)?, to_here(step.ended_ns)?);
        Some(PauseStep { part, side: Side::Target, began, ended })
    };
    let ours = ours.steps().iter().enumerate().map(here);
    let steps: Vec<PauseStep> = ours.chain(theirs.iter().filter_map(there)).collect();
    divide(&steps, downtime)
}

#[cfg(test)]
mod tests {
    use super::*;
    use PausePart::*;

    #[test]
    fn what_begins_here_ends_by_the_targets_word() {
        let mut ours = PauseLog::default();
        for (part, began, ended) in [
            (LastPages, 0, 10),
            (LastPages, 10, 30),
            (SendState, 30, 31),
            (Fence, 31, 35),
            (Authorize, 35, 36),
        ] {
            ours.add(part, began, ended);
        }
        // Its clock is 1000 ahead.
        let to_here = |ns: u64| Some(i128::from(ns) - 1000);
        let step = |part: Part, began: u64, ended: u64| Step {
            part: part.into(),
            began_ns: 1000 + began,
            ended_ns: 1000 + ended,
        };
        let theirs = [
            step(Part::RoundReceived, 28, 28),
            step(Part::StateHeard, 33, 33),
            step(Part::Load, 33, 37),
            step(Part::AuthorizeHeard, 38, 38),
            step(Part::Claim, 38, 44),
            step(Part::Resume, 45, 50),
            Step { part: 4711, began_ns: 1000, ended_ns: 1050 },
        ];
        let told = |theirs: &[Step]| -> Vec<_> {
            let parts = parts(&ours, theirs, to_here, 0..50);
            parts.iter().map(|p| (p.part, p.side, (p.ms * 1e6).round() as u64)).collect()
        };
        let expected = [
            (LastPages, Side::Source, 10),
            (LastPages, Side::Both, 18),
            (Link, Side::Both, 0),
            (SendState, Side::Both, 1),
            (Fence, Side::Source, 0),
            (Load, Side::Target, 2),
            (Authorize, Side::Both, 3),
            (Claim, Side::Target, 6),
            (Resume, Side::Target, 5),
        ];
        let (all, alone) = (told(&theirs), told(&[]));
        for (part, side, _) in expected {
            let there = all.iter().any(|told| (told.0, told.1) == (part, side));
            assert!(there || part == Link, "{part:?} is missing: {all:?}");
        }
        assert_eq!(all.iter().map(|told| told.2).sum::<u64>(), 50, "{all:?}");
        // One that says nothing of it, as an older one: the rest is the link, and what is behind it.
        assert!(alone.contains(&(Link, Side::Both, 14)), "{alone:?}");
        // A hostile one.
        let many = vec![step(Part::Load, u64::MAX - 2000, 0); 10_000];
        assert_eq!(told(&many).iter().map(|told| told.2).sum::<u64>(), 50);
    }
}
