//! What the source's agent and driver hold, and the steps of their acts.

use super::{Call, Spooling};
use crate::{
    driver::Driver,
    durable::Durable,
    outside::News,
    pages::{Contents, Pages, Table},
    printed::Printed,
    qemu::Was,
    record::{Answer, EPOCH},
    setup::{self, Setup, Way},
    watchdog::Word,
};
use proto::{
    Link, NextStep, Source, SourceEffect, SpoolSaid,
    control::{self, Kind},
};
use std::collections::VecDeque;

/// What the source's journal says of the VM (`DepartureState`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Departure {
    /// Nothing.
    #[default]
    None,
    /// The pause is ours, and this is how the guest was before.
    Pausing(Was),
    /// Only the record decides.
    Fenced(Was),
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
    /// The thread that tells the target that a migration has ended.
    pub call: Option<Call>,
}

/// A migration at its source (`SourceDriver`), or its recovery (`Recovery`), which has no machine.
#[derive(Clone, Hash, Default)]
pub struct Work {
    /// The next step is known, and waits for a moment at which the disks have less to do.
    pub moment: bool,
    /// The protocol.
    pub machine: Option<Printed<Source>>,
    /// Acts still to be done.
    pub todo: VecDeque<Printed<SourceEffect>>,
    /// What is left of the act that is being done.
    pub steps: VecDeque<Do>,
    /// Signals that were not looked at yet.
    pub heard: VecDeque<Heard>,
    /// Written and not yet given to a stream.
    pub dirty: Pages,
    /// Missing to the target.
    pub missing: Pages,
    /// Given to streams in rounds whose arriving was not acknowledged.
    pub unacknowledged: Pages,
    /// The round that is being sent.
    pub round: u32,
    /// Of it: not yet taken by a stream.
    pub left: Pages,
    /// All of it.
    pub set: Pages,
    /// What a careless source has read before (planted fault only).
    pub read_before: Option<Box<Table>>,
    /// How many rounds were sent.
    pub rounds: u8,
    /// Streams.
    pub streams: Vec<Stream>,
    /// The control connection.
    pub control: Option<u16>,
    /// The connection of pages that the target's guest waits for.
    pub answering: Option<u16>,
    /// What the target has in each page as far as these connections tell (`page::Sent`).
    pub sent: Contents,
    /// What is missing and not yet taken by a stream.
    pub to_push: Pages,
    /// Where streams go on.
    pub focus: u8,
    /// Pages are on their way.
    pub begun: bool,
    /// Our pause.
    pub stopped: bool,
    /// How the guest was before it.
    pub was: Was,
    /// A switchover was undone: the next step may be another one.
    pub undone: bool,
    /// How many pauses came to nothing, after which the migration went on.
    pub aborted_pauses: u8,
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
    /// QEMU will refuse to let the guest run.
    pub refuses: bool,
    /// the authorization went ahead of the promise (planted fault only).
    pub authorized_early: bool,
    /// What decides about its connections.
    pub link: Link,
    /// The target knows of no such migration: its answer to the source that is back.
    pub refused: bool,
    /// What the target has of the round after those that have arrived.
    pub received: Pages,
    /// Streams that are opened again.
    pub reopened: Vec<Reopened>,
    /// The record is asked again after a while.
    pub asks_later: bool,
    /// Hashes of the guest's memory.
    pub hashes: Vec<u64>,
    /// The file on the datastore.
    pub spooling: Spooling,
    /// What the target keeps of the VM, as far as it was told and may be named.
    pub kept: Option<KeptTable>,
}

/// What the target has told of what it keeps.
#[derive(Clone, Hash, Default)]
pub struct KeptTable {
    /// Of each page; 0: nothing.
    pub tags: Contents,
    /// All before this page was told.
    pub told: u8,
    /// All was told.
    pub complete: bool,
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
    /// It was lost: nothing is sent on it.
    pub ended: bool,
}

/// A stream that is opened again.
#[derive(Clone, Hash, Debug)]
pub struct Reopened {
    /// Which.
    pub stream: u8,
    /// Its new connection, and whether it was welcome.
    pub conn: (u16, bool),
    /// What the target says that it has.
    pub back: Option<Printed<control::StreamReopened>>,
}

/// What a stream's thread does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Job {
    /// Waits.
    Rest,
    /// Its share of the round.
    Round,
    /// What is missing.
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
    /// The target's word, on this control connection.
    Said(u16, Box<Printed<Kind>>),
    /// The control connection of this number ended.
    Silent(u16),
    /// A stream or the answering thread of this connection failed.
    Lost(u16),
    /// The stream on this connection has sent its share of this round.
    Shared(u16, u32),
    /// The device state was saved in the pause of this number, or not.
    Saved(u8, bool),
    /// The record's answer, by way of the queue.
    Answer(Answer),
    /// The user wants it to end.
    Cancel,
    /// QEMU's event.
    Qemu(News),
    /// A person has fenced the target.
    Resolved,
    /// The thread that writes the spool has said this of a job of this turn.
    Spool(u32, SpoolSaid<Pages>),
    /// It, or the target that reads it, was waited for for too long.
    SpoolLate,
    /// The disks have less to do.
    Moment,
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
    /// Gives what is left of the round to the streams.
    GiveRest,
    /// Tells the pause's watchdog.
    Tell(Word),
    /// Chooses the next step.
    Decide,
    /// Takes it.
    Decided,
    /// Stops the guest.
    Stop,
    /// `Stopped`.
    Stopped,
    /// Stops QEMU as a process.
    Freeze,
    /// Looks whether it has stood still since it was frozen, and sees to it that it does.
    Hold,
    /// Lets it go on.
    Thaw,
    /// Says what is missing.
    SayMissing,
    /// `Fenced`.
    Fenced,
    /// Lets the guest run, and takes its pause out of the journal.
    Resume,
    /// Lets the guest run while the migration goes on.
    AbortPause,
    /// `RanOn`.
    RanOn,
    /// Ends all connections.
    HangUp,
    /// Waits before asking again, if it was asked in vain.
    Wait,
    /// Asks the record.
    Ask,
    /// Waits for its answer.
    AwaitAnswer,
    /// Takes the tracker down.
    Untrack,
    /// Removes the file on the datastore.
    EndSpool,
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
            give_up_ms: u64::from(setup.rejoin),
            verify: setup.verify,
            spool: (setup.spooling != setup::Spooling::Off).then(control::Spool::default),
            ..Default::default()
        };
        // What is missing must be safe before the guest is stopped, and is so soonest if both ways carry it.
        let strict = setup.spooling == setup::Spooling::Strict;
        let first = if setup.way == Way::PostCopy && !strict { NextStep::PostCopy } else { NextStep::Round };
        let (machine, effects) = Source::new(control::Hello::default(), prepare, first);
        let mut work = Work::new(Some(machine));
        work.todo = effects.into_iter().map(Printed).collect();
        work.spooling = Spooling::begin(setup);
        Self { journal: Durable::default(), work: Some(Box::new(work)), call: None }
    }
}

impl Work {
    /// With this machine, or as a recovery.
    pub fn new(machine: Option<Source>) -> Self {
        Self { machine: machine.map(Printed), ..Self::default() }
    }

    /// It was looked what the guest does, and it is not stopped yet.
    pub(crate) fn is_noting(&self) -> bool {
        let stops_next = |effect: &Printed<SourceEffect>| effect.0 == SourceEffect::StopGuest;
        self.steps.contains(&Do::Stop) || self.todo.front().is_some_and(stops_next)
    }

    /// Gives the round's pages to the streams. What the target keeps is named in the first only.
    pub(super) fn give(&mut self) {
        if self.round > 1 {
            self.kept = None;
        }
        self.left = self.set;
        self.streams.iter_mut().for_each(|stream| stream.mine = Pages::default());
        self.all_do(Job::Round);
    }

    /// All streams that are not lost are told so.
    pub(super) fn all_do(&mut self, job: Job) {
        self.streams.iter_mut().filter(|stream| !stream.ended).for_each(|stream| stream.job = job);
    }
}

impl Driver for Work {
    type Machine = Source;

    fn machine(&mut self) -> (Option<&mut Source>, &mut VecDeque<Printed<SourceEffect>>) {
        (self.machine.as_deref_mut(), &mut self.todo)
    }

    /// Nor with what was to follow it: a promise perhaps.
    fn stop_here(&mut self) {
        self.steps.clear();
        self.todo.clear();
    }
}
