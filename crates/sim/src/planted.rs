//! Errors that are planted, to see that the exploration finds them. Nothing of the product knows of them.

macro_rules! page_faults {
    ($($(#[doc = $doc:literal])+ $name:ident = $word:literal,)+) => {
        /// What is done wrongly on purpose.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum PlantedBug {
            $($(#[doc = $doc])+ $name,)+
        }

        impl PlantedBug {
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

page_faults! {
    /// the authorization is sent, and only then the promise recorded.
    AuthorizesBeforeFence = "authorizes-before-fence",
    /// The promise counts as durable before its `fsync`.
    FenceNotSynced = "fence-not-synced",
    /// A claim is answered before its `fsync`.
    ClaimNotSynced = "claim-not-synced",
    /// The target claims first, and records what it misses thereafter.
    MissingNotRecorded = "missing-not-recorded",
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
    /// A round begins before the one before it has arrived.
    NoBarrier = "no-barrier",
    /// The source destroys its copy when it hears of the commit, although pages are missing.
    ForgetBeforeSettled = "forget-before-settled",
    /// A target that gives up forgets the record with everything else.
    AbandonForgetsRecord = "abandon-forgets-record",
    /// A restarted source lets a promised guest run without asking the record.
    ResumeWithoutAsking = "resume-without-asking",
    /// The guest is stopped before anybody is told that the pause is ours: neither its watchdog nor the
    /// journal.
    PauseBeforeJournal = "pause-before-journal",
    /// A reference to the target's own memory is believed without being verified.
    KnownNotVerified = "known-not-verified",
    /// What goes into the spool counts as durable before its `fsync`.
    SpoolNotSynced = "spool-not-synced",
    /// A strict source promises before all that is missing is durable in the spool, and read back.
    FenceBeforeSafe = "fence-before-safe",
    /// What the guest wrote since the last pass into the spool does not go there.
    InsecureForgotten = "insecure-forgotten",
    /// … nor what was written while the device state was saved.
    SavedNotSecured = "saved-not-secured",
    /// What came back of the spool's part in a round is not sent again.
    ReturnedForgotten = "returned-forgotten",
    /// … or counts as known at the target.
    SpooledIsKnown = "spooled-is-known",
    /// After a lost link what only the spool has of a round counts as having arrived.
    UnsureCountsAsReceived = "unsure-counts-as-received",
    /// A round is over before the target has said that nothing more of a failed spool will arrive.
    StopNotAwaited = "stop-not-awaited",
    /// … which it says although it goes on arriving it.
    SpoolStopIgnored = "spool-stop-ignored",
    /// What the source told of its spool before a link was lost still arrives thereafter.
    FenceOpen = "fence-open",
    /// What was in the spool before a round arrives with it.
    LandsFromAnywhere = "arrives-from-anywhere",
    /// The target claims first, and records thereafter where the spool is.
    SpoolNotRecorded = "spool-not-recorded",
    /// A restarted target does not look whether there is one.
    SpoolForgotten = "spool-forgotten",
    /// Pages are placed from extents of which the source has not said that they are current.
    FloorIgnored = "floor-ignored",
    /// … from those that are older than one that is missing.
    GapBelieved = "gap-believed",
    /// A damaged extent is taken for whole.
    TornForWhole = "torn-for-whole",
    /// Where the last version of a page cannot be read, an older one is taken.
    OlderVersionTaken = "older-version-taken",
    /// The source removes its spool when it hears of the commit.
    SpoolEndsWithCommit = "spool-ends-with-commit",
    /// What the target left in its file, for a source that it could not tell, stays there.
    TargetsFileLeft = "targets-file-left",
    /// The janitor removes what its own host has made, whatever the journal says.
    JanitorIgnoresJournals = "janitor-ignores-journals",
    /// The target says on the datastore that it has everything when its guest runs.
    CompleteTooEarly = "complete-too-early",
    /// A claim that is asked again, because its answer was lost, is taken for another one.
    ClaimNotIdempotent = "claim-not-idempotent",
    /// What a stream took before its connection broke counts as having arrived.
    MissingDroppedOnReconnect = "missing-dropped-on-reconnect",
    /// A missing page that arrives twice overwrites what the guest wrote meanwhile.
    PlaceOverwrites = "place-overwrites",
    /// A restarted target lets a guest run that misses nothing, and leaves it waiting at its holes.
    WatchLeft = "watch-left",
    /// Missing pages are not made holes.
    HolesNotMade = "holes-not-made",
    /// A missing page is struck off when it is asked for, not when it is there.
    StruckOffEarly = "struck-off-early",
    /// A record that was restored from an old backup is believed.
    BackupBelieved = "backup-believed",
    /// A restarted target gives up although it may have claimed at a record held elsewhere.
    IntentForgotten = "intent-forgotten",
    /// The disks stay active on the source when the device state has been saved.
    DisksStayActive = "disks-stay-active",
    /// The word that the target has committed, heard while the record is being asked, is taken for a living
    /// connection.
    CommitHeardTooLate = "commit-heard-too-late",
    /// After a lost link the target's memory is taken for blank, although much was sent.
    SentTakenForBlank = "sent-taken-for-blank",
    /// After a lost link what was sent over the old connections counts as having arrived.
    SentKept = "sent-kept",
    /// After a lost link nothing of the round is sent again.
    RestNotSent = "rest-not-sent",
    /// The target says of pages that they have arrived which it has only received.
    ArrivedCountsAsReceived = "arrived-counts-as-received",
    /// What was on its way over old connections arrives even after a source is back on new ones.
    OldStreamsReceiveOn = "old-streams-receive-on",
    /// A target that was told to give up does so although it may own the VM.
    GivesUpAfterAuthorization = "gives-up-after-authorization",
    /// The target is told of a guest that is back, although it is not.
    CallsOffWithoutGuest = "calls-off-without-guest",
    /// A target whose source is lost waits for it for ever.
    NeverGivesUp = "never-gives-up",
    /// The pause's watchdog is not told of the promise: it lets the guest run thereafter, too.
    WatchdogAfterFence = "watchdog-after-fence",
    /// It hears of the pause when the guest stands still already.
    WatchdogToldLate = "watchdog-told-late",
    /// It never lets a guest run.
    WatchdogIdle = "watchdog-idle",
    /// It lets a guest run that somebody had paused.
    WatchdogForgetsRunState = "watchdog-forgets-run-state",
    /// A guest is taken to have run before it was stopped.
    RunStateAssumed = "run-state-assumed",
    /// How it was is looked at only before it is stopped.
    RunStateReadEarly = "run-state-read-early",
    /// A guest that has switched itself off, sleeps, or has panicked is carried over as if it ran.
    EndedGuestCarried = "ended-guest-carried",
    /// A failed migration lets a guest run that somebody had paused.
    PausedSetRunning = "paused-set-running",
    /// A restarted source does.
    RecoveryForgetsRunState = "recovery-forgets-run-state",
    /// The target does.
    TargetForgetsRunState = "target-forgets-run-state",
    /// Devices and media are not looked at again in the pause.
    ConfigNotLookedAt = "config-not-looked-at",
    /// QEMU's own migration is not noticed.
    TheirMigrationIgnored = "their-migration-ignored",
    /// A guest that QEMU's own migration has taken away is let run here.
    PostmigrateResumed = "postmigrate-resumed",
    /// What QEMU's events have told of the pause is not looked at before the authorization.
    EventsNotLookedAt = "events-not-looked-at",
    /// QEMU is stopped as a process only when the authorization is out.
    FrozenAfterAuthorization = "frozen-after-authorization",
    /// … or never.
    NotFrozen = "not-frozen",
    /// Nobody looks whether a signal has let it go before the promise.
    SignalNotSeen = "signal-not-seen",
    /// … nor is it kept from that thereafter.
    NotHeld = "not-held",
    /// The watchdog does not let it go on.
    WatchdogLeavesFrozen = "watchdog-leaves-frozen",
    /// It is not let go on when the guest is to run here again.
    NotThawed = "not-thawed",
    /// The target compares nothing, and says that all is well.
    VerifySkipped = "verify-skipped",
    /// The source hashes its memory before a device has written to it for the last time.
    HashedTooEarly = "hashed-too-early",
    /// What was written before a pause that came to nothing, and not collected, is forgotten: the tracker
    /// begins anew.
    WritesLostByRunningOn = "writes-lost-by-running-on",
    /// What was announced as missing before such a pause is not sent otherwise.
    MissingLostByRunningOn = "missing-lost-by-running-on",
    /// The guest runs on although its device state is still being saved, and that is taken for the state of
    /// the next pause.
    OldStateBelieved = "old-state-believed",
    /// A target whose source is back with a running guest still takes nothing but what it would miss.
    MissingKeptByTarget = "missing-kept-by-target",
    /// It does not, but its journal still says what it would miss.
    MissingKeptInJournal = "missing-kept-in-journal",
    /// A stream that was lost and opened again does not send again what the target lacks of it.
    StreamRestNotSent = "stream-rest-not-sent",
    /// … or takes it for known there.
    StreamSentKept = "stream-sent-kept",
    /// What was on its way over the old connection of such a stream arrives even after the new one is
    /// welcome.
    OldStreamLandsOn = "old-stream-arrives-on",
    /// Such a stream has no part in a round that began before it went on.
    StreamMissesRound = "stream-misses-round",
    /// What the target keeps from before is taken for what was named, without being verified.
    KeptNotVerified = "kept-not-verified",
    /// A page that was named and refused counts as having arrived.
    RefusedCountsAsReceived = "refused-counts-as-received",
    /// What the target said to be missing, when it welcomed such a stream, replaces what was announced since.
    StreamOwedReplaced = "stream-missing-replaced",
}

impl PlantedBug {
    /// Whether it takes a spool: the list has these together.
    pub(crate) fn is_of_spool(self) -> bool {
        (Self::SpoolNotSynced as u8..=Self::CompleteTooEarly as u8).contains(&(self as u8))
    }

    /// Whether it takes a target that keeps memory of the VM.
    pub(crate) fn is_of_kept(self) -> bool {
        matches!(self, Self::KeptNotVerified | Self::RefusedCountsAsReceived)
    }

    /// Whether it takes somebody else who acts on the VM: the list has these together, too.
    pub(crate) fn is_of_others(self) -> bool {
        (Self::WatchdogForgetsRunState as u8..=Self::NotThawed as u8).contains(&(self as u8))
    }
}

impl std::str::FromStr for PlantedBug {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        Self::ALL
            .iter()
            .copied()
            .find(|f| f.word() == word)
            .ok_or_else(|| format!("no fault is called {word}"))
    }
}
