//! A host of real VMs: what the agent asks for, done with QEMU and the engine.

/// Starts, finds and ends VMs.
mod hypervisor;
/// Takes VMs in.
mod incoming;
/// Moves VMs away.
mod outgoing;
/// Lets a guest run whose agent was killed in the middle of its pause.
pub mod watchdog;

pub use hypervisor::QemuHost;
pub use outgoing::Mover;
