//! The daemon of a host: it knows the host's VMs, moves them, keeps what must survive a crash, and answers
//! the command line.

/// What the command line asks, over HTTP.
pub mod api;
/// What an agent is told when it starts.
pub mod config;
/// From its start to its end.
pub mod daemon;
/// What takes bytes from strangers, for those who try to break it.
#[doc(hidden)]
pub mod fuzz;
/// What runs the VMs.
pub mod hypervisor;
/// Logs.
pub mod log;
/// Migrations: started, watched, cancelled.
pub mod migrate;
/// Names of hosts and VMs.
pub mod name;
/// Connections that other agents make.
pub mod peers;
/// What a shared record is told after a start.
mod publish;
/// What the journals say must still be done after a restart.
pub mod recovery;
/// What the agent says when it does not do what it was asked for.
pub mod refusal;
/// The VMs of this host.
pub mod registry;
/// How connections are protected.
pub mod security;
/// What must survive a crash: VMs, ownership, journals.
pub mod store;

mod process;

/// What guests print, kept within bounds.
mod consoles;

/// What only the agent's own user may read.
mod private;

pub use daemon::{AgentError, Context, run, run_until};
