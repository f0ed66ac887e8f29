//! Where a downtime went. Both hosts say what they did and when; much of it overlaps. Each instant of the
//! downtime counts for one part only, so that the parts add up to it.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What is done while the guest stands still, in about this order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PausePart {
    /// `stop`, until QEMU says that the vCPUs stand still.
    Stop,
    /// The rest of `stop`: QEMU drains and flushes the disks.
    Drain,
    /// The tracker is asked what the guest wrote last.
    LastScan,
    /// The last round: until the target has all its pages in memory.
    LastPages,
    /// Post-copy: the target is told what it lacks, makes holes of it and begins to record it.
    Missing,
    /// Whether the VM is what it was when its migration began.
    Check,
    /// QEMU saves its device state.
    Save,
    /// QEMU as a whole is made to stand still.
    Freeze,
    /// The disks that QEMU does not flush itself.
    Flush,
    /// The saved state and QEMU's private RAM blocks are read.
    ReadState,
    /// A strict post-copy: what is missing reaches the datastore.
    Secure,
    /// `--verify`: the source hashes the memory.
    Hash,
    /// The device state is compressed and on its way.
    SendState,
    /// `--verify`: the target compares the memory.
    Compare,
    /// QEMU loads the device state.
    Load,
    /// What a restarted agent must know is made durable on the target.
    Record,
    /// The source waits until its offer is in the ownership record.
    Offer,
    /// No signal lets QEMU go on any more.
    Hold,
    /// The source fences itself, durably.
    Fence,
    /// The authorization is on its way.
    Authorize,
    /// The target claims the VM in the ownership record: the commit.
    Claim,
    /// QEMU activates the disks and lets the guest run.
    Resume,
    /// The network is told where the guest is. It runs by then.
    Announce,
    /// Nothing of the above, between two parts on the same host.
    Wait,
    /// Nothing of the above, between a part on one host and the next on the other.
    Link,
}

/// Where something is done.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// On the source.
    Source,
    /// On the target.
    Target,
    /// Begun on the source, over on the target.
    Both,
}

/// Something that was done, by one clock; in nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PauseStep {
    /// What.
    pub part: PausePart,
    /// Where.
    pub side: Side,
    /// When it began.
    pub began: i128,
    /// When it was over.
    pub ended: i128,
}

/// A part of a downtime.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct DowntimePart {
    /// What was done.
    pub part: PausePart,
    /// Where.
    pub side: Side,
    /// When it began first, in milliseconds from the beginning of the downtime.
    pub at_ms: f64,
    /// How much of the downtime it is that only this part accounts for. All parts' together are the downtime.
    pub ms: f64,
    /// How long it took altogether, also while something else was done that took longer, and after the guest
    /// ran.
    pub took_ms: f64,
}

/// Divides a downtime among what was done in it. Where several things were done at the same time, the instant
/// counts for the one that was over last: had it been quicker, the downtime had been shorter. What was over
/// before the downtime does not appear.
pub fn divide(steps: &[PauseStep], downtime: Range<i128>) -> Vec<DowntimePart> {
    let mut steps: Vec<PauseStep> =
        steps.iter().filter(|s| s.began <= s.ended && s.ended > downtime.start).copied().collect();
    steps.sort_by_key(|step| (step.began, step.ended, step.part, step.side));
    let mut edges: Vec<i128> = steps.iter().flat_map(|step| [step.began, step.ended]).collect();
    edges.retain(|edge| downtime.start < *edge && *edge < downtime.end);
    edges.extend([downtime.start, downtime.end]);
    edges.sort_unstable();
    let mut parts = Parts { begin: downtime.start, list: Vec::new() };
    for step in &steps {
        parts.add(step.part, step.side, step.began, 0, step.ended - step.began);
    }
    for edge in edges.windows(2).filter(|edge| edge[0] < edge[1]) {
        let (from, to) = (edge[0], edge[1]);
        let took = to - from;
        match at(&steps, from) {
            Some(step) => parts.add(step.part, step.side, step.began, took, 0),
            None => {
                let (part, side) = gap(&steps, from, to);
                parts.add(part, side, from, took, took);
            }
        }
    }
    parts.list.sort_by_key(|part| part.began);
    parts.list.iter().map(|part| part.told(downtime.start)).collect()
}

/// What this instant counts for.
fn at(steps: &[PauseStep], instant: i128) -> Option<&PauseStep> {
    let under_way = steps.iter().filter(|step| step.began <= instant && instant < step.ended);
    under_way.max_by_key(|step| (step.ended, step.began, step.part, step.side))
}

/// What nothing is done in is named for the hosts around it. A downtime begins on the source and ends on the
/// target.
fn gap(steps: &[PauseStep], from: i128, to: i128) -> (PausePart, Side) {
    let before = steps.iter().filter(|step| step.ended <= from).max_by_key(|step| step.ended);
    let after = steps.iter().filter(|step| step.began >= to).min_by_key(|step| step.began);
    let left = match before.map(|step| step.side) {
        None | Some(Side::Source) => Side::Source,
        Some(Side::Target | Side::Both) => Side::Target,
    };
    let next = match after.map(|step| step.side) {
        None | Some(Side::Target) => Side::Target,
        Some(Side::Source | Side::Both) => Side::Source,
    };
    if left == next { (PausePart::Wait, left) } else { (PausePart::Link, Side::Both) }
}

/// One for each part and side.
struct Parts {
    begin: i128,
    list: Vec<Sum>,
}

struct Sum {
    part: PausePart,
    side: Side,
    began: i128,
    share: i128,
    took: i128,
}

impl Parts {
    fn add(&mut self, part: PausePart, side: Side, began: i128, share: i128, took: i128) {
        let began = began.max(self.begin);
        match self.list.iter_mut().find(|sum| (sum.part, sum.side) == (part, side)) {
            Some(sum) => {
                sum.began = sum.began.min(began);
                sum.share += share;
                sum.took += took;
            }
            None => self.list.push(Sum { part, side, began, share, took }),
        }
    }
}

impl Sum {
    fn told(&self, begin: i128) -> DowntimePart {
        // To the nanosecond: rounded further they would not add up.
        let ms = |ns: i128| ns as f64 / 1e6;
        let Self { part, side, .. } = *self;
        DowntimePart { part, side, at_ms: ms(self.began - begin), ms: ms(self.share), took_ms: ms(self.took) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use PausePart::*;
    use proptest::prelude::*;

    fn step(part: PausePart, side: Side, ms: Range<i128>) -> PauseStep {
        PauseStep { part, side, began: ms.start * 1_000_000, ended: ms.end * 1_000_000 }
    }

    fn shares(steps: &[PauseStep], ms: Range<i128>) -> Vec<(PausePart, Side, f64)> {
        let parts = divide(steps, ms.start * 1_000_000..ms.end * 1_000_000);
        parts.iter().map(|part| (part.part, part.side, part.ms)).collect()
    }

    #[test]
    fn what_is_over_last_is_what_the_guest_waited_for() {
        use Side::{Both, Source, Target};
        // The device state is saved beside the last pages, and is over first.
        let slow_pages = [
            step(Stop, Source, 100..102),
            step(LastScan, Source, 102..103),
            step(LastPages, Both, 103..120),
            step(Save, Source, 102..110),
            step(SendState, Both, 111..113),
            step(Load, Target, 121..125),
            step(Fence, Source, 113..118),
            step(Announce, Target, 131..135),
        ];
        assert_eq!(
            shares(&slow_pages, 100..130),
            [
                (Stop, Source, 2.0),
                // Over before the device state: what it hides costs nothing.
                (LastScan, Source, 0.0),
                (Save, Source, 1.0),
                (LastPages, Both, 17.0),
                (SendState, Both, 0.0),
                (Fence, Source, 0.0),
                (Wait, Target, 6.0),
                (Load, Target, 4.0),
                (Announce, Target, 0.0),
            ]
        );
        // Nothing is known of the target: all of it is the link and what is behind it.
        let alone = [step(Stop, Source, 0..2), step(Fence, Source, 3..4)];
        let expected = [(Stop, Source, 2.0), (Wait, Source, 1.0), (Fence, Source, 1.0), (Link, Both, 6.0)];
        assert_eq!(shares(&alone, 0..10), expected);
        // Holes that were made while the guest ran are none of its downtime; a step that ends before it
        // begins, as clocks that are related badly may say, counts for nothing.
        let (before, wrong) = (step(Missing, Both, 0..10), PauseStep { began: 14, ended: 12, ..alone[0] });
        assert_eq!(shares(&[before, wrong], 10..12), [(Link, Both, 2.0)]);
        assert_eq!(shares(&alone, 5..5), []);
    }

    const SIDES: [Side; 3] = [Side::Source, Side::Target, Side::Both];
    const PARTS: [PausePart; 5] = [Stop, LastPages, Save, Load, Claim];

    fn any_step() -> impl Strategy<Value = PauseStep> {
        (0..PARTS.len(), 0..SIDES.len(), -20i128..60, -2i128..30).prop_map(|(part, side, began, took)| {
            PauseStep { part: PARTS[part], side: SIDES[side], began, ended: began + took }
        })
    }

    proptest! {
        /// Against looking at each instant for itself.
        #[test]
        fn parts_add_up_and_each_instant_counts_once(
            steps in prop::collection::vec(any_step(), 0..9),
            length in 0i128..50,
        ) {
            let parts = divide(&steps, 0..length);
            let ns = |ms: f64| (ms * 1e6).round() as i128;
            prop_assert_eq!(parts.iter().map(|part| ns(part.ms)).sum::<i128>(), length);
            let latest = |instant: i128| {
                let under_way = steps.iter().filter(|s| s.began <= instant && instant < s.ended);
                under_way.max_by_key(|s| (s.ended, s.began, s.part, s.side)).map(|s| (s.part, s.side))
            };
            for part in &parts {
                prop_assert!(part.at_ms >= 0.0 && part.ms <= part.took_ms, "{:?}", part);
                if !matches!(part.part, Wait | Link) {
                    let counts = (0..length).filter(|at| latest(*at) == Some((part.part, part.side)));
                    prop_assert_eq!(counts.count() as i128, ns(part.ms), "{:?}", part);
                }
            }
        }
    }
}
