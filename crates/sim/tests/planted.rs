//! Each planted error is found by what the tests run, and by the error alone.

use sim::{PlantedBug, hunt};

fn is_found(bug: PlantedBug) {
    let (found, runs) = hunt(bug);
    let Some(finding) = found else { panic!("{} is not found in {runs} runs", bug.word()) };
    // It can be had again …
    let mut schedule = finding.schedule;
    assert_eq!(schedule.replay().breach.0, Some(finding.what.clone()), "{schedule}");
    assert_eq!(schedule.to_string().parse(), Ok(schedule.clone()));
    // … and without the error the same storm does no harm.
    schedule.bug = None;
    assert_eq!(schedule.replay().breach.0, None, "{schedule}");
}

macro_rules! found {
    ($($test:ident: $bug:ident,)+) => {
        $(#[test]
        fn $test() {
            is_found(PlantedBug::$bug);
        })+

        #[test]
        fn every_planted_error_has_its_test() {
            assert_eq!(PlantedBug::ALL, [$(PlantedBug::$bug),+]);
        }
    };
}

found! {
    a_permit_before_the_promise_is_found: AuthorizesBeforeFence,
    a_promise_without_fsync_is_found: FenceNotSynced,
    a_claim_without_fsync_is_found: ClaimNotSynced,
    an_owed_set_that_is_not_recorded_is_found: MissingNotRecorded,
    reading_before_protecting_is_found: ReadBeforeProtect,
    looking_before_tracking_is_found: LookBeforeTracking,
    forgotten_writes_of_the_save_are_found: WritesOfSaveForgotten,
    a_claim_after_cont_is_found: ClaimAfterCont,
    a_timeout_that_decides_is_found: TimeoutDecides,
    a_round_without_barrier_is_found: NoBarrier,
    a_copy_destroyed_too_early_is_found: ForgetBeforeSettled,
    a_record_forgotten_by_its_target_is_found: AbandonForgetsRecord,
    a_resume_without_asking_is_found: ResumeWithoutAsking,
    a_pause_before_its_journal_is_found: PauseBeforeJournal,
    an_unverified_reference_is_found: KnownNotVerified,
    a_spool_without_fsync_is_found: SpoolNotSynced,
    a_promise_before_the_spool_is_safe_is_found: FenceBeforeSafe,
    writes_after_the_last_pass_that_are_not_safe_are_found: InsecureForgotten,
    writes_of_the_save_that_are_not_safe_are_found: SavedNotSecured,
    pages_that_the_spool_gave_back_in_vain_are_found: ReturnedForgotten,
    pages_of_a_failed_spool_that_count_as_known_are_found: SpooledIsKnown,
    pages_in_the_spool_that_count_as_landed_are_found: UnsureCountsAsReceived,
    a_failed_spool_whose_end_is_not_awaited_is_found: StopNotAwaited,
    a_failed_spool_that_lands_on_is_found: SpoolStopIgnored,
    a_spool_that_lands_after_a_lost_link_is_found: FenceOpen,
    an_older_round_that_lands_with_a_newer_one_is_found: LandsFromAnywhere,
    a_spool_that_is_recorded_too_late_is_found: SpoolNotRecorded,
    a_restarted_target_that_forgets_the_spool_is_found: SpoolForgotten,
    pages_from_below_the_floor_are_found: FloorIgnored,
    pages_from_behind_a_gap_are_found: GapBelieved,
    a_torn_extent_that_is_taken_for_whole_is_found: TornForWhole,
    an_older_version_that_is_taken_instead_is_found: OlderVersionTaken,
    a_spool_that_ends_with_the_commit_is_found: SpoolEndsWithCommit,
    a_file_of_the_targets_that_is_left_is_found: TargetsFileLeft,
    a_janitor_that_ignores_journals_is_found: JanitorIgnoresJournals,
    a_complete_that_is_said_too_early_is_found: CompleteTooEarly,
    a_claim_that_is_not_idempotent_is_found: ClaimNotIdempotent,
    pages_dropped_with_their_connection_are_found: MissingDroppedOnReconnect,
    a_late_page_that_overwrites_is_found: PlaceOverwrites,
    a_guest_that_is_left_waiting_at_its_holes_is_found: WatchLeft,
    owed_pages_that_are_no_holes_are_found: HolesNotMade,
    a_page_struck_off_early_is_found: StruckOffEarly,
    a_believed_backup_is_found: BackupBelieved,
    a_forgotten_intent_to_claim_is_found: IntentForgotten,
    disks_that_stay_active_are_found: DisksStayActive,
    a_commit_heard_too_late_is_found: CommitHeardTooLate,
    a_target_that_is_taken_for_blank_is_found: SentTakenForBlank,
    knowledge_of_a_lost_connection_is_found: SentKept,
    a_rest_that_is_not_sent_is_found: RestNotSent,
    pages_that_count_before_they_land_are_found: ArrivedCountsAsReceived,
    old_streams_that_land_on_are_found: OldStreamsReceiveOn,
    giving_up_what_may_be_owned_is_found: GivesUpAfterAuthorization,
    a_call_off_without_a_guest_is_found: CallsOffWithoutGuest,
    a_target_that_never_gives_up_is_found: NeverGivesUp,
    a_watchdog_that_acts_after_the_promise_is_found: WatchdogAfterFence,
    a_watchdog_that_is_told_late_is_found: WatchdogToldLate,
    a_watchdog_that_does_not_act_is_found: WatchdogIdle,
    a_watchdog_that_starts_a_paused_guest_is_found: WatchdogForgetsRunState,
    a_run_state_that_is_assumed_is_found: RunStateAssumed,
    a_run_state_that_is_read_too_early_is_found: RunStateReadEarly,
    an_ended_guest_that_is_carried_over_is_found: EndedGuestCarried,
    a_failure_that_starts_a_paused_guest_is_found: PausedSetRunning,
    a_recovery_that_starts_a_paused_guest_is_found: RecoveryForgetsRunState,
    a_target_that_starts_a_paused_guest_is_found: TargetForgetsRunState,
    a_vm_that_is_not_looked_at_again_is_found: ConfigNotLookedAt,
    a_migration_of_qemus_that_is_ignored_is_found: TheirMigrationIgnored,
    a_guest_resumed_after_qemus_migration_is_found: PostmigrateResumed,
    events_that_are_not_looked_at_are_found: EventsNotLookedAt,
    a_qemu_that_is_frozen_after_the_permit_is_found: FrozenAfterAuthorization,
    a_qemu_that_is_not_frozen_is_found: NotFrozen,
    a_signal_that_nobody_sees_is_found: SignalNotSeen,
    a_qemu_that_a_signal_lets_go_is_found: NotHeld,
    a_watchdog_that_leaves_qemu_frozen_is_found: WatchdogLeavesFrozen,
    a_qemu_that_is_not_thawed_is_found: NotThawed,
    a_verification_that_is_skipped_is_found: VerifySkipped,
    hashes_of_a_device_that_still_writes_are_found: HashedTooEarly,
    writes_that_running_on_forgets_are_found: WritesLostByRunningOn,
    owed_pages_that_running_on_forgets_are_found: MissingLostByRunningOn,
    a_device_state_of_an_earlier_pause_is_found: OldStateBelieved,
    owed_pages_that_the_target_keeps_are_found: MissingKeptByTarget,
    owed_pages_that_its_journal_keeps_are_found: MissingKeptInJournal,
    a_stream_whose_rest_is_not_sent_is_found: StreamRestNotSent,
    a_lost_stream_that_counts_as_known_is_found: StreamSentKept,
    an_old_stream_that_lands_on_is_found: OldStreamLandsOn,
    a_stream_that_misses_a_round_is_found: StreamMissesRound,
    a_kept_page_that_is_not_verified_is_found: KeptNotVerified,
    a_refused_page_that_counts_as_received_is_found: RefusedCountsAsReceived,
    an_owed_set_that_a_stream_replaces_is_found: StreamOwedReplaced,
}
