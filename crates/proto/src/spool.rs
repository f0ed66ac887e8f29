//! The spool at the source: when pages go into the file, and what is done when it fails.
//!
//! While the guest runs, pages of large rounds go over both ways; a round is over when the target has all of
//! both. Before a post-copy that must survive the source (`strict`) all that will be missing goes into the
//! file, in passes while the guest runs, the last of it while it stands still; that the device state is saved
//! is told only when all of that is durable. The target must have read the first pass, which shows that it
//! can be left alone with the file; nobody waits for it to have read the rest. In a relaxed post-copy what is
//! missing follows after the commit. A file that fails costs nothing but its help.

use crate::{
    NextStep, SourceEvent,
    control::{self, Kind},
};
use policy::{Pass, Secure};
use std::{collections::BTreeSet, time::Duration};
use units::MemorySet;

/// A target that has not read on for so long is not waited for any more.
const STALL: Duration = Duration::from_secs(2);

/// The guest stands still while the last of what is missing becomes durable. If that takes longer than this,
/// it does not change hands.
const PAUSE: Duration = Duration::from_secs(1);

/// A set of the guest's pages, however it is kept.
pub trait AnyPages: Clone {
    /// How many.
    fn count(&self) -> u64;
    /// Adds these.
    fn unite(&mut self, others: &Self);
}

impl AnyPages for MemorySet {
    fn count(&self) -> u64 {
        self.len()
    }

    fn unite(&mut self, others: &Self) {
        self.union(others);
    }
}

/// What the user wants of the file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct SpoolTerms {
    /// The VM is handed over only when all that will be missing is durable in the file.
    pub strict: bool,
    /// A post-copy is allowed without the file, too.
    pub post_copy_without: bool,
    /// A round of fewer pages goes over the network alone: it is over before the datastore has made the first
    /// of it durable.
    pub least_round: u64,
}

/// How far a file is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct SpoolMark {
    /// Extents in it.
    pub extents: u64,
    /// The bytes that they take.
    pub bytes: u64,
}

/// What has happened to the file, or matters to it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SpoolEvent<S> {
    /// It is there, or could not be made.
    Made(Result<(), String>),
    /// The target reads it, or cannot.
    Opened(Result<(), String>),
    /// The target has read so many extents.
    Read(u64),
    /// Nothing more of it will arrive in the target's memory.
    Stopped,
    /// The target can read no further.
    Unreadable(String),
    /// The writing thread says this of a job of this turn.
    Said(u32, SpoolSaid<S>),
    /// This round is sent, over so many streams.
    Round {
        /// Its number.
        number: u32,
        /// What there is of it to send.
        pages: u64,
        /// How many streams take part.
        streams: u32,
        /// Whether the guest stands still.
        stopped: bool,
    },
    /// This stream has sent its share of this round.
    StreamSent(u32, u32),
    /// The link was lost while the guest runs here.
    Left,
    /// This is to come after a round, with so many extents in the file.
    Decided(NextStep, u64),
    /// The guest has written these.
    Written(S),
    /// `Collect` is done; how long a pause may last.
    Collected(Duration),
    /// All that is dirty is about to be announced as missing; whether the guest stands still.
    Missing(bool),
    /// The device state is saved; whether pages were written meanwhile, which are dirty.
    Saved(bool),
    /// The device state is about to be sent, with so many extents in the file.
    Sending(u64),
    /// The target runs the guest, and lacks pages.
    Serving,
    /// `Await` is over.
    Late,
}

/// What the writing thread says.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum SpoolSaid<S> {
    /// Up to here, everything is durable; and from which extent on it is to go into the target's memory now,
    /// if at all.
    Durable(SpoolMark, Option<u64>),
    /// All that it took of the round is in the target's memory, but for these pages, which nobody must rely
    /// on; and why some came back.
    RoundOver(S, Option<String>),
    /// The pages of the oldest job of that kind are durable: how many, and how long it took.
    Secured(u64, Duration),
    /// They never will be.
    Failed(String),
}

/// What is to be done about it, in order.
#[derive(Clone, PartialEq, Debug)]
pub enum SpoolEffect<S> {
    /// Has the thread take shares of the round from its end.
    TakeShares,
    /// Has the thread put these into the file, until they are durable there.
    Secure(ToSecure<S>),
    /// Has the thread give back what it took of the round.
    EndShares(String),
    /// Leaves all jobs of turns before this one as they are.
    Leave(u32),
    /// Gives back the room of the file, if the target has read all of it.
    Release,
    /// Removes the file, which is of no use any more.
    Lose(String),
    /// The file stays, although it cannot be used any more: it may be all that the target has one day.
    Keep(String),
    /// From now on the guest runs on the target only when all its memory is there.
    ForbidPostCopy,
    /// These are dirty again: nobody knows which of them the target has (I2).
    Dirty(S),
    /// Collects what the guest has written: `Written`, then `Collected`.
    Collect,
    /// Chooses the next step once more; the migration hears of it.
    Decide,
    /// Says this to the target.
    Say(Kind),
    /// Tells the target what the file is good for from the commit on.
    Announce {
        /// Extents before this one do not matter.
        floor: u64,
        /// Extents that there are when the VM changes hands.
        end: u64,
        /// Whether of missing pages only later ones count.
        outdated: bool,
    },
    /// Sees to it that `Late` follows after so long, whatever was awaited before.
    Await(Duration),
    /// The migration hears of it.
    Tell(SourceEvent),
    /// The user hears that all that is missing is durable in the file; whether the target runs the guest.
    Safe(bool),
    /// … that the guest writes faster than the datastore takes it.
    Hopeless,
}

/// Which pages go into the file.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum ToSecure<S> {
    /// All that are dirty.
    Dirty,
    /// All that are missing.
    Missing,
    /// These.
    These(S),
}

/// The file's part in the current round.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
enum Part {
    #[default]
    Over,
    /// The thread takes shares.
    Busy,
    /// It was given up: the target must say that nothing old will arrive any more.
    Stopping,
}

/// What will be missing is made safe.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Securing<S> {
    floor: u64,
    passes: Vec<Pass>,
    /// The pass that is over: its pages, and how long it took.
    last: (u64, Duration),
    /// Pages that the guest has written since the last pass began.
    insecure: Option<S>,
    /// Jobs that the thread is not done with.
    jobs: u32,
    /// The first pass ends with this extent, and was durable at this time, while the target has not read it.
    unread: Option<(u64, Duration)>,
    phase: SecuringPhase,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum SecuringPhase {
    /// The guest runs.
    Passes,
    /// It is about to be stopped, or stands still.
    Pausing,
    /// The device state is saved: that is told once what is missing is safe. Whether pages were written
    /// meanwhile.
    Saved(bool),
    Safe,
}

/// The file at the source as a state machine, and with it the end of a round.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SourceSpool<S> {
    terms: SpoolTerms,
    /// Whether there is a file, and it is of use.
    file: bool,
    /// Whether the target reads it.
    read: bool,
    /// What the thread says of jobs of other turns does not matter any more.
    turn: u32,
    part: Part,
    /// The round that is sent, over how many streams, and which of them have sent their share.
    round: u32,
    streams: u32,
    sent: BTreeSet<u32>,
    /// Before a strict post-copy.
    securing: Option<Securing<S>>,
    /// Whether pages are missing: it is a post-copy.
    misses: bool,
    /// Whether what is missing in a relaxed one is on its way into the file.
    follows: bool,
    durable: SpoolMark,
    /// Extents that the target has read.
    taken: u64,
}

impl<S> SpoolEvent<S> {
    /// What the target, whose name this is, says of the file.
    pub fn of(kind: &Kind, target: &str) -> Option<Self> {
        Some(match kind {
            Kind::Ready(ready) if ready.spool => Self::Opened(Ok(())),
            Kind::Ready(ready) => Self::Opened(Err(format!("{target} cannot use it: {}", ready.no_spool))),
            Kind::SpoolTaken(taken) => Self::Read(taken.extents),
            Kind::SpoolStopped(_) => Self::Stopped,
            Kind::SpoolFailed(failed) => Self::Unreadable(format!("{target}: {}", failed.why)),
            _ => return None,
        })
    }
}

impl SpoolMark {
    /// So much is durable, and stays in the file for now.
    pub fn so_far(self) -> control::Spooled {
        control::Spooled { extents: self.extents, bytes: self.bytes, ..Default::default() }
    }
}

impl<S: AnyPages> SourceSpool<S> {
    /// Without a file as yet.
    pub fn new(terms: SpoolTerms) -> Self {
        Self {
            terms,
            file: false,
            read: false,
            turn: 0,
            part: Part::Over,
            round: 0,
            streams: 0,
            sent: BTreeSet::new(),
            securing: None,
            misses: false,
            follows: false,
            durable: SpoolMark::default(),
            taken: 0,
        }
    }

    /// Whose jobs matter.
    pub fn turn(&self) -> u32 {
        self.turn
    }

    /// Extents that the target has read.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// How far it is durable.
    pub fn durable(&self) -> SpoolMark {
        self.durable
    }

    /// Whether the target reads it, or did.
    pub fn is_read(&self) -> bool {
        self.read
    }

    /// Whether it has a part in the current round.
    pub fn is_busy(&self) -> bool {
        self.part != Part::Over
    }

    /// Whether what will be missing is being made safe.
    pub fn secures(&self) -> bool {
        self.securing.as_ref().is_some_and(|securing| securing.phase != SecuringPhase::Safe)
    }

    /// Passes before a strict post-copy that are over.
    pub fn passes(&self) -> u32 {
        self.securing.as_ref().map_or(0, |securing| securing.passes.len() as u32)
    }

    /// All connections were ended, for whatever reason.
    pub fn hung_up(&mut self) {
        self.streams = 0;
        self.sent.clear();
    }

    /// What must be done about an event, at this time since the beginning.
    pub fn handle(&mut self, now: Duration, event: SpoolEvent<S>) -> Vec<SpoolEffect<S>> {
        use SpoolEffect as A;
        use SpoolEvent as E;
        match event {
            E::Made(Ok(())) => self.file = true,
            E::Made(Err(why)) => return self.lose(why),
            E::Opened(Ok(())) => self.read = self.file,
            E::Opened(Err(why)) if self.file => return self.lose(why),
            E::Read(extents) => return self.has_read(now, extents),
            E::Stopped if self.part == Part::Stopping => {
                self.part = Part::Over;
                return self.round_is_sent();
            }
            E::Unreadable(why) => return self.failed(why),
            E::Said(turn, SpoolSaid::Durable(mark, receive_from)) => {
                self.durable = mark;
                if turn == self.turn && self.file && self.read {
                    let (receive, receive_from) = (receive_from.is_some(), receive_from.unwrap_or_default());
                    let spooled = control::Spooled { receive, receive_from, ..mark.so_far() };
                    return vec![A::Say(Kind::Spooled(spooled))];
                }
            }
            E::Said(turn, said) if turn == self.turn => return self.hear(now, said),

            E::Round { number, pages, streams, stopped } => {
                (self.round, self.streams) = (number, streams);
                self.sent.clear();
                let worth = !stopped && streams > 0 && pages >= self.terms.least_round;
                if worth && self.file && self.read {
                    self.part = Part::Busy;
                    return vec![A::TakeShares];
                }
            }
            // A stream that was lost says so once more.
            E::StreamSent(stream, round) if round == self.round && self.sent.insert(stream) => {
                return self.round_is_sent();
            }
            // Nobody can say what of the file's part of the current round has arrived, and nothing of it ever
            // will from now on: the target's fence was closed when the link was lost there, and what is said
            // from now on begins behind it. So all of it is sent again, and what was made safe for a
            // post-copy is made so anew. Nothing is missing: the guest runs here.
            E::Left => {
                self.hung_up();
                self.turn += 1;
                (self.part, self.securing, self.misses) = (Part::Over, None, false);
                return vec![A::Leave(self.turn)];
            }

            // A strict post-copy is begun by making what it would miss safe: then nothing is decided yet.
            E::Decided(NextStep::PostCopy, floor) if self.terms.strict && self.file => {
                self.securing = Some(Securing {
                    floor,
                    passes: vec![],
                    last: Default::default(),
                    insecure: None,
                    jobs: 1,
                    unread: None,
                    phase: SecuringPhase::Passes,
                });
                return vec![A::Secure(ToSecure::Dirty)];
            }
            E::Decided(step, _) => return vec![A::Tell(SourceEvent::Decided(step))],
            E::Written(pages) => {
                if let Some(securing) = &mut self.securing {
                    securing.add(pages);
                }
            }
            E::Collected(downtime) => return self.pass_is_over(downtime),
            // What of it is not safe yet is made so once the guest stands still.
            E::Missing(stopped) => {
                self.misses = true;
                let securing = self.securing.as_mut().filter(|_| stopped);
                return securing.map_or(vec![], Securing::secure_written);
            }
            E::Saved(more) => return self.saved(more),
            // In a relaxed post-copy nothing that is missing is in the file when the VM changes hands. Its
            // end is not what is durable: more of a round that was interrupted may become so.
            E::Sending(end) if self.file && self.misses && self.securing.is_none() => {
                return vec![A::Announce { floor: end, end, outdated: true }];
            }
            E::Serving if self.file => {
                let follows = !self.terms.strict && !std::mem::replace(&mut self.follows, true);
                let secure = follows.then_some(A::Secure(ToSecure::Missing));
                // A target that was reconnected to may have missed it.
                let say = A::Say(Kind::Spooled(self.durable.so_far()));
                return secure.into_iter().chain([say]).collect();
            }
            E::Late => return self.late(),

            // Of a file that is of no use any more, of a turn that is over, or said before.
            E::Opened(Err(_)) | E::Stopped | E::Said(..) | E::StreamSent(..) | E::Sending(_) | E::Serving => {
            }
        }
        vec![]
    }

    fn hear(&mut self, now: Duration, said: SpoolSaid<S>) -> Vec<SpoolEffect<S>> {
        match said {
            SpoolSaid::RoundOver(returned, None) => {
                self.part = Part::Over;
                // Nobody reads again what is in the target's memory.
                let effects = vec![SpoolEffect::Dirty(returned), SpoolEffect::Release];
                [effects, self.round_is_sent()].concat()
            }
            SpoolSaid::RoundOver(returned, Some(why)) => {
                // Before anything newer is sent, nothing old may arrive any more (I5).
                self.part = Part::Stopping;
                [vec![SpoolEffect::Dirty(returned)], self.lose(why)].concat()
            }
            SpoolSaid::Secured(pages, took) => self.secured(now, pages, took),
            SpoolSaid::Failed(why) => self.failed(why),
            SpoolSaid::Durable(..) => vec![],
        }
    }

    /// The round is over once all streams have sent their shares and the file's part is in the target's
    /// memory.
    fn round_is_sent(&self) -> Vec<SpoolEffect<S>> {
        let all = self.streams > 0 && self.sent.len() as u32 == self.streams && self.part == Part::Over;
        all.then_some(SpoolEffect::Tell(SourceEvent::Sent(self.round))).into_iter().collect()
    }

    fn failed(&mut self, why: String) -> Vec<SpoolEffect<S>> {
        if self.part == Part::Busy {
            // Its thread gives back what is under way, and then the round goes on.
            return vec![SpoolEffect::EndShares(why)];
        }
        let phase = self.securing.as_ref().map(|securing| securing.phase);
        if phase == Some(SecuringPhase::Safe) || (self.misses && phase.is_none()) {
            return vec![SpoolEffect::Keep(why)];
        }
        self.securing = None;
        let mut effects = if self.file { self.lose(why.clone()) } else { vec![] };
        match phase {
            Some(SecuringPhase::Passes) => effects.push(SpoolEffect::Decide),
            Some(SecuringPhase::Pausing | SecuringPhase::Saved(_)) => {
                let what = "put what the target would lack into the spool".to_owned();
                let why = format!("{why}; --robust strict does not hand the VM over without it");
                effects.push(SpoolEffect::Tell(SourceEvent::Broke { what, why }));
            }
            Some(SecuringPhase::Safe) | None => {}
        }
        effects
    }

    /// Without the file from now on. Only before anything is missing: then nobody will ever need what is in
    /// it.
    fn lose(&mut self, why: String) -> Vec<SpoolEffect<S>> {
        self.file = false;
        let stop = self.read.then(|| SpoolEffect::Say(Kind::SpoolStop(control::SpoolStop {})));
        let forbids = self.terms.strict || !self.terms.post_copy_without;
        let forbid = forbids.then_some(SpoolEffect::ForbidPostCopy);
        [SpoolEffect::Lose(why)].into_iter().chain(stop).chain(forbid).collect()
    }

    fn secured(&mut self, now: Duration, pages: u64, took: Duration) -> Vec<SpoolEffect<S>> {
        let durable = self.durable;
        let Some(securing) = &mut self.securing else {
            return if self.misses { vec![SpoolEffect::Safe(true)] } else { vec![] };
        };
        securing.jobs = securing.jobs.saturating_sub(1);
        if securing.phase != SecuringPhase::Passes {
            return self.safe_now();
        }
        securing.last = (pages, took);
        if !securing.passes.is_empty() || self.taken >= durable.extents {
            return vec![SpoolEffect::Collect];
        }
        securing.unread = Some((durable.extents, now));
        // It may have been told over a connection that was lost since.
        vec![SpoolEffect::Say(Kind::Spooled(durable.so_far())), SpoolEffect::Await(STALL)]
    }

    /// The first pass is over once the target has read it.
    fn has_read(&mut self, now: Duration, extents: u64) -> Vec<SpoolEffect<S>> {
        let goes_on = extents > self.taken;
        self.taken = self.taken.max(extents);
        let Some(securing) = &mut self.securing else { return vec![] };
        match securing.unread {
            Some((end, since)) if self.taken >= end => {
                securing.unread = None;
                securing.last.1 += now.saturating_sub(since);
                vec![SpoolEffect::Collect]
            }
            Some(_) if goes_on => vec![SpoolEffect::Await(STALL)],
            _ => vec![],
        }
    }

    /// What comes after a pass.
    fn pass_is_over(&mut self, downtime: Duration) -> Vec<SpoolEffect<S>> {
        let Some(securing) = &mut self.securing else { return vec![] };
        let (pages, took) = securing.last;
        let dirtied = securing.insecure.as_ref().map_or(0, AnyPages::count);
        securing.passes.push(Pass { pages, took, dirtied });
        match policy::secure(&securing.passes, downtime) {
            Secure::Stop => {
                securing.phase = SecuringPhase::Pausing;
                vec![SpoolEffect::Tell(SourceEvent::Decided(NextStep::PostCopy))]
            }
            Secure::Again => securing.secure_written(),
            Secure::Hopeless => {
                self.securing = None;
                use SpoolEffect::{Decide, ForbidPostCopy, Hopeless, Release};
                vec![Hopeless, Release, ForbidPostCopy, Decide]
            }
        }
    }

    /// The device state is saved. Before a strict post-copy that is told only when what is missing is safe.
    fn saved(&mut self, more: bool) -> Vec<SpoolEffect<S>> {
        let Some(securing) = self.securing.as_mut().filter(|_| self.file) else {
            return vec![SpoolEffect::Tell(SourceEvent::Saved { more })];
        };
        securing.phase = SecuringPhase::Saved(more);
        securing.jobs += u32::from(more);
        let secure = more.then_some(SpoolEffect::Secure(ToSecure::Dirty));
        let effects = secure.into_iter().chain([SpoolEffect::Await(PAUSE)]).collect();
        [effects, self.safe_now()].concat()
    }

    /// Whether all that is missing is durable; says what was held back until then, and tells the target what
    /// it can live on.
    fn safe_now(&mut self) -> Vec<SpoolEffect<S>> {
        let Some(securing) = &mut self.securing else { return vec![] };
        let SecuringPhase::Saved(more) = securing.phase else { return vec![] };
        if securing.jobs > 0 {
            return vec![];
        }
        securing.phase = SecuringPhase::Safe;
        let (floor, end) = (securing.floor, self.durable.extents);
        vec![
            SpoolEffect::Announce { floor, end, outdated: false },
            SpoolEffect::Safe(false),
            SpoolEffect::Tell(SourceEvent::Saved { more }),
        ]
    }

    /// A pass waits for the target that reads it, or the guest for the datastore, for too long.
    fn late(&mut self) -> Vec<SpoolEffect<S>> {
        let Some(securing) = &self.securing else { return vec![] };
        if securing.unread.is_some() {
            return self.failed(format!("the target has read nothing of it for {} ms", STALL.as_millis()));
        }
        match securing.phase {
            SecuringPhase::Saved(_) => {
                self.failed(format!("the guest stood still for {} ms", PAUSE.as_millis()))
            }
            _ => vec![],
        }
    }
}

impl<S: AnyPages> Securing<S> {
    fn add(&mut self, pages: S) {
        match &mut self.insecure {
            Some(insecure) => insecure.unite(&pages),
            None => self.insecure = Some(pages),
        }
    }

    /// Has made safe what the guest has written, if anything.
    fn secure_written(&mut self) -> Vec<SpoolEffect<S>> {
        let Some(pages) = self.insecure.take().filter(|pages| pages.count() > 0) else { return vec![] };
        self.jobs += 1;
        vec![SpoolEffect::Secure(ToSecure::These(pages))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use SpoolEffect as A;
    use SpoolEvent as E;

    /// Pages as bits.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    struct Bits(u8);

    impl AnyPages for Bits {
        fn count(&self) -> u64 {
            self.0.count_ones().into()
        }

        fn unite(&mut self, others: &Self) {
            self.0 |= others.0;
        }
    }

    type Event = SpoolEvent<Bits>;
    type Effects = Vec<SpoolEffect<Bits>>;

    const PAUSE_MAY_LAST: Duration = Duration::from_secs(60);

    /// A file that the target reads, so far; and what is to be done about the last event.
    fn after(strict: bool, events: &[Event]) -> (SourceSpool<Bits>, Effects) {
        let terms = SpoolTerms { strict, post_copy_without: true, least_round: 2 };
        let mut spool = SourceSpool::new(terms);
        let mut effects = vec![];
        for event in [E::Made(Ok(())), E::Opened(Ok(()))].iter().chain(events) {
            effects = spool.handle(Duration::ZERO, event.clone());
        }
        (spool, effects)
    }

    fn round(pages: u64, stopped: bool) -> Event {
        E::Round { number: 1, pages, streams: 2, stopped }
    }

    fn durable(extents: u64) -> Event {
        E::Said(0, SpoolSaid::Durable(SpoolMark { extents, bytes: extents }, None))
    }

    fn secured() -> Event {
        E::Said(0, SpoolSaid::Secured(1, Duration::from_secs(1)))
    }

    fn stop() -> SpoolEffect<Bits> {
        A::Say(Kind::SpoolStop(control::SpoolStop {}))
    }

    fn failed() -> Event {
        E::Said(0, SpoolSaid::Failed("full".into()))
    }

    /// Up to the pause of a strict post-copy: the first pass is read, and what is left fits.
    fn pausing() -> Vec<Event> {
        let decided = E::Decided(NextStep::PostCopy, 3);
        let collected = E::Collected(PAUSE_MAY_LAST);
        vec![decided, durable(5), secured(), E::Read(5), E::Written(Bits(1)), collected, E::Missing(false)]
    }

    #[test]
    fn i2_a_round_is_over_when_both_ways_have_carried_it() {
        let sent = || A::Tell(SourceEvent::Sent(1));
        let streams = [E::StreamSent(0, 1), E::StreamSent(1, 1)];
        let over =
            |failed: Option<&str>| E::Said(0, SpoolSaid::RoundOver(Bits(6), failed.map(str::to_owned)));
        let with = |first: Event, more: &[Event]| after(false, &[&[first][..], &streams, more].concat()).1;
        // Too small, or the last one: over the network alone.
        for small in [round(1, false), round(9, true)] {
            assert_eq!(with(small, &[]), [sent()]);
        }
        let large = || round(9, false);
        assert_eq!(after(false, &[large()]).1, [A::TakeShares]);
        assert_eq!(with(large(), &[]), []);
        assert_eq!(with(large(), &[over(None)]), [A::Dirty(Bits(6)), A::Release, sent()]);
        assert_eq!(with(large(), &[E::StreamSent(1, 1)]), [], "a stream says so once more");
        // One that fails: nothing old may arrive any more before anything newer is sent (I5).
        assert_eq!(with(large(), &[failed()]), [A::EndShares("full".into())]);
        let lost = [A::Dirty(Bits(6)), A::Lose("full".into()), stop()];
        assert_eq!(with(large(), &[over(Some("full"))]), lost);
        assert_eq!(with(large(), &[over(Some("full")), E::Stopped]), [sent()]);
        // One whose link is lost: what was said of it does not matter any more.
        assert_eq!(with(large(), &[E::Left]), [A::Leave(1)]);
        assert_eq!(with(large(), &[E::Left, over(None)]), []);
        assert_eq!(with(large(), &[E::Left, large(), E::StreamSent(0, 1)]), []);
    }

    #[test]
    fn what_will_be_missing_is_safe_before_the_state_is_told() {
        let decided = E::Decided(NextStep::PostCopy, 3);
        assert_eq!(after(true, std::slice::from_ref(&decided)).1, [A::Secure(ToSecure::Dirty)]);
        assert_eq!(
            after(false, std::slice::from_ref(&decided)).1,
            [A::Tell(SourceEvent::Decided(NextStep::PostCopy))]
        );
        // The first pass must be read.
        let told = A::Say(Kind::Spooled(SpoolMark { extents: 5, bytes: 5 }.so_far()));
        let first = [decided, durable(5), secured()];
        assert_eq!(after(true, &first).1, [told, A::Await(STALL)]);
        assert_eq!(after(true, &[&first[..], &[E::Read(4)]].concat()).1, [A::Await(STALL)]);
        assert_eq!(after(true, &[&first[..], &[E::Read(5)]].concat()).1, [A::Collect]);
        // What was written since goes into the file once the guest stands still, and what the saving writes.
        let insecure = A::Secure(ToSecure::These(Bits(3)));
        let stopped = [&pausing()[..], &[E::Written(Bits(2)), E::Missing(true)]].concat();
        assert_eq!(after(true, &stopped).1, [insecure]);
        let saved = [&stopped[..], &[E::Saved(true)]].concat();
        assert_eq!(after(true, &saved).1, [A::Secure(ToSecure::Dirty), A::Await(PAUSE)]);
        let safe = [&saved[..], &[secured(), durable(8), secured()]].concat();
        let announced = A::Announce { floor: 3, end: 8, outdated: false };
        let tell = A::Tell(SourceEvent::Saved { more: true });
        assert_eq!(after(true, &safe).1, [announced, A::Safe(false), tell]);
        // From then on it stays, whatever becomes of it.
        assert_eq!(after(true, &[&safe[..], &[failed()]].concat()).1, [A::Keep("full".into())]);
    }

    #[test]
    fn a_spool_that_fails_costs_what_the_user_did_not_ask_for() {
        let lose = || vec![A::Lose("full".into()), stop(), A::ForbidPostCopy];
        let passes = pausing()[..2].to_vec();
        assert_eq!(after(true, &[&passes[..], &[failed()]].concat()).1, [lose(), vec![A::Decide]].concat());
        let (_, effects) = after(true, &[&pausing()[..], &[E::Missing(true), failed()]].concat());
        assert!(matches!(effects.last(), Some(A::Tell(SourceEvent::Broke { .. }))), "{effects:?}");
        // Nobody waits for it for ever.
        for (events, waits) in [(pausing()[..3].to_vec(), true), (pausing(), false)] {
            let (_, effects) = after(true, &[&events[..], &[E::Late]].concat());
            assert_eq!(!effects.is_empty(), waits, "{effects:?}");
        }
        // A relaxed one is written after the commit, and nothing before counts.
        let relaxed = [E::Missing(true), E::Sending(7)];
        assert_eq!(after(false, &relaxed).1, [A::Announce { floor: 7, end: 7, outdated: true }]);
        let serves = [&relaxed[..], &[E::Serving]].concat();
        assert_eq!(after(false, &serves).1[0], A::Secure(ToSecure::Missing));
        assert_eq!(after(false, &[&serves[..], &[E::Serving]].concat()).1.len(), 1, "once");
        assert_eq!(after(false, &[&serves[..], &[secured()]].concat()).1, [A::Safe(true)]);
        assert_eq!(after(false, &[&serves[..], &[failed()]].concat()).1, [A::Keep("full".into())]);
    }
}
