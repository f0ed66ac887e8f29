//! Drives one migration: the machines of `proto` say what to do, the ports do it.
//!
//! The way of a page: a [`ports::Tracker`] captures it, `send` encodes it and writes it to a stream,
//! `receive` puts it into the target's memory; after a post-copy switchover `faults` fetches it ahead of all
//! others.

/// Steps that came to nothing.
mod broken;
/// TLS over a connection.
mod channel;
/// Connections: handshake, counting, control messages.
mod conn;
/// What takes bytes from strangers, for those who try to break it.
#[doc(hidden)]
pub mod fuzz;
/// What is done while the guest stands still, and when.
mod pause;
/// Ports that a thread uses while the driver goes on.
mod shared_port;
/// What is done now and then, and takes its time.
mod spaced;

/// Source: what compresses the next batch, and who may.
mod compression;
/// Source: how many streams are in use.
mod gate;
/// Source: which pages next.
mod queue;
/// Source: random numbers of one migration.
mod secrets;
/// Source: from guest memory to the streams.
mod send;
/// Source: the driver.
mod source;
/// Source: from guest memory to the file on the datastore.
mod spooler;
/// Source: what can be known before anything moves.
mod survey;

/// Target: takes connections in.
mod accept;
/// Target: pages that a guest waits for.
mod faults;
/// Both sides: what the target keeps from before.
mod kept;
/// Target: from the streams to guest memory.
mod receive;
/// Target: the driver.
mod target;
/// Target: from the file on the datastore to guest memory.
mod unspool;
/// Both sides: hashes of the stopped guest's memory.
mod verify;

// What a migration asks of the world.
pub use ports::{self, shared};

pub use accept::{Acceptor, RemoteRecord};
pub use conn::{Conn, Dial, TcpDial, Traffic};
pub use shared_port::SharedPort;
pub use source::{Handle, LinkHistory, Offered, Reading, SourceDriver, SourceParts, plan};

use broken::{Broken, why};
