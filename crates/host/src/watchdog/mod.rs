//! A process of its own that watches over a migration at its source: killed between `stop` and the fence,
//! or frozen while the guest's writers wait for it, the agent leaves a guest that stands still, and nobody
//! else would let it run again. The watchdog does so at once.
//!
//! It reads words from a pipe that only the agent writes to. When that ends, the last word of a pause says
//! what to do. The kernel keeps what was written before a death, so the word is never older than the agent's
//! last act:
//!
//! | last word | written | it then |
//! |---|---|---|
//! | pausing | before the journal says so, and before `stop` | lets QEMU go on, and the guest run |
//! | pausing a guest that somebody had stopped | the same | gives it its disks back, and leaves it so |
//! | fenced | when the fence is durable, before the authorization | nothing: the record decides (I1) |
//! | back | when the journal says so | does nothing |
//!
//! Killed between the durable fence and its word, it lets the guest run although the fence is durable.
//! That harms nobody: the authorization was not sent and never will be, so the target cannot claim; a
//! restarted agent claims first, and finds it running.
//!
//! A frozen agent (`SIGSTOP`, the cgroup freezer, a debugger, a core dump) keeps its pipe open, its write
//! protections and its pause. So while writers may have to wait, and in a pause, the watchdog expects a beat
//! each 50 ms. The thread that beats does so only if the threads have got on that answer the guest's writers,
//! and nobody has stopped the migration's own. Where beats are missed and the agent is seen to be frozen, or
//! they are missed for long (`verdict`), it is killed, which is the one thing that a frozen process does; the
//! kernel closes its descriptors, which lets every writer go, and the rest is as above. After the fence
//! nobody is killed.
//!
//! The agent hears an answer to each beat: a watchdog that is frozen or dead itself is replaced; where that
//! fails, a guest is not slowed any more and not stopped.
//!
//! A watchdog must not outlive its pause: a `cont` that comes late could start a guest that a later migration
//! has taken away. So it ends by itself after `LIMIT`, whatever it waits for, and a VM has one at a time: a
//! second one cannot be started.

mod heartbeat; // beats, as long as all get on for whom the guest waits
mod process; // its process
mod verdict; // whether an agent is frozen
mod watched; // what of a migration it hears
mod words; // what it is told

pub(crate) use heartbeat::Watchdog;
pub use process::watch;
pub(crate) use watched::{Watched, WatchedTracker};

/// How the command is called that becomes the watchdog.
pub const COMMAND: &str = "watchdog";
