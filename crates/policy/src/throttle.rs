use std::{collections::HashMap, time::Duration};

/// A guest may begin to write to pages at this share of the pace at which pages are sent. All rounds together
/// then take at most `1 / (1 − SHARE)` of the first, which is less than twice; a smaller share would end
/// sooner and slow writers more.
pub const SHARE: f64 = 0.45;

/// A round that leaves more than this share of its own pages is outrun by the guest: the next one would
/// hardly be shorter.
pub const OUTRUN: f64 = 0.6;

/// What was not used is saved up for so long: enough for threads that wake up late, and little beside a
/// downtime.
pub(crate) const CREDIT: Duration = Duration::from_millis(5);

/// The next round of so many pages is to be the last one, if it takes no more than this share.
const LAST: f64 = 0.1;

/// The share for a round of so many pages, where so many fit into the pause: a smaller one if that makes it
/// the last round. Such rounds are short: at most eight times as long as a pause may be.
pub fn share_of_round(usual: f64, pages: f64, fit: f64) -> f64 {
    let enough = 0.8 * fit / pages.max(1.0);
    if enough < LAST { usual } else { usual.min(enough) }
}

/// So many writers are told apart while they have something to pay; a further one pays together with other
/// further ones. A guest has as many as it has vCPUs, and QEMU a few dozen of its own.
const WRITERS: usize = 256;

/// A thread of the process whose memory is written to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Writer(pub u32);

/// All whom the table has no place for.
const OTHERS: Writer = Writer(0);

/// Decides when a guest may go on that wants to write to a page which is protected since the round began.
///
/// A round sends the pages that were opened for writing before it, while the guest opens others. Let `D(k)`
/// be the pages of round `k`, `S` how many are sent in a second, and let the guest open at most `SHARE · S`
/// in a second. The round takes `D(k) / S`, so
///
/// ```text
/// D(k+1) ≤ SHARE · D(k) + B        where B = SHARE · S · (CREDIT + 2 · max_stall)
/// ```
///
/// and rounds shrink until little more than `B / (1 − SHARE)` is left, which fits into a downtime of
/// milliseconds. Pages that are open cost nothing more however often they are written: only who outruns the
/// link by *new* pages waits.
///
/// Each writer has a share of the pace of its own, by start-time fair queueing. `paid` counts the pages that
/// have been paid for *by each* writer that has something to pay; it grows by the pace, divided by their
/// number. A writer's next pages are begun to be paid for when its last ones are, or now; and it may go on
/// when that begins. So who takes less than its share never waits for somebody who takes more, and what it
/// leaves is the others'. (Stiliadis and Varma, *Rate-proportional servers*; Goyal, Vin and Cheng,
/// *Start-time fair queueing*, 1996.)
///
/// Nobody waits longer than `max_stall` at a time: of `writers` that wait at once each is given as many pages
/// as keep the pace when all of them come back at once. (Below `writers` pages each `max_stall` no pace can
/// be kept that way; that is 1.6 MB/s for two writers and 5 ms.)
#[derive(Clone, Debug)]
pub struct Throttle {
    max_stall: Duration,
    /// Nobody is to wait for the time being.
    hurried: bool,
    share: f64,
    writers: u32,
    /// Pages a second; none: as they like.
    pace: Option<f64>,
    /// When all that was opened so far has been paid for.
    free_at: Duration,
    /// Pages that each has paid who had to, and when that was reckoned.
    paid: f64,
    at: Duration,
    /// Who has something to pay: until `paid` is so much.
    debts: HashMap<Writer, f64>,
}

/// What a writer is given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grant {
    /// How many pages are opened.
    pub pages: u64,
    /// After how long.
    pub wait: Duration,
}

impl Throttle {
    /// Lets everybody write as they like, until there is a pace.
    pub fn new(max_stall: Duration, writers: u32) -> Self {
        Self {
            max_stall,
            hurried: false,
            share: SHARE,
            writers: writers.max(1),
            pace: None,
            free_at: Duration::ZERO,
            paid: 0.0,
            at: Duration::ZERO,
            debts: HashMap::new(),
        }
    }

    /// What promises made of the share and of the longest wait, from the next pace on.
    pub fn agree(&mut self, share: f64, max_stall: Duration) {
        (self.share, self.max_stall) = (share.clamp(0.01, 1.0), max_stall);
    }

    /// Nobody waits any more, and each is given a page at a time: the guest is about to be stopped, for which
    /// nobody may be waiting.
    pub fn suspend(&mut self) {
        self.hurried = true;
    }

    /// The guest goes on after all: they wait again as before.
    pub fn resume(&mut self) {
        self.hurried = false;
    }

    /// How long one may be made to wait now.
    fn longest(&self) -> Duration {
        if self.hurried { Duration::ZERO } else { self.max_stall }
    }

    /// So many pages are sent in a second: the guest keeps to its share of that from now on. Returns that, in
    /// pages a second.
    pub fn follow(&mut self, sent_per_s: f64) -> f64 {
        *self.pace.insert((self.share * sent_per_s).max(1.0))
    }

    /// Somebody wants to write. `wish`: how many pages are best opened at once if nothing is to be slowed.
    pub fn ask(&mut self, now: Duration, writer: Writer, wish: u64) -> Grant {
        let Some(pace) = self.pace else { return Grant { pages: wish.max(1), wait: Duration::ZERO } };
        self.pay(now, pace);
        let full = self.debts.len() >= WRITERS && !self.debts.contains_key(&writer);
        let writer = if full { OTHERS } else { writer };
        let wait = self.wait(now, writer, pace);
        let begin = *self.debts.entry(writer).or_insert(self.paid);
        let debtors = self.debts.len() as f64;
        let turn = pace * self.longest().as_secs_f64() / debtors.max(f64::from(self.writers));
        let pages = (turn as u64).clamp(1, wish.max(1));
        // Where the pace cannot be kept, what is missing does not grow for ever.
        self.debts
            .insert(writer, (begin + pages as f64).min(self.paid + (2.0 * turn).max(1.0) + pages as f64));
        let start = self.free_at.max(now.saturating_sub(CREDIT));
        let free_at = start + Duration::from_secs_f64(pages as f64 / pace);
        self.free_at = free_at.min(now + self.longest() * 4);
        Grant { pages, wait }
    }

    /// Somebody wants to write where another waits already, who has paid: how long it would have to wait by
    /// itself.
    pub fn join(&mut self, now: Duration, writer: Writer) -> Duration {
        let Some(pace) = self.pace else { return Duration::ZERO };
        self.pay(now, pace);
        self.wait(now, writer, pace)
    }

    /// Until the writer's turn, or until nothing is due from anybody.
    fn wait(&self, now: Duration, writer: Writer, pace: f64) -> Duration {
        let before = self.debts.get(&writer).map_or(0.0, |until| until - self.paid);
        let turn = before * self.debts.len() as f64 / pace;
        self.free_at.saturating_sub(now).min(Duration::from_secs_f64(turn)).min(self.longest())
    }

    /// All who have something to pay pay, each the same, until now.
    fn pay(&mut self, now: Duration, pace: f64) {
        let mut left = now.saturating_sub(self.at).as_secs_f64() * pace;
        self.at = self.at.max(now);
        while !self.debts.is_empty() {
            let each = left / self.debts.len() as f64;
            let least = self.debts.values().copied().fold(f64::INFINITY, f64::min) - self.paid;
            if each < least {
                self.paid += each;
                return;
            }
            left -= least * self.debts.len() as f64;
            self.paid += least;
            let paid = self.paid;
            self.debts.retain(|_, until| *until > paid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STALL: Duration = Duration::from_millis(5);

    /// How a writer of a model guest behaves.
    #[derive(Clone, Copy, Debug)]
    struct Habit {
        /// How long it does something else before it wants to write to the next page.
        thinks: Duration,
        /// It writes for so long, and then does nothing for as long.
        spell: Duration,
        wish: u64,
    }

    const GREEDY: Habit = Habit { thinks: Duration::ZERO, spell: Duration::MAX, wish: 512 };

    /// A guest whose writers ask for pages from `from` to `to`. Says how many pages each opened, and the
    /// longest wait of each.
    struct Guest {
        throttle: Throttle,
        habits: Vec<Habit>,
        /// When each comes back.
        back: Vec<Duration>,
        opened: Vec<u64>,
        longest: Vec<Duration>,
    }

    impl Guest {
        fn new(sent_per_s: f64, habits: Vec<Habit>) -> Self {
            let mut throttle = Throttle::new(STALL, habits.len() as u32);
            throttle.follow(sent_per_s);
            let n = habits.len();
            Self {
                throttle,
                habits,
                back: vec![Duration::ZERO; n],
                opened: vec![0; n],
                longest: vec![Duration::ZERO; n],
            }
        }

        /// Lets it write until then; returns how many pages it opened.
        fn write(&mut self, until: Duration) -> u64 {
            let mut all = 0;
            loop {
                let (writer, at) = self.back.iter().copied().enumerate().min_by_key(|(_, at)| *at).unwrap();
                if at >= until {
                    return all;
                }
                let habit = self.habits[writer];
                let grant = self.throttle.ask(at, Writer(100 + writer as u32), habit.wish);
                self.longest[writer] = self.longest[writer].max(grant.wait);
                self.opened[writer] += grant.pages;
                all += grant.pages;
                // Writing a page takes a little while by itself.
                let mut next = at + grant.wait + habit.thinks + Duration::from_micros(2 * grant.pages);
                if habit.spell < Duration::MAX && (next.as_micros() / habit.spell.as_micros()) % 2 == 1 {
                    next = habit.spell * ((next.as_micros() / habit.spell.as_micros()) as u32 + 1);
                }
                self.back[writer] = next;
            }
        }
    }

    /// Rounds until they fit into `enough`: the pages of each, and how long all took.
    fn migrate(guest: &mut Guest, pages: u64, sent_per_s: f64, enough: u64) -> (Vec<u64>, Duration) {
        let mut rounds = vec![pages];
        let mut now = Duration::ZERO;
        while rounds.last().is_some_and(|left| *left > enough) && rounds.len() < 200 {
            now += Duration::from_secs_f64(rounds[rounds.len() - 1] as f64 / sent_per_s);
            rounds.push(guest.write(now).min(pages));
        }
        (rounds, now)
    }

    fn habits() -> impl Strategy<Value = Vec<Habit>> {
        let micros = |from, to| (from..to).prop_map(Duration::from_micros);
        let thinks = prop_oneof![Just(Duration::ZERO), micros(0u64, 20_000)];
        let spell = prop_oneof![Just(Duration::MAX), micros(100u64, 100_000)];
        let habit =
            (thinks, spell, 1u64..1024).prop_map(|(thinks, spell, wish)| Habit { thinks, spell, wish });
        // At least one that wants all that it can get.
        proptest::collection::vec(habit, 0..16).prop_map(|mut all| {
            all.push(GREEDY);
            all
        })
    }

    proptest! {
        #[test]
        fn rounds_shrink_and_nobody_waits_long(
            pages in 10_000u64..2_000_000,
            mbit in 50f64..40_000.0,
            habits in habits(),
        ) {
            let sent_per_s = mbit * 1e6 / 8.0 / units::PAGE_SIZE as f64;
            // Slower links than that cannot be kept to.
            prop_assume!(SHARE * sent_per_s * STALL.as_secs_f64() > habits.len() as f64);
            let burst = SHARE * sent_per_s * (CREDIT + 2 * STALL).as_secs_f64();
            let enough = (burst / (1.0 - SHARE) * 1.05) as u64 + 1;
            let mut guest = Guest::new(sent_per_s, habits);
            let (rounds, took) = migrate(&mut guest, pages, sent_per_s, enough);
            prop_assert!(guest.longest.iter().all(|longest| *longest <= STALL));
            for pair in rounds.windows(2) {
                prop_assert!(pair[1] as f64 <= SHARE * pair[0] as f64 + burst + 1.0, "{rounds:?}, burst \
                                                                                      {burst}");
            }
            prop_assert!(rounds.last().is_some_and(|left| *left <= enough), "{rounds:?} of {enough}");
            let first = pages as f64 / sent_per_s;
            prop_assert!(took.as_secs_f64() <= first / (1.0 - SHARE) + 0.1 * rounds.len() as f64, "{took:?} \
                                                                                                   of \
                                                                                                   {first}");
        }

        #[test]
        fn a_modest_writer_does_not_wait_for_a_greedy_one(
            greedy in 1usize..8,
            thinks in 100u64..20_000,
            // How much of its share the modest one wants.
            part in 0.05f64..0.9,
        ) {
            let modest = Habit { thinks: Duration::from_micros(thinks), wish: 1, ..GREEDY };
            let its_share = 1e6 / (thinks as f64 + 2.0) / part;
            let sent_per_s = its_share * (greedy + 1) as f64 / SHARE;
            // Slower links than that cannot be kept to.
            prop_assume!(SHARE * sent_per_s * STALL.as_secs_f64() > greedy as f64 + 1.0);
            let mut guest = Guest::new(sent_per_s, [vec![modest], vec![GREEDY; greedy]].concat());
            let opened = guest.write(Duration::from_secs(2));
            prop_assert!(guest.longest[0] < Duration::from_micros(1), "{:?}", guest.longest);
            // It had all that it wanted, the others the rest.
            prop_assert!(guest.opened[0] as f64 >= 1.99 * 1e6 / (thinks as f64 + 2.0) - 1.0, "{:?}",
                guest.opened);
            let (all, burst) = (2.0 * SHARE * sent_per_s,
                SHARE * sent_per_s * (CREDIT + 2 * STALL).as_secs_f64() + 2.0);
            prop_assert!((0.9 * all - 2.0..all + burst).contains(&(opened as f64)), "{all}, \
                                                                                     {:?}", guest.opened);
        }
    }

    #[test]
    fn writers_that_want_all_get_the_same() {
        let modest = Habit { wish: 1, ..GREEDY };
        let mut guest = Guest::new(100_000.0, vec![GREEDY, GREEDY, GREEDY]);
        guest.write(Duration::from_secs(1));
        let (least, most) = (guest.opened.iter().min().unwrap(), guest.opened.iter().max().unwrap());
        assert!(*most as f64 <= *least as f64 * 1.02, "{:?}", guest.opened);
        // Whoever takes small groups is let ask more often.
        let mut guest = Guest::new(10_000.0, vec![GREEDY, modest]);
        guest.write(Duration::from_secs(1));
        assert!(guest.opened[0] as f64 <= guest.opened[1] as f64 * 1.05, "{:?}", guest.opened);
    }

    #[test]
    fn a_writer_gets_most_of_its_share() {
        for idle in [0, 3] {
            let sleeps = Habit { thinks: Duration::from_secs(10), ..GREEDY };
            let mut guest = Guest::new(30_000.0, [vec![GREEDY], vec![sleeps; idle]].concat());
            let share = guest.write(Duration::from_secs(1)) as f64 / 30_000.0;
            assert!((0.42..0.48).contains(&share), "{share}");
        }
    }

    #[test]
    fn who_writes_little_never_waits() {
        let mut throttle = Throttle::new(STALL, 2);
        assert_eq!(throttle.ask(Duration::ZERO, Writer(7), 64), Grant { pages: 64, wait: Duration::ZERO });
        throttle.follow(30_000.0);
        for n in 0..100u32 {
            // A third of its share.
            let grant = throttle.ask(Duration::from_millis(2) * n, Writer(7), 9);
            assert_eq!(grant.wait, Duration::ZERO);
            assert_eq!(throttle.join(Duration::from_millis(2) * n, Writer(8)), Duration::ZERO);
        }
    }

    #[test]
    fn the_table_of_writers_is_bounded_and_forgets_who_has_paid() {
        let mut throttle = Throttle::new(STALL, 2);
        throttle.follow(1e6);
        for n in 0..100_000 {
            throttle.ask(Duration::from_nanos(n), Writer(n as u32 + 1), 8);
        }
        assert!(throttle.debts.len() <= WRITERS + 1, "{}", throttle.debts.len());
        throttle.join(Duration::from_secs(10), Writer(1));
        assert!(throttle.debts.is_empty());
    }

    #[test]
    fn a_guest_about_to_be_stopped_waits_for_nothing() {
        let mut throttle = Throttle::new(STALL, 1);
        throttle.follow(1000.0);
        let longest = |throttle: &mut Throttle, from: u64| {
            let asks = (from..from + 50).map(|ms| throttle.ask(Duration::from_millis(ms), Writer(1), 64));
            asks.map(|grant| grant.wait).max().unwrap()
        };
        assert!(longest(&mut throttle, 0) > Duration::ZERO);
        throttle.suspend();
        // A new pace changes nothing about that.
        throttle.agree(0.5, STALL);
        assert_eq!(longest(&mut throttle, 50), Duration::ZERO);
        throttle.resume();
        let waited = longest(&mut throttle, 100);
        assert!(waited > Duration::ZERO && waited <= STALL, "{waited:?}");
    }
}
