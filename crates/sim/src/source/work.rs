//! What the source's agent and driver hold, and the steps of their acts.

use crate::{
    durable::Durable,
    pages::{MOST, Pages, Table},
    printed::Printed,
    record::{Answer, EPOCH},
    setup::{Setup, Way},
};
use proto::{
    Source, SourceAct, SourceEvent, Step,
    control::{self, Kind},
};
use std::collections::VecDeque;

/// What the source's journal says of the VM (`DepartureState`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Departure {
    /// Nothing.
    #[default]
    None,
    /// The pause is ours.
    Pausing,
    /// Only the record decides.
    Promised,
    /// It is the target's.
    Gone,
    /// … and the target has all of it: the VM is forgotten here.
    Settled,
}

/// The agent: what is on its disk, and what it is busy with.
#[derive(Clone, Hash)]
pub struct SourceAgent {
    /// Its journal.
    pub journal: Durable<Departure>,
    /// The migration, or its recovery.
    pub work: Option<Box<Work>>,
}

/// A migration at its source (`SourceDriver`), or its recovery (`Recovery`), which has no machine.
#[derive(Clone, Hash)]
pub struct Work {
    /// The protocol.
    pub machine: Option<Printed<Source>>,
    /// Acts still to be done.
    pub todo: VecDeque<Printed<SourceAct>>,
    /// What is left of the act that is being done.
    pub steps: VecDeque<Do>,
    /// Signals that were not looked at yet.
    pub heard: VecDeque<Heard>,
    /// How many of them were taken out of the channel while something else was waited for (`later`).
    pub later: usize,
    /// Written and not yet given to a stream.
    pub dirty: Pages,
    /// Owed to the target.
    pub owed: Pages,
    /// Given to streams in rounds whose landing was not acknowledged.
    pub unacknowledged: Pages,
    /// The round that is being sent.
    pub round: u32,
    /// Of it: not yet taken by a stream.
    pub left: Pages,
    /// All of it.
    pub set: Pages,
    /// What a careless source has read before (planted fault only).
    pub read_before: Option<Box<Table>>,
    /// How many streams have sent their share.
    pub parts: u8,
    /// How many rounds were sent.
    pub rounds: u8,
    /// Streams.
    pub streams: Vec<Stream>,
    /// The control connection.
    pub control: Option<u16>,
    /// The connection of pages that the target's guest waits for.
    pub answering: Option<u16>,
    /// What was sent of each page over these connections.
    pub sent: [u16; MOST],
    /// What is owed and not yet taken by a stream.
    pub owing: Pages,
    /// Where streams go on.
    pub focus: u8,
    /// Pages are on their way.
    pub begun: bool,
    /// Our pause.
    pub stopped: bool,
    /// The thread that saves the device state: how far it is.
    pub saving: Option<Saving>,
    /// The device state.
    pub state: u16,
    /// It was saved: nothing changes the guest's memory any more.
    pub saved: bool,
    /// The record was asked in vain so often.
    pub in_vain: u8,
    /// A connection that asks the record that the target holds.
    pub asking: Option<u16>,
    /// The record's answer.
    pub answer: Option<Answer>,
    /// The next act that can fail does.
    pub fails: bool,
    /// The permit went ahead of the promise (planted fault only).
    pub permitted_early: bool,
}

/// A stream's thread.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Stream {
    /// Its connection.
    pub conn: u16,
    /// What it does.
    pub job: Job,
    /// Pages that it sent in this round.
    pub mine: Pages,
}

/// What a stream's thread does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Job {
    /// Waits.
    Rest,
    /// Its share of the round.
    Round,
    /// What is owed.
    Push,
}

/// How far the saving of the device state is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Saving {
    /// Asked for.
    Begun,
    /// A device wrote to guest memory.
    Wrote,
}

/// What the driver has heard and not looked at.
#[derive(Clone, Hash, Debug)]
pub enum Heard {
    /// The target's word. Has no generation, as in the engine.
    Said(Printed<Kind>),
    /// The control connection of this number ended.
    Silent(u16),
    /// A stream or the answering thread of this connection failed.
    Lost(u16),
    /// A stream has sent its share of this round.
    Shared(u32),
    /// The device state was saved, or not.
    Saved(bool),
    /// The record's answer, by way of the queue.
    Answer(Answer),
    /// The user wants it to end.
    Cancel,
    /// A person has fenced the target.
    Resolved,
}

/// One step of an act; between two of them everything can happen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Do {
    /// Writes the journal.
    Journal(Departure),
    /// Its `fsync`.
    Sync,
    /// The same for what is done until it works.
    Insist(Departure),
    /// Begins to track writes.
    Track,
    /// Looks which pages there are.
    Look,
    /// Dials the data connections, and the one for faults.
    DialStreams,
    /// Waits until all of them are welcome.
    AwaitStreams,
    /// `StreamsOpen`.
    StreamsOpen,
    /// Reads the round's pages too early (planted fault only).
    ReadEarly,
    /// Collects what was written, and protects it again.
    Collect,
    /// Gives a round to the streams.
    Give(u32),
    /// Chooses the next step.
    Decide,
    /// Stops the guest.
    Stop,
    /// `Stopped`.
    Stopped,
    /// Says what is owed.
    SayOwed,
    /// Waits until the spool has all that is owed, durably.
    AwaitSpool,
    /// `Promised`.
    Promised,
    /// Lets the guest run, and takes its pause out of the journal.
    Resume,
    /// Ends all connections.
    HangUp,
    /// Waits before asking again, if it was asked in vain.
    Wait,
    /// Asks the record.
    Ask,
    /// Waits for its answer.
    AwaitAnswer,
    /// Dials as a source that is back.
    DialResume,
    /// Waits until that is welcome.
    AwaitResume,
    /// Waits for the target's first word.
    AwaitWord,
    /// Takes the tracker down.
    Untrack,
    /// Ends this side's QEMU.
    Destroy,
    /// The recovery goes on from the journal.
    TakeUp,
}

impl SourceAgent {
    /// An agent that was just told to migrate the VM.
    pub fn new(setup: &Setup) -> Self {
        let prepare = control::Prepare {
            streams: u32::from(setup.streams),
            post_copy: setup.post_copy(),
            epoch: EPOCH,
            ..Default::default()
        };
        let first = if setup.way == Way::PostCopy { Step::PostCopy } else { Step::Round };
        let (machine, acts) = Source::new(control::Hello::default(), prepare, first);
        let mut work = Work::new(Some(machine));
        work.todo = acts.into_iter().map(Printed).collect();
        Self { journal: Durable::default(), work: Some(Box::new(work)) }
    }
}

impl Work {
    /// With this machine, or as a recovery.
    pub fn new(machine: Option<Source>) -> Self {
        Self {
            machine: machine.map(Printed),
            todo: VecDeque::new(),
            steps: VecDeque::new(),
            heard: VecDeque::new(),
            later: 0,
            dirty: Pages::default(),
            owed: Pages::default(),
            unacknowledged: Pages::default(),
            round: 0,
            left: Pages::default(),
            set: Pages::default(),
            read_before: None,
            parts: 0,
            rounds: 0,
            streams: Vec::new(),
            control: None,
            answering: None,
            sent: [0; MOST],
            owing: Pages::default(),
            focus: 0,
            begun: false,
            stopped: false,
            saving: None,
            state: 0,
            saved: false,
            in_vain: 0,
            asking: None,
            answer: None,
            fails: false,
            permitted_early: false,
        }
    }

    pub(super) fn event(&mut self, event: SourceEvent) {
        if let Some(machine) = &mut self.machine {
            self.todo.extend(machine.handle(event).into_iter().map(Printed));
        }
    }

    /// An act failed: what is left of it, and what was to follow it, is not done.
    pub(super) fn broke(&mut self, what: &str) {
        self.steps.clear();
        self.todo.clear();
        self.event(SourceEvent::Broke { what: what.into(), why: "chance".into() });
    }
}
