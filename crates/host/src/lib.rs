//! A host of real VMs: what the agent asks for, done with QEMU and the engine.

/// Memory that is kept free for VMs on their way here.
mod arrivals;
/// What is kept of VMs that have left.
mod copies;
/// Starts, finds and ends VMs.
mod hypervisor;
/// Takes VMs in.
mod incoming;
/// Removes what crashed migrations left on datastores.
mod janitor;
/// Moves VMs away.
mod outgoing;
/// Who owns a VM: the record that decides each migration.
mod record;
/// A second QEMU for a VM that runs here.
mod second;
/// VMs whose QEMU is not asked.
mod unasked;
/// Lets a guest run whose agent was killed in the middle of its pause.
pub mod watchdog;

pub use hypervisor::QemuHost;
pub use outgoing::Mover;
pub use qemu::Kvm;
pub use record::shared_record;
