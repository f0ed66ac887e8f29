//! QEMU's own migration of a VM, which somebody may begin at any moment: whether its guest may be set running
//! here (I1).

/// Whether it is over, or was never begun, by its status in `query-migrate`. Everything else may take the
/// guest elsewhere.
pub(crate) fn is_over(migration: &str) -> bool {
    matches!(migration, "none" | "completed" | "failed" | "cancelled")
}

/// Whether the guest runs on the other side already, and lacks memory there.
fn is_post_copy(migration: &str) -> bool {
    migration.starts_with("postcopy")
}

/// What is to be said of a QEMU in this run state, with this migration of its own, whose guest runs elsewhere
/// or is about to: it must not be set running here (I1). After a migration that failed or was cancelled
/// QEMU's guest is still this one.
pub(crate) fn elsewhere(run_state: &str, migration: &str) -> Option<&'static str> {
    match run_state {
        "running" => None,
        _ if is_post_copy(migration) => Some(
            "QEMU's own migration has taken it to another QEMU and goes on as post-copy, so it is not set \
             running here; wait for its end there",
        ),
        "postmigrate" if !matches!(migration, "failed" | "cancelled") => Some(
            "QEMU's own migration has taken it to another QEMU (it is in state postmigrate), so it is not \
             set running here; if it does not run there, set it running here (cont)",
        ),
        "finish-migrate" => Some(
            "QEMU's own migration is just taking it to another QEMU (it is in state finish-migrate), so it \
             is not set running here; wait for its end, or cancel it (migrate_cancel)",
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i1_a_guest_that_qemu_itself_took_elsewhere_is_not_ours() {
        let table = [
            ("paused", "none", false),
            ("paused", "completed", false),
            ("prelaunch", "completed", false),
            ("running", "active", false),
            ("running", "completed", false),
            ("io-error", "failed", false),
            ("postmigrate", "completed", true),
            ("postmigrate", "none", true),
            ("postmigrate", "failed", false),
            ("postmigrate", "cancelled", false),
            ("finish-migrate", "active", true),
            ("finish-migrate", "device", true),
            ("finish-migrate", "postcopy-active", true),
            ("paused", "postcopy-paused", true),
        ];
        for (run_state, migration, taken) in table {
            assert_eq!(elsewhere(run_state, migration).is_some(), taken, "{run_state} {migration}");
        }
    }
}
