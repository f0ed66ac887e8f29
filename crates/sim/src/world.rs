//! The whole world of one migration: two hosts, what is between them, and a clock that only moves when
//! nothing else does.

use crate::{
    guest::Guest,
    link::{Conn, Purpose, Side, Word},
    pages::Pages,
    planted::PlantedBug,
    qemu::{Qemu, Run},
    record::Elsewhere,
    setup::{Setup, Spooling},
    source::SourceAgent,
    spool::Spool,
    target::TargetAgent,
    watchdog::Watchdog,
};
use std::hash::{Hash, Hasher};

/// What happens when its time has come, unless it was called off. Of several at one time the first is first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Timer {
    /// A driver that waits before it asks again does so.
    Again(Side),
    /// A driver's patience with whoever owes it an answer is over.
    Patience(Side),
    /// The user is told that it is in doubt; the driver leaves the asking to the recovery.
    Doubt,
    /// What a careless writer has not synced gets to the disk by itself (planted faults only).
    Lazy(Side),
    /// The agent is started again.
    Restart(Side),
    /// The network is back.
    LinkUp,
    /// The record elsewhere can be reached again.
    RecordUp,
    /// The datastore answers again.
    SpoolUp,
    /// A person has seen that the target host is dead, or has looked at a restored record.
    Person,
    /// A lost link was waited for as long as the user wants.
    GiveUp(Side),
    /// The same at the target, for a source that closed its connections.
    Closed,
    /// The target is called again, to be told that the migration has ended.
    CallAgain,
    /// It was called for long enough.
    CallEnd,
    /// The datastore answers again, before anybody gives it up.
    SpoolBack,
    /// It, or the target that reads what is there, was waited for for too long.
    Stall,
    /// The agents look for files that nobody needs.
    Janitor,
    /// The target has missed a stream that was lost for long.
    Missed,
}

/// Virtual milliseconds. What matters is their order: a few attempts fall between a failure and its end.
impl Timer {
    /// How long until it happens.
    pub fn after(self) -> u32 {
        match self {
            Self::CallAgain => 300,
            Self::SpoolBack => 400,
            Self::Stall => 600,
            Self::Again(_) => 500,
            Self::Restart(_) => 700,
            Self::Patience(_) => 900,
            Self::LinkUp => 1200,
            Self::RecordUp => 1300,
            Self::SpoolUp => 1400,
            Self::Closed => 1700,
            Self::Missed => 1900,
            Self::Doubt => 2000,
            Self::Lazy(_) => 2500,
            Self::GiveUp(Side::Source) | Self::CallEnd => 2600,
            Self::Janitor => 2950,
            Self::Person => 3000,
            Self::GiveUp(Side::Target) => 3100,
        }
    }

    /// Sets it; if it is set already, it stays.
    pub fn set_in(self, timers: &mut Vec<(u32, Self)>) {
        if !timers.iter().any(|(_, set)| *set == self) {
            timers.push((self.after(), self));
        }
    }

    /// Whether it only asks again, so that a world in which nothing else can happen has ended.
    fn only_asks(self) -> bool {
        matches!(self, Self::Again(_) | Self::Patience(_) | Self::Doubt | Self::CallAgain | Self::Janitor)
    }
}

/// What the checks know, and nobody else.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Ghost {
    /// The record has passed to the target, durably.
    pub committed: bool,
    /// A host's QEMU was killed, with its host or alone.
    pub killed: [bool; 2],
    /// … before the commit.
    pub killed_before_commit: bool,
    /// A person has said that the VM is the source's.
    pub spoken: bool,
    /// … and it was let run there.
    pub by_person: bool,
    /// An agent was killed between the step that recorded a waiting or empty QEMU and the one that started or
    /// ended it: that process is known to nobody, and harms nobody: it never ran, or holds neither vCPUs'
    /// state nor a disk.
    pub orphan: [bool; 2],
    /// The source's agent was killed and is never started again.
    pub for_good: bool,
    /// The pause's watchdog was killed.
    pub unwatched: bool,
    /// The datastore has damaged what was written to it.
    pub rotten: bool,
    /// Pages that were damaged on the target after all that protects them on their way.
    pub damaged: Pages,
    /// Under which conditions it ran.
    pub conditions: Conditions,
    /// The run state in which the guest would be without the migration; none where nobody can tell.
    pub wanted: Option<Run>,
    /// … when it was stopped for the switchover.
    pub wanted_at_stop: Option<Run>,
    /// Somebody has paused the guest since its run state was recorded.
    pub unrecorded: bool,
    /// Its devices and media, as `Qemu::config`.
    pub config: u8,
    /// Somebody has ended the VM.
    pub quit: bool,
    /// QEMU's own migration has taken the VM somewhere else.
    pub elsewhere: bool,
}

/// How much happened that a migration has to bear: what it must come to depends on it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Conditions {
    /// Nothing at all: it completes.
    #[default]
    Fair,
    /// One connection, or all of them, were lost once.
    OneCut,
    /// … and the source has waited for the link: it completes as well.
    OneCutWaitedFor,
    /// The datastore alone stalled, failed or damaged what is there: that costs nothing but its help.
    Datastore,
    /// More than that.
    Storm,
}

/// Left out of a state's hash.
#[derive(Clone, Debug, Default)]
pub struct Aside<T>(pub T);

impl<T> Hash for Aside<T> {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

/// Everything.
#[derive(Clone, Hash)]
pub struct World {
    /// What is simulated.
    pub setup: Setup,
    /// What is done wrongly on purpose.
    pub bug: Option<PlantedBug>,
    /// The guest as it sees itself.
    pub guest: Guest,
    /// As it was when it was stopped: what a person may bring back.
    pub at_stop: Option<Box<Guest>>,
    /// Each host's QEMU.
    pub qemus: [Qemu; 2],
    /// Whether each host's agent runs.
    pub up: [bool; 2],
    /// Whether a host is gone for good.
    pub burnt: [bool; 2],
    /// The source's agent.
    pub source: SourceAgent,
    /// The target's.
    pub target: TargetAgent,
    /// The process that watches over the source's pause.
    pub watchdog: Watchdog,
    /// All connections.
    pub conns: Vec<Conn>,
    /// The next connection's number.
    pub next_conn: u16,
    /// Whether the network works.
    pub link: bool,
    /// The record, if neither host holds it.
    pub record: Elsewhere,
    /// The spool.
    pub spool: Spool,
    /// What is to happen, and in how many milliseconds.
    pub timers: Vec<(u32, Timer)>,
    /// Whose turn it is.
    pub turn: u8,
    /// Who is kept waiting until nobody else can move.
    pub asleep: u64,
    /// How often everybody only asked again.
    pub idle: u8,
    /// What the checks know.
    pub ghost: Ghost,
    /// The first promise that was broken.
    pub breach: Aside<Option<String>>,
    /// What happened, if anybody wants to read it.
    pub trace: Aside<Option<Vec<String>>>,
    /// How many moves there were.
    pub steps: Aside<u32>,
    /// How many faults.
    pub faults: Aside<u32>,
}

/// Writes a line of the trace, if there is one.
macro_rules! say {
    ($world:expr, $($arg:tt)*) => {
        if let Some(trace) = &mut $world.trace.0 {
            trace.push(format!($($arg)*));
        }
    };
}
pub(crate) use say;

/// What the guest does before its pages are on their way: as much as that takes, so that it is not at rest
/// when its writes begin to be tracked.
const BEFORE: u16 = 30;

impl World {
    /// A guest that runs on the source, and a user who wants it elsewhere.
    pub fn new(setup: Setup, bug: Option<PlantedBug>) -> Self {
        let (guest, ram) = Guest::new(setup.pages, BEFORE);
        let run = if setup.paused { Run::Paused } else { Run::Running };
        let mut world = Self {
            setup,
            bug,
            guest,
            at_stop: None,
            qemus: [Qemu { run, ..Qemu::running(ram) }, Qemu::default()],
            up: [true; 2],
            burnt: [false; 2],
            source: SourceAgent::new(&setup),
            target: TargetAgent::default(),
            watchdog: Watchdog::Watches(None),
            conns: Vec::new(),
            next_conn: 0,
            link: true,
            record: Elsewhere::new(),
            spool: Spool::new(setup.spooling != Spooling::Off),
            timers: Vec::new(),
            turn: 0,
            asleep: 0,
            idle: 0,
            ghost: Ghost { wanted: Some(run), ..Ghost::default() },
            breach: Aside(None),
            trace: Aside(None),
            steps: Aside(0),
            faults: Aside(0),
        };
        let control = world.dial(Purpose::Control);
        if let Some(work) = world.source.work.as_deref_mut() {
            work.control = control;
        }
        world
    }

    /// Whether this is done wrongly.
    pub fn has(&self, bug: PlantedBug) -> bool {
        self.bug == Some(bug)
    }

    /// A promise is broken. The first one counts.
    pub fn breach(&mut self, what: impl FnOnce() -> String) {
        if self.breach.0.is_none() {
            let what = what();
            say!(self, "*** {what}");
            self.breach.0 = Some(what);
        }
    }

    /// Dials the target. Its answer comes later; none if the network or the agent is down.
    pub fn dial(&mut self, purpose: Purpose) -> Option<u16> {
        if !self.link || !self.up[1] {
            return None;
        }
        let id = self.next_conn;
        self.next_conn += 1;
        self.conns.push(Conn::dialled(id, purpose));
        Some(id)
    }

    /// The connection of this number, if anything is left of it.
    pub fn conn(&mut self, id: u16) -> Option<&mut Conn> {
        self.conns.iter_mut().find(|conn| conn.id == id)
    }

    /// A side says something on the connection of this number, if there is one.
    pub fn say_on(&mut self, id: impl Into<Option<u16>>, side: Side, word: Word) {
        if let Some(conn) = id.into().and_then(|id| self.conn(id)) {
            conn.say(side, word);
        }
    }

    /// This side has done with the connection of this number.
    pub fn shut(&mut self, id: u16, side: Side) {
        if let Some(conn) = self.conn(id) {
            conn.shut(side);
        }
    }

    /// Sets a timer; one that is set already stays.
    pub fn set(&mut self, timer: Timer) {
        timer.set_in(&mut self.timers);
    }

    /// Calls a timer off.
    pub fn call_off(&mut self, timer: Timer) {
        self.timers.retain(|(_, set)| *set != timer);
    }

    /// Whether it is set.
    pub fn is_set(&self, timer: Timer) -> bool {
        self.timers.iter().any(|(_, set)| *set == timer)
    }

    /// Time passes until the next timer. Says whether anything new can come of it.
    pub fn pass_time(&mut self) -> bool {
        /// After so many times of mere asking, with no answer at all, nothing else will come.
        const ENOUGH: u8 = 12;
        let Some(first) = (0..self.timers.len()).min_by_key(|i| self.timers[*i].0) else { return false };
        if self.timers.iter().all(|(_, timer)| timer.only_asks()) {
            if self.idle >= ENOUGH {
                return false;
            }
            self.idle += 1;
        } else {
            self.idle = 0;
        }
        let (left, timer) = self.timers.swap_remove(first);
        self.timers.iter_mut().for_each(|(other, _)| *other -= left);
        self.timers.sort_unstable();
        say!(self, "-- {left} ms later: {timer:?}");
        self.fire(timer);
        true
    }

    fn fire(&mut self, timer: Timer) {
        match timer {
            Timer::Again(Side::Source) | Timer::Patience(Side::Source) => self.source_timer(timer),
            Timer::Again(Side::Target) | Timer::Patience(Side::Target) => self.target_timer(timer),
            Timer::GiveUp(Side::Source) => self.source_gives_up(),
            Timer::GiveUp(Side::Target) | Timer::Closed => self.target_gives_up(),
            Timer::Missed => self.target_misses_a_stream(),
            // It is called by its thread, which looks whether this is set.
            Timer::CallAgain => {}
            Timer::CallEnd => self.call_ends(),
            Timer::Doubt => self.source_in_doubt(),
            Timer::Lazy(Side::Source) => self.source.journal.sync(),
            Timer::Lazy(Side::Target) => self.target_synced(),
            Timer::Restart(Side::Source) => self.restart_source(),
            Timer::Restart(Side::Target) => self.restart_target(),
            Timer::LinkUp => self.link = true,
            Timer::RecordUp => self.record.up = true,
            Timer::SpoolUp | Timer::SpoolBack => self.spool.up = true,
            Timer::Stall => self.spool_stalls(),
            Timer::Janitor => [Side::Source, Side::Target].into_iter().for_each(|side| self.janitor(side)),
            Timer::Person => self.person(),
        }
    }
}
