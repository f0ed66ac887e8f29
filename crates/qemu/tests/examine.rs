//! A VM is examined without being touched.

mod common;

use common::hand::{ByHand, has};
use qemu::{Vm, qmp::Qmp};
use serde_json::json;

#[test]
fn a_vm_is_examined_without_being_touched() {
    let hand = ByHand::start(&["-m", "64M", "-vnc", "none", "-cdrom", "/dev/null", "-s"]);
    let seen = Vm::examine("vm", &hand.qmp).unwrap();
    assert_eq!(seen.pid.cast_unsigned(), hand.child.id());
    has(&seen.carried, "64.0 MiB of memory");
    has(&seen.different, "the debugger's port (-s) stays behind");
    has(&seen.different, "private to this QEMU");
    has(&seen.hindrances, "/dev/null");

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
