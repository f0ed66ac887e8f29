//! What the target's agent and driver hold, and the steps of their acts.

use super::{SpoolRecord, SpoolRecording, Unspool, Unspooled};
use crate::{
    driver::Driver,
    durable::Durable,
    link::Over,
    pages::{Contents, Pages},
    printed::Printed,
    qemu::Was,
    record::{Answer, Asked, Owner},
};
use proto::{
    Target, TargetEffect,
    control::{self, Kind},
};
use std::collections::VecDeque;

/// What is on the target agent's disk.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Store {
    /// The record that decides this migration, where the target holds it (`Offer`).
    pub offer: Option<Owner>,
    /// The VM's way to here (`ArrivalRecord`).
    pub arrival: Option<Arrival>,
    /// It came here, all of it.
    pub arrived: bool,
    /// The migration's id was seen.
    pub seen: bool,
}

/// The target's journal of the VM.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Arrival {
    /// A claim may be on its way to a record elsewhere.
    pub claiming: bool,
    /// This host has claimed it.
    pub claimed: bool,
    /// The guest stood still before the migration stopped it.
    pub stood: bool,
    /// What it misses when it was claimed.
    pub missing: Option<Pages>,
    /// Where it can be found if the source is lost.
    pub spool: Option<SpoolRecord>,
}

/// The agent.
#[derive(Clone, Hash, Default)]
pub struct TargetAgent {
    /// Its store.
    pub store: Durable<Store>,
    /// The migration, or its recovery.
    pub work: Option<Box<Session>>,
    /// Claims that came over a connection, and whether they are written.
    pub serving: VecDeque<(u16, Asked, Option<Answer>)>,
}

/// How pages may be put into memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum WritePolicy {
    /// Nothing runs here.
    #[default]
    Before,
    /// Only missing pages, only where holes are.
    PostCopy,
    /// Nothing is written any more.
    Closed,
}

/// How far the recording of what is missing is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum Recording {
    /// Nothing is to be recorded, or all of it is.
    #[default]
    Done,
    /// To be written.
    Asked(Pages),
    /// Written, not durable.
    Written,
}

/// A migration at its target (`TargetDriver`), or its recovery, which has no machine.
#[derive(Clone, Hash, Default)]
pub struct Session {
    /// The protocol.
    pub machine: Option<Printed<Target>>,
    /// Acts still to be done.
    pub todo: VecDeque<Printed<TargetEffect>>,
    /// What is left of the act that is being done.
    pub steps: VecDeque<Do>,
    /// Signals that were not looked at yet.
    pub heard: VecDeque<Heard>,
    /// The control connection.
    pub control: Option<u16>,
    /// Connections with pages.
    pub conns: Vec<u16>,
    /// Which stream each of those is, or was when it was lost.
    pub streams: Vec<(u8, u16)>,
    /// The one on which missing pages are asked for.
    pub asking_on: Option<u16>,
    /// The last round that has arrived.
    pub round: u32,
    /// Streams that have ended the next one.
    pub ended: u8,
    /// How pages may be put into memory.
    pub stage: WritePolicy,
    /// What the source still has to send.
    pub missing: Pages,
    /// What somebody waits for.
    pub asked: Pages,
    /// Missing pages are heard of.
    pub watches: bool,
    /// How far the recording of what is missing is.
    pub recording: Recording,
    /// The device state.
    pub state: u16,
    /// QEMU reads it, and guest memory with it.
    pub loading: bool,
    /// How the guest was before the source stopped it.
    pub was: Was,
    /// The source said that its guest is back.
    pub source_is_back: bool,
    /// The claim was won.
    pub arrived: bool,
    /// The record's answer.
    pub answer: Option<Answer>,
    /// It is asked again after a while.
    pub asks_later: bool,
    /// The next act that can fail does.
    pub fails: bool,
    /// What has arrived of the next round.
    pub received: Pages,
    /// What the source announced of its memory.
    pub hashes: Vec<u64>,
    /// the authorization is here.
    pub authorized: bool,
    /// What is kept of the VM from before, of each page; 0: nothing.
    pub kept: Contents,
    /// The next page that arrives is damaged.
    pub damages: bool,
    /// The source has a file on the datastore.
    pub wants_spool: bool,
    /// The thread that reads it.
    pub spool: Option<Unspool>,
    /// Nobody needs the file any more.
    pub spool_settled: bool,
    /// What is recorded too late (planted fault only).
    pub record_late: Option<SpoolRecording>,
    /// How far the recording of what the file is good for is.
    pub recording_spool: SpoolRecording,
}

/// What the driver has heard and not looked at.
#[derive(Clone, Hash, Debug)]
pub enum Heard {
    /// The source's word, on this control connection.
    Said(u16, Printed<Kind>),
    /// A connection that belongs to it, accepted and not yet welcome.
    Attach(u16),
    /// A stream has delivered its share of a round.
    RoundEnd(u16, u8, u32),
    /// A connection ended.
    Lost(u16, Over),
    /// The source was waited for long enough, or the agent ends.
    GiveUp,
    /// Something on a connection was wrong.
    Wrong(u16),
    /// Every missing page is in memory.
    AllPlaced,
    /// The source has said this of its file, on this connection.
    Spooled(u16, Printed<control::Spooled>),
    /// The thread that reads it has said this.
    Unspooled(Unspooled),
}

/// One step of an act; between two of them everything can happen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Do {
    /// Starts a QEMU that waits.
    Start,
    /// Writes the offer and the arrival.
    Accept,
    /// An `fsync` of the store.
    Sync,
    /// Opens the source's file on the datastore.
    OpenSpool,
    /// `Prepared`.
    Prepared,
    /// Makes holes.
    Punch(Pages),
    /// Waits until what is missing is recorded.
    AwaitRecorded,
    /// Waits until it is recorded what the file is good for.
    AwaitSpoolRecorded,
    /// Begins to record what is missing.
    Record,
    /// `MissingRecorded`.
    MissingRecorded,
    /// Nothing is missing after all.
    ForgetAnnounced,
    /// Compares memory with what the source announced.
    Compare,
    /// The memory is complete, if nothing is missing.
    Enter,
    /// `Loaded`.
    Loaded,
    /// Writes the claim into the store.
    Claim,
    /// The store's answer to it.
    Claimed,
    /// Writes that a claim may be on its way.
    Intend,
    /// Asks a record elsewhere.
    Ask,
    /// Waits for its answer.
    AwaitAnswer,
    /// Writes that the claim was won.
    Won,
    /// `ClaimWon`.
    TellWon,
    /// Waits before asking again.
    Wait,
    /// Lets the guest run.
    Resume,
    /// The same, without a word.
    Run,
    /// The memory is complete.
    Close,
    /// Writes that nothing is missing.
    Settle,
    /// The file is not read any more, and this side's says so.
    EndSpool,
    /// Says so.
    SaySettled,
    /// Ends the QEMU.
    Destroy,
    /// Writes that nobody can claim here any more.
    Abandon,
    /// Forgets the record.
    Forget,
    /// The recovery goes on from the store.
    TakeUp,
    /// The recovery is over.
    Over,
}

impl Session {
    /// With this machine, or as a recovery.
    pub fn new(machine: Option<Target>) -> Self {
        Self { machine: machine.map(Printed), ..Self::default() }
    }
}

impl Driver for Session {
    type Machine = Target;

    fn machine(&mut self) -> (Option<&mut Target>, &mut VecDeque<Printed<TargetEffect>>) {
        (self.machine.as_deref_mut(), &mut self.todo)
    }

    fn stop_here(&mut self) {
        self.steps.clear();
    }
}
