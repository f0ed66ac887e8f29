//! Tables: what counts as a change of a VM, and what does not.

use super::*;
use Setting::*;

fn of(run_state: &str, things: &[(Setting, &str, &str)]) -> Snapshot {
    let mut taken = Snapshot { run_state: run_state.to_owned(), ..Snapshot::default() };
    for kind in [Migration, Blocker, Device, Drive, Node, Job, Export, Cpu] {
        taken.kinds.insert(kind, BTreeMap::new());
    }
    for (kind, name, value) in things {
        taken.kinds.entry(*kind).or_default().insert((*name).to_owned(), (*value).to_owned());
    }
    taken
}

#[test]
fn what_was_changed_is_told_with_what_to_do_about_it() {
    type Things = &'static [(Setting, &'static str, &'static str)];
    let table: [(Things, Things, &[&str]); 10] = [
        (&[(Device, "a", "ide-cd")], &[(Device, "a", "ide-cd")], &[]),
        (
            &[],
            &[(Device, "late", "usb-tablet")],
            &["device late (usb-tablet) was plugged in; migrate again when that is done"],
        ),
        (
            &[(Device, "gone", "pc-dimm")],
            &[],
            &["device gone (pc-dimm) was unplugged; migrate again when that is done"],
        ),
        (
            &[(Drive, "cd", "node n (/a.iso)")],
            &[(Drive, "cd", "empty")],
            &["drive cd is empty, and was node n (/a.iso); migrate again when that is done"],
        ),
        (
            &[],
            &[(Job, "b", "backup")],
            &["job b (backup) was started; wait for its end, or cancel it (job-cancel), and migrate again"],
        ),
        (
            &[],
            &[(Export, "e", "nbd of node d0")],
            &["export e (nbd of node d0) was added; remove it (block-export-del), and migrate again"],
        ),
        (
            &[(Migration, "status", "none")],
            &[(Migration, "status", "active")],
            &["QEMU's own migration status is active, and was none; migrate again when that is done"],
        ),
        (&[], &[(Cpu, "1", "")], &["vCPU 1 was plugged in; migrate again when that is done"]),
        // A job has nodes of its own.
        (
            &[],
            &[(Job, "b", "backup"), (Node, "#block1", "copy-before-write")],
            &["job b (backup) was started; wait for its end, or cancel it (job-cancel), and migrate again"],
        ),
        // It was not asked for memory in the pause.
        (&[(Memory, "ram0", "1 bytes")], &[], &[]),
    ];
    for (before, now, told) in table {
        assert_eq!(of("running", before).differences(&of("paused", now)), told);
    }
}

#[test]
fn i1_a_vm_that_qemu_itself_took_elsewhere_is_told() {
    let taken = of("postmigrate", &[(Migration, "status", "completed")]);
    let told = taken.hindrances();
    assert!(told.len() == 1 && told[0].contains("is not set running here"), "{told:?}");
    let changed = of("running", &[(Migration, "status", "none")]).differences(&taken);
    assert_eq!(changed[0], told[0]);
}

#[test]
fn a_migration_does_not_begin_beside_a_job_an_export_or_another() {
    let begun = of(
        "running",
        &[
            (Migration, "status", "active"),
            (Job, "drive-virtio0", "mirror"),
            (Export, "nbd0", "nbd of node d0"),
        ],
    );
    let told = [
        "QEMU's own migration of it is under way (it is active); wait for its end, or cancel it \
         (migrate_cancel)",
        "job drive-virtio0 (mirror) runs and would be lost; wait for its end, or cancel it (job-cancel \
         drive-virtio0)",
        "export nbd0 (nbd of node d0) would end; let its users finish, and remove it (block-export-del nbd0)",
    ];
    assert_eq!(begun.hindrances(), told);
    for over in ["none", "completed", "failed", "cancelled"] {
        assert_eq!(of("running", &[(Migration, "status", over)]).hindrances(), Vec::<String>::new());
    }
}
