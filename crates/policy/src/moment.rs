//! Whether the guest is stopped now, or at a moment at which its disks have less to do.

use crate::disks::Disks;
use std::time::Duration;

/// A stop waits so long for disks whatever there is to gain: a shorter wait is none that anybody notices.
const SHORT: Duration = Duration::from_millis(2);

/// A request of which no more than one part in so many is left is nearly over. Where requests follow each
/// other closely, the next one is under way an instant later.
const NEARLY: u32 = 16;

/// From the decision to the stop it takes up to so long, most of it the journal. A request that is over by
/// then is none to wait for; what is left of it is waited for just before the stop.
const LEAD: Duration = Duration::from_millis(40);

/// So many times as long as a request takes a moment is waited for: disks that leave gaps at all have had
/// some by then.
const PATIENT: u32 = 5;

/// But no shorter than that, and no longer.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(20));

/// How often the disks are looked at: a moment is as long as a request at least, where somebody reads and
/// writes one after the other.
const LOOKS: u32 = 40;

/// But not closer together than that, and no further apart. A look takes up to a millisecond of QEMU's time.
const EVERY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(50));

/// Looks take one part in so many of the time, at most.
const PART: u32 = 10;

/// A guest that is to be stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stopping {
    /// The longest pause.
    pub limit: Duration,
    /// What the pause takes besides the disks.
    pub pause: Duration,
    /// How long a moment has been waited for in this migration.
    pub waited: Duration,
    /// How much time there is until it has to be stopped, if there is such an end.
    pub left: Option<Duration>,
    /// How long the last look at the disks took.
    pub look: Duration,
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moment {
    /// Nothing is to be gained by waiting.
    Now,
    /// No better moment came in time.
    Late,
    /// Look again after this time.
    Later(Duration),
}

impl Stopping {
    /// What of the pause is left for requests that are under way.
    fn allowed(&self, disks: &Disks) -> Duration {
        let flush = Duration::from_secs_f64(disks.flush());
        let nearly = Duration::from_secs_f64(disks.request()) / NEARLY;
        self.limit.saturating_sub(self.pause).saturating_sub(flush).max(SHORT).max(nearly)
    }

    /// Whether the disks are so quick that no moment is better than another. Then nobody need look at them.
    pub fn any_moment(&self, disks: &Disks) -> bool {
        Duration::from_secs_f64(disks.request()) <= self.allowed(disks)
    }

    /// How long a moment is waited for in this migration.
    pub fn patience(&self, disks: &Disks) -> Duration {
        let usual = Duration::from_secs_f64(disks.request() * f64::from(PATIENT));
        let usual = usual.clamp(PATIENCE.0, PATIENCE.1);
        self.left.map_or(usual, |left| usual.min(self.waited + left))
    }

    /// By what has just been seen of the disks.
    pub fn moment(&self, disks: &Disks) -> Moment {
        let under_way = Duration::from_secs_f64(disks.under_way());
        if self.any_moment(disks) || under_way <= self.allowed(disks) + LEAD {
            return Moment::Now;
        }
        if self.waited >= self.patience(disks) {
            return Moment::Late;
        }
        let every = Duration::from_secs_f64(disks.request()) / LOOKS;
        Moment::Later(every.clamp(EVERY.0, EVERY.1).max(self.look * (PART - 1)))
    }

    /// The guest is about to be stopped: after so long what is under way is over in time, if it is soon.
    pub fn soon(&self, disks: &Disks) -> Option<Duration> {
        let wait = Duration::from_secs_f64(disks.under_way()).saturating_sub(self.allowed(disks));
        (!wait.is_zero() && wait <= 2 * LEAD).then_some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Moment::{Late, Later, Now};
    use units::{Disk, Queued, Requests};

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A disk of which a request takes so long, and the latest has been under way for so long; none: it is
    /// quiet. A flush takes so long.
    fn disk(request: u64, latest: Option<u64>, flush: u64) -> Disks {
        let requests = |done: u64, each| Requests { done, took: ms(done * each) };
        let look = |done, begun, in_flight| Disk {
            name: "d".into(),
            writes: requests(done, request),
            flushes: requests(done, flush),
            queued: Some(Queued { begun, in_flight }),
            ..Disk::default()
        };
        let mut disks = Disks::default();
        disks.see(ms(0), vec![look(1, 1, 0)]);
        disks.see(ms(5000), vec![look(9, 9, 0)]);
        disks.see(ms(5000), vec![look(9, 9, 0)]);
        if let Some(latest) = latest {
            disks.see(ms(5000), vec![look(9, 10, 1)]);
            disks.see(ms(5000 + latest), vec![look(9, 10, 1)]);
        }
        disks
    }

    #[test]
    fn a_guest_is_stopped_when_its_disks_are_quiet_or_patience_ends() {
        let table = [
            // Quick disks: whatever they do.
            (5, Some(0), 0, 0, None, Now),
            // Slow ones: not in the middle of a request.
            (400, None, 0, 0, None, Now),
            (400, Some(0), 0, 0, None, Later(ms(10))),
            (400, Some(100), 0, 1999, None, Later(ms(10))),
            (400, Some(100), 0, 2000, None, Late),
            // Nearly over: 10 ms of the pause are for disks, or a sixteenth of a request, and the stop takes
            // a while.
            (100, Some(49), 0, 0, None, Later(ms(10))),
            (100, Some(50), 0, 0, None, Now),
            (400, Some(334), 0, 0, None, Later(ms(10))),
            (400, Some(335), 0, 0, None, Now),
            // A flush takes what was left for requests.
            (100, Some(50), 90, 0, None, Later(ms(10))),
            (100, Some(54), 90, 0, None, Now),
            // Longer than any other: nobody knows how much longer.
            (400, Some(500), 0, 0, None, Later(Duration::from_micros(12_500))),
            // Patience has its bounds.
            (60, Some(0), 0, 299, None, Later(ms(10))),
            (60, Some(0), 0, 300, None, Late),
            (9000, Some(0), 0, 19_999, None, Later(ms(50))),
            (9000, Some(0), 0, 20_000, None, Late),
            // So has a migration.
            (400, Some(0), 0, 100, Some(1), Later(ms(10))),
            (400, Some(0), 0, 100, Some(0), Late),
            (400, None, 0, 100, Some(0), Now),
        ];
        for (request, latest, flush, waited, left, expected) in table {
            let stopping = Stopping {
                limit: ms(20),
                pause: ms(10),
                waited: ms(waited),
                left: left.map(ms),
                look: Duration::ZERO,
            };
            let got = stopping.moment(&disk(request, latest, flush));
            assert_eq!(got, expected, "{request} {latest:?} {flush} {waited} {left:?}");
        }
    }

    #[test]
    fn looks_that_take_long_are_rare_and_quick_disks_need_none() {
        let stopping = Stopping { limit: ms(20), pause: ms(10), look: ms(20), ..Stopping::default() };
        assert_eq!(stopping.moment(&disk(400, Some(0), 0)), Later(ms(180)));
        assert!(stopping.any_moment(&disk(9, Some(0), 0)) && !stopping.any_moment(&disk(11, None, 0)));
        assert!(stopping.any_moment(&Disks::default()));
        // No longer than the limit allows anyway.
        let patient = Stopping { limit: ms(500), ..stopping };
        assert!(patient.any_moment(&disk(400, Some(0), 0)));
    }

    #[test]
    fn just_before_the_stop_only_what_ends_soon_is_waited_for() {
        let stopping = Stopping { limit: ms(20), pause: ms(10), ..Stopping::default() };
        for (latest, expected) in
            [(None, None), (Some(395), None), (Some(370), Some(5)), (Some(300), Some(75)), (Some(290), None)]
        {
            let soon = stopping.soon(&disk(400, latest, 0));
            assert_eq!(soon.map(|wait| wait.as_millis() as u64), expected, "{latest:?}");
        }
    }
}
