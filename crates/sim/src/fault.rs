//! Errors that are planted, to see that the exploration finds them. Nothing of the product knows of them.

macro_rules! faults {
    ($($(#[doc = $doc:literal])+ $name:ident = $word:literal,)+) => {
        /// What is done wrongly on purpose.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Fault {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Fault {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// As it is written on the command line.
            pub fn word(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)+
                }
            }
        }
    };
}

faults! {
    /// The permit is sent, and only then the promise recorded.
    PermitBeforePromise = "permit-before-promise",
    /// The promise counts as durable before its `fsync`.
    PromiseNotSynced = "promise-not-synced",
    /// A claim is answered before its `fsync`.
    ClaimNotSynced = "claim-not-synced",
    /// The target claims first, and records what it is owed thereafter.
    OwedNotRecorded = "owed-not-recorded",
    /// A round's pages are read, and only then protected against writes again.
    ReadBeforeProtect = "read-before-protect",
    /// The source looks which pages there are, and only then begins to track writes.
    LookBeforeTracking = "look-before-tracking",
    /// What is written while the device state is saved is forgotten.
    WritesOfSaveForgotten = "writes-of-save-forgotten",
    /// The target lets the guest run and claims it afterwards.
    ClaimAfterCont = "claim-after-cont",
    /// A source that asked the record in vain for long enough takes the guest for its own.
    TimeoutDecides = "timeout-decides",
    /// A round begins before the one before it has landed.
    NoBarrier = "no-barrier",
    /// The source destroys its copy when it hears of the commit, although pages are owed.
    ForgetBeforeSettled = "forget-before-settled",
    /// A target that gives up forgets the record with everything else.
    AbandonForgetsRecord = "abandon-forgets-record",
    /// A restarted source lets a promised guest run without asking the record.
    ResumeWithoutAsking = "resume-without-asking",
    /// The guest is stopped before it is journaled that the pause is ours.
    PauseBeforeJournal = "pause-before-journal",
    /// A reference to the target's own memory is believed without being verified.
    KnownNotVerified = "known-not-verified",
    /// In strict mode the source promises before the spool's `fsync`.
    SpoolNotSynced = "spool-not-synced",
    /// Pages go into the spool while the guest still writes them.
    SpoolBeforeStop = "spool-before-stop",
    /// A claim that is asked again, because its answer was lost, is taken for another one.
    ClaimNotIdempotent = "claim-not-idempotent",
    /// What a stream took before its connection broke counts as having arrived.
    OwedDroppedOnReconnect = "owed-dropped-on-reconnect",
    /// An owed page that arrives twice overwrites what the guest wrote meanwhile.
    PlaceOverwrites = "place-overwrites",
    /// Owed pages are not made holes.
    HolesNotMade = "holes-not-made",
    /// An owed page is struck off when it is asked for, not when it is there.
    StruckOffEarly = "struck-off-early",
    /// A record that was restored from an old backup is believed.
    BackupBelieved = "backup-believed",
    /// A restarted target gives up although it may have claimed at a record held elsewhere.
    IntentForgotten = "intent-forgotten",
    /// The disks stay active on the source when the device state has been saved.
    DisksStayActive = "disks-stay-active",
    /// The word that the target has committed, heard while the record is being asked, is taken for a living connection.
    CommitHeardTooLate = "commit-heard-too-late",
}

impl std::str::FromStr for Fault {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        Self::ALL
            .iter()
            .copied()
            .find(|f| f.word() == word)
            .ok_or_else(|| format!("no fault is called {word}"))
    }
}
