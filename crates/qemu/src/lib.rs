//! The ports kept with a real, unmodified QEMU process: its monitor, its device state, its files. `attach`
//! keeps those of memory.

/// The human-readable description of a VM that `run` starts.
pub mod vmfile;

/// What a host must know to start a QEMU that can take a VM over.
pub mod recipe;

/// Whether two hosts have the same file.
pub mod sharing;

/// The host that a VM is started on.
pub mod host;

/// As whom QEMU runs.
pub mod account;

/// What the VMs of other hosts may use here.
pub mod limits;

/// Starting a QEMU process, and taking away what belonged to it.
pub mod launch;

/// What the character devices of a VM end in here.
pub mod ports;

/// TAP interfaces of a VM.
pub mod tap;
mod tpm;

/// What takes bytes from strangers, for those who try to break it.
#[doc(hidden)]
pub mod fuzz;

/// QEMU's monitor protocol.
pub mod qmp;

/// Which process a QMP socket leads to.
pub mod find;

/// The RAM blocks of a QEMU process.
pub mod ram;

/// The machine port, kept with a QEMU process.
pub mod vm;

/// A QEMU that stands still as a whole.
pub mod frozen;

/// Taking charge of a QEMU that somebody else started.
pub mod adopt;

/// Whether this host can take a VM over.
pub mod preflight;

/// How much memory a VM can get here.
pub mod room;

/// What guest and virtio devices have agreed on.
pub mod virtio;

mod apart;
mod arriving;
mod confine;
mod cpu;
mod disks;
mod flush;
mod granted;
mod halt;
mod held;
mod known;
mod made_up;
mod private;
mod random;
mod remove;
mod snapshot;
mod spare;
mod state;
mod vhost;

pub use account::Account;
pub use adopt::{Adopted, Examined};
pub use host::{Host, Kvm};
pub use limits::Limits;
pub use ram::MemoryError;
pub use recipe::{Accel, Recipe, Tpm, TpmVersion};
pub use spare::SpareCores;
pub use vm::{Begun, Handle, OpenError, Vm};
pub use vmfile::VmFile;
