//! The kernel's interfaces that a live migration needs, and the only unsafe code of the workspace.
//!
//! Every type here owns what the kernel touches on its behalf, so that none of its methods can be misused
//! from safe code. Races with the guest are outcomes, not errors.

/// A process, held so that its number cannot come to mean another one.
pub mod process;

/// What `/proc` says, taken apart.
pub mod proc;

/// The cgroups of a process.
pub mod cgroup;

/// The service of systemd that a process belongs to.
pub mod service;

/// Whether threads of ours get on.
pub mod pulse;

/// The mappings of a process.
pub mod maps;

/// A file that is somebody's RAM: holes, reads, writes.
pub mod ram;

/// Who else has a file.
pub mod users;

/// Whether programs wait for memory.
pub mod pressure;

/// How much memory is left.
pub mod room;

/// RAM that only its process can reach.
pub mod process_ram;

/// Explicit huge pages of another process.
pub mod huge;

/// Files whose descriptors nobody inherits.
pub mod apart;

/// What a thread sees of the file system, and the programs that it starts.
pub mod mounts;

/// What a program is started without.
pub mod rights;

/// Memory whose content nobody can change any more.
pub mod sealed;

/// Locks on bytes of a file.
pub mod lock;

/// System calls in the place of another process.
pub mod inject;

/// Threads of another process that stand still for a moment.
pub mod stun;

/// Threads that run before all that only compute.
pub mod urgent;

/// A process that stands still as a whole.
pub mod freeze;

/// … and that no signal lets go.
pub mod hold;

/// Write protection and missing pages of another process.
pub mod uffd;

/// Which pages of a process are there, and which were written.
pub mod pagemap;

/// What connections were given and have not carried yet.
pub mod socket;

/// TAPs.
pub mod tap;

/// Memory that was freed.
pub mod heap;

/// Whether the clock is synchronised.
pub mod clock;

/// A tiny KVM guest: whether KVM is usable, by running it.
pub mod kvm;

/// A process to try things on.
pub mod patient;

/// A vhost worker: whether its writes are seen, by having it write.
pub mod vhost;

mod ioctl;

// The tests' guest names this crate from outside.
#[cfg(test)]
extern crate self as sys;

#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;
