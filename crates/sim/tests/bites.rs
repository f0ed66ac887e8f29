//! The simulation bites: each planted error is found by what the tests run, and by the error alone.

use sim::{Fault, hunt};

fn is_found(fault: Fault) {
    let (found, runs) = hunt(fault);
    let Some(finding) = found else { panic!("{} is not found in {runs} runs", fault.word()) };
    // It can be had again …
    let mut schedule = finding.schedule;
    assert_eq!(schedule.replay().breach.0, Some(finding.what.clone()), "{schedule}");
    assert_eq!(schedule.to_string().parse(), Ok(schedule.clone()));
    // … and without the error the same storm does no harm.
    schedule.fault = None;
    assert_eq!(schedule.replay().breach.0, None, "{schedule}");
}

macro_rules! bites {
    ($($test:ident: $fault:ident,)+) => {
        $(#[test]
        fn $test() {
            is_found(Fault::$fault);
        })+

        #[test]
        fn every_planted_error_has_its_test() {
            assert_eq!(Fault::ALL, [$(Fault::$fault),+]);
        }
    };
}

bites! {
    a_permit_before_the_promise_is_found: PermitBeforePromise,
    a_promise_without_fsync_is_found: PromiseNotSynced,
    a_claim_without_fsync_is_found: ClaimNotSynced,
    an_owed_set_that_is_not_recorded_is_found: OwedNotRecorded,
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
    a_spool_of_a_running_guest_is_found: SpoolBeforeStop,
    a_claim_that_is_not_idempotent_is_found: ClaimNotIdempotent,
    pages_dropped_with_their_connection_are_found: OwedDroppedOnReconnect,
    a_late_page_that_overwrites_is_found: PlaceOverwrites,
    owed_pages_that_are_no_holes_are_found: HolesNotMade,
    a_page_struck_off_early_is_found: StruckOffEarly,
    a_believed_backup_is_found: BackupBelieved,
    a_forgotten_intent_to_claim_is_found: IntentForgotten,
    disks_that_stay_active_are_found: DisksStayActive,
    a_commit_heard_too_late_is_found: CommitHeardTooLate,
}
