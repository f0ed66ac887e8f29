//! The memory ports, kept with a process that knows nothing of us: a VMM, whichever it is.
//!
//! `Source` reads and tracks the RAM of a running process, `Target` fills that of a waiting one. Shared RAM
//! is opened through `/proc/PID/map_files` and outlives the process. A source's may also be private to it:
//! that is read in its address space, and is gone with it.
//!
//! Who holds the userfaultfd decides how a crash of ours ends. On the source only we do: the guest runs on.
//! On the target the process does too: its guest waits for a restarted agent instead of reading zeros.

/// Why a process cannot be attached to.
mod error;
/// Its RAM blocks, found among its mappings.
mod region;

/// Source: what of a block holds something.
mod content;
/// Source: memory that is thrown away meanwhile.
mod discards;
/// Both: memory that is handed over.
mod handover;
/// The RAM of a process that has ended.
mod kept;
/// The RAM, read and written.
mod memory;
/// Target: pages that the guest waits for.
mod missing;
/// Source: the parts of a block that have held something.
mod populated;
/// Source: the process that a VM leaves.
mod source;
/// Source: vCPUs that stand still for moments.
mod stuns;
/// Source: the one until the other is needed.
mod switching;
/// Target: the process that a VM comes to.
mod target;
/// Source: which pages were written, by whom, and when these may go on.
mod throttled;
/// Source: which pages were written, with the kernel resolving the writes.
mod tracker;

pub use error::{Ability, Error};
pub use handover::Lent;
pub use kept::Kept;
pub use memory::Memory;
pub use missing::Missing;
pub use region::RamBlock;
pub use source::{Source, Tracking};
pub use stuns::VcpuStuns;
pub use switching::SwitchingTracker;
pub use target::Target;
pub use throttled::ThrottlingTracker;
pub use tracker::AsyncTracker;
