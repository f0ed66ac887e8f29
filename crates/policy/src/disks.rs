//! How long a stop waits for the guest's disks. QEMU drains them when it stops the guest, and then has what
//! was written made durable: nothing of that can be shortened, but it depends on the moment.

use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};
use units::{Disk, Requests};

/// So long it is believed that a disk is as slow as it was: one slow moment is forgotten some time, and a
/// burst of slow requests is not forgotten in the next gap.
const BELIEVED: Duration = Duration::from_secs(10);

/// What a disk has done is taken together for so long at least.
const SPAN: Duration = Duration::from_millis(100);

/// A disk that is so much quicker than what a stop waits for says nothing of how often that is busy.
const QUICK: f64 = 0.25;

/// Disks that are busy for so much of the time leave no moment to wait for.
const BUSY: f64 = 0.8;

/// Of a request that began between two looks further apart than that, nobody knows when it did.
const CLOSE: Duration = Duration::from_millis(60);

/// No request takes longer than an hour, whatever is said: sums of such times are still times.
const LONGEST: f64 = 3600.0;

/// What a stop waits for the disks.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Drain {
    /// How long, if it meets the disks at work, in seconds.
    pub wait: f64,
    /// For which part of the time they are.
    pub busy: f64,
}

impl Drain {
    /// How long it takes most likely, in seconds: disks that are not always busy are stopped between two of
    /// their requests.
    pub fn likely(&self) -> f64 {
        if self.busy >= BUSY { self.wait } else { 0.0 }
    }
}

/// The disks of a guest, as they are looked at now and then.
#[derive(Clone, Debug, Default)]
pub struct Disks {
    at: Duration,
    disks: BTreeMap<String, Followed>,
}

#[derive(Clone, Debug)]
struct Followed {
    last: Disk,
    at: Duration,
    /// When its latest request began, as far as that was seen, and whether it was seen closely. If so, it
    /// began no earlier: it is over sooner than it seems rather than later, when the next one is under way.
    newest: (Duration, bool),
    /// Whether it had nothing to do at two looks in a row, and began nothing in between: where requests
    /// follow each other closely, one look may well fall between two of them.
    quiet: bool,
    /// What had been done by when the next span began.
    span: ([Requests; 3], Duration),
    spans: VecDeque<Span>,
}

/// What a disk did for a while, in seconds.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    ended: Duration,
    lasted: f64,
    /// How long a request took, of the slowest kind.
    request: f64,
    /// How long one has taken that was not done in it, where none was.
    waited: f64,
    /// How long it takes to make durable what was written in it.
    flush: f64,
    /// For how much of it requests were under way.
    busy: f64,
}

impl Disks {
    /// So they are now, `at` since some beginning.
    pub fn see(&mut self, at: Duration, looks: Vec<Disk>) {
        self.at = at;
        let mut before = std::mem::take(&mut self.disks);
        for look in looks {
            let disk = match before.remove(&look.name) {
                Some(disk) => disk.then(at, look.clone()),
                None => Followed::new(at, look.clone()),
            };
            self.disks.insert(look.name, disk);
        }
    }

    /// What a stop waits for at any moment.
    pub fn drain(&self) -> Drain {
        let request = self.request();
        let slow = self.disks.values().filter(|disk| disk.request() >= QUICK * request);
        Drain { wait: request + self.flush(), busy: slow.map(Followed::busy).fold(0.0, f64::max) }
    }

    /// How long a request takes, of the slowest disk, in seconds.
    pub(crate) fn request(&self) -> f64 {
        self.disks.values().map(Followed::request).fold(0.0, f64::max)
    }

    /// How long it takes to make durable what was written, one disk after the other, in seconds.
    pub(crate) fn flush(&self) -> f64 {
        self.disks.values().map(Followed::flush).sum::<f64>().min(LONGEST)
    }

    /// How long a stop now would wait for what is under way, in seconds; as far as that is known.
    pub fn under_way(&self) -> f64 {
        self.disks.values().map(Followed::left).fold(0.0, f64::max)
    }
}

impl Followed {
    fn new(at: Duration, look: Disk) -> Self {
        let span = (look.done(), at);
        Self { last: look, at, newest: (at, false), quiet: false, span, spans: VecDeque::new() }
    }

    fn then(mut self, at: Duration, look: Disk) -> Self {
        let before = self.last.queued.unwrap_or_default().begun;
        let began = look.queued.unwrap_or_default().begun != before;
        let idle = |look: &Disk| look.queued.is_none_or(|queued| queued.in_flight == 0);
        self.quiet = idle(&self.last) && idle(&look) && !began;
        if began {
            let closely = at.saturating_sub(self.at) <= CLOSE;
            self.newest = (if closely { self.at } else { at }, closely);
        }
        (self.last, self.at) = (look, at);
        let (done, since) = self.span;
        if at >= since + SPAN {
            self.spans.push_back(self.did(done, since));
            self.span = (self.last.done(), at);
            self.spans.retain(|span| span.ended + BELIEVED >= at);
        }
        self
    }

    /// What it did since then.
    fn did(&self, done: [Requests; 3], since: Duration) -> Span {
        let lasted = self.at.saturating_sub(since).as_secs_f64();
        let now = self.last.done();
        let all @ [_, writes, flushes] = [0, 1, 2].map(|kind| now[kind].since(done[kind]));
        let mut span = Span {
            ended: self.at,
            lasted,
            request: all.into_iter().filter_map(Requests::each).fold(0.0, f64::max),
            waited: 0.0,
            flush: 0.0,
            busy: all.iter().map(|kind| kind.took.as_secs_f64()).sum::<f64>().min(lasted),
        };
        if writes.done > 0 {
            span.flush = flushes.each().or(self.last.flushes.each()).unwrap_or_default();
        }
        if all.iter().all(|kind| kind.done == 0) && self.has_work() {
            // Nothing was done, but there is something to do: it takes at least as long as it has taken.
            let waited = self.at.saturating_sub(self.newest.0).as_secs_f64();
            span = Span { request: usual(&self.last), waited, busy: lasted, ..span };
        }
        span
    }

    /// How long a request takes, by those that were done.
    fn done_in(&self) -> f64 {
        // One that was looked at once: as ever before.
        if self.spans.is_empty() && self.has_work() {
            return usual(&self.last);
        }
        self.spans.iter().map(|span| span.request).fold(0.0, f64::max).min(LONGEST)
    }

    /// How long a request takes, or has taken so far.
    fn request(&self) -> f64 {
        self.spans.iter().map(|span| span.waited).fold(self.done_in(), f64::max).min(LONGEST)
    }

    fn has_work(&self) -> bool {
        self.last.queued.is_some_and(|queued| queued.in_flight > 0)
    }

    fn flush(&self) -> f64 {
        self.spans.iter().map(|span| span.flush).fold(0.0, f64::max).min(LONGEST)
    }

    fn busy(&self) -> f64 {
        let lasted: f64 = self.spans.iter().map(|span| span.lasted).sum();
        let busy: f64 = self.spans.iter().map(|span| span.busy).sum();
        if lasted > 0.0 { (busy / lasted).min(1.0) } else { 0.0 }
    }

    /// How much longer its latest request takes. One that takes longer than others do may take as long again.
    fn left(&self) -> f64 {
        if self.quiet || self.last.queued.is_none() {
            return 0.0;
        }
        if !self.has_work() {
            return self.request();
        }
        let (began, closely) = self.newest;
        let (takes, took) = (self.request(), self.at.saturating_sub(began).as_secs_f64());
        if closely && took <= self.done_in() { self.done_in() - took } else { takes }
    }
}

/// How long a request took since QEMU began, of the slowest kind.
fn usual(look: &Disk) -> f64 {
    look.done().into_iter().filter_map(Requests::each).fold(0.0, f64::max).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use units::Queued;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A disk that has done so many reads, writes and flushes, each of so many milliseconds, and has so many
    /// requests under way of those that it began.
    fn disk(name: &str, done: [(u64, u64); 3], queued: Option<(u64, u64)>) -> Disk {
        let [reads, writes, flushes] = done.map(|(done, each)| Requests { done, took: ms(done * each) });
        let queued = queued.map(|(begun, in_flight)| Queued { begun, in_flight });
        Disk { name: name.into(), reads, writes, flushes, queued }
    }

    fn seen(looks: &[(u64, Vec<Disk>)]) -> Disks {
        let mut disks = Disks::default();
        looks.iter().for_each(|(at, looks)| disks.see(ms(*at), looks.clone()));
        disks
    }

    #[test]
    fn a_stop_waits_for_the_slowest_request_and_all_flushes() {
        let none = (0, 0);
        let a = |reads, writes, flushes| disk("a", [reads, writes, flushes], None);
        let table = [
            // Nothing is known, or nothing is done.
            (vec![], (0.0, 0.0)),
            (vec![(0, vec![a((9, 500), none, none)])], (0.0, 0.0)),
            (vec![(0, vec![a((9, 500), none, none)]), (1000, vec![a((9, 500), none, none)])], (0.0, 0.0)),
            // Two reads of 100 ms in a second.
            (vec![(0, vec![a((9, 100), none, none)]), (1000, vec![a((11, 100), none, none)])], (0.1, 0.2)),
            // Always busy with several requests at a time. What it wrote is to be flushed.
            (vec![(0, vec![a(none, none, (2, 30))]), (1000, vec![a(none, (40, 100), (4, 30))])], (0.13, 1.0)),
            // Not flushed lately, but before.
            (vec![(0, vec![a(none, none, (2, 30))]), (1000, vec![a(none, (4, 100), (2, 30))])], (0.13, 0.4)),
            // Two disks: the slow one's request, both disks' flushes; the quick one is always busy.
            (
                vec![
                    (0, vec![a(none, none, none), disk("b", [none; 3], None)]),
                    (1000, vec![a((1000, 1), none, none), disk("b", [(2, 100), (1, 1), (1, 20)], None)]),
                ],
                (0.12, 0.221),
            ),
            // A burst is remembered in the gap after it.
            (
                vec![
                    (0, vec![a(none, none, none)]),
                    (1000, vec![a((2, 500), none, none)]),
                    (2000, vec![a((2, 500), none, none)]),
                ],
                (0.5, 0.5),
            ),
        ];
        for (looks, (wait, busy)) in table {
            let drain = seen(&looks).drain();
            assert!(
                (drain.wait - wait).abs() < 1e-9 && (drain.busy - busy).abs() < 1e-9,
                "{drain:?}: {looks:?}"
            );
        }
    }

    #[test]
    fn a_disk_that_answers_nothing_is_as_slow_as_it_was_or_slower() {
        let at_work = |begun| disk("a", [(3, 200), (0, 0), (0, 0)], Some((begun, 1)));
        let after = |looks: &[u64]| {
            let looks: Vec<_> = looks.iter().map(|at| (*at, vec![at_work(1)])).collect();
            seen(&looks).drain()
        };
        assert!((after(&[0]).wait - 0.2).abs() < 1e-9);
        let busy = after(&[0, 100]);
        assert!((busy.wait - 0.2).abs() < 1e-9 && busy.busy == 1.0, "{busy:?}");
        assert_eq!(after(&[0, 1000]).wait, 1.0);
        // Long ago a slow moment: forgotten.
        let quick = |n| disk("a", [(n, 1), (0, 0), (0, 0)], Some((n, 0)));
        let mut looks = vec![(0, vec![quick(0)]), (100, vec![disk("a", [(1, 900), (0, 0), (0, 0)], None)])];
        assert_eq!(seen(&looks).drain().wait, 0.9);
        looks.extend((1..20).map(|n| (100 + n * 1000, vec![quick(1000 + n)])));
        assert!(seen(&looks).drain().wait < 0.002);
    }

    #[test]
    fn what_is_under_way_takes_the_rest_of_its_time() {
        let writes = |done, begun, now| vec![disk("a", [(0, 0), (done, 400), (0, 0)], Some((begun, now)))];
        let first = [(0, writes(5, 5, 0)), (990, writes(7, 7, 0)), (1000, writes(7, 7, 0))];
        let after = |more: &[(u64, Vec<Disk>)]| seen(&[&first[..], more].concat()).under_way();
        assert_eq!(after(&[]), 0.0, "it is quiet");
        let close =
            |left: f64, expected: f64| assert!((left - expected).abs() < 1e-9, "{left}, not {expected}");
        close(after(&[(1010, writes(7, 8, 1))]), 0.39);
        let later = |at| after(&[(1010, writes(7, 8, 1)), (at, writes(7, 8, 1))]);
        close(later(1300), 0.1);
        close(later(1400), 0.0);
        // Slower than the others: it may take as long again.
        close(later(1500), 0.5);
        // A newer one, which was not seen to begin.
        close(after(&[(1010, writes(7, 8, 1)), (1310, writes(7, 9, 2))]), 0.4);
        // Between two of them, or quiet.
        let done = [(1010, writes(7, 8, 1)), (1410, writes(8, 8, 0)), (1420, writes(8, 8, 0))];
        close(after(&done[..2]), 0.4);
        close(after(&done), 0.0);
        let untold = seen(&[(0, vec![disk("a", [(0, 0), (5, 400), (0, 0)], None)])]);
        assert_eq!(untold.under_way(), 0.0, "nobody knows");
    }

    fn any_look() -> impl Strategy<Value = Disk> {
        let requests = (any::<u64>(), any::<u64>())
            .prop_map(|(done, ns)| Requests { done, took: Duration::from_nanos(ns) });
        let queued = (any::<u64>(), any::<u64>()).prop_map(|(begun, in_flight)| Queued { begun, in_flight });
        ("[ab]", prop::array::uniform3(requests), prop::option::of(queued)).prop_map(
            |(name, [reads, writes, flushes], queued)| Disk { name, reads, writes, flushes, queued },
        )
    }

    proptest! {
        #[test]
        fn no_word_of_a_qemu_makes_a_time_of_no_size(
            looks in prop::collection::vec((0u64..100_000, prop::collection::vec(any_look(), 0..3)), 0..9),
        ) {
            let disks = seen(&looks);
            let drain = disks.drain();
            for time in [drain.wait, drain.likely(), disks.under_way()] {
                prop_assert!((0.0..=3.0 * LONGEST).contains(&time), "{time}");
            }
            prop_assert!((0.0..=1.0).contains(&drain.busy), "{drain:?}");
        }
    }
}
