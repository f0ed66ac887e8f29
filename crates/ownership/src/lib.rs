//! Who owns a VM, written where all hosts can ask: in a shared directory, or in etcd.
//!
//! Both keep the port [`SharedRecord`](ports::shared::SharedRecord). The third way, where a migration's
//! target keeps the record, is the agent's own store.

/// Changes of hands that are no migration.
mod changing;
/// The shared directory: the real one.
mod directory;
/// etcd: what is asked of it.
mod etcd;
/// etcd: how it is asked.
mod gateway;
/// What this host remembers of a record, so that one from a backup is noticed.
mod memory;
/// Asks a record that may not answer.
mod patient;
/// The shared directory: what nobody needs any more.
pub mod prune;
/// What is written down, and under which names.
pub mod record;
/// The shared directory: its protocol, step by step and without I/O.
pub mod steps;

pub use directory::SharedDir;
pub use etcd::Etcd;
pub use memory::Memory;
pub use patient::Patient;

use std::io;

/// A number that nobody else has.
fn draw() -> io::Result<u128> {
    let mut bytes = [0; 16];
    getrandom::getrandom(&mut bytes)?;
    Ok(u128::from_ne_bytes(bytes))
}
