//! Can this host migrate VMs? Every requirement is tried, not looked up: what the documentation of a kernel
//! promises and what a hardened host allows are two things.

mod diagnosis;
mod host;
mod kvm;
mod network;
mod pages;
mod qemu;
mod reach;
mod render;
mod service;
mod user;
mod vhost;

pub use diagnosis::{Check, Diagnosis, Feature, Status};
pub use render::{Style, render};

use std::path::PathBuf;

/// Tries everything that a migration needs from this host, in a second or so. `qemus` are QEMU binaries to
/// look at besides those in `PATH`.
pub fn examine(qemus: &[PathBuf]) -> Diagnosis {
    let patient = sys::patient::Patient::start();
    let mut checks = vec![host::kernel()];
    checks.extend(reach::checks(&patient));
    checks.extend(pages::checks(&patient));
    checks.extend(qemu::checks(qemus));
    checks.push(user::check());
    checks.push(kvm::check());
    checks.push(vhost::check());
    checks.extend(host::resources());
    checks.extend(network::checks());
    checks.extend(service::service());
    Diagnosis::new(checks)
}
