//! A VM is examined without being touched.

mod common;

use common::hand::{ByHand, has};
use qemu::{Vm, qmp::Qmp};
use serde_json::json;
use std::sync::Arc;
use sys::{inject::Borrowed, process::PidFd};

#[test]
fn a_vm_is_examined_without_being_touched() {
    let hand = ByHand::start(&["-m", "64M", "-vnc", "none", "-cdrom", "/dev/null", "-s"]);
    // Nobody can attach to it now.
    let process = Arc::new(PidFd::open(hand.child.id().cast_signed()).unwrap());
    let traced = Borrowed::seize(&process).unwrap();
    let seen = Vm::examine("vm", &hand.qmp).unwrap();
    assert_eq!(seen.pid, process.pid());
    has(&seen.carried, "64.0 MiB of memory");
    has(&seen.different, "the debugger's port (-s) stays behind");
    has(&seen.different, "private to this QEMU");
    has(&seen.hindrances, "/dev/null");
    drop(traced);

    // As it was: without the events that a migration needs, and free for somebody else's monitor.
    let mut qmp = Qmp::connect(&hand.qmp).unwrap();
    let capabilities = qmp.execute("query-migrate-capabilities", json!({})).unwrap();
    let events = capabilities.as_array().unwrap().iter().find(|one| one["capability"] == "events").unwrap();
    assert_eq!(events["state"], false);
}

#[test]
fn what_can_be_adopted_has_no_hindrance() {
    let hand = ByHand::start(&["-m", "64M", "-netdev", "user,id=u", "-device", "virtio-net-pci,netdev=u"]);
    let seen = Vm::examine("vm", &hand.qmp).unwrap();
    assert_eq!(seen.hindrances, Vec::<String>::new());
    has(&seen.carried, "1 device");
    Vm::adopt("hand", &hand.qmp).unwrap();
}
