//! Whether memory still arrives. A link may answer every small message and carry no large one; it is lost all
//! the same, however often it can be opened again.

use super::SourceDriver;
use crate::{Broken, conn::UNCONFIRMED, send::Streams};
use api::Phase;
use std::{
    io,
    time::{Duration, Instant},
};

/// So many confirmed bytes are memory that arrives, and not what connections say of themselves when they are
/// opened.
const ENOUGH: u64 = 16 << 10;

/// So many bytes that are not confirmed do not fit into a small packet.
const LARGE: u64 = 1400;

/// A link that is back has so long to show that it carries something.
const GRACE: Duration = Duration::from_secs(2);

/// What was seen of the streams so far.
pub(super) struct Progress {
    begun: Instant,
    judge: Judge,
    confirmed: u64,
    /// All of this round has arrived.
    received: u32,
}

/// What decides, by times since the beginning.
#[derive(Default)]
struct Judge {
    /// When something arrived last, and how much had by then.
    since: Duration,
    marked: u64,
    /// When the link was opened again last.
    back: Option<Duration>,
}

/// What is seen at a time.
struct Observation {
    now: Duration,
    /// Whether anything is on its way.
    wanted: bool,
    /// Bytes on connections with pages that the target has confirmed.
    confirmed: u64,
    /// When a small message was answered last.
    answered: Option<Duration>,
    /// Whether the other side's host would take more in: what waits is on the way, and not kept back.
    taken: bool,
}

/// Why nothing arrives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stuck {
    /// Small messages are answered.
    Large,
    /// The target's host answers, and the target takes nothing in.
    Target,
    /// Nothing is.
    All,
}

impl Judge {
    /// Whether nothing has arrived for so long that it is given up.
    fn look(&mut self, seen: &Observation, patience: Duration) -> Option<Stuck> {
        if !seen.wanted || seen.confirmed >= self.marked + ENOUGH {
            (self.since, self.marked) = (seen.now, seen.confirmed);
        }
        let early = self.back.is_some_and(|back| seen.now < back + GRACE);
        if early || seen.now.saturating_sub(self.since) < patience {
            return None;
        }
        // Answered in the second half of that time: not only before the link was lost.
        let answered = seen.answered.is_some_and(|at| at > self.since + patience / 2);
        Some(match (answered, seen.taken) {
            (false, _) => Stuck::All,
            (true, true) => Stuck::Large,
            (true, false) => Stuck::Target,
        })
    }
}

impl Progress {
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), judge: Judge::default(), confirmed: 0, received: 0 }
    }

    /// All of a round has arrived.
    pub(super) fn received(&mut self, round: u32) {
        self.received = self.received.max(round);
    }

    /// The link is open again.
    pub(super) fn link_is_back(&mut self) {
        self.judge.back = Some(self.begun.elapsed());
    }
}

impl SourceDriver {
    /// Counts what the streams have carried.
    pub(super) fn count_confirmed(&mut self) {
        if let Some(streams) = &mut self.streams {
            self.progress.confirmed += streams.newly_confirmed();
        }
    }

    /// Why the connection to the target was lost, as far as it can be seen from here.
    pub(super) fn why_lost(&self, e: &io::Error) -> String {
        let waits =
            self.control.as_ref().and_then(|conn| conn.queue().ok()).map_or(0, |queue| queue.unconfirmed);
        // All that is said before is small.
        if self.phase() == Phase::Preflight && waits >= LARGE && self.heard.last().is_some() {
            return format!(
                "{e}; small packets passed before, and what was said last is large: if that happens again, \
                 look at the MTU of everything on the way"
            );
        }
        e.to_string()
    }

    /// Fails if nothing has arrived for as long as a lost link would be waited for.
    pub(super) fn look_at_progress(&mut self) -> Result<(), Broken> {
        self.count_confirmed();
        let patience = self.options.give_up.max(UNCONFIRMED);
        // What goes by way of a file arrives otherwise.
        let by_file = self.options.spool.is_some();
        let moving = self.phase() == Phase::PreCopy && self.link.is_up() && !self.stopped && !by_file;
        let progress = &mut self.progress;
        let seen = Observation {
            now: progress.begun.elapsed(),
            wanted: moving && self.current.as_ref().is_some_and(|round| round.number > progress.received),
            confirmed: progress.confirmed,
            answered: self.heard.last().map(|at| at.saturating_duration_since(progress.begun)),
            taken: self.streams.as_ref().is_none_or(Streams::is_on_the_way),
        };
        let Some(stuck) = progress.judge.look(&seen, patience) else { return Ok(()) };
        let time = patience.as_secs_f64();
        let why = match stuck {
            Stuck::Large => format!(
                "nothing of the guest's memory has arrived for {time} s (--give-up): small packets pass, \
                 large ones do not: MTU. Something on the way carries less than both ends believe; ping -M \
                 do -s SIZE shows how much"
            ),
            Stuck::Target => format!(
                "nothing of the guest's memory was taken in there for {time} s (--give-up), although the \
                 target answers"
            ),
            Stuck::All => format!("nothing of the guest's memory has arrived for {time} s (--give-up)"),
        };
        Err(Broken::new("the connection to the target", why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// What is decided last of looks at (second, confirmed KiB, second of the last answer); at `idle` seconds
    /// nothing was on its way.
    fn judged(looks: &[(u64, u64, Option<u64>)], back: Option<u64>, idle: &[u64]) -> Option<Stuck> {
        let mut judge = Judge { back: back.map(Duration::from_secs), ..Judge::default() };
        let look = |judge: &mut Judge, (now, kib, answered): (u64, u64, Option<u64>)| {
            let seen = Observation {
                now: Duration::from_secs(now),
                wanted: !idle.contains(&now),
                confirmed: kib << 10,
                answered: answered.map(Duration::from_secs),
                taken: kib != 7,
            };
            judge.look(&seen, PATIENCE)
        };
        looks.iter().map(|seen| look(&mut judge, *seen)).find(Option::is_some).flatten()
    }

    #[test]
    fn a_link_without_progress_is_given_up_for_what_was_seen() {
        let large = Some(Stuck::Large);
        // It never carried anything, and answers.
        assert_eq!(judged(&[(1, 0, Some(1)), (9, 3, Some(9)), (10, 3, Some(10))], None, &[]), large);
        // What connections say of themselves when they are opened is nothing, however often.
        assert_eq!(
            judged(&[(3, 4, Some(3)), (6, 8, Some(6)), (9, 12, Some(9)), (12, 15, Some(11))], None, &[]),
            large
        );
        // What was sent is taken in no more.
        assert_eq!(judged(&[(1, 0, Some(1)), (10, 7, Some(10))], None, &[]), Some(Stuck::Target));
        // It does not even answer, or did long ago.
        assert_eq!(judged(&[(1, 0, None), (10, 0, None)], None, &[]), Some(Stuck::All));
        assert_eq!(judged(&[(1, 0, Some(1)), (10, 0, Some(2))], None, &[]), Some(Stuck::All));
        // It carries a little now and then.
        assert_eq!(judged(&[(9, 16, None), (18, 32, None), (27, 48, None)], None, &[]), None);
        assert_eq!(judged(&[(9, 16, Some(9)), (19, 31, Some(19))], None, &[]), large);
        // Nothing was on its way meanwhile.
        assert_eq!(judged(&[(9, 0, Some(9)), (18, 0, Some(18))], None, &[9]), None);
        // It is back just now.
        assert_eq!(judged(&[(9, 0, None), (11, 0, Some(11))], Some(10), &[]), None);
        assert_eq!(judged(&[(9, 0, None), (12, 0, Some(11))], Some(10), &[]), large);
    }
}
