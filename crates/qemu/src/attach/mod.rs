//! The engine's memory ports, kept with an unmodified QEMU process.
//!
//! `Source` reads and tracks the RAM of a running QEMU, `Target` fills that of a waiting one. Shared RAM (`share=on`) is opened
//! through `/proc/PID/map_files` and outlives the QEMU process. A source's may also be private to it: that is read in its address
//! space, and is gone with it.
//!
//! Who holds the userfaultfd decides how a crash of ours ends. On the source only we do: the guest runs on. On the target
//! QEMU does too: its guest waits for a restarted agent instead of reading zeros.

mod discards;
mod governed;
mod memory;
mod missing;
mod region;
mod source;
mod stuns;
mod switching;
mod target;
mod tracker;

pub use governed::GovernedTracker;
pub use memory::Memory;
pub use missing::Missing;
pub use region::RamBlock;
pub use source::{Source, Tracking};
pub use stuns::VcpuStuns;
pub use switching::SwitchingTracker;
pub use target::Target;
pub use tracker::AsyncTracker;

use std::io;

/// From which Linux on writes to private memory can be followed: pages that were thrown away lose their protection, and only
/// `PAGEMAP_SCAN` finds them.
const NEEDS_FOR_PRIVATE: &str = "for memory that is private to QEMU this takes Linux 6.7; shared memory (-object \
                                 memory-backend-memfd,share=on,…) does with 5.19";

/// The same for huge pages.
const NEEDS_FOR_HUGE: &str =
    "for memory of huge pages (hugetlbfs) this takes Linux 6.7; start the VM without them";

/// The same for what QEMU throws away: a writer that could be made to wait would be heard of, memory that is thrown away would not.
const NEEDS_FOR_DISCARDS: &str =
    "for a device that throws memory away (a balloon) this takes Linux 6.7; leave it out";

/// Why a QEMU process cannot be attached to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// QEMU said that a block is where nothing is, or not all of it.
    #[error("RAM block {block}: QEMU maps no {bytes} contiguous bytes of one file at {hva:#x}")]
    NotMapped {
        /// QEMU's name for it.
        block: String,
        /// Where QEMU said it was.
        hva: u64,
        /// How large QEMU said it was.
        bytes: u64,
    },
    /// The block of a target is memory that only QEMU can reach.
    #[error(
        "RAM block {block} is private to QEMU: start the VM with -object memory-backend-memfd,share=on,… \
         or memory-backend-file,share=on,… as its memory"
    )]
    NotShared {
        /// QEMU's name for it.
        block: String,
    },
    /// Huge pages can only be followed as wholes, without a word to us.
    #[error(
        "RAM block {block} consists of huge pages (hugetlbfs), whose writes only the asynchronous tracker can follow (Linux 6.7, \
         without --tracker synchronous): use that tracker, or start the VM without huge pages"
    )]
    HugePages {
        /// QEMU's name for it.
        block: String,
    },
    /// What a huge page that is not there holds would be in the file.
    #[error(
        "RAM block {block} is a private mapping of a file on hugetlbfs that has content of its own: let its mem-path be a \
         directory or a new file, or say share=on"
    )]
    HugeFile {
        /// QEMU's name for it.
        block: String,
    },
    /// A target is filled page by page.
    #[error(
        "RAM block {block} of the waiting QEMU consists of huge pages, which cannot be filled page by page"
    )]
    HugeTarget {
        /// QEMU's name for it.
        block: String,
    },
    /// One write makes a whole transparent huge page present, so that nobody could tell what has arrived.
    #[error(
        "RAM block {block}: this host backs shared memory with transparent huge pages even for single writes; write \
         \"never\" or \"advise\" to /sys/kernel/mm/transparent_hugepage/shmem_enabled, or mount its tmpfs with huge=never"
    )]
    EagerHugePages {
        /// QEMU's name for it.
        block: String,
    },
    /// Its writers cannot be made to wait.
    #[error(
        "RAM block {block} is a file on a disk, whose writes only the asynchronous tracker can follow (Linux 6.7, without \
         --tracker synchronous): put its mem-path on a tmpfs such as /dev/shm, or use memory-backend-memfd"
    )]
    OnDisk {
        /// QEMU's name for it.
        block: String,
    },
    /// Memory may be thrown away, which only the asynchronous tracker follows.
    #[error(
        "the VM has a device that throws memory away (a balloon), which only the asynchronous tracker can follow (Linux 6.7, \
         without --tracker synchronous): leave it out, or use that tracker"
    )]
    Discards,
    /// More RAM blocks than a migration can name.
    #[error("a VM with {count} RAM blocks is not supported")]
    TooMany {
        /// How many QEMU has.
        count: usize,
    },
    /// The kernel cannot do it.
    #[error("this kernel cannot {what}: {needs}")]
    Kernel {
        /// What was wanted of it.
        what: &'static str,
        /// What it takes.
        needs: &'static str,
        /// What it answered.
        #[source]
        cause: io::Error,
    },
    /// A step failed.
    #[error("cannot {what} of QEMU process {pid}: {cause}")]
    Step {
        /// Which one, such as `open RAM block pc.ram`.
        what: String,
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

impl Error {
    /// Names the step that failed.
    fn step(what: impl Into<String>, pid: i32) -> impl FnOnce(io::Error) -> Self {
        move |cause| Self::Step { what: what.into(), pid, cause }
    }
}
