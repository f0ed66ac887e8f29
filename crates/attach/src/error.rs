//! Why a process cannot be attached to.

use std::{fmt, io};

/// Why a process cannot be attached to. What to do about it depends on the VMM, which its crate adds.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The VMM said that a block is where nothing is, or not all of it.
    #[error("RAM block {block}: its process maps no {bytes} contiguous bytes of one file at {hva:#x}")]
    NotMapped {
        /// The VMM's name for it.
        block: String,
        /// Where the VMM said it was.
        hva: u64,
        /// How large the VMM said it was.
        bytes: u64,
    },
    /// The block of a target is memory that only its process can reach.
    #[error("RAM block {block} is private to its process")]
    NotShared {
        /// The VMM's name for it.
        block: String,
    },
    /// Huge pages can only be followed as wholes, without a word to us.
    #[error(
        "RAM block {block} consists of huge pages (hugetlbfs), whose writes only the asynchronous tracker \
         can follow (Linux 6.7)"
    )]
    HugePages {
        /// The VMM's name for it.
        block: String,
    },
    /// What a huge page that is not there holds would be in the file.
    #[error("RAM block {block} is a private mapping of a file on hugetlbfs that has content of its own")]
    HugeFile {
        /// The VMM's name for it.
        block: String,
    },
    /// A target is filled page by page.
    #[error(
        "RAM block {block} of the waiting VM consists of huge pages, which cannot be filled page by page"
    )]
    HugeTarget {
        /// The VMM's name for it.
        block: String,
    },
    /// One write makes a whole transparent huge page present, so that nobody could tell what has arrived.
    #[error(
        "RAM block {block}: this host backs shared memory with transparent huge pages even for single \
         writes; write \"never\" or \"advise\" to /sys/kernel/mm/transparent_hugepage/shmem_enabled, or \
         mount its tmpfs with huge=never"
    )]
    EagerHugePages {
        /// The VMM's name for it.
        block: String,
    },
    /// Its writers cannot be made to wait.
    #[error(
        "RAM block {block} is a file on a disk, whose writes only the asynchronous tracker can follow (Linux \
         6.7)"
    )]
    OnDisk {
        /// The VMM's name for it.
        block: String,
    },
    /// Memory may be thrown away, which only the asynchronous tracker follows.
    #[error(
        "the VM has a device that throws memory away (a balloon), which only the asynchronous tracker can \
         follow (Linux 6.7)"
    )]
    Discards,
    /// What was to be the source's own memory is not.
    #[error(
        "RAM block {block} of the waiting VM is not the memory that its source offered: its mark is not there"
    )]
    NotReached {
        /// The VMM's name for it.
        block: String,
    },
    /// More RAM blocks than a migration can name.
    #[error("a VM with {count} RAM blocks is not supported")]
    TooMany {
        /// How many there are.
        count: usize,
    },
    /// The kernel cannot do it.
    #[error("this kernel cannot {ability}")]
    Kernel {
        /// What was wanted of it.
        ability: Ability,
        /// What it answered.
        #[source]
        cause: io::Error,
    },
    /// A step failed.
    #[error("cannot {what} of process {pid}: {cause}")]
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

/// What a kernel can be too old for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ability {
    /// Following writes to shared memory, which wait until they are answered.
    FollowShared,
    /// Following writes to shared memory that resolve by themselves.
    TrackShared,
    /// Following writes to private memory: pages that were thrown away lose their protection, and only
    /// `PAGEMAP_SCAN` finds them.
    Private,
    /// Following writes to huge pages.
    HugePages,
    /// Hearing of memory that is thrown away: whoever writes could be made to wait and would be heard of,
    /// whoever throws memory away would not.
    Discards,
    /// Waiting for missing pages of shared memory.
    Missing,
}

impl fmt::Display for Ability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FollowShared => "tell of writes to shared memory: this takes Linux 5.19",
            Self::TrackShared => "track writes to shared memory by itself: this takes Linux 6.7",
            Self::Private => "track writes to private memory: this takes Linux 6.7",
            Self::HugePages => "track writes to huge pages (hugetlbfs): this takes Linux 6.7",
            Self::Discards => "track memory that a device throws away (a balloon): this takes Linux 6.7",
            Self::Missing => "wait for missing pages of shared memory: this takes Linux 4.11",
        })
    }
}

impl Error {
    /// Names the step that failed.
    pub(crate) fn step(what: impl Into<String>, pid: i32) -> impl FnOnce(io::Error) -> Self {
        move |cause| Self::Step { what: what.into(), pid, cause }
    }
}
